"""Schedules solved from the statistics of a full run: which steps to compute for a given number of them.

All functions take the statistics and a number of steps, give sorted key steps that begin with 0 and end with the last
step, and are deterministic. `choice.py` runs them all and says which to take.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..forecast.predictors import Predictor
from ..forecast.schedules import Schedule, Trace
from .statistics import TrajectoryStatistics


@dataclass(frozen=True)
class Solution:
    """Key steps and what their method minimised."""

    keys: tuple[int, ...]
    error: float


def uniform(steps: int, count: int) -> tuple[int, ...]:
    """`count` key steps at even distances, the first and the last among them."""
    _check(steps, count)
    if count == 1:
        return (0,)
    return tuple(sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)}))


def predicted_error(
    statistics: TrajectoryStatistics, keys: Sequence[int], predictor: Predictor, weights: Sequence[float] | None = None
) -> float:
    """Root of the weighted sum of squared forecast errors over the steps that are not computed.

    weights: what an error at each step does to the result (squared errors are multiplied by them); None: 1 each.
    """
    total, anchors, computed = 0.0, list[int](), set(keys)
    for step in range(statistics.steps):
        if step in computed:
            anchors = [*anchors, step][-predictor.anchors :]
        else:
            weight = 1.0 if weights is None else weights[step]
            total += weight * statistics.forecast_errors(anchors, predictor)[step - anchors[-1] - 1]
    return math.sqrt(total)


class Programme:
    """The key steps with the least sum of segment costs, exactly, for every number of them.

    segment: for the last `anchors` key steps (fewer at the start), the cost of all steps between the newest of them and
    each possible following key step, cumulative: 0 for the next step, and so on to the last. max_gap: steps between two
    keys, at most. There are about steps^anchors / anchors! states; a state's costs are asked for once.
    """

    def __init__(
        self,
        steps: int,
        anchors: int,
        segment: Callable[[tuple[int, ...]], Sequence[float]],
        max_gap: int | None = None,
    ):
        self.steps = steps
        self.gap = max_gap or steps
        inner = range(1, steps - 1)
        short = [(0, *s) for size in range(1, anchors) for s in itertools.combinations(inner, size)]
        states = [(0,), *short, *itertools.combinations(inner, anchors)]
        self.states = [s for s in states if all(b - a <= self.gap for a, b in itertools.pairwise(s))]
        index = {state: i for i, state in enumerate(self.states)}
        cost, after = [], []
        for state in self.states:
            newest = state[-1]
            reach = min(steps - 1 - newest, self.gap)
            unreached = [math.inf] * (steps - 1 - newest - reach)
            cost.append([math.inf] * (newest + 1) + list(segment(state)[:reach]) + unreached)
            follow = [index[(*state, k)[-anchors:]] for k in range(newest + 1, min(newest + reach + 1, steps - 1))]
            after.append([0] * (newest + 1) + follow + [0] * (steps - newest - 1 - len(follow)))
        self.cost = torch.tensor(cost, dtype=torch.float64)
        self.after = torch.tensor(after, dtype=torch.int64)
        first = torch.full((len(self.states),), math.inf, dtype=torch.float64)
        first[0] = 0.0
        self.best = [first]  # per number of keys so far: the least cost of every state

    def solve(self, count: int) -> Solution:
        """The best schedule of `count` key steps. Raises ValueError where none keeps to the largest gap."""
        _check(self.steps, count)
        while len(self.best) < count - 1:
            self._grow()
        last = self.steps - 1
        reached = (self.best[count - 2] + self.cost[:, last]).min(0)
        total, at = float(reached.values), int(reached.indices)
        if not math.isfinite(total):
            raise ValueError(f"{count} of {self.steps} steps cannot keep every gap within {self.gap}")
        keys = [last, self.states[at][-1]]
        for used in range(count - 2, 0, -1):
            at = self._before(used, at)
            keys.append(self.states[at][-1])
        return Solution(tuple(reversed(keys)), total)

    def _grow(self) -> None:
        """One key step more."""
        inner = slice(1, self.steps - 1)
        values = self.best[-1][:, None] + self.cost[:, inner]
        grown = torch.full_like(self.best[-1], math.inf)
        grown.scatter_reduce_(0, self.after[:, inner].reshape(-1), values.reshape(-1), "amin")
        self.best.append(grown)

    def _before(self, used: int, state: int) -> int:
        """The state from which `state` was reached with its `used` + 1st key."""
        newest = self.states[state][-1]
        values = self.best[used - 1] + self.cost[:, newest]
        values[self.after[:, newest] != state] = math.inf
        return int(values.argmin())


def programme_of_cachequant(statistics: TrajectoryStatistics) -> Programme:
    """CacheQuant's dynamic programme (CVPR 2025, arXiv 2503.01323): least total L1 distance to the key step before.

    Its segments may be of any length (the paper bounds them by half and twice the mean); the last step is a key.
    """

    def costs(state: tuple[int, ...]) -> list[float]:
        start = state[-1]
        return [0.0, *itertools.accumulate(statistics.distance[start, start + 1 : -1].tolist())]

    return Programme(statistics.steps, 1, costs)


def programme_of_forecasts(
    statistics: TrajectoryStatistics, predictor: Predictor, weights: Sequence[float] | None, max_gap: int | None = None
) -> Programme:
    """The key steps with the least weighted squared forecast error, exactly, by a programme over the last anchors.

    Its costs are squared errors. `solve` raises ValueError where no schedule keeps to max_gap.
    """

    def costs(state: tuple[int, ...]) -> list[float]:
        errors = statistics.forecast_errors(state, predictor)[:-1]
        if weights is not None:
            errors = [e * w for e, w in zip(errors, weights[state[-1] + 1 :], strict=False)]
        return [0.0, *itertools.accumulate(errors)]

    return Programme(statistics.steps, predictor.anchors, costs, max_gap)


# -- thresholds ------------------------------------------------------------------------------------------------------


def drift_walk(
    statistics: TrajectoryStatistics, predictor: Predictor, budget: float, weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Greedy: fill while the forecast's RMS error, times the root of the step's weight, stays within `budget`."""
    keys: list[int] = [0]
    errors = statistics.forecast_errors(keys, predictor)
    for step in range(1, statistics.steps - 1):
        weight = 1.0 if weights is None else weights[step]
        if math.sqrt(weight * errors[step - keys[-1] - 1]) > budget:
            keys.append(step)
            errors = statistics.forecast_errors(keys[-predictor.anchors :], predictor)
    return (*keys, statistics.steps - 1)


