"""K0: one pass over a layer's input makes everything its GEMM reads: codes, scales, the low-rank projection (Triton).

Per tile of x: input activation, raw x @ proj_down, shift, division by `smooth`, Hadamard rotation, largest value of a
group or of the row, rounding, packing. Numbers are those of `reference.quantise_activations`, division included; only a
rotation adds up in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .derived import branch, derived
from .interpret import INTERPRET
from .reference import GELU_SHIFT

ACTIVATIONS = ("", "gelu_tanh", "gelu", "silu")

# A wider low-rank branch is left to cuBLAS: its accumulator would not fit beside the tile.
FUSED_RANK = 64

ROUND = tl.constexpr(12582912.0)  # 3 * 2^22: adding it rounds a float to an integer, half to even, in its low bits
TINY = tl.constexpr(1e-10)  # reference.SMALLEST_MAX


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """What K0 makes of x (M, K).

    codes: int8 (M, K), or (M, K/2) packed; 8-bit codes of groups have the even columns of a group before the odd ones.
    scales: float32 (K/64, M), or (M,) per row; low: (M, R) in x's dtype, raw x @ proj_down, R padded to
    a multiple of 16, or None. Nothing is padded:
    the GEMMs mask the rows beyond M.
    """

    codes: Tensor
    scales: Tensor
    low: Tensor | None


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The input activation in float32; exp2 and an approximate reciprocal, IEEE division costs six times the loop."""
    if ACT == 1:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = tl.fdiv(x, 1.0 + tl.exp2(u * -2.885390081777927))
    elif ACT == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 3:
        x = tl.fdiv(x, 1.0 + tl.exp2(x * -1.4426950408889634))
    return x


@triton.jit
def divide(x, y, inverse, INTERP: tl.constexpr):
    """x / y rounded once (Markstein): two fused multiply-adds on x * inverse instead of a division per element."""
    if INTERP:  # its fma rounds twice
        q = x / y
    else:
        q = x * inverse
        q = tl.fma(tl.fma(-q, y, x), inverse, q)
    return q


