"""What a quantised linear layer is, in memory and on disk.

    main path    y = sum over groups g of dot(qx_g, qw_g) xscale_g wscale_g      qx from rotate((x + shift) / smooth)
    low-rank     + (x proj_down) proj_up^T                                        raw x, 16-bit
    bias         + bias                                                           corrected for the shift

Tensor names on disk are comfy-kitchen's and the host's, so that a file is read wherever the format is known.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.linear import convrot_linear, w4a4_linear
from ..kernels.reference import GELU_SHIFT, pack_int4, unpack_int4
from .rotate import rotate

__all__ = [
    "FORMATS",
    "GELU_SHIFT",
    "Format",
    "QuantisedLinear",
    "QuantisedSplit",
    "pack_int4",
    "packed_bytes",
    "read_layer",
    "unpack_int4",
]

GROUP_SIZE = 64  # one k-step of the 4-bit tensor core instruction, and the only size that SVDQuant files have
DTYPES = {"torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16, "torch.float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Format:
    """One row of FORMATS. disk: the host's or kitchen's name; per_row: one weight scale per row instead of groups."""

    disk: str
    weight_bits: int
    act_bits: int
    per_row: bool


# `w4a8` and `w4a16` are the same tensors as `svdquant_w4a4`, run with finer activations.
FORMATS = {
    "svdquant_w4a4": Format("svdquant_w4a4", 4, 4, False),
    "w4a8": Format("svdquant_w4a4", 4, 8, False),
    "w4a16": Format("svdquant_w4a4", 4, 16, False),
    "convrot_w4a4": Format("convrot_w4a4", 4, 4, True),
    "int8_convrot": Format("int8_tensorwise", 8, 8, True),
}
BY_ACT_BITS = {row.act_bits: name for name, row in FORMATS.items() if not row.per_row}

# A reader that knows `svdquant_w4a4` and no rotation would compute nonsense, so rotated groups carry a name of ours.
ROTATED = "slipstream_hadamard_w4a4"

# A layer in parts along K, `prefix.part0.weight` and so on, each a layer with a description of its own.
SPLIT = "slipstream_split"


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLinear:
    """A linear layer of N outputs and K inputs with a 4-bit (or int8) weight.

    format: a key of FORMATS. shape: (N, K); dtype: of the original weight.
    weight: int8 (N, K/2), low nibble = even column; int8 (N, K) in `int8_convrot`.
    weight_scale: (K/group_size, N) in 16 bit; per-row formats: float32, (N,) or (N, 1) in `int8_convrot`.
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
        expected: dict[str, tuple[int, ...]] = {"weight": (n, k * row.weight_bits // 8)}
        if row.per_row:
            expected["weight_scale"] = (n, 1) if row.weight_bits == 8 else (n,)
        else:
            expected["weight_scale"] = (k // self.group_size, n)
            expected["smooth"] = (k,)
        if self.proj_down is not None or not row.per_row:
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
        row = FORMATS[self.format]
        options = {"proj_down": self.proj_down, "proj_up": self.proj_up, "share": share, "kernel": kernel}
        if row.per_row:
            return convrot_linear(
                x, self.weight, self.weight_scale, self.bias, rotation=self.rotation, bits=row.weight_bits, **options
            )
        return w4a4_linear(
            x,
            self.weight,
            self.weight_scale,
            smooth=self.smooth,
            bias=self.bias,
            act_bits=row.act_bits,
            group_size=self.group_size,
            unsigned=self.act_unsigned,
            rotation=self.rotation,
            **options,
        )

    def with_act_bits(self, bits: int) -> QuantisedLinear:
        """The same tensors run with 4, 8 or 16-bit activations. Raises ValueError for per-row formats or other bits."""
        if FORMATS[self.format].per_row or bits not in BY_ACT_BITS:
            raise ValueError(f"{self.format} cannot run with {bits}-bit activations")
        return dataclasses.replace(self, format=BY_ACT_BITS[bits])

    def codes(self) -> Tensor:
        """The weight's codes, int8 (N, K)."""
        return unpack_int4(self.weight) if FORMATS[self.format].weight_bits == 4 else self.weight

    def main_weight(self) -> Tensor:
        """What the main path multiplies rotate((x + shift) / smooth) by: codes times scales, float32 (N, K)."""
        codes = self.codes().float()
        if FORMATS[self.format].per_row:
            return codes.mul_(self.weight_scale.float().reshape(-1, 1))
        groups = codes.view(self.shape[0], -1, self.group_size)
        return groups.mul_(self.weight_scale.float().T[..., None]).view(self.shape)

    def dequantise(self) -> Tensor:
        """The weight this layer computes with when activations are not rounded, float32 (N, K)."""
        weight = rotate(self.main_weight(), self.rotation)
        if self.smooth is not None:
            weight = weight.div_(self.smooth.float())
        if self.rank:
            weight.addmm_(self.proj_up.float(), self.proj_down.float().T)
        return weight

    def description(self) -> dict[str, object]:
        """The JSON of `comfy_quant`: what a reader needs beside the tensors."""
        row, dtype = FORMATS[self.format], str(self.dtype)
        if self.format == "convrot_w4a4":
            return {"format": row.disk, "convrot_groupsize": self.rotation, "orig_dtype": dtype}
        if self.format == "int8_convrot":
            return {"format": row.disk, "convrot": True, "convrot_groupsize": self.rotation, "orig_dtype": dtype}
        found: dict[str, object] = {
            "format": ROTATED if self.rotation else row.disk,
            "group_size": self.group_size,
            "rank": self.rank,
            "act_unsigned": self.act_unsigned,
            "act_bits": self.act_bits,
            "orig_dtype": dtype,
            "orig_shape": list(self.shape),
        }
        if self.rotation:
            found["convrot_groupsize"] = self.rotation
        return found

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The layer's tensors under the names `prefix.weight`, ..., and its description as `prefix.comfy_quant`.

        Raises ValueError for a per-row layer with a low-rank branch, which the host's formats have no place for.
        """
        if FORMATS[self.format].per_row and self.rank:
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

        def tensor(name: str) -> Tensor | None:
            return tensors.get(f"{prefix}.{name}")

        name, weight, scale, bias = found.get("format"), tensor("weight"), tensor("weight_scale"), tensor("bias")
        if weight.ndim != 2 or found.get("layout", "natural") != "natural":
            raise ValueError(f"{prefix} has its weight in a tiled layout, only plain rows can be read")
        rotation = _integer(prefix, found, "convrot_groupsize", 256)
        if name == "convrot_w4a4" or (name == "int8_tensorwise" and found.get("convrot")):
            bits = 4 if name == "convrot_w4a4" else 8
            n, k = weight.shape[0], weight.shape[1] * 8 // bits
            scale = scale.float().reshape((n,) if bits == 4 else (n, 1)) if scale.numel() == n else scale
            own = "convrot_w4a4" if bits == 4 else "int8_convrot"
            dtype = DTYPES.get(str(found.get("orig_dtype")), torch.bfloat16 if bias is None else bias.dtype)
            layer = cls(own, (n, k), dtype, weight, scale, bias=bias, rotation=rotation)
        elif name in ("svdquant_w4a4", ROTATED):
            bits = _integer(prefix, found, "act_bits", 4)
            if bits not in BY_ACT_BITS:
                raise ValueError(f"{prefix} wants {bits}-bit activations, this version knows 4, 8 and 16")
            layer = cls(
                BY_ACT_BITS[bits],
                (weight.shape[0], weight.shape[1] * 2),
                DTYPES.get(str(found.get("orig_dtype")), scale.dtype),
                weight,
                scale,
                tensor("weight_proj_down"),
                tensor("weight_proj_up"),
                tensor("weight_smooth_factor"),
                bias,
                _integer(prefix, found, "group_size", GROUP_SIZE),
                bool(found.get("act_unsigned", False)),
                rotation if name == ROTATED else 0,
            )
        else:
            raise ValueError(f"{prefix} is stored as {name!r}, which this version cannot read")
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

    def __call__(self, x: Tensor, share: None = None, kernel: str | None = None) -> Tensor:
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
    count = _integer(prefix, found, "parts", 0)
    layer = QuantisedSplit(tuple(QuantisedLinear.from_state_dict(f"{prefix}.part{i}", tensors) for i in range(count)))
    if list(layer.shape) != found.get("orig_shape"):
        raise ValueError(f"{prefix} says it is {found.get('orig_shape')} but its parts are {list(layer.shape)}")
    return layer


def json_tensor(description: Mapping[str, object]) -> Tensor:
    """A description as the bytes of its JSON, uint8: what `comfy_quant` is."""
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def description_of(prefix: str, tensors: Mapping[str, Tensor]) -> dict:
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


def _integer(prefix: str, found: dict, key: str, default: int) -> int:
    value = found.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{prefix} has {key} {value!r} where a positive number is needed")
    return value


def packed_bytes(n: int, k: int, rank: int = 32, group_size: int = GROUP_SIZE, bias: bool = True) -> int:
    """Bytes of an svdquant_w4a4 layer of N x K in 16-bit storage, by formula; plan a model's size with it."""
    return n * k // 2 + 2 * (n * (k // group_size) + rank * (n + k) + k + n * bias)
