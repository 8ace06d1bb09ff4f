"""Quantised linear layers for callers: the contracts of `reference.py`, computed by what `dispatch` chooses.

torch.compile sees a layer as one operation of its own, `slipstream::linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .layer import Layer


def linear(x: Tensor, layer: Layer, kernel: str | None = None) -> Tensor:
    """The layer's output (..., N) in x's dtype by the fastest implementation that agrees with `Layer.reference`.

    x: (..., K) float; kernel: the name of an implementation, which torch.compile does not ask for. Raises ValueError
    when the channels differ or the kernel is unknown.
    """
    if _compilable and torch.compiler.is_compiling():
        return torch.ops.slipstream.linear(
            x, layer.weight, layer.weight_scale, layer.proj_down, layer.proj_up, layer.smooth, layer.bias,
            layer.act_bits, layer.weight_bits, layer.group_size, layer.unsigned, layer.rotation,
        )  # fmt: skip
    return dispatch.linear(x, layer, kernel)


def _whole(x: Tensor, *layer: Any) -> Tensor:
    return dispatch.linear(x, Layer(*layer))


def _register() -> bool:
    """Make the operation known to torch.compile, which then calls it whole; False where torch is too old."""
    custom_op = getattr(torch.library, "custom_op", None)
    if custom_op is None or not hasattr(torch.compiler, "is_compiling"):
        return False
    schema = (
        "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? proj_down, Tensor? proj_up, Tensor? smooth, "
        "Tensor? bias, int act_bits, int weight_bits, int group_size, bool unsigned, int rotation) -> Tensor"
    )
    op = custom_op("slipstream::linear", _whole, mutates_args=(), schema=schema)
    op.register_fake(lambda x, weight, *rest: x.new_empty(*x.shape[:-1], weight.shape[0]))
    return True


_compilable = _register()
