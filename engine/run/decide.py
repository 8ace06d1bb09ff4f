"""Whether an evaluation is filled: functions of what is given and of what the run has seen."""

from __future__ import annotations

from collections.abc import Sequence

from ..forecast.predictors import SAME_TIME, Predictor
from ..forecast.schedules import Probe, Trace
from ..metrics import worst_relative_l1
from ..sites.calls import Keys, Parts
from .evaluation import FIRST, LAST, SCHEDULE, Evaluation, Open
from .given import Given
from .recipe import MAX_SKIP
from .streams import Streams

# Distilled models: at 4 steps each one matters; up to 8 one reuse is the most that does no visible harm.
NEVER_SKIP_STEPS = 4
ONE_SKIP_STEPS = 8


def why_nothing(given: Given) -> str:
    """The sentence that says why this run will skip nothing; empty where it may."""
    if given.recipe.refusal:
        return f"nothing is skipped: {given.recipe.refusal}"
    if given.schedule is None:
        return "nothing is skipped: the drift budget is 0"
    if given.sampler.unserved:
        return f"nothing is skipped: {given.sampler.name} cannot be served, {given.sampler.unserved}"
    if not given.clock.decreasing:
        return "nothing is skipped: the sigmas of this run are not a falling schedule"
    if given.clock.steps <= NEVER_SKIP_STEPS:
        return f"nothing is skipped: at {given.clock.steps} steps every one of them counts"
    return ""


def decide(given: Given, trace: Trace, evaluations: Sequence[Evaluation], u: float, sigma: float) -> tuple[bool, str]:
    """(whether the evaluation at u, of noise level sigma, may be filled, why), in a run that may skip at all.

    evaluations: those before it.
    """
    schedule, predictor, steps = given.schedule, given.predictor, given.clock.steps
    assert schedule is not None  # `why_nothing` has said so
    start, end = given.window
    if u >= steps - 1 - SAME_TIME:
        return False, LAST
    if sigma > start or sigma < end:
        return False, "outside start and end percent"
    # One more than the order needs, so that a forecast was measured once.
    if trace.computed < (1 if schedule.trusted else predictor.needed + 1):
        return False, FIRST
    if not schedule.spaced and u - trace.times[-1] > (given.cache.max_skip or MAX_SKIP) + SAME_TIME:
        return False, "max skip"
    if steps <= ONE_SKIP_STEPS and any(e.fill for e in evaluations):
        return False, f"at {steps} steps one is skipped at most"
    order = predictor.weights(trace.times, u)[1]
    if order == 0 < predictor.order and not schedule.trusted:
        return False, "too far ahead for a forecast"
    if not schedule.skip(trace, u, order):
        return False, SCHEDULE
    return True, "within budget"


def certain_fills(given: Given, trace: Trace, evaluations: Sequence[Evaluation], step: int) -> list[int]:
    """The steps right after `step` that will be filled whatever happens until then."""
    if given.schedule is None or not given.schedule.certain or given.clock.steps <= ONE_SKIP_STEPS:
        return []
    ahead = []
    for later in range(step + 1, given.clock.steps):
        if not decide(given, trace, evaluations, float(later), given.clock.sigmas[later])[0]:
            break
        ahead.append(later)
    return ahead


def grid_step(u: float) -> int | None:
    """The step that u is; None between the steps."""
    step = round(u)
    return step if abs(u - step) < SAME_TIME else None


def gate(given: Given, trace: Trace, streams: Streams, opened: Open, keys: Keys, probes: list[Parts] | None) -> None:
    """Let the probe decide: the cond that the host evaluates first decides for all, its worst row counts.

    The first alone, because the host puts the same one first whether it evaluates them in one call or in several.
    """
    schedule = given.schedule
    assert schedule is not None
    now, kind = opened.now, schedule.probe
    # what TeaCache looks at begins with the batch in every family
    dim = given.recipe.batch_dim if kind in (Probe.RESIDUAL, Probe.FORECAST) else 0
    change = None
    if not opened.gated and probes:
        history = streams.probes.get(keys[0])
        if history is not None and len(history):
            if kind is Probe.FORECAST:
                reference = history.forecast(now.u, Predictor("newton", schedule.order))[0]
            else:
                reference = history.newest
            if [t.shape for t in reference] == [t.shape for t in probes[0]]:
                change = worst_relative_l1(probes[0], reference, dim)
    if kind in (Probe.MODULATED, Probe.EMBEDDING):
        streams.see(now.u, keys, probes or [])
    if opened.gated:
        return
    opened.gated = True
    if change is None:
        if now.fill:
            now.compute("nothing to compare the first block with")
    elif not schedule.accept(trace, float(change)) and now.fill:
        now.compute("the first block changed")
