"""One corrector of the sampler's slope, of which the published ones are rows, and its least squares.

Everything that makes a model faster (rounding, reuse, forecasts, a smaller model) replaces the slope of the sampler's
equation, d = (x - D(x, sigma)) / sigma, by d + e. D is the host's `denoised`, so d is the velocity of a flow model, the
noise of an eps model, and the same thing for v and EDM: who corrects d needs to know nothing of the parametrisation.
The corrector is linear per step and channel,

    d~ = d + strength * sum_j theta_j phi_j,        phi from FEATURES, theta = 0 is "no correction",

and `docs/compensation.md` derives which theta serves: an error at one step is carried on by the following ones, so the
theta that is best for a step is not the one that is best for the picture. What theta is fitted to is its target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# slope: d itself; state: x; one: a constant; previous: the corrected slope of the step before; channels: the slopes of
# all channels, so that one may lean on another.
FEATURES = ("slope", "state", "one", "previous", "channels")

# teacher: the fast model is asked on the reference's own trajectory; local: on its own corrected one, and wanted is the
# reference at the same state; cumulative: what brings it back onto the reference's trajectory within this step; mixed:
# the same over the next HORIZON steps.
TEACHER, LOCAL, CUMULATIVE, MIXED = TARGETS = ("teacher", "local", "cumulative", "mixed")
HORIZON = 4

# Relative ridge of the least squares, toward no correction (prototype: between 1e-4 and 1e-2 nothing changes).
RIDGE = 1e-3

# Most that a correction may be, relative to the slope itself, row by row: a fit that wants more has met something else
# than it was made for.
LARGEST = 0.5

# A term or a step that gains less than this on runs it was not fitted on is switched off.
EVIDENT_DB = 0.2


@dataclass(frozen=True, slots=True)
class Terms:
    """What a corrector is made of. features: names of FEATURES; target: of TARGETS; shared: one theta for all channels;
    own_bias: but a constant for each."""

    features: tuple[str, ...]
    target: str
    shared: bool = False
    own_bias: bool = False

    def __post_init__(self) -> None:
        if not self.features or set(self.features) - set(FEATURES) or len(set(self.features)) < len(self.features):
            raise ValueError(f"a corrector has some of {', '.join(FEATURES)}, each once, not {self.features}")
        if self.target not in TARGETS:
            raise ValueError(f"there is no target {self.target}; there are {', '.join(TARGETS)}")

    def width(self, channels: int) -> int:
        """Number P of coefficients of one channel."""
        return len(self.features) + ("channels" in self.features) * (channels - 1)


# The published methods, as corrections of the slope, and what was found to be better than they are.
METHODS: dict[str, Terms] = {
    # e = k d + bias, arXiv 2305.10657: one gain, a bias per channel of the whole error; its variance: `lab/noise.py`
    "PTQD": Terms(("slope", "one"), TEACHER, shared=True, own_bias=True),
    # noise estimation reconstruction and input bias, arXiv 2407.03917
    "TAC-Diffusion": Terms(("slope", "one"), TEACHER),
    # step factor on dt, which is a factor on d, arXiv 2508.21091
    "ERTACache factor": Terms(("slope",), TEACHER, shared=True),
    # residual linearisation of the same: one affine map
    "ERTACache": Terms(("slope", "one"), TEACHER, shared=True),
    # decoupled error correction, arXiv 2503.01323: for a cached feature and for a quantised one the same form
    "CacheQuant": Terms(("slope", "one"), TEACHER),
    # channel scale with the error carried along, arXiv 2508.12094 (abstract; derived from the propagation equation)
    "TCEC": Terms(("slope",), CUMULATIVE),
    "local": Terms(("slope", "state", "one"), LOCAL),
    "cumulative": Terms(("slope", "state", "one"), CUMULATIVE),
    "mixed": Terms(("slope", "state", "one"), MIXED),
    "with memory": Terms(("slope", "state", "one", "previous"), MIXED),
    "across channels": Terms(("channels", "state", "one"), CUMULATIVE),
}


def rows_of(value: Tensor) -> Tensor:
    """[B, C, ...] as [C, M] in float32: all places of all pictures, channel by channel."""
    return value.float().movedim(1, 0).flatten(1)


def stacked(terms: Terms, slope: Tensor, state: Tensor, previous: Tensor | None) -> Tensor:
    """The features as rows [C, P, M]. slope, state, previous: [B, C, ...]; no previous counts as the slope."""
    d = rows_of(slope)
    made = {"slope": lambda: d, "state": lambda: rows_of(state), "one": lambda: torch.ones_like(d),
            "previous": lambda: d if previous is None else rows_of(previous)}  # fmt: skip
    columns = []
    for name in terms.features:
        if name == "channels":
            columns += [row.expand_as(d) for row in d]
        else:
            columns.append(made[name]())
    return torch.stack(columns, 1)


def corrected(
    terms: Terms, theta: Tensor, slope: Tensor, state: Tensor, previous: Tensor | None = None, strength: float = 1.0
) -> Tensor:
    """The slope with its correction, a new tensor in the slope's dtype.

    theta: [C, P], P as `Terms.width`; slope, state: [B, C, ...]. No row is changed by more than LARGEST of its norm.
    """
    shape = (1, -1, *[1] * (slope.ndim - 2))
    wide, place = slope.float(), 0
    change = torch.zeros_like(wide)
    theta = theta.to(wide)
    for name in terms.features:
        if name == "channels":
            span = theta[:, place : place + slope.shape[1]]
            change += torch.einsum("cd,bd...->bc...", span, wide)
            place += slope.shape[1]
            continue
        weight = theta[:, place].reshape(shape)
        if name == "one":
            change += weight
        else:
            value = {"slope": wide, "state": state, "previous": wide if previous is None else previous}[name]
            change += weight * value.float()
        place += 1
    return (wide + limited(change, wide).mul_(strength)).to(slope.dtype)


def limited(change: Tensor, slope: Tensor, largest: float = LARGEST) -> Tensor:
    """`change`, [B, ...], shortened in the rows where it is longer than `largest` of the slope."""
    size, allowed = change.flatten(1).norm(dim=1), largest * slope.flatten(1).norm(dim=1)
    factor = (allowed / size.clamp_min(1e-30)).clamp_max(1.0)
    return change * factor.reshape(-1, *[1] * (change.ndim - 1))


def wanted(target: str, reference: Tensor, slope: Tensor, debt: Tensor | None, step: float, left: int = 1) -> Tensor:
    """What the correction should have been: target - d.

    reference: the slope of the reference model, for LOCAL at the same state, else on its own trajectory; debt: x_ref -
    x before the step, for CUMULATIVE and MIXED; step: sigma_{i+1} - sigma_i, negative; left: steps to the end. With one
    step of Euler, x + step * (d + wanted) is x_ref at the next sigma for CUMULATIVE.
    """
    change = reference - slope
    if target in (TEACHER, LOCAL) or debt is None or not step:
        return change
    return change + debt / (step * (min(HORIZON, left) if target == MIXED else 1))


@dataclass
class Moments:
    """Sums from which theta follows, added to as a run goes; two runs' merge by adding.

    gram [n, C, P, P], right [n, C, P], energy [n, C]: sums over places of phi phi^T, phi w, w^2 with w what was wanted;
    count [n]: places. All float64.
    """

    gram: Tensor
    right: Tensor
    energy: Tensor
    count: Tensor

    @classmethod
    def empty(cls, steps: int, channels: int, width: int) -> Moments:
        shapes = (steps, channels, width, width), (steps, channels, width), (steps, channels), (steps,)
        return cls(*(torch.zeros(s, dtype=torch.float64) for s in shapes))

    def add(self, step: int, features: Tensor, want: Tensor) -> None:
        """Take in one evaluation: features [C, P, M] and what was wanted, [B, C, ...] or [C, M]."""
        rows = want if want.ndim == 2 else rows_of(want)
        rows, features = rows.double().cpu(), features.double().cpu()
        self.gram[step] += features @ features.mT
        self.right[step] += (features @ rows[..., None])[..., 0]
        self.energy[step] += rows.square().sum(1)
        self.count[step] += rows.shape[1]

    def __add__(self, other: Moments) -> Moments:
        if self.gram.shape != other.gram.shape:
            raise ValueError(f"moments of {tuple(self.gram.shape)} and {tuple(other.gram.shape)} cannot be merged")
        return Moments(*(getattr(self, n) + getattr(other, n) for n in ("gram", "right", "energy", "count")))

    def theta(self, terms: Terms, step: int, ridge: float = RIDGE) -> Tensor:
        """The correction [C, P] of one step, float32: least squares with a ridge, zeros where nothing was seen."""
        gram, right = self.gram[step], self.right[step]
        if not self.count[step]:
            return torch.zeros_like(right, dtype=torch.float32)
        if terms.shared:
            gram, right = gram.sum(0, keepdim=True), right.sum(0, keepdim=True)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        floor = 1e-12 * diagonal.amax(-1, keepdim=True).clamp_min(1e-30)
        solved = torch.linalg.solve(gram + torch.diag_embed(ridge * diagonal + floor), right)
        solved = solved.expand(self.right[step].shape).clone()
        if terms.shared and terms.own_bias and "one" in terms.features:
            one = terms.features.index("one")
            solved[:, one] = 0.0
            left = self.right[step][:, one] - (self.gram[step][:, one] * solved).sum(1)
            solved[:, one] = left / (self.count[step] * (1 + ridge))
        return solved.float()

    def gain_db(self, step: int, theta: Tensor) -> float:
        """How much nearer to what was wanted theta [C, P] brings these places, in dB; 0 where nothing was seen."""
        before = float(self.energy[step].sum())
        if before <= 0.0:
            return 0.0
        wide = theta.double()
        cross = float((wide * self.right[step]).sum())
        square = float((wide * (self.gram[step] @ wide[..., None])[..., 0]).sum())
        return -10 * math.log10(max((before - 2 * cross + square) / before, 1e-12))


@dataclass(frozen=True, eq=False)
class Corrector:
    """Coefficients of a whole schedule. theta: [n, C, P]; ages: of the n steps, 0 where the fast model was computed,
    else steps since it was; a step whose age is another one in the run at hand is left as it is."""

    terms: Terms
    theta: Tensor
    ages: tuple[int, ...]

    def __post_init__(self) -> None:
        n = len(self.ages)
        shaped = self.theta.ndim == 3 and self.theta.shape[0] == n and self.theta.shape[1] > 0
        if not shaped or self.theta.shape[2] != self.terms.width(self.theta.shape[1]):
            raise ValueError("its correction is not a table with a row per step, channel and term")
        if any(age < 0 for age in self.ages):
            raise ValueError("its correction has ages below 0")

    @property
    def active(self) -> int:
        """Steps that are corrected at all."""
        return int((self.theta != 0).flatten(1).any(1).sum())

    def at(self, time: float, age: int) -> Tensor | None:
        """The coefficients [C, P] for a place in the schedule, between two steps of this age linear; None where no step
        near has this age or is corrected."""
        last = len(self.ages) - 1
        if not -0.5 <= time <= last + 0.5:
            return None
        low = max(0, min(last, math.floor(time)))
        part = min(max(time - low, 0.0), 1.0)
        near = [(low, 1 - part), (min(low + 1, last), part)]
        fits = [(i, w) for i, w in near if self.ages[i] == age and w > 0.0]
        if not fits or max(w for _, w in fits) < 0.5 - 1e-6:
            return None
        total = sum(w for _, w in fits)
        theta = sum((self.theta[i] * (w / total) for i, w in fits), torch.zeros_like(self.theta[0]))
        return theta if bool((theta != 0).any()) else None
