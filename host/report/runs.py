"""The samplings that the report makes itself: the accelerated one, the plain one, and the two floors."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...engine.run.samplers import sampler_traits
from .. import attach as sites
from ..calibrate.recording import Job
from ..canvas import events
from ..gauge import Gauge
from ..model import FIT, PROFILE, RECORDER, plan_of
from ..quantise import kernels
from ..quantise.loras import PREFIX, quantised_modules
from ..quantise.placed import KEY as QUANTISED
from ..quantise.quantise import quantised
from ..switch.bridge import name_of
from ..switch.segments import Local, segments_of, without_switch
from ..switch.switch import SMALLER, with_segments

NODE = "Speed & Quality Report"
KEY = "slipstream_watch"

# Sigmas of one run and of another are the same up to this relative difference; samplers round them.
SAME = 0.01


@dataclass(slots=True)
class Taken:
    """One result and what it took.

    latent: as the host hands it on; evaluations: that the network really made, fractions where some of its blocks
    ran; seconds: from the first evaluation on; once: of them, what the first evaluation took more than usual, as
    loading and compiling; peak_memory_bytes: with peak_memory_of; run: the report of a run of ours.
    """

    name: str
    latent: dict
    steps: int | None = None
    evaluations: float | None = None
    seconds: float | None = None
    once: float = 0.0
    peak_memory_bytes: int | None = None
    peak_memory_of: str | None = None
    run: dict | None = None

    @property
    def steady(self) -> float | None:
        """The seconds without what only a first run takes."""
        return None if self.seconds is None else self.seconds - self.once


class Watch:
    """Counts and times the evaluations of one sampling, as a run of ours does, and changes nothing."""

    def __init__(self):
        self.seconds: list[float] = []
        self.started: float | None = None
        self.total = 0.0

    def on(self, model):
        """A clone of the model that is watched, every model of a switch included."""
        segments = segments_of(model)
        if len(segments) > 1:
            model = with_segments(model, tuple(self._on_segment(segment) for segment in segments))
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self._sample)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self._evaluation)
        return clone

    def _on_segment(self, segment):
        if segment.given:
            return segment
        clone = segment.runner.patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self._evaluation)
        return dataclasses.replace(segment, runner=Local(clone))

    def _sample(self, executor, *args, **kwargs):
        device = executor.class_obj.model_patcher.load_device
        result = executor(*args, **kwargs)
        if device.type in ("cuda", "xpu"):
            getattr(torch, device.type).synchronize(device)
        self.total = time.perf_counter() - (self.started or time.perf_counter())
        return result

    def _evaluation(self, executor, *args, **kwargs):
        float(args[1].reshape(-1)[0])  # waits for the step before, as a run of ours does
        now = time.perf_counter()
        self.started = self.started or now
        result = executor(*args, **kwargs)
        self.seconds.append(time.perf_counter() - now)
        return result


def once(seconds: list[float]) -> float:
    """What the first of some evaluations took more than the others on average."""
    rest = seconds[1:]
    return max(0.0, seconds[0] - sum(rest) / len(rest)) if rest else 0.0


def of_run(name: str, latent: dict, run: dict | None) -> Taken:
    """A result that another node made, with what its run has told."""
    if run is None:
        return Taken(name, latent)
    computed = [e["seconds"] for e in run["trace"] if e["share"] >= 1.0]
    anchors = sum(bool(e.get("anchor")) for e in run["trace"])  # each asks the model a second time
    memory = {key: run.get(key) for key in ("peak_memory_bytes", "peak_memory_of")}
    return Taken(
        name, latent, run["steps"], run["computed_share"] + anchors, run["seconds"], once(computed), **memory, run=run
    )


@dataclass(frozen=True, slots=True)
class _Nodes:
    node_ids: tuple[str, ...]


def last_run(model) -> dict | None:
    """The report of this MODEL's last run; of one with a switch the switch's, which knows of all its models."""
    switches = (segment.node_id for segment in segments_of(model) if segment.node_id)
    return events.last_report(_Nodes((*plan_of(model).node_ids, *switches)))


# -- the model without Slipstream ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plain:
    """A model with every part of Slipstream off, and the conditioning and cfg that it wants instead of the sampler's.

    what: why it is not simply the model, for the report; empty where it is.
    """

    model: object
    positive: list | None = None
    negative: list | None = None
    cfg: float = 0.0
    what: str = ""


def plain_of(model) -> Plain:
    """What this MODEL is without acceleration: without cache and forecasts, its 16-bit weights in their places, and of
    a small and a large model the large one. Models of one size, such as Wan 2.2's experts, both stay."""
    segments = segments_of(model)
    base = _switched_off(without_switch(model))
    if len(segments) < 2:
        return Plain(base, what=_still_quantised(base))
    patchers = [base if s.given else _switched_off(s.runner.patcher) for s in segments]
    sizes = [patcher.model_size() for patcher in patchers]
    largest = sizes.index(max(sizes))
    if min(sizes) >= SMALLER * max(sizes):
        experts = tuple(
            dataclasses.replace(s, runner=s.runner if s.given else Local(patcher), node_id="")
            for s, patcher in zip(segments, patchers, strict=True)
        )
        return Plain(with_segments(base, experts), what="plain are both models of the switch, as they are of one size")
    chosen, patcher = segments[largest], patchers[largest]
    return Plain(
        patcher, chosen.positive, chosen.negative, chosen.cfg, f"plain is the largest model alone ({name_of(patcher)})"
    )


