"""Calibrate: full runs of the user's own sampling, from whose statistics every schedule for it is solved and one is
chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
from torch import Tensor

from ...engine.calibration.choice import SCHEDULES, Candidate, Search, evident
from ...engine.calibration.profile import Point, Profile
from ...engine.calibration.search import adjusted_sigmas, step_coefficients
from ...engine.errors import SlipstreamError
from ...engine.families import architecture_of
from ...engine.metrics import psnr, relative_error
from ...engine.run.plan import Plan
from ...engine.run.recipe import Recipe, described, resolve
from ...engine.run.samplers import sampler_traits
from ..model import plan_of
from ..profiles.folder import fingerprint
from .block_search import search_blocks, trouble
from .fitting import with_correction
from .job import BEST, CHOICES, ECAD, GOALS, NODE, STEP_COEFFICIENT, Job, Tell, Wish, silent
from .recording import about, following, growth_of, record, size_of

FEWEST_STEPS = 5

# Above this order the exact programme takes too long for a node.
HIGHEST_ORDER = 2

# Numbers of computed steps on the frontier, at most, and the part of the steps they come from. Chosen: more points draw
# the same curve, and outside of this part a schedule gains nothing or keeps no picture.
POINTS, FEWEST_SHARE, MOST_SHARE = 16, 0.18, 0.75


@dataclass(frozen=True, slots=True)
class Score:
    """A schedule as it was sampled: PSNR of each run against the full one, mean relative error."""

    each_db: tuple[float, ...]
    error: float

    @property
    def db(self) -> float:
        return sum(self.each_db) / len(self.each_db)


def calibrate(job: Job, wish: Wish | None = None, tell: Tell = silent) -> Profile:
    """A profile for this sampling. Raises SlipstreamError.

    job.model: with or without Slipstream nodes before it; its Taylor Predictor is the one the schedule is solved for.
    """
    wish = wish or Wish()
    recipe = _checked(job, wish)
    values = job.values
    steps = len(values) - 1
    recorded = record(job, wish, tell)
    statistics = recorded.statistics
    name = sampler_traits(job.sampler).name
    if statistics.steps != steps:
        raise SlipstreamError(
            f"{NODE}: {name} evaluates the model {statistics.steps} times in {steps} steps; calibrate with a "
            "sampler that does so once per step, such as euler or dpmpp_2m."
        )
    tell("solving schedules", job.steps)
    growth = growth_of(job, recorded)
    search = Search(statistics, recipe.predictor, values, growth)
    size = size_of(job.model, recorded.finals)
    if wish.schedule == ECAD:
        return search_blocks(job, wish, recorded, search, tell)
    points = frontier(search, size)
    found = _candidates(search, wish)
    checked = _check(job, wish, found, recorded.finals, recipe, search, tell) if wish.check > 1 else {}
    chosen = found[evident([checked[c.keys].each_db for c in found])] if checked else found[0]
    sigmas = values
    if wish.schedule == STEP_COEFFICIENT:
        sigmas = adjusted_sigmas(values, step_coefficients(statistics, chosen.keys))
    even = next((c for c in checked if c == search.keys("even", len(chosen.keys))), None)
    point = _point(chosen, size)
    if checked:
        # What was sampled tells how far the expected errors are off; that holds for the rest of the frontier too.
        off = sorted(checked[c.keys].error * size / c.error for c in found if c.error)
        scale = off[len(off) // 2] if off else 1.0
        point, *points = (dataclasses.replace(p, error=p.error * scale) for p in (point, *points))
    profile = Profile(
        chosen.keys,
        sigmas,
        statistics,
        fingerprint(job.model),
        recipe.level,
        described(recipe.predictor),
        about(job, recorded)
        | {
            "schedule": chosen.schedule,
            "predicted_drift": chosen.drift,
            "predicted_error": point.error,
            "predicted_gain_over_even_spacing": _ratio(
                search.result_error(search.keys("even", len(chosen.keys))), chosen.error
            ),
            "checked": [
                {"schedule": c.schedule, "psnr_db": checked[c.keys].db, "error": checked[c.keys].error}
                for c in found
                if c.keys in checked
            ],
            "measured_error": checked[chosen.keys].error if checked else None,
            "measured_gain_over_even_spacing_db": checked[chosen.keys].db - checked[even].db if even else None,
        },
        tuple(points),
        recorded.extras,
    )  # fmt: skip
    return with_correction(job, profile, growth, tell) if wish.correction else profile


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
    recipe = resolve(Plan(cache, plan.predictor), traits, row, job.values)
    if recipe.refusal:
        raise SlipstreamError(f"{NODE}: {recipe.refusal}.")
    if recipe.predictor.order > HIGHEST_ORDER or recipe.predictor.anchors > HIGHEST_ORDER + 1:
        raise SlipstreamError(
            f"{NODE}: {recipe.kind} of order {recipe.predictor.order} has too many snapshots to solve for; "
            f"choose Taylor of order 1 or {HIGHEST_ORDER}."
        )
    if wish.schedule == ECAD and (why := trouble(job, row)):
        raise SlipstreamError(f"{NODE}: {why}.")
    if wish.schedule == STEP_COEFFICIENT and recipe.predictor.order:
        raise SlipstreamError(
            f"{NODE}: ERTACache's step coefficient is for reuse, and there is a Taylor Predictor before this node; "
            "remove it, or choose another schedule."
        )
    return recipe


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
    tell: Tell,
) -> dict[tuple[int, ...], Score]:  # fmt: skip
    """How near the first few candidates come to the full runs when they are sampled, by key steps.

    Even spacing is always among them, for the comparison that the node shows; `found` is cut down to them.
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
            candidate.keys, job.values, search.statistics, fingerprint(job.model),
            recipe.level, described(recipe.predictor),
        )  # fmt: skip
        model = following(job.model, profile)
        results = []
        for run, final in enumerate(finals):
            what = f"checking schedule {number} of {len(tried)}, run {run + 1} of {len(finals)}"
            result = job.sample(model, run, tell(what, job.steps))
            results.append((min(psnr(result, final), 200.0), relative_error(result, final)))
        each, errors = zip(*results, strict=True)
        scores[candidate.keys] = Score(each, sum(errors) / len(errors))
    found[:] = [c for c in found if c.keys in scores]
    return scores


