"""Full runs of the user's own sampling, watched: what a calibration is solved from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass, field

import comfy.model_sampling
import comfy.sample
import torch
from torch import Tensor

from ...engine.calibration.choice import gaussian_jacobians, interpolated
from ...engine.calibration.profile import Profile
from ...engine.calibration.recorder import Activations, Recorder
from ...engine.calibration.statistics import TrajectoryStatistics
from ...engine.errors import SlipstreamError
from ...engine.families import architecture_of
from ...engine.run.plan import CacheConfig, Plan, PredictorConfig
from ...engine.run.samplers import sampler_traits
from ..model import plan_of, with_plan
from ..parts import PROFILE, RECORDER, put_on
from ..profiles.folder import HANDED
from ..quantise.choose import linears_of
from .job import NODE, Job, Tell, Wish, silent

# One more evaluation in so many measures how disturbances grow: a full run costs a tenth more with it.
PROBE_EVERY = 10


@dataclass(slots=True)
class Recorded:
    """What the full runs left: statistics, each run's final latent, how disturbances grew at the steps where that was
    measured, and further statistics where asked for."""

    statistics: TrajectoryStatistics
    finals: list[Tensor]
    growth: dict[int, float]
    extras: dict[str, Tensor] = field(default_factory=dict)


def record(job: Job, wish: Wish | None = None, tell: Tell = silent) -> Recorded:
    """Full runs of the job at its plan's site; nothing is skipped and nothing stays on the model."""
    wish = wish or Wish()
    plan = plan_of(job.model)
    cache = plan.cache or CacheConfig()
    # Inside an empty part of the sampling every evaluation is stored and none is filled.
    full = dataclasses.replace(
        cache, preset="Custom", method="interval", drift_budget=1.0, start_percent=0.999, end_percent=1.0, max_skip=1,
        profile="", node_id="",
    )  # fmt: skip
    steps = len(job.sigmas) - 1
    statistics, finals, moments, growth = [], [], [], {}
    activations = Activations(linears_of(job.model))
    for run in range(len(job.runs)):
        recorder = Recorder(seed=run, moments=wish.correction, probed=probes(steps, run))
        watched = with_plan(job.model, Plan(full, _nameless(plan)))
        put_on(watched, RECORDER, recorder)
        callback = tell(f"full run {run + 1} of {len(job.runs)}", job.steps)
        with activations if wish.activations else contextlib.nullcontext():
            finals.append(job.sample(watched, run, callback))
        try:
            statistics.append(recorder.statistics())
            table = recorder.channel_moments() if wish.correction else None
        except ValueError as error:
            raise SlipstreamError(f"{NODE}: {error}.") from None
        if table is not None:
            moments.append(table)
        for step, ratio in recorder.growth.items():
            growth.setdefault(step, []).append(ratio)
    extras = activations.tables()
    if moments:
        extras["moments"] = torch.stack(moments).mean(0)
    return Recorded(
        TrajectoryStatistics.merged(statistics), finals, {k: sum(v) / len(v) for k, v in growth.items()}, extras
    )


def probes(steps: int, run: int) -> frozenset[int]:
    """Evaluations of one run at which growth is measured: one in PROBE_EVERY, in every run at other places."""
    count = max(1, steps // PROBE_EVERY)
    shift = (run % 4 + 0.5) / 4
    return frozenset(min(steps - 1, 1 + round((k + shift) * (steps - 1) / count)) for k in range(count))


def _nameless(plan: Plan) -> PredictorConfig | None:
    """The plan's predictor without its node: a calibration is nobody's picture, so it leaves no text on the nodes."""
    return None if plan.predictor is None else dataclasses.replace(plan.predictor, node_id="")


def growth_of(job: Job, recorded: Recorded) -> tuple[float, ...]:
    """Growth of disturbances at every step: as measured, or that of Gaussian data where nothing could be measured."""
    steps = len(job.sigmas) - 1
    if recorded.growth:
        return interpolated(recorded.growth, steps)
    flow = isinstance(job.model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    return gaussian_jacobians(job.values, 1.0, flow)


def about(job: Job, recorded: Recorded) -> dict:
    """What a profile says of the sampling that it was measured on."""
    return {
        "sampler": sampler_traits(job.sampler).name,
        "steps": len(job.sigmas) - 1,
        "cfg": job.cfg,
        "runs": len(job.runs),
        "latent": list(job.latent["samples"].shape),
        "family": architecture_of(job.model.get_model_object("diffusion_model")).name,
        "growth": [recorded.growth[k] for k in sorted(recorded.growth)],
    }


def following(model, profile: Profile):
    """The model with its own plan and a profile that is in no file."""
    plan = plan_of(model)
    cache = dataclasses.replace(plan.cache or CacheConfig(), preset="Balanced", node_id="", profile=HANDED,
                                drift_budget=1.0, start_percent=0.0, end_percent=1.0)  # fmt: skip
    clone = model.clone()
    put_on(clone, PROFILE, profile)
    return with_plan(clone, Plan(cache, _nameless(plan)))


def size_of(model, finals: list[Tensor]) -> float:
    """RMS of the final latents in the model's own units, in which errors are predicted."""
    whole = [model.model.process_latent_in(final).float() for final in finals]
    return math.sqrt(sum(float(t.square().mean()) for t in whole) / len(whole)) or 1.0
