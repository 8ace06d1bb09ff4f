"""PSNR against evaluations for schedules that were solved from calibrated statistics, on prompts they have not seen.

    python dev.py bench frontier [--models flux unet] [--pictures 12] [--runs 8]

Writes bench/out/frontier.json, docs/frontier.md and docs/frontier.png. Calibrated on some prompts and seeds, scored on
others; every schedule runs through a profile and the Cache Loader, as a user's does. `--models` keeps the rows of the
models that are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time

from lab.boot import ROOT, boot
from lab.rows import mean, mean_db, save, table

from .fidelity import PROMPTS as HELD_OUT

OUT = ROOT / "bench" / "out" / "frontier.json"
PAGE = ROOT / "docs" / "frontier.md"
PLOT = ROOT / "docs" / "frontier.png"
STEPS = 28
COUNTS = (7, 8, 10, 11, 12, 14)
SCHEDULERS = {"flux": ("simple", "beta"), "unet": ("normal", "karras")}
PREDICTORS = {"reuse": 0, "Taylor 1": 1, "Newton 2": 2}
PICK, EXPECTED, STEP, ECAD = "Calibrate", "Calibrate, unchecked", "ERTACache + step coefficient", "ECAD"
ECAD_RUNS = 600

# How near to the best schedule Calibrate's pick is meant to be.
NEAR_DB = 0.5
COLUMNS = (
    "model", "scheduler", "predictor", "name", "evaluations", "psnr_db", "psnr_min_db", "error_pct",
    "expected_error_pct", "drift_pct", "expected_drift_pct",
)  # fmt: skip
HEAD = """# Solved schedules

Written by `python dev.py bench frontier`: {steps} euler steps, cfg 1, calibrated on {runs} prompts and seeds, scored on
{pictures} others; PSNR of the final latent against the plain run, mean over the pictures.

*even* is uniform spacing with the last step, *CacheQuant* its dynamic programme on the distance to the last key step,
*forecast-aware* the exact programme for the predictor's error, *weighted* the same with every error weighted by what it
leaves in the result, *coherent* the search for the least expected error of the result, *drift budget*, *ERTACache* and
*MagCache* thresholds found by bisection. **Calibrate** is what the node picks: of the four schedules expected to be
best, even spacing among them, all sampled on the calibration prompts, the first one that no later one beats by more
than the standard error of their difference. *Calibrate, unchecked* is the one expected to be best, without sampling
(`check` 0).

Where the pick is not the best, which steps matter differs from prompt to prompt: PSNRs of single pictures lie 10 to 20
dB apart, and the standard error of the difference, over the pictures, is given beside it. Leaving each calibration run
out of the solving, and sampling it, did not choose better; more prompts do. Karras spaces the steps so that even
spacing is already near the best. ECAD's blocks are reused, not forecast: on a network of five blocks that is the reuse
row, and its search finds little beyond whole steps.

![PSNR against evaluations](frontier.png)

"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench frontier")
    parser.add_argument("--models", nargs="*", default=("flux", "unet"))
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--runs", type=int, default=8)
    options = parser.parse_args()
    boot()
    rows: list[dict] = []
    for name in options.models:
        for scheduler in SCHEDULERS[name]:
            rows += measure(name, scheduler, options.pictures, options.runs)
            print(table(rows[-6:], COLUMNS), flush=True)
    made = {row["model"] for row in rows}
    older = json.loads(OUT.read_text()) if OUT.exists() else []
    rows = sorted([*rows, *(r for r in older if r["model"] not in made)], key=lambda r: r["model"])
    save(OUT, rows)
    plot(rows)
    head = HEAD.format(steps=STEPS, pictures=options.pictures, runs=options.runs)
    short = "\n\n".join([gains_table(rows), agreement(rows), cost_table(rows), ecad_table(rows)])
    PAGE.write_text(f"{head}{short}\n\n{table(schedules(rows), COLUMNS)}\n")
    print(short)