def _ratio(value: float, over: float) -> float:
    return value / over if over else 1.0


def summary(profile: Profile) -> str:
    """What the node shows: the steps computed and what their schedule is expected to leave."""
    told, count = profile.about, len(profile.keys)
    if profile.blocks is not None:
        return (
            f"computes {100 * told['cost']:.0f} % of the blocks, {count} of {profile.steps} steps in full (ECAD),\n"
            f"the picture off by {100 * told['measured_error']:.1f} % on a run the search had not seen,\n"
            f"{told['overfitted']:.1f} times as much as on those it had\n"
            f"(whole steps at that cost: {100 * told['whole_steps_error']:.1f} % expected)\n"
            f"{told['blocks']} blocks of {told['family']}, {told['samplings']} samplings"
        )
    lines = [
        f"computes {count} of {profile.steps} steps of {told['sampler']} ({told['schedule']}),",
        f"the others expected to be off by {100 * told['predicted_drift']:.1f} %,",
    ]
    gain = told.get("measured_gain_over_even_spacing_db")
    if gain is None:
        lines.append(f"{told['predicted_gain_over_even_spacing']:.1f} times nearer than evenly spaced steps (expected)")
    else:
        lines.append(f"the picture by {100 * told['measured_error']:.1f} %, {gain:+.1f} dB over evenly spaced steps")
    lines.append(f"{profile.site}, {profile.predictor}, {told['family']}")
    lines.append(f"steps {' '.join(map(str, profile.keys))}")
    found = told.get("correction")
    if found is not None:
        kept = f"correction '{found['terms']}': {found['gain_db']:+.1f} dB on runs it was not fitted on"
        lines.append(kept if found["terms"] else found["why"])
    return "\n".join(lines)
