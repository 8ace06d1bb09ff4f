"""A small and a large model in one sampling run: how near to the large one's result, at what cost, by switch point.

    python dev.py bench hybrid [--samplers euler dpmpp_2m] [--pictures 12]

Writes bench/out/hybrid.json, docs/hybrid.md and docs/hybrid.png. The trained Flux is the large model, the one distilled
from it the small one; prompts and seeds are those of `bench fidelity`, which no preset was set on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass

from lab.boot import ROOT, boot
from lab.rows import mean, mean_db, save, table

from .fidelity import PROMPTS as HELD_OUT

OUT = ROOT / "bench" / "out" / "hybrid.json"
PAGE = ROOT / "docs" / "hybrid.md"
PLOT = ROOT / "docs" / "hybrid.png"
STEPS, BATCH, FIRST_SEED = 28, 6, 7000
SAMPLERS = ("euler", "dpmpp_2m")
POINTS = (0.1, 0.2, 0.3, 0.34, 0.4, 0.5, 0.6, 0.66, 0.7, 0.8, 0.9)
FEWER = (26, 24, 20, 16, 14, 12, 10, 8, 6, 4)
LARGE, SMALL, SMALL_FIRST, LARGE_FIRST, FLOOR = "large", "small", "small first", "large first", "fewer steps"
LARGE_MODEL, SMALL_MODEL = "tiny_flux_emoji", "tiny_flux_emoji_small"

# T-Stitch (arXiv 2402.14167, abstract): 40 % of the early steps by a model ten times as fast, without loss of FID.
STITCHED = 0.4
# Hybrid SD (arXiv 2408.06646, abstract): the large model's cost down by 66 %.
SPARED = 0.66

COLUMNS = (
    "name", "switch_at", "steps", "on_large", "on_small", "work", "seconds", "psnr_db", "psnr_min_db", "dissimilarity",
    "at_equal_work_db", "at_equal_seconds_db",
)  # fmt: skip
HEAD = """# A small and a large model in one run

Written by `python dev.py bench hybrid`: the trained Flux as the large model, the small one distilled from it
(`demo/models/README.md`), joined by the Hybrid Model Switch; {steps} steps, cfg 1, {pictures} held-out prompts and
seeds.

- `switch_at`: the fraction of the steps after which the second model takes over; `on_large`, `on_small`: evaluations.
- `work`: arithmetic of the networks, the plain run of the large model being 1; `seconds`: CPU seconds per picture, one
  thread, batch {batch}. An evaluation of the small model takes {flops:.0f} % of the large one's arithmetic and
  {time:.0f} % of its time.
- `psnr_db`: final latent against that of the plain run of the large model with the same sampler, over its range, mean
  of the pictures. `dissimilarity`: 1 - SSIM of the decoded pictures (uniform 8x8 windows): a structural measure, not a
  learned perceptual distance.
- `at_equal_work_db`, `at_equal_seconds_db`: PSNR of the plain alternative, fewer steps of the large model, at the same
  work and at the same seconds, interpolated between the rows *fewer steps*.

![Nearness and cost against the switch point](hybrid.png)

