"""Exact eager implementations. They are the contract that every faster kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def weighted_sum(snapshots: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return `sum_j weights[j] * snapshots[j]` as a new tensor.

    snapshots: m >= 1 tensors of one shape, dtype and device; weights: m finite numbers, zeros are not read.
    The sum is taken in float32 (float64 stays float64) and rounded once to the snapshots' dtype; a half-precision
    result is clamped to the finite range of its dtype, because one infinite element ruins a whole picture.
    The result never shares memory with a snapshot.
    Raises ValueError when nothing is given or the counts differ.
    """
    if not snapshots or len(snapshots) != len(weights):
        raise ValueError(f"weighted_sum needs one weight per snapshot, got {len(snapshots)} and {len(weights)}")
    dtype = snapshots[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = None
    for snapshot, weight in zip(snapshots, weights, strict=True):
        if weight == 0.0:
            continue
        if total is None:
            total = snapshot.to(wide) * weight
        else:
            total.add_(snapshot.to(wide), alpha=weight)
    if total is None:
        return torch.zeros_like(snapshots[0])
    return rounded(total, dtype)


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """`total`, a sum that nobody else holds, rounded once to `dtype` and kept within its finite range."""
    if total.dtype != dtype:
        limit = torch.finfo(dtype).max
        total.clamp_(-limit, limit)
    return total.to(dtype)


# Shift that makes the output of GELU (minimum -0.17) non-negative: nunchaku's constant, part of the stored format.
GELU_SHIFT = 0.171875

# A group of zeros gets this maximum, so that its scale can be divided by (comfy-kitchen's eager reference).
SMALLEST_MAX = 1e-10

# Integers up to here are exact in float32, so an integer dot product below it may be taken by a float32 matmul.
EXACT_FLOAT32 = 1 << 24


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte: low nibble = even column, high nibble = odd column.

    codes: integer (..., K), K even, signed [-8, 7] or unsigned [0, 15]. Returns int8 (..., K/2).
    Raises ValueError when K is odd. Layout: comfy-kitchen `svdquant_w4a4` and `convrot_w4a4`.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"two 4-bit codes share a byte, so the columns must be even in number, got {codes.shape[-1]}")
    nibbles = codes.to(torch.int8).view(torch.uint8) & 15
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).view(torch.int8)


def unpack_int4(packed: Tensor, unsigned: bool = False) -> Tensor:
    """Inverse of `pack_int4`: int8 (..., K/2) to int8 (..., K) in [-8, 7], or in [0, 15] when `unsigned`."""
    raw = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((raw & 15, raw >> 4), -1).flatten(-2).view(torch.int8)
    # flips the sign bit of the nibble and subtracts it again: two's complement without a branch
    return nibbles if unsigned else (nibbles ^ 8) - 8


