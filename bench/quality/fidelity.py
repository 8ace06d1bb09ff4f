"""How near accelerated runs stay to the full run, at how many evaluations, on the two trained small models.

    python dev.py bench fidelity [--models flux unet] [--samplers euler dpmpp_2m] [--steps 28] [--pictures 8]

Writes bench/out/fidelity.json and docs/fidelity.md. Prompts and seeds are held out: the presets were set on others.

Every row is one method. The plain samplers with fewer steps are the floor that a cache has to beat; beside them stand
the host's own caches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lab.boot import ROOT, boot
from lab.rows import mean, mean_db, save, table

OUT = ROOT / "bench" / "out" / "fidelity.json"
PAGE = ROOT / "docs" / "fidelity.md"
SAMPLERS = ("euler", "dpmpp_2m", "heun", "uni_pc", "res_multistep", "er_sde", "euler_ancestral")
STEPS = (28, 20, 50)
PROMPTS = (
    "angry face", "fox face", "banana", "pizza", "doughnut", "watermelon", "monkey face", "skull",
)  # fmt: skip
FIRST_SEED = 3000
COLUMNS = ("name", "evaluations", "seconds", "psnr_db", "psnr_min_db", "relative_error", "picture_psnr_db")
FEWER = (16, 14, 12, 10, 8)
GOALS = (12, 10)

HEAD = """# Fidelity on the trained small models

Written by `python dev.py bench fidelity`: prompts and seeds held out, batch 1, cfg 1, one CPU thread;
{pictures} pictures per row at 28 steps, half as many at 20 and 50.

- `psnr_db`: final latent against the plain run of the same sampler and steps, over the range of that latent, mean of
  the pictures; `psnr_min_db`: the worst of them; `relative_error`: relative L2; `picture_psnr_db`: decoded pictures.
  An identical result counts as 100 dB.
- *fewer steps* is the floor to beat. Within a sampler's table it is the same sampler; the goals below also hold
  against dpmpp_2m with fewer steps, judged by the same 28 euler steps.
- `evaluations`: how often the network was computed. A filled evaluation is free at the model output; at the last block,
  the block stack and in a U-Net a part of the network still runs: `seconds` shows what that costs on these models,
  whose first block is a fifth of the whole (on FLUX it is 1 of 57).
"""


@dataclass(frozen=True)
class Method:
    """One row: how to prepare the model. cache None: no Cache Loader of ours; wrap: the host's own node."""

    name: str
    cache: dict | None = None
    predictor: dict | None = None
    wrap: Callable | None = None
    steps: int | None = None
    sampler: str | None = None
    kind: str = "ours"  # ours | floor | host | plain
    only: tuple[str, ...] = field(default=())  # samplers


def custom(name: str, kind: str | None = "Taylor", order: int = -1, only: tuple[str, ...] = (), **cache) -> Method:
    predictor = None if kind is None else {"kind": kind, "order": order}
    return Method(name, {"preset": "Custom", **cache}, predictor, only=only)


def host_cache(name: str, threshold: float, copied: bool = False) -> Callable:
    """The host's EasyCache or LazyCache; copied: with the network's input copied first (see `demo/nodes.py`)."""

    def wrap(model):
        from comfy.patcher_extension import WrappersMP
        from comfy_extras import nodes_easycache

        if copied:
            model = model.clone()
            model.add_wrapper_with_key(
                WrappersMP.DIFFUSION_MODEL, "copy", lambda executor, x, *a, **k: executor(x.clone(), *a, **k)
            )
        return getattr(nodes_easycache, f"{name}Node").execute(model, threshold, 0.15, 0.95, False).result[0]

    return wrap


