"""The Error Compensator of one run: anchors, and the coefficients of a calibration, on the slope after CFG.

It acts on what the guider returns, so cond and uncond have been mixed; decisions are the same for both in a run, so
nothing is lost by that and any sampler is served. A change of conditioning or shape voids what an anchor has measured.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from torch import Tensor

from ...engine.calibration.profile import Profile, ProfileError
from ...engine.correction.anchors import DECAY, Carried, placed
from ...engine.correction.corrections import Correction, correction_of
from ...engine.correction.correctors import corrected
from ...engine.errors import SlipstreamError
from ...engine.forecast.predictors import SAME_TIME
from ...engine.run.clock import Clock
from ...engine.run.evaluation import Evaluation
from ...engine.run.plan import UNCACHED, CompensatorConfig, Plan
from ...engine.run.samplers import Sampler
from ...engine.sites.calls import ASKING
from ..gauge import clocked
from ..profiles import folder as profiles
from ..switch.segments import TURN
from .reference import BetterWeights, Reference, reference_of

NODE = "Error Compensator"


class Compensator:
    """Corrects the denoised prediction of every evaluation of one run. All tensors are freed by `close`.

    patcher: of the run, loaded when the first evaluation comes; fit: what a calibration puts in the place of the
    coefficients, see `host/calibrate/fitting.py`.
    """

    def __init__(
        self,
        config: CompensatorConfig,
        patcher,
        clock: Clock,
        sampler: Sampler,
        flow: bool,
        found: Correction | None = None,
        remark: str = "",
        fit=None,
    ):
        self.config, self.clock, self.sampler, self.flow, self.fit = config, clock, sampler, flow, fit
        self.found, self.remark = found, remark
        self.carried = Carried(DECAY)
        self.anchors: tuple[int, ...] = ()
        self.taken: list[float] = []
        self.anchor_seconds = self.correction_seconds = 0.0
        self.reference: Reference | None = None
        self.corrected_steps = 0
        self._patcher = patcher
        self._asking: Reference | None = None
        self._previous: Tensor | None = None
        self._unable = "no evaluation was filled by a cache" if config.reference == UNCACHED else ""
        self._sizes: list[tuple[Evaluation, Tensor]] = []
        self._account: dict | None = None

    # -- while it runs -------------------------------------------------------------------------------------------

    def correct(
        self, evaluations: Sequence[Evaluation], executor, args: tuple, kwargs: dict, denoised: Tensor
    ) -> Tensor:
        """The corrected prediction of the newest evaluation, or the one given, untouched, where there is nothing to
        correct. executor: makes the same evaluation again."""
        now = evaluations[-1]
        if self.reference is None:
            self._open()
        x, sigma = args[0], args[1].clamp_min(1e-6).reshape(-1, *[1] * (args[0].ndim - 1))
        if x.shape != denoised.shape or float(args[1].reshape(-1)[0]) <= 0.0:
            return denoised
        asked = self._is_anchor(now)
        began = clocked(x.device) if asked else time.perf_counter()
        if not asked and self.carried.residual is None and self.found is None and self.fit is None:
            return denoised
        slope = (x - denoised) / sigma
        strength, better = self.config.strength, slope
        if asked:
            true = self.ask(executor, args, kwargs, x, sigma)
            ended = clocked(x.device)
            self.anchor_seconds += ended - began
            began = ended
            self.carried.take(now.u, true - slope)
            self.taken.append(now.u)
            now.anchor = True
            better = slope + strength * (true - slope) if strength < 1.0 else true
        elif self.reference.of_fills and now.action == "computed":
            self.carried.clear()  # the fills that follow start from this one
        else:
            carried = self.carried.at(now.u, slope)
            if carried is not None:
                better = slope + strength * carried
        if self.fit is not None:
            better = self.fit.take(
                now, _age(evaluations), x, better, lambda: self.ask(executor, args, kwargs, x, sigma)
            )
        elif self.found is not None:
            better = self._offline(now, _age(evaluations), x, better)
        self._previous = better
        if better is slope:
            return denoised
        self._sizes.append((now, (better - slope).norm() / slope.norm().clamp_min(1e-30)))
        self.correction_seconds += time.perf_counter() - began
        return x - sigma * better

    def ask(self, executor, args: tuple, kwargs: dict, x: Tensor, sigma: Tensor) -> Tensor:
        """The slope of the reference at this evaluation."""
        self._asking = self.reference
        try:
            return (x - self.reference.asked(lambda: executor(*args, **kwargs))) / sigma
        finally:
            self._asking = None

    def within(self, wrapper):
        """An APPLY_MODEL wrapper that computes with what is asked for, also in a thread of the host's own."""

        def applied(executor, *args, **kwargs):
            token = ASKING.set(self._asking)
            try:
                return wrapper(executor, *args, **kwargs)
            finally:
                ASKING.reset(token)

        return applied

    def _open(self) -> None:
        """Look at the model, which is loaded now, and place the anchors."""
        self.reference = reference_of(self._patcher, self.config.reference)
        self.carried.decay = self.reference.decay
        self._patcher = None
        self._place()
        if self.found is not None and self.found.corrector is not None:
            fitted = bool(self.found.about.get("anchored"))
            if bool(self.anchors) != (fitted and isinstance(self.reference, BetterWeights)):
                self.found = None
                self._say(f"the profile's terms were fitted {'with' if fitted else 'without'} anchors, so they are off")

    def _place(self) -> None:
        turn = TURN.get()
        first, last = (0, self.clock.steps) if turn is None else (turn.first, turn.last)
        steps = last - first
        wanted = self.config.anchors
        if not wanted:
            return
        if self.reference.why_not:
            # who asks for anchors, or has a quantised model, is told; on others `auto` is simply none
            if wanted > 0 or self.reference.expected:
                self._say(f"no anchors: {self.reference.why_not}")
            return
        wanted = wanted if wanted > 0 else self.reference.anchors(self.clock.steps, steps)
        if not wanted:
            self._say(f"no anchors at {steps} steps, each would cost more than a tenth")
            return
        if not self.clock.decreasing:
            self._say("no anchors: the sigmas of this run are not a falling schedule")
            return
        sigmas = self.clock.sigmas[first : last + 1]
        solved = None if self.found is None else self.found.anchors_for(sigmas, wanted)
        self.anchors = tuple(first + step for step in solved or placed(sigmas, wanted, self.flow))

    def _say(self, sentence: str) -> None:
        self.remark = "; ".join(filter(None, (self.remark, sentence)))

    def _is_anchor(self, now: Evaluation) -> bool:
        """Whether an anchor is due and this evaluation can be it."""
        due = sum(now.u >= anchor - SAME_TIME for anchor in self.anchors)
        if due <= len(self.taken) or (now.action != "computed") != self.reference.of_fills:
            return False
        self._unable = self.reference.unable()
        if self._unable:
            return False
        missed = due - len(self.taken) - 1
        self.taken += [now.u] * missed  # steps that were filled when their anchor was due: one serves for all
        return True

    def _offline(self, now: Evaluation, age: int, x: Tensor, slope: Tensor) -> Tensor:
        theta = self.found.at(now.sigma, age)
        if theta is None or x.ndim < 3 or theta.shape[0] != x.shape[1]:
            return slope
        self.corrected_steps += 1
        previous = self._previous
        if previous is None or previous.shape != slope.shape:
            previous = None
        return corrected(self.found.corrector.terms, theta, slope, x, previous, self.config.strength)

    def forget(self) -> None:
        """The conditioning has changed: what was measured under the other one is void."""
        self.carried.clear()
        self._previous = None

    # -- afterwards ----------------------------------------------------------------------------------------------

    def report(self) -> dict:
        """What was done, as plain data; the sizes of the corrections go to their evaluations."""
        for evaluation, size in self._sizes:
            evaluation.correction = float(size)
        sizes = [evaluation.correction for evaluation, _ in self._sizes]
        self._sizes.clear()
        if self._account is not None and not sizes:
            return self._account
        reference = self.reference
        found = self.found
        self._account = {
            "anchors": sorted(set(self.taken)),
            "anchor_seconds": self.anchor_seconds,
            "seconds": self.correction_seconds,
            "reference": reference.kind if reference is not None and self.taken else "",
            "reference_bytes": reference.nbytes if reference is not None else 0,
            "reference_where": reference.where if reference is not None else "",
            "reference_seconds": reference.seconds if reference is not None else 0.0,
            "bytes": self.carried.nbytes,
            "correction_mean": sum(sizes) / len(sizes) if sizes else None,
            "terms": found.name if found is not None and self.corrected_steps else "",
            "steps_corrected": self.corrected_steps,
            "predicted_gain_db": found.gain_db if found is not None and self.corrected_steps else None,
            "remark": "; ".join(filter(None, (self.remark, self._none_taken()))),
        }
        return self._account

    def _none_taken(self) -> str:
        return f"no anchors: {self._unable}" if self.anchors and not self.taken and self._unable else ""

    def words(self) -> str:
        """The account in one line, for the node."""
        told = self.report()
        parts = []
        if told["anchors"]:
            made = f" (of it {told['reference_seconds']:.1f} s once)" if told["reference_seconds"] > 0.1 else ""
            held, where = told["reference_bytes"], told["reference_where"]
            memory = f", {held / 1e6:.0f} MB {where}" if held else ""
            parts.append(
                f"{len(told['anchors'])} anchors on the {told['reference']}: "
                f"{told['anchor_seconds']:.2f} s{made}{memory}"
            )
        if told["terms"]:
            gain = told["predicted_gain_db"]
            expected = f", {gain:+.1f} dB expected" if gain is not None else ""
            parts.append(f"'{told['terms']}' at {told['steps_corrected']} evaluations{expected}")
        if told["correction_mean"] is not None:
            parts.append(f"corrected by {100 * told['correction_mean']:.1f} % on average")
        if told["remark"]:
            parts.append(told["remark"])
        return "; ".join(parts) or "nothing to correct: neither anchors nor a profile"

    def close(self) -> None:
        """Free every tensor."""
        self.forget()
        self._sizes.clear()
        self._patcher = self.fit = None
        if self.reference is not None:
            self.reference.close()