def measure(name: str, scheduler: str, pictures: int, runs: int) -> list[dict]:
    """The rows of one model and scheduler."""
    import comfy.samplers
    import torch
    from slipstream.demo import emoji
    from slipstream.engine.calibration.choice import SCHEDULES, Search, evident
    from slipstream.engine.calibration.profile import Profile
    from slipstream.engine.calibration.search import adjusted_sigmas, step_coefficients
    from slipstream.engine.families import architecture_of
    from slipstream.engine.metrics import psnr, relative_error
    from slipstream.engine.run.plan import CacheConfig, PredictorConfig
    from slipstream.engine.run.recipe import described, resolve
    from slipstream.engine.run.samplers import sampler_traits
    from slipstream.engine.sites.levels import MODEL_OUTPUT
    from slipstream.host.calibrate import recording as calibration
    from slipstream.host.canvas import events
    from slipstream.host.model import add_cache, add_predictor, plan_of
    from slipstream.host.parts import PROFILE

    torch.set_num_threads(1)
    base = emoji.load_flux() if name == "flux" else emoji.load_unet()
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), scheduler, STEPS)
    values = tuple(float(s) for s in sigmas)
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    label = f"tiny_{'flux' if name == 'flux' else 'sd15'}_emoji"

    def job(model, prompts, seed: int) -> calibration.Job:
        each = tuple((emoji.conditioning(p), seed + i) for i, p in enumerate(prompts))
        return calibration.Job(model, each, emoji.conditioning(""), 1.0, sampler, sigmas, latent)

    seen = job(base, [emoji.PROMPTS[i % len(emoji.PROMPTS)] for i in range(runs)], 500)
    unseen = job(base, [HELD_OUT[i % len(HELD_OUT)] for i in range(pictures)], 4000)
    with torch.inference_mode():
        rows = cost(label, scheduler, seen, calibration)
        recorded = calibration.record(seen)
        truth = [unseen.sample(base, i) for i in range(pictures)]
    size = calibration.size_of(base, recorded.finals)

    def run(model, which, reference) -> dict:
        scores, errors, drifts = [], [], []
        for i, final in enumerate(reference):
            with torch.inference_mode():
                result = which.sample(model, i)
            report = events.last_report(plan_of(model))
            scores.append(psnr(result, final))
            errors.append(relative_error(result, final))
            drifts.append(report["drift_mean"])
        return {"evaluations": report["computed"], "psnr_db": mean_db(scores), "psnr_min_db": min(scores),
                "error_pct": 100 * mean(errors), "drift_pct": 100 * mean(drifts), "each_db": scores}  # fmt: skip

    def stepped(keys: tuple[int, ...]) -> dict:
        """ERTACache's schedule sampled with its own lengths of steps."""
        changed = adjusted_sigmas(values, step_coefficients(recorded.statistics, keys))
        model = add_cache(base, CacheConfig(node_id="b"))
        model.set_attachments(PROFILE, Profile(keys, changed, recorded.statistics, "", MODEL_OUTPUT, "reuse 0"))
        return run(model, dataclasses.replace(unseen, sigmas=torch.tensor(changed)), truth)

    for predictor_name, order in PREDICTORS.items():
        planned = base if not order else add_predictor(base, PredictorConfig("Taylor", order))
        row = architecture_of(base.get_model_object("diffusion_model"))
        predictor = resolve(plan_of(planned), sampler_traits(sampler), row, values).predictor
        search = Search(recorded.statistics, predictor, values, calibration.growth_of(seen, recorded))
        common = {"model": label, "scheduler": scheduler, "predictor": predictor_name, "sampler": "euler",
                  "steps": STEPS, "runs": pictures}  # fmt: skip
        for count in COUNTS:
            ranked = search.candidates(count)
            even = search.keys("even", count)
            checked = [c.keys for c in ranked[: calibration.Wish().check]]
            if even not in checked:
                checked[-1] = even
            scored, known = {}, {}
            for candidate in ranked:
                profile = Profile(candidate.keys, values, recorded.statistics, "", MODEL_OUTPUT, described(predictor))
                model = add_cache(planned, CacheConfig(node_id="b"))
                model.set_attachments(PROFILE, profile)
                scored[candidate.keys] = {
                    **common, **run(model, unseen, truth), "expected_error_pct": 100 * candidate.error / size,
                    "expected_drift_pct": 100 * candidate.drift,
                }  # fmt: skip
                if candidate.keys in checked:
                    known[candidate.keys] = run(model, seen, recorded.finals)["each_db"]
            for schedule in SCHEDULES:
                keys = search.keys(schedule, count)
                if keys is not None:
                    rows.append({"name": schedule, **scored[keys]})
            erta = search.keys("ERTACache", count)
            if not order and erta is not None:
                rows.append({"name": STEP, **common, **stepped(erta)})
            rows.append({"name": EXPECTED, **scored[ranked[0].keys]})
            order_of = [c.keys for c in ranked if c.keys in known]
            rows.append({"name": PICK, **scored[order_of[evident([known[k] for k in order_of])]]})
    if name == "flux" and scheduler == "simple":
        rows += blocks(label, scheduler, seen, unseen, truth, calibration)
    return rows


