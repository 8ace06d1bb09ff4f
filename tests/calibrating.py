"""A calibration of the small models, and what follows its profile."""

from __future__ import annotations

import comfy.samplers
import torch
from sampling import SIZE
from slipstream.demo import emoji
from slipstream.engine.run.plan import CacheConfig, PredictorConfig
from slipstream.host import model as patcher
from slipstream.host.calibrate.calibrate import calibrate
from slipstream.host.calibrate.job import Job, Wish


def sigmas_of(model, steps: int = 28, scheduler: str = "simple"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def job(lab, model, steps: int = 28, sampler: str = "euler", cfg: float = 1.0, runs: int = 1, size=SIZE) -> Job:
    """The sampling that is calibrated, over as many prompts and seeds as runs."""
    each = tuple((emoji.conditioning(prompt), 7 + i) for i, prompt in enumerate(("hamburger", *emoji.PROMPTS)[:runs]))
    return Job(model, each, emoji.conditioning(""), cfg, comfy.samplers.sampler_object(sampler),
               sigmas_of(model, steps), {"samples": lab.latent(model, size=size)})  # fmt: skip


def calibrated(lab, model, speed_up: float = 2.5, check: int = 0, tell=None, wish=None, **options):
    options = {"job": job(lab, model, **options), "wish": Wish(speed_up=speed_up, check=check, **(wish or {}))}
    with torch.inference_mode():
        return calibrate(**options, **({"tell": tell} if tell else {}))


def taylor(model, order: int = -1):
    return patcher.add_predictor(model, PredictorConfig("Taylor", order))


def with_profile(model, name: str, order: int | None = -1, **options):
    model = patcher.add_cache(model, CacheConfig(node_id="1", profile=name, **options))
    return model if order is None else taylor(model, order)
