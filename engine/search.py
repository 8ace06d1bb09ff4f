"""Schedules solved from the statistics of one full run: which steps to compute for a given number of evaluations.

A forecast is a weighted sum of snapshots, so its squared error is a quadratic form of the Gram matrix of the run's
snapshots: with w~ = (1 at the true step, -w at the anchors), error = w~^T G w~. Every cost below needs n x n numbers.

All functions take the statistics and the number of computed steps, give sorted key steps that begin with 0 and end
with the last step, and are deterministic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .predictors import Predictor
from .statistics import Statistics


@dataclass(frozen=True)
class Solution:
    """Key steps and what they are expected to leave: the root of the weighted sum of squared forecast errors."""

    keys: tuple[int, ...]
    error: float


def uniform(steps: int, count: int) -> tuple[int, ...]:
    """`count` key steps at even distances, the first and the last among them."""
    _check(steps, count)
    if count == 1:
        return (0,)
    return tuple(sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)}))


def predicted_error(
    statistics: Statistics, keys: Sequence[int], predictor: Predictor, weights: Sequence[float] | None = None
) -> float:
    """Root of the weighted sum of squared forecast errors over the steps that are not computed.

    weights: what an error at each step does to the result (squared errors are multiplied by them); None: 1 each.
    """
    total, anchors = 0.0, []
    computed = set(keys)
    for step in range(statistics.steps):
        if step in computed:
            anchors = [*anchors, step][-predictor.anchors :]
        else:
            weight = 1.0 if weights is None else weights[step]
            total += weight * statistics.forecast_errors(anchors, predictor)[step - anchors[-1] - 1]
    return math.sqrt(total)


def cachequant(statistics: Statistics, count: int) -> Solution:
    """CacheQuant's dynamic programme (CVPR 2025, arXiv 2503.01323): least total L1 distance to the key step before.

    Its segments may be of any length (the paper bounds them by half and twice the mean); the last step is a key.
    """

    def cost(start: int, end: int) -> float:
        return float(statistics.distance[start, start + 1 : end].sum())

    return _solve_pairs(statistics.steps, count, lambda a, b: (cost(a, b),))


def forecast_aware(
    statistics: Statistics,
    count: int,
    predictor: Predictor,
    weights: Sequence[float] | None = None,
    max_gap: int | None = None,
) -> Solution:
    """The key steps with the least weighted squared forecast error, exactly, by a programme over the last anchors.

    max_gap: steps between two keys, at most. The state is as many keys as the predictor has anchors, so the cost
    grows with steps^(anchors + 1): order 1 solves 50 steps in well under a second, order 2 in a few seconds.
    Raises ValueError where no schedule keeps to max_gap.
    """
    n, anchors = statistics.steps, predictor.anchors
    _check(n, count)
    gap = max_gap or n
    sums: dict[tuple[int, ...], list[float]] = {}

    def segment(state: tuple[int, ...], following: int) -> float:
        if state not in sums:
            errors = statistics.forecast_errors(state, predictor)
            if weights is not None:
                errors = [e * w for e, w in zip(errors, weights[state[-1] + 1 :], strict=True)]
            sums[state] = [0.0, *itertools.accumulate(errors)]
        return sums[state][following - state[-1] - 1]

    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
    for used in range(1, count):
        grown: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        left = count - used - 1  # keys still to come after the next one
        for state, (error, keys) in best.items():
            low, high = state[-1] + 1, min(n - 1 - left, state[-1] + gap)
            choices = range(low, high + 1) if left else ([n - 1] if n - 1 <= state[-1] + gap else [])
            for following in choices:
                value = error + segment(state, following)
                after = (*state, following)[-anchors:]
                if after not in grown or value < grown[after][0]:
                    grown[after] = (value, (*keys, following))
        best = grown
    if not best:
        raise ValueError(f"{count} of {n} steps cannot keep every gap within {gap}")
    error, keys = min(best.values())
    return Solution(keys, math.sqrt(error))


def brute_force(
    statistics: Statistics, count: int, predictor: Predictor, weights: Sequence[float] | None = None
) -> Solution:
    """The same by trying every subset: the reference for tests, for at most a dozen steps."""
    n = statistics.steps
    _check(n, count)
    middle = itertools.combinations(range(1, n - 1), count - 2)
    return min(
        (Solution((0, *keys, n - 1), predicted_error(statistics, (0, *keys, n - 1), predictor, weights))
         for keys in middle),
        key=lambda s: s.error,
    )  # fmt: skip


def error_gains(sigmas: Sequence[float], variance: float, flow: bool) -> tuple[float, ...]:
    """What a unit error in the slope at each step leaves in the result, squared; n values for n + 1 sigmas.

    First-order propagation through an Euler run, delta_{i+1} = (r + (1 - r) J) delta_i + h e_i with r the ratio of the
    sigmas and J the Jacobian of the denoiser, here that of Gaussian data of the given variance.
    """
    steps = len(sigmas) - 1

    def jacobian(s: float) -> float:
        if flow:
            return (1 - s) * variance / ((1 - s) ** 2 * variance + s * s)
        return variance / (variance + s * s)

    gains, carried = [0.0] * steps, 1.0
    for i in range(steps - 1, -1, -1):
        gains[i] = (carried * (sigmas[i] - sigmas[i + 1])) ** 2
        ratio = sigmas[i + 1] / sigmas[i] if sigmas[i] else 0.0
        carried *= ratio + (1 - ratio) * jacobian(sigmas[i])
    return tuple(gains)


def _check(steps: int, count: int) -> None:
    if not (2 <= count <= steps or (count == steps == 1)):
        raise ValueError(f"{count} computed steps of {steps}: it must be 2 (the first and the last) to all of them")


def _solve_pairs(n: int, count: int, cost: Callable[[int, int], tuple[float]]) -> Solution:
    """Dynamic programme for costs that depend on two neighbouring keys only."""
    _check(n, count)
    best = {0: (0.0, (0,))}
    for used in range(1, count):
        left = count - used - 1
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (total, keys) in best.items():
            for end in range(start + 1, n - left) if left else [n - 1]:
                if end <= start:
                    continue
                value = total + cost(start, end)[0]
                if end not in grown or value < grown[end][0]:
                    grown[end] = (value, (*keys, end))
        best = grown
    error, keys = best[n - 1]
    return Solution(keys, error)