@triton.jit
def fours(v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Multiply every four elements STRIDE apart by the regular Hadamard matrix: half their sum minus the element in
    mirrored place. Returns v and the largest magnitude of each four."""
    v = tl.reshape(v, (ROWS * COLUMNS // (4 * STRIDE), 2, 2, STRIDE))
    even, odd = tl.split(tl.permute(v, (0, 3, 1, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    half = (a + b + c + d) * 0.5
    a, b, c, d = half - d, half - c, half - b, half - a
    peaks = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
    v = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(v, (0, 2, 3, 1)), (ROWS, COLUMNS)), peaks


@triton.jit
def rotate(v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """Rotate blocks of SIZE columns (0, 4, 16, 64, 256), the matrix being a Kronecker power, digit by digit.

    Returns v and its magnitudes, or of each four neighbours the largest: fewer threads then look for a group's.
    """
    peaks = tl.abs(v)
    if SIZE >= 256:
        v, peaks = fours(v, ROWS, COLUMNS, 64)
    if SIZE >= 64:
        v, peaks = fours(v, ROWS, COLUMNS, 16)
    if SIZE >= 16:
        v, peaks = fours(v, ROWS, COLUMNS, 4)
    if SIZE >= 4:
        v, peaks = fours(v, ROWS, COLUMNS, 1)
    return v, peaks


@triton.jit
def once(v, INTERP: tl.constexpr):
    """v. The compiler may not compute it a second time in another layout, which it does to whole rotations to save the
    exchange of a few scales: 1722 instructions for 16 x 256 elements, 1140 without and with `peaks` (sm_86, 3.9)."""
    if INTERP:
        return v
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def main_input(raw, smooth, inverse, k, SMOOTH: tl.constexpr, SHIFT: tl.constexpr, ROT: tl.constexpr, BM: tl.constexpr,
               BK: tl.constexpr, INTERP: tl.constexpr):  # fmt: skip
    """What the main path multiplies: rotate((raw + shift) / smooth), float32 (BM, BK), and its `peaks`."""
    v = raw.to(tl.float32)
    if SHIFT != 0.0:
        v += SHIFT
    if SMOOTH:
        s, r = tl.load(smooth + k), tl.load(inverse + k)
        v = divide(v, tl.broadcast_to(s[None, :], (BM, BK)), tl.broadcast_to(r[None, :], (BM, BK)), INTERP)
    v, peaks = rotate(v, BM, BK, ROT)
    if ROT > 0:
        v = once(v, INTERP)
    return v, peaks


@triton.jit
def encode(v, scale, GROUPS: tl.constexpr, SIZE: tl.constexpr, UNSIGNED: tl.constexpr, INTERP: tl.constexpr):
    """round(v / scale) in the low byte of an int32; v is (GROUPS, SIZE), scale (GROUPS,). Nothing is larger than the
    value the scale was taken from, so nothing needs clamping from above."""
    inverse = tl.broadcast_to((1.0 / scale)[:, None], (GROUPS, SIZE))
    q = divide(v, tl.broadcast_to(scale[:, None], (GROUPS, SIZE)), inverse, INTERP)
    if UNSIGNED:
        q = tl.maximum(q, 0.0)
    return (q + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def keep(codes, bits, m, k0, K, M, BM: tl.constexpr, BK: tl.constexpr, ORDER: tl.constexpr):
    """Store the codes of columns k0 to k0 + BK; `bits` in any shape. ORDER 0: a byte each; 1: two in a byte; 2: a byte
    each, of every 64 columns the even ones before the odd ones, which is the order `gemm.codes_of` unpacks W in."""
    there = m[:, None] < M
    if ORDER == 0:
        where = codes + m[:, None] * K + (k0 + tl.arange(0, BK))[None, :]
        tl.store(where, tl.reshape(bits, (BM, BK)).to(tl.int8), mask=there)
    else:
        even, odd = tl.split(tl.reshape(bits, (BM, BK // 2, 2)))
        j = tl.arange(0, BK // 2)
        if ORDER == 1:
            where = codes + m[:, None] * (K // 2) + (k0 // 2 + j)[None, :]
            tl.store(where, ((even & 15) | ((odd & 15) << 4)).to(tl.int8), mask=there)
        else:
            where = codes + m[:, None] * K + (k0 + j // 32 * 64 + j % 32)[None, :]
            tl.store(where, even.to(tl.int8), mask=there)
            tl.store(where + 32, odd.to(tl.int8), mask=there)


@triton.jit
def project(low, raw, down, k, R, BR: tl.constexpr, INTERP: tl.constexpr):
    """low + raw @ down[k, :], float32 (BM, BR)."""
    r = tl.arange(0, BR)
    d = tl.load(down + k[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
    if INTERP:  # its bf16 product multiplies bit patterns
        return tl.dot(raw.to(tl.float32), d.to(tl.float32), low, input_precision="ieee")
    return tl.dot(raw, d, low, input_precision="ieee")


@triton.jit
def quant_groups(
    x, smooth, inverse, down, codes, scales, low, M, K, R, stride,
    ACT: tl.constexpr, SHIFT: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr, BITS: tl.constexpr,
    UNSIGNED: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One scale per 64 channels. BK divides K and is a multiple of 64 and of ROT; BR: R padded, 0 for no projection."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = m[:, None] < M
    GROUPS: tl.constexpr = BK // 64
    QMAX: tl.constexpr = 15.0 if UNSIGNED else (7.0 if BITS == 4 else 127.0)
    if BR > 0:
        total = tl.zeros((BM, BR), tl.float32)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        raw = tl.load(x + m[:, None] * stride + k[None, :], mask=there, other=0.0)
        if ACT > 0:
            raw = activate(raw.to(tl.float32), ACT).to(raw.dtype)
        if BR > 0:
            total = project(total, raw, down, k, R, BR, INTERP)
        v, peaks = main_input(raw, smooth, inverse, k, SMOOTH, SHIFT, ROT, BM, BK, INTERP)
        v = tl.reshape(v, (BM * GROUPS, 64))
        largest = tl.max(tl.reshape(peaks, (BM * GROUPS, 16 if ROT > 0 else 64)), 1)
        scale = once(tl.div_rn(tl.maximum(largest, TINY), QMAX), INTERP)
        q = encode(v, scale, BM * GROUPS, 64, UNSIGNED, INTERP)
        keep(codes, q, m, k0, K, M, BM, BK, 1 if BITS == 4 else 2)
        group = k0 // 64 + tl.arange(0, GROUPS)
        where = scales + group[None, :].to(tl.int64) * M + m[:, None]
        tl.store(where, tl.reshape(scale, (BM, GROUPS)), mask=there)
    if BR > 0:
        r = tl.arange(0, BR)
        where = low + m[:, None] * R + r[None, :]
        tl.store(where, total.to(low.dtype.element_ty), mask=there & (r[None, :] < R))


@triton.jit
def quant_rows(
    x, smooth, inverse, down, codes, scales, low, M, K, R, stride,
    ACT: tl.constexpr, SHIFT: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr, BITS: tl.constexpr,
    PACKED: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """One scale per token: the row is read twice, the second time out of the cache."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = m[:, None] < M
    QMAX: tl.constexpr = 7.0 if BITS == 4 else 127.0
    if BR > 0:
        total = tl.zeros((BM, BR), tl.float32)
    largest = tl.zeros((BM,), tl.float32) + TINY
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        raw = tl.load(x + m[:, None] * stride + k[None, :], mask=there, other=0.0)
        if ACT > 0:
            raw = activate(raw.to(tl.float32), ACT).to(raw.dtype)
        if BR > 0:
            total = project(total, raw, down, k, R, BR, INTERP)
        v, peaks = main_input(raw, smooth, inverse, k, SMOOTH, SHIFT, ROT, BM, BK, INTERP)
        largest = tl.maximum(largest, tl.max(tl.reshape(peaks, (BM, BK // 4 if ROT > 0 else BK)), 1))
    scale = once(tl.div_rn(largest, QMAX), INTERP)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        raw = tl.load(x + m[:, None] * stride + k[None, :], mask=there, other=0.0)
        if ACT > 0:
            raw = activate(raw.to(tl.float32), ACT).to(raw.dtype)
        v, peaks = main_input(raw, smooth, inverse, k, SMOOTH, SHIFT, ROT, BM, BK, INTERP)
        q = encode(v, scale, BM, BK, False, INTERP)
        keep(codes, q, m, k0, K, M, BM, BK, 1 if PACKED else 0)
    tl.store(scales + m, scale, mask=m < M)
    if BR > 0:
        r = tl.arange(0, BR)
        where = low + m[:, None] * R + r[None, :]
        tl.store(where, total.to(low.dtype.element_ty), mask=there & (r[None, :] < R))


def block_k(k: int, rotation: int) -> int:
    """Columns of a tile: the widest of 256, 128, 64 that divides K and holds whole rotation blocks; 0: none does."""
    sizes = (256,) if rotation == 256 else (128, 64)
    return next((size for size in sizes if k % size == 0 and rotation <= 256), 0)


def warps_for(rotation: int, capability: tuple[int, int]) -> int:
    """A rotated tile is 256 wide: more than 4 warps keep it in registers, but not on sm_90 (Triton 3.9)."""
    return 8 if rotation == 256 and capability[0] != 9 else 4


def quantise(
    x: Tensor,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    *,
    bits: int = 4,
    unsigned: bool = False,
    rotation: int = 0,
    per_row: bool = False,
    packed: bool = True,
    activation: str = "",
    rows: int = 16,
    warps: int = 0,
) -> Quantised:
    """Quantise x (M, K) for the GEMMs in `gemm.py` and `int4_native.py`; several layers of one input share the result.

    x: float, last axis contiguous, K a multiple of 64 and of the rotation; smooth, down: as in `reference.w4a4_linear`;
    unsigned: x + GELU_SHIFT on the main path, rounded to [0, 15] in 4 bit; per_row: one scale per token; packed: two
    4-bit codes a byte (groups of 4 bits always are); activation: one of ACTIVATIONS, applied to x and rounded to its
    dtype before everything else; rows, warps: tile height and warps of a program, 0 for what spills nothing.
    """
    m, k = x.shape
    bk = block_k(k, rotation)
    if not bk:
        raise ValueError(f"K0 takes a multiple of 64 channels and whole rotation blocks, got {k} and {rotation}")
    down = None if down is None or not down.shape[1] else branch(down, x.dtype)
    rank = 0 if down is None else down.shape[1]
    fused = rank if rank <= FUSED_RANK else 0
    if activation and rank > FUSED_RANK:
        raise ValueError(f"an input activation is fused for ranks up to {FUSED_RANK}, got {rank}")
    packed = bits == 4 and (packed or not per_row)
    codes = torch.empty(m, k // 2 if packed else k, dtype=torch.int8, device=x.device)
    scales = torch.empty((m,) if per_row else (k // 64, m), dtype=torch.float32, device=x.device)
    low = None
    if rank:
        low = torch.empty(m, rank, dtype=x.dtype, device=x.device) if fused else x @ down
    if not m:
        return Quantised(codes, scales, low)
    warps = warps or warps_for(rotation, torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0))
    br = triton.next_power_of_2(fused)
    common = {
        "ACT": ACTIVATIONS.index(activation), "SHIFT": GELU_SHIFT if unsigned else 0.0, "SMOOTH": smooth is not None,
        "ROT": rotation, "BITS": bits, "BR": br, "BM": rows, "BK": bk, "INTERP": INTERPRET, "num_warps": warps,
    }  # fmt: skip
    s = r = x
    if smooth is not None:
        s = derived(smooth, torch.float32, lambda t: t.float().contiguous())
        r = derived(smooth, "inverse", lambda t: t.float().reciprocal())
    arguments = (x, s, r, down if fused else x, codes, scales, low if fused else x)
    grid = (triton.cdiv(m, rows),)
    if per_row:
        quant_rows[grid](*arguments, m, k, rank, x.stride(0), PACKED=packed, **common)
    else:
        quant_groups[grid](*arguments, m, k, rank, x.stride(0), UNSIGNED=unsigned and bits == 4, **common)
    return Quantised(codes, scales, low)
