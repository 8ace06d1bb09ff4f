"""When an evaluation is computed and when it is filled: a schedule is a function of what a run has seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .predictors import SAME_TIME


@dataclass(frozen=True, slots=True)
class Drift:
    """One free measurement: the forecast made for a computed evaluation, held against the true output.

    error: relative L1, worst row and cond; span: product of the distances from u to the `order + 1` snapshots used.
    """

    u: float
    error: float
    order: int
    span: float


@dataclass(slots=True)
class Trace:
    """What one run has seen; the run writes it, schedules read it.

    times: u of the computed evaluations whose snapshots are still held, oldest first; computed: how many there were;
    steps: length of the schedule.
    `moved` sums the mean |x_i - x_{i-1}| of the network's input since the last computed evaluation, worst row; `rate`
    is the relative L1 change of the output per unit of that movement, between the last two computed evaluations.
    """

    steps: int
    times: list[float] = field(default_factory=list)
    computed: int = 0
    drifts: list[Drift] = field(default_factory=list)
    moved: float = 0.0
    rate: float | None = None


def span(times: Sequence[float], u: float, order: int) -> float:
    """Product of |u - t| over the newest order + 1 times: the factor of u in the interpolation error."""
    return math.prod(abs(u - t) for t in times[len(times) - order - 1 :])


class Schedule(Protocol):
    """`skip` says whether the evaluation at u may be filled by a forecast of this order."""

    needs_input_change: bool

    def skip(self, trace: Trace, u: float, order: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Interval:
    """Compute when `every` steps have passed since the last computed evaluation (TaylorSeer, FORA, DeepCache).

    Counted in u, so a sampler that evaluates twice in a step keeps the same spacing.
    """

    every: float
    needs_input_change: bool = False

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return u - trace.times[-1] < self.every - SAME_TIME


@dataclass(frozen=True, slots=True)
class AccumulatedChange:
    """Compute when the output is expected to have changed by `threshold` since the last computed evaluation.

    The expected change is rate * movement of the input, summed over the evaluations since then (EasyCache,
    arXiv 2507.02860, with the previous evaluation's input, as its authors' code has it). Unit: relative L1.
    """

    threshold: float
    needs_input_change: bool = True

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return trace.rate is not None and trace.rate * trace.moved < self.threshold


@dataclass(frozen=True, slots=True)
class DriftBudget:
    """Fill while the expected drift of the forecast stays within `budget` (relative L1).

    A polynomial forecast errs by c * span(u), with c the next derivative. c is taken from the measured drifts, the
    larger of the newest two of this order; the next span follows from the snapshot times. Nothing measured: compute.
    """

    budget: float
    needs_input_change: bool = False

    def expected(self, trace: Trace, u: float, order: int) -> float:
        """Expected drift of a forecast for u; infinite where nothing comparable was measured."""
        seen = [d for d in trace.drifts if d.order == order and d.span > 0][-2:]
        if not seen:
            return math.inf
        worst = max(d.error / d.span for d in seen)
        return worst * span(trace.times, u, order)

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return self.expected(trace, u, order) <= self.budget
