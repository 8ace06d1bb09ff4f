"""How far two results are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relative_l1(value: Tensor, reference: Tensor, dim: int = 0) -> Tensor:
    """`mean|value - reference| / mean|reference|` per row, shape [B]; 0 / 0 is 0, anything else over 0 is infinite.

    dim: where the rows are, of size B.
    """
    value, reference = value.movedim(dim, 0), reference.movedim(dim, 0)
    rows = reference.shape[0]
    difference = (value.float() - reference.float()).abs().reshape(rows, -1).mean(1)
    size = reference.float().abs().reshape(rows, -1).mean(1)
    ratio = difference / size
    return torch.where((size == 0) & (difference == 0), torch.zeros_like(ratio), ratio)


def worst_relative_l1(values: Sequence[Tensor], references: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The largest `relative_l1` over all rows of all pairs, a scalar tensor on the first pair's device."""
    device = values[0].device
    return torch.stack([relative_l1(v, r, dim).max().to(device) for v, r in zip(values, references, strict=True)]).max()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`||value - reference||_2 / ||reference||_2` over everything; 0 where both are zero."""
    difference = (value.double() - reference.double()).norm().item()
    size = reference.double().norm().item()
    return 0.0 if difference == 0.0 else difference / size if size else math.inf


def psnr(value: Tensor, reference: Tensor, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB over all elements; infinite where both are equal.

    peak: the signal's range; 1.0 for pictures in [0, 1]. None takes max - min of the reference, the usual choice for
    latents, which have no fixed range.
    """
    mse = (value.double() - reference.double()).square().mean().item()
    if mse == 0.0:
        return math.inf
    if peak is None:
        peak = (reference.max() - reference.min()).item()
    return 10.0 * math.log10(peak * peak / mse) if peak else -math.inf


def ssim(value: Tensor, reference: Tensor, window: int = 8) -> float:
    """Mean structural similarity of pictures [B, H, W, C] in [0, 1] with a uniform window (Wang 2004, eq. 13)."""
    # picture by picture: a video at once would take gigabytes
    rows = [_ssim(v[None], r[None], window) for v, r in zip(value, reference, strict=True)]
    return sum(rows) / len(rows)


def _ssim(value: Tensor, reference: Tensor, window: int) -> float:
    c1, c2 = 0.01**2, 0.03**2
    x, y = (t.double().movedim(-1, 1) for t in (value, reference))

    def mean(t: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(t, [min(window, side) for side in t.shape[-2:]], stride=1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similarity = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean().item()
