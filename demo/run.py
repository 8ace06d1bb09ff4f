"""What `python dev.py demo` runs: the workflow file in the real server, plain and accelerated, one page of results."""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load

from engine.metrics import psnr
from lab import workflow
from lab.client import Client
from lab.rows import mean, mean_db, save, table
from lab.server import ROOT, Server

from .prompts import PROMPTS

OUT = ROOT / "demo" / "out"
WORKFLOW = ROOT / "workflows" / "slipstream_demo.json"
MODEL = "tiny_flux_emoji"
STEPS = 28
PROFILE = "tiny_flux_emoji simple 28.safetensors"

# How many of the pictures are in the figure; all of them count in the table.
SHOWN = 4
# The picture of the README: these methods next to each other, what they changed below, so many times as strong.
BESIDE = {
    "plain": "plain",
    "fewer steps: euler 10": "10 steps",
    "EasyCache 0.2, its input copied first": "EasyCache",
    "LazyCache 0.2": "LazyCache",
    "Cache Loader + Taylor Predictor": "Slipstream",
    "the same with the calibrated profile": "Slipstream, calibrated",
}
STRENGTH = 8


@dataclass(frozen=True)
class Method:
    """A named edit of the workflow."""

    name: str
    edit: object
    sampler: str = "euler"
    steps: int = STEPS


def plain(prompt: dict) -> dict:
    return workflow.bypass(workflow.bypass(prompt, "SlipstreamTaylorPredictor"), "SlipstreamCacheLoader")


def sampled(sampler: str, steps: int):
    return lambda prompt: workflow.change(plain(prompt), "KSampler", sampler_name=sampler, steps=steps)


def host_cache(name: str, **inputs):
    values = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False, **inputs}
    return lambda prompt: workflow.insert(plain(prompt), "KSampler", name, **values)


def profiled(name: str):
    return lambda prompt: workflow.change(prompt, "SlipstreamCacheLoader", profile=name)


def input_copied(edit):
    """The same edit with the network's input copied before the cache that it adds."""
    return lambda prompt: edit(workflow.insert(prompt, "KSampler", "SlipstreamDemoCopyInput"))


METHODS = (
    Method("plain", plain),
    Method("fewer steps: euler 12", sampled("euler", 12), steps=12),
    Method("fewer steps: euler 10", sampled("euler", 10), steps=10),
    Method("fewer steps: dpmpp_2m 12", sampled("dpmpp_2m", 12), "dpmpp_2m", 12),
    Method("EasyCache 0.2, as shipped", host_cache("EasyCache", reuse_threshold=0.2)),
    Method("EasyCache 0.2, its input copied first", input_copied(host_cache("EasyCache", reuse_threshold=0.2))),
    Method("LazyCache 0.2", host_cache("LazyCache", reuse_threshold=0.2)),
    Method("Cache Loader", lambda prompt: workflow.bypass(prompt, "SlipstreamTaylorPredictor")),
    Method("Cache Loader + Taylor Predictor", profiled("none")),
    Method("the same with the calibrated profile", profiled(PROFILE)),
)


async def run_all(url: str, seeds: int) -> list[dict]:
    """Sample every method for every prompt and seed; one row per method, with the first pictures for the figure."""
    async with Client(url) as client:
        base = workflow.load(WORKFLOW, await client.object_info())
        jobs = [(prompt, 1000 + 8 * s + i) for s in range(seeds) for i, prompt in enumerate(PROMPTS)]
        await client.run(job(base, plain, PROMPTS[0], 0))  # loads the model, so that no method pays for it
        results, truth = [], []
        for method in METHODS:
            started = time.monotonic()
            done = [await sample(client, job(base, method.edit, *j)) for j in jobs]
            if not truth:
                truth = [latent for latent, _, _, _ in done]
            results.append(row(method, done, truth))
            print(f"  {method.name:40} {time.monotonic() - started:5.1f} s", flush=True)
        return results


def job(base: dict, edit, prompt: str, seed: int) -> dict:
    graph = workflow.change(edit(base), "SlipstreamDemoPrompt", text=prompt)
    return workflow.change(graph, "KSampler", seed=seed)