def methods(name: str) -> list[Method]:
    """All rows of one model, in the order of the tables."""
    interval = {"method": "interval"}
    rows = [Method("plain", kind="plain")]
    rows += [Method(f"fewer steps: {n}", steps=n, kind="floor") for n in FEWER]
    rows += [
        Method(f"fewer dpmpp_2m steps: {n}", steps=n, sampler="dpmpp_2m", kind="floor", only=("euler",)) for n in FEWER
    ]
    for threshold in (0.05, 0.1, 0.2, 0.4, 0.8):
        rows.append(Method(f"host LazyCache {threshold}", wrap=host_cache("LazyCache", threshold), kind="host"))
    for threshold in (0.05, 0.2):
        rows.append(Method(f"host EasyCache {threshold}", wrap=host_cache("EasyCache", threshold), kind="host"))
    for threshold in (0.1, 0.2, 0.3, 0.5):
        wrap = host_cache("EasyCache", threshold, copied=True)
        rows.append(Method(f"host EasyCache {threshold}, its input copied first", wrap=wrap, kind="host"))
    for preset in ("Safe", "Balanced", "Fast"):
        rows.append(Method(f"{preset}: Cache Loader", {"preset": preset}))
        rows.append(Method(f"{preset}: Cache Loader + Taylor Predictor", {"preset": preset}, {}))
    rows += [
        custom("output, interval 2, reuse", None, max_skip=1, **interval),
        custom("output, interval 3, reuse", None, max_skip=2, **interval),
        custom("output, interval 3, residual reuse", "Residual reuse", max_skip=2, **interval),
        custom("output, interval 3, Taylor 1", max_skip=2, **interval),
        custom("output, interval 4, Taylor 1", max_skip=3, **interval),
        custom("output, interval 3, Taylor 2", order=2, max_skip=2, **interval),
        custom("output, interval 4, Taylor 2", order=2, max_skip=3, **interval),
        custom("output, interval 3, Hermite 1 (0.5)", "Hermite", max_skip=2, **interval),
        custom("output, interval 3, Adams-Bashforth 1", "Adams-Bashforth", 1, only=("euler",), max_skip=2, **interval),
        custom("output, interval 3, Chebyshev", "Chebyshev", max_skip=2, **interval),
        custom("output, accumulated change 0.1, Taylor 1", method="accumulated change"),
    ]
    if name == "flux":
        rows += [
            custom("last block, interval 3, TaylorSeer 1", "TaylorSeer", 1, site="last block", max_skip=2, **interval),
            custom("last block, interval 3, TaylorSeer 2", "TaylorSeer", 2, site="last block", max_skip=2, **interval),
            custom("last block, interval 6 as published, TaylorSeer 1", "TaylorSeer", 1, site="last block",
                   max_skip=0, **interval),
            custom("last block, drift budget 0.2, Taylor 1", site="last block", drift_budget=0.2),
            custom("block stack, drift budget 0.2, Taylor 1", site="block stack", drift_budget=0.2),
            custom("first-block cache 0.12, residual reuse", None, method="first-block gate"),
            custom("first-block gate 0.2, Taylor 1", method="first-block gate", threshold=0.2),
            custom("TeaCache 0.4 as published", None, method="modulated change"),
            custom("MagCache as published", None, method="magnitude"),
            custom("CG-Taylor gate 0.06, Taylor 1", method="confidence gate", threshold=0.06),
            custom("CG-Taylor gate 0.13 as published, Taylor 1", method="confidence gate"),
            custom("CG-Taylor gate 0.1, per token", "Per token", method="confidence gate", threshold=0.1),
            custom("last block, interval 3, per token (TAP)", "Per token", max_skip=2, **interval),
            custom("last block, interval 4, per token (TAP)", "Per token", max_skip=3, **interval),
            custom("last block, first-block gate 0.2, per token", "Per token", site="last block",
                   method="first-block gate", threshold=0.2),
            custom("last block, first-block gate 0.25, per token", "Per token", site="last block",
                   method="first-block gate", threshold=0.25),
            custom("last block, first-block gate 0.3, per token", "Per token", site="last block",
                   method="first-block gate", threshold=0.3),
        ]  # fmt: skip
    else:
        rows += [
            custom("DeepCache depth 0, interval 3", None, site="U-Net depth", max_skip=0, **interval),
            custom("DeepCache depth 0, power grid 3", None, method="power grid", max_skip=2),
            custom("DeepCache depth 2, interval 3", None, site="U-Net depth", depth=2, max_skip=2, **interval),
            custom("depth 0, drift budget 0.1, Taylor 1", site="U-Net depth"),
            custom("depth 1, drift budget 0.15, Taylor 1", site="U-Net depth", depth=1, drift_budget=0.15),
            custom("depth 2, drift budget 0.15, Taylor 1", site="U-Net depth", depth=2, drift_budget=0.15),
            custom("depth 2, drift budget 0.3, Taylor 1", site="U-Net depth", depth=2, drift_budget=0.3),
            custom("depth 2, confidence gate 0.1, Taylor 1", method="confidence gate", depth=2, threshold=0.1),
            custom("depth 2, first-block gate 0.1, Taylor 1", method="first-block gate", depth=2, threshold=0.1),
            custom("Faster Diffusion key steps", None, site="U-Net encoder"),
            custom("Faster Diffusion key steps, prior noise", None, site="U-Net encoder", prior_noise=True),
            custom("encoder, interval 3, Taylor 1", site="U-Net encoder", max_skip=2, **interval),
            custom("encoder, drift budget 0.2, Taylor 1", site="U-Net encoder", method="drift budget",
                   drift_budget=0.2),
        ]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench fidelity")
    parser.add_argument("--models", nargs="*", default=("flux", "unet"))
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
    parser.add_argument("--steps", nargs="*", type=int, default=STEPS)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--merge", action="store_true", help="keep the rows of the models not measured now")
    options = parser.parse_args()
    boot()
    rows: list[dict] = []
    for name in options.models:
        bench = Bench(name)
        for steps in options.steps:
            pictures = options.pictures if steps == 28 else max(2, options.pictures // 2)
            for sampler in options.samplers:
                rows += bench.measure(sampler, steps, pictures)
                print(
                    table([r for r in rows if r["sampler"] == sampler and r["of"] == steps][-1:], COLUMNS), flush=True
                )
    if options.merge and OUT.exists():
        kept = [r for r in json.loads(OUT.read_text()) if r["model"] not in {row["model"] for row in rows}]
        rows = kept + rows
    save(OUT, rows)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(json.loads(OUT.read_text()), options.pictures))
    for model in dict.fromkeys(row["model"] for row in rows):
        print("\n".join(goal_lines(rows, model)))


