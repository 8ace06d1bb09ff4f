"""A quantised linear layer as it lies in memory and on disk: its tensors and what they mean by its format.

What differs between formats is in `formats.py`, and is asked there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formats import FORMATS, GROUP_SIZE, positive
from .rotate import rotate

# A layer in parts along K, `prefix.part0.weight` and so on, each a layer with a description of its own.
SPLIT = "slipstream_split"


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLinear:
    """A linear layer of N outputs and K inputs with a 4-bit (or int8) weight.

    format: a key of FORMATS. shape: (N, K); dtype: of the original weight.
    weight: int8 (N, K/2), low nibble = even column; int8 (N, K) for 8 bits.
    weight_scale: (K/group_size, N) in 16 bit; per-row formats: float32, (N,) or for 8 bits (N, 1).
    proj_down: (K, R), multiplies raw x (1/smooth is folded in); proj_up: (N, R); smooth: (K,), divides x. These three
    are always there in group formats (R may be 0), in per-row formats only proj_* and only for a LoRA in memory.
    bias: (N,) or None; act_unsigned: the main path takes x + GELU_SHIFT, in 4 bit unsigned; bias holds the correction;
    rotation: size of the Hadamard blocks, 0 for none. Raises ValueError when shapes and format disagree.
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    weight: Tensor
    weight_scale: Tensor
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    smooth: Tensor | None = None
    bias: Tensor | None = None
    group_size: int = GROUP_SIZE
    act_unsigned: bool = False
    rotation: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}, choose one of {', '.join(FORMATS)}")
        (n, k), row = self.shape, FORMATS[self.format]
        if self.group_size < 1 or self.rotation < 0 or k % (1 if row.per_row else self.group_size):
            raise ValueError(f"groups of {self.group_size} do not divide the {k} inputs of the layer")
        if self.rotation and k % self.rotation:
            raise ValueError(f"a rotation of size {self.rotation} does not divide the {k} inputs of the layer")
        expected = row.shapes(n, k, self.group_size)
        if self.proj_down is not None or row.branch:
            rank = self.rank
            expected.update(proj_down=(k, rank), proj_up=(n, rank))
        if self.bias is not None:
            expected["bias"] = (n,)
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "nothing" if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{self.format} of {n} x {k} needs {name} of shape {shape}, got {found}")
        if self.weight.dtype != torch.int8:
            raise ValueError(f"{self.format} stores its weight in int8, got {self.weight.dtype}")
        if self.act_unsigned and (self.rotation or row.per_row):
            raise ValueError("unsigned activations need group scales and no rotation, which would make them negative")

    @property
    def act_bits(self) -> int:
        """Bits of an activation on the main path: 4, 8, or 16 for not rounded."""
        return FORMATS[self.format].act_bits

    @property
    def rank(self) -> int:
        """Columns of the low-rank branch, LoRAs included."""
        return 0 if self.proj_down is None else self.proj_down.shape[-1]

    @property
    def homeless_branch(self) -> bool:
        """It has a low-rank branch, of a LoRA, that a file of its format has no place for."""
        return self.rank > 0 and not FORMATS[self.format].branch

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their name on disk."""
        named = {
            "weight": self.weight,
            "weight_scale": self.weight_scale,
            "weight_proj_down": self.proj_down,
            "weight_proj_up": self.proj_up,
            "weight_smooth_factor": self.smooth,
            "bias": self.bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; what layers share (q, k, v share smooth and proj_down) is counted in each."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def __call__(self, x: Tensor, share: tuple[Hashable, int] | None = None, kernel: str | None = None) -> Tensor:
        """The layer's output (..., N) in x's dtype, by the fastest kernel that agrees with the exact reference.

        share: (key, count) of so many layers that are given the same x and have the same smooth factors and
        down-projection, so that it is quantised once; kernel: the name of one, such as "reference".
        """
        return FORMATS[self.format].compute(self, x, share, kernel)

    def with_act_bits(self, bits: int) -> QuantisedLinear:
        """The same tensors run with activations of so many bits. Raises ValueError where the format cannot be."""
        known = FORMATS[self.format].finer()
        if bits not in known:
            raise ValueError(f"{self.format} cannot run with {bits}-bit activations")
        return dataclasses.replace(self, format=known[bits].name)

    def codes(self) -> Tensor:
        """The weight's codes, int8 (N, K)."""
        return FORMATS[self.format].unpack(self.weight)

    def main_weight(self) -> Tensor:
        """What the main path multiplies rotate((x + shift) / smooth) by: codes times scales, float32 (N, K)."""
        return FORMATS[self.format].main_weight(self)

    def dequantise(self) -> Tensor:
        """The weight this layer computes with when activations are not rounded, float32 (N, K)."""
        weight = rotate(self.main_weight(), self.rotation)
        if self.smooth is not None:
            weight = weight.div_(self.smooth.float())
        if self.proj_down is not None and self.proj_up is not None:
            weight.addmm_(self.proj_up.float(), self.proj_down.float().T)
        return weight

    def description(self) -> dict[str, object]:
        """The JSON of `comfy_quant`: what a reader needs beside the tensors."""
        return FORMATS[self.format].description(self)

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The layer's tensors under the names `prefix.weight`, ..., and its description as `prefix.comfy_quant`.

        Raises ValueError for a low-rank branch that the format's files have no place for.
        """
        if self.homeless_branch:
            raise ValueError(f"{self.format} files cannot hold a low-rank branch; save the layer without its LoRA")
        found = {f"{prefix}.{name}": tensor.contiguous() for name, tensor in self.tensors.items()}
        found[f"{prefix}.comfy_quant"] = json_tensor(self.description())
        return found

    @classmethod
    def from_state_dict(cls, prefix: str, tensors: Mapping[str, Tensor]) -> QuantisedLinear:
        """Read what `state_dict` wrote, or a file of the host or of comfy-kitchen in its natural (untiled) layout.

        Raises ValueError in one sentence when a tensor is missing, the JSON cannot be read or the format is unknown.
        """
        found = description_of(prefix, tensors)
        missing = [name for name in ("weight", "weight_scale") if f"{prefix}.{name}" not in tensors]
        if missing:
            raise ValueError(f"{prefix} has no {missing[0]}, so it is not a whole quantised layer")

        if tensors[f"{prefix}.weight"].ndim != 2 or found.get("layout", "natural") != "natural":
            raise ValueError(f"{prefix} has its weight in a tiled layout, only plain rows can be read")
        fields = next(filter(None, (row.read(prefix, found, tensors) for row in FORMATS.values())), None)
        if fields is None:
            raise ValueError(f"{prefix} is stored as {found.get('format')!r}, which this version cannot read")
        layer = cls(**fields)
        shape = found.get("orig_shape", list(layer.shape))
        if list(layer.shape) != shape:
            raise ValueError(f"{prefix} says it is {shape} but its tensors are {list(layer.shape)}")
        return layer


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedSplit:
    """A linear layer behind a concatenation: parts along K, each on its own channels, whose outputs add up.

    parts: at least one, of one N and one dtype. Raises ValueError for others.
    """

    parts: tuple[QuantisedLinear, ...]

    def __post_init__(self) -> None:
        if len({(part.shape[0], part.dtype) for part in self.parts}) != 1:
            raise ValueError("the parts of a split layer need one number of outputs and one dtype")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the whole layer."""
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """Of the original weight."""
        return self.parts[0].dtype

    @property
    def format(self) -> str:
        """Of the first part."""
        return self.parts[0].format

    @property
    def rank(self) -> int:
        """Of the widest low-rank branch."""
        return max(part.rank for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Tensor, share: tuple[Hashable, int] | None = None, kernel: str | None = None) -> Tensor:
        """The layer's output (..., N) in x's dtype; see `QuantisedLinear`. Parts share their input with nobody."""
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"the layer takes {self.shape[1]} channels, got {x.shape[-1]}")
        pieces = x.split([part.shape[1] for part in self.parts], -1)
        outputs = [part(piece, kernel=kernel) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.stack(outputs).sum(0)

    def dequantise(self) -> Tensor:
        """The weight this layer computes with when activations are not rounded, float32 (N, K)."""
        return torch.cat([part.dequantise() for part in self.parts], 1)

    def description(self) -> dict[str, object]:
        """The JSON of `comfy_quant`; each part has its own beside it."""
        return {"format": SPLIT, "parts": len(self.parts), "orig_dtype": str(self.dtype), "orig_shape": [*self.shape]}

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The parts under `prefix.part0`, ... and the description. Raises ValueError as `QuantisedLinear` does."""
        found = {f"{prefix}.comfy_quant": json_tensor(self.description())}
        for i, part in enumerate(self.parts):
            found |= part.state_dict(f"{prefix}.part{i}")
        return found


def read_layer(prefix: str, tensors: Mapping[str, Tensor]) -> QuantisedLinear | QuantisedSplit:
    """Read a layer of any kind this version knows; see `QuantisedLinear.from_state_dict`."""
    found = description_of(prefix, tensors)
    if found.get("format") != SPLIT:
        return QuantisedLinear.from_state_dict(prefix, tensors)
    count = positive(prefix, found, "parts", 0)
    layer = QuantisedSplit(tuple(QuantisedLinear.from_state_dict(f"{prefix}.part{i}", tensors) for i in range(count)))
    if list(layer.shape) != found.get("orig_shape"):
        raise ValueError(f"{prefix} says it is {found.get('orig_shape')} but its parts are {list(layer.shape)}")
    return layer


def json_tensor(description: Mapping[str, object]) -> Tensor:
    """A description as the bytes of its JSON, uint8: what `comfy_quant` is."""
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def description_of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON of a layer's `comfy_quant`. Raises ValueError where it is missing or damaged."""
    raw = tensors.get(f"{prefix}.comfy_quant")
    if raw is None:
        raise ValueError(f"{prefix} has no comfy_quant, so it is not a quantised layer")
    try:
        found = json.loads(bytes(raw.to(torch.uint8).flatten().tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the comfy_quant of {prefix} is not JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"the comfy_quant of {prefix} is not a JSON object")
    return found
