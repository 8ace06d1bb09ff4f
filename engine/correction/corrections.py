"""The correction that a profile holds: coefficients, what they gained on unseen runs, and where anchors go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.choice import error_effects, gaussian_jacobians
from ..calibration.profile import Profile, ProfileError
from .anchors import solved
from .correctors import METHODS, Corrector, Moments

PREFIX = "correction/"
THETA, RESIDUALS = PREFIX + "theta", PREFIX + "residuals"
MOMENTS = {name: PREFIX + name for name in ("gram", "right", "energy", "count")}


@dataclass(frozen=True, eq=False)
class Correction:
    """name: of the terms, "" where none was evident; gain_db: on runs that the fit had not seen; residuals: [n, n] mean
    products of reference - fast, for `anchors_for`; about: what else the calibration noted."""

    name: str
    corrector: Corrector | None
    gain_db: float
    profile: Profile
    residuals: Tensor | None = None
    about: dict = field(default_factory=dict)

    @property
    def solvable(self) -> bool:
        """Whether anchors can be placed by what was measured."""
        return self.residuals is not None

    def at(self, sigma: float, age: int) -> Tensor | None:
        """The coefficients at this sigma for an evaluation of this age, or None."""
        if self.corrector is None:
            return None
        return self.corrector.at(self.profile.time_of(sigma), age)

    def anchors_for(self, sigmas: Sequence[float], count: int) -> tuple[int, ...] | None:
        """The best steps of a run over these sigmas for `count` anchors; None where the rule is better.

        That is where nothing was measured, and for flow models, whose early errors decide more than first-order growth
        says: there the rule was 1.6 dB better, on noise predictions 0.4 dB worse (`docs/compensation.md`).
        """
        if self.residuals is None or self.about.get("flow"):
            return None
        own, growth = self.profile.sigmas, self.about.get("growth")
        jacobians = gaussian_jacobians(own, 1.0, False)
        if isinstance(growth, list) and len(growth) == len(own) - 1:
            jacobians = tuple(float(g) for g in growth)
        rows = self.profile.rows_for(sigmas)
        effects = error_effects(tuple(sigmas), [jacobians[row] for row in rows])
        return solved(self.residuals[rows][:, rows], effects, count)


def correction_of(profile: Profile) -> Correction | None:
    """What a profile says about correction; None where it says nothing. Raises ProfileError for what makes no sense."""
    about, theta = profile.about.get("correction"), profile.extras.get(THETA)
    residuals = profile.extras.get(RESIDUALS)
    if not isinstance(about, dict):
        return None
    if residuals is not None and residuals.shape != (profile.steps, profile.steps):
        raise ProfileError("its residuals are not a square table with a row per step")
    name, gain = str(about.get("terms", "")), about.get("gain_db", 0.0)
    if isinstance(gain, bool) or not isinstance(gain, int | float):
        raise ProfileError("the gain of its correction is not a number")
    if not name or theta is None:
        return Correction("", None, 0.0, profile, residuals, about)
    ages = about.get("ages")
    if name not in METHODS or not isinstance(ages, list) or len(ages) != profile.steps:
        raise ProfileError("its correction is of terms that this version does not know")
    if any(isinstance(age, bool) or not isinstance(age, int) for age in ages):
        raise ProfileError("the ages of its correction are not whole numbers")
    try:
        corrector = Corrector(METHODS[name], theta, tuple(ages))
    except ValueError as error:
        raise ProfileError(str(error)) from None
    return Correction(name, corrector, float(gain), profile, residuals, about)


def as_extras(theta: Tensor | None, moments: Moments | None, residuals: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a correction as a profile holds them. Sums become means, which float32 holds."""
    extras = {}
    if theta is not None:
        extras[THETA] = theta.float()
    if moments is not None:
        count = moments.count.clamp_min(1)
        for name, key in MOMENTS.items():
            value = getattr(moments, name)
            shaped = count.reshape(-1, *[1] * (value.ndim - 1))
            extras[key] = (value if name == "count" else value / shaped).float()
    if residuals is not None:
        extras[RESIDUALS] = residuals.float()
    return extras


def moments_of(profile: Profile) -> Moments | None:
    """The inverse of `as_extras` for the moments, to be added to those of other runs."""
    if any(key not in profile.extras for key in MOMENTS.values()):
        return None
    tables = {name: profile.extras[key].double() for name, key in MOMENTS.items()}
    count = tables["count"]
    for name in ("gram", "right", "energy"):
        tables[name] = tables[name] * count.reshape(-1, *[1] * (tables[name].ndim - 1))
    return Moments(*(tables[name] for name in ("gram", "right", "energy", "count")))


def merged(first: Profile, second: Profile, name: str) -> Tensor:
    """The coefficients [n, C, P] of the terms `name` from both profiles' moments together. Raises ProfileError."""
    one, other = moments_of(first), moments_of(second)
    if first.sigmas != second.sigmas or one is None or other is None:
        raise ProfileError("only corrections measured over one schedule can be merged")
    try:
        both = one + other
    except ValueError as error:
        raise ProfileError(str(error)) from None
    return torch.stack([both.theta(METHODS[name], step) for step in range(first.steps)])
