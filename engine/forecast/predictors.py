"""What fills a skipped evaluation: each predictor returns one weight per stored snapshot.

A forecast is `sum_j w_j q_j` over raw snapshots q_j taken at times u_j, so a predictor needs only the times. `u` is the
continuous step coordinate (`engine/run/clock.py`): differences matter, its origin and unit do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Highest Lebesgue sum allowed. On six analytic flow grids "highest order with sum <= 5" was never worse than order 1.
LEBESGUE_LIMIT = 5.0

# Undamped; HiCache publishes 0.5.
HERMITE_SCALE = math.sqrt(0.5)

# Two times closer than this are one time: divided differences would divide by zero.
SAME_TIME = 1e-4


def reuse(times: Sequence[float], u: float, order: int = 0) -> list[float]:
    """Weights that repeat the newest snapshot. Order and u are ignored."""
    return [0.0] * (len(times) - 1) + [1.0]


def newton(times: Sequence[float], u: float, order: int) -> list[float]:
    """Weights of the interpolating polynomial of degree `order` through the newest order + 1 snapshots, taken at u.

    times: distinct, at least order + 1, newest last; any spacing. Exact on polynomials up to that degree. The Lagrange
    form is used because it gives the weights directly; as a polynomial it is Newton's divided differences.
    """
    nodes = times[len(times) - order - 1 :]
    weights = [math.prod((u - b) / (a - b) for b in nodes if b != a) for a in nodes]
    return [0.0] * (len(times) - len(nodes)) + weights


def taylorseer(times: Sequence[float], u: float, order: int) -> list[float]:
    """Weights of TaylorSeer's derivative ladder as published (arXiv 2503.06923, released code), taken at u.

    The ladder divides the difference of two neighbouring ladders by the newest spacing, and uses that slope as if it
    were the slope at the newest snapshot. Order 1 equals `newton` of order 1; order 2 is damped and not the
    interpolating polynomial. times: distinct, at least order + 1, newest last.
    """
    count = len(times)

    def ladder(newest: int, depth: int) -> list[list[float]]:
        unit = [0.0] * count
        unit[newest] = 1.0
        rows = [unit]
        if depth and newest:
            spacing = times[newest] - times[newest - 1]
            older = ladder(newest - 1, depth - 1)
            for level, below in enumerate(older):
                rows.append([(a - b) / spacing for a, b in zip(rows[level], below, strict=True)])
        return rows

    step = u - times[-1]
    weights = [0.0] * count
    for k, row in enumerate(ladder(count - 1, order)):
        factor = step**k / math.factorial(k)
        weights = [w + factor * r for w, r in zip(weights, row, strict=True)]
    return weights


def hermite(times: Sequence[float], u: float, order: int, scale: float = HERMITE_SCALE) -> list[float]:
    """Weights of a forecast in scaled Hermite polynomials (HiCache, arXiv 2508.16984), taken at u. Order 1 or 2.

    The n-th derivative at the newest snapshot is multiplied by `scale^n (H_n(scale x) - H_n(0)) / n!` instead of
    `x^n / n!`, x = u - newest: that is `2 scale^2 x` and `2 scale^4 x^2`, so the scale is a damping. At 1/sqrt(2) the
    forecast is exact on polynomials of degree `order`; the published 0.5 halves the slope. Unlike the published ladder
    the derivatives are exact on uneven times and the constant H_n(0) is taken out, so that x = 0 gives the snapshot.
    """
    nodes = times[len(times) - order - 1 :]
    x = u - nodes[-1]
    factors = (2 * scale**2 * x, 2 * scale**4 * x * x)
    weights = [0.0] * len(nodes)
    weights[-1] = 1.0
    for n in range(1, order + 1):
        weights = [w + factors[n - 1] * d for w, d in zip(weights, _derivative(nodes, n), strict=True)]
    return [0.0] * (len(times) - len(nodes)) + weights


def _derivative(nodes: Sequence[float], n: int) -> list[float]:
    """Weights of the n-th derivative, at the newest node, of the polynomial through all nodes (two or three)."""
    at = nodes[-1]
    rows = []
    for j, a in enumerate(nodes):
        others = [b for i, b in enumerate(nodes) if i != j]
        bottom = math.prod(a - b for b in others)
        top = 2.0 if n == 2 else sum(math.prod(at - c for c in others if c != b) for b in others)
        rows.append(top / bottom)
    return rows


def adams_bashforth(times: Sequence[float], u: float, order: int) -> list[float]:
    """Weights of the mean, over the step [u, u + 1], of the polynomial through the newest order + 1 snapshots.

    This is what an Adams-Bashforth method of order + 1 stages with variable steps puts in the place of the slope, so
    with a first-order sampler the filled steps follow the exact solution rather than the sampler's own error. As a
    forecast of the output itself Adams-Bashforth extrapolation (AB-Cache, arXiv 2504.10540) is `newton`.
    Exact on the mean of polynomials up to degree `order`; at most 3.
    """
    # two-point Gauss-Legendre quadrature integrates cubics exactly
    near, far = (newton(times, u + 0.5 + side * math.sqrt(1 / 12), order) for side in (-1, 1))
    return [(a + b) / 2 for a, b in zip(near, far, strict=True)]


def chebyshev(
    times: Sequence[float], u: float, order: int, steps: int = 1, ridge: float = 0.1, mix: float = 0.5
) -> list[float]:
    """Weights of a ridge fit in Chebyshev polynomials T_0..T_order, mixed with order-1 `newton` (Spectrum, CVPR 2026).

    All snapshots take part; the whole schedule of `steps` steps is mapped to [-1, 1]. ridge: the penalty of the fit
    (0.1 as published); mix: the share of the fit, the rest is linear (1 in the paper, 0.5 recommended by its code).
    """
    half = max(steps, 1) / 2
    basis = torch.tensor([_chebyshev_row(t / half - 1, order) for t in times], dtype=torch.float64)
    target = torch.tensor(_chebyshev_row(u / half - 1, order), dtype=torch.float64)
    gram = basis.T @ basis + ridge * torch.eye(order + 1, dtype=torch.float64)
    fit = (basis @ torch.linalg.solve(gram, target)).tolist()
    line = newton(times, u, 1) if len(times) > 1 else reuse(times, u)
    return [mix * f + (1 - mix) * n for f, n in zip(fit, line, strict=True)]


def _chebyshev_row(x: float, order: int) -> list[float]:
    row = [1.0, x]
    while len(row) <= order:
        row.append(2 * x * row[-1] - row[-2])
    return row[: order + 1]


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to forecast.

    weights: (times, u, order, predictor) -> one weight per time, for 1 <= order <= most; kept, needed: snapshots that
    are kept and that the first forecast needs, None: order + 1; shifted: whether only differences of times matter;
    scaled: whether the predictor's scale does.
    """

    weights: Callable[[Sequence[float], float, int, Predictor], list[float]]
    most: int
    kept: int | None = None
    needed: int | None = None
    shifted: bool = True
    scaled: bool = False