def _age(evaluations: Sequence[Evaluation]) -> int:
    """Steps since the newest computed evaluation; 0 where the newest one is."""
    now = evaluations[-1]
    last = next((e.u for e in reversed(evaluations) if e.action == "computed"), now.u)
    return 0 if now.action == "computed" else max(1, round(now.u - last))


def compensator_of(
    plan: Plan, patcher, clock: Clock, sampler: Sampler, flow: bool, profile: Profile | None, fit=None
) -> Compensator | None:
    """The compensator that a plan asks for; None where it asks for none or for nothing.

    profile: the Cache Loader's, read. Raises SlipstreamError for a profile that cannot be read, only where the user
    named it.
    """
    config = plan.compensator
    if config is None or config.strength == 0.0:
        return None
    found, remark = None, ""
    if config.profile != profiles.NONE and config.terms != "off" and fit is None:
        found, remark = _found(config, plan, patcher, clock, sampler, profile)
    if config.anchors == 0 and found is None and fit is None and not remark:
        return None
    return Compensator(config, patcher, clock, sampler, flow, found, remark, fit)


def _found(
    config: CompensatorConfig, plan: Plan, patcher, clock: Clock, sampler: Sampler, profile: Profile | None
) -> tuple[Correction | None, str]:
    """(the correction of the plan's profile, why there is none or what to know about it)."""
    named, run_profile = config.profile != profiles.AUTO, profile
    if named:
        profile = profiles.load(config.profile, NODE)
    elif plan.cache is not None and plan.cache.profile not in ("", profiles.AUTO, profiles.HANDED):
        profile = profiles.load(plan.cache.profile, NODE)  # `auto` gives it without its further statistics
    if profile is None:
        return None, ""
    try:
        found = correction_of(profile)
        if found is not None:
            profile.rows_for(clock.sigmas)
    except (ProfileError, ValueError) as error:
        return None, f"the profile's correction does not fit: {error}"
    if found is None:
        why = f"the profile {config.profile} holds no correction; calibrate again with correction_statistics on"
        return None, why if named else ""
    if config.terms not in ("auto", found.name):
        raise SlipstreamError(
            f"{NODE}: the profile has the terms '{found.name or 'none'}', not '{config.terms}'; choose auto, or "
            "calibrate for those."
        )
    if profile.model and profile.model != profiles.fingerprint(patcher):
        return None, "the profile's correction was fitted on another model"
    why = found.about.get("why", "") if not found.name else _unfit(found, profile, plan, run_profile, clock, sampler)
    if why:
        # where anchors go is known all the same
        found = dataclasses.replace(found, name="", corrector=None) if found.solvable else None
    return found, why


def _unfit(
    found: Correction, own: Profile, plan: Plan, run_profile: Profile | None, clock: Clock, sampler: Sampler
) -> str:
    """Why the terms do not serve this run; empty where they do. own: whose they are; run_profile: the cache's."""
    fitted_with = own.about.get("sampler", "")
    idle = plan.cache is not None and plan.cache.drift_budget == 0.0
    followed = run_profile is not None and run_profile.keys == own.keys
    if sampler.stochastic != bool(found.about.get("stochastic")):
        return f"the profile's terms were fitted with {fitted_with} and do not serve {sampler.name}"
    if not (followed if any(found.corrector.ages) else idle):
        return "the profile's terms were fitted for other computed steps; use it in the Cache Loader too, as Balanced"
    remembers = "previous" in found.corrector.terms.features
    if remembers and (clock.steps != own.steps or sampler.name != fitted_with):
        return f"the profile's terms look back one step, so they serve {own.steps} steps of {fitted_with} only"
    return ""