def ertacache_walk(statistics: TrajectoryStatistics, threshold: float) -> tuple[int, ...]:
    """ERTACache's offline policy (ICLR 2026, arXiv 2508.21091): reuse while the relative L1 distance to the last
    computed step is below `threshold`."""
    keys = [0]
    for step in range(1, statistics.steps - 1):
        if statistics.distance[keys[-1], step] >= threshold * statistics.size[step]:
            keys.append(step)
    return (*keys, statistics.steps - 1)


def step_coefficients(statistics: TrajectoryStatistics, keys: Sequence[int]) -> tuple[float, ...]:
    """ERTACache's factor of each step's length: 1 where it is computed, clip(1 - |v~ - v|_1 / |v|_1, 0, 1) where it is
    reused. Sources disagree on the denominator; with the change of v in its place samples were destroyed."""
    factors, newest = [], 0
    for step in range(statistics.steps):
        newest = step if step in set(keys) else newest
        ratio = float(statistics.distance[newest, step] / statistics.size[step].clamp_min(1e-30))
        factors.append(min(1.0, max(0.0, 1.0 - ratio)))
    return tuple(factors)


def adjusted_sigmas(sigmas: Sequence[float], factors: Sequence[float]) -> tuple[float, ...]:
    """A schedule whose steps are multiplied by `factors`, the rest of the way spread over the steps that follow.

    n + 1 values for n factors, from the same first to the same last value.
    """
    adjusted = [float(sigmas[0])]
    end = float(sigmas[-1])
    for i, factor in enumerate(factors[:-1]):
        left = (sigmas[i] - sigmas[i + 1]) / (sigmas[i] - end) if sigmas[i] > end else 0.0
        adjusted.append(adjusted[-1] - factor * (adjusted[-1] - end) * left)
    return (*adjusted, end)


def magnitude_ratios(statistics: TrajectoryStatistics) -> tuple[float, ...]:
    """MagCache's table (arXiv 2506.09045), of whole snapshots: |q_i| / |q_(i-1)| in L2, 1 for the first."""
    size = statistics.gram.diagonal().clamp_min(1e-60).sqrt()
    return (1.0, *(size[1:] / size[:-1]).tolist())


def walk(schedule: Schedule, steps: int) -> tuple[int, ...]:
    """The key steps of a schedule that needs to see nothing but the time."""
    trace, keys = Trace(steps, [0.0], 1), [0]
    for step in range(1, steps - 1):
        if not schedule.skip(trace, float(step), 0):
            keys.append(step)
            trace.times = [float(step)]
    return (*keys, steps - 1)


def by_threshold(walked: Callable[[float], tuple[int, ...]], count: int) -> tuple[int, ...] | None:
    """The key steps of the threshold that gives `count` of them, by bisection; None where no threshold does."""
    low, high = 1e-9, 1e6
    for _ in range(80):
        middle = math.sqrt(low * high)
        keys = walked(middle)
        if len(keys) == count:
            return keys
        low, high = (middle, high) if len(keys) > count else (low, middle)
    return None


def _check(steps: int, count: int) -> None:
    if not (2 <= count <= steps or (count == steps == 1)):
        raise ValueError(f"{count} computed steps of {steps}: it must be 2 (the first and the last) to all of them")
