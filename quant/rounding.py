"""Rounding a weight to codes: to nearest with a searched scale, and GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Shares of the absolute maximum that are tried as a group's clipping point (13, as in the research's prototype).
RATIOS = tuple(0.70 + 0.025 * i for i in range(13))

# Elements rounded at a time. On a CPU the working set of a scale search stays in the cache; a card needs few launches
# (at a CPU's size 9.3 million for FLUX), and 64 MB for each of a handful of temporaries.
CHUNK, CARD_CHUNK = 1 << 18, 1 << 24

# GPTQ as published and as deepcompressor runs it: share of the mean diagonal, columns per block.
DAMPING, BLOCK = 0.01, 128
DAMPING_TRIES = 4  # 0.01, 0.1, 1, 10
FLOAT64_COLUMNS = 8192  # above, a Cholesky factor in float64 is over 1 GB


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight in codes. codes: int8 (N, K); scales: (N, G), a group is K/G columns; weight ~ codes times scale.

    reason: why another way than the one asked for was taken, "" where it was.
    """

    codes: Tensor
    scales: Tensor
    reason: str = ""

    def dequantise(self) -> Tensor:
        """codes times scales, float32 (N, K)."""
        n, k = self.codes.shape
        groups = self.codes.float().view(n, self.scales.shape[1], -1)
        return groups.mul_(self.scales.float()[..., None]).view(n, k)


