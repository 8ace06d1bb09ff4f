"""What is fixed while a run lasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..forecast.history import Storage
from ..forecast.predictors import Predictor
from ..forecast.schedules import Probe, Schedule
from .clock import Clock
from .plan import CacheConfig, Plan
from .recipe import Recipe
from .samplers import Sampler


class Memory(Protocol):
    """Where snapshots may lie, and how many bytes of them.

    planned: bytes given out; places: the names of where they went.
    """

    planned: int
    places: set[str]

    def place(self, nbytes: int, device: torch.device) -> Storage | None: ...

    def limit(self, device: torch.device) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Made once, by whoever opens the run.

    window: the noise levels between which evaluations may be filled, the higher first; percent_to_sigma, timestep_of:
    the host's, the second for what a network is told as its time; model: its class, for the report; precision: what it
    computes with, in words; expected_drift: the profile's, as it stands in the file.
    """

    plan: Plan
    clock: Clock
    sampler: Sampler
    recipe: Recipe
    window: tuple[float, float]
    percent_to_sigma: Callable[[float], float]
    timestep_of: Callable[[float], float]
    model: str = ""
    precision: str = ""
    expected_drift: object = None

    @property
    def cache(self) -> CacheConfig:
        return self.recipe.cache

    @property
    def predictor(self) -> Predictor:
        return self.recipe.predictor

    @property
    def schedule(self) -> Schedule | None:
        return self.recipe.schedule

    @property
    def probe(self) -> Probe | None:
        """What has to be looked at: the schedule's, or what the per-token choice needs."""
        if self.schedule is not None and self.schedule.probe is not None:
            return self.schedule.probe
        return Probe.FORECAST if self.predictor.per_token else None