"""


@dataclass(frozen=True)
class Method:
    """One row. switch_at: None for a run of one model, which `first` names."""

    name: str
    switch_at: float | None = None
    steps: int = STEPS


METHODS = (
    Method(LARGE),
    *(Method(SMALL_FIRST, at) for at in POINTS),
    *(Method(LARGE_FIRST, at) for at in POINTS),
    Method(SMALL),
    *(Method(FLOOR, steps=n) for n in FEWER),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench hybrid")
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
    parser.add_argument("--pictures", type=int, default=12)
    options = parser.parse_args()
    boot()
    bench = Bench(options.pictures)
    rows = []
    for sampler in options.samplers:
        rows += against_floor(bench.measure(sampler))
        print(table(rows[-len(METHODS) :], COLUMNS), flush=True)
    save(OUT, rows)
    rows = json.loads(OUT.read_text())
    plot(rows)
    PAGE.write_text(page(rows))


class Bench:
    """Both models and what all rows share."""

    def __init__(self, pictures: int):
        import torch
        from slipstream.demo import emoji

        torch.set_num_threads(1)
        self.large, self.small, self.vae = emoji.load_flux(), emoji.load_small_flux(), emoji.load_vae()
        prompts = [HELD_OUT[i % len(HELD_OUT)] for i in range(pictures)]
        self.batches = [(prompts[i : i + BATCH], FIRST_SEED + i) for i in range(0, pictures, BATCH)]
        self.pictures = pictures
        self._sample(self.small, "euler", 2)  # loads the models
        self._sample(self.large, "euler", 2)
        self.work = {LARGE: work_of(self.large), SMALL: work_of(self.small)}

    def prepare(self, method: Method):
        from slipstream.host.switch.segments import SwitchConfig
        from slipstream.host.switch.switch import add_switch

        if method.switch_at is None:
            return self.small if method.name == SMALL else self.large
        pair = (self.small, self.large) if method.name == SMALL_FIRST else (self.large, self.small)
        return add_switch(*pair, SwitchConfig(method.switch_at, node_id="bench"))

    def _sample(self, model, sampler: str, steps: int) -> tuple[list, float]:
        """(final latents of all pictures, CPU seconds per picture); CPU time, so that other programs do not count."""
        import comfy.sample
        import torch
        from slipstream.demo import emoji

        latents, seconds = [], 0.0
        for prompts, seed in self.batches:
            blank = torch.zeros(len(prompts), 16, 16, 16)
            noise = comfy.sample.prepare_noise(blank, seed)
            conds = emoji.conditioning(prompts), emoji.conditioning([""] * len(prompts))
            began = time.process_time()
            with torch.inference_mode():
                done = comfy.sample.sample(
                    model, noise, steps, 1.0, sampler, "simple", *conds, blank, seed=seed, disable_pbar=True
                )
            seconds += time.process_time() - began
            latents += done.unbind()
        return latents, seconds / self.pictures

    def measure(self, sampler: str) -> list[dict]:
        """The rows of one sampler."""
        import torch
        from slipstream.engine.metrics import psnr, ssim

        def decoded(latents):
            with torch.inference_mode():
                return self.vae.decode(torch.stack(latents)).clamp(0, 1)

        rows, truth, shown = [], None, None
        for method in METHODS:
            latents, seconds = self._sample(self.prepare(method), sampler, method.steps)
            if truth is None:
                truth, shown = latents, decoded(latents)
            scores = [psnr(z, t) for z, t in zip(latents, truth, strict=True)]
            pairs = zip(decoded(latents), shown, strict=True)
            on_large, on_small = evaluations(method)
            whole = STEPS * self.work[LARGE]
            rows.append(
                {
                    "name": method.name, "model": LARGE_MODEL, "small_model": SMALL_MODEL, "sampler": sampler,
                    "steps": method.steps, "switch_at": method.switch_at, "evaluations": on_large + on_small,
                    "on_large": on_large, "on_small": on_small,
                    "work": (on_large * self.work[LARGE] + on_small * self.work[SMALL]) / whole, "seconds": seconds,
                    "psnr_db": mean_db(scores), "psnr_min_db": min(scores),
                    "dissimilarity": mean(1 - ssim(p[None], t[None]) for p, t in pairs), "runs": self.pictures,
                }
            )  # fmt: skip
        return rows


def evaluations(method: Method) -> tuple[int, int]:
    """(on the large model, on the small one); both samplers evaluate once per step."""
    if method.switch_at is None:
        return (0, method.steps) if method.name == SMALL else (method.steps, 0)
    first = int(method.switch_at * method.steps + 0.5)
    return (method.steps - first, first) if method.name == SMALL_FIRST else (first, method.steps - first)


def work_of(model) -> float:
    """Floating point operations of one evaluation, as PyTorch counts them."""
    import torch
    from slipstream.demo import emoji
    from torch.utils.flop_counter import FlopCounterMode

    tokens, pooled = (t[None] for t in emoji.encode_text(HELD_OUT[0]))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.model.apply_model(torch.randn(1, 16, 16, 16), torch.tensor([0.5]), c_crossattn=tokens, y=pooled)
    return float(counter.get_total_flops())


def against_floor(rows: list[dict]) -> list[dict]:
    """The rows with what fewer steps of the large model give for the same work and the same seconds."""
    floor = [r for r in rows if r["name"] == FLOOR]
    for row in rows:
        if row["name"] not in (LARGE, FLOOR):
            row["at_equal_work_db"] = interpolated([(r["work"], r["psnr_db"]) for r in floor], row["work"])
            row["at_equal_seconds_db"] = interpolated([(r["seconds"], r["psnr_db"]) for r in floor], row["seconds"])
    return rows


def interpolated(points: list[tuple[float, float]], at: float) -> float | None:
    """Linear between the two neighbours; None outside."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0) if x1 > x0 else y0
    return None