def hadamard(x: Tensor, size: int) -> Tensor:
    """Multiply consecutive blocks of `size` elements of the last axis by the regular Hadamard matrix, normalised.

    x: float (..., K), size a power of 4 that divides K, or 0 for no rotation. The matrix is the Kronecker power of
    [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2: orthogonal and symmetric, so the same call undoes it, and no row
    is constant, which would gather a common offset in one channel (ConvRot, arXiv 2512.03673). In x's dtype.
    Raises ValueError for any other size.
    """
    if size == 0:
        return x
    k = x.shape[-1]
    if k % size:
        raise ValueError(f"a rotation of size {size} needs a power of 4 that divides the {k} columns")
    # H_ab = H_a (x) H_b, so a block laid out as an a x b matrix B becomes H_a B H_b: two small products instead of one
    # large one
    small = 4 ** ((size.bit_length() - 1) // 4)
    right = regular_hadamard(small).to(x) if small > 1 else None
    left = regular_hadamard(size // small).to(x)
    blocks = x.reshape(-1, small)
    if right is not None:
        blocks = blocks @ right
    return torch.matmul(left, blocks.view(-1, size // small, small)).view(x.shape)


@lru_cache(maxsize=8)
def regular_hadamard(size: int) -> Tensor:
    """The normalised regular Hadamard matrix of order `size`, a power of 4: float32 on the CPU, not to be written to.

    Symmetric, orthogonal, every row sums to 1. Raises ValueError for another size.
    """
    if size < 4 or size & (size - 1) or size.bit_length() % 2 == 0:
        raise ValueError(f"a rotation of size {size} needs a power of 4 that divides the columns")
    four = (torch.ones(4, 4) - 2 * torch.eye(4).flip(0)) / 2
    return four if size == 4 else torch.kron(four, regular_hadamard(size // 4))


def main_input(x: Tensor, smooth: Tensor | None = None, unsigned: bool = False, rotation: int = 0) -> Tensor:
    """What the main path multiplies, before rounding: rotate((x + shift) / smooth), float32 (M, K).

    x: (M, K) float; smooth: (K,) or None; unsigned: the shift is GELU_SHIFT, else 0; rotation: see `hadamard`.
    """
    main = x.float() + GELU_SHIFT if unsigned else x.float()
    return hadamard(main if smooth is None else main / smooth.float(), rotation)


def quantise_activations(
    x: Tensor,
    smooth: Tensor | None = None,
    shift: float = 0.0,
    bits: int = 4,
    group_size: int = 64,
    unsigned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantise every group of `group_size` channels of every token with its own scale (SVDQuant, arXiv 2411.05007).

    v = (x + shift) / smooth in float32; scale = max |v| over the group / qmax; code = round half to even(v / scale),
    clamped. bits 4: qmax 7, codes [-7, 7]; `unsigned`: qmax 15, codes [0, 15]; bits 8: qmax 127, codes [-127, 127].
    x: finite float (M, K); smooth: (K,) or None; group_size divides K (K itself: one scale per token, as in ConvRot).
    Returns codes int8 (M, K) and scales float32 (M, K / group_size). Raises ValueError for other bits or a group size
    that does not divide K.
    """
    if bits not in (4, 8) or (unsigned and bits != 4):
        raise ValueError(f"activations are quantised to 4 bit, 4 bit unsigned or 8 bit, got {bits}")
    m, k = x.shape
    if k % group_size:
        raise ValueError(f"groups of {group_size} do not divide the {k} channels")
    v = x.float() + shift if shift else x.float()
    if smooth is not None:
        v = v / smooth.float()
    groups = v.reshape(m, k // group_size, group_size)
    qmax = 15 if unsigned else (1 << (bits - 1)) - 1
    scales = groups.abs().amax(-1).clamp_(min=SMALLEST_MAX) / qmax
    codes = (groups / scales[..., None]).round_().clamp_(0 if unsigned else -qmax, qmax)
    return codes.to(torch.int8).reshape(m, k), scales


def integer_dot(a: Tensor, b: Tensor, largest: int = 127) -> Tensor:
    """Exact a @ b^T of int8 codes (M, K) and (N, K), as float (M, N); float64 where float32 could round.

    largest: no product of two codes exceeds its square.
    """
    wide = torch.float32 if a.shape[1] * largest**2 < EXACT_FLOAT32 else torch.float64
    return a.to(wide) @ b.to(wide).T


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
) -> Tensor:
    """y = sum_g dot(qx_g, qw_g) xscale_g wscale_g + (x proj_down) proj_up^T + bias: the SVDQuant linear layer.

    x: (..., K) float; packed: int8 (N, K/2); weight_scale: (K/group_size, N); proj_down: (K, R) and proj_up: (N, R),
    None for no branch; smooth: (K,), x is divided by it; bias: (N,), for `unsigned` layers already corrected for the
    shift. act_bits: 4, 8 (W4A8) or 16 (W4A16: activations are not rounded); unsigned: x + GELU_SHIFT takes the place of
    x on the main path, in 4 bit quantised to [0, 15], in 8 bit to the usual [-127, 127]; rotation: size of the Hadamard
    blocks that the smoothed activation is multiplied by, 0 for none.
    The dot product of a group is exact in integers; groups are summed in float32 in ascending order; the low-rank
    branch takes raw x in float32; one rounding to x's dtype at the end. Returns (..., N).
    Raises ValueError when the columns do not fit. Contract: comfy-kitchen `svdquant_w4a4`; the rotation is ours.
    """
    k, n = 2 * packed.shape[1], packed.shape[0]
    if x.shape[-1] != k:
        raise ValueError(f"the layer takes {k} channels, the input has {x.shape[-1]}")
    rows = x.reshape(-1, k)
    weight = unpack_int4(packed)
    main = main_input(rows, smooth, unsigned, rotation)
    total = torch.zeros(len(rows), n, dtype=torch.float32, device=x.device)
    if act_bits == 16:
        wide = weight.view(n, -1, group_size) * weight_scale.float().T[..., None]
        total += main @ wide.view(n, k).T
    else:
        codes, scales = quantise_activations(
            main, bits=act_bits, group_size=group_size, unsigned=unsigned and act_bits == 4
        )
        for g in range(k // group_size):
            columns = slice(g * group_size, (g + 1) * group_size)
            dot = integer_dot(codes[:, columns], weight[:, columns]).float()
            total += dot * scales[:, g, None] * weight_scale[g].float()
    return finish(total, x, proj_down, proj_up, bias)


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
) -> Tensor:
    """y = dot(qx, qw) xscale wscale + bias with one scale per token and per weight row, both rotated (ConvRot).

    x: (..., K) float; weight: int8 (N, K/2) packed codes of the rotated weight for bits 4, int8 (N, K) for bits 8;
    weight_scale: float32, N elements; rotation: size of the Hadamard blocks, divides K. qmax 7 or 127, scale =
    max |rotated x| / qmax per token. proj_down (K, R), proj_up (N, R): a low-rank branch on raw x, for LoRA.
    Exact integers, one rounding to x's dtype at the end. Returns (..., N). Raises ValueError when the columns do not
    fit. Contract: the host's `convrot_w4a4` and `int8_tensorwise` with convrot (comfy-kitchen eager, arXiv 2512.03673).
    """
    codes_w = unpack_int4(weight) if bits == 4 else weight
    k = codes_w.shape[1]
    if x.shape[-1] != k:
        raise ValueError(f"the layer takes {k} channels, the input has {x.shape[-1]}")
    rows = hadamard(x.reshape(-1, k).float(), rotation)
    codes, scales = quantise_activations(rows, bits=bits, group_size=k)
    total = integer_dot(codes, codes_w, (1 << (bits - 1)) - 1).float() * scales * weight_scale.float().reshape(1, -1)
    return finish(total, x, proj_down, proj_up, bias)


def finish(total: Tensor, x: Tensor, down: Tensor | None, up: Tensor | None, bias: Tensor | None) -> Tensor:
    """Add the low-rank branch of raw x and the bias to float32 `total` (M, N); reshape and round to x's dtype."""
    if down is not None and up is not None and down.shape[1]:
        total += x.reshape(-1, x.shape[-1]).float() @ down.float() @ up.float().T
    if bias is not None:
        total += bias.float()
    return rounded(total.view(*x.shape[:-1], total.shape[1]), x.dtype)


# The magnitudes of e2m1, in the order of their codes; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise every 16 channels of every row to e2m1 with an e4m3 scale (NVFP4 without the scale of the tensor).

    scale = min(max |x| / 6, 448) in float8_e4m3fn (zero for blocks too small for it); code = the e2m1 number nearest
    to x / scale, a tie to the even code, beyond 6 to 6. x: finite float (M, K), 16 divides K. Returns int8 (M, K/2),
    low nibble = even column, and float8_e4m3fn (M, K/16). Numbers: OCP MX v1.0; scales: nunchaku, per block only.
    """
    m, k = x.shape
    blocks = x.float().reshape(m, k // 16, 16)
    scales = (blocks.abs().amax(-1) / 6).clamp_(max=448).to(torch.float8_e4m3fn)
    wide = scales.float()[..., None]
    q = torch.where(wide > 0, blocks / wide, 0.0)
    size, codes = q.abs(), (q < 0).to(torch.int8) << 3
    for i, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        codes += (size >= middle) if i % 2 else (size > middle)
    return pack_int4(codes.view(m, k)), scales


def nvfp4_values(packed: Tensor, scales: Tensor) -> Tensor:
    """What `nvfp4_quantise` kept, float32 (M, K)."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], device=packed.device)
    codes = unpack_int4(packed, unsigned=True).long()
    return (values[codes].view(*scales.shape, 16) * scales.float()[..., None]).view(codes.shape)


def nvfp4_linear(
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
) -> Tensor:
    """y = (q(rotate(x / smooth)) @ w^T) channel_scale + (x proj_down) proj_up^T + bias, both sides NVFP4.

    x: (..., K) float; packed: int8 (N, K/2) and block_scale: float8_e4m3fn (N, K/16) of `nvfp4_quantise`, of the weight
    divided by channel_scale: float32 (N,), which keeps the scales in the range of e4m3. The rest as in `w4a4_linear`.
    """
    k = 2 * packed.shape[1]
    if x.shape[-1] != k:
        raise ValueError(f"the layer takes {k} channels, the input has {x.shape[-1]}")
    main = main_input(x.reshape(-1, k), smooth, rotation=rotation)
    total = nvfp4_values(*nvfp4_quantise(main)) @ nvfp4_values(packed, block_scale).T * channel_scale.float()
    return finish(total, x, proj_down, proj_up, bias)
