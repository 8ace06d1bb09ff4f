"""PSNR against evaluations for schedules that were solved from calibrated statistics, on prompts they have not seen.

    python dev.py bench frontier [--models flux unet] [--pictures 6]

Writes bench/out/frontier.json, docs/frontier.md and docs/frontier.png. Calibrated on four prompts and seeds, scored on
others; every schedule runs through a profile and the Cache Loader, as a user's does.
"""

from __future__ import annotations

import argparse
import tempfile

from .boot import ROOT, boot
from .fidelity import PROMPTS as HELD_OUT
from .rows import mean, mean_db, save, table

OUT = ROOT / "bench" / "out" / "frontier.json"
PAGE = ROOT / "docs" / "frontier.md"
PLOT = ROOT / "docs" / "frontier.png"
STEPS = 28
COUNTS = (7, 8, 10, 11, 12, 14)
SCHEDULERS = {"flux": ("simple", "beta"), "unet": ("normal", "karras")}
PREDICTORS = {"reuse": 0, "Taylor 1": 1, "Taylor 2": 2}
COLUMNS = ("model", "scheduler", "predictor", "name", "evaluations", "psnr_db", "psnr_min_db", "seconds")
HEAD = """# Solved schedules

Written by `python dev.py bench frontier`: 28 euler steps, cfg 1, calibrated on four prompts and seeds, scored on
{pictures} others; PSNR of the final latent against the plain run. *even* is uniform spacing with the last step,
*CacheQuant* its dynamic programme on the distance to the last key step, *forecast-aware* the exact programme for the
predictor, *gains* the same with every error weighted by what it leaves in the result: that is what Calibrate writes.

![PSNR against evaluations](frontier.png)

"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench frontier")
    parser.add_argument("--models", nargs="*", default=("flux", "unet"))
    parser.add_argument("--pictures", type=int, default=6)
    options = parser.parse_args()
    boot()
    rows: list[dict] = []
    for name in options.models:
        for scheduler in SCHEDULERS[name]:
            rows += measure(name, scheduler, options.pictures)
            print(table(rows[-4:], COLUMNS), flush=True)
    save(OUT, rows)
    plot(rows)
    PAGE.write_text(HEAD.format(pictures=options.pictures) + gains_table(rows) + "\n\n" + table(rows, COLUMNS) + "\n")
    print(gains_table(rows))


def measure(name: str, scheduler: str, pictures: int) -> list[dict]:
    """The rows of one model and scheduler."""
    import comfy.sample
    import comfy.samplers
    import folder_paths
    import torch
    from slipstream.demo import emoji
    from slipstream.engine.metrics import psnr
    from slipstream.engine.profile import Profile
    from slipstream.engine.search import cachequant, error_gains, forecast_aware, uniform
    from slipstream.engine.statistics import Statistics
    from slipstream.host import events, profiles
    from slipstream.host.calibrate import record
    from slipstream.host.patcher import add_cache, add_predictor, plan_of
    from slipstream.host.plan import CacheConfig, PredictorConfig
    from slipstream.host.recipe import MODEL_OUTPUT, described, resolve
    from slipstream.host.sampling import sampler_traits

    torch.set_num_threads(1)
    base = emoji.load_flux() if name == "flux" else emoji.load_unet()
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), scheduler, STEPS)
    values = tuple(float(s) for s in sigmas)
    latent = torch.zeros(1, 16, 16, 16)

    def conds(prompt: str):
        return emoji.conditioning(prompt), emoji.conditioning("")

    with torch.inference_mode():
        statistics = Statistics.merged(
            [
                record(base, *conds(prompt), 1.0, sampler, sigmas, {"samples": latent}, 500 + i)
                for i, prompt in enumerate(emoji.PROMPTS[:4])
            ]
        )
    gains = error_gains(values, 1.0, name == "flux")

    def run(model):
        latents, computed, seconds = [], [], []
        for i in range(pictures):
            noise = comfy.sample.prepare_noise(latent, 4000 + i)
            with torch.inference_mode():
                latents.append(
                    comfy.sample.sample_custom(
                        model, noise, 1.0, sampler, sigmas, *conds(HELD_OUT[i % len(HELD_OUT)]), latent,
                        disable_pbar=True, seed=4000 + i,
                    )
                )  # fmt: skip
            report = events.last_report(plan_of(model))
            computed.append(report["computed"])
            seconds.append(report["seconds"])
        return latents, mean(computed), mean(seconds)

    truth, _, plain_seconds = run(add_cache(base, CacheConfig("Off", node_id="plain")))
    rows = []

    def score(model, predictor: str, method: str) -> None:
        latents, computed, seconds = run(model)
        scores = [psnr(z, t) for z, t in zip(latents, truth, strict=True)]
        rows.append(
            {
                "name": method, "model": f"tiny_{'flux' if name == 'flux' else 'sd15'}_emoji", "scheduler": scheduler,
                "predictor": predictor, "sampler": "euler", "steps": STEPS, "evaluations": computed,
                "seconds": seconds, "plain_seconds": plain_seconds, "psnr_db": mean_db(scores),
                "psnr_min_db": min(scores), "runs": pictures,
            }
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths[profiles.FOLDER] = ([folder], {".safetensors"})
        for label, order in PREDICTORS.items():
            config = PredictorConfig("Taylor", order) if order else None
            planned = base if config is None else add_predictor(base, config)
            predictor = resolve(plan_of(planned), sampler_traits(sampler), _row(base), values).predictor
            for preset in ("Safe", "Balanced", "Fast"):
                score(add_cache(planned, CacheConfig(preset, node_id="b")), label, f"drift budget ({preset})")
            for count in COUNTS:
                solved = {
                    "even": uniform(STEPS, count),
                    "CacheQuant": cachequant(statistics, count).keys,
                    "forecast-aware": forecast_aware(statistics, count, predictor).keys,
                    "gains": forecast_aware(statistics, count, predictor, gains).keys,
                }
                for method, keys in solved.items():
                    file = profiles.save(
                        f"{method} {label} {count}",
                        Profile(keys, values, statistics, "", MODEL_OUTPUT, described(predictor)),
                    )
                    score(add_cache(planned, CacheConfig(node_id="b", profile=file)), label, method)
    return rows


def _row(patcher):
    from slipstream.host.architectures import architecture_of

    return architecture_of(patcher.get_model_object("diffusion_model"))


def gains_table(rows: list[dict]) -> str:
    """How far what Calibrate writes is above even spacing and below the best schedule, per model and predictor."""
    lines = [
        "| model | scheduler | predictor | above even at 11 (dB) | above even, mean (dB) | below the best, worst (dB) |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for model, scheduler, predictor in dict.fromkeys((r["model"], r["scheduler"], r["predictor"]) for r in rows):
        chosen = [r for r in rows if (r["model"], r["scheduler"], r["predictor"]) == (model, scheduler, predictor)]
        by = {(r["name"], round(r["evaluations"])): r["psnr_db"] for r in chosen}
        above = {c: by["gains", c] - by["even", c] for c in COUNTS}
        below = [
            max(by[m, c] for m in ("even", "CacheQuant", "forecast-aware", "gains")) - by["gains", c] for c in COUNTS
        ]
        lines.append(
            f"| {model} | {scheduler} | {predictor} | {above[11]:+.1f} | {mean(above.values()):+.1f} "
            f"| {max(below):.1f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r["model"], r["scheduler"]) for r in rows))
    figure = Figure(figsize=(11, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {"even": "#999999", "CacheQuant": "#56B4E9", "forecast-aware": "#E69F00", "gains": "#D55E00"}
    grid = figure.subplots(len(panels), len(PREDICTORS), squeeze=False, sharex=True)
    for line, (model, scheduler) in zip(grid, panels, strict=True):
        for axes, predictor in zip(line, PREDICTORS, strict=True):
            chosen = [r for r in rows if (r["model"], r["scheduler"], r["predictor"]) == (model, scheduler, predictor)]
            for method, colour in colours.items():
                points = [(r["evaluations"], r["psnr_db"]) for r in chosen if r["name"] == method]
                axes.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=method)
            presets = [r for r in chosen if r["name"].startswith("drift budget") and r["evaluations"] <= 16]
            points = sorted((r["evaluations"], r["psnr_db"]) for r in presets) or [(16, float("nan"))]
            axes.plot(*zip(*points, strict=True), ls="--", marker="s", ms=3, color="#0072B2", label="drift budget")
            axes.set_title(f"{model}, {scheduler}, {predictor}", fontsize=9)
            axes.set_xlim(6, 16)
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=8)
    grid[-1][0].set_xlabel("evaluations of 28")
    grid[-1][0].set_ylabel("PSNR, dB")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=90)


if __name__ == "__main__":
    main()
