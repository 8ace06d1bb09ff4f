"""How near cached runs stay to the full run, at how many evaluations: 16 pictures per row on the trained small Flux.

    python dev.py bench fidelity [--samplers euler dpmpp_2m] [--steps 28]

Writes bench/out/fidelity.json and docs/fidelity.md.

Every row is one method; the plain sampler with fewer steps is the floor that a cache has to beat.
"""

from __future__ import annotations

import argparse
import time

from .boot import ROOT, boot
from .rows import mean, mean_db, save, table

OUT = ROOT / "bench" / "out" / "fidelity.json"
PAGE = ROOT / "docs" / "fidelity.md"
HEAD = """# Fidelity on the trained small Flux

Written by `python dev.py bench fidelity`. 16 pictures per row (8 prompts, 2 seeds, batch 1, cfg 1, one CPU thread).
`psnr_db`: final latent against the plain run of the same sampler and steps, over the range of that latent;
`picture_psnr_db`: the decoded pictures. An identical picture counts as 100 dB. *fewer steps* is the floor to beat.

"""
SAMPLERS = ("euler", "dpmpp_2m", "heun", "uni_pc", "res_multistep", "er_sde", "euler_ancestral")
COLUMNS = ("name", "sampler", "steps", "evaluations", "seconds", "psnr_db", "psnr_min_db", "picture_psnr_db")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench fidelity")
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seeds", type=int, default=2, help="seeds per prompt")
    options = parser.parse_args()
    boot()
    rows = []
    for sampler in options.samplers:
        rows += measure(sampler, options.steps, options.seeds)
    save(OUT, rows)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(HEAD + table(rows, COLUMNS) + "\n")
    print(table(rows, COLUMNS))


def measure(sampler: str, steps: int, seeds: int) -> list[dict]:
    """The rows of one sampler: plain, fewer steps, and every preset with and without a Taylor Predictor."""
    import comfy.sample
    import torch
    from slipstream.demo import emoji
    from slipstream.engine.metrics import psnr
    from slipstream.host import events
    from slipstream.host.patcher import add_cache, add_predictor, plan_of
    from slipstream.host.plan import CacheConfig, PredictorConfig

    torch.set_num_threads(1)
    base, vae = emoji.load_flux(), emoji.load_vae()
    jobs = [(prompt, 100 + 8 * s + i) for s in range(seeds) for i, prompt in enumerate(emoji.PROMPTS)]

    def run(model, count: int):
        latents, evaluations, seconds = [], [], []
        for prompt, seed in jobs:
            latent = torch.zeros(1, 16, 16, 16)
            noise = comfy.sample.prepare_noise(latent, seed)
            conds = emoji.conditioning(prompt), emoji.conditioning("")
            started = time.perf_counter()
            with torch.inference_mode():
                latents.append(
                    comfy.sample.sample(
                        model, noise, count, 1.0, sampler, "simple", *conds, latent, seed=seed, disable_pbar=True
                    )
                )
            seconds.append(time.perf_counter() - started)
            evaluations.append(events.last_report(plan_of(model))["computed"])
        return latents, mean(evaluations), mean(seconds)

    def pictures(latents):
        with torch.inference_mode():
            return [vae.decode(z).clamp(0, 1) for z in latents]

    plain = add_cache(base, CacheConfig("Off", node_id="plain"))
    run(plain, 2)  # loads the model
    methods = [("plain", plain, steps)]
    methods += [(f"fewer steps: {n}", plain, n) for n in (16, 14, 12, 10) if n < steps]
    for preset in ("Safe", "Balanced", "Fast"):
        cached = add_cache(base, CacheConfig(preset, node_id=preset))
        methods.append((f"{preset}: Cache Loader", cached, steps))
        methods.append((f"{preset}: Cache Loader + Taylor Predictor", add_predictor(cached, PredictorConfig()), steps))
    rows, truth, shown = [], None, None
    for name, model, count in methods:
        latents, evaluations, seconds = run(model, count)
        if truth is None:
            truth, shown = latents, pictures(latents)
        scores = [psnr(z, t) for z, t in zip(latents, truth, strict=True)]
        visible = [psnr(p, t, 1.0) for p, t in zip(pictures(latents), shown, strict=True)]
        rows.append(
            {
                "name": name,
                "model": "tiny_flux_emoji",
                "sampler": sampler,
                "steps": count,
                "evaluations": evaluations,
                "seconds": seconds,
                "psnr_db": mean_db(scores),
                "psnr_min_db": min(scores),
                "picture_psnr_db": mean_db(visible),
                "runs": len(jobs),
            }
        )
    return rows


if __name__ == "__main__":
    main()