def _switched_off(model):
    """A clone without what our nodes put on it. Patched forwards may stay: without a run they are the layer itself."""
    clone, found = model.clone(), quantised(model)
    if found is not None and model.get_attachment(QUANTISED) is found:
        size = model.model_size() + found.saved
        for name in found.layers:
            clone.object_patches.pop(PREFIX + name, None)
        clone.size = size
        # else the host would take the quantised layers that are loaded now for this patcher's weights
        clone.patches_uuid = uuid.uuid4()
        clone.remove_callbacks_with_key(CallbacksMP.ON_LOAD, QUANTISED)
    for key in (sites.KEY, QUANTISED, RECORDER, PROFILE, FIT):
        clone.remove_attachments(key)
    for key in (sites.KEY, QUANTISED, kernels.KEY):
        clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, key)
    return clone


def _still_quantised(model) -> str:
    if next(quantised_modules(model), None) is None:
        return ""
    return "the plain run has the same quantised weights, as their file holds no others; connect reference_model"


def weights(model) -> dict | None:
    """Bytes of the weights, {"accelerated", "plain"}; None where nothing is quantised."""
    found = quantised(model)
    if found is None:
        return None
    size = model.model_size()
    before = size + found.saved if model.get_attachment(QUANTISED) is found else size
    return {"accelerated": before - found.saved, "plain": before}


# -- sampling --------------------------------------------------------------------------------------------------------

# Called with a sentence on what is going on and the number of steps; gives the callback of that sampling.
Tell = Callable[[str, int], Callable | None]


def silent(sentence: str, steps: int) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Sampling:
    """One sampling as the user does it. negative: None takes the positive, which cfg 1 never looks at."""

    positive: list
    negative: list | None
    cfg: float
    sampler: object
    sigmas: Tensor
    latent: dict
    seed: int
    tell: Tell = field(default=silent)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def job(self, model, seed: int | None = None, sigmas: Tensor | None = None) -> Job:
        positive = self.positive
        return Job(
            model, ((positive, self.seed if seed is None else seed),),
            positive if self.negative is None else self.negative, self.cfg, self.sampler,
            self.sigmas if sigmas is None else sigmas, self.latent,
        )  # fmt: skip

    def accelerated(self, model) -> Taken:
        """A run with everything that is on the model; its strip is its nodes' own."""
        watch, before = Watch(), last_run(model)
        latent, gauge = self._sample("accelerated run", self.job(watch.on(model)))
        run = last_run(model)
        if run is None or run is before:
            return self._taken("accelerated", latent, self.steps, watch, gauge)
        taken = of_run("accelerated", latent, run)
        return dataclasses.replace(taken, **gauge.reading())

    def plain(self, plain: Plain, name: str = "plain", seed: int | None = None, sigmas: Tensor | None = None) -> Taken:
        """A run of the model without Slipstream, bit-identical to the host's own."""
        own = dataclasses.replace(
            self, positive=plain.positive or self.positive, negative=plain.negative or self.negative,
            cfg=plain.cfg if plain.cfg > 0 else self.cfg,
        )  # fmt: skip
        watch = Watch()
        job = own.job(watch.on(plain.model), seed, sigmas)
        latent, gauge = own._sample(name if name != "plain" else "plain run", job)
        return self._taken(name, latent, len(job.sigmas) - 1, watch, gauge)

    def _sample(self, what: str, job: Job) -> tuple[dict, Gauge]:
        callback = self.tell(f"sampling: {what}", len(job.sigmas) - 1)
        gauge = Gauge(job.model.load_device, watch_ram=True)
        with gauge:
            latent = job.sample(job.model, 0, callback)
        return {**self.latent, "samples": latent}, gauge

    @staticmethod
    def _taken(name: str, latent: dict, steps: int, watch: Watch, gauge: Gauge) -> Taken:
        return Taken(
            name, latent, steps, float(len(watch.seconds)), watch.total, once(watch.seconds), **gauge.reading()
        )


