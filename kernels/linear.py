"""Quantised linear layers for callers: the contracts of `reference.py`, computed by what `dispatch` chooses.

torch.compile sees each as one operation of its own, `slipstream::w4a4_linear` and `slipstream::convrot_linear`.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .dispatch import linear
from .layer import Layer


def w4a4_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    smooth: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    act_bits: int = 4,
    group_size: int = 64,
    unsigned: bool = False,
    rotation: int = 0,
    share: tuple[Hashable, int] | None = None,
    kernel: str | None = None,
) -> Tensor:
    """`reference.w4a4_linear` by the fastest implementation that agrees with it. share: see `Layer`; kernel: a name."""
    if _compilable and torch.compiler.is_compiling():
        return torch.ops.slipstream.w4a4_linear(
            x, packed, weight_scale, proj_down, proj_up, smooth, bias, act_bits, group_size, unsigned, rotation
        )
    layer = Layer(
        packed, weight_scale, proj_down, proj_up, smooth, bias, act_bits, 4, group_size, unsigned, rotation, share
    )
    return linear(x, layer, kernel)


def convrot_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    rotation: int = 256,
    bits: int = 4,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    share: tuple[Hashable, int] | None = None,
    kernel: str | None = None,
) -> Tensor:
    """`reference.convrot_linear` by the fastest implementation that agrees with it. share: see `Layer`."""
    if _compilable and torch.compiler.is_compiling():
        return torch.ops.slipstream.convrot_linear(x, weight, weight_scale, bias, rotation, bits, proj_down, proj_up)
    layer = Layer(weight, weight_scale, proj_down, proj_up, None, bias, bits, bits, 0, False, rotation, share)
    return linear(x, layer, kernel)


def _group_op(x, packed, weight_scale, proj_down, proj_up, smooth, bias, act_bits, group_size, unsigned, rotation):
    return linear(
        x,
        Layer(packed, weight_scale, proj_down, proj_up, smooth, bias, act_bits, 4, group_size, unsigned, rotation),
    )


def _row_op(x, weight, weight_scale, bias, rotation, bits, proj_down, proj_up):
    return linear(x, Layer(weight, weight_scale, proj_down, proj_up, None, bias, bits, bits, 0, False, rotation))


def _register() -> bool:
    """Make the two operations known to torch.compile, which then calls them whole; False where torch is too old."""
    custom_op = getattr(torch.library, "custom_op", None)
    if custom_op is None or not hasattr(torch.compiler, "is_compiling"):
        return False
    tensors = "Tensor? proj_down, Tensor? proj_up"
    schemas = {
        "w4a4_linear": (_group_op, f"(Tensor x, Tensor packed, Tensor weight_scale, {tensors}, Tensor? smooth, "
                        "Tensor? bias, int act_bits, int group_size, bool unsigned, int rotation) -> Tensor"),
        "convrot_linear": (_row_op, "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int rotation, "
                           f"int bits, {tensors}) -> Tensor"),
    }  # fmt: skip
    for name, (run, schema) in schemas.items():
        op = custom_op(f"slipstream::{name}", run, mutates_args=(), schema=schema)
        op.register_fake(lambda x, weight, *rest: x.new_empty(*x.shape[:-1], weight.shape[0]))
    return True


_compilable = _register()
