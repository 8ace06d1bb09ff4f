"""When an evaluation is computed and when it is filled: a schedule is a function of what a run has seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
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

    times: u of the computed evaluations whose snapshots are still held, oldest first; computed: how many there have
    been, at different times; steps: length of the schedule.
    `moved` sums the mean |x_i - x_{i-1}| of the network's input since the last computed evaluation, worst row; `rate`
    is the relative L1 change of the output per unit of that movement, between the last two computed evaluations.
    `accumulated` belongs to the schedules that add up a probe's change; it is 0 after a computed evaluation.
    """

    steps: int
    times: list[float] = field(default_factory=list)
    computed: int = 0
    drifts: list[Drift] = field(default_factory=list)
    moved: float = 0.0
    rate: float | None = None
    accumulated: float = 0.0


def span(times: Sequence[float], u: float, order: int) -> float:
    """Product of |u - t| over the newest order + 1 times: the factor of u in the interpolation error."""
    return math.prod(abs(u - t) for t in times[len(times) - order - 1 :])


class Probe(Enum):
    """What a gated schedule looks at, taken at the first block: a run hands its relative L1 change to `accept`."""

    RESIDUAL = "residual of the first block, against the last computed one"
    FORECAST = "output of the first block, against its own forecast"
    MODULATED = "modulated input of the first block, against the previous evaluation's"
    EMBEDDING = "time modulation of the first block, against the previous evaluation's"


class Schedule(Protocol):
    """`skip` says whether the evaluation at u may be filled by a forecast of this order.

    needs_input_change: the run tracks how far the network's input moves. spaced: the schedule chooses its own gaps,
    however long. certain: its answer depends on the times alone, so it is known before the evaluation comes. trusted:
    it was solved for this very predictor, or forecasts nothing, so no warm-up is added to it. probe: what has to be
    looked at before the decision stands, None: nothing; order: of the forecast that a probe is held against.
    """

    @property
    def needs_input_change(self) -> bool: ...

    @property
    def spaced(self) -> bool: ...

    @property
    def certain(self) -> bool: ...

    @property
    def trusted(self) -> bool: ...

    @property
    def probe(self) -> Probe | None: ...

    @property
    def order(self) -> int: ...

    def skip(self, trace: Trace, u: float, order: int) -> bool: ...

    def accept(self, trace: Trace, change: float) -> bool:
        """Whether a fill stands, given the relative L1 change of the probe."""


class Usual:
    """What most schedules answer."""

    __slots__ = ()
    needs_input_change: bool = False
    spaced: bool = False
    certain: bool = False
    trusted: bool = False
    probe: Probe | None = None
    order: int = 0

    def accept(self, trace: Trace, change: float) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Interval(Usual):
    """Compute when `every` steps have passed since the last computed evaluation (TaylorSeer, FORA, DeepCache).

    Counted in u, so a sampler that evaluates twice in a step keeps the same spacing.
    """

    every: float
    spaced = True
    certain = True

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return u - trace.times[-1] < self.every - SAME_TIME


@dataclass(frozen=True, slots=True)
class AccumulatedChange(Usual):
    """Compute when the output is expected to have changed by `threshold` since the last computed evaluation.

    The expected change is rate * movement of the input, summed over the evaluations since then (EasyCache,
    arXiv 2507.02860, with the previous evaluation's input, as its authors' code has it). Unit: relative L1.
    """

    threshold: float
    needs_input_change = True

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return trace.rate is not None and trace.rate * trace.moved < self.threshold


@dataclass(frozen=True, slots=True)
class DriftBudget(Usual):
    """Fill while the expected drift of the forecast stays within `budget` (relative L1).

    A polynomial forecast errs by c * span(u), with c the next derivative. c is taken from the measured drifts, the
    larger of the newest two of this order; the next span follows from the snapshot times. Nothing measured: compute.
    weights: what an error at each step does to the picture, relative to the mean step; empty: the same at all steps.
    """

    budget: float
    weights: tuple[float, ...] = ()

    def expected(self, trace: Trace, u: float, order: int) -> float:
        """Expected drift of a forecast for u; infinite where nothing comparable was measured."""
        seen = [d for d in trace.drifts if d.order == order and d.span > 0][-2:]
        if not seen:
            return math.inf
        worst = max(d.error / d.span for d in seen)
        return worst * span(trace.times, u, order)

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        weight = self.weights[min(max(int(u), 0), len(self.weights) - 1)] if self.weights else 1.0
        return weight * self.expected(trace, u, order) <= self.budget


@dataclass(frozen=True, slots=True)
class KeySteps(Usual):
    """Compute the listed steps and fill all others: a published list, a grid, a profile.

    keys: step numbers from 0; a sampler that evaluates between the steps computes the first evaluation at or after
    each key. trusted: the list was solved for this very predictor, so no warm-up is added to it.
    """

    keys: tuple[int, ...]
    trusted: bool = False
    spaced = True
    certain = True

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return not any(trace.times[-1] + SAME_TIME < key <= u + SAME_TIME for key in self.keys)