RULES: dict[str, Rule] = {
    "reuse": Rule(lambda times, u, order, p: reuse(times, u), 0),
    "newton": Rule(lambda times, u, order, p: newton(times, u, order), 3),
    "taylorseer": Rule(lambda times, u, order, p: taylorseer(times, u, order), 3),
    "hermite": Rule(lambda times, u, order, p: hermite(times, u, order, p.scale), 2, scaled=True),
    "adams_bashforth": Rule(lambda times, u, order, p: adams_bashforth(times, u, order), 3),
    # A fit over the whole schedule wants more snapshots than it has coefficients; two are a line.
    "chebyshev": Rule(lambda times, u, order, p: chebyshev(times, u, order, p.steps), 4, 6, 2, shifted=False),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the Taylor Predictor's list: a rule and how it is used.

    rule: a key of RULES; order: what automatic means; per_token: every token chooses for itself (`token_select.py`), so
    the network needs tokens; residual: what the network added to its input is reused; first_order: serves samplers
    that use the newest output only, once, at the model output.
    """

    rule: str
    order: int = 1
    per_token: bool = False
    residual: bool = False
    first_order: bool = False


# In the order of the canvas. Orders: TAP publishes 2 and Spectrum 4; elsewhere 1 was best (`bench fidelity`).
KINDS: dict[str, Kind] = {
    "Taylor": Kind("newton"),
    "TaylorSeer": Kind("taylorseer"),
    "Reuse": Kind("reuse", 0),
    "Residual reuse": Kind("reuse", 0, residual=True),
    "Hermite": Kind("hermite"),
    "Adams-Bashforth": Kind("adams_bashforth", first_order=True),
    "Chebyshev": Kind("chebyshev", 4),
    "Per token": Kind("taylorseer", 2, per_token=True),
}


@dataclass(frozen=True, slots=True)
class Predictor:
    """A named rule and the highest order it may use.

    scale: damping of `hermite`; steps: length of the schedule, for `chebyshev`; per_token: every token chooses its
    order and horizon from a probe (`token_select.py`), the weights here are the fallback and the measure of drift.
    """

    rule: str = "newton"
    order: int = 1
    scale: float = HERMITE_SCALE
    steps: int = 1
    per_token: bool = False

    @property
    def anchors(self) -> int:
        """How many snapshots are kept; the full order needs order + 1 of them."""
        return RULES[self.rule].kept or self.order + 1

    @property
    def needed(self) -> int:
        """How many snapshots the first forecast needs."""
        return RULES[self.rule].needed or self.order + 1

    @property
    def shifted(self) -> bool:
        """Whether only differences of times matter."""
        return RULES[self.rule].shifted

    def weights(self, times: Sequence[float], u: float) -> tuple[list[float], int]:
        """Return (one weight per time, order really used).

        The order falls until enough snapshots exist and `sum |w_j| <= LEBESGUE_LIMIT`; order 0 is plain reuse.
        times: at least one, distinct, newest last. Raises ValueError when times is empty.
        """
        if not times:
            raise ValueError("a forecast needs at least one snapshot")
        for order in range(min(self.order, len(times) - 1), 0, -1):
            weights = RULES[self.rule].weights(times, u, order, self)
            if sum(abs(w) for w in weights) <= LEBESGUE_LIMIT:
                return weights, order
        return reuse(times, u), 0
