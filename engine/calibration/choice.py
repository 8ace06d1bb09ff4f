"""Which schedule to take: what each is expected to leave in the result, and what sampling them says.

An error in the slope at one step is carried to the end by a first-order model of the run, whose growth is measured; the
errors of a schedule follow from the run's Gram matrix, and add up while they are near in time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import stdev

import torch
from torch import Tensor

from ..forecast.predictors import Predictor
from ..forecast.schedules import Magnitude
from .search import (
    Programme,
    by_threshold,
    drift_walk,
    ertacache_walk,
    magnitude_ratios,
    programme_of_cachequant,
    programme_of_forecasts,
    uniform,
    walk,
)
from .statistics import TrajectoryStatistics, weights_at

# How errors in a run add up. A disturbance grows by the measured ratio times STRETCH, because what is carried on turns
# into the directions that grow most, and errors point the same way over about MEMORY steps. Of the values tried, 1 to
# 1.8 and 0 to endless, these put random and solved schedules in the order they really have on both trained models with
# two schedulers each (rank correlation 0.91), and predict their errors within 2 dB (`docs/frontier.md`).
STRETCH, MEMORY = 1.3, 16.0

# With one run a schedule has to be so much nearer to be taken before one that is expected to be better.
ONE_RUN_DB = 1.0

# How far the search for coherent schedules moves one key step at a time.
REACH = 3


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

    statistics: TrajectoryStatistics
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
        computed, anchors = set(keys), tuple[int, ...]()
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
                programme_of_cachequant(self.statistics)
                if name == "CacheQuant"
                else programme_of_forecasts(self.statistics, self.predictor, weights)
            )
        return self._programmes[name]

    def coherent(self, starts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        """The least `result_error` found by moving one key step at a time, from each of the starts."""
        best = math.inf, tuple[int, ...]()
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
            if not best[1] or value < best[0]:
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
            solved = [self._programme(name).solve(count).keys for name in ("CacheQuant", "forecast-aware", "weighted")]
            return self.coherent([uniform(n, count), *solved])
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
