"""Calibrate: full runs of the user's own sampling, from whose statistics every schedule for it is solved and one is
chosen."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import torch
from torch import Tensor

from ..engine.calibration import Activations, Recorder
from ..engine.ecad import Genome, evolve, missing
from ..engine.metrics import psnr, relative_error
from ..engine.profile import BLOCKS, Point, Profile
from ..engine.search import (
    SCHEDULES,
    Candidate,
    Search,
    adjusted_sigmas,
    gaussian_jacobians,
    interpolated,
    step_coefficients,
)
from ..engine.statistics import Statistics
from .architectures import architecture_of
from .blocks import EACH, block_sizes
from .errors import SlipstreamError
from .patcher import PROFILE, RECORDER, plan_of, with_plan
from .plan import CacheConfig, Plan
from .profiles import fingerprint
from .recipe import Recipe, described, lacks, resolve
from .sampling import sampler_traits

NODE = "Calibrate"
FEWEST_STEPS = 5

# Above this order the exact programme takes too long for a node.
HIGHEST_ORDER = 2

# What the goal is, and how the schedule is found; ERTACache's step coefficient changes the sigmas too.
GOALS = ("speed-up", "max drift")
BEST, STEP_COEFFICIENT, ECAD = "best", "ERTACache + step coefficient", "ECAD (blocks)"
CHOICES = (BEST, *SCHEDULES, STEP_COEFFICIENT, ECAD)

# ECAD's search on other runs than it is chosen by; how many points of its front are sampled there, at most.
FEWEST_ECAD_RUNS, FRONT = 2, 8

# One more evaluation in so many measures how disturbances grow: a full run costs a tenth more with it.
PROBE_EVERY = 10

# Numbers of computed steps on the frontier, at most, and the part of the steps they come from.
POINTS, FEWEST_SHARE, MOST_SHARE = 16, 0.18, 0.75


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

    def sample(self, model, run: int, callback: Callable | None = None) -> Tensor:
        """The final latent of one calibration run with this model."""
        positive, seed = self.runs[run]
        samples = comfy.sample.fix_empty_latent_channels(model, self.latent["samples"])
        noise = comfy.sample.prepare_noise(samples, seed, self.latent.get("batch_index"))
        return comfy.sample.sample_custom(
            model, noise, self.cfg, self.sampler, self.sigmas, positive, self.negative, samples,
            noise_mask=self.latent.get("noise_mask"), callback=callback, disable_pbar=True, seed=seed,
        )  # fmt: skip


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
    network = job.model.get_model_object("diffusion_model")
    activations = Activations(network)
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


def _nameless(plan: Plan):
    """The plan's predictor without its node: a calibration is nobody's picture, so it leaves no text on the nodes."""
    return None if plan.predictor is None else dataclasses.replace(plan.predictor, node_id="")


def calibrate(job: Job, wish: Wish | None = None, progress: Progress = silent) -> Profile:
    """A profile for this sampling. Raises SlipstreamError.

    job.model: with or without Slipstream nodes before it; its Taylor Predictor is the one the schedule is solved for.
    """
    wish = wish or Wish()
    recipe = _checked(job, wish)
    values = tuple(float(s) for s in job.sigmas)
    steps = len(values) - 1
    recorded = record(job, wish, progress)
    statistics = recorded.statistics
    name = sampler_traits(job.sampler).name
    if statistics.steps != steps:
        raise SlipstreamError(
            f"{NODE}: {name} evaluates the model {statistics.steps} times in {steps} steps; calibrate with a "
            "sampler that does so once per step, such as euler or dpmpp_2m."
        )
    progress("solving schedules")
    search = Search(statistics, recipe.predictor, values, _growth(job, recorded))
    size = _size(job.model, recorded.finals)
    if wish.schedule == ECAD:
        return _blocks_profile(job, wish, recorded, search, progress)
    points = frontier(search, size)
    found = _candidates(search, wish)
    checked = _check(job, wish, found, recorded.finals, recipe, search, progress) if wish.check > 1 else {}
    chosen = max(found, key=lambda c: checked[c.keys][0]) if checked else found[0]
    sigmas = values
    if wish.schedule == STEP_COEFFICIENT:
        sigmas = adjusted_sigmas(values, step_coefficients(statistics, chosen.keys))
    even = next((c for c in checked if c == search.keys("even", len(chosen.keys))), None)
    point = _point(chosen, size)
    if checked:
        # What was sampled tells how far the expected errors are off; that holds for the rest of the frontier too.
        off = sorted(checked[c.keys][1] * size / c.error for c in found if c.keys in checked and c.error)
        scale = off[len(off) // 2] if off else 1.0
        point, *points = (dataclasses.replace(p, error=p.error * scale) for p in (point, *points))
    return Profile(
        chosen.keys,
        sigmas,
        statistics,
        fingerprint(job.model),
        recipe.level,
        described(recipe.predictor),
        _about(job, recorded)
        | {
            "schedule": chosen.schedule,
            "predicted_drift": chosen.drift,
            "predicted_error": point.error,
            "predicted_gain_over_even_spacing": _ratio(
                search.result_error(search.keys("even", len(chosen.keys))), chosen.error
            ),
            "checked": [
                {"schedule": c.schedule, "psnr_db": checked[c.keys][0], "error": checked[c.keys][1]}
                for c in found if c.keys in checked
            ],
            "measured_error": checked[chosen.keys][1] if checked else None,
            "measured_gain_over_even_spacing_db": checked[chosen.keys][0] - checked[even][0] if even else None,
        },
        tuple(points),
        recorded.extras,
    )  # fmt: skip


def _growth(job: Job, recorded: Recorded) -> tuple[float, ...]:
    """Growth of disturbances at every step: as measured, or that of Gaussian data where nothing could be measured."""
    steps = len(job.sigmas) - 1
    if recorded.growth:
        return interpolated(recorded.growth, steps)
    flow = isinstance(job.model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    return gaussian_jacobians([float(s) for s in job.sigmas], 1.0, flow)


def _checked(job: Job, wish: Wish) -> Recipe:
    """The recipe of the job's plan. Raises SlipstreamError for what cannot be calibrated."""
    steps = len(job.sigmas) - 1
    if steps < FEWEST_STEPS:
        raise SlipstreamError(f"{NODE}: {steps} steps leave nothing to skip; use at least {FEWEST_STEPS}.")
    if wish.goal not in GOALS:
        raise SlipstreamError(f"{NODE}: there is no goal '{wish.goal}'; choose one of {', '.join(GOALS)}.")
    if wish.schedule not in CHOICES:
        raise SlipstreamError(f"{NODE}: there is no schedule '{wish.schedule}'; choose one of {', '.join(CHOICES)}.")
    if wish.goal == "speed-up" and not 1.0 <= wish.speed_up <= steps / 2:
        raise SlipstreamError(
            f"{NODE}: speed_up is {wish.speed_up:g}, but for {steps} steps it must be between 1 and {steps / 2:g}; "
            "try 2.5."
        )
    if wish.goal == "max drift" and not 0.0 < wish.max_drift <= 1.0:
        raise SlipstreamError(
            f"{NODE}: max_drift is {wish.max_drift:g}, but it must be above 0 and at most 1; try 0.05."
        )
    traits = sampler_traits(job.sampler)
    if traits.unserved:
        raise SlipstreamError(f"{NODE}: {traits.name} cannot be served, {traits.unserved}; choose another sampler.")
    plan = plan_of(job.model)
    row = architecture_of(job.model.get_model_object("diffusion_model"))
    cache = None if plan.cache is None else dataclasses.replace(plan.cache, profile="")
    recipe = resolve(Plan(cache, plan.predictor), traits, row, tuple(float(s) for s in job.sigmas))
    if recipe.refusal:
        raise SlipstreamError(f"{NODE}: {recipe.refusal}.")
    if recipe.predictor.order > HIGHEST_ORDER or recipe.predictor.anchors > HIGHEST_ORDER + 1:
        raise SlipstreamError(
            f"{NODE}: {recipe.kind} of order {recipe.predictor.order} has too many snapshots to solve for; "
            f"choose Taylor of order 1 or {HIGHEST_ORDER}."
        )
    if wish.schedule == ECAD:
        trouble = lacks(EACH, row) or missing()
        if not trouble and len(job.runs) < FEWEST_ECAD_RUNS:
            trouble = f"ECAD's search is checked on a run it has not seen; set runs to at least {FEWEST_ECAD_RUNS}"
        if trouble:
            raise SlipstreamError(f"{NODE}: {trouble}.")
    if wish.schedule == STEP_COEFFICIENT and recipe.predictor.order:
        raise SlipstreamError(
            f"{NODE}: ERTACache's step coefficient is for reuse, and there is a Taylor Predictor before this node; "
            "remove it, or choose another schedule."
        )
    return recipe