def cost_of_small(rows: list[dict]) -> tuple[float, float]:
    """(arithmetic, time) of an evaluation of the small model, as parts of the large one's."""
    euler = [r for r in rows if r["sampler"] == rows[0]["sampler"]]
    large, small = (next(r for r in euler if r["name"] == name) for name in (LARGE, SMALL))
    return small["work"] / large["work"], small["seconds"] / large["seconds"]


def claims(rows: list[dict]) -> str:
    """What the two papers' rules come to here, one line per sampler."""
    lines = [
        "| rule | sampler | work saved | seconds saved | PSNR (dB) | 1 - SSIM | beside the large model's picture "
        "| fewer large steps, same work (dB) | same seconds (dB) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rules = (
        (f"T-Stitch: the small model has the first {100 * STITCHED:.0f} %", SMALL_FIRST, STITCHED),
        (f"Hybrid SD: {100 * SPARED:.0f} % fewer large steps, large first", LARGE_FIRST, round(1 - SPARED, 2)),
        ("the same saving, small first", SMALL_FIRST, SPARED),
    )  # fmt: skip
    for sampler in dict.fromkeys(r["sampler"] for r in rows):
        mine = [r for r in rows if r["sampler"] == sampler]
        plain = next(r for r in mine if r["name"] == LARGE)
        for words, name, at in rules:
            row = next(r for r in mine if r["name"] == name and r["switch_at"] == at)
            lines.append(
                f"| {words} | {sampler} | {100 * (1 - row['work']):.0f} % "
                f"| {100 * (1 - row['seconds'] / plain['seconds']):.0f} % | {row['psnr_db']:.1f} "
                f"| {row['dissimilarity']:.3f} | {_beside(row['psnr_db'])} | {_db(row['at_equal_work_db'])} "
                f"| {_db(row['at_equal_seconds_db'])} |"
            )
    return "\n".join(lines)


def findings(rows: list[dict]) -> str:
    """What all rows say together, in sentences."""
    switched = [r for r in rows if r["name"] in (SMALL_FIRST, LARGE_FIRST)]

    def nearer(key: str) -> str:
        known = [r for r in switched if r[key] is not None]
        return f"{sum(r['psnr_db'] > r[key] for r in known)} of {len(known)}"

    by = {(r["sampler"], r["name"], r["switch_at"]): r["psnr_db"] for r in switched}
    gains = [
        psnr - by[sampler, SMALL_FIRST, round(1 - at, 2)]
        for (sampler, name, at), psnr in by.items()
        if name == LARGE_FIRST
    ]
    floor = next(r for r in rows if r["name"] == FLOOR and r["steps"] == 12)
    return "\n".join(
        (
            "- With as many steps on the small model, the large one first is nearer to the large model's result than "
            f"the small one first by {mean(gains):.1f} dB on average ({min(gains):+.1f} to {max(gains):+.1f}).",
            f"- {nearer('at_equal_work_db')} switched runs are nearer than fewer steps of the large model with the "
            f"same work, {nearer('at_equal_seconds_db')} with the same seconds: this Flux needs few steps (12 euler "
            f"steps give {floor['psnr_db']:.1f} dB). Try fewer steps, or a cache, first; switch where those fail.",
            "- Both papers judge sets of pictures (FID), where another picture that is as good is no loss, and "
            "T-Stitch's small model is ten times as fast. Eight prompts cannot measure that; what is checked here is "
            "whether it stays the same picture. An unrelated seed scores 14.6 dB.",
        )
    )


