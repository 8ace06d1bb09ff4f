"""One sampling run: opened when the sampler starts, owns all state, closed in `finally`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..calibration.recorder import Recorder
from ..forecast.schedules import BlockMask, Probe, Trace
from ..metrics import worst_relative_l1
from ..sites.calls import Keys, Parts
from ..sites.levels import EACH, MODEL_OUTPUT, STACK
from . import account, decide
from .block_residuals import BlockResiduals
from .conditions import active_conditioning
from .drift import Input, learn, measured
from .evaluation import COMPUTED, FORECAST, REUSED, Evaluation, Open
from .given import Given, Memory
from .streams import NoRoom, Streams


class Run:
    """All state of one sampling run. Nothing of it outlives `close`, but the report.

    note: why nothing is skipped, empty where it may be; level: where the network is met, None until the model output
    is found; recorder: of a calibration that watches; tell: called with the run and each evaluation that has ended.
    """

    def __init__(
        self,
        given: Given,
        memory: Memory,
        recorder: Recorder | None = None,
        tell: Callable[[Run, Evaluation], None] | None = None,
    ):
        self.given = given
        self.plan, self.clock, self.sampler, self.recipe = given.plan, given.clock, given.sampler, given.recipe
        self.recorder, self.precision = recorder, given.precision
        self.note = decide.why_nothing(given)
        self.level: str | None = None if self.recipe.level == MODEL_OUTPUT else self.recipe.level
        self.form: type | None = None  # list or tuple where the model returns several tensors
        self.inner: Any = None  # the block or U-Net site, where the plan asks for one
        self.compensator: Any = None
        self.trace = Trace(self.clock.steps)
        self.streams = Streams(given, memory)
        self.evaluations: list[Evaluation] = []
        self.open: Open | None = None
        self.peak_bytes = 0
        self.started = time.perf_counter()
        self._tell = tell
        self._input = Input()
        self._active: dict[int, tuple] = {}
        self._blocks: BlockResiduals | None = None
        if isinstance(given.schedule, BlockMask):
            self._blocks = BlockResiduals(given.schedule, self.streams, self._opened, self.refuse)

    # -- what sites and nodes ask --------------------------------------------------------------------------------

    @property
    def probe(self) -> Probe | None:
        return self.given.probe

    @property
    def several(self) -> bool:
        """Whether the sampler evaluates more than once a step."""
        return self.sampler.evaluations > 1

    @property
    def blocks(self) -> BlockResiduals:
        """The residuals of single blocks, where those are what is skipped."""
        assert self._blocks is not None
        return self._blocks

    @property
    def steady(self) -> bool:
        """Whether every evaluation computes the same and leaves nothing behind: no fill, no anchor, no recorder."""
        return bool(self.note) and self.compensator is None and self.recorder is None

    @property
    def needs_input(self) -> bool:
        """Whether `begin` has to be given the network's input."""
        recorded = self.recorder is not None and self.recorder.moments
        return recorded or (self.given.schedule is not None and self.given.schedule.needs_input_change)

    def refuse(self, why: str) -> None:
        """From now on everything is computed, and the node says why."""
        self.note = f"nothing more is skipped: {why}"
        if self.open is not None:
            self.open.now.compute(self.note)
        self._forget()

    def _forget(self) -> None:
        self.streams.forget()
        if self._blocks is not None:
            self._blocks.forget()

    def _opened(self) -> Open:
        assert self.open is not None
        return self.open

    # -- one evaluation ------------------------------------------------------------------------------------------

    def begin(self, sigma: float, x: Tensor | None = None) -> None:
        """Open the evaluation at sigma and decide whether it may be filled. x: what the network will see, [B, ...]."""
        if not self.evaluations:
            self.started = time.perf_counter()  # loading the model is not the sampler's time
        u = self.clock.u(sigma) if self.clock.decreasing else float(len(self.evaluations))
        if x is not None:
            self.trace.moved += self._input.take(x)
        fill, reason = False, self.note
        if not self.note:
            fill, reason = decide.decide(self.given, self.trace, self.evaluations, u, sigma)
        self.open = Open(Evaluation(len(self.evaluations), u, sigma, fill, reason))

    def conditioning(self, conds: list, sigma: float) -> None:
        """Told before the conds of this evaluation run: a change of what is active makes every forecast void."""
        if self.open is None:
            return
        active = active_conditioning(conds, sigma)
        batch, self.open.batches = self.open.batches, self.open.batches + 1
        if self._active.setdefault(batch, active) != active:
            self._active[batch] = active
            if self.compensator is not None:
                self.compensator.forget()
            self.trace = Trace(self.clock.steps)
            self._forget()
            if not self.open.orders and not self.open.reused:
                self.open.now.compute("the active conditioning changed")

    def abandon(self) -> None:
        """Drop the open evaluation: the host raised in the middle of it."""
        self.open = None

    def end(self) -> None:
        """Close the evaluation: one look at the measured numbers, one event."""
        opened, self.open = self._opened(), None
        now = opened.now
        now.seconds = time.perf_counter() - opened.began
        if opened.filled:
            now.order = max(opened.orders, default=0)
            now.share = opened.ran / (opened.ran + opened.reused) if opened.reused else 0.0
            now.action = FORECAST if now.order else REUSED
        else:
            now.fill, now.action = False, COMPUTED
            self._learn(opened)
            if not opened.kept and not self.note:
                what = STACK if self.level == EACH else self.level or "model"
                self.refuse(f"the {what} was not reached; another pack may have replaced it")
        self.peak_bytes = max(self.peak_bytes, self.streams.nbytes)
        self.evaluations.append(now)
        if self._tell is not None:
            self._tell(self, now)

    def _learn(self, opened: Open) -> None:
        if opened.reshaped:
            self.trace = Trace(self.clock.steps)
        moved = self._input.since_computed() if opened.changes else None
        learn(self.trace, opened, self.evaluations, moved, self.given.predictor.anchors)
        self._input.computed()

    # -- one call of the model within an evaluation --------------------------------------------------------------

    def keys(self, options: dict, x: Tensor) -> Keys | None:
        """The streams in one model call on x, in batch order; None where the call is not part of an evaluation."""
        return None if self.open is None else self.streams.keys(self.open, options, x)

    def fill(self, keys: Keys, probes: list[Parts] | None = None) -> list[Parts] | None:
        """The forecasts for these streams, or None where this call has to be computed.

        probes: what the schedule's gate or the per-token choice looks at, one per key, in the network's dtype. Each
        forecast has the shapes and dtypes of what `keep` was given for its key, and is the caller's own.
        """
        opened, schedule = self._opened(), self.given.schedule
        if schedule is not None and schedule.probe is not None:
            decide.gate(self.given, self.trace, self.streams, opened, keys, probes)
        histories = self.streams.stored(keys)
        if not opened.fills or histories is None:
            return None
        filled = []
        for i, (key, history) in enumerate(zip(keys, histories, strict=True)):
            probe = probes[i] if probes is not None else None
            parts, order = self.streams.forecast(key, history, opened.now.u, probe)
            filled.append(parts)
            opened.orders.append(order)
        return filled

    def keep(
        self,
        keys: Keys,
        chunks: list[Parts],
        probes: list[Parts] | None = None,
        base: list[Parts] | None = None,
        owned: bool = False,
    ) -> None:
        """Measure the drift of the forecasts these outputs would have replaced, then store them.

        chunks: the tensors of each key, any shape and dtype, copied unless owned, that is handed over; probes: stored
        beside them; base: what a residual is added to, so that its drift is relative to the sum.
        """
        opened, schedule = self._opened(), self.given.schedule
        now = opened.now
        now.action = COMPUTED
        opened.kept = True
        if self.recorder is not None:
            with self.streams.lock:
                for key, parts in zip(keys, chunks, strict=True):
                    self.recorder.push(now.u, key, parts, self._input.newest)
        if schedule is None or self.note:
            return
        dim = self.recipe.batch_dim
        with self.streams.lock:
            for i, (key, parts) in enumerate(zip(keys, chunks, strict=True)):
                probe = None if probes is None else probes[i]
                try:
                    history = self.streams.opened(key, parts, probe)
                except NoRoom as error:
                    self.refuse(str(error))
                    return
                if len(history) and [t.shape for t in history.newest] != [t.shape for t in parts]:
                    history.clear()  # a pack that resizes features in a part of the steps (Deep Shrink) came or went
                    opened.reshaped = True
                if len(history):
                    whole = None if base is None else base[i]
                    opened.drifts.append(measured(history, self.given.predictor, now.u, parts, whole, dim))
                    if schedule.needs_input_change:
                        opened.changes.append(worst_relative_l1(history.newest, parts, dim))
                history.push(now.u, parts, owned)
                if probe is not None:
                    self.streams.push_probe(now.u, key, probe, owned)

    # -- looking ahead -------------------------------------------------------------------------------------------

    def grid_step(self) -> int | None:
        """The step this evaluation is at; None between the steps."""
        return decide.grid_step(self._opened().now.u)

    def certain_fills(self, step: int) -> list[int]:
        """The steps right after `step` that will be filled whatever happens until then."""
        return [] if self.note else decide.certain_fills(self.given, self.trace, self.evaluations, step)

    def forecast_at(self, keys: Keys, u: float) -> list[Parts] | None:
        """The forecasts for another time than now, where this evaluation may be filled; None where it may not."""
        histories = self.streams.stored(keys)
        if not self._opened().now.fill or histories is None:
            return None
        return [history.forecast(u, self.given.predictor)[0] for history in histories]

    def mark_filled(self, keys: Keys) -> bool:
        """Count these streams as filled by an output that was made in advance; False where they must be computed."""
        opened, histories = self._opened(), self.streams.stored(keys)
        if not opened.fills or histories is None:
            return False
        opened.orders += self.streams.orders(histories, opened.now.u)
        return True

    def timestep(self, step: int) -> float:
        """What the network is told as its time at a step of the schedule."""
        return self.given.timestep_of(self.clock.sigmas[step])

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free every tensor."""
        self._forget()
        if self.compensator is not None:
            self.compensator.close()
        self._input.close()
        self.open = self.inner = self.recorder = self._blocks = None

    def report(self) -> dict:
        """Numbers of the run so far, plain JSON data."""
        return account.report(self)
