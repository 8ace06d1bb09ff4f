"""What a kernel is given: one quantised linear layer, and what kind it is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The tensors and options of `reference.w4a4_linear`, or with group_size 0 of `reference.convrot_linear`.

    act_bits: 4, 8 or 16. weight_bits: 4 packed, or 8 (per row only). All tensors lie on one device.
    share: (key, number of layers) of layers that take the same input with equal smooth, proj_down and options, as q, k
    and v do: what is quantised for the first of them serves them all. None: nothing is shared.
    """

    weight: Tensor
    weight_scale: Tensor
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    smooth: Tensor | None = None
    bias: Tensor | None = None
    act_bits: int = 4
    weight_bits: int = 4
    group_size: int = 64
    unsigned: bool = False
    rotation: int = 0
    share: tuple[Hashable, int] | None = None

    @property
    def n(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.weight.shape[1] * 8 // self.weight_bits

    @property
    def rank(self) -> int:
        """Columns of the low-rank branch."""
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    @property
    def per_row(self) -> bool:
        """One scale per token and weight row, instead of groups."""
        return self.group_size == 0

    @property
    def kind(self) -> str:
        """The format in letters: what two layers share that are computed by the same kernel variant."""
        shape = "row" if self.per_row else f"g{self.group_size}"
        marks = f"u{int(self.unsigned)}s{int(self.smooth is not None)}b{int(self.bias is not None)}h{self.rotation}"
        return f"w{self.weight_bits}a{self.act_bits}{shape}{marks}"

    def rows(self, start: int, stop: int) -> Layer:
        """The layer of outputs `start` to `stop`."""
        scale = self.weight_scale.reshape(-1)[start:stop] if self.per_row else self.weight_scale[:, start:stop]
        return replace(
            self,
            weight=self.weight[start:stop],
            weight_scale=scale.contiguous(),
            proj_up=None if self.proj_up is None else self.proj_up[start:stop],
            bias=None if self.bias is None else self.bias[start:stop],
            share=None,
        )

    def reference(self, x: Tensor, act_bits: int | None = None) -> Tensor:
        """The exact output; act_bits 16 for what it is without rounding the activations."""
        bits = self.act_bits if act_bits is None else act_bits
        if not self.per_row:
            return reference.w4a4_linear(
                x, self.weight, self.weight_scale, self.proj_down, self.proj_up, self.smooth, self.bias,
                act_bits=bits, group_size=self.group_size, unsigned=self.unsigned, rotation=self.rotation,
            )  # fmt: skip
        if bits == 16:
            rows = reference.hadamard(x.reshape(-1, self.k).float(), self.rotation)
            codes = reference.unpack_int4(self.weight) if self.weight_bits == 4 else self.weight
            out = rows @ (codes.float() * self.weight_scale.float().reshape(-1, 1)).T
            return reference.finish(out, x, self.proj_down, self.proj_up, self.bias)
        return reference.convrot_linear(
            x, self.weight, self.weight_scale, self.bias, rotation=self.rotation, bits=bits,
            proj_down=self.proj_down, proj_up=self.proj_up,
        )  # fmt: skip


def largest_half(dtype: torch.dtype) -> float | None:
    """The bound that an output of `dtype` is kept within, None where it cannot be reached."""
    return torch.finfo(dtype).max if dtype == torch.float16 else None
