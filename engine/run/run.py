"""One sampling run: opened when the sampler starts, owns all state, closed in `finally`."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ...host.canvas import events
from ...host.memory import Memory
from ..calibration.profile import Profile
from ..calibration.recorder import Recorder
from ..families import UNKNOWN, Architecture
from ..forecast.history import History, Storage
from ..forecast.predictors import SAME_TIME, Predictor
from ..forecast.schedules import Drift, Interval, KeySteps, Magnitude, Probe, Trace, span
from ..forecast.token_select import candidates, choose, combine
from ..metrics import worst_relative_l1
from ..sites.calls import Parts
from ..sites.stack import EACH, STACK
from .account import Evaluation, report
from .plan import Plan
from .recipe import MAX_SKIP, MODEL_OUTPUT, resolve
from .samplers import Clock, Sampler, active_conditioning

# Distilled models: at 4 steps each one matters; up to 8 one reuse is the most that does no visible harm.
NEVER_SKIP_STEPS = 4
ONE_SKIP_STEPS = 8

StreamKey = tuple


class Run:
    """All state of one sampling run. Nothing of it outlives `close`, but the report.

    A stream is what one conditioning sees of the model: its key holds the cond index, the host's uuid, the context
    window, how many calls of the same kind came before in this evaluation, and the shape, dtype and device.
    """

    def __init__(
        self,
        plan: Plan,
        clock: Clock,
        sampler: Sampler,
        percent_to_sigma: Callable[[float], float],
        label: str = "",
        row: Architecture = UNKNOWN,
        timestep_of: Callable[[float], float] | None = None,
        noise_prediction: bool = False,
        profile: Profile | None = None,
        model: str = "",
        recorder: Recorder | None = None,
        blocks: int = 0,
    ):
        self.plan = plan
        self.clock = clock
        self.sampler = sampler
        # A flow model's schedule already spends its steps where they count; a noise prediction's error is weighted.
        weights = clock.weights() if noise_prediction else ()
        self.recipe = resolve(plan, sampler, row, clock.sigmas, weights, profile, model, blocks)
        self.recorder = recorder
        self.expected_drift = profile.about.get("predicted_drift") if profile is not None else None
        self.cache = self.recipe.cache
        self.percent_to_sigma = percent_to_sigma
        self.timestep_of = timestep_of
        self.sigma_window = tuple(
            float(percent_to_sigma(p)) for p in (self.cache.start_percent, self.cache.end_percent)
        )
        self.label = label
        self.precision = ""  # what the model computes with, in words
        self.predictor = self.recipe.predictor
        self.schedule = self.recipe.schedule
        self.probe = Probe.FORECAST if self.predictor.per_token else None
        if self.schedule is not None and self.schedule.probe is not None:
            self.probe = self.schedule.probe
        self.note = self._why_nothing()
        self.compensator = None
        self.inner = None  # the block or U-Net site, where the plan asks for one
        # The model-output site finds its level at the first computed evaluation; inner sites have theirs.
        self.level: str | None = None if self.recipe.level == MODEL_OUTPUT else self.recipe.level
        self.memory = Memory(self.cache.cache_device, self.cache.memory_budget_mb)
        self.trace = Trace(clock.steps)
        self.streams: dict[StreamKey, History] = {}
        self.probes: dict[StreamKey, History] = {}
        self._places: dict[StreamKey, Storage] = {}  # where the residuals of a stream's blocks lie
        self.evaluations: list[Evaluation] = []
        self.current: Evaluation | None = None
        self.peak_bytes = 0
        self.form: type | None = None  # list or tuple where the model returns several tensors
        self._lock = threading.Lock()
        self._seen: Counter = Counter()
        self._active: dict[int, tuple] = {}
        self._batches = 0
        self._drifts: list[tuple[Tensor, int, float]] = []
        self._changes: list[Tensor] = []
        self._orders: list[int] = []
        self._ran = self._reused = 0  # blocks, over all calls of the evaluation
        self._kept = False
        self._gated = False
        self._reshaped = False
        self._x: Tensor | None = None
        self._x_computed: Tensor | None = None
        self.started = time.perf_counter()

    def _why_nothing(self) -> str:
        """The sentence that says why this run will skip nothing; empty where it may."""
        if self.recipe.refusal:
            return f"nothing is skipped: {self.recipe.refusal}"
        if self.schedule is None:
            return "nothing is skipped: the drift budget is 0"
        if self.sampler.unserved:
            return f"nothing is skipped: {self.sampler.name} cannot be served, {self.sampler.unserved}"
        if not self.clock.decreasing:
            return "nothing is skipped: the sigmas of this run are not a falling schedule"
        if self.clock.steps <= NEVER_SKIP_STEPS:
            return f"nothing is skipped: at {self.clock.steps} steps every one of them counts"
        return ""

    @property
    def steady(self) -> bool:
        """Whether every evaluation computes the same and leaves nothing behind: no fill, no anchor, no recorder."""
        return bool(self.note) and self.compensator is None and self.recorder is None

    def refuse(self, why: str) -> None:
        """From now on everything is computed, and the node says why."""
        self.note = f"nothing more is skipped: {why}"
        if self.current is not None:
            self.current.fill, self.current.reason = False, self.note
        self._forget()

    def _forget(self) -> None:
        """Drop every snapshot and what was planned for them."""
        self.streams.clear()
        self.probes.clear()
        self._places.clear()
        self.memory.planned = 0

    # -- one evaluation ------------------------------------------------------------------------------------------

    @property
    def needs_input(self) -> bool:
        """Whether `begin` has to be given the network's input."""
        recorded = self.recorder is not None and self.recorder.moments
        return recorded or (self.schedule is not None and self.schedule.needs_input_change)

    def begin(self, sigma: float, x: Tensor | None = None) -> None:
        """Open the evaluation at sigma and decide whether it may be filled. x is what the network will see."""
        if not self.evaluations:
            self.started = time.perf_counter()  # loading the model is not the sampler's time
        u = self.clock.u(sigma) if self.clock.decreasing else float(len(self.evaluations))
        if x is not None:
            if self._x is not None and self._x.shape == x.shape:
                self.trace.moved += _movement(x, self._x)
            self._x = x.detach().clone()
        fill, reason = self._decide(u, sigma)
        self.current = Evaluation(len(self.evaluations), u, sigma, fill, reason)
        self._seen.clear()
        self._batches = 0
        self._drifts.clear()
        self._changes.clear()
        self._orders.clear()
        self._ran = self._reused = 0
        self._kept = self._gated = self._reshaped = False
        self._evaluation_started = time.perf_counter()

    def _decide(self, u: float, sigma: float) -> tuple[bool, str]:
        trace, last = self.trace, self.clock.steps - 1
        start, end = self.sigma_window
        if self.note:
            return False, self.note
        if u >= last - SAME_TIME:
            return False, "last step"
        if sigma > start or sigma < end:
            return False, "outside start and end percent"
        trusted = getattr(self.schedule, "trusted", False)
        # One more than the order needs, so that a forecast was measured once.
        if trace.computed < (1 if trusted else self.predictor.needed + 1):
            return False, "first evaluations"
        if not self.schedule.spaced and u - trace.times[-1] > (self.cache.max_skip or MAX_SKIP) + SAME_TIME:
            return False, "max skip"
        if self.clock.steps <= ONE_SKIP_STEPS and any(e.fill for e in self.evaluations):
            return False, f"at {self.clock.steps} steps one is skipped at most"
        order = self.predictor.weights(trace.times, u)[1]
        if order == 0 < self.predictor.order and not trusted:
            return False, "too far ahead for a forecast"
        if not self.schedule.skip(trace, u, order):
            return False, "schedule"
        return True, "within budget"

    def conditioning(self, conds: list, sigma: float) -> None:
        """Told before the conds of this evaluation run: a change of what is active makes every forecast void."""
        if self.current is None:
            return
        active = active_conditioning(conds, sigma)
        batch, self._batches = self._batches, self._batches + 1
        if self._active.setdefault(batch, active) != active:
            self._active[batch] = active
            if self.compensator is not None:
                self.compensator.forget()
            self.trace = Trace(self.clock.steps)
            self._forget()
            if not self._orders and not self._reused:
                self.current.fill, self.current.reason = False, "the active conditioning changed"

    def abandon(self) -> None:
        """Drop the open evaluation: the host raised in the middle of it."""
        self.current = None

    def end(self) -> None:
        """Close the evaluation: one look at the measured numbers, one event."""
        now, self.current = self.current, None
        now.seconds = time.perf_counter() - self._evaluation_started
        filled = (bool(self._orders) or self._reused > 0) and now.action != "computed"
        if filled:
            now.order = max(self._orders, default=0)
            now.share = self._ran / (self._ran + self._reused) if self._reused else 0.0
            now.action = "forecast" if now.order else "reused"
        else:
            now.fill, now.action = False, "computed"
            self._learn(now)
            if not self._kept and not self.note:
                what = STACK if self.level == EACH else self.level or "model"
                self.refuse(f"the {what} was not reached; another pack may have replaced it")
        histories = (*self.streams.values(), *self.probes.values())
        self.peak_bytes = max(self.peak_bytes, sum(h.nbytes for h in histories))
        self.evaluations.append(now)
        events.evaluation(self, now)

    def _learn(self, now: Evaluation) -> None:
        """Take over what a computed evaluation has shown."""
        if self._reshaped:
            self.trace = Trace(self.clock.steps)
        trace = self.trace
        if self._drifts:
            drift = _largest([d for d, _, _ in self._drifts])
            order = min(order for _, order, _ in self._drifts)
            reach = max(reach for _, _, reach in self._drifts)
            if math.isfinite(drift):
                now.drift = drift
                trace.drifts.append(Drift(now.u, drift, order, reach))
                self._estimate_filled(trace.drifts[-1])
            else:
                trace.drifts.clear()
        if self._changes and self._x_computed is not None and self._x is not None:
            moved = _movement(self._x, self._x_computed)
            trace.rate = _largest(self._changes) / moved if moved > 0 else None
        self._x_computed = self._x
        trace.moved = trace.accumulated = 0.0
        kept = [t for t in trace.times if abs(t - now.u) >= SAME_TIME]
        trace.computed += len(kept) == len(trace.times)  # samplers like heun come to one time twice
        trace.times = [*kept, now.u][-self.predictor.anchors :]

    def _estimate_filled(self, measured: Drift) -> None:
        """Give the evaluations filled since the last computed one their share of the drift measured after them."""
        if measured.span <= 0:
            return
        for e in reversed(self.evaluations):
            if e.action == "computed":
                break
            e.drift = measured.error * span(self.trace.times, e.u, measured.order) / measured.span

    # -- one call of the model within an evaluation --------------------------------------------------------------

    def keys(self, options: dict, x: Tensor) -> list[StreamKey] | None:
        """The streams in one model call, in batch order; None where the call is not part of an evaluation."""
        conds, uuids = options.get("cond_or_uncond"), options.get("uuids")
        if self.current is None or not conds or x.shape[0] % len(conds):
            return None
        window = options.get("context_window")
        window = tuple(getattr(window, "index_list", ())) if window is not None else ()
        keys = []
        with self._lock:
            for i, cond in enumerate(conds):
                shape = (x.shape[0] // len(conds), *x.shape[1:])
                kind = (cond, uuids[i] if uuids else None, window, shape, x.dtype, x.device)
                keys.append((*kind, self._seen[kind]))
                self._seen[kind] += 1
        return keys

    def fill(self, keys: list[StreamKey], probes: list[Parts] | None = None) -> list[Parts] | None:
        """The forecasts for these streams, or None where this call has to be computed.

        probes: what the schedule's gate or the per-token choice looks at, one per key.
        """
        now = self.current
        if self.schedule is not None and self.schedule.probe is not None:
            self._gate(keys, probes)
        histories = self._histories(keys)
        if not now.fill or now.action == "computed" or histories is None:
            return None
        filled = []
        for i, (key, history) in enumerate(zip(keys, histories, strict=True)):
            parts, order = self._forecast(key, history, now.u, probes[i] if probes is not None else None)
            filled.append(parts)
            self._orders.append(order)
        return filled

    def _histories(self, keys: list[StreamKey]) -> list[History] | None:
        """What is stored of these streams, None where one has nothing; another thread may drop them all meanwhile."""
        found = [self.streams.get(key) for key in keys]
        return found if all(found) else None

    def forecast_at(self, keys: list[StreamKey], u: float) -> list[Parts] | None:
        """The forecasts for another time than now, where this evaluation may be filled; None where it may not."""
        histories = self._histories(keys)
        if not self.current.fill or histories is None:
            return None
        return [history.forecast(u, self.predictor)[0] for history in histories]

    def mark_filled(self, keys: list[StreamKey]) -> bool:
        """Count these streams as filled by an output that was made in advance; False where they must be computed."""
        now = self.current
        histories = self._histories(keys)
        if not now.fill or now.action == "computed" or histories is None:
            return False
        self._orders += [self.predictor.weights(history.times, now.u)[1] for history in histories]
        return True

    def _forecast(self, key: StreamKey, history: History, u: float, probe: Parts | None) -> tuple[Parts, int]:
        seen = self.probes.get(key)
        if not self.predictor.per_token or probe is None or seen is None or seen.times != history.times:
            return history.forecast(u, self.predictor)
        rows = candidates(history.times, u)
        index = choose(seen.column(), probe[0], rows)
        order = self.predictor.weights(history.times, u)[1]
        return tuple(combine(history.column(p), index, rows) for p in range(len(history.newest))), order

    def _gate(self, keys: list[StreamKey], probes: list[Parts] | None) -> None:
        """Let the probe decide: the cond that the host evaluates first decides for all, its worst row counts.

        The first alone, because the host puts the same one first whether it evaluates them in one call or in several.
        """
        now, kind = self.current, self.schedule.probe
        change = None
        if not self._gated and probes:
            history = self.probes.get(keys[0])
            if history is not None and len(history):
                if kind == Probe.FORECAST:
                    reference = history.forecast(now.u, Predictor("newton", self.schedule.order))[0]
                else:
                    reference = history.newest
                if [t.shape for t in reference] == [t.shape for t in probes[0]]:
                    change = worst_relative_l1(probes[0], reference)
        if kind in (Probe.MODULATED, Probe.EMBEDDING):
            for key, probe in zip(keys, probes or [], strict=False):
                self.probes.setdefault(key, History(1)).push(now.u, probe)
        if self._gated:
            return
        self._gated = True
        if change is None:
            if now.fill:
                now.fill, now.reason = False, "nothing to compare the first block with"
        elif not self.schedule.accept(self.trace, float(change)) and now.fill:
            now.fill, now.reason = False, "the first block changed"

    def keep(
        self,
        keys: list[StreamKey],
        chunks: list[Parts],
        probes: list[Parts] | None = None,
        base: list[Parts] | None = None,
        owned: bool = False,
    ) -> None:
        """Measure the drift of the forecasts these outputs would have replaced, then store them.

        probes: stored beside them; base: what a residual is added to, so that its drift is relative to the sum;
        owned: the tensors are handed over.
        """
        now = self.current
        now.action = "computed"
        self._kept = True
        if self.recorder is not None:
            with self._lock:
                for key, parts in zip(keys, chunks, strict=True):
                    self.recorder.push(now.u, key, parts, self._x)
        if self.schedule is None or self.note:
            return
        with self._lock:
            for i, (key, parts) in enumerate(zip(keys, chunks, strict=True)):
                history = self.streams.get(key)
                if history is None:
                    history = self._new_history(key, parts, None if probes is None else probes[i])
                    if history is None:
                        return
                if len(history) and [t.shape for t in history.newest] != [t.shape for t in parts]:
                    history.clear()  # a pack that resizes features in a part of the steps (Deep Shrink) came or went
                    self._reshaped = True
                if len(history):
                    forecast, order = history.forecast(now.u, self.predictor)
                    reach = span(history.times, now.u, order)
                    whole = None if base is None else base[i]
                    self._drifts.append((_change(forecast, parts, whole), order, reach))
                    if self.schedule.needs_input_change:
                        self._changes.append(worst_relative_l1(history.newest, parts))
                history.push(now.u, parts, owned)
                if probes is not None and key in self.probes and self.probe in (Probe.RESIDUAL, Probe.FORECAST):
                    self.probes[key].push(now.u, probes[i], owned)

    @property
    def _probe_anchors(self) -> int:
        gate = getattr(self.schedule, "order", 0) + 1 if self.probe == Probe.FORECAST else 1
        return max(gate, self.predictor.anchors) if self.predictor.per_token else gate

    def _new_history(self, key: StreamKey, parts: Parts, probe: Parts | None) -> History | None:
        """A history for a new stream and for its probe, where the budget has room for both."""
        size = _bytes(parts) * self.predictor.anchors
        probed = probe is not None and self.probe in (Probe.RESIDUAL, Probe.FORECAST)
        if probed:
            size += _bytes(probe) * self._probe_anchors
        storage = self._room(size, parts[0].device)
        if storage is None:
            return None
        self.streams[key] = History(self.predictor.anchors, storage)
        if probed:
            self.probes[key] = History(self._probe_anchors, storage)
        return self.streams[key]

    def _room(self, size: int, device: torch.device) -> Storage | None:
        """Where `size` bytes of a prompt go; None, and nothing more is skipped, where the budget has no room."""
        storage = self.memory.place(size, device)
        if storage is None:
            limit = self.memory.limit(device) / 1e6
            self.refuse(f"the cache needs {size / 1e6:.1f} MB per prompt, more than the budget of {limit:.1f} MB")
        return storage

    # -- one block within a call ---------------------------------------------------------------------------------

    def residuals(self, keys: list[StreamKey], block: int) -> list[Parts] | None:
        """What this block added to these streams when it last ran, to be read only; None where it has to run."""
        step = self.schedule.step(self.current.u)
        if not self.current.fill or self.schedule.computes(step, block):
            return None
        found = [self.streams.get((*key, block)) for key in keys]
        return [history.last for history in found] if all(found) else None

    def keeps(self, block: int) -> bool:
        """Whether what this block adds now is reused at the next step."""
        return self.schedule.keeps(self.schedule.step(self.current.u), block)

    def keep_block(self, keys: list[StreamKey], block: int, chunks: list[Parts] | None) -> None:
        """Store what this block has added, handed over; None drops what it added before, which is out of date.

        Room is found once per stream, for all blocks that the table ever reuses.
        """
        with self._lock:
            for i, key in enumerate(keys):
                name = (*key, block)
                if chunks is None:
                    self.streams.pop(name, None)
                    continue
                if key not in self._places:
                    storage = self._room(_bytes(chunks[i]) * self.schedule.reused, chunks[i][0].device)
                    if storage is None:
                        return
                    self._places[key] = storage
                self.streams.setdefault(name, History(1, self._places[key])).push(self.current.u, chunks[i], owned=True)

    def count_block(self, ran: bool) -> None:
        """Count a block of this evaluation as run or reused."""
        self._kept = True
        with self._lock:
            self._ran += ran
            self._reused += not ran

    # -- looking ahead -------------------------------------------------------------------------------------------

    def grid_step(self) -> int | None:
        """The step this evaluation is at; None between the steps."""
        step = round(self.current.u)
        return step if abs(self.current.u - step) < SAME_TIME else None

    def certain_fills(self, step: int) -> list[int]:
        """The steps right after `step` that will be filled whatever happens until then."""
        if not isinstance(self.schedule, Interval | KeySteps | Magnitude) or self.clock.steps <= ONE_SKIP_STEPS:
            return []
        ahead = []
        for later in range(step + 1, self.clock.steps):
            if not self._decide(float(later), self.clock.sigmas[later])[0]:
                break
            ahead.append(later)
        return ahead

    def timestep(self, step: int) -> float:
        """What the network is told as its time at a step of the schedule."""
        return float(self.timestep_of(self.clock.sigmas[step]))

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free every tensor."""
        self._forget()
        if self.compensator is not None:
            self.compensator.close()
        self._drifts.clear()
        self._changes.clear()
        self._x = self._x_computed = self.current = self.inner = self.recorder = None

    def report(self) -> dict:
        """Numbers of the run so far, plain JSON data."""
        return report(self)


def _largest(values: list[Tensor]) -> float:
    """The largest of scalar tensors, NaN counted as infinite; one synchronisation for all of them."""
    numbers = [v if math.isfinite(v) else math.inf for v in (float(t) for t in values)]
    return max(numbers)


def _bytes(parts: Parts) -> int:
    return sum(t.numel() * t.element_size() for t in parts)


def _change(value: Parts, reference: Parts, base: Parts | None) -> Tensor:
    """Worst relative L1 of value against reference; against reference + base where the sum is what counts."""
    if base is None:
        return worst_relative_l1(value, reference)
    whole = [r + b for r, b in zip(reference, base, strict=True)]
    moved = [v + b for v, b in zip(value, base, strict=True)]
    return worst_relative_l1(moved, whole)


def _movement(x: Tensor, previous: Tensor) -> float:
    """Mean absolute difference of the row that moved most."""
    return float((x - previous).abs().reshape(x.shape[0], -1).float().mean(1).max())