def check_same(run: dict | None, sampling: Sampling) -> None:
    """Raise SlipstreamError where the accelerated run was not sampled with what is connected here."""
    if run is None:
        return
    traits, steps = sampler_traits(sampling.sampler), sampling.steps
    if (run["sampler"], run["steps"]) != (traits.name, steps):
        raise SlipstreamError(
            f"{NODE}: the samples were made with {run['steps']} steps of {run['sampler']}, but {steps} steps of "
            f"{traits.name} are connected here; connect the same sampler and sigmas, or leave samples unconnected."
        )
    asked = [e["sigma"] for e in run["trace"]]
    given = [float(s) for s in sampling.sigmas[:-1]]
    if not traits.stochastic and len(asked) == len(given):
        off = [i for i, (a, b) in enumerate(zip(asked, given, strict=True)) if abs(a - b) > SAME * max(abs(b), 1e-6)]
        if off:
            i = off[0]
            raise SlipstreamError(
                f"{NODE}: the samples were made with other sigmas ({asked[i]:.4g} at step {i}, here {given[i]:.4g}); "
                "connect the same scheduler, steps and denoise, or leave samples unconnected."
            )


# -- fewer steps -----------------------------------------------------------------------------------------------------


def equal_cost(fast: Taken, plain: Taken, by_time: bool, steps: int) -> int | None:
    """How many plain steps cost what the accelerated run did; None where that is not known.

    by_time: evaluations of other weights do not count alike, so the seconds decide. Rounded in favour of the floor.
    """
    if by_time:
        if not fast.steady or not plain.steady:
            return None
        share = fast.steady / plain.steady
    else:
        whole = plain.evaluations or (fast.run["evaluations"] if fast.run else None)
        if not whole or fast.evaluations is None:
            return None
        share = fast.evaluations / whole
    return max(1, math.ceil(share * steps - 0.25))


def fewer_sigmas(model, sigmas: Tensor, count: int) -> tuple[Tensor, str]:
    """(the schedule with `count` steps, what it is in words).

    The host's scheduler that made the sigmas is known again by them and asked for fewer steps; sigmas of other makers
    are interpolated, which is what fewer steps of a scheduler are but for rounding.
    """
    sampling, steps = model.get_model_object("model_sampling"), len(sigmas) - 1

    def made(name: str, total: int) -> Tensor | None:
        with contextlib.suppress(AttributeError, IndexError, TypeError, ValueError, AssertionError):
            return comfy.samplers.calculate_sigmas(sampling, name, total).float().cpu()
        return None

    wanted = sigmas.float().cpu()
    whole = float(wanted[0]) >= (1 - SAME) * float(sampling.sigma_max)
    # with denoise below 1 the sigmas are the end of a longer schedule
    for total in (steps,) if whole else range(steps + 1, 5 * steps + 1):
        for name in comfy.samplers.SCHEDULER_NAMES:
            found = made(name, total)
            if found is None or len(found) <= steps:
                continue
            if whole and len(found) != steps + 1:
                continue
            if torch.allclose(found[-(steps + 1) :], wanted, rtol=1e-4, atol=1e-6):
                shorter = made(name, max(count, round(total * count / steps)))
                if shorter is not None and len(shorter) > count:
                    return shorter[-(count + 1) :].to(sigmas), name
    places = torch.linspace(0, steps, count + 1)
    low = places.floor().long().clamp(max=steps - 1)
    return torch.lerp(wanted[low], wanted[low + 1], places - low).to(sigmas), "interpolated"
