"""K3: NVFP4 on both sides through `tl.dot_scaled`, for sm_120, whose tensor cores take e2m1 with e4m3 scales (Triton).

The contract is `reference.nvfp4_linear`. Native from Triton 3.6 on; sm_89 and 90 emulate it in bfloat16 from 3.9.
No format of `quant` is stored in NVFP4 yet, so dispatch has no entry for it: who has such a layer calls `linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import block_k, divide, main_input, project, warps_for
from .derived import branch, derived
from .gemm import Tile, epilogue, finish, tile_of
from .interpret import INTERPRET

TILE = Tile(128, 128, 8, 3)


@triton.jit
def to_e4m3(x):
    """x in [0, 448], rounded to what float8_e4m3fn holds, as float32: conversions differ in how they round."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(x < 0.015625, (x + 24576.0) - 24576.0, normal)


@triton.jit
def values(packed, scale, ROWS: tl.constexpr, BK: tl.constexpr):
    """The numbers (ROWS, BK) of packed e2m1 and their scales: for the interpreter, which takes all scales for E8M0."""
    code = tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, BK)).to(tl.int32)
    size = code & 7
    large = (2 + (size & 1)).to(tl.float32) * tl.exp2((size // 2 - 2).to(tl.float32))
    v = tl.where(size < 2, size.to(tl.float32) * 0.5, large) * tl.where(code > 7, -1.0, 1.0)
    wide = tl.broadcast_to(scale.to(tl.float32)[:, :, None], (ROWS, BK // 16, 16))
    return v * tl.reshape(wide, (ROWS, BK))


@triton.jit
def quant_blocks(
    x, smooth, inverse, down, codes, scales, low, M, K, R, stride,
    SMOOTH: tl.constexpr, ROT: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """codes: (M, K/2) packed e2m1; scales: e4m3 (M, K/16); the rest as in `activations.quant_groups`."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = m[:, None] < M
    BLOCKS: tl.constexpr = BK // 16
    if BR > 0:
        total = tl.zeros((BM, BR), tl.float32)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        raw = tl.load(x + m[:, None] * stride + k[None, :], mask=there, other=0.0)
        if BR > 0:
            total = project(total, raw, down, k, R, BR, INTERP)
        v, peaks = main_input(raw, smooth, inverse, k, SMOOTH, 0.0, ROT, BM, BK, INTERP)
        v = tl.reshape(v, (BM * BLOCKS, 16))
        largest = tl.max(tl.reshape(peaks, (BM * BLOCKS, 4 if ROT > 0 else 16)), 1)
        scale = to_e4m3(tl.minimum(tl.div_rn(largest, 6.0), 448.0))
        safe = tl.where(scale > 0.0, scale, 1.0)
        wide, inverse_wide = tl.broadcast_to(safe[:, None], (BM * BLOCKS, 16)), (1.0 / safe)[:, None]
        q = tl.where(
            scale[:, None] > 0.0, divide(v, wide, tl.broadcast_to(inverse_wide, (BM * BLOCKS, 16)), INTERP), 0.0
        )
        size = tl.abs(q)
        code = tl.where(q < 0.0, 8, 0)
        code += (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
        code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
        code += (size > 5.0).to(tl.int32)
        even, odd = tl.split(tl.reshape(code, (BM, BK // 2, 2)))
        where = codes + m[:, None] * (K // 2) + (k0 // 2 + tl.arange(0, BK // 2))[None, :]
        tl.store(where, (even | (odd << 4)).to(tl.int8), mask=there)
        where = scales + m[:, None] * (K // 16) + (k0 // 16 + tl.arange(0, BLOCKS))[None, :]
        tl.store(where, tl.reshape(scale, (BM, BLOCKS)).to(tl.float8e4nv), mask=there)
    if BR > 0:
        r = tl.arange(0, BR)
        where = low + m[:, None] * R + r[None, :]
        tl.store(where, total.to(low.dtype.element_ty), mask=there & (r[None, :] < R))


@triton.jit
def gemm_nvfp4(
    a, w, a_scale, w_scale, channel, low, up, bias, out, M, N, K, R,
    LOW: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """a: uint8 (M, K/2), w: uint8 (N, K/2); a_scale: e4m3 (M, K/16), w_scale: (N, K/16); channel: float32 (N,)."""
    m, n = tile_of(M, N, BM, BN)
    ml, nl = tl.where(m < M, m, 0).to(tl.int64), tl.where(n < N, n, 0).to(tl.int64)
    byte, block = tl.arange(0, BK // 2), tl.arange(0, BK // 16)
    a += ml[:, None] * (K // 2) + byte[None, :]
    w += nl[:, None] * (K // 2) + byte[None, :]
    a_scale += ml[:, None] * (K // 16) + block[None, :]
    w_scale += nl[:, None] * (K // 16) + block[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, K // BK, num_stages=STAGES):
        left, right, xs, ws = tl.load(a), tl.load(w), tl.load(a_scale), tl.load(w_scale)
        if INTERP:
            acc = tl.dot(values(left, xs, BM, BK), values(right, ws, BN, BK).trans(1, 0), acc, input_precision="ieee")
        else:
            acc = tl.dot_scaled(left, xs, "e2m1", right.trans(1, 0), ws, "e2m1", acc)
        a += BK // 2
        w += BK // 2
        a_scale += BK // 16
        w_scale += BK // 16
    acc *= tl.load(channel + nl)[None, :]
    finish(acc, low, up, bias, out, m, n, M, N, R, LOW, BIAS, BM, BN, BR, INTERP)


def linear(
    x: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    channel_scale: Tensor,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    smooth: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rotation: int = 0,
    tile: Tile = TILE,
    by_numbers: bool = INTERPRET,
) -> Tensor:
    """`reference.nvfp4_linear` for x (M, K), K a multiple of 64 and of the rotation, a branch of rank up to 64.

    by_numbers: multiply the numbers that the codes stand for, where there is no instruction for the codes.
    """
    (m, k), n = x.shape, packed.shape[0]
    bk = block_k(k, rotation)
    if not bk:
        raise ValueError(f"K3 takes a multiple of 64 channels and whole rotation blocks, got {k} and {rotation}")
    codes = torch.empty(m, k // 2, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, k // 16, dtype=torch.float8_e4m3fn, device=x.device)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    down = branch(proj_down, x.dtype) if proj_down is not None and proj_down.shape[1] else None
    rank = 0 if down is None else down.shape[1]
    low = torch.empty(m, rank, dtype=x.dtype, device=x.device) if rank else None
    s = r = x
    if smooth is not None:
        s = derived(smooth, torch.float32, lambda t: t.float().contiguous())
        r = derived(smooth, "inverse", lambda t: t.float().reciprocal())
    quant_blocks[(triton.cdiv(m, 16),)](
        x, s, r, down if rank else x, codes, scales, low if rank else x, m, k, rank, x.stride(0),
        SMOOTH=smooth is not None, ROT=rotation, BR=triton.next_power_of_2(rank) if rank else 0, BM=16, BK=bk,
        INTERP=INTERPRET, num_warps=warps_for(rotation, (0, 0)),
    )  # fmt: skip
    low, up, bias, rank = epilogue(x.dtype, proj_up, low, bias, like=out)
    gemm_nvfp4[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        codes.view(torch.uint8), packed.view(torch.uint8), scales, block_scale, channel_scale, low, up, bias, out,
        m, n, k, rank,
        LOW=rank > 0, BIAS=bias is not out, BM=tile.m, BN=tile.n, BK=128 if k % 128 == 0 else 64,
        BR=16 if rank <= 16 else 32, STAGES=tile.stages, INTERP=by_numbers, num_warps=tile.warps,
    )  # fmt: skip
    return out
