"""K1: the quantised product on int8 tensor cores, with the low-rank branch and the bias in its epilogue (Triton).

`gemm_groups`: a scale per 64 channels of both operands. The integer dot of a group starts from the bits of 12582912.0,
so its result, read as a float, is 12582912 + dot without a conversion, and one fused multiply-add takes the constant
off again while it multiplies by the weight's scale: exact for scales of 16-bit formats and |dot| < 2^22.
`gemm_rows`: a scale per row of both, nothing but the product in the loop.
4-bit codes stay in their bytes until they are in registers: the low nibble is shifted into the high one, which brings
its sign along and a factor of 16 that the epilogue takes off. One `tl.dot` per loop, or each warp is given all of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .derived import branch
from .interpret import INTERPRET

MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)

# Byte-wise shifts of four codes in one register; in plain Triton each byte would be taken apart.
UNSIGNED_NIBBLES = tl.constexpr("{ .reg .b32 t; and.b32 $0,$2,0x0F0F0F0F; shr.b32 t,$2,4; and.b32 $1,t,0x0F0F0F0F; }")
SIGNED_NIBBLES = tl.constexpr("{ .reg .b32 t; shl.b32 t,$2,4; and.b32 $0,t,0xF0F0F0F0; and.b32 $1,$2,0xF0F0F0F0; }")


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of a program, its warps, and how many loads are in flight."""

    m: int
    n: int
    warps: int
    stages: int


# What does not spill registers (Triton 3.9): of the grouped product no more than 64 x 128 on sm_90, whose instruction
# takes W from shared memory; of the plain one not 64 x 128 with 4 warps on sm_86.
TILES = (Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 4), Tile(32, 64, 4, 4))
SMALL_TILES = (Tile(16, 64, 4, 4), Tile(32, 64, 4, 4))
HOPPER_ROWS = (Tile(128, 256, 8, 3), Tile(128, 128, 8, 4))


def tiles(m: int, capability: tuple[int, int], rows: bool = False) -> tuple[Tile, ...]:
    """The tiles worth measuring for M rows, of `gemm_rows` or of `gemm_groups`."""
    if m <= 32:
        return SMALL_TILES
    hopper = capability[0] == 9
    if rows:
        return (HOPPER_ROWS if hopper else ()) + tuple(t for t in TILES if (t.m, t.n) != (64, 128))
    return tuple(t for t in TILES if not hopper or t.m * t.n <= 64 * 128)