def rtn(
    weight: Tensor,
    group_size: int = 64,
    bits: int = 4,
    search: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> Rounded:
    """Round to nearest, one scale per row and group; the scale is rounded to `scale_dtype` before the codes are made.

    weight: float (N, K); group_size divides K, K itself gives one scale per row (ConvRot). Codes are in [-qmax, qmax],
    qmax = 2^(bits-1) - 1. search: of RATIOS times absmax / qmax take, per group, the scale with the least squared
    error; ratio 1 is among them, so no group is worse than plain absmax. Raises ValueError when groups do not divide K.
    """
    n, k = weight.shape
    if k % group_size:
        raise ValueError(f"groups of {group_size} do not divide the {k} columns")
    qmax = (1 << (bits - 1)) - 1
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, k // group_size, dtype=scale_dtype, device=weight.device)
    step = _rows(weight)
    for start in range(0, n, step):
        part = weight[start : start + step].float()
        groups = part.view(len(part), -1, group_size)
        scale = _scales(groups, qmax, search, scale_dtype)
        scales[start : start + step] = scale
        codes[start : start + step] = _codes(groups, scale.float(), qmax).view(part.shape)
    return Rounded(codes, scales)


def rounded_to_nearest(weight: Tensor, group_size: int, bits: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """`rtn(...).dequantise()` with absmax scales, float32 (N, K), without codes in between: for trying candidates."""
    qmax = (1 << (bits - 1)) - 1
    found = torch.empty_like(weight, dtype=torch.float32)
    step = _rows(weight)
    for part, out in zip(weight.split(step), found.split(step), strict=True):
        groups = part.float().view(len(part), -1, group_size)
        scale = _scales(groups, qmax, False, dtype).float()[..., None]
        torch.div(groups, scale, out=out.view(groups.shape)).round_().clamp_(-qmax, qmax).mul_(scale)
    return found


def _rows(weight: Tensor) -> int:
    return max(1, (CHUNK if weight.device.type == "cpu" else CARD_CHUNK) // weight.shape[1])


def _codes(groups: Tensor, scale: Tensor, qmax: int) -> Tensor:
    return (groups / scale[..., None]).round_().clamp_(-qmax, qmax)


def _scales(groups: Tensor, qmax: int, search: bool, dtype: torch.dtype) -> Tensor:
    """Scale of every group, in `dtype`, never zero and never infinite. groups: float32 (n, G, group size)."""
    limits = torch.finfo(dtype)
    # 1e-10 is the kernels' smallest maximum; float16 has no such number
    smallest = max(1e-10 / qmax, limits.tiny)
    largest = groups.abs().amax(-1)

    def stored(ratio: float) -> Tensor:
        return (largest * ratio / qmax).clamp_(smallest, limits.max).to(dtype)

    best = stored(1.0)
    if not search:
        return best
    least = None
    work = torch.empty_like(groups)
    for ratio in reversed(RATIOS):
        scale = best if least is None else stored(ratio)
        wide = scale.float()[..., None]
        torch.mul(groups, wide.reciprocal(), out=work).round_().clamp_(-qmax, qmax).mul_(wide).sub_(groups)
        error = work.square_().sum(-1)
        if least is None:
            least = error
            continue
        better = error < least
        best = torch.where(better, scale, best)
        least = torch.where(better, error, least)
    return best


def weight_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """||(weight - rounded) x||^2 of every row, summed over the inputs that made `hessian` = X^T X: float32 (N,)."""
    difference = weight.float() - rounded
    return ((difference @ hessian.float()) * difference).sum(1)


def shrunk(hessian: Tensor, count: int) -> Tensor:
    """`hessian` with its off-diagonal part scaled by 1 - lambda, the share of it that `count` inputs cannot support.

    lambda = sum (1 - r^2)^2 / count over sum r^2, both over pairs of different channels, r their uncentred correlation:
    Schaefer and Strimmer 2005 with the variance of a correlation of Gaussian inputs. As many rows as channels of
    independent inputs give lambda near 1, where GPTQ is plain rounding. Taken as it is, such a Hessian makes GPTQ fit
    the sample's noise: outputs on other inputs came out 1.5 times worse than by rounding to nearest.
    """
    root = hessian.diagonal().clamp_min(1e-30).sqrt()
    squares = (hessian / root / root[:, None]).square_().clamp_max_(1.0)
    squares.fill_diagonal_(1.0)  # adds nothing to the upper sum, and is taken off the lower one
    supported = squares.sum() - len(root)
    amount = float(((1 - squares).square_().sum() / count / supported.clamp_min(1e-30)).clamp(0, 1))
    found = hessian * (1 - amount)
    found.diagonal().copy_(hessian.diagonal())
    return found


def gptq(
    weight: Tensor,
    hessian: Tensor,
    group_size: int = 64,
    bits: int = 4,
    search: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    count: int = 0,
) -> Rounded:
    """Round column by column, and let the columns not yet rounded make up for the error (GPTQ, arXiv 2210.17323).

    weight: float (N, K), in the coordinates of the main path (smoothed, rotated, low-rank branch taken off); hessian:
    X^T X of the inputs in the same coordinates, (K, K). Act-order (columns by falling diagonal), blocks of 128, static
    group scales: those of `rtn`. Rows for which plain `rtn` has the lower error on `hessian` keep it, so on the
    calibration inputs the result is never worse. count: how many inputs made the Hessian, which is then `shrunk`; 0
    takes it as it is. Deterministic. Damping starts at 0.01 of the mean diagonal and is
    raised tenfold up to three times; if the Hessian is still not positive definite the result is that of `rtn`, with
    the reason. Raises ValueError when the Hessian's shape is not (K, K).
    """
    n, k = weight.shape
    if tuple(hessian.shape) != (k, k):
        raise ValueError(f"a weight with {k} columns needs a Hessian of {k} x {k}, got {tuple(hessian.shape)}")
    plain = rtn(weight, group_size, bits, search, scale_dtype)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(shrunk(hessian, count) if count else hessian, order)
    if factor is None:
        return Rounded(plain.codes, plain.scales, "the Hessian is not positive definite, rounded to nearest instead")
    qmax = (1 << (bits - 1)) - 1
    scales = plain.scales.float()
    left = weight.float()[:, order]
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    columns = order.tolist()  # once: asking a card for one number waits for all its work
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        block, inverse = left[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            column = columns[start + i]
            scale = scales[:, column // group_size]
            code = (block[:, i] / scale).round_().clamp_(-qmax, qmax)
            codes[:, column] = code
            errors[:, i] = (block[:, i] - code * scale) / inverse[i, i]
            block[:, i + 1 :].addr_(errors[:, i], inverse[i, i + 1 :], alpha=-1)
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    better = weight_error(weight, Rounded(codes, plain.scales).dequantise(), hessian) < weight_error(
        weight, plain.dequantise(), hessian
    )
    return Rounded(torch.where(better[:, None], codes, plain.codes), plain.scales)


def _inverse_factor(hessian: Tensor, order: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse of the damped Hessian in the given order, float32; None if there is none."""
    k = len(order)
    wide = hessian[order][:, order].to(torch.float64 if k <= FLOAT64_COLUMNS else torch.float32)
    mean = wide.diagonal().mean()
    if not torch.isfinite(wide).all() or mean <= 0:
        return None
    for attempt in range(DAMPING_TRIES):
        damped = wide.clone()
        damped.diagonal().add_(DAMPING * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper.float()
    return None