async def sample(client: Client, graph: dict) -> tuple[torch.Tensor, bytes, int, float]:
    """(final latent, PNG, evaluations counted in the network, seconds of the sampler node) of one prompt."""
    result = await client.run(graph)
    latent_file = result.outputs[workflow.first(graph, "SaveLatent")]["latents"][0]
    picture = result.outputs[workflow.first(graph, "SaveImage")]["images"][0]
    counted = [data["evaluations"] for kind, data in result.events if kind == "slipstream_demo.count"]
    latent = load(await client.file(latent_file))["latent_tensor"]
    return latent, await client.file(picture), counted[-1], result.seconds[workflow.first(graph, "KSampler")]


def row(method: Method, done: list, truth: list[torch.Tensor]) -> dict:
    scores = [psnr(d[0], t) for d, t in zip(done, truth, strict=True)]
    return {
        "name": method.name,
        "model": MODEL,
        "sampler": method.sampler,
        "steps": method.steps,
        "evaluations": mean(d[2] for d in done),
        "seconds": mean(d[3] for d in done),
        "psnr_db": mean_db(scores),
        "psnr_min_db": min(scores),
        "runs": len(done),
        "pictures": [d[1] for d in done[:SHOWN]],
    }


def figure_of(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def pixels(png: bytes):
    """(H, W, 3) floats in 0..1."""
    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=numpy.float32) / 255


def draw_beside(rows: list[dict], path: Path) -> None:
    """Some methods next to each other, and under each picture its difference from the plain one, amplified."""
    rows = {r["name"]: r for r in rows}
    figure = figure_of(1.62 * len(BESIDE), 7.1)
    grid = figure.subplots(4, len(BESIDE))
    truth = [pixels(png) for png in rows["plain"]["pictures"]]
    for column, (name, title) in zip(grid.T, BESIDE.items(), strict=True):
        r = rows[name]
        quality = "the reference" if math.isinf(r["psnr_db"]) else f"{r['psnr_db']:.1f} dB"
        column[0].set_title(f"{title}\n{r['evaluations']:.0f} evaluations\n{quality}", fontsize=10)
        for pair in range(2):
            shown = pixels(r["pictures"][pair])
            off = 1 - (STRENGTH * abs(shown - truth[pair])).clip(0, 1)
            for axes, image in zip(column[2 * pair : 2 * pair + 2], (shown, off), strict=True):
                axes.imshow(image)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_color("#dddddd")
    for pair in range(2):
        grid[2 * pair + 1][0].set_ylabel(f"difference x {STRENGTH}", fontsize=9)
    write(figure, path)


def draw(rows: list[dict], path: Path) -> None:
    """The same pictures by every method, one line each."""
    figure = figure_of(4 + 1.1 * SHOWN, 1.15 * len(rows))
    grid = figure.subplots(len(rows), SHOWN + 1, width_ratios=[3.2] + [1] * SHOWN)
    for line, r in zip(grid, rows, strict=True):
        quality = "reference" if math.isinf(r["psnr_db"]) else f"{r['psnr_db']:.1f} dB"
        text = f"{r['name']}\n{r['evaluations']:.1f} evaluations, {r['seconds']:.2f} s, {quality}"
        line[0].text(0, 0.5, text, va="center", fontsize=9, wrap=True)
        for axes, png in zip(line[1:], r["pictures"], strict=True):
            axes.imshow(pixels(png))
        for axes in line:
            axes.axis("off")
    write(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py demo")
    parser.add_argument("--seeds", type=int, default=2, help="seeds per prompt; 2 gives 16 pictures per method")
    options = parser.parse_args()
    started = time.monotonic()
    print("starting ComfyUI", flush=True)
    with Server(OUT / "server.log") as url:
        print(f"sampling {len(METHODS)} methods x {len(PROMPTS) * options.seeds} pictures", flush=True)
        rows = asyncio.run(run_all(url, options.seeds))
    draw(rows, OUT / "demo.png")
    draw_beside(rows, OUT / "side_by_side.png")
    rows = [{k: v for k, v in r.items() if k != "pictures"} for r in rows]
    save(OUT / "report.json", rows)
    print(table(rows, ("name", "evaluations", "seconds", "psnr_db", "psnr_min_db")))
    print(f"{time.monotonic() - started:.0f} s; see demo/out/demo.png and demo/out/report.json")


if __name__ == "__main__":
    main()
