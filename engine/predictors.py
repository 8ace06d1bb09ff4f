"""What fills a skipped evaluation: each predictor returns one weight per stored snapshot.

A forecast is `sum_j w_j q_j` over raw snapshots q_j taken at times u_j, so a predictor needs only the times. `u` is the
continuous step coordinate (`host/sampling.py`): differences matter, its origin and unit do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Highest Lebesgue sum allowed. On six analytic flow grids "highest order with sum <= 5" was never worse than order 1.
LEBESGUE_LIMIT = 5.0

# Two times closer than this are one time: divided differences would divide by zero.
SAME_TIME = 1e-4

Rule = Callable[[Sequence[float], float, int], list[float]]


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


RULES: dict[str, Rule] = {"reuse": reuse, "newton": newton, "taylorseer": taylorseer}


@dataclass(frozen=True, slots=True)
class Predictor:
    """A named rule and the highest order it may use."""

    rule: str = "newton"
    order: int = 1

    @property
    def anchors(self) -> int:
        """How many snapshots the full order needs."""
        return self.order + 1

    def weights(self, times: Sequence[float], u: float) -> tuple[list[float], int]:
        """Return (one weight per time, order really used).

        The order falls until enough snapshots exist and `sum |w_j| <= LEBESGUE_LIMIT`; order 0 is plain reuse.
        times: at least one, distinct, newest last. Raises ValueError when times is empty.
        """
        if not times:
            raise ValueError("a forecast needs at least one snapshot")
        rule = RULES[self.rule]
        for order in range(min(self.order, len(times) - 1), 0, -1):
            weights = rule(times, u, order)
            if sum(abs(w) for w in weights) <= LEBESGUE_LIMIT:
                return weights, order
        return reuse(times, u), 0
