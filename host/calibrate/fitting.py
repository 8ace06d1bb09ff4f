"""Fits the Error Compensator's coefficients: reference runs are stored, fast runs are led through them again, and only
what helps on runs it was not fitted on is kept.

Reference and fast model are never asked together, but for the target LOCAL: a trajectory of the reference is n latents
and n slopes, in RAM. The fit is sequential: at every step a fast run is corrected with what all runs so far say of that
step, so each step is fitted on the states that the corrected steps before it lead to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import comfy.model_sampling
import torch
from torch import Tensor

from ...engine.calibration.profile import Profile
from ...engine.calibration.recorder import SAMPLE
from ...engine.correction.corrections import as_extras
from ...engine.correction.correctors import (
    CUMULATIVE,
    EVIDENT_DB,
    LOCAL,
    METHODS,
    MIXED,
    TEACHER,
    Corrector,
    Moments,
    Terms,
    corrected,
    stacked,
    wanted,
)
from ...engine.metrics import psnr
from ...engine.run.plan import LARGE_MODEL, UNCACHED, CompensatorConfig, Plan
from ...engine.run.samplers import sampler_traits
from ...quant.formats import FORMATS, INT8
from ...quant.linear import W4A4Linear
from ..model import plan_of, with_plan
from ..parts import FIT, put_on
from .job import Job, Tell, silent
from .recording import following

# What `auto` tries (bench compensation: memory is what serves a cache, a cumulative target what serves rounding),
# and how much of a correction it tries beside the whole.
TRIED = ("cumulative", "with memory")
SHRUNK = 0.5

# Single pictures differ by less than this where nothing was gained.
CERTAIN_DB = 1.0


@dataclass
class Trajectory:
    """What a reference run does: latent and slope before every step, on the CPU; its residuals' products. `take` is
    called by the compensator for every evaluation and gives the slope to go on with."""

    quantised: bool = False
    states: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)

    def take(self, now, age: int, x: Tensor, slope: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        true = ask() if self.quantised else slope
        self.states.append(x.detach().to("cpu", torch.float32, copy=True))
        self.slopes.append(true.detach().to("cpu", torch.float32, copy=True))
        if self.quantised:
            self.residuals.append((true - slope).detach().to("cpu", torch.float32, copy=True))
        return true

    def gram(self) -> Tensor | None:
        """[n, n] mean products of reference - fast of two steps; None for a model that is not quantised."""
        if not self.residuals:
            return None
        rows = torch.stack([r.flatten()[:: max(1, r.numel() // SAMPLE)] for r in self.residuals]).double()
        return rows @ rows.T / rows.shape[1]


@dataclass
class Follow:
    """A fast run that is corrected and, with `learn`, learned from on the way: into `moments`, from which theta comes
    unless it is given."""

    terms: Terms
    reference: Trajectory
    sigmas: Sequence[float]
    moments: Moments | None = None
    theta: Tensor | None = None
    learn: bool = True
    ages: list[int] = field(default_factory=list)
    _previous: Tensor | None = None

    def take(self, now, age: int, x: Tensor, slope: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        if not self.ages:  # a switch may give this model its turn after the first steps
            self.ages += [0] * round(now.u)
        step = len(self.ages)
        self.ages.append(age)
        terms = self.terms
        if self.learn:
            true = ask() if terms.target == LOCAL else self.reference.slopes[step].to(slope)
            debt = self.reference.states[step].to(x) - x if terms.target in (CUMULATIVE, MIXED) else None
            length = self.sigmas[step + 1] - self.sigmas[step]
            want = wanted(terms.target, true, slope, debt, length, len(self.sigmas) - 1 - step)
            if self.moments is None:
                channels = slope.shape[1]
                self.moments = Moments.empty(len(self.sigmas) - 1, channels, terms.width(channels))
            self.moments.add(step, stacked(terms, slope, x, self._previous), want)
        if terms.target == TEACHER and self.learn:
            self._previous = true
            return true
        theta = self.moments.theta(terms, step) if self.theta is None else self.theta[step]
        self._previous = corrected(terms, theta, slope, x, self._previous)
        return self._previous


class Plain:
    """A run with anchors, if its plan has some, and no coefficients."""

    def take(self, now, age: int, x: Tensor, slope: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        return slope


@dataclass(frozen=True)
class Fitted:
    """What the fit found. about, extras: as the profile holds them; tried: {terms: dB over none, on unseen runs}."""

    about: dict
    extras: dict[str, Tensor]
    tried: dict[str, float]


def watched(model, fit, config: CompensatorConfig | None, cached: bool = True):
    """The model with a fit in the place of coefficients; without its cache where it is to be the reference."""
    plan = plan_of(model)
    own = dataclasses.replace(config or CompensatorConfig(anchors=0), node_id="", profile="none", strength=1.0)
    if not _of_weights(own):
        own = dataclasses.replace(own, anchors=0)
    plan = dataclasses.replace(plan, compensator=own) if cached else Plan(compensator=own)
    clone = with_plan(model, plan)
    put_on(clone, FIT, fit)
    return clone


def references(job: Job, quantised: bool, tell: Tell = silent) -> tuple[list[Trajectory], list[Tensor]]:
    """The reference's trajectory and final latent of every run of the job."""
    found, finals = [], []
    for run in range(len(job.runs)):
        trajectory = Trajectory(quantised=quantised)
        model = watched(job.model, trajectory, None, cached=False)
        finals.append(job.sample(model, run, tell(f"reference run {run + 1} of {len(job.runs)}", job.steps)))
        found.append(trajectory)
    return found, finals