@dataclass(frozen=True, slots=True)
class BlockMask(Usual):
    """Compute at every step the transformer blocks that a table names, and reuse the last computed residual of the
    others (ECAD, arXiv 2506.15682, at whole blocks).

    rows: one per step of the run, with a 1 for every block that is computed. The first and the last step are computed
    in full whatever the table says. An evaluation between two steps belongs to the earlier one. Nothing is forecast, so
    no warm-up is added.
    """

    rows: tuple[tuple[int, ...], ...]
    spaced = True
    trusted = True

    @property
    def blocks(self) -> int:
        return len(self.rows[0])

    @property
    def reused(self) -> int:
        """How many blocks are ever reused: the residuals that may have to be kept at once."""
        return sum(any(not self.computes(step, b) for step in range(len(self.rows))) for b in range(self.blocks))

    def step(self, u: float) -> int:
        """The step an evaluation at u belongs to."""
        return min(max(int(u + SAME_TIME), 0), len(self.rows) - 1)

    def computes(self, step: int, block: int) -> bool:
        """Whether this block runs at this step."""
        return not 0 < step < len(self.rows) - 1 or bool(self.rows[step][block])

    def keeps(self, step: int, block: int) -> bool:
        """Whether the residual that this block computes at this step is reused at the next one."""
        return not self.computes(step + 1, block)

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        """True where at least one block is reused."""
        step = self.step(u)
        return any(not self.computes(step, block) for block in range(self.blocks))


def power_grid(steps: int, every: int, power: float, centre: int) -> tuple[int, ...]:
    """DeepCache's non-uniform key steps (arXiv 2312.00858, released code): dense around `centre`, sparse away from it.

    ceil(steps / every) indices `x^power + centre`, x even in the signed power; the power is lowered by 0.02 until all
    are different. Raises ValueError where that does not succeed above power 1.
    """

    def signed(value: float, exponent: float) -> float:
        return math.copysign(abs(value) ** exponent, value)

    count = math.ceil(steps / every)
    while power > 1.0:
        low, high = signed(-centre, 1 / power), signed(steps - centre, 1 / power)
        grid = [signed(low + (high - low) * i / count, power) + centre for i in range(count)]
        keys = sorted({0, *(int(k) for k in grid[1:])})
        if len(keys) == count:
            return tuple(keys)
        power -= 0.02
    raise ValueError(f"no power grid of {count} different steps in {steps} around {centre}")


def scaled_keys(keys: Sequence[int], length: int, steps: int) -> tuple[int, ...]:
    """Key steps published for `length` steps, carried over to `steps` steps by their place in the schedule."""
    return tuple(sorted({round(key * (steps - 1) / (length - 1)) for key in keys}))


@dataclass(frozen=True, slots=True)
class Magnitude(Usual):
    """MagCache (NeurIPS 2025, arXiv 2506.09045): skip while the residual's magnitude is known to change little.

    ratios: calibrated `|r_i| / |r_{i-1}|` per step, already fitted to the run's step count; the product since the last
    computed step, R, gives the error |1 - R|, summed over the skipped steps. Computes in the first `retention` of the
    steps, when the sum reaches `threshold`, and after `most` fills.
    """

    threshold: float
    ratios: tuple[float, ...]
    retention: float
    most: int
    spaced = True
    certain = True

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        if u < self.retention * trace.steps:
            return False
        ratio, error = 1.0, 0.0
        first, last = int(trace.times[-1] + SAME_TIME) + 1, int(u + SAME_TIME)
        for step in range(first, last + 1):
            ratio *= self.ratios[min(step, len(self.ratios) - 1)]
            error += abs(1.0 - ratio)
        return error < self.threshold and last - first < self.most


def fitted_ratios(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """A MagCache table carried over to another step count: the nearest entry, as its authors do."""
    top = max(steps - 1, 1)
    return tuple(ratios[round(i * (len(ratios) - 1) / top)] for i in range(steps))


@dataclass(frozen=True, slots=True)
class FirstBlockGate(Usual):
    """First-block cache (ParaAttention): fill while the first block's residual stays near the last computed one."""

    threshold: float
    probe = Probe.RESIDUAL

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return True

    def accept(self, trace: Trace, change: float) -> bool:
        return change < self.threshold


@dataclass(frozen=True, slots=True)
class ConfidenceGate(FirstBlockGate):
    """CG-Taylor (arXiv 2508.02240): fill while the first block's own forecast of `order` is near its true output."""

    order: int = 1
    probe = Probe.FORECAST


@dataclass(frozen=True, slots=True)
class ModulatedChange(Usual):
    """TeaCache (CVPR 2025): fill while the rescaled change of the first block's modulated input adds up to little.

    coefficients: the model's published polynomial, highest power first.
    """

    threshold: float
    coefficients: tuple[float, ...]
    probe: Probe = Probe.MODULATED

    def skip(self, trace: Trace, u: float, order: int) -> bool:
        return True

    def accept(self, trace: Trace, change: float) -> bool:
        """Add this evaluation's change, in relative L1 to the previous evaluation; whether a fill still stands."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        trace.accumulated += abs(value)
        return trace.accumulated < self.threshold
