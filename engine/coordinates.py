"""Noise coordinates of models that share a latent space, and the bridge between them.

A model is told a noisy latent x and a noise level. Variance exploding (eps, v, EDM): `x = x0 + sigma n`. Flow:
`x = (1 - t) x0 + t k n` with k the scale of the noise, 1 for nearly all. Both name the same point: divided by what
stands before x0, a flow latent is a variance exploding one at `sigma = k t / (1 - t)`. The prediction of x0 is the same
object in both, so a sampler that runs in one of them can take every single prediction from a model of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Level = TypeVar("Level", float, Tensor)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """flow: False is variance exploding; noise_scale: k of a flow, without meaning otherwise."""

    flow: bool = False
    noise_scale: float = 1.0


VARIANCE_EXPLODING = Coordinates()
FLOW = Coordinates(flow=True)


def level_in(level: Level, source: Coordinates, target: Coordinates) -> Level:
    """The noise level of `source` in the numbers of `target`; t = 1 of a flow is infinite in variance exploding."""
    if source == target or not (source.flow or target.flow):
        return level
    if not target.flow:
        if isinstance(level, Tensor):
            return source.noise_scale * level / (1.0 - level)
        return source.noise_scale * level / (1.0 - level) if level < 1.0 else float("inf")
    if not source.flow:
        return level / (target.noise_scale + level)
    return level / _between_flows(level, source, target)


def factor(level: Level, source: Coordinates, target: Coordinates) -> Level | float:
    """What a latent of `source` at this level is multiplied by, to be the same point in `target`."""
    if source == target or not (source.flow or target.flow):
        return 1.0
    if not target.flow:
        return 1.0 / (1.0 - level)
    if not source.flow:
        return target.noise_scale / (target.noise_scale + level)
    return target.noise_scale / source.noise_scale / _between_flows(level, source, target)


def _between_flows(level: Level, source: Coordinates, target: Coordinates) -> Level:
    """t + r (1 - t), finite where the way through variance exploding numbers is not."""
    return level + target.noise_scale / source.noise_scale * (1.0 - level)
