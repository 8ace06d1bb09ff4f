"""One evaluation of a run: what is kept of it, and what is known while it is open."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

# Reasons that others look for; further ones are sentences that are only shown.
FIRST = "first evaluations"
LAST = "last step"
SCHEDULE = "schedule"

COMPUTED, FORECAST, REUSED = "computed", "forecast", "reused"


@dataclass(slots=True)
class Evaluation:
    """One (sigma, x) pair that the sampler asks for, and what became of it.

    action: computed, forecast or reused; share: of the network's work that was done, 1 where it was computed, 0 where
    it was filled, and between where some of its blocks ran; drift: measured where computed, and there avoided, else
    estimated from the next measurement; anchor: the reference was asked too; correction: its size relative to the
    slope's, where there was one.
    """

    index: int
    u: float
    sigma: float
    fill: bool
    reason: str
    action: str = ""
    order: int = 0
    drift: float | None = None
    seconds: float = 0.0
    share: float = 1.0
    anchor: bool = False
    correction: float | None = None

    def compute(self, reason: str) -> None:
        """Let it be computed after all."""
        self.fill, self.reason = False, reason


@dataclass(slots=True)
class Open:
    """The evaluation that is open: made in `begin`, dropped in `end`.

    seen: how many calls of each kind there were; batches: lists of conds; drifts: (relative L1, order, span) of each
    stream that was computed; changes: relative L1 of each against its newest snapshot; orders: of each forecast; ran,
    reused: blocks; kept: something was computed; gated: the probe was asked; reshaped: a stream came in another shape.
    """

    now: Evaluation
    began: float = field(default_factory=time.perf_counter)
    seen: Counter = field(default_factory=Counter)
    batches: int = 0
    drifts: list[tuple[Tensor, int, float]] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)
    ran: int = 0
    reused: int = 0
    kept: bool = False
    gated: bool = False
    reshaped: bool = False

    @property
    def fills(self) -> bool:
        """Whether a call of the network may be filled now: so it was decided, and none was computed yet."""
        return self.now.fill and self.now.action != COMPUTED

    @property
    def filled(self) -> bool:
        """Whether something was filled, and nothing whole computed."""
        return (bool(self.orders) or self.reused > 0) and self.now.action != COMPUTED
