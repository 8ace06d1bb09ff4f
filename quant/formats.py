"""The formats of a quantised linear layer, one object each: whatever differs between two formats is asked of it.

    main path    y = sum over groups g of dot(qx_g, qw_g) xscale_g wscale_g      qx from rotate((x + shift) / smooth)
    low-rank     + (x proj_down) proj_up^T                                        raw x, 16-bit
    bias         + bias                                                           corrected for the shift

Tensor names on disk are comfy-kitchen's and the host's, so that a file is read wherever the format is known. A format
is added as a row of FORMATS: of `GroupFormat`, of `RowFormat`, or of a class of its own; what it computes that
`kernels.layer.Layer` does not say becomes a function of `kernels/reference.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..kernels.layer import Layer
from ..kernels.linear import linear
from ..kernels.reference import pack_int4, unpack_int4
from .rotate import SIZES, rotation_size

Made = TypeVar("Made", covariant=True)


class Work(Protocol[Made]):
    """What a format asks when a layer is made, see `layer.Work`: codes in groups, or one scale per row."""

    def grouped(self) -> Made: ...

    def per_row(self) -> Made: ...


class Stored(Protocol):
    """What a format reads of a layer, see `packed.QuantisedLinear`."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def weight_scale(self) -> Tensor: ...

    @property
    def proj_down(self) -> Tensor | None: ...

    @property
    def proj_up(self) -> Tensor | None: ...

    @property
    def smooth(self) -> Tensor | None: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def group_size(self) -> int: ...

    @property
    def act_unsigned(self) -> bool: ...

    @property
    def rotation(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def codes(self) -> Tensor: ...


GROUP_SIZE = 64  # one k-step of the 4-bit tensor core instruction, and the only size that SVDQuant files have
DTYPES = {"torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16, "torch.float32": torch.float32}

# A reader that knows `svdquant_w4a4` and no rotation would compute nonsense, so rotated groups carry a name of ours.
ROTATED = "slipstream_hadamard_w4a4"

# As long as any description of a layer is: the room that a file keeps for one.
LONGEST = {
    "format": ROTATED,
    "group_size": 9999,
    "rank": 9999,
    "act_unsigned": False,
    "act_bits": 16,
    "orig_dtype": "torch.bfloat16",
    "orig_shape": [9999999, 9999999],
    "convrot_groupsize": 9999,
}


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """How a layer of N outputs and K inputs is stored and computed.

    name: of the format in layers and wishes; disk: its name in a file, the host's or comfy-kitchen's; bits of a stored
    weight and of an activation, 16 for not rounded; words: what it is, for the canvas; careful: name of the format of
    layers that must not have coarse activations, empty for itself. Formats of one `disk` are the same tensors, run with
    other activations.
    """

    name: str
    disk: str
    weight_bits: int
    act_bits: int
    words: str
    careful: str = ""

    per_row: ClassVar[bool]  # one scale per weight row and token, instead of groups
    branch: ClassVar[bool]  # a file has a place for a low-rank branch

    # What a layer holds

    @abstractmethod
    def shapes(self, n: int, k: int, group_size: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are always there, but for the branch; `weight` and `weight_scale` at least."""

    def pack(self, codes: Tensor) -> Tensor:
        """The stored weight of codes, int8 (N, K)."""
        return pack_int4(codes) if self.weight_bits == 4 else codes.contiguous()

    def unpack(self, weight: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return unpack_int4(weight) if self.weight_bits == 4 else weight

    @abstractmethod
    def stored_scale(self, scales: Tensor) -> Tensor:
        """The stored form of scales (N, G), one per row and group."""

    @abstractmethod
    def main_weight(self, layer: Stored) -> Tensor:
        """What the main path multiplies rotate((x + shift) / smooth) by: codes times scales, float32 (N, K)."""

    @abstractmethod
    def nbytes(self, n: int, k: int, rank: int) -> int:
        """Most bytes that a layer with a bias takes, in 16-bit storage."""

    # What a file says of it

    @abstractmethod
    def description(self, layer: Stored) -> dict[str, object]:
        """The JSON of `comfy_quant`: what a reader needs beside the tensors; no longer than LONGEST."""

    @abstractmethod
    def read(self, prefix: str, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The fields of a stored layer by its description `found`; None where it is another format's.

        tensors: of a file, `weight` and `weight_scale` of the layer `prefix` among them. Raises ValueError.
        """

    # How a layer is made

    def fits(self, k: int) -> bool:
        """Whether a layer of K inputs can have it."""
        return k % GROUP_SIZE == 0

    def asked_for(self, act_bits: int) -> Format:
        """The format for activations of so many bits; itself where a wish for it has fixed them by its name."""
        return self.finer().get(act_bits, self) if self.name == self.disk else self

    def finer(self) -> dict[int, Format]:
        """All formats of the same tensors, by the bits of their activations."""
        return {row.act_bits: row for row in FORMATS.values() if row.disk == self.disk}

    def rotation(self, asked: int) -> int:
        """Largest Hadamard block of a layer for which `asked` is wanted; 0 for none."""
        return asked

    @abstractmethod
    def options(self, n: int, k: int, rank: int, smooth: str, after_gelu: bool, rotated: bool) -> dict[str, Any]:
        """The fields of `layer.Spec` for a layer of N x K; rotated: whether a rotation is wanted where there may be."""

    @abstractmethod
    def quantise(self, work: Work[Made]) -> Made:
        """Codes, scales and what belongs to them."""

    # What it computes

    def operands(self, layer: Stored, share: tuple[Hashable, int] | None = None) -> Layer:
        """The layer as kernels take it."""
        return Layer(
            layer.weight, layer.weight_scale, layer.proj_down, layer.proj_up, layer.smooth, layer.bias,
            self.act_bits, self.weight_bits, 0 if self.per_row else layer.group_size, layer.act_unsigned,
            layer.rotation, share,
        )  # fmt: skip

    def compute(
        self, layer: Stored, x: Tensor, share: tuple[Hashable, int] | None = None, kernel: str | None = None
    ) -> Tensor:
        """The layer's output (..., N) in x's dtype; see `QuantisedLinear.__call__`."""
        return linear(x, self.operands(layer, share), kernel)


@dataclass(frozen=True, slots=True)
class GroupFormat(Format):
    """SVDQuant: a 16-bit scale per weight row and group of columns, a smooth factor and a low-rank branch.

    disk_rotated: `disk` of a rotated layer, which a reader that knows no rotation must not take for its own.
    """

    disk_rotated: str = ROTATED

    per_row: ClassVar[bool] = False
    branch: ClassVar[bool] = True

    def shapes(self, n: int, k: int, group_size: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (n, k * self.weight_bits // 8), "weight_scale": (k // group_size, n), "smooth": (k,)}

    def stored_scale(self, scales: Tensor) -> Tensor:
        return scales.T

    def main_weight(self, layer: Stored) -> Tensor:
        groups = layer.codes().float().view(layer.shape[0], -1, layer.group_size)
        return groups.mul_(layer.weight_scale.float().T[..., None]).view(layer.shape)

    def nbytes(self, n: int, k: int, rank: int) -> int:
        return n * k // 2 + 2 * (n * (k // GROUP_SIZE) + rank * (n + k) + k + n)

    def description(self, layer: Stored) -> dict[str, object]:
        found: dict[str, object] = {
            "format": self.disk_rotated if layer.rotation else self.disk,
            "group_size": layer.group_size,
            "rank": layer.rank,
            "act_unsigned": layer.act_unsigned,
            "act_bits": self.act_bits,
            "orig_dtype": str(layer.dtype),
            "orig_shape": list(layer.shape),
        }
        if layer.rotation:
            found["convrot_groupsize"] = layer.rotation
        return found

    def read(self, prefix: str, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        if found.get("format") not in (self.disk, self.disk_rotated):
            return None
        bits, known = positive(prefix, found, "act_bits", 4), self.finer()
        if bits not in known:
            raise ValueError(f"{prefix} wants {bits}-bit activations, this version knows 4, 8 and 16")
        weight, scale = tensors[f"{prefix}.weight"], tensors[f"{prefix}.weight_scale"]
        return {
            "format": known[bits].name,
            "shape": (weight.shape[0], weight.shape[1] * 8 // self.weight_bits),
            "dtype": DTYPES.get(str(found.get("orig_dtype")), scale.dtype),
            "weight": weight,
            "weight_scale": scale,
            "proj_down": tensors.get(f"{prefix}.weight_proj_down"),
            "proj_up": tensors.get(f"{prefix}.weight_proj_up"),
            "smooth": tensors.get(f"{prefix}.weight_smooth_factor"),
            "bias": tensors.get(f"{prefix}.bias"),
            "group_size": positive(prefix, found, "group_size", GROUP_SIZE),
            "act_unsigned": bool(found.get("act_unsigned", False)),
            "rotation": positive(prefix, found, "convrot_groupsize", SIZES[0]) if found["format"] != self.disk else 0,
        }

    def options(self, n: int, k: int, rank: int, smooth: str, after_gelu: bool, rotated: bool) -> dict[str, Any]:
        rotated = rotated and not after_gelu  # unsigned activations are worth more than a rotation
        rotation = SIZES[0] if rotated else 0
        unsigned = after_gelu and not rotated
        return {"rank": min(rank, n, k), "rotation": rotation, "smooth": smooth, "act_unsigned": unsigned}

    def quantise(self, work: Work[Made]) -> Made:
        return work.grouped()


@dataclass(frozen=True, slots=True)
class RowFormat(Format):
    """ConvRot: one float32 scale per weight row and per token, and no branch in a file, only a LoRA's in memory.

    rotates: weight and activation are always rotated; marks: keys that are true in the description.
    """

    rotates: bool = True
    marks: tuple[str, ...] = ()

    per_row: ClassVar[bool] = True
    branch: ClassVar[bool] = False

    def shapes(self, n: int, k: int, group_size: int) -> dict[str, tuple[int, ...]]:
        scale = (n, 1) if self.weight_bits == 8 else (n,)
        return {"weight": (n, k * self.weight_bits // 8), "weight_scale": scale}

    def stored_scale(self, scales: Tensor) -> Tensor:
        return scales if self.weight_bits == 8 else scales.flatten()

    def main_weight(self, layer: Stored) -> Tensor:
        return layer.codes().float().mul_(layer.weight_scale.float().reshape(-1, 1))

    def nbytes(self, n: int, k: int, rank: int) -> int:
        return n * k * self.weight_bits // 8 + 8 * n

    def description(self, layer: Stored) -> dict[str, object]:
        found: dict[str, object] = {"format": self.disk, **dict.fromkeys(self.marks, True)}
        if self.rotates:
            found["convrot_groupsize"] = layer.rotation
        return {**found, "orig_dtype": str(layer.dtype)}

    def read(self, prefix: str, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        if found.get("format") != self.disk or not all(found.get(mark) for mark in self.marks):
            return None
        weight, scale = tensors[f"{prefix}.weight"], tensors[f"{prefix}.weight_scale"]
        bias, (n, k) = tensors.get(f"{prefix}.bias"), (weight.shape[0], weight.shape[1] * 8 // self.weight_bits)
        if scale.numel() == n:  # other writers have other shapes and dtypes of the same numbers
            scale = scale.float().reshape(self.shapes(n, k, GROUP_SIZE)["weight_scale"])
        dtype = torch.bfloat16 if bias is None else bias.dtype
        return {
            "format": self.name,
            "shape": (n, k),
            "dtype": DTYPES.get(str(found.get("orig_dtype")), dtype),
            "weight": weight,
            "weight_scale": scale,
            "bias": bias,
            "rotation": positive(prefix, found, "convrot_groupsize", SIZES[0]) if self.rotates else 0,
        }

    def fits(self, k: int) -> bool:
        return (k % GROUP_SIZE == 0 or self.weight_bits == 8) and (not self.rotates or rotation_size(k) > 0)

    def rotation(self, asked: int) -> int:
        return (asked or SIZES[0]) if self.rotates else asked

    def options(self, n: int, k: int, rank: int, smooth: str, after_gelu: bool, rotated: bool) -> dict[str, Any]:
        # a group size that divides K, which scales per row do not depend on
        return {"smooth": "none", "scale_search": False, "group_size": rotation_size(k) or 1}

    def quantise(self, work: Work[Made]) -> Made:
        return work.per_row()


_FINER = "4-bit weights with 8- or 16-bit activations, nearer to the original"
_HOSTS = "the host's own layouts"

# In the order of the list on the canvas.
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        GroupFormat("svdquant_w4a4", "svdquant_w4a4", 4, 4, "comfy-kitchen's layout", "w4a16"),
        GroupFormat("w4a8", "svdquant_w4a4", 4, 8, _FINER, "w4a16"),
        GroupFormat("w4a16", "svdquant_w4a4", 4, 16, _FINER),
        RowFormat("convrot_w4a4", "convrot_w4a4", 4, 4, _HOSTS, "int8_convrot"),
        RowFormat("int8_convrot", "int8_tensorwise", 8, 8, _HOSTS, marks=("convrot",)),
    )
}

# What `auto` takes, rotated where the layer allows it; what a layer gets that 4 bits do not serve.
GROUPS, INT8 = FORMATS["svdquant_w4a4"], FORMATS["int8_convrot"]


def positive(prefix: str, found: Mapping[str, Any], key: str, default: int) -> int:
    """A number of a description, or the default. Raises ValueError where it is something else."""
    value = found.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{prefix} has {key} {value!r} where a positive number is needed")
    return value
