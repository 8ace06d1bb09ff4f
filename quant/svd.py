"""The low-rank branch: what a 16-bit product of rank R takes off the weight before the rest is rounded (SVDQuant)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

OVERSAMPLE = 16  # with 4 power iterations the residual is within 0.2 % of the exact SVD's at 1024 x 1024
ITERATIONS = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Branch:
    """Factors in the storage dtype. up: (N, R); down: (K, R), 1/smooth folded in: it multiplies the raw activation."""

    up: Tensor
    down: Tensor

    def smoothed(self, smooth: Tensor) -> Tensor:
        """up (down * smooth)^T, what the branch takes off the smoothed weight: float32 (N, K)."""
        return self.up.float() @ (self.down.float() * smooth.float()[:, None]).T


def truncated_svd(weight: Tensor, rank: int, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """U sqrt(S) (N, rank) and V sqrt(S) (K, rank) of the largest singular values of weight (N, K), float32.

    Randomised (`torch.svd_lowrank`) with a fixed seed, which leaves the global generators as they were; exact where
    rank + 16 columns are no fewer than the matrix has. Raises ValueError when the rank exceeds the matrix's.
    """
    n, k = weight.shape
    if not 0 <= rank <= min(n, k):
        raise ValueError(f"a branch of rank {rank} does not fit a weight of {n} x {k}")
    if rank == 0:
        return weight.new_zeros(n, 0, dtype=torch.float32), weight.new_zeros(k, 0, dtype=torch.float32)
    wide = weight.float()
    if rank + OVERSAMPLE >= min(n, k):
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        v = vh.T
    else:
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(wide, q=rank + OVERSAMPLE, niter=iterations)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, v[:, :rank] * root


def low_rank(
    smoothed: Tensor, smooth: Tensor, rank: int, dtype: torch.dtype, iterations: int = ITERATIONS
) -> tuple[Branch, Tensor]:
    """The best branch of rank R of a smoothed weight, and the residual that is left for the 4-bit main path.

    smoothed: weight * smooth, float (N, K); smooth: (K,). up = U sqrt(S), down = V sqrt(S) / smooth; both are rounded
    to `dtype` before the residual is formed, so branch + residual is the smoothed weight to float32 rounding.
    Returns (branch, residual float32 (N, K)). Section 4.2 of SVDQuant, arXiv 2411.05007.
    """
    up, down = truncated_svd(smoothed, rank, iterations)
    branch = Branch(up.to(dtype), (down / smooth.float()[:, None]).to(dtype))
    return branch, residual(smoothed, smooth, branch)


def residual(smoothed: Tensor, smooth: Tensor, branch: Branch) -> Tensor:
    """smoothed - up (down * smooth)^T, float32 (N, K)."""
    wide = smoothed.float()
    if not branch.up.shape[1]:
        return wide
    return torch.addmm(wide, branch.up.float(), (branch.down.float() * smooth.float()[:, None]).T, alpha=-1)


@dataclass(frozen=True, slots=True)
class Refined(Generic[T]):
    """The best result of `refine`, its error, and the errors of all rounds tried, the first without refinement."""

    best: T
    error: float
    errors: list[float]


def refine(
    first: Branch,
    make: Callable[[Branch], tuple[T, Tensor, float]],
    again: Callable[[Tensor], Branch],
    rounds: int,
) -> Refined[T]:
    """Alternate between rounding the residual and fitting the branch to what rounding left: L = SVD(W - Q(W - L)).

    make(branch) -> (result, Q: the rounded residual in smoothed coordinates, output error); again(Q) -> the branch of
    W - Q. Stops at the first round whose error rises, keeps the best (deepcompressor, `low_rank.num_iters`).
    """
    best, rounded, error = make(first)
    errors = [error]
    for _ in range(rounds):
        result, rounded, latest = make(again(rounded))
        errors.append(latest)
        if not latest < error:
            break
        best, error = result, latest
    return Refined(best, error, errors)
