"""The samplings that the report makes itself: the accelerated one, the plain one, and the two floors."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...engine.run.samplers import sampler_traits
from ..calibrate.job import Job, Tell, silent
from ..canvas import events
from ..gauge import Gauge, clocked
from ..model import plan_of
from ..switch.segments import Local, segments_of
from ..switch.switch import with_segments
from .plain import Plain

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
        self.total = clocked(device) - (self.started or time.perf_counter())
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


def last_run(model) -> dict | None:
    """The report of this MODEL's last run; of one with a switch the switch's, which knows of all its models."""
    switches = (segment.node_id for segment in segments_of(model) if segment.node_id)
    return events.last_report(events.Nodes((*plan_of(model).node_ids, *switches)))


# -- sampling --------------------------------------------------------------------------------------------------------


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
