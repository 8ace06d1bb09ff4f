"""K2: the quantised product on the 4-bit tensor cores of sm_80, 86 and 89, `mma.m16n8k64` from inline PTX (Gluon).

No shared memory: every lane loads its own operand registers. The instruction wants eight neighbouring codes of a row in
a register, and a dot product does not mind their order, so lane q of a quad takes the words 2q and 2q + 1 of a group's
eight for its two: 8 neighbouring bytes of the natural layout, with nothing repacked. Operands (PTX ISA, mma.m16n8k64):
A register: row lane / 4 (+ 8 for odd registers), B: column lane / 4, D: row lane / 4 + 8 (register / 2), column
2 (lane % 4) + register % 2.

Compiled and read as SASS for these cards without one at hand; dispatch compares it with the reference before use. Other
cards emulate the instruction.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gemm import epilogue

BM, BN = 128, 128

MMA = gl.constexpr("""{
.reg .b32 z; mov.b32 z, 0x4B400000;
mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {$0,$1,$2,$3},{$8,$9,$10,$11},{$12,$13},{z,z,z,z};
mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {$4,$5,$6,$7},{$8,$9,$10,$11},{$14,$15},{z,z,z,z};
}""")
MMA_UNSIGNED = gl.constexpr("""{
.reg .b32 z; mov.b32 z, 0x4B400000;
mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {$0,$1,$2,$3},{$8,$9,$10,$11},{$12,$13},{z,z,z,z};
mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {$4,$5,$6,$7},{$8,$9,$10,$11},{$14,$15},{z,z,z,z};
}""")
# The branch: 16 ranks of 16-bit numbers are as many bytes as 64 codes, so they are addressed in the same way.
MMA_BF16 = gl.constexpr("""{
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},{$8,$9,$10,$11},{$12,$13},{$16,$17,$18,$19};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$4,$5,$6,$7},{$8,$9,$10,$11},{$14,$15},{$20,$21,$22,$23};
}""")
MMA_FP16 = gl.constexpr("""{
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3},{$8,$9,$10,$11},{$12,$13},{$16,$17,$18,$19};
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$4,$5,$6,$7},{$8,$9,$10,$11},{$14,$15},{$20,$21,$22,$23};
}""")
BRANCH_CONSTRAINTS = gl.constexpr("=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f")
CONSTRAINTS = gl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r")
MAGIC = gl.constexpr(12582912.0)


@gluon.jit
def axis(SIZE: gl.constexpr, DIM: gl.constexpr, L: gl.constexpr):
    """0 .. SIZE - 1 along dimension DIM of four."""
    if DIM == 0:
        LINE: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))
        return gl.arange(0, SIZE, layout=LINE)[:, None, None, None]
    elif DIM == 1:
        LINE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L)))
        return gl.arange(0, SIZE, layout=LINE)[None, :, None, None]
    elif DIM == 2:
        LINE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L)))
        return gl.arange(0, SIZE, layout=LINE)[None, None, :, None]
    else:
        LINE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L)))
        return gl.arange(0, SIZE, layout=LINE)[None, None, None, :]


@gluon.jit
def gemm_int4(
    a, w, a_scale, w_scale, low, up, bias, out, M, N, K, R, a_group, w_group,
    UNSIGNED: gl.constexpr, LOW: gl.constexpr, BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """a: (M, K/8), w: (N, K/8), int32 words of eight codes; a_scale[m + g a_group], w_scale[n + g w_group] of group g;
    low: (M, R/2), up: (N, R/2), int32 words of two numbers of out's dtype, R a multiple of 16.

    Dimensions of a tile: 16 rows of A, 16 columns of W, lane, and the register as two bits; 4 x 2 warps.
    """
    MT: gl.constexpr = BM // 16
    NT: gl.constexpr = BN // 16
    L: gl.constexpr = gl.BlockedLayout([MT // 4, NT // 2, 1, 2, 2], [1, 1, 32, 1, 1], [4, 2, 1, 1, 1], [4, 3, 2, 1, 0])
    L_A: gl.constexpr = gl.SliceLayout(1, L)
    L_W: gl.constexpr = gl.SliceLayout(0, L)
    pid = gl.program_id(0)
    down, across = gl.cdiv(M, BM), gl.cdiv(N, BN)
    band = 8 * across
    first = pid // band * 8
    height = gl.minimum(down - first, 8)
    m0 = (first + pid % band % height) * BM
    n0 = pid % band // height * BN

    # A: the bits are the half of the words and the half of the rows
    row_tile = m0 + 16 * axis(MT, 0, L_A)
    lane = axis(32, 1, L_A)
    row_a = gl.minimum(row_tile + lane // 4 + 8 * axis(2, 3, L_A), M - 1)
    word_a = lane % 4 * 2 + axis(2, 2, L_A)
    pa = a + row_a.to(gl.int64) * (K // 8) + word_a
    # W: the half of the columns and the half of the words
    column_tile = n0 + 16 * axis(NT, 0, L_W)
    lane = axis(32, 1, L_W)
    column_w = gl.minimum(column_tile + lane // 4 + 8 * axis(2, 2, L_W), N - 1)
    word_w = lane % 4 * 2 + axis(2, 3, L_W)
    pw = w + column_w.to(gl.int64) * (K // 8) + word_w
    # results: the half of the rows and the lowest bit of the column; `right` is 8 columns on
    L_M: gl.constexpr = gl.SliceLayout(3, L_A)
    L_N: gl.constexpr = gl.SliceLayout(2, L_W)
    row = m0 + 16 * gl.arange(0, MT, layout=gl.SliceLayout(1, gl.SliceLayout(2, L_M)))[:, None, None]
    row += gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, L_M)))[None, :, None] // 4
    row += 8 * gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, L_M)))[None, None, :]
    column = n0 + 16 * gl.arange(0, NT, layout=gl.SliceLayout(1, gl.SliceLayout(2, L_N)))[:, None, None]
    column += gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, L_N)))[None, :, None] % 4 * 2
    column += gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, L_N)))[None, None, :]
    ps = a_scale + gl.minimum(row, M - 1)
    p_left, p_right = w_scale + gl.minimum(column, N - 1), w_scale + gl.minimum(column + 8, N - 1)

    left = gl.zeros([MT, NT, 32, 2, 2], gl.float32, layout=L)
    right = gl.zeros([MT, NT, 32, 2, 2], gl.float32, layout=L)
    words_a, words_w = gl.load(pa), gl.load(pw)
    groups = K // 64
    for g in range(0, groups):
        full_a, full_w = gl.expand_dims(words_a, 1), gl.expand_dims(words_w, 0)
        xs = gl.expand_dims(gl.expand_dims(gl.load(ps), 3), 1)
        ws = gl.expand_dims(gl.expand_dims(gl.load(p_left), 2), 0)
        vs = gl.expand_dims(gl.expand_dims(gl.load(p_right), 2), 0)
        # the next group is on its way while this one is multiplied; the last one is loaded twice
        step = gl.where(g + 1 < groups, 8, 0)
        pa += step
        pw += step
        ps += a_group
        p_left += w_group
        p_right += w_group
        words_a, words_w = gl.load(pa), gl.load(pw)
        if UNSIGNED:
            bits, more = gl.inline_asm_elementwise(
                MMA_UNSIGNED, CONSTRAINTS, [full_a, full_w], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
            )
        else:
            bits, more = gl.inline_asm_elementwise(
                MMA, CONSTRAINTS, [full_a, full_w], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
            )
        # 12582912 + dot as a float, see gemm.py
        left = gl.fma(gl.fma(bits.to(gl.float32, bitcast=True), ws, ws * -MAGIC), xs, left)
        right = gl.fma(gl.fma(more.to(gl.float32, bitcast=True), vs, vs * -MAGIC), xs, right)

    if LOW:
        pa = low + row_a.to(gl.int64) * (R // 2) + word_a
        pw = up + column_w.to(gl.int64) * (R // 2) + word_w
        for _ in range(0, R // 16):
            lows, ups = gl.expand_dims(gl.load(pa), 1), gl.expand_dims(gl.load(pw), 0)
            if out.dtype.element_ty == gl.bfloat16:
                left, right = gl.inline_asm_elementwise(
                    MMA_BF16, BRANCH_CONSTRAINTS, [lows, ups, left, right], dtype=(gl.float32, gl.float32),
                    is_pure=True, pack=4,
                )  # fmt: skip
            else:
                left, right = gl.inline_asm_elementwise(
                    MMA_FP16, BRANCH_CONSTRAINTS, [lows, ups, left, right], dtype=(gl.float32, gl.float32),
                    is_pure=True, pack=4,
                )  # fmt: skip
            pa += 8
            pw += 8
    row = gl.expand_dims(gl.expand_dims(row, 3), 1)
    column = gl.expand_dims(gl.expand_dims(column, 2), 0)
    if BIAS:
        left += gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32)
        right += gl.load(bias + column + 8, mask=column + 8 < N, other=0.0).to(gl.float32)
    if out.dtype.element_ty == gl.float16:
        left = gl.minimum(gl.maximum(left, -65504.0), 65504.0)
        right = gl.minimum(gl.maximum(right, -65504.0), 65504.0)
    where = out + row.to(gl.int64) * N + column
    gl.store(where, left.to(out.dtype.element_ty), mask=(row < M) & (column < N))
    gl.store(where + 8, right.to(out.dtype.element_ty), mask=(row < M) & (column + 8 < N))


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
    unsigned: bool = False,
    rows: int = BM,
) -> Tensor:
    """`gemm.linear` for packed 4-bit codes on both sides, groups or rows. rows: 128 or 64 of a program's tile."""
    m, n, k = codes.shape[0], weight.shape[0], 2 * weight.shape[1]
    out = torch.empty(m, n, dtype=out_dtype, device=codes.device)
    if not m:
        return out
    scale = weight_scale.float().contiguous()  # of 16-bit numbers, loads are not pipelined; not kept: an eighth of W
    low, up, bias, rank = epilogue(out_dtype, up, low, bias, like=out)
    groups = (0, 0) if scales.ndim == 1 else (m, n)
    grid = (triton.cdiv(m, rows) * triton.cdiv(n, BN),)
    if rank:
        low, up = low.view(torch.int32), up.view(torch.int32)
    gemm_int4[grid](
        codes.view(torch.int32), weight.contiguous().view(torch.int32), scales, scale, low, up, bias, out,
        m, n, k, rank, *groups,
        UNSIGNED=unsigned, LOW=rank > 0, BIAS=bias is not out, BM=rows, BN=BN, num_warps=8,
    )  # fmt: skip
    return out
