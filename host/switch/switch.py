"""Several models in one sampling run: every evaluation goes to the model whose span its sigma is in.

The sampler runs once, on the model it was given, so its history, its noise and its seed never notice a switch. Around
it stand the OUTER_SAMPLE wrappers of every other model, and a PREDICT_NOISE wrapper before all others that routes.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP

from ...engine.coordinates import level_in
from ...engine.run.clock import Clock
from ...engine.run.evaluation import Evaluation
from ...engine.run.samplers import sampler_traits
from ..allocations import unrecorded
from ..canvas import events
from ..gauge import Gauge, clocked
from ..parts import SWITCH, put_on
from .bridge import RANGE, bridge, check_cfg, check_guider, check_latents, check_range, check_width, name_of
from .segments import (
    A_FIRST,
    AUTO,
    KEEP,
    SWAP,
    TURN,
    Boundary,
    Larger,
    Local,
    Segment,
    Span,
    SwitchConfig,
    Turn,
    check,
    joined,
    segments_of,
    span_at,
    spans,
    without_switch,
)
from .view import View

# What became of an evaluation, for the strip; `remote` is the third.
LARGE, SMALL = "computed", "small model"

# A model is the small one below this part of the largest one's bytes.
SMALLER = 0.95

DEFAULT = SwitchConfig()


def add_switch(model_a, model_b, config: SwitchConfig = DEFAULT, positive_b=None, negative_b=None):
    """A clone of the model that begins, on which the other takes over. Raises SlipstreamError; changes neither model.

    Of a model that has been through a switch node all segments are taken over. positive_b, negative_b: CONDITIONING for
    model_b where it reads another text encoder's.
    """
    check(config)
    check_latents(model_a, model_b)
    at = Boundary(config.switch_at, config.unit)
    part_a = segments_of(model_a)
    part_b = tuple(
        dataclasses.replace(
            segment, positive=positive_b, negative=negative_b, cfg=max(config.cfg_b, 0.0), memory=config.memory,
            node_id=config.node_id,
        )
        if segment.given
        else segment
        for segment in segments_of(model_b)
    )  # fmt: skip
    if config.order == A_FIRST:
        return with_segments(model_a, joined(part_a, _named(part_b, model_b), at))
    return with_segments(model_b, joined(part_b, _named(part_a, model_a), at))


def _named(segments: tuple[Segment, ...], model) -> tuple[Segment, ...]:
    """The segments with the model itself where they mean the one a sampler is given."""
    return tuple(dataclasses.replace(s, runner=Local(without_switch(model))) if s.given else s for s in segments)


def with_segments(model, segments: tuple[Segment, ...]):
    """A clone of the ModelPatcher that carries this list."""
    clone = without_switch(model)
    put_on(clone, SWITCH, segments, sample_switched)
    return clone


def sample_switched(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: the host's sampling with every model of the list; all is undone whatever happens."""
    guider = executor.class_obj
    sigmas = tuple(float(s) for s in (kwargs["sigmas"] if "sigmas" in kwargs else args[3]))
    if len(sigmas) < 2:
        return executor(*args, **kwargs)  # no step, nothing to share
    # Where a boundary lies does not depend on numbers that no bridge knows, so the model's own will do.
    source = bridge(guider.model_patcher, guider.model_patcher)[0]
    run = SwitchedRun(guider, spans(segments_of(guider.model_patcher), sigmas, source), sigmas, args, kwargs)
    gauge = Gauge(guider.model_patcher.load_device)
    try:
        with gauge, unrecorded():  # the next model's forward is another one
            result = run.sample(executor, args, kwargs)
    finally:
        run.close()
    events.finished(run, run.report() | gauge.reading())
    return result


@dataclass(slots=True)
class Cost:
    """What one span has taken. seconds: of wall time between its first and last evaluation, without the swaps; anchors:
    evaluations of its model that corrected another one's span, whose seconds are here too."""

    name: str
    mark: str
    evaluations: int = 0
    seconds: float = 0.0
    anchors: int = 0


