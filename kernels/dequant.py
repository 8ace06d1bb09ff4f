"""Expands packed weights in one pass: to 16 bit for cuBLAS, or to int8 with one scale per output (Triton).

No tensor cores are used, so it runs wherever Triton does: Turing and AMD too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ROUND, block_k, rotate
from .derived import derived
from .layer import Layer
from .plain import folded_scale


@triton.jit
def expand_weight(
    weight, scale, inverse, folded, out, N, K, stride_g, stride_n,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr, FOLD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (N, K) = rotate(codes * scale) * inverse; FOLD: round(codes * scale / folded) as int8, nothing else.

    weight: (N, K/2) packed or (N, K); the scale of group g and output n is at g * stride_g + n * stride_n, GROUPS
    groups a tile, or one for all (stride_g 0).
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    rows = n[:, None] < N
    n64 = n[:, None].to(tl.int64)
    if BITS == 4:
        byte = tl.load(weight + n64 * (K // 2) + (k0 // 2 + tl.arange(0, BK // 2))[None, :], mask=rows, other=0)
        low, high = (byte << 4).to(tl.int8) >> 4, byte >> 4
        codes = tl.reshape(tl.join(low, high), (BN, BK)).to(tl.float32)
    else:
        codes = tl.load(weight + n64 * K + (k0 + tl.arange(0, BK))[None, :], mask=rows, other=0).to(tl.float32)
    group = k0 // (BK // GROUPS) + tl.arange(0, GROUPS)
    s = tl.load(scale + group[None, :] * stride_g + n64 * stride_n, mask=rows, other=0.0).to(tl.float32)
    if FOLD:
        s = s / tl.load(folded + n, mask=n < N, other=1.0)[:, None]
    v = tl.reshape(tl.reshape(codes, (BN, GROUPS, BK // GROUPS)) * s[:, :, None], (BN, BK))
    k = k0 + tl.arange(0, BK)
    where = out + n64 * K + k[None, :]
    if FOLD:
        tl.store(where, (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8), mask=rows)
    else:
        v, _ = rotate(v, BN, BK, ROT)
        if SMOOTH:
            v *= tl.load(inverse + k)[None, :]
        tl.store(where, v.to(out.dtype.element_ty), mask=rows)


def _run(layer: Layer, out: Tensor, folded: Tensor | None) -> Tensor:
    bk = block_k(layer.k, layer.rotation)
    scale = layer.weight_scale if not layer.per_row else layer.weight_scale.view(-1)
    strides = (0, scale.stride(0)) if layer.per_row else scale.stride()
    inverse = out
    if layer.smooth is not None:
        inverse = derived(layer.smooth, "inverse", lambda t: t.float().reciprocal())
    grid = (triton.cdiv(layer.n, 16), layer.k // bk)
    expand_weight[grid](
        layer.weight, scale, inverse, out if folded is None else folded, out, layer.n, layer.k, *strides,
        BITS=layer.weight_bits, GROUPS=1 if layer.per_row else bk // 64, SMOOTH=layer.smooth is not None,
        ROT=layer.rotation, FOLD=folded is not None, BN=16, BK=bk, num_warps=4,
    )  # fmt: skip
    return out


def expand(layer: Layer, dtype: torch.dtype) -> Tensor:
    """Like `plain.expand`; K a multiple of 64 and of the rotation, groups of 64."""
    out = torch.empty(layer.n, layer.k, dtype=dtype, device=layer.weight.device)
    return _run(layer, out, None)


def int8_weight(layer: Layer) -> tuple[Tensor, Tensor]:
    """Like `plain.int8_weight`."""
    if layer.weight_bits == 8:
        return layer.weight, layer.weight_scale.float().view(-1)
    scale = folded_scale(layer) if not layer.per_row else layer.weight_scale.float().view(-1)
    out = torch.empty(layer.n, layer.k, dtype=torch.int8, device=layer.weight.device)
    return _run(layer, out, scale), scale
