"""PTQD's second half: what a stochastic sampler need not add, because quantisation has added it already."""

from __future__ import annotations

import math


def calmer_noise(sigma_up: float, step: float, deviation: float) -> float:
    """How much noise a stochastic sampler has still to add, PTQD's variance correction (arXiv 2305.10657, eq. 14).

    sigma_up: what it would add; step: sigma_down - sigma; deviation: of the part of the slope's error that nothing
    predicts. That part has already put (step * deviation)^2 of variance into the state.
    """
    return math.sqrt(max(0.0, sigma_up**2 - (step * deviation) ** 2))
