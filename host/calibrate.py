"""Calibrate: one full run of the user's own sampling, from whose statistics a schedule for it is solved."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import comfy.model_sampling
import comfy.sample

from ..engine.calibration import Recorder
from ..engine.profile import Profile
from ..engine.search import error_gains, forecast_aware, predicted_error, uniform
from ..engine.statistics import Statistics
from .architectures import architecture_of
from .errors import SlipstreamError
from .patcher import RECORDER, plan_of, with_plan
from .plan import CacheConfig, Plan
from .profiles import fingerprint
from .recipe import described, resolve
from .sampling import sampler_traits

NODE = "Calibrate"
FEWEST_STEPS = 5

# Above this order the exact programme takes too long for a node.
HIGHEST_ORDER = 2


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the frontier: so many computed steps are expected to leave this mean drift of the filled ones."""

    count: int
    keys: tuple[int, ...]
    drift: float


def record(
    model, positive, negative, cfg: float, sampler, sigmas, latent: dict, seed: int, callback=None
) -> Statistics:
    """Statistics of one full run of `model` at its plan's site; nothing is skipped and nothing stays on the model."""
    recorder = Recorder(seed=0)
    plan = plan_of(model)
    cache = plan.cache or CacheConfig()
    # Inside an empty part of the sampling every evaluation is stored and none is filled.
    full = dataclasses.replace(
        cache, preset="Custom", method="interval", drift_budget=1.0, start_percent=0.999, end_percent=1.0, max_skip=1,
        profile="", node_id="",
    )  # fmt: skip
    # Without node ids: this run is nobody's picture, so it leaves no text on the nodes before it.
    predictor = None if plan.predictor is None else dataclasses.replace(plan.predictor, node_id="")
    watched = with_plan(model, Plan(full, predictor))
    watched.set_attachments(RECORDER, recorder)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    comfy.sample.sample_custom(
        watched, noise, cfg, sampler, sigmas, positive, negative, samples, noise_mask=latent.get("noise_mask"),
        callback=callback, disable_pbar=True, seed=seed,
    )  # fmt: skip
    try:
        return recorder.statistics()
    except ValueError as error:
        raise SlipstreamError(f"{NODE}: {error}.") from None


def frontier(statistics: Statistics, predictor, weights, counts) -> list[Point]:
    """The best schedule for every number of computed steps, with the mean relative drift of its filled steps."""
    size = math.sqrt(float(statistics.gram.diagonal().mean()))
    points = []
    for count in counts:
        keys = forecast_aware(statistics, count, predictor, weights).keys
        filled = statistics.steps - len(keys)
        drift = predicted_error(statistics, keys, predictor) / math.sqrt(filled) / size if filled else 0.0
        points.append(Point(count, keys, drift))
    return points


def calibrate(
    model, positive, negative, cfg: float, sampler, sigmas, latent: dict, seed: int, speed_up: float, callback=None
) -> Profile:
    """A profile for this sampling that computes one step in `speed_up`. Raises SlipstreamError.

    model: with or without Slipstream nodes before it; its Taylor Predictor is the one the schedule is solved for.
    """
    values = tuple(float(s) for s in sigmas)
    steps = len(values) - 1
    if steps < FEWEST_STEPS:
        raise SlipstreamError(f"{NODE}: {steps} steps leave nothing to skip; use at least {FEWEST_STEPS}.")
    if not 1.0 <= speed_up <= steps / 2:
        raise SlipstreamError(
            f"{NODE}: speed_up is {speed_up:g}, but for {steps} steps it must be between 1 and {steps / 2:g}; try 2.5."
        )
    traits = sampler_traits(sampler)
    if traits.unserved:
        raise SlipstreamError(f"{NODE}: {traits.name} cannot be served, {traits.unserved}; choose another sampler.")
    plan = plan_of(model)
    row = architecture_of(model.get_model_object("diffusion_model"))
    recipe = resolve(Plan(None if plan.cache is None else dataclasses.replace(plan.cache, profile=""), plan.predictor),
                     traits, row, values)  # fmt: skip
    if recipe.refusal:
        raise SlipstreamError(f"{NODE}: {recipe.refusal}.")
    if recipe.predictor.order > HIGHEST_ORDER or recipe.predictor.anchors > HIGHEST_ORDER + 1:
        raise SlipstreamError(
            f"{NODE}: {recipe.kind} of order {recipe.predictor.order} has too many snapshots to solve for; "
            f"choose Taylor of order 1 or {HIGHEST_ORDER}."
        )
    statistics = record(model, positive, negative, cfg, sampler, sigmas, latent, seed, callback)
    if statistics.steps != steps:
        raise SlipstreamError(
            f"{NODE}: {traits.name} evaluates the model {statistics.steps} times in {steps} steps; calibrate with a "
            "sampler that does so once per step, such as euler or dpmpp_2m."
        )
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    gains = error_gains(values, 1.0, flow)
    (point,) = frontier(statistics, recipe.predictor, gains, [max(2, round(steps / speed_up))])
    even = predicted_error(statistics, uniform(steps, point.count), recipe.predictor, gains)
    solved = predicted_error(statistics, point.keys, recipe.predictor, gains)
    return Profile(
        point.keys,
        values,
        statistics,
        fingerprint(model),
        recipe.level,
        described(recipe.predictor),
        {
            "sampler": traits.name,
            "steps": steps,
            "cfg": cfg,
            "latent": list(latent["samples"].shape),
            "family": row.name,
            "predicted_drift": point.drift,
            "predicted_gain_over_even_spacing": even / solved if solved else 1.0,
        },
    )


def summary(profile: Profile) -> str:
    """What the node shows: the steps computed and what their schedule is expected to leave."""
    about, count = profile.about, len(profile.keys)
    return (
        f"computes {count} of {profile.steps} steps of {about['sampler']},\n"
        f"the others expected to be off by {100 * about['predicted_drift']:.1f} %,\n"
        f"{about['predicted_gain_over_even_spacing']:.1f} times nearer than evenly spaced steps\n"
        f"{profile.site}, {profile.predictor}, {about['family']}\n"
        f"steps {' '.join(map(str, profile.keys))}"
    )
