"""Schedules solved from the statistics of a full run: which steps to compute for a given number of them.

All functions take the statistics and a number of steps, give sorted key steps that begin with 0 and end with the last
step, and are deterministic. `candidates` runs them all and predicts what each leaves in the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import stdev

import torch
from torch import Tensor

from .predictors import Predictor
from .schedules import Magnitude, Schedule, Trace
from .statistics import Statistics, weights_at

# How errors in a run add up. A disturbance grows by the measured ratio times STRETCH, because what is carried on turns
# into the directions that grow most, and errors point the same way over about MEMORY steps. Of the values tried, 1 to
# 1.8 and 0 to endless, these put random and solved schedules in the order they really have on both trained models with
# two schedulers each (rank correlation 0.91), and predict their errors within 2 dB (`docs/frontier.md`).
STRETCH, MEMORY = 1.3, 16.0

# With one run a schedule has to be so much nearer to be taken before one that is expected to be better.
ONE_RUN_DB = 1.0

# How far the search for coherent schedules moves one key step at a time.
REACH = 3


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
        total, at = (self.best[count - 2] + self.cost[:, last]).min(0)
        if not math.isfinite(total):
            raise ValueError(f"{count} of {self.steps} steps cannot keep every gap within {self.gap}")
        keys = [last, self.states[at][-1]]
        for used in range(count - 2, 0, -1):
            at = self._before(used, int(at))
            keys.append(self.states[at][-1])
        return Solution(tuple(reversed(keys)), float(total))

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


def cachequant(statistics: Statistics, count: int) -> Solution:
    """CacheQuant's dynamic programme (CVPR 2025, arXiv 2503.01323): least total L1 distance to the key step before.

    Its segments may be of any length (the paper bounds them by half and twice the mean); the last step is a key.
    """
    return _cachequant(statistics).solve(count)


def _cachequant(statistics: Statistics) -> Programme:
    def costs(state: tuple[int, ...]) -> list[float]:
        start = state[-1]
        return [0.0, *itertools.accumulate(statistics.distance[start, start + 1 : -1].tolist())]

    return Programme(statistics.steps, 1, costs)


def forecast_aware(
    statistics: Statistics,
    count: int,
    predictor: Predictor,
    weights: Sequence[float] | None = None,
    max_gap: int | None = None,
) -> Solution:
    """The key steps with the least weighted squared forecast error, exactly, by a programme over the last anchors.

    Raises ValueError where no schedule keeps to max_gap.
    """
    solution = _forecast_aware(statistics, predictor, weights, max_gap).solve(count)
    return Solution(solution.keys, math.sqrt(solution.error))


def _forecast_aware(
    statistics: Statistics, predictor: Predictor, weights: Sequence[float] | None, max_gap: int | None = None
) -> Programme:
    def costs(state: tuple[int, ...]) -> list[float]:
        errors = statistics.forecast_errors(state, predictor)[:-1]
        if weights is not None:
            errors = [e * w for e, w in zip(errors, weights[state[-1] + 1 :], strict=False)]
        return [0.0, *itertools.accumulate(errors)]

    return Programme(statistics.steps, predictor.anchors, costs, max_gap)


def brute_force(
    statistics: Statistics, count: int, predictor: Predictor, weights: Sequence[float] | None = None
) -> Solution:
    """The same by trying every subset: the reference for tests, for at most a dozen steps."""
    n = statistics.steps
    _check(n, count)
    tried = ((0, *keys, n - 1) for keys in itertools.combinations(range(1, n - 1), count - 2))
    return min(
        (Solution(keys, predicted_error(statistics, keys, predictor, weights)) for keys in tried),
        key=lambda s: s.error,
    )


# -- thresholds ------------------------------------------------------------------------------------------------------


def drift_walk(
    statistics: Statistics, predictor: Predictor, budget: float, weights: Sequence[float] | None = None
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


def ertacache_walk(statistics: Statistics, threshold: float) -> tuple[int, ...]:
    """ERTACache's offline policy (ICLR 2026, arXiv 2508.21091): reuse while the relative L1 distance to the last
    computed step is below `threshold`."""
    keys = [0]
    for step in range(1, statistics.steps - 1):
        if statistics.distance[keys[-1], step] >= threshold * statistics.size[step]:
            keys.append(step)
    return (*keys, statistics.steps - 1)


def step_coefficients(statistics: Statistics, keys: Sequence[int]) -> tuple[float, ...]:
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


def magnitude_ratios(statistics: Statistics) -> tuple[float, ...]:
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


# -- what an error does ----------------------------------------------------------------------------------------------


def gaussian_jacobians(sigmas: Sequence[float], variance: float, flow: bool) -> tuple[float, ...]:
    """Jacobian of the denoiser of Gaussian data at each of the n + 1 sigmas but the last."""

    def jacobian(s: float) -> float:
        if flow:
            return (1 - s) * variance / ((1 - s) ** 2 * variance + s * s)
        return variance / (variance + s * s)

    return tuple(jacobian(s) for s in sigmas[:-1])


def error_effects(sigmas: Sequence[float], jacobians: Sequence[float]) -> tuple[float, ...]:
    """What a unit error in the slope at each step leaves in the result; n values for n + 1 sigmas and n Jacobians.

    First-order propagation through an Euler run, delta_{i+1} = (r + (1 - r) J) delta_i + h e_i with r the ratio of the
    sigmas and J the Jacobian of the denoiser, as a number.
    """
    steps = len(sigmas) - 1
    effects, carried = [0.0] * steps, 1.0
    for i in range(steps - 1, -1, -1):
        effects[i] = carried * (sigmas[i + 1] - sigmas[i])
        ratio = sigmas[i + 1] / sigmas[i] if sigmas[i] else 0.0
        carried *= ratio + (1 - ratio) * jacobians[i]
    return tuple(effects)


def interpolated(measured: dict[int, float], steps: int) -> tuple[float, ...]:
    """Values at some steps carried over to all `steps`: linear between them, the nearest beyond them."""
    places = sorted(measured)
    values = []
    for step in range(steps):
        after = next((p for p in places if p >= step), places[-1])
        before = next((p for p in reversed(places) if p <= step), places[0])
        part = (step - before) / (after - before) if after > before else 0.0
        values.append(measured[before] + part * (measured[after] - measured[before]))
    return tuple(values)


@dataclass(frozen=True)
class Candidate:
    """A schedule, the method that found it, the error it is expected to leave in the result (RMS, in units of the
    latent) and the mean relative RMS error of its filled steps."""

    keys: tuple[int, ...]
    schedule: str
    error: float
    drift: float


SCHEDULES = ("even", "CacheQuant", "forecast-aware", "weighted", "coherent", "drift budget", "ERTACache", "MagCache")


@dataclass
class Search:
    """All schedules for one calibrated run. growth: per step, how much larger a disturbance of the latent is in the
    denoised prediction, as measured."""

    statistics: Statistics
    predictor: Predictor
    sigmas: Sequence[float]
    growth: Sequence[float]
    _programmes: dict[str, Programme] = field(default_factory=dict)
    _errors: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.statistics.steps
        effects = error_effects(self.sigmas, [STRETCH * g for g in self.growth])
        self._gains = tuple(e * e for e in effects)
        self._effects = torch.tensor(effects, dtype=torch.float64)
        steps = torch.arange(n, dtype=torch.float64)
        self._coherence = torch.exp(-(steps[:, None] - steps).abs() / MEMORY)

    def _forecast_error(self, anchors: tuple[int, ...], step: int) -> Tensor:
        """The forecast's error as weights of the run's snapshots [n]."""
        if (anchors, step) not in self._errors:
            times = self.statistics.times
            row = torch.zeros(self.statistics.steps, dtype=torch.float64)
            weights = weights_at(self.predictor, [times[a] for a in anchors], times[step])
            row[list(anchors)] = torch.tensor(weights, dtype=torch.float64)
            row[step] -= 1.0
            self._errors[anchors, step] = row
        return self._errors[anchors, step]

    def _filled(self, keys: Sequence[int]) -> tuple[list[int], Tensor]:
        """(steps that are filled, Gram matrix of their errors)."""
        computed, anchors = set(keys), ()
        steps, rows = [], []
        for step in range(self.statistics.steps):
            if step in computed:
                anchors = (*anchors, step)[-self.predictor.anchors :]
            else:
                steps.append(step)
                rows.append(self._forecast_error(anchors, step))
        if not steps:
            return steps, torch.zeros(0, 0, dtype=torch.float64)
        table = torch.stack(rows)
        return steps, table @ self.statistics.gram @ table.T

    def result_error(self, keys: Sequence[int]) -> float:
        """RMS error of the result, in units of the latent: errors carried to the end, adding up while they are near in
        time and independent when they are far apart (`MEMORY`)."""
        steps, errors = self._filled(keys)
        effects = self._effects[steps]
        total = (errors * self._coherence[steps][:, steps] * effects * effects[:, None]).sum()
        return math.sqrt(max(0.0, float(total)))

    def drift(self, keys: Sequence[int]) -> float:
        """Mean relative RMS error of the filled steps; 0 where none is."""
        steps, errors = self._filled(keys)
        if not steps:
            return 0.0
        own = self.statistics.gram.diagonal()[steps].clamp_min(1e-60)
        return float((errors.diagonal().clamp_min(0) / own).sqrt().mean())

    def _programme(self, name: str) -> Programme:
        if name not in self._programmes:
            weights = self._gains if name == "weighted" else None
            self._programmes[name] = (
                _cachequant(self.statistics)
                if name == "CacheQuant"
                else _forecast_aware(self.statistics, self.predictor, weights)
            )
        return self._programmes[name]

    def coherent(self, starts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        """The least `result_error` found by moving one key step at a time, from each of the starts."""
        best: tuple[float, tuple[int, ...]] | None = None
        for keys in dict.fromkeys(starts):
            value = self.result_error(keys)
            moved = True
            while moved:
                moved = False
                for key in keys[1:-1]:
                    free = (k for k in range(key - REACH, key + REACH + 1) if 0 < k < keys[-1] and k not in keys)
                    for other in free:
                        tried = tuple(sorted((set(keys) - {key}) | {other}))
                        error = self.result_error(tried)
                        if error < value * (1 - 1e-9):
                            keys, value, moved = tried, error, True
                            break
                    if moved:
                        break
            if best is None or value < best[0]:
                best = value, keys
        return best[1]

    def keys(self, schedule: str, count: int) -> tuple[int, ...] | None:
        """The key steps of one method, `count` of them; None where the method has no such schedule."""
        statistics, n = self.statistics, self.statistics.steps
        if schedule == "even":
            return uniform(n, count)
        if schedule in ("CacheQuant", "forecast-aware", "weighted"):
            return self._programme(schedule).solve(count).keys
        if schedule == "coherent":
            return self.coherent(self.keys(s, count) for s in ("even", "CacheQuant", "forecast-aware", "weighted"))
        if schedule == "drift budget":
            return by_threshold(lambda b: drift_walk(statistics, self.predictor, b, self._gains), count)
        if schedule == "ERTACache":
            return by_threshold(lambda t: ertacache_walk(statistics, t), count)
        if schedule == "MagCache":
            ratios = magnitude_ratios(statistics)
            return by_threshold(lambda t: walk(Magnitude(t, ratios, 0.0, n), n), count)
        raise ValueError(f"there is no schedule '{schedule}'; choose one of {', '.join(SCHEDULES)}")

    def candidate(self, schedule: str, keys: tuple[int, ...]) -> Candidate:
        return Candidate(keys, schedule, self.result_error(keys), self.drift(keys))

    def candidates(self, count: int, schedules: Sequence[str] = SCHEDULES) -> list[Candidate]:
        """The schedules of all methods, the one expected to be best first; equal ones stand once."""
        found: dict[tuple[int, ...], Candidate] = {}
        for schedule in schedules:
            keys = self.keys(schedule, count)
            if keys is not None and keys not in found:
                found[keys] = self.candidate(schedule, keys)
        return sorted(found.values(), key=lambda c: (c.error, c.keys))


def evident(scores: Sequence[Sequence[float]]) -> int:
    """Which of several schedules to take, given the PSNR of each on the same runs, the one expected to be best first.

    A later one has to be better than the best so far by more than the standard error of their difference, and by
    `ONE_RUN_DB` where there is one run only: what is less says more about the runs than about the schedules.
    """
    best = 0
    for i in range(1, len(scores)):
        gains = [a - b for a, b in zip(scores[i], scores[best], strict=True)]
        doubt = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else ONE_RUN_DB
        if sum(gains) / len(gains) > doubt:
            best = i
    return best


def _check(steps: int, count: int) -> None:
    if not (2 <= count <= steps or (count == steps == 1)):
        raise ValueError(f"{count} computed steps of {steps}: it must be 2 (the first and the last) to all of them")
