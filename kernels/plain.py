"""Quantised layers in plain torch, on any device: the weight expanded for the call, then a 16-bit or an int8 product.

Nothing here needs Triton; `dequant.py` expands the weight in one pass where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .derived import derived
from .layer import Layer, largest_half
from .reference import GELU_SHIFT, hadamard, main_input, quantise_activations, unpack_int4

# Expanded weights and integer products are made in slices of outputs, so that a call needs no more than this beside
# its output; 64 MB keeps the product of a slice large enough for the card.
SLICE_BYTES = 64 << 20

Expand = Callable[[Layer, torch.dtype], Tensor]


def expand(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The main path's weight for raw (shifted) x, (N, K) in dtype: unrotated, divided by smooth, without the branch."""
    codes = unpack_int4(layer.weight) if layer.weight_bits == 4 else layer.weight
    if layer.per_row:
        weight = codes.float() * layer.weight_scale.float().reshape(-1, 1)
    else:
        groups = codes.view(layer.n, -1, layer.group_size).float()
        weight = (groups * layer.weight_scale.float().T[..., None]).view(layer.n, layer.k)
    weight = hadamard(weight, layer.rotation)
    if layer.smooth is not None:
        weight = weight / layer.smooth.float()
    return weight.to(dtype)


def dequantised_linear(x: Tensor, layer: Layer, expand: Expand = expand, bytes_per_weight: int = 12) -> Tensor:
    """The layer with activations as they are: x (M, K) @ weight^T + branch + bias. bytes_per_weight: that `expand`
    needs in all."""
    main = x + GELU_SHIFT if layer.unsigned else x
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    step = max(256, SLICE_BYTES // (layer.k * bytes_per_weight) // 64 * 64)
    if step >= layer.n:
        out = F.linear(main, expand(layer, x.dtype), bias)
    else:
        out = x.new_empty(len(x), layer.n)
        for start in range(0, layer.n, step):
            stop = min(start + step, layer.n)
            part = F.linear(main, expand(layer.rows(start, stop), x.dtype), None if bias is None else bias[start:stop])
            out[:, start:stop] = part
    return finish(out, x, layer)


def finish(out: Tensor, x: Tensor, layer: Layer) -> Tensor:
    """Add the low-rank branch of raw x to `out`, in place, and keep it finite."""
    if layer.rank and layer.proj_down is not None and layer.proj_up is not None:
        down = derived(layer.proj_down, x.dtype, lambda t: t.to(x.dtype).contiguous())
        up = derived(layer.proj_up, x.dtype, lambda t: t.to(x.dtype).contiguous())
        out.addmm_(x @ down, up.T)
    limit = largest_half(out.dtype)
    return out if limit is None else out.clamp_(-limit, limit)


def row_codes(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Codes int8 (M, K) and scales float32 (M,): one scale per token, in 4 bit or 8 bit as the layer says."""
    main = main_input(x, layer.smooth, layer.unsigned, layer.rotation)
    codes, scales = quantise_activations(main, bits=layer.act_bits, group_size=layer.k)
    return codes, scales.view(-1)


def folded_scale(layer: Layer) -> Tensor:
    """One scale per output, float32 (N,), that brings every code times its group's scale into [-127, 127]."""

    def scale(weight: Tensor) -> Tensor:
        parts = []
        step = max(64, SLICE_BYTES // layer.k // 8)
        for start in range(0, layer.n, step):
            part = layer.rows(start, min(start + step, layer.n))
            largest = unpack_int4(part.weight).view(part.n, -1, layer.group_size).abs().amax(-1).float()
            parts.append((largest * part.weight_scale.float().T).amax(1))
        return torch.cat(parts).clamp_(min=1e-10) / 127

    return derived(layer.weight, "folded", scale)


def int8_weight(layer: Layer) -> tuple[Tensor, Tensor]:
    """An int8 weight (N, K) and its scale per output, float32 (N,): groups folded into it, 4-bit rows as they are."""
    if layer.weight_bits == 8:
        return layer.weight, layer.weight_scale.float().view(-1)
    if layer.per_row:
        return unpack_int4(layer.weight), layer.weight_scale.float().view(-1)
    scale = folded_scale(layer)
    ratio = layer.weight_scale.float().T / scale[:, None]
    codes = unpack_int4(layer.weight).view(layer.n, -1, layer.group_size)
    return (codes * ratio[..., None]).round_().to(torch.int8).view(layer.n, layer.k), scale


Codes = Callable[[Tensor, Layer], tuple[Tensor, Tensor]]
Weight = Callable[[Layer], tuple[Tensor, Tensor]]


def int8_linear(x: Tensor, layer: Layer, codes: Codes = row_codes, weight: Weight = int8_weight) -> Tensor:
    """The layer with one scale per token through `torch._int_mm` (cuBLASLt on CUDA: M > 16, N and K multiples of 8)."""
    quantised, x_scale = codes(x, layer)
    out = x.new_empty(len(x), layer.n)
    step = max(512, SLICE_BYTES // max(1, 4 * len(x)) // 64 * 64)
    for start in range(0, layer.n, step):
        part = layer if step >= layer.n else layer.rows(start, min(start + step, layer.n))
        codes_w, w_scale = weight(part)
        total = torch._int_mm(quantised, codes_w.T).float()
        total.mul_(x_scale[:, None]).mul_(w_scale)
        if part.bias is not None:
            total.add_(part.bias.float())
        limit = largest_half(out.dtype)
        out[:, start : start + part.n] = total if limit is None else total.clamp_(-limit, limit)
    return finish(out, x, layer)