def blocks(label: str, scheduler: str, seen, unseen, truth, calibration) -> list[dict]:
    """ECAD's front on single blocks, searched on three runs, scored on the pictures no schedule has seen."""
    import torch
    from slipstream.engine.calibration.ecad import cost_of, evolve, heuristics
    from slipstream.engine.calibration.profile import BLOCKS, Profile
    from slipstream.engine.families import architecture_of
    from slipstream.engine.metrics import psnr, relative_error
    from slipstream.engine.sites.levels import EACH
    from slipstream.engine.sites.stack import block_sizes

    network = seen.model.get_model_object("diffusion_model")
    sizes = block_sizes(network, architecture_of(network))
    few = dataclasses.replace(seen, runs=seen.runs[:3])
    with torch.inference_mode():
        recorded = calibration.record(few)
    values = seen.values

    def results(table, job) -> list:
        model = calibration.following(
            job.model, Profile((0,), values, recorded.statistics, "", EACH, "", extras={BLOCKS: table.contiguous()})
        )
        with torch.inference_mode():
            return [job.sample(model, i) for i in range(len(job.runs))]

    def error_of(table) -> float:
        pairs = zip(results(table, few), recorded.finals, strict=True)
        return mean(relative_error(value, final) for value, final in pairs)

    found = [(g.blocks, ECAD, 100 * g.error) for g in evolve(error_of, STEPS, sizes, ECAD_RUNS // len(few.runs))]
    found += [(t, "even, for ECAD", None) for t in heuristics(STEPS, len(sizes), sizes)]
    rows = []
    for mask, name, error in found:
        scores = [psnr(value, final) for value, final in zip(results(mask, unseen), truth, strict=True)]
        rows.append(
            {"name": name, "model": label, "scheduler": scheduler, "sampler": "euler", "steps": STEPS,
             "evaluations": STEPS * cost_of(mask, sizes), "psnr_db": mean_db(scores), "psnr_min_db": min(scores),
             "calibrated_error_pct": error, "runs": len(truth)}
        )  # fmt: skip
    return sorted(rows, key=lambda r: (r["name"], r["evaluations"]))


def cost(label: str, scheduler: str, job, calibration) -> list[dict]:
    """Seconds and memory of the full runs with and without recording, in turns."""
    import torch
    from slipstream.engine.calibration.recorder import Recorder

    peak, push = [0], Recorder.push

    def counted(self, *args, **kwargs):
        push(self, *args, **kwargs)
        peak[0] = max(peak[0], self.nbytes)

    one = calibration.Job(job.model, job.runs[:1], job.negative, job.cfg, job.sampler, job.sigmas, job.latent)
    plain, recorded = [], []
    Recorder.push = counted
    try:
        for _ in range(6):
            started = time.perf_counter()
            one.sample(one.model, 0)
            plain.append(time.perf_counter() - started)
            started = time.perf_counter()
            result = calibration.record(one)
            recorded.append(time.perf_counter() - started)
    finally:
        Recorder.push = push
    steps = result.statistics.steps
    # the tables are made in float64 from the samples, one more of that size is the difference of two
    tables = 2 * 8 * steps * min(Recorder().sample, job.latent["samples"].numel())
    return [
        {
            "name": "cost", "model": label, "scheduler": scheduler, "sampler": "euler", "steps": STEPS,
            "evaluations": STEPS, "plain_seconds": min(plain), "seconds": min(recorded),
            "ratio": sorted(r / p for r, p in zip(recorded, plain, strict=True))[len(plain) // 2],
            "memory_mb": (peak[0] + tables) / 1e6, "threads": torch.get_num_threads(),
        }
    ]  # fmt: skip


def schedules(rows: list[dict]) -> list[dict]:
    return [r for r in rows if "predictor" in r]


def ecad_table(rows: list[dict]) -> str:
    """ECAD's front and the tables it began with."""
    chosen = [r for r in rows if ECAD in r["name"]]
    columns = ("model", "scheduler", "name", "evaluations", "psnr_db", "psnr_min_db", "calibrated_error_pct")
    head = (
        f"Single blocks reused: the front that ECAD's search found in {ECAD_RUNS} samplings of three calibration runs, "
        "and the even tables it began with, on the same unseen pictures; evaluations are the work of blocks that ran."
    )
    return f"{head}\n\n{table(chosen, columns)}"


def _groups(rows: list[dict]):
    """((model, scheduler, predictor), {(name, computed steps): row}) of all."""
    chosen = schedules(rows)
    for key in dict.fromkeys((r["model"], r["scheduler"], r["predictor"]) for r in chosen):
        mine = [r for r in chosen if (r["model"], r["scheduler"], r["predictor"]) == key]
        yield key, {(r["name"], round(r["evaluations"])): r for r in mine}


def gains_table(rows: list[dict]) -> str:
    """How far Calibrate's pick is above even spacing and below the best schedule, per model and predictor."""
    lines = [
        "| model | scheduler | predictor | above even at 11 of 28 (dB) | mean over all (dB) "
        "| below the best, mean (dB) | worst (dB), and its standard error | unchecked: above even, mean (dB) "
        "| below the best, worst (dB) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    firsts, losses = [], []
    for key, by in _groups(rows):

        def psnr(name: str, count: int, by=by) -> float:
            return by[name, count]["psnr_db"]

        best = {c: max(r["psnr_db"] for (_, n), r in by.items() if n == c) for c in COUNTS}
        above = {c: psnr(PICK, c) - psnr("even", c) for c in COUNTS}
        below = [best[c] - psnr(PICK, c) for c in COUNTS]
        worst = COUNTS[below.index(max(below))]
        blind = [best[c] - psnr(EXPECTED, c) for c in COUNTS]
        gain = mean(psnr(EXPECTED, c) - psnr("even", c) for c in COUNTS)
        firsts.append(above[11])
        losses += below
        lines.append(
            f"| {' | '.join(key)} | {above[11]:+.1f} | {mean(above.values()):+.1f} | {mean(below):.1f} "
            f"| {max(below):.1f} +- {_standard_error(by, worst):.1f} | {gain:+.1f} | {max(blind):.1f} |"
        )
    near = sum(loss <= NEAR_DB for loss in losses)
    lines.append(
        f"\nAbove even spacing at 11 of 28 (40 %), mean of all rows: {mean(firsts):+.1f} dB. Within {NEAR_DB} dB of "
        f"the best schedule: {near} of {len(losses)} times, {mean(losses):.1f} dB below it on average."
    )
    return "\n".join(lines)


def _standard_error(by: dict, count: int) -> float:
    """Of the mean difference between the best schedule and Calibrate's pick, over the pictures."""
    best = max((r for (_, n), r in by.items() if n == count), key=lambda r: r["psnr_db"])
    pairs = zip(best["each_db"], by[PICK, count]["each_db"], strict=True)
    return math.sqrt(statistics.variance(a - b for a, b in pairs) / best["runs"])


def agreement(rows: list[dict]) -> str:
    """How near the expected numbers are to those measured on prompts that were not calibrated on."""
    picks = [r for r in schedules(rows) if r["name"] == PICK]
    lines = ["| model | scheduler | expected / measured drift, range | expected / measured error, range |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for key in dict.fromkeys((r["model"], r["scheduler"]) for r in picks):
        mine = [r for r in picks if (r["model"], r["scheduler"]) == key]
        drift = sorted(r["expected_drift_pct"] / r["drift_pct"] for r in mine)
        error = sorted(r["expected_error_pct"] / r["error_pct"] for r in mine)
        lines.append(
            f"| {' | '.join(key)} | {drift[0]:.2f} to {drift[-1]:.2f} | {error[0]:.2f} to {error[-1]:.2f}, "
            f"median {error[len(error) // 2]:.2f} |"
        )
    return "\n".join(lines)


def cost_table(rows: list[dict]) -> str:
    """What a calibration run costs."""
    costs = [r for r in rows if r["name"] == "cost"]
    columns = ("model", "scheduler", "plain_seconds", "seconds", "ratio", "memory_mb")
    head = "One full run with recording and growth measurement beside a plain one, in turns, median of six:"
    return f"{head}\n\n{table(costs, columns)}"


def plot(rows: list[dict]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = dict(_groups(rows))
    panels = list(dict.fromkeys(key[:2] for key in groups))
    figure = Figure(figsize=(11, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {
        "even": "#999999", "CacheQuant": "#56B4E9", "forecast-aware": "#E69F00", "weighted": "#009E73",
        "coherent": "#CC79A7", "drift budget": "#0072B2", "ERTACache": "#F0E442", "MagCache": "#000000",
    }  # fmt: skip
    grid = figure.subplots(len(panels), len(PREDICTORS), squeeze=False, sharex=True)
    for line, panel in zip(grid, panels, strict=True):
        for axes, predictor in zip(line, PREDICTORS, strict=True):
            by = groups[(*panel, predictor)]
            for name, colour in colours.items():
                points = [(c, by[name, c]["psnr_db"]) for c in COUNTS if (name, c) in by]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, color=colour, label=name)
            points = [(c, by[PICK, c]["psnr_db"]) for c in COUNTS]
            axes.plot(*zip(*points, strict=True), "o", ms=10, mfc="none", mec="#D55E00", mew=1.5, label=PICK)
            axes.set_title(f"{', '.join(panel)}, {predictor}", fontsize=9)
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    grid[-1][0].set_xlabel(f"evaluations of {STEPS}")
    grid[-1][0].set_ylabel("PSNR, dB")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=90)


if __name__ == "__main__":
    main()
