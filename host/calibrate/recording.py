"""Full runs of the user's own sampling, watched: what a calibration is solved from."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_sampling
import comfy.sample
import torch
from torch import Tensor

from ...engine.calibration.choice import SCHEDULES, gaussian_jacobians, interpolated
from ...engine.calibration.profile import Profile
from ...engine.calibration.recorder import Activations, Recorder
from ...engine.calibration.statistics import Statistics
from ...engine.errors import SlipstreamError
from ...engine.families import architecture_of
from ...engine.run.plan import CacheConfig, Plan, PredictorConfig
from ...engine.run.samplers import sampler_traits
from ..model import PROFILE, RECORDER, plan_of, with_plan
from ..quantise.choose import linears_of

NODE = "Calibrate"

# What the goal is, and how the schedule is found; ERTACache's step coefficient changes the sigmas too.
GOALS = ("speed-up", "max drift")
BEST, STEP_COEFFICIENT, ECAD = "best", "ERTACache + step coefficient", "ECAD (blocks)"
CHOICES = (BEST, *SCHEDULES, STEP_COEFFICIENT, ECAD)

# One more evaluation in so many measures how disturbances grow: a full run costs a tenth more with it.
PROBE_EVERY = 10


@dataclass(frozen=True, slots=True)
class Job:
    """One sampling as the user does it. runs: (positive conditioning, seed) of each calibration run."""

    model: object
    runs: tuple[tuple[list, int], ...]
    negative: list
    cfg: float
    sampler: object
    sigmas: Tensor
    latent: dict

    @property
    def values(self) -> tuple[float, ...]:
        """The sigmas as numbers, n + 1 for n steps."""
        return tuple(float(s) for s in self.sigmas)

    def sample(self, model, run: int, callback: Callable | None = None) -> Tensor:
        """The final latent of one calibration run with this model."""
        positive, seed = self.runs[run]
        samples = starting_latent(model, self.latent)
        noise = comfy.sample.prepare_noise(samples, seed, self.latent.get("batch_index"))
        return comfy.sample.sample_custom(
            model, noise, self.cfg, self.sampler, self.sigmas, positive, self.negative, samples,
            noise_mask=self.latent.get("noise_mask"), callback=callback, disable_pbar=True, seed=seed,
        )  # fmt: skip


def starting_latent(model, latent: dict) -> Tensor:
    """The samples of a LATENT as the host's sampler nodes start from them: an empty one is fitted to the model."""
    fit = comfy.sample.fix_empty_latent_channels
    known = inspect.signature(fit).parameters  # newer hosts are told how an empty latent was scaled down
    told = {key: latent[key] for key in ("downscale_ratio_spacial", "downscale_ratio_temporal") if key in latent}
    return fit(model, latent["samples"], **{key: value for key, value in told.items() if key in known})


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants. goal: of GOALS; speed_up: one step in so many is computed; max_drift: mean relative error
    of the filled steps; schedule: of CHOICES; check: schedules that are really sampled before one is chosen, 0: none;
    correction, activations: further statistics into the profile; ecad_runs: samplings of ECAD's search."""

    goal: str = GOALS[0]
    speed_up: float = 2.5
    max_drift: float = 0.05
    schedule: str = BEST
    check: int = 4
    correction: bool = False
    activations: bool = False
    ecad_runs: int = 200


@dataclass(slots=True)
class Recorded:
    """What the full runs left: statistics, each run's final latent, how disturbances grew at the steps where that was
    measured, and further statistics where asked for."""

    statistics: Statistics
    finals: list[Tensor]
    growth: dict[int, float]
    extras: dict[str, Tensor] = field(default_factory=dict)


# Called with a sentence on what is going on, and for the callback of the sampling that follows.
Progress = Callable[[str], Callable | None]


def silent(sentence: str) -> None:
    return None


def record(job: Job, wish: Wish | None = None, progress: Progress = silent) -> Recorded:
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
        watched.set_attachments(RECORDER, recorder)
        callback = progress(f"full run {run + 1} of {len(job.runs)}")
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
    return Recorded(Statistics.merged(statistics), finals, {k: sum(v) / len(v) for k, v in growth.items()}, extras)


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
    cache = dataclasses.replace(plan.cache or CacheConfig(), preset="Balanced", node_id="", profile="(calibration)",
                                drift_budget=1.0, start_percent=0.0, end_percent=1.0)  # fmt: skip
    clone = model.clone()
    clone.set_attachments(PROFILE, profile)
    return with_plan(clone, Plan(cache, _nameless(plan)))


def size_of(model, finals: list[Tensor]) -> float:
    """RMS of the final latents in the model's own units, in which errors are predicted."""
    whole = [model.model.process_latent_in(final).float() for final in finals]
    return math.sqrt(sum(float(t.square().mean()) for t in whole) / len(whole)) or 1.0
