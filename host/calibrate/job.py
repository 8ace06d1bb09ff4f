"""What a calibration is asked for, and the sampling that it is asked about."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_sampling
import comfy.sample
from torch import Tensor

from ...engine.calibration.choice import SCHEDULES

NODE = "Calibrate"


# What the goal is, and how the schedule is found; ERTACache's step coefficient changes the sigmas too.
GOALS = ("speed-up", "max drift")


BEST, STEP_COEFFICIENT, ECAD = "best", "ERTACache + step coefficient", "ECAD (blocks)"


CHOICES = (BEST, *SCHEDULES, STEP_COEFFICIENT, ECAD)


@dataclass(frozen=True, slots=True)
class Job:
    """One sampling as the user does it. runs: (positive conditioning, seed) of each calibration run."""

    model: object
    runs: tuple[tuple[list, int], ...]
    negative: list
    cfg: float
    sampler: object
    sigmas: Tensor
    latent: dict

    @property
    def values(self) -> tuple[float, ...]:
        """The sigmas as numbers, n + 1 for n steps."""
        return tuple(float(s) for s in self.sigmas)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def sample(self, model, run: int, callback: Callable | None = None) -> Tensor:
        """The final latent of one calibration run with this model."""
        positive, seed = self.runs[run]
        samples = starting_latent(model, self.latent)
        noise = comfy.sample.prepare_noise(samples, seed, self.latent.get("batch_index"))
        return comfy.sample.sample_custom(
            model, noise, self.cfg, self.sampler, self.sigmas, positive, self.negative, samples,
            noise_mask=self.latent.get("noise_mask"), callback=callback, disable_pbar=True, seed=seed,
        )  # fmt: skip


def starting_latent(model, latent: dict) -> Tensor:
    """The samples of a LATENT as the host's sampler nodes start from them: an empty one is fitted to the model."""
    fit = comfy.sample.fix_empty_latent_channels
    known = inspect.signature(fit).parameters  # newer hosts are told how an empty latent was scaled down
    told = {key: latent[key] for key in ("downscale_ratio_spacial", "downscale_ratio_temporal") if key in latent}
    return fit(model, latent["samples"], **{key: value for key, value in told.items() if key in known})


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants. goal: of GOALS; speed_up: one step in so many is computed; max_drift: mean relative error
    of the filled steps; schedule: of CHOICES; check: schedules that are really sampled before one is chosen, 0: none;
    correction, activations: further statistics into the profile; ecad_runs: samplings of ECAD's search."""

    goal: str = GOALS[0]
    speed_up: float = 2.5
    max_drift: float = 0.05
    schedule: str = BEST
    check: int = 4
    correction: bool = False
    activations: bool = False
    ecad_runs: int = 200


# Called with a sentence on what is going on and the number of steps; gives the callback of the sampling that follows.
Tell = Callable[[str, int], Callable | None]


def silent(sentence: str, steps: int) -> None:
    return None
