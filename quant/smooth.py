"""Smooth factors: moving outliers of the activation into the weight, channel by channel (SmoothQuant, SVDQuant)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (alpha, beta) tried by default: every one costs a low-rank branch and a product with the calibration rows.
SMALL_GRID = ((0.0, 0.0), (0.3, 0.0), (0.5, 0.0), (0.7, 0.0), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3))

# Range of a factor relative to the geometric mean: of a calibrated one, and of one made without data.
CALIBRATED_RANGE, DATA_FREE_RANGE = 1e3, 64.0


def smooth_factor(
    act_absmax: Tensor, weight_absmax: Tensor, alpha: float, beta: float, limit: float = CALIBRATED_RANGE
) -> Tensor:
    """s = act_absmax^alpha / weight_absmax^beta per input channel; activations are divided by it, weights multiplied.

    act_absmax, weight_absmax: (K,), non-negative. Returns float32 (K,), divided by its geometric mean (the group scales
    take up a common factor) and clamped to [1/limit, limit]. A channel with a zero span gets 1; when any span is NaN or
    infinite the whole factor is 1. Source: deepcompressor's smoothing with AbsMax spans (SVDQuant, arXiv 2411.05007).
    """
    act, weight = act_absmax.float(), weight_absmax.float()
    if not (torch.isfinite(act).all() and torch.isfinite(weight).all()):
        return torch.ones_like(act)
    spans = (act > 0) & (weight > 0)
    logs = alpha * act.clamp_min(1e-30).log() - beta * weight.clamp_min(1e-30).log()
    logs = torch.where(spans, logs - logs[spans].mean() if spans.any() else logs, 0.0)
    factor = logs.exp().clamp_(1 / limit, limit)
    return factor if torch.isfinite(factor).all() else torch.ones_like(act)


def choose(
    candidates: Sequence[tuple[float, float]], error: Callable[[tuple[float, float]], float]
) -> tuple[tuple[float, float], list[float]]:
    """The candidate with the least error (the first of equals) and all errors; an error of NaN never wins.

    error: output error of the complete fake-quantised layer, low-rank branch included (SVDQuant's OutputsError).
    """
    errors = [error(candidate) for candidate in candidates]
    ranked = [float("inf") if e != e else e for e in errors]
    return candidates[ranked.index(min(ranked))], errors


def modulation_span(scale: Tensor, shift: Tensor, gamma: Tensor | None = None) -> Tensor:
    """What an input channel behind a modulated norm can span, without data: float32 (K,).

    scale, shift: (S, K), the modulation `norm(x) (1 + scale) + shift` over the steps (and conditionings) of a schedule;
    gamma: (K,) weight of the norm, if it has one. ax_j = max over S of sqrt(((1 + scale_j) gamma_j)^2 + shift_j^2): the
    root mean square of the channel when the norm makes it of unit variance. The idea and its measurement (+0 to +8 dB
    where outliers come through the modulation) are ours. Raises ValueError when the tables are not of one shape.
    """
    if scale.ndim != 2 or scale.shape != shift.shape:
        raise ValueError(
            f"scale and shift must both be steps x channels, got {tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    gain = 1 + scale.float()
    if gamma is not None:
        gain = gain * gamma.float()
    return torch.hypot(gain, shift.float()).amax(0)