@triton.jit
def nibbles(x, UNSIGNED: tl.constexpr, ASM: tl.constexpr):
    """Low and high nibbles of packed bytes: 0..15 as they are, or signed ones times 16."""
    if ASM:
        if UNSIGNED:
            low, high = tl.inline_asm_elementwise(
                UNSIGNED_NIBBLES, "=&r,=r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                SIGNED_NIBBLES, "=&r,=r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
    elif UNSIGNED:
        low, high = x & 15, (x >> 4) & 15
    else:
        low, high = (x << 4).to(tl.int8), x & -16
    return low, high


@triton.jit
def codes_of(x, PACKED: tl.constexpr, UNSIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             ASM: tl.constexpr):  # fmt: skip
    """The int8 operand (ROWS, COLUMNS) of the bytes loaded for it; of 64 columns, the even ones come first.

    A dot product does not mind the order when both sides have it, and bytes that stay where they are need no permuting:
    interleaving the nibbles took 216 of 579 instructions of a 128 x 128 loop (sm_86, Triton 3.9), this way it has 309.
    """
    if PACKED:
        low, high = nibbles(x, UNSIGNED, ASM)
        planes = tl.reshape(tl.join(low, high), (ROWS, COLUMNS // 64, 32, 2))
        x = tl.reshape(tl.permute(planes, (0, 1, 3, 2)), (ROWS, COLUMNS))
    return x


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of this program; eight row tiles at a time walk along N together, so that W stays in L2."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = 8 * across
    first = pid // band * 8
    height = tl.minimum(down - first, 8)
    m = (first + pid % band % height) * BM + tl.arange(0, BM)
    n = pid % band // height * BN + tl.arange(0, BN)
    return m, n


@triton.jit
def finish(acc, low, up, bias, out, m, n, M, N, R, LOW: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, BR: tl.constexpr, INTERP: tl.constexpr):  # fmt: skip
    """out = acc + low @ up^T + bias, kept within the range of float16."""
    rows, columns = m[:, None] < M, n[None, :] < N
    if LOW:
        for r0 in tl.range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            left = tl.load(low + m[:, None].to(tl.int64) * R + r[None, :], mask=rows & (r[None, :] < R), other=0.0)
            right = tl.load(up + n[None, :].to(tl.int64) * R + r[:, None], mask=columns & (r[:, None] < R), other=0.0)
            if INTERP:
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left, right, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if out.dtype.element_ty == tl.float16:
        acc = tl.minimum(tl.maximum(acc, -65504.0), 65504.0)
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], acc.to(out.dtype.element_ty), mask=rows & columns)


@triton.jit
def gemm_groups(
    a, w, a_scale, w_scale, low, up, bias, out, M, N, K, R,
    A_BITS: tl.constexpr, UNSIGNED: tl.constexpr, LOW: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """a: (M, K/2) packed or (M, K) codes; w: (N, K/2) packed; a_scale: (K/64, M); w_scale: (K/64, N), both float32."""
    m, n = tile_of(M, N, BM, BN)
    A_WIDTH: tl.constexpr = 32 if A_BITS == 4 else 64
    ml, nl = tl.where(m < M, m, 0), tl.where(n < N, n, 0)
    a += ml[:, None].to(tl.int64) * (K // 64 * A_WIDTH) + tl.arange(0, A_WIDTH)[None, :]
    w += nl[:, None].to(tl.int64) * (K // 2) + tl.arange(0, 32)[None, :]
    a_scale += ml
    w_scale += nl
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, K // 64, num_stages=STAGES):
        left = codes_of(tl.load(a), A_BITS == 4, UNSIGNED, BM, 64, ASM)
        right = codes_of(tl.load(w), True, False, BN, 64, ASM).trans(1, 0)
        xs, ws = tl.load(a_scale), tl.load(w_scale)
        bits = tl.dot(left, right, tl.full((BM, BN), MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        shifted = bits.to(tl.float32, bitcast=True)
        off = tl.broadcast_to((ws * -MAGIC)[None, :], (BM, BN))
        term = tl.fma(shifted, tl.broadcast_to(ws[None, :], (BM, BN)), off)
        acc = tl.fma(term, tl.broadcast_to(xs[:, None], (BM, BN)), acc)
        a += A_WIDTH
        w += 32
        a_scale += M
        w_scale += N
    acc *= 1.0 / (256.0 if A_BITS == 4 and not UNSIGNED else 16.0)
    finish(acc, low, up, bias, out, m, n, M, N, R, LOW, BIAS, BM, BN, BR, INTERP)


@triton.jit
def gemm_rows(
    a, w, a_scale, w_scale, low, up, bias, out, M, N, K, R,
    BITS: tl.constexpr, LOW: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """a: (M, K), w: (N, K) in 8 bit, or (M, K/2), (N, K/2) packed; a_scale: (M,); w_scale: (N,), both float32."""
    m, n = tile_of(M, N, BM, BN)
    WIDTH: tl.constexpr = BK // 2 if BITS == 4 else BK
    ml, nl = tl.where(m < M, m, 0), tl.where(n < N, n, 0)
    a += ml[:, None].to(tl.int64) * (K // BK * WIDTH) + tl.arange(0, WIDTH)[None, :]
    w += nl[:, None].to(tl.int64) * (K // BK * WIDTH) + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((BM, BN), tl.int32)
    for _ in tl.range(0, K // BK, num_stages=STAGES):
        left = codes_of(tl.load(a), BITS == 4, False, BM, BK, ASM)
        right = codes_of(tl.load(w), BITS == 4, False, BN, BK, ASM).trans(1, 0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        a += WIDTH
        w += WIDTH
    xs, ws = tl.load(a_scale + ml), tl.load(w_scale + nl)
    acc = total.to(tl.float32) * ((1.0 / 256.0) if BITS == 4 else 1.0) * ws[None, :] * xs[:, None]
    finish(acc, low, up, bias, out, m, n, M, N, R, LOW, BIAS, BM, BN, BR, INTERP)


def epilogue(
    x_dtype: torch.dtype, up: Tensor | None, low: Tensor | None, bias: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """low, up and bias as the kernels take them, `like` in the place of what is missing, and the rank."""
    rank = 0 if low is None else low.shape[1]
    if rank:
        up = branch(up, x_dtype)
    return (low if rank else like, up if rank else like, like if bias is None else bias, rank)


def linear(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    low: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    act_bits: int = 4,
    unsigned: bool = False,
    tile: Tile = TILES[3],
    asm: bool = not INTERPRET,
) -> Tensor:
    """(M, N) from what K0 made (`activations.Quantised`) and the stored weight, natural layout.

    weight_scale: (K/64, N) with scales (K/64, M): groups, weight packed; N elements with scales (M,): rows, weight
    packed for act_bits 4 and int8 (N, K) for 8. asm: off where inline PTX cannot be had.
    """
    n, m = weight.shape[0], codes.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=codes.device)
    if not m:
        return out
    groups = scales.ndim == 2
    packed = groups or act_bits == 4
    k = weight.shape[1] * (2 if packed else 1)
    scale = weight_scale.float().contiguous()  # of 16-bit numbers, loads are not pipelined; not kept: an eighth of W
    low, up, bias, rank = epilogue(out_dtype, up, low, bias, like=out)
    has = {"LOW": rank > 0, "BIAS": bias is not out, "BR": 16 if rank <= 16 else 32}
    common = {**has, "BM": tile.m, "BN": tile.n, "STAGES": tile.stages, "ASM": asm, "INTERP": INTERPRET}
    arguments = (codes, weight, scales, scale, low, up, bias, out, m, n, k, rank)
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    if groups:
        gemm_groups[grid](
            *arguments, A_BITS=act_bits, UNSIGNED=unsigned, num_warps=tile.warps, **common
        )  # fmt: skip
    else:
        bk = 128 if k % 128 == 0 else 64
        gemm_rows[grid](*arguments, BITS=act_bits, BK=bk, num_warps=tile.warps, **common)
    return out
