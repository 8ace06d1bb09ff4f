"""What a computed evaluation shows: how far off its forecast would have been, and how far the input has moved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..forecast.history import History
from ..forecast.predictors import SAME_TIME, Predictor
from ..forecast.schedules import Drift, Trace, span
from ..metrics import worst_relative_l1
from ..sites.calls import Parts
from .evaluation import COMPUTED, Evaluation, Open


class Input:
    """What the network was given: at the newest evaluation, and at the newest computed one."""

    def __init__(self) -> None:
        self.newest: Tensor | None = None
        self._computed: Tensor | None = None

    def take(self, x: Tensor) -> float:
        """Keep a copy of x [B, ...]; returns how far it has moved from the one before, 0 where that cannot be said."""
        moved = 0.0
        if self.newest is not None and self.newest.shape == x.shape:
            moved = movement(x, self.newest)
        self.newest = x.detach().clone()
        return moved

    def since_computed(self) -> float | None:
        """How far the newest is from the newest computed one; None where there is none."""
        if self._computed is None or self.newest is None:
            return None
        return movement(self.newest, self._computed)

    def computed(self) -> None:
        """The newest evaluation was computed."""
        self._computed = self.newest

    def close(self) -> None:
        """Free both tensors."""
        self.newest = self._computed = None


def measured(
    history: History, predictor: Predictor, u: float, parts: Parts, base: Parts | None, dim: int = 0
) -> tuple[Tensor, int, float]:
    """(relative L1 of the forecast for u against the true parts, its order, its span), nothing read from the device.

    base: what a residual is added to, where the sum is what counts; dim: where the pictures of a batch are.
    """
    forecast, order = history.forecast(u, predictor)
    return _change(forecast, parts, base, dim), order, span(history.times, u, order)


def learn(trace: Trace, opened: Open, earlier: Sequence[Evaluation], moved: float | None, anchors: int) -> None:
    """Take over what a computed evaluation has shown: its drift, the rate of change, the time of its snapshot.

    earlier: the evaluations before; moved: the input since the last computed one; anchors: times that are held.
    """
    now = opened.now
    if opened.drifts:
        drift = _largest([d for d, _, _ in opened.drifts])
        order = min(order for _, order, _ in opened.drifts)
        reach = max(reach for _, _, reach in opened.drifts)
        if math.isfinite(drift):
            now.drift = drift
            trace.drifts.append(Drift(now.u, drift, order, reach))
            _estimate_filled(trace, earlier)
        else:
            trace.drifts.clear()
    if opened.changes and moved is not None:
        trace.rate = _largest(opened.changes) / moved if moved > 0 else None
    trace.moved = trace.accumulated = 0.0
    kept = [t for t in trace.times if abs(t - now.u) >= SAME_TIME]
    trace.computed += len(kept) == len(trace.times)  # samplers like heun come to one time twice
    trace.times = [*kept, now.u][-anchors:]


def _estimate_filled(trace: Trace, earlier: Sequence[Evaluation]) -> None:
    """Give the evaluations filled since the last computed one their share of the drift measured after them."""
    measured = trace.drifts[-1]
    if measured.span <= 0:
        return
    for e in reversed(earlier):
        if e.action == COMPUTED:
            break
        e.drift = measured.error * span(trace.times, e.u, measured.order) / measured.span


def _largest(values: Sequence[Tensor]) -> float:
    """The largest of scalar tensors, NaN counted as infinite; each is read from its device."""
    return max(v if math.isfinite(v) else math.inf for v in (float(t) for t in values))


def _change(value: Parts, reference: Parts, base: Parts | None, dim: int) -> Tensor:
    """Worst relative L1 of value against reference; against reference + base where the sum is what counts."""
    if base is None:
        return worst_relative_l1(value, reference, dim)
    whole = [r + b for r, b in zip(reference, base, strict=True)]
    moved = [v + b for v, b in zip(value, base, strict=True)]
    return worst_relative_l1(moved, whole, dim)


def movement(x: Tensor, previous: Tensor) -> float:
    """Mean absolute difference of the row that moved most."""
    return float((x - previous).abs().reshape(x.shape[0], -1).float().mean(1).max())
