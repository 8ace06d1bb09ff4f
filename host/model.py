"""Puts plans on the host's ModelPatcher, and opens a run when one of its samplers starts."""

from __future__ import annotations

import dataclasses
import logging

import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy.patcher_extension import CallbacksMP

from ..engine.calibration.profile import Profile
from ..engine.errors import SlipstreamError
from ..engine.families import Architecture, architecture_of
from ..engine.run.clock import Clock
from ..engine.run.given import Given
from ..engine.run.plan import CacheConfig, CompensatorConfig, Plan, PredictorConfig, check_cache
from ..engine.run.recipe import described, lacks, level_of, resolve
from ..engine.run.run import Run
from ..engine.run.samplers import Sampler, sampler_traits
from ..engine.sites.calls import PatchedForward, own_forwards
from ..engine.sites.inner import INNER
from ..engine.sites.stack import Blocks
from .allocations import unrecorded
from .attach import attach, watching
from .canvas import events
from .compensate.compensator import compensator_of
from .conflicts import refuse_other_cache
from .gauge import Gauge
from .memory import Memory
from .parts import FIT, PROFILE, RECORDER, RUN, part_of, put_on
from .profiles import folder as profiles
from .quantise.precision import precision_of

log = logging.getLogger("slipstream")

# Under which the host keeps the model's copies on further cards (MultiGPU CFG Split).
COPIES = "multigpu"

# What a plan without cache and predictor runs with: everything is computed and counted.
_NO_CACHE = check_cache(CacheConfig(preset="Off"))

# With the profile `auto`: how much of the error expected of a profile's own steps each preset allows.
RELAXED = {"Safe": 0.5, "Balanced": 1.0, "Fast": 2.0}


def plan_of(model) -> Plan:
    """The plan on a ModelPatcher; an empty one where no Slipstream node was used."""
    return model.get_attachment(RUN) or Plan()


def with_plan(model, plan: Plan):
    """A clone of the ModelPatcher that carries this plan. The model given is left as it was."""
    clone = model.clone()
    for key, forward in _patched_forwards(clone, plan).items():
        clone.add_object_patch(key, forward)
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLONE, RUN)
    clone.add_callback_with_key(CallbacksMP.ON_CLONE, RUN, own_forwards)
    put_on(clone, RUN, plan, sample_with_plan)
    return clone


def _network(patcher):
    return patcher.get_model_object("diffusion_model")


def _profile(patcher, plan: Plan) -> Profile | None:
    """The profile that the plan names, read from its file. Raises SlipstreamError."""
    handed = patcher.get_attachment(PROFILE)
    if handed is not None or plan.cache is None or plan.cache.profile in ("", profiles.AUTO):
        return handed
    return profiles.load(plan.cache.profile)


def _decided(
    patcher, plan: Plan, sampler: Sampler, row: Architecture, sigmas: tuple[float, ...]
) -> tuple[Plan, Profile | None]:
    """The plan with a profile's name in the place of `auto`, and that profile; none where none fits or the user chose
    every value. A profile found so is of the site the plan would use without it, so its patches are there."""
    cache = plan.cache
    if cache is None or cache.profile != profiles.AUTO:
        return plan, _profile(patcher, plan)
    plan = dataclasses.replace(plan, cache=dataclasses.replace(cache, profile=""))
    if cache.preset not in RELAXED or sampler.stochastic or not profiles.files():
        return plan, None
    recipe = resolve(plan, sampler, row, sigmas)
    model = profiles.fingerprint(patcher)
    name, found = profiles.fitting(model, described(recipe.predictor), recipe.level, sampler.name, sigmas)
    if found is None:
        return plan, None
    return dataclasses.replace(plan, cache=dataclasses.replace(cache, profile=name)), found.relaxed(
        RELAXED[cache.preset]
    )


def _patched_forwards(patcher, plan: Plan) -> dict[str, PatchedForward]:
    """The object patches that this plan's site needs on this model; none that are there already."""
    network = _network(patcher)
    row = architecture_of(network)
    level = level_of(plan.cache or CacheConfig(), plan.predictor, row, _profile(patcher, plan))
    if lacks(level, row) or level not in INNER:
        return {}
    patches = INNER[level].patches(patcher, network, row)
    return {key: forward for key, forward in patches.items() if not isinstance(forward.original, PatchedForward)}


