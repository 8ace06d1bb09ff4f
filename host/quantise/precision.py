"""What a model computes with, in a few words for the canvas."""

from __future__ import annotations

import torch

from .loras import quantised_modules

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision_of(patcher) -> str:
    """Of a ModelPatcher: 'bf16'; 'fp8 weights in bf16'; '29 layers in 4 bit, bf16'; empty where it has no weights."""
    model = patcher.model
    stored = model.get_dtype()
    computed = getattr(model, "manual_cast_dtype", None) or stored
    words = _short(computed)
    if stored != computed:
        words = f"{_short(stored)} weights in {words}"
    layers = sum(1 for _ in quantised_modules(patcher))
    return f"{layers} layers in 4 bit, {words}" if layers else words


def _short(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(dtype) or ("fp8" if name.startswith("float8") else name)
