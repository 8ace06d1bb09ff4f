"""Anchors: evaluations at which a reference is asked too, and how its difference serves the steps that follow.

On neighbouring steps of one picture a quantised model is off by much the same tensor, because rounded weights are a
fixed function of an input that moves slowly. So the difference measured at an anchor is subtracted from the following
steps too, less and less of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What is left of a residual one step later. Measured: bench/quality/compensation.py; flat between .85 and .95.
DECAY = 0.9

# How fast distances between anchors grow. On the small Flux 1.3 to 2 are alike (bench/quality/compensation.py).
SPACING = 1.5

# One evaluation in so many is an anchor where the user does not say.
SHARE = 10


def automatic(steps: int) -> int:
    """Number of anchors that adds about a tenth to the time; none below five steps."""
    return round(steps / SHARE) if steps >= 5 else 0


def placed(sigmas: Sequence[float], count: int, flow: bool) -> tuple[int, ...]:
    """Steps of `count` anchors where nothing is known of the errors. sigmas: n + 1 falling values.

    A flow model decides its picture early and its errors are of one size throughout: the distances grow from step 1 on.
    The error of a rounded noise prediction grows toward the end, where there is most for the network to do: there the
    distances shrink, and nothing is spent on the first third.
    """
    steps = len(sigmas) - 1
    count = max(0, min(count, steps))
    if flow:
        places = [1 + (steps - 1) * (k / count) ** SPACING for k in range(count)]
    else:
        # 0.9 and 0.5 keep the first place off the start and the last off the end, where an anchor has nothing to serve
        places = [steps * (1 - (1 - (k + 0.9) / (count + 0.5)) ** SPACING) for k in range(count)]
    return _distinct(places, steps)


def _distinct(places: Sequence[float], steps: int) -> tuple[int, ...]:
    """The places as rising whole steps, none twice."""
    chosen: list[int] = []
    for k, place in enumerate(places):
        least = chosen[-1] + 1 if chosen else 0
        most = steps - (len(places) - k)
        chosen.append(max(least, min(most, round(place))))
    return tuple(chosen)


def expected(gram: Tensor, effects: Sequence[float], anchors: Sequence[int], decay: float = DECAY) -> float:
    """Squared error that the result is expected to keep, with anchors at these steps.

    gram: [n, n] mean products of the residuals (reference - fast) of two steps; effects: what an error in the slope of
    each step leaves in the result (`choice.error_effects`).
    """
    n = len(effects)
    share = torch.zeros(n, dtype=torch.float64)  # of every step's residual, in the sum that is left
    anchor, taken = None, set(anchors)
    for k in range(n):
        if k in taken:
            anchor = k
            continue
        share[k] += effects[k]
        if anchor is not None:
            share[anchor] -= effects[k] * decay ** (k - anchor)
    return float(share @ gram.double() @ share)


def solved(gram: Tensor, effects: Sequence[float], count: int, decay: float = DECAY) -> tuple[int, ...]:
    """The `count` anchors with the least expected error: one after the other, then exchanged until none helps."""
    n = len(effects)
    chosen: list[int] = []
    for _ in range(max(0, min(count, n))):
        free = [k for k in range(n) if k not in chosen]
        chosen.append(min(free, key=lambda k: expected(gram, effects, [*chosen, k], decay)))
    best = expected(gram, effects, chosen, decay)
    improved = bool(chosen)
    while improved:
        improved = False
        for place, k in itertools.product(range(len(chosen)), range(n)):
            if k in chosen:
                continue
            other = [*chosen[:place], k, *chosen[place + 1 :]]
            value = expected(gram, effects, other, decay)
            if value < best * (1 - 1e-9):
                chosen, best, improved = other, value, True
    return tuple(sorted(chosen))


class Carried:
    """The residual of the newest anchor: reference - fast, in the slope, and the time it is of."""

    def __init__(self, decay: float = DECAY):
        self.decay = decay
        self.time = -math.inf
        self.residual: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.residual is None else self.residual.numel() * self.residual.element_size()

    def take(self, time: float, residual: Tensor) -> None:
        """Keep the residual of an anchor, handed over."""
        self.time, self.residual = time, residual

    def at(self, time: float, like: Tensor) -> Tensor | None:
        """What to add to a slope of this shape at a later time, a new tensor; None where there is nothing."""
        if self.residual is None or self.residual.shape != like.shape or self.residual.device != like.device:
            return None
        return self.residual * self.decay ** max(0.0, time - self.time)

    def clear(self) -> None:
        self.residual = None