def with_part(model, node: str, config: CacheConfig | PredictorConfig | CompensatorConfig):
    """A clone of the model with this node's part added to its plan. Raises SlipstreamError."""
    part, plan = part_of(config), plan_of(model)
    assert part.check is not None
    config = part.check(config)
    if getattr(plan, part.entry) is not None:
        raise SlipstreamError(f"{node}: this model already went through a {node}; remove one of the two.")
    refuse_other_cache(node, model.model_options, model.wrappers)
    return with_plan(model, dataclasses.replace(plan, **{part.entry: config}))


def add_cache(model, config: CacheConfig):
    """A clone of the model with the Cache Loader's part added. Raises SlipstreamError."""
    return with_part(model, "Cache Loader", config)


def add_predictor(model, config: PredictorConfig):
    """A clone of the model with the Taylor Predictor's part added. Raises SlipstreamError."""
    return with_part(model, "Taylor Predictor", config)


def add_compensator(model, config: CompensatorConfig):
    """A clone of the model with the Error Compensator's part added. Raises SlipstreamError."""
    return with_part(model, "Error Compensator", config)


def sample_with_plan(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: the host's sampling with the plan of its model; everything is freed whatever happens."""
    guider = executor.class_obj
    run = open_run(guider, args, kwargs)
    original = guider.model_options
    try:
        guider.model_options = comfy.model_patcher.create_model_options_clone(original)
        network = _network(guider.model_patcher)
        attach(run, guider, network)
        gauge = Gauge(guider.model_patcher.load_device)
        with gauge, watching(run, network), unrecorded(not run.steady):
            result = executor(*args, **kwargs)
    except BaseException:
        log.info("Slipstream: stopped after %d evaluations", len(run.evaluations))
        raise
    else:
        events.finished(run, run.report() | gauge.reading())
        return result
    finally:
        guider.model_options = original
        run.close()


def open_run(guider, args: tuple, kwargs: dict) -> Run:
    """The run for this sampling, from the guider's model and the arguments of its `outer_sample`."""
    sampler = kwargs["sampler"] if "sampler" in kwargs else args[2]
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    patcher = guider.model_patcher
    plan = plan_of(patcher)
    alone = plan.cache is None and plan.predictor is None and plan.compensator is not None
    node = "Cache Loader" if plan.cache is not None else "Error Compensator" if alone else "Taylor Predictor"
    refuse_other_cache(node, guider.model_options, {})
    clock = Clock(tuple(float(s) for s in sigmas))
    sampling = patcher.get_model_object("model_sampling")
    network, traits = _network(patcher), sampler_traits(sampler)
    row = architecture_of(network)
    if alone:
        plan = dataclasses.replace(plan, cache=_NO_CACHE)
    plan, profile = _decided(patcher, plan, traits, row, clock.sigmas)
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    recipe = resolve(
        plan, traits, row, clock.sigmas,
        # A flow model's schedule already spends its steps where they count; a noise prediction's error is weighted.
        weights=() if flow else clock.weights(),
        profile=profile, model="" if profile is None else profiles.fingerprint(patcher),
        blocks=len(Blocks(network, row)),
    )  # fmt: skip
    cache = recipe.cache
    given = Given(
        plan=plan, clock=clock, sampler=traits, recipe=recipe,
        window=tuple(float(sampling.percent_to_sigma(p)) for p in (cache.start_percent, cache.end_percent)),
        percent_to_sigma=sampling.percent_to_sigma,
        timestep_of=lambda sigma: float(sampling.timestep(torch.tensor([sigma]))),
        model=type(patcher.model).__name__, precision=precision_of(patcher),
        expected_drift=None if profile is None else profile.about.get("predicted_drift"),
    )  # fmt: skip
    memory = Memory(cache.cache_device, cache.memory_budget_mb)
    run = Run(given, memory, patcher.get_attachment(RECORDER), events.evaluation)
    if alone:
        run.note = "there is no Cache Loader, so every step is computed"
    elif not run.note and recipe.schedule.probe is not None and patcher.get_additional_models_with_key(COPIES):
        run.note = (
            f"nothing is skipped: the {recipe.method} lets one prompt decide for all, and on several GPUs the "
            "prompts are evaluated at the same time; choose the drift budget"
        )
    run.compensator = compensator_of(plan, patcher, clock, traits, flow, profile, patcher.get_attachment(FIT))
    return run
