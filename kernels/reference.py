"""Exact eager implementations. They are the contract that every faster kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

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
