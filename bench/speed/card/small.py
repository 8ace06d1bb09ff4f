"""The trained small models on a card: the same decibels as on the CPU?"""

from __future__ import annotations

import time
from collections.abc import Iterator

from lab.boot import boot
from lab.rows import mean, mean_db

from ...quality.fidelity import PROMPTS
from .worker import Bench

STEPS, FIRST_SEED = 30, 4000

# On the CPU: docs/quant_quality.md and docs/fidelity.md, of other pictures, so that a few dB apart are noise.
FORMATS = {
    "auto": {},
    "auto, 8-bit activations": {"act_bits": 8},
    "convrot_w4a4": {"format": "convrot_w4a4"},
    "int8_convrot": {"format": "int8_convrot"},
}


def small_models(bench: Bench) -> Iterator[dict]:
    """PSNR of the final latent against the plain run on the same card: caches, and 4 bit on the Flux."""
    boot()
    from slipstream.demo import emoji
    from slipstream.engine.run.plan import CacheConfig, PredictorConfig
    from slipstream.host.model import add_cache, add_predictor, plan_of
    from slipstream.host.quantise.choose import QuantWish
    from slipstream.host.quantise.quantise import quantise
    from slipstream.kernels import dispatch

    from .flux import told

    prompts, steps = (PROMPTS[:1], 9) if bench.dry else (PROMPTS[:4], STEPS)
    for name, load in (("small Flux", emoji.load_flux), ("small SD1.5", emoji.load_unet)):
        base = load()
        true, seconds = pictures(bench, base, prompts, steps)
        yield {"name": name, "with": "nothing", "evaluations": float(steps), "s_per_picture": seconds}
        for preset in ("Balanced", "Fast"):
            model = add_predictor(add_cache(base, CacheConfig(preset, node_id="card")), PredictorConfig())
            got, seconds = pictures(bench, model, prompts, steps)
            yield {"name": name, "with": f"{preset} + Taylor Predictor", "psnr_db": nearness(got, true),
                   "evaluations": told(plan_of(model))["computed_share"], "s_per_picture": seconds}  # fmt: skip
        for words, wish in FORMATS.items() if name == "small Flux" else ():
            dispatch.reset()
            model = quantise(base, QuantWish(**wish))
            pictures(bench, model, prompts[:1], 2)  # its kernels are compiled and chosen
            got, seconds = pictures(bench, model, prompts, steps)
            yield {"name": name, "with": words, "psnr_db": nearness(got, true), "evaluations": float(steps),
                   "s_per_picture": seconds, "kernels": dispatch.summary()}  # fmt: skip


def pictures(bench: Bench, model, prompts, steps: int):
    """The final latents, one a prompt, and the mean seconds of one."""
    import comfy.sample
    import torch
    from slipstream.demo import emoji

    results, seconds = [], []
    for number, prompt in enumerate(prompts):
        latent = torch.zeros(1, model.model.latent_format.latent_channels, 16, 16)
        noise = comfy.sample.prepare_noise(latent, FIRST_SEED + number)
        positive, negative = emoji.conditioning(prompt), emoji.conditioning("")
        began = time.perf_counter()
        with torch.inference_mode():
            results.append(
                comfy.sample.sample(
                    model, noise, steps, 1.0, "euler", "simple", positive, negative, latent, seed=1, disable_pbar=True
                ).cpu()
            )
        seconds.append(time.perf_counter() - began)
    return results, mean(seconds)


def nearness(got, true) -> float:
    from slipstream.engine.metrics import psnr

    return mean_db(psnr(a, b) for a, b in zip(got, true, strict=True))