class SwitchedRun:
    """All state of one sampling run over several models of this process.

    found: spans with Local runners; sigmas: the schedule that they count, which the sampler may be given a part of.
    Raises SlipstreamError before anything is loaded.
    """

    def __init__(self, guider, found: list[Span], sigmas: tuple[float, ...], args: tuple, kwargs: dict):
        self.guider = guider
        self.base = guider.model_patcher
        self.spans, self.sigmas = found, sigmas
        self.clock = Clock(sigmas)
        self.sampler = sampler_traits(kwargs["sampler"] if "sampler" in kwargs else args[2]).name
        self.noise_shape = (kwargs["noise"] if "noise" in kwargs else args[0]).shape
        segments = segments_of(self.base)
        self.plan = events.Nodes(tuple(dict.fromkeys(s.node_id for s in segments if s.node_id)))
        wanted = {s.memory for s in segments}
        self.memory = SWAP if SWAP in wanted else KEEP if KEEP in wanted else AUTO
        check_guider(guider)
        self.views: list[View | None] = [self._view(span) for span in found]
        self.remark = self._one_checkpoint()
        self.now: View | None = None  # the host has loaded the model it was given
        self.ready = False
        self.evaluations: list[Evaluation] = []
        self.swap_seconds = 0.0
        self.swaps = 0
        self.costs = self._costs()
        self._entered = self._began = time.perf_counter()
        self._last: Cost | None = None
        self._asked = False

    def _view(self, span: Span) -> View | None:
        """The stand-in for a span; None for the model the sampler was given, as it was given."""
        segment = span.segment
        if segment.given and not segment.own:
            return None
        if segment.given:
            patcher = without_switch(self.base)
        else:
            patcher = segment.runner.patcher
            check_latents(self.base, patcher)
            check_range(self.base, patcher, self.sigmas, span.first, span.last)
        view = View(self.guider, patcher, segment, *bridge(self.base, patcher))
        check_width(self.base, patcher, view.guider.conds, segment.positive is not None)
        check_cfg(segment.cfg, view.guider.conds)
        return view

    def _costs(self) -> list[Cost]:
        patchers = [self.base if view is None else view.patcher for view in self.views]
        sizes = [p.model_size() for p in patchers]
        self.largest, largest = sizes.index(max(sizes)), max(sizes)
        found = []
        for i, patcher in enumerate(patchers):
            other = next((p for p in patchers if p is not patcher and name_of(p) == name_of(patcher)), None)
            name = name_of(patcher) if other is None else f"{name_of(patcher)} #{i + 1}"
            found.append(Cost(name, SMALL if patcher.model_size() < SMALLER * largest else LARGE))
        return found

    def _one_checkpoint(self) -> str:
        """What the user should know about clones: their weights are in one place, so only one of them is ever there."""
        patchers = [self.base if view is None else view.patcher for view in self.views]
        distinct = {id(p.model) for p in patchers}
        if self.memory != KEEP or len(distinct) == len({id(p) for p in patchers}):
            return ""
        return "models of one checkpoint cannot be kept side by side and were swapped"

    # -- the run ---------------------------------------------------------------------------------------------------

    def sample(self, executor, args: tuple, kwargs: dict):
        """The sampler's run, with every other model's own wrappers around it."""
        original = self.guider.model_options
        options = self.guider.model_options = comfy.model_patcher.create_model_options_clone(original)
        wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        others = wrappers.get(WrappersMP.PREDICT_NOISE, {})
        wrappers[WrappersMP.PREDICT_NOISE] = {SWITCH: [], **others} | {SWITCH: [self._predict]}  # before all others
        run_on = lambda: executor(*args, **kwargs)  # noqa: E731  the innermost of several
        for view in reversed(self.views):
            if view is not None:
                run_on = _around(view, run_on, args, kwargs)
        try:
            return run_on()
        finally:
            self.guider.model_options = original

    def _predict(self, executor, *args, **kwargs):
        """PREDICT_NOISE wrapper: one evaluation by the model whose turn it is."""
        x, timestep = args[0], args[1]
        sigma = float(timestep.reshape(-1)[0])
        place = span_at(self.spans, self.sigmas, sigma)
        view, cost = self.views[place], self.costs[place]
        self._switch_to(view, cost, x.device)
        started = time.perf_counter()
        self._asked = False
        span = self.spans[place]
        token = TURN.set(Turn(span.first, span.last, self._larger(place, executor, args, kwargs)))
        try:
            result = self._by(view, executor, args, kwargs)
        finally:
            TURN.reset(token)
        cost.evaluations += 1
        u = self.clock.u(sigma) if self.clock.decreasing else float(len(self.evaluations))
        done = Evaluation(len(self.evaluations), u, sigma, False, cost.name, cost.mark)
        done.seconds, done.anchor = time.perf_counter() - started, self._asked
        self.evaluations.append(done)
        events.evaluation(self, done)
        return result

    def _by(self, view: View | None, executor, args: tuple, kwargs: dict):
        """The guided prediction of one model, which is on the device."""
        if view is None:
            return executor(*args, **kwargs)
        passed = args[2] if len(args) > 2 else kwargs.get("model_options", {})
        seed = args[3] if len(args) > 3 else kwargs.get("seed")
        return view.predict(args[0], args[1], passed, self.guider.model_options, seed)

    def _larger(self, place: int, executor, args: tuple, kwargs: dict) -> Larger | None:
        """The largest model for an evaluation of the span at `place`; None where that has it already."""
        if self.costs[place].mark == LARGE:
            return None
        other, why_not = self.largest, ""
        view = self.views[other]
        patcher = self.base if view is None else view.patcher
        level = float(args[1].reshape(-1)[0])
        if view is not None:
            level = level_in(level, view.source, view.target)
            largest = float(patcher.get_model_object("model_sampling").sigma_max)
            if not level <= largest * RANGE:
                why_not = f"{self.costs[other].name} knows noise only up to {largest:.4g}"

        def ask():
            """With the weights of the other model, then with those that were there; after an error nothing goes on."""
            device, before = args[0].device, (self.views[place], self.costs[place])
            self._switch_to(view, self.costs[other], device)
            token = TURN.set(None)  # its own compensator is not to ask anyone
            try:
                result = self._by(view, executor, args, kwargs)
            finally:
                TURN.reset(token)
            self.costs[other].anchors += 1
            self._asked = True
            self._switch_to(*before, device)
            return result

        own = self.base if self.views[place] is None else self.views[place].patcher
        nbytes = patcher.model_size()
        return Larger(self.costs[other].name, nbytes, own.model_size() / nbytes, ask, why_not)

    def _switch_to(self, view: View | None, cost: Cost, device: torch.device) -> None:
        """Give the device to the model of this span. The host's manager moves weights and makes room."""
        if self._last is cost:
            return
        started = self._settle(device)
        if not self.ready and self.memory == KEEP:
            self._load_all()
        if view is not self.now:
            self._leave(self.base if view is None else view.patcher)
            if view is None:
                self._return_to_base()
            else:
                view.enter()
            self.now = view
            self.swaps += 1
        self.ready = True
        self._last = cost
        self._entered = clocked(device)
        self.swap_seconds += self._entered - started

    def _settle(self, device: torch.device) -> float:
        """Close the account of the span that ends here; returns the time."""
        now = clocked(device)
        if self._last is not None:
            self._last.seconds += now - self._entered
        return now

    def _load_all(self) -> None:
        """Have every model loaded before the first step, as far as they fit."""
        others = {id(v.patcher.model): v.patcher for v in self.views if v is not None}
        others.pop(id(self.base.model), None)
        if others:
            comfy.model_management.load_models_gpu([*others.values(), self.base])

    def _leave(self, following) -> None:
        """End the turn of the model in use, and take it off the device where the user wants that."""
        patcher = self.base if self.now is None else self.now.patcher
        if self.now is None:
            patcher.cleanup()
        else:
            self.now.leave()
        if self.memory == SWAP and not patcher.is_clone(following):
            others = [
                loaded
                for loaded in comfy.model_management.current_loaded_models
                if loaded.model is not None and not loaded.model.is_clone(patcher)
            ]
            comfy.model_management.free_memory(1e30, patcher.load_device, keep_loaded=others)

    def _return_to_base(self) -> None:
        guider = self.guider
        comfy.sampler_helpers.prepare_sampling(self.base, self.noise_shape, guider.conds, guider.model_options)
        self.base.pre_run()

    # -- the end ---------------------------------------------------------------------------------------------------

    def _chosen(self) -> str:
        """What `auto` came to, by what is loaded now; empty where nothing was to be chosen."""
        models = {id(p.model) for p in (self.base if view is None else view.patcher for view in self.views)}
        if self.memory != AUTO or len(models) < 2:
            return ""
        loaded = {id(one.model.model) for one in comfy.model_management.current_loaded_models if one.model is not None}
        kept = len(models & loaded)
        return f"auto kept {'both' if kept == 2 else kept} loaded" if models <= loaded else "auto swapped them"

    def close(self) -> None:
        """Free what the run held and undo what it did to the other models."""
        self.remark = self.remark or self._chosen()
        if self._last is not None:
            self._last.seconds += time.perf_counter() - self._entered
            self._last = None
        error = None
        for view in self.views:
            if view is not None:
                try:
                    view.close()
                except Exception as raised:  # the others have to be closed too
                    error = error or raised
        self.views = []
        self.now = self.guider = None
        if error is not None:
            raise error

    def report(self) -> dict:
        """What the run has cost, plain JSON data of the same form as a cache's report."""
        costs = [dataclasses.asdict(cost) for cost in self.costs]
        note = ", then ".join(f"{_counted(c)} on {c.name} ({c.seconds:.2f} s)" for c in self.costs)
        if self.swaps:
            note += f", {self.swap_seconds:.2f} s for {self.swaps} {'swap' if self.swaps == 1 else 'swaps'}"
        return {
            "model": name_of(self.base),
            "sampler": self.sampler,
            "steps": self.clock.steps,
            "evaluations": len(self.evaluations),
            "computed": len(self.evaluations),
            "computed_share": float(len(self.evaluations)),
            "filled": 0,
            "seconds": time.perf_counter() - self._began,
            "seconds_saved": 0.0,
            "drift_mean": None,
            "drift_max": None,
            "cache_bytes": 0,
            "cache_place": "",
            "chose": "",
            "note": note,
            "remark": self.remark,
            "segments": [{**c, "first": s.first, "last": s.last} for c, s in zip(costs, self.spans, strict=True)],
            "counts": dict(Counter(e.action for e in self.evaluations)),
            "swaps": self.swaps,
            "swap_seconds": self.swap_seconds,
            "trace": [dataclasses.asdict(e) for e in self.evaluations],
        }


def _counted(cost: Cost) -> str:
    """The evaluations of a span; its anchors, which were made in another's, beside them."""
    return f"{cost.evaluations} + {cost.anchors} anchors" if cost.anchors else str(cost.evaluations)


def _around(view: View, run_on, args: tuple, kwargs: dict):
    return lambda: view.around(run_on, args, kwargs)