# -- ECAD ------------------------------------------------------------------------------------------------------------


def _blocks_profile(job: Job, wish: Wish, recorded: Recorded, search: Search, progress: Progress) -> Profile:
    """The block schedule that ECAD's search finds on all runs but the last, chosen by its error on the last."""
    network = job.model.get_model_object("diffusion_model")
    row = architecture_of(network)
    sizes = block_sizes(network, row)
    values = tuple(float(s) for s in job.sigmas)
    steps, held_out = len(values) - 1, len(job.runs) - 1
    count = 0

    def profile_of(blocks: Tensor, about: dict | None = None) -> Profile:
        keys = tuple(i for i in range(steps) if bool(blocks[i].all()))
        return Profile(keys, values, recorded.statistics, fingerprint(job.model), EACH, "", about or {},
                       extras={**recorded.extras, BLOCKS: blocks})  # fmt: skip

    def error_of(blocks: Tensor, runs: Sequence[int] = range(held_out)) -> float:
        nonlocal count
        count += 1
        model = _following(job.model, profile_of(blocks))
        callback = progress(f"ECAD: sampling {count} of about {wish.ecad_runs}")
        return sum(relative_error(job.sample(model, r, callback), recorded.finals[r]) for r in runs) / len(runs)

    found = evolve(error_of, steps, sizes, max(1, wish.ecad_runs // held_out), seed=job.runs[0][1])
    if wish.goal == "speed-up":
        limit = 1.0 / wish.speed_up
        near = sorted(found, key=lambda g: abs(g.cost - limit))[:FRONT]
    else:
        near = sorted(found, key=lambda g: abs(g.error - wish.max_drift))[:FRONT]
    tried = [dataclasses.replace(g, held_out=error_of(g.blocks, [held_out])) for g in near]
    chosen = _chosen(tried, wish)
    even = search.keys("even", max(2, round(chosen.cost * steps)))
    about = _about(job, recorded) | {
        "schedule": "ECAD",
        "blocks": len(sizes),
        "cost": chosen.cost,
        "samplings": count,
        "front": [[g.cost, g.error, g.held_out] for g in sorted(tried, key=lambda g: g.cost)],
        "predicted_error": chosen.error,
        "measured_error": chosen.held_out,
        "overfitted": chosen.held_out / chosen.error if chosen.error else 1.0,
        "whole_steps_error": search.result_error(even) / _size(job.model, recorded.finals),
    }
    return profile_of(chosen.blocks, about)


def _chosen(tried: Sequence[Genome], wish: Wish) -> Genome:
    """The least held-out error within the cost, or the least cost within the error; else the nearest to it."""
    if wish.goal == "speed-up":
        within = [g for g in tried if g.cost <= 1.0 / wish.speed_up]
        return min(within, key=lambda g: g.held_out) if within else min(tried, key=lambda g: g.cost)
    within = [g for g in tried if g.held_out <= wish.max_drift]
    return min(within, key=lambda g: g.cost) if within else min(tried, key=lambda g: g.held_out)


def _about(job: Job, recorded: Recorded) -> dict:
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


# -- choosing --------------------------------------------------------------------------------------------------------


def frontier(search: Search, size: float) -> tuple[Point, ...]:
    """The schedule expected to be best for a range of numbers of computed steps. size: RMS of the final latents."""
    steps = search.statistics.steps
    low, high = max(2, math.ceil(FEWEST_SHARE * steps)), max(3, round(MOST_SHARE * steps))
    stride = max(1, math.ceil((high - low + 1) / POINTS))
    return tuple(_point(_interruptible(search, count)[0], size) for count in range(low, high + 1, stride))


def _interruptible(search: Search, count: int, schedules: Sequence[str] = SCHEDULES) -> list[Candidate]:
    comfy.model_management.throw_exception_if_processing_interrupted()
    return search.candidates(count, schedules)


def _point(candidate: Candidate, size: float) -> Point:
    return Point(candidate.keys, candidate.schedule, candidate.drift, candidate.error / size)


def _candidates(search: Search, wish: Wish) -> list[Candidate]:
    """The schedules that meet the goal, the one expected to be best first. Raises SlipstreamError where none does."""
    steps = search.statistics.steps
    only = {BEST: SCHEDULES, STEP_COEFFICIENT: ("ERTACache",)}.get(wish.schedule, (wish.schedule,))
    if wish.goal == "speed-up":
        found = _interruptible(search, max(2, round(steps / wish.speed_up)), only)
        if not found:
            raise SlipstreamError(
                f"{NODE}: no threshold of {only[0]} computes {round(steps / wish.speed_up)} of {steps} steps; change "
                "speed_up a little, or choose another schedule."
            )
        return found
    for count in range(2, steps):
        found = [c for c in _interruptible(search, count, only) if c.drift <= wish.max_drift]
        if found:
            return found
    raise SlipstreamError(
        f"{NODE}: no schedule keeps the drift within {wish.max_drift:g}; try {2 * wish.max_drift:g}, or a "
        "Taylor Predictor before this node."
    )


def _check(
    job: Job, wish: Wish, found: list[Candidate], finals: list[Tensor], recipe: Recipe, search: Search,
    progress: Progress,
) -> dict[tuple[int, ...], tuple[float, float]]:  # fmt: skip
    """{keys: (mean PSNR in dB, mean relative error)} of the first few candidates against the full runs, all sampled.

    Even spacing is always among them, for the comparison that the node shows.
    """
    tried = found[: wish.check]
    if len(tried) < 2:
        return {}
    even = search.keys("even", len(found[0].keys))
    allowed = wish.goal == "speed-up" or search.drift(even) <= wish.max_drift
    if allowed and wish.schedule == BEST and even not in [c.keys for c in tried]:
        tried = [*tried[: wish.check - 1], search.candidate("even", even)]
        found[:] = [*tried, *(c for c in found if c not in tried)]
    scores = {}
    for number, candidate in enumerate(tried, 1):
        profile = Profile(
            candidate.keys, tuple(float(s) for s in job.sigmas), search.statistics, fingerprint(job.model),
            recipe.level, described(recipe.predictor),
        )  # fmt: skip
        model = _following(job.model, profile)
        results = []
        for run, final in enumerate(finals):
            what = f"checking schedule {number} of {len(tried)}, run {run + 1} of {len(finals)}"
            result = job.sample(model, run, progress(what))
            results.append((min(psnr(result, final), 200.0), relative_error(result, final)))
        scores[candidate.keys] = tuple(sum(column) / len(results) for column in zip(*results, strict=True))
    found[:] = [c for c in found if c.keys in scores]
    return scores


def _following(model, profile: Profile):
    """The model with its own plan and a profile that is in no file."""
    plan = plan_of(model)
    cache = dataclasses.replace(plan.cache or CacheConfig(), preset="Balanced", node_id="", profile="(calibration)",
                                drift_budget=1.0, start_percent=0.0, end_percent=1.0)  # fmt: skip
    clone = model.clone()
    clone.set_attachments(PROFILE, profile)
    return with_plan(clone, Plan(cache, _nameless(plan)))


def _size(model, finals: list[Tensor]) -> float:
    """RMS of the final latents in the model's own units, in which errors are predicted."""
    whole = [model.model.process_latent_in(final).float() for final in finals]
    return math.sqrt(sum(float(t.square().mean()) for t in whole) / len(whole)) or 1.0


def _ratio(value: float, over: float) -> float:
    return value / over if over else 1.0


def summary(profile: Profile) -> str:
    """What the node shows: the steps computed and what their schedule is expected to leave."""
    about, count = profile.about, len(profile.keys)
    if profile.blocks is not None:
        return (
            f"computes {100 * about['cost']:.0f} % of the blocks, {count} of {profile.steps} steps in full (ECAD),\n"
            f"the picture off by {100 * about['measured_error']:.1f} % on a run the search had not seen,\n"
            f"{about['overfitted']:.1f} times as much as on those it had\n"
            f"(whole steps at that cost: {100 * about['whole_steps_error']:.1f} % expected)\n"
            f"{about['blocks']} blocks of {about['family']}, {about['samplings']} samplings"
        )
    lines = [
        f"computes {count} of {profile.steps} steps of {about['sampler']} ({about['schedule']}),",
        f"the others expected to be off by {100 * about['predicted_drift']:.1f} %,",
    ]
    gain = about.get("measured_gain_over_even_spacing_db")
    if gain is None:
        lines.append(
            f"{about['predicted_gain_over_even_spacing']:.1f} times nearer than evenly spaced steps (expected)"
        )
    else:
        lines.append(f"the picture by {100 * about['measured_error']:.1f} %, {gain:+.1f} dB over evenly spaced steps")
    lines.append(f"{profile.site}, {profile.predictor}, {about['family']}")
    lines.append(f"steps {' '.join(map(str, profile.keys))}")
    return "\n".join(lines)