class Bench:
    """One trained model and everything that its rows share."""

    def __init__(self, name: str):
        import torch
        from slipstream.demo import emoji

        torch.set_num_threads(1)
        self.name = name
        self.base = emoji.load_flux() if name == "flux" else emoji.load_unet()
        self.label = "tiny_flux_emoji" if name == "flux" else "tiny_sd15_emoji"
        self.scheduler = "simple" if name == "flux" else "normal"
        self.vae = emoji.load_vae()
        self.computed = 0
        network = self.base.model.diffusion_model
        first = network.img_in if name == "flux" else network.time_embed[0]
        first.register_forward_pre_hook(self._count)

    def _count(self, module, args) -> None:
        self.computed += 1

    def prepare(self, method: Method):
        from slipstream.engine.run.plan import CacheConfig, PredictorConfig
        from slipstream.host.model import add_cache, add_predictor

        model = self.base if method.wrap is None else method.wrap(self.base)
        if method.cache is not None:
            model = add_cache(model, CacheConfig(**method.cache, node_id="bench"))
        if method.predictor is not None:
            model = add_predictor(model, PredictorConfig(**method.predictor))
        return model

    def sample(self, model, sampler: str, steps: int, pictures: int):
        """(latents, mean evaluations computed, mean seconds)."""
        import comfy.sample
        import torch
        from slipstream.demo import emoji
        from slipstream.host.canvas import events
        from slipstream.host.model import plan_of

        latents, computed, seconds = [], [], []
        for i in range(pictures):
            prompt, seed = PROMPTS[i % len(PROMPTS)], FIRST_SEED + i
            latent = torch.zeros(1, 16, 16, 16)
            noise = comfy.sample.prepare_noise(latent, seed)
            conds = emoji.conditioning(prompt), emoji.conditioning("")
            self.computed, started = 0, time.perf_counter()
            with torch.inference_mode():
                latents.append(
                    comfy.sample.sample(
                        model, noise, steps, 1.0, sampler, self.scheduler, *conds, latent, seed=seed, disable_pbar=True
                    )
                )
            seconds.append(time.perf_counter() - started)
            report = events.last_report(plan_of(model)) if plan_of(model).node_ids else None
            computed.append(self.computed if report is None else report["computed"])
        return latents, mean(computed), mean(seconds)

    def measure(self, sampler: str, steps: int, pictures: int) -> list[dict]:
        """The rows of one sampler and step count."""
        import torch
        from slipstream.engine.metrics import psnr, relative_error

        def decoded(latents):
            with torch.inference_mode():
                return [self.vae.decode(z).clamp(0, 1) for z in latents]

        self.sample(self.base, sampler, 2, 1)  # loads the model
        rows, truth, shown = [], None, None
        for method in methods(self.name):
            if (method.only and sampler not in method.only) or (method.steps is not None and method.steps >= steps):
                continue
            model = self.prepare(method)
            latents, computed, seconds = self.sample(model, method.sampler or sampler, method.steps or steps, pictures)
            if truth is None:
                truth, shown = latents, decoded(latents)
            scores = [psnr(z, t) for z, t in zip(latents, truth, strict=True)]
            visible = [psnr(p, t, 1.0) for p, t in zip(decoded(latents), shown, strict=True)]
            rows.append(
                {
                    "name": method.name,
                    "kind": method.kind,
                    "model": self.label,
                    "sampler": sampler,
                    "of": steps,
                    "steps": method.steps or steps,
                    "evaluations": computed,
                    "seconds": seconds,
                    "psnr_db": mean_db(scores),
                    "psnr_min_db": min(scores),
                    "relative_error": mean(relative_error(z, t) for z, t in zip(latents, truth, strict=True)),
                    "picture_psnr_db": mean_db(visible),
                    "runs": pictures,
                }
            )
        return rows


