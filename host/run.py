"""One sampling run: opened when the sampler starts, owns all state, closed in `finally`."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor

from ..engine.history import History
from ..engine.metrics import worst_relative_l1
from ..engine.predictors import SAME_TIME
from ..engine.schedules import Drift, Trace, span
from . import events, sites
from .plan import Plan, predictor_for, resolve, schedule_for
from .sampling import Clock, Sampler, active_conditioning

# Distilled models: at 4 steps each one matters; up to 8 one reuse is the most that does no visible harm.
NEVER_SKIP_STEPS = 4
ONE_SKIP_STEPS = 8

StreamKey = tuple


@dataclass(slots=True)
class Evaluation:
    """One (sigma, x) pair that the sampler asks for, and what became of it."""

    index: int
    u: float
    sigma: float
    fill: bool
    reason: str
    action: str = ""  # computed | forecast | reused
    order: int = 0
    drift: float | None = None  # computed: measured, and avoided; filled: estimated from the next measurement
    seconds: float = 0.0


class Run:
    """All state of one sampling run. Nothing of it outlives `close`, but the report.

    A stream is what one conditioning sees of the model: its key holds the cond index, the host's uuid, the context
    window, how many calls of the same kind came before in this evaluation, and the shape, dtype and device.
    """

    def __init__(
        self, plan: Plan, clock: Clock, sampler: Sampler, percent_to_sigma: Callable[[float], float], label: str = ""
    ):
        self.plan = plan
        self.cache = resolve(plan, sampler)
        self.clock = clock
        self.sampler = sampler
        self.sigma_window = tuple(
            float(percent_to_sigma(p)) for p in (self.cache.start_percent, self.cache.end_percent)
        )
        self.label = label
        self.predictor = predictor_for(plan.predictor, sampler)
        self.schedule = schedule_for(self.cache)
        self.note = self._why_nothing()
        self.level: str | None = sites.DENOISED if sampler.stochastic else None
        self.trace = Trace(clock.steps)
        self.streams: dict[StreamKey, History] = {}
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
        self._x: Tensor | None = None
        self._x_computed: Tensor | None = None
        self._started = time.perf_counter()

    def _why_nothing(self) -> str:
        """The sentence that says why this run will skip nothing; empty where it may."""
        if self.schedule is None:
            return "nothing is skipped: the drift budget is 0"
        if self.sampler.unserved:
            return f"nothing is skipped: {self.sampler.name} cannot be served, {self.sampler.unserved}"
        if not self.clock.decreasing:
            return "nothing is skipped: the sigmas of this run are not a falling schedule"
        if self.clock.steps <= NEVER_SKIP_STEPS:
            return f"nothing is skipped: at {self.clock.steps} steps every one of them counts"
        return ""

    # -- one evaluation ------------------------------------------------------------------------------------------

    @property
    def needs_input(self) -> bool:
        """Whether `begin` has to be given the network's input."""
        return self.schedule is not None and self.schedule.needs_input_change

    def begin(self, sigma: float, x: Tensor | None = None) -> None:
        """Open the evaluation at sigma and decide whether it may be filled. x is what the network will see."""
        if not self.evaluations:
            self._started = time.perf_counter()  # loading the model is not the sampler's time
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
        if trace.computed < self.predictor.anchors + 1:
            return False, "first evaluations"  # one more than the order needs, so that a forecast was measured once
        if u - trace.times[-1] > self.cache.max_skip + SAME_TIME:
            return False, "max skip"
        if self.clock.steps <= ONE_SKIP_STEPS and any(e.fill for e in self.evaluations):
            return False, f"at {self.clock.steps} steps one is skipped at most"
        order = self.predictor.weights(trace.times, u)[1]
        if order == 0 < self.predictor.order:
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
            self.trace = Trace(self.clock.steps)
            self.streams.clear()
            if not self._orders:
                self.current.fill, self.current.reason = False, "the active conditioning changed"

    def abandon(self) -> None:
        """Drop the open evaluation: the host raised in the middle of it."""
        self.current = None

    def end(self) -> None:
        """Close the evaluation: one look at the measured numbers, one event."""
        now, self.current = self.current, None
        now.seconds = time.perf_counter() - self._evaluation_started
        filled = bool(self._orders) and now.action != "computed"
        if filled:
            now.order = max(self._orders)
            now.action = "forecast" if now.order else "reused"
        else:
            now.fill, now.action = False, "computed"
            self._learn(now)
        self.evaluations.append(now)
        events.evaluation(self, now)

    def _learn(self, now: Evaluation) -> None:
        """Take over what a computed evaluation has shown."""
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
        trace.computed += 1
        trace.moved = 0.0
        kept = [t for t in trace.times if abs(t - now.u) >= SAME_TIME]
        trace.times = [*kept, now.u][-self.predictor.anchors :]
        self.peak_bytes = max(self.peak_bytes, sum(h.nbytes for h in self.streams.values()))

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

    def fill(self, keys: list[StreamKey]) -> list[tuple[Tensor, ...]] | None:
        """The forecasts for these streams, or None where this call has to be computed."""
        now = self.current
        if not now.fill or now.action == "computed" or not all(len(self.streams.get(k, ())) for k in keys):
            return None
        filled = []
        for key in keys:
            parts, order = self.streams[key].forecast(now.u, self.predictor)
            filled.append(parts)
            self._orders.append(order)
        return filled

    def keep(self, keys: list[StreamKey], chunks: list[tuple[Tensor, ...]]) -> None:
        """Measure the drift of the forecasts these outputs would have replaced, then store them."""
        now = self.current
        now.action = "computed"
        if self.schedule is None or self.note:
            return
        with self._lock:
            for key, parts in zip(keys, chunks, strict=True):
                history = self.streams.setdefault(key, History(self.predictor.anchors))
                if len(history):
                    forecast, order = history.forecast(now.u, self.predictor)
                    reach = span(history.times, now.u, order)
                    self._drifts.append((worst_relative_l1(forecast, parts), order, reach))
                    if self.schedule.needs_input_change:
                        self._changes.append(worst_relative_l1(history.newest, parts))
                history.push(now.u, parts)

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free every tensor."""
        self.streams.clear()
        self._drifts.clear()
        self._changes.clear()
        self._x = self._x_computed = self.current = None

    def report(self) -> dict:
        """Numbers of the run so far, plain JSON data.

        Drifts are those of the filled evaluations. Seconds saved are measured within the run: a fill costs what it
        took, not 0.
        """
        computed = [e for e in self.evaluations if e.action == "computed"]
        filled = [e for e in self.evaluations if e.action != "computed"]
        drifts = [e.drift for e in filled if e.drift is not None]
        # The first evaluation carries one-time costs (loading, compiling), so it is left out where there are others.
        usual = computed[1:] or computed
        per_computed = sum(e.seconds for e in usual) / len(usual) if usual else 0.0
        saved = sum(max(0.0, per_computed - e.seconds) for e in filled)
        return {
            "model": self.label,
            "sampler": self.sampler.name,
            "steps": self.clock.steps,
            "evaluations": len(self.evaluations),
            "computed": len(computed),
            "filled": len(filled),
            "seconds": time.perf_counter() - self._started,
            "seconds_saved": saved,
            "drift_mean": sum(drifts) / len(drifts) if drifts else None,
            "drift_max": max(drifts) if drifts else None,
            "cache_bytes": self.peak_bytes,
            "site": self.level,
            "note": self.note or ("" if filled else "nothing was skipped: no evaluation was within the drift budget"),
            "plan": self.plan.as_json(),
            "trace": [asdict(e) for e in self.evaluations],
        }


def _largest(values: list[Tensor]) -> float:
    """The largest of scalar tensors, NaN counted as infinite; one synchronisation for all of them."""
    numbers = [v if math.isfinite(v) else math.inf for v in (float(t) for t in values)]
    return max(numbers)


def _movement(x: Tensor, previous: Tensor) -> float:
    """Mean absolute difference of the row that moved most."""
    return float((x - previous).abs().reshape(x.shape[0], -1).float().mean(1).max())