def _beside(psnr: float) -> str:
    """The words of the Speed & Quality Report."""
    return "hard to tell apart" if psnr >= 40 else "small differences" if psnr >= 30 else "visibly different"


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def page(rows: list[dict]) -> str:
    """docs/hybrid.md from the rows."""
    flops, seconds = cost_of_small(rows)
    pictures = rows[0]["runs"]
    parts = [HEAD.format(steps=STEPS, pictures=pictures, batch=BATCH, flops=100 * flops, time=100 * seconds)]
    parts.append(f"## The papers' rules\n\n{claims(rows)}\n\n{findings(rows)}\n")
    for sampler in dict.fromkeys(r["sampler"] for r in rows):
        mine = [{k: _shown(k, v) for k, v in r.items()} for r in rows if r["sampler"] == sampler]
        parts.append(f"## {sampler}\n\n{table(mine, COLUMNS)}\n")
    return "\n".join(parts)


def _shown(column: str, value: object) -> object:
    """JSON has no infinity: where a PSNR is missing, the result was identical."""
    if column in ("psnr_db", "psnr_min_db") and value is None:
        return "identical"
    return f"{value:.4f}" if column == "dissimilarity" else value


def plot(rows: list[dict]) -> None:
    """One line of panels per sampler: PSNR and 1 - SSIM against the switch point, PSNR against seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samplers = list(dict.fromkeys(r["sampler"] for r in rows))
    figure = Figure(figsize=(12, 3.5 * len(samplers)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {SMALL_FIRST: "#E69F00", LARGE_FIRST: "#0072B2", FLOOR: "#999999"}
    for line, sampler in zip(figure.subplots(len(samplers), 3, squeeze=False), samplers, strict=True):
        mine = [r for r in rows if r["sampler"] == sampler]
        small = next(r for r in mine if r["name"] == SMALL)
        for name, colour in colours.items():
            chosen = [r for r in mine if r["name"] == name]
            style = dict(marker="o", ms=3.5, lw=1.2, color=colour, label=name)
            if name != FLOOR:
                # at the ends one model has every step; where it is the large one, nothing is left to measure
                end = 1.0 if name == SMALL_FIRST else 0.0
                points = sorted([(end, small), *((r["switch_at"], r) for r in chosen)], key=lambda p: p[0])
                line[0].plot([at for at, _ in points], [r["psnr_db"] for _, r in points], **style)
                apart = sorted([(1 - end, 0.0), *((at, r["dissimilarity"]) for at, r in points)])
                line[1].plot(*zip(*apart, strict=True), **style)
                chosen = [r for _, r in points]
            chosen = sorted(chosen, key=lambda r: r["seconds"])
            line[2].plot([r["seconds"] for r in chosen], [r["psnr_db"] for r in chosen], **style)
        line[0].axvline(STITCHED, color="#CC79A7", lw=1, ls=":")
        line[0].annotate(" T-Stitch", (STITCHED, 0.95), xycoords=("data", "axes fraction"), fontsize=7)
        line[0].axvline(1 - SPARED, color="#009E73", lw=1, ls=":")
        line[0].annotate("Hybrid SD ", (1 - SPARED, 0.95), xycoords=("data", "axes fraction"), fontsize=7, ha="right")
        for axes, what, below in zip(
            line,
            ("PSNR to the large model, dB", "1 - SSIM to the large model", "PSNR to the large model, dB"),
            ("switch point (part of the steps)", "switch point (part of the steps)", "CPU seconds per picture"),
            strict=True,
        ):
            axes.set_title(f"{sampler}: {what}", fontsize=9)
            axes.set_xlabel(below, fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
        line[2].legend(fontsize=7)
    figure.savefig(PLOT, dpi=76)


if __name__ == "__main__":
    main()
