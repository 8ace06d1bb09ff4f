"""Which model works when: the segments that switch nodes put on a MODEL, and the spans of steps they come to in a run.

The list travels on the ModelPatcher as an attachment, so that nodes chained in any order make one list and one switch.
A segment has a runner. `Local` is a model of this process, and neighbours of that kind make one `SwitchedRun`. A runner
elsewhere would take a whole span, never a step: `sample_switched` has the spans and is where they part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from ...engine.coordinates import FLOW, Coordinates, level_in
from ...engine.errors import SlipstreamError
from ..parts import SWITCH, take_off

NODE = "Hybrid Model Switch"

STEPS, SIGMA = "fraction of steps", "sigma"
# Where Wan 2.2's low-noise expert takes over, as a flow's time (`boundary` of its two 14B configurations).
NAMED = {"Wan 2.2 T2V (0.875)": 0.875, "Wan 2.2 I2V (0.9)": 0.9}
UNITS = (STEPS, SIGMA, *NAMED)

A_FIRST, B_FIRST = "a then b", "b then a"
ORDERS = (A_FIRST, B_FIRST)

AUTO, SWAP, KEEP = "auto", "swap", "keep both"
MEMORY = (AUTO, SWAP, KEEP)

# Sigmas that a sampler has sent through other numbers and back are told apart from this relative difference on.
SAME = 1e-6


@dataclass(frozen=True, slots=True)
class SwitchConfig:
    """What the node asks for.

    switch_at: a fraction of the run's steps, or a sigma in the schedule's own numbers; without meaning with a named
    boundary. cfg_b: of model_b, 0 and below takes the sampler's. memory: whether a model that is not in use stays.
    """

    switch_at: float = 0.4
    unit: str = STEPS
    order: str = A_FIRST
    cfg_b: float = 0.0
    memory: str = AUTO
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place in the schedule. A sigma belongs to what comes before it, as Wan's `t >= boundary` does."""

    at: float
    unit: str = STEPS

    def step(self, sigmas: Sequence[float], coordinates: Coordinates) -> int:
        """The first step behind the boundary; the number of steps where there is none."""
        steps = len(sigmas) - 1
        if self.unit == STEPS:
            return math.floor(self.at * steps + 0.5)
        at = level_in(NAMED[self.unit], FLOW, coordinates) if self.unit in NAMED else self.at
        if rising(sigmas):
            behind = [sigma > at * (1 + SAME) for sigma in sigmas]
        else:
            behind = [sigma < at * (1 - SAME) for sigma in sigmas]
        return min(next((i for i, passed in enumerate(behind) if passed), steps), steps)


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """A model of this process. patcher: a clone of its own; None is the model that the sampler was given."""

    patcher: object | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One model's part of a run.

    starts: it begins behind all of these; positive, negative: CONDITIONING, None and cfg 0 take the sampler's.
    """

    runner: Local = Local()
    starts: tuple[Boundary, ...] = ()
    positive: list | None = None
    negative: list | None = None
    cfg: float = 0.0
    memory: str = AUTO
    node_id: str = ""

    @property
    def given(self) -> bool:
        """Whether it means the model that the sampler was given."""
        return isinstance(self.runner, Local) and self.runner.patcher is None

    @property
    def own(self) -> bool:
        """Whether it wants another conditioning or cfg than the sampler's."""
        return self.positive is not None or self.negative is not None or self.cfg > 0


@dataclass(frozen=True, slots=True)
class Span:
    """The steps [first, last) of a run that one segment has."""

    segment: Segment
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class Larger:
    """The largest model of a run, for an evaluation by a smaller one.

    ask: its prediction of the clean latent in the place of the one that is being made; nbytes: of its weights, which
    have to be on the device for that; share: of the smaller one's weights in these; why_not: why it cannot be asked
    here, empty where it can.
    """

    name: str
    nbytes: int
    share: float
    ask: Callable[[], Tensor]
    why_not: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Whose turn it is in a run of several models: the steps [first, last) are this model's."""

    first: int
    last: int
    larger: Larger | None = None


# Of the evaluation that is being made; None in a run of one model.
TURN: ContextVar[Turn | None] = ContextVar("slipstream_turn", default=None)


def rising(sigmas: Sequence[float]) -> bool:
    """Whether the schedule adds noise, as when a picture is turned back into noise."""
    return sigmas[-1] > sigmas[0]


def check(config: SwitchConfig) -> SwitchConfig:
    """The config itself, or SlipstreamError."""
    for name, choices in (("unit", UNITS), ("order", ORDERS), ("memory", MEMORY)):
        value = getattr(config, name)
        if value not in choices:
            raise SlipstreamError(f"{NODE}: there is no {name} '{value}'; choose one of {', '.join(choices)}.")
    if config.unit == STEPS and not 0.0 <= config.switch_at <= 1.0:
        raise SlipstreamError(
            f"{NODE}: switch_at is {config.switch_at}, but as a fraction of the steps it must be between 0 and 1; "
            "try 0.4, or set the unit to sigma."
        )
    if not config.switch_at >= 0.0:
        raise SlipstreamError(f"{NODE}: switch_at is {config.switch_at}, but a noise level is 0 or more; try 0.9.")
    return config


def segments_of(model) -> tuple[Segment, ...]:
    """The segments on a ModelPatcher in the order they were added; itself alone where no switch node was used."""
    return model.get_attachment(SWITCH) or (Segment(),)


def without_switch(model):
    """A clone of the model as it was before any switch node."""
    clone = model.clone()
    take_off(clone, (SWITCH,))
    return clone


def joined(first: Sequence[Segment], second: Sequence[Segment], at: Boundary) -> tuple[Segment, ...]:
    """The list in which `second` takes over behind `at`; what `first` had behind that stays."""
    return (*first, *(dataclasses.replace(s, starts=(*s.starts, at)) for s in second))


def spans(segments: Sequence[Segment], sigmas: Sequence[float], coordinates: Coordinates) -> list[Span]:
    """Which segment has which steps of this schedule. Of several that begin at one step the one added last has it."""
    steps = len(sigmas) - 1
    begins = [max((b.step(sigmas, coordinates) for b in s.starts), default=0) for s in segments]
    order = sorted(range(len(segments)), key=begins.__getitem__)
    found = []
    for i, following in zip(order, [*order[1:], None], strict=True):
        last = steps if following is None else begins[following]
        if begins[i] < min(last, steps):
            found.append(Span(segments[i], begins[i], min(last, steps)))
    return found


def span_at(found: Sequence[Span], sigmas: Sequence[float], sigma: float) -> int:
    """Which span an evaluation at sigma belongs to. By sigma, because samplers also evaluate between the steps."""
    sign = -1.0 if rising(sigmas) else 1.0
    here = 0
    for i, span in enumerate(found[1:], 1):
        if sign * sigma <= sign * sigmas[span.first] + SAME * abs(sigmas[span.first]):
            here = i
    return here