def coefficients(
    job: Job,
    fast,
    known: Sequence[Trajectory],
    terms: Terms,
    runs: Sequence[int],
    config: CompensatorConfig | None = None,
    tell: Tell = silent,
) -> tuple[Tensor, Moments, list[int]]:
    """(theta [n, C, P], the moments it is from, the age of every step) of these runs, one after the other."""
    moments, ages, sigmas = None, [], job.values
    for run in runs:
        follow = Follow(terms, known[run], sigmas, moments)
        job.sample(watched(fast, follow, config), run, tell(f"fitting the correction, run {run + 1}", job.steps))
        moments, ages = follow.moments, follow.ages
    steps = len(sigmas) - 1
    return torch.stack([moments.theta(terms, step) for step in range(steps)]), moments, ages + [0] * (steps - len(ages))


def fit(
    job: Job,
    fast,
    quantised: bool,
    config: CompensatorConfig | None = None,
    tried: Sequence[str] = TRIED,
    tell: Tell = silent,
    known: tuple[list[Trajectory], list[Tensor]] | None = None,
) -> Fitted:
    """Fit on the first two thirds of the job's runs, score on the rest.

    job.model: the reference, whose quantised layers are replaced by their better copies; fast: the same model with the
    cache as it will be used; config: the plan's compensator, whose anchors take part; known: what `references` gave.
    """
    sigmas, count = job.values, len(job.runs)
    held = list(range(count))[-max(1, count // 3) :] if count > 1 else []
    seen = [run for run in range(count) if run not in held]
    trajectories, finals = known or references(job, quantised, tell)
    grams = [t.gram() for t in trajectories]
    residuals = torch.stack(grams).mean(0) if all(gram is not None for gram in grams) else None

    def sampled(follow, run: int, what: str) -> Tensor:
        return job.sample(watched(fast, follow, config), run, tell(what, job.steps))

    def scores(follow_of: Callable[[int], object], what: str) -> list[float]:
        found = []
        for run in held:
            result = sampled(follow_of(run), run, what)
            found += [min(psnr(a, b), 200.0) for a, b in zip(result, finals[run], strict=True)]
        return found

    traits = sampler_traits(job.sampler)
    about = {"terms": "", "gain_db": 0.0, "stochastic": traits.stochastic, "runs": count,
             "anchored": quantised and config is not None and config.anchors != 0 and _of_weights(config)}  # fmt: skip
    if not held:
        about["why"] = "the calibration had one run, so nothing could be tested; use 3 or more"
        return Fitted(about, as_extras(None, None, residuals), {})
    plain = scores(lambda run: Plain(), "testing without correction")
    best, gains, table = 0.0, {}, None
    for name in tried:
        terms = METHODS[name]
        theta, moments, ages = coefficients(job, fast, trajectories, terms, seen, config, tell)
        gated = _gated(theta, terms, trajectories, sigmas, held, lambda f, r, n=name: sampled(f, r, f"testing '{n}'"))
        # all steps, those alone that gain by themselves, and both carefully
        for kept in (theta, gated, SHRUNK * theta):

            def follow_of(run: int, kept=kept, terms=terms) -> Follow:
                return Follow(terms, trajectories[run], sigmas, None, kept, learn=False)

            gain, sure = _evidence(scores(follow_of, f"testing '{name}'"), plain)
            gains[name] = max(gains.get(name, -math.inf), gain)
            if sure and gain > max(best, EVIDENT_DB):
                best, table = gain, (name, kept, moments, ages)
    if table is None:
        most = max(gains.values(), default=0.0)
        about["why"] = f"no correction: on runs it had not seen the best one gained {most:+.2f} dB, below {EVIDENT_DB}"
        return Fitted(about, as_extras(None, None, residuals), gains)
    name, theta, moments, ages = table
    off = [step for step in range(len(ages)) if not bool((theta[step] != 0).any())]
    about |= {"terms": name, "gain_db": best, "ages": ages, "steps_off": off, "tried": gains}
    Corrector(METHODS[name], theta, tuple(ages))  # raises what a reader would refuse
    return Fitted(about, as_extras(theta, moments, residuals), gains)


def _gated(theta: Tensor, terms: Terms, trajectories, sigmas, held, sampled) -> Tensor:
    """theta without the steps that bring unseen runs less than EVIDENT_DB nearer to what they should have been."""
    moments = None
    for run in held:
        follow = Follow(terms, trajectories[run], sigmas, moments, theta)
        sampled(follow, run)
        moments = follow.moments
    kept = theta.clone()
    for step in range(len(theta)):
        if moments.gain_db(step, theta[step]) < EVIDENT_DB:
            kept[step] = 0.0
    return kept


def _evidence(values: Sequence[float], base: Sequence[float]) -> tuple[float, bool]:
    """(mean gain in dB, whether it is more than twice its standard error, or of one picture more than CERTAIN_DB)."""
    gains = [v - b for v, b in zip(values, base, strict=True)]
    mean = sum(gains) / len(gains)
    if len(gains) < 2:
        return mean, mean > CERTAIN_DB
    variance = sum((g - mean) ** 2 for g in gains) / (len(gains) - 1)
    return mean, mean > 2 * math.sqrt(variance / len(gains))


def with_correction(job: Job, profile: Profile, growth: Sequence[float], tell: Tell = silent) -> Profile:
    """The profile with a correction fitted for its schedule, or with the reason why it has none.

    The Error Compensator before Calibrate says how many anchors take part; without one, as many as its `auto` takes.
    """
    config = plan_of(job.model).compensator or CompensatorConfig()
    quantised = _has_better_weights(job.model)
    tried = TRIED if config.terms in ("auto", "off") else (config.terms,)
    found = fit(job, following(job.model, profile), quantised, config, tried, tell)
    flow = isinstance(job.model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    about = found.about | {"growth": list(growth), "flow": flow}
    return dataclasses.replace(
        profile, about=profile.about | {"correction": about}, extras=profile.extras | found.extras
    )


def _of_weights(config: CompensatorConfig) -> bool:
    """Whether its anchors take part in a fit: those of better weights do, at evaluations that are computed anyway."""
    return config.reference not in (LARGE_MODEL, UNCACHED)


def _has_better_weights(model) -> bool:
    """Whether layers of fewer than 8 bit were put in the places of others, which can be asked."""
    placed = (layer for layer in model.object_patches.values() if isinstance(layer, W4A4Linear))
    return any(FORMATS[layer.format].weight_bits < INT8.weight_bits for layer in placed)