def goal_lines(rows: list[dict], model: str) -> list[str]:
    """What the rows say of the goals: the best of ours at a number of evaluations against floor and host caches."""
    euler = [r for r in rows if r["model"] == model and r["sampler"] == "euler" and r["of"] == 28]
    lines = ["| at most | best of ours | floor | above the floor | best of the host's caches | above them |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")

    def best(kind: str, limit: float) -> dict | None:
        found = [r for r in euler if r["kind"] == kind and r["evaluations"] <= limit and r["psnr_db"] is not None]
        return max(found, key=lambda r: r["psnr_db"], default=None)

    def cell(row: dict | None) -> str:
        return "none" if row is None else f"{row['psnr_db']:.1f} dB, {row['name']} ({row['evaluations']:.1f})"

    for limit in GOALS:
        # caches that decide by themselves land where they land: they are given half an evaluation of grace
        ours, floor, host = best("ours", limit + 0.05), best("floor", limit), best("host", limit + 0.5)
        margins = [f"{ours['psnr_db'] - r['psnr_db']:+.1f} dB" if ours and r else "" for r in (floor, host)]
        lines.append(f"| {limit} of 28 | {cell(ours)} | {cell(floor)} | {margins[0]} | {cell(host)} | {margins[1]} |")
    return lines


def page(rows: list[dict], pictures: int) -> str:
    """docs/fidelity.md from the rows."""
    parts = [HEAD.format(pictures=pictures)]
    models = list(dict.fromkeys(r["model"] for r in rows))
    for model in models:
        if any(r["model"] == model and r["sampler"] == "euler" and r["of"] == 28 for r in rows):
            parts.append(f"## Goals: {model}, 28 euler steps\n\n" + "\n".join(goal_lines(rows, model)) + "\n")
    for model in models:
        for steps in dict.fromkeys(r["of"] for r in rows):
            for sampler in dict.fromkeys(r["sampler"] for r in rows):
                chosen = [r for r in rows if (r["model"], r["of"], r["sampler"]) == (model, steps, sampler)]
                if chosen:
                    shown = [{k: _shown(k, v) for k, v in r.items()} for r in chosen]
                    parts.append(f"## {model}, {sampler}, {steps} steps\n\n" + table(shown, COLUMNS) + "\n")
    return "\n".join(parts)


def _shown(column: str, value: object) -> object:
    """JSON has no infinity: where a PSNR is missing, the result was identical."""
    if column.endswith("_db") and value is None:
        return "identical"
    return f"{value:.4f}" if column == "relative_error" else value


if __name__ == "__main__":
    main()
