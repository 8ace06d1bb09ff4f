"""What taking errors back gives on the trained small models: every published term, anchors, and what limits them.

    python dev.py bench compensation [--models flux unet] [--pictures 32] [--minutes 0]

Writes bench/out/compensation.json and docs/compensation.md. Coefficients are fitted on some prompts and seeds, kept or
dropped on others, and scored on others again, all in the real host by the node's own code. CPU, one thread. --minutes:
after so many, side questions (other decays, other places, a stochastic sampler) are left out; 0 asks them all.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import statistics
import time

from lab.boot import ROOT, boot
from lab.rows import mean, mean_db, save

from .compensation_models import (
    COMPUTED,
    FIT_BATCH,
    FIT_RUNS,
    QUANTISERS,
    SHARE,
    SMALL_STEPS,
    STEPS,
    Lab,
    cached,
    cpu_seconds,
    lab_of,
    quantised_models,
    quick_layers,
)
from .compensation_page import ANCHORS, page

OUT = ROOT / "bench" / "out" / "compensation.json"
PAGE = ROOT / "docs" / "compensation.md"

# Terms tried one by one: every one where a run is short, a choice where a run takes long on a CPU.
EVERY = (
    "PTQD", "TAC-Diffusion", "ERTACache factor", "ERTACache", "CacheQuant", "TCEC", "local", "cumulative", "mixed",
    "with memory", "across channels",
)  # fmt: skip
EVERY_QUANTISED = ("PTQD", "TCEC", "cumulative")
BRIEF = ("CacheQuant", "TCEC", "cumulative", "with memory")
DECAYS = (0.0, 0.8, 0.95, 1.0)
MODEL_DECAYS = (0.9,)
AGES = (1, 2, 4, 8)


class Measured:
    """Rows of one model: PSNR of the final latents against the full run, and against the setting without correction."""

    def __init__(self, lab: Lab):
        self.lab, self.rows = lab, []
        self.plain: dict[str, list[float]] = {}

    def add(self, setting: str, name: str, model, **more) -> dict:
        from slipstream.engine.metrics import psnr
        from slipstream.host.canvas import events
        from slipstream.host.model import plan_of

        began = time.process_time()
        result = self.lab.unseen.sample(model, 0)
        spent = time.process_time() - began
        each = [min(psnr(a, b), 100.0) for a, b in zip(result, self.lab.truth, strict=True)]
        base = self.plain.setdefault(setting, each)
        gains = [a - b for a, b in zip(each, base, strict=True)]
        report = (events.last_report(plan_of(model)) if plan_of(model).node_ids else None) or {}
        told = report.get("compensation") or {}
        anchored = told.get("anchor_seconds") or 0.0
        row = {
            "model": self.lab.name, "setting": setting, "name": name, "sampler": "euler", "steps": STEPS,
            "evaluations": report.get("computed", STEPS) + len(told.get("anchors", ())), "seconds": spent,
            "psnr_db": mean_db(each), "psnr_min_db": min(each), "gain_db": mean(gains),
            "error_db": statistics.stdev(gains) / len(gains) ** 0.5, "better": sum(g > 0 for g in gains),
            "pictures": len(each), "correction_seconds": told.get("seconds"),
            "reference": told.get("reference"), "added_pct": 100 * anchored / (spent - anchored) if anchored else None,
            "anchor_seconds": anchored or None, "made_seconds": told.get("reference_seconds"),
            "memory_mb": (told.get("reference_bytes") or 0) / 1e6 or None, "anchors": told.get("anchors"), **more,
        }  # fmt: skip
        self.rows.append(row)
        print(f"{setting:24} {name:34} {row['psnr_db']:6.2f} {row['gain_db']:+6.2f} +-{row['error_db']:.2f} "
              f"{spent:5.1f} s", flush=True)  # fmt: skip
        return row

    def again(self, setting: str, name: str, like: str, **more) -> dict:
        """The row of a run that is the same as one there is, with another name."""
        found = next(r for r in self.rows if r.get("setting") == setting and r["name"] == like)
        self.rows.append(found | {"name": name} | more)
        return self.rows[-1]


# -- what is measured ------------------------------------------------------------------------------------------------


def compensated(model, anchors: int, reference: str = "auto"):
    """The model through an Error Compensator, as the node puts it there."""
    from slipstream.engine.run.plan import CompensatorConfig
    from slipstream.host.model import add_compensator

    return add_compensator(model, CompensatorConfig("none", anchors, node_id="e", reference=reference))


def with_coefficients(model, found, lab: Lab, anchors: int):
    """The model with fitted coefficients at work; without any where the fit has found none."""
    from slipstream.engine.correction.corrections import THETA
    from slipstream.engine.correction.correctors import METHODS
    from slipstream.engine.run.plan import CompensatorConfig
    from slipstream.host.calibrate.fitting import Follow, watched

    config = CompensatorConfig(anchors=anchors, node_id="e")
    if not found.about["terms"]:
        return watched(model, None, config)
    theta = found.extras[THETA]
    follow = Follow(METHODS[found.about["terms"]], None, lab.seen.values, None, theta, learn=False)
    return watched(model, follow, config)


def terms_of(measured: Measured, setting: str, model, quantised: bool, names, anchors: int = 0) -> None:
    """Rows of the setting with every term fitted as its authors do it, kept whatever the gate says, and with auto."""
    from slipstream.engine.correction.correctors import METHODS
    from slipstream.engine.run.plan import CompensatorConfig
    from slipstream.host.calibrate import fitting
    from slipstream.host.model import plan_of

    lab, known = measured.lab, measured.lab.known()
    config = CompensatorConfig(anchors=anchors)
    after = f" + {anchors} anchors" if anchors else ""
    for name in names:
        theta = fitting.coefficients(lab.seen, model, known[0], METHODS[name], range(FIT_RUNS - 1), config)[0]
        follow = fitting.Follow(METHODS[name], None, lab.seen.values, None, theta, learn=False)
        measured.add(setting, name + after, fitting.watched(model, follow, config), ungated=True)
    found = fitting.fit(lab.seen, model, quantised, config, known=known)
    told = {"chose": found.about["terms"] or "none", "predicted_db": found.about["gain_db"],
            "why": found.about.get("why", "")}  # fmt: skip
    if not found.about["terms"]:
        measured.again(setting, "auto" + after, f"{anchors} anchors" if anchors else "none", **told)
        return
    counted = {} if plan_of(model).node_ids else {"evaluations": STEPS + anchors}  # the fit's runs report to no node
    measured.add(setting, "auto" + after, with_coefficients(model, found, lab, anchors), **told, **counted)


def uncached(measured: Measured, setting: str, model, order: int) -> None:
    """Anchors on the model without its cache, and the same evaluations simply computed."""
    row = measured.add(setting, f"{ANCHORS} anchors, uncached", compensated(model, ANCHORS, "uncached model"))
    plain = cached(measured.lab.base, measured.lab, order, more=row["anchors"])
    measured.add(setting, "the same steps computed instead", plain)


def stitched(measured: Measured) -> None:
    """A small model in the early steps: anchors on the large one, fitted terms, and other uses of the same seconds."""
    from slipstream.demo import emoji
    from slipstream.host.compensate.reference import LargeModel
    from slipstream.host.switch.segments import SwitchConfig
    from slipstream.host.switch.switch import add_switch

    lab, small = measured.lab, emoji.load_small_flux()
    setting = f"small model for {SMALL_STEPS} steps"

    def switched(model, steps: int = SMALL_STEPS):
        return add_switch(model, lab.base, SwitchConfig(steps / STEPS))

    def add(name: str, model, anchors: int = 0) -> None:
        measured.add(setting, name, model, evaluations=STEPS + anchors)

    add("none", switched(small))
    for fewer in (2, 3, 6):
        add(f"for {SMALL_STEPS - fewer} steps instead", switched(small, SMALL_STEPS - fewer))
    for count in (1, 2, 3):
        add(_anchors(count), switched(compensated(small, count)), count)
    terms_of(measured, setting, switched(small), False, BRIEF)
    decay = LargeModel.decay
    try:
        for LargeModel.decay in MODEL_DECAYS:
            add(f"2 anchors, {LargeModel.decay:g} left per step", switched(compensated(small, 2)), 2)
    finally:
        LargeModel.decay = decay


def _anchors(count: int) -> str:
    return f"{count} anchor{'s' * (count > 1)}"


def placements(measured: Measured, setting: str, model, known, in_time) -> None:
    """Anchors with several decays and in several places, on one setting. known: products of two steps' residuals."""
    from slipstream.engine.calibration.choice import error_effects, gaussian_jacobians
    from slipstream.engine.correction import anchors as rules
    from slipstream.host.calibrate import recording
    from slipstream.host.compensate import compensator as compensate
    from slipstream.host.compensate.reference import BetterWeights

    lab, sigmas = measured.lab, measured.lab.seen.values
    flow = lab.name.endswith("flux_emoji")
    decay, placed = BetterWeights.decay, compensate.placed
    try:
        for BetterWeights.decay in DECAYS:
            if in_time():
                name = f"{ANCHORS} anchors, {BetterWeights.decay:g} left per step"
                measured.add(setting, name, compensated(model, ANCHORS))
    finally:
        BetterWeights.decay = decay
    if not in_time():
        return
    first = dataclasses.replace(lab.seen, runs=lab.seen.runs[:1], model=model)
    plain = dataclasses.replace(first, model=lab.base)
    measured_growth = error_effects(sigmas, recording.growth_of(plain, recording.record(plain)))
    gaussian_growth = error_effects(sigmas, gaussian_jacobians(sigmas, 1.0, flow))
    even = tuple(round((k + 0.5) * STEPS / ANCHORS) for k in range(ANCHORS))
    for name, places in {
        "even": even,
        "the other kind's rule": rules.placed(sigmas, ANCHORS, not flow),
        "solved, measured growth": rules.solved(known, measured_growth, ANCHORS),
        "solved, Gaussian growth": rules.solved(known, gaussian_growth, ANCHORS),
    }.items():
        if not in_time():
            return
        try:
            compensate.placed = lambda *_, places=places: places
            measured.add(setting, f"{ANCHORS} anchors, {name}", compensated(model, ANCHORS))
        finally:
            compensate.placed = placed


def predictable(measured: Measured, setting: str, quantised: bool, model=None, order: int = 0) -> list:
    """How much of a residual's energy is explained, on unseen pictures, by step, channel, place, state and the past.

    Residuals are those on the reference's own trajectory: of a quantised model at every step, of a cached one those of
    the forecast one and two steps after a computed one. Returns the reference's runs.
    """
    import torch
    from slipstream.engine.forecast.predictors import Predictor
    from slipstream.host.calibrate import fitting

    lab = measured.lab
    job = lab.seen if model is None else dataclasses.replace(lab.seen, model=model)
    runs = fitting.references(job, quantised)[0] if quantised else lab.known()[0]
    x = torch.stack([torch.stack(t.states) for t in runs], 1).flatten(1, 2)  # steps, pictures, channels, places
    d = torch.stack([torch.stack(t.slopes) for t in runs], 1).flatten(1, 2)
    if quantised:
        whole = torch.stack([torch.stack(t.residuals) for t in runs], 1).flatten(1, 2)
    else:
        rule = Predictor("newton" if order else "reuse", order)
        whole = torch.zeros_like(d)
        for i in range(3 * (order + 1), STEPS):
            last = i - 1 - (i % 2)
            times = [last - 3 * k for k in range(order, -1, -1)]
            weights = rule.weights([float(t) for t in times], float(i))[0]
            whole[i] = d[i] - sum(w * d[t] for w, t in zip(weights, times, strict=True))
    steps = range(4 * (order + 1), STEPS)
    fast = d - whole
    half = (FIT_RUNS - 1) * FIT_BATCH
    found: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, left, energy) -> None:
        found.setdefault(name, []).append((float(left), float(energy)))

    def regressed(columns: list, want, name: str, per_channel: bool = True) -> None:
        """columns: each [pictures, channels, ...]; fitted on the first half, scored on the rest."""
        phi = torch.stack([c.double().flatten(2) for c in columns], -1)  # pictures, channels, places, P
        w = want.double().flatten(2)
        a, b = phi[:half], w[:half]
        a = a.movedim(1, 0).flatten(1, 2) if per_channel else a.flatten(0, 2)[None]
        b = b.movedim(1, 0).flatten(1, 2) if per_channel else b.flatten()[None]
        gram = a.mT @ a
        gram = gram + 1e-3 * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) + 1e-9 * torch.eye(gram.shape[-1])
        theta = torch.linalg.solve(gram, (a.mT @ b[..., None])[..., 0])
        theta = theta if per_channel else theta.expand(w.shape[1], -1)
        left = w[half:] - torch.einsum("bcmp,cp->bcm", phi[half:], theta)
        note(name, left.square().sum(), w[half:].square().sum())

    for i in steps:
        want, one = whole[i], torch.ones_like(whole[i])
        regressed([one], want, "the step: one mean", per_channel=False)
        regressed([one], want, "step and channel: a mean each")
        mean_map = want[:half].double().mean(0)
        note("step, channel and position: a mean each", (want[half:].double() - mean_map).square().sum(),
             want[half:].double().square().sum())  # fmt: skip
        regressed([fast[i]], want, "step, channel, a gain (PTQD, TAC)")
        regressed([fast[i], x[i], one], want, "step, channel, {d, x, 1}")
        every = [fast[i][:, c : c + 1].expand_as(want) for c in range(want.shape[1])]
        states = [x[i][:, c : c + 1].expand_as(want) for c in range(want.shape[1])]
        regressed([*every, *states, one], want, "step, all channels of d and x")
        around = torch.nn.functional.unfold(
            torch.cat([fast[i], x[i]], 1).flatten(0, 1)[:, None], 3, padding=1
        )  # 3 x 3 neighbours
        near = around.reshape(want.shape[0], 2, want.shape[1], 9, *want.shape[2:])
        regressed([*near[:, 0].unbind(2), *near[:, 1].unbind(2), one], want, "step, channel, 3 x 3 of d and x")
        for age in AGES:
            if i - age >= 0 and quantised:
                regressed([whole[i - age]], want, f"the same picture's residual {age} step{'s' * (age > 1)} before")
        if not quantised and i - 3 >= 3:
            regressed([whole[i - 2 - i % 2 + 1]], want, "the same picture's last measured forecast error")
    if quantised:
        share = {"name": "variance", "variance_share": _calmer(lab, whole)}
        measured.rows.append({"model": lab.name, "setting": setting, **share})
    for name, pairs in found.items():
        left, energy = (sum(v) for v in zip(*pairs, strict=True))
        measured.rows.append(
            {"model": lab.name, "setting": setting, "name": name, "table": "bound",
             "explained_pct": 100 * (1 - left / energy)}
        )  # fmt: skip
        print(f"{setting:24} {name:48} {100 * (1 - left / energy):6.1f} %", flush=True)
    return runs


def _calmer(lab: Lab, residuals) -> float:
    """The largest part of euler_ancestral's noise that PTQD's variance correction would leave out, over the steps."""
    from lab.noise import calmer_noise

    sigmas, shares = lab.seen.values, [0.0]
    for i, (high, low) in enumerate(itertools.pairwise(sigmas)):
        if not low:
            continue
        deviation = float(residuals[i].std())
        if lab.name.endswith("flux_emoji"):  # rectified flow, eta 1: sample_euler_ancestral_RF
            down = low * (1 + (low / high - 1))
            scale = (1 - low) / (1 - down)
            up = max(low**2 - (down * scale) ** 2, 0.0) ** 0.5
        else:
            up = min(low, (low**2 * (high**2 - low**2) / high**2) ** 0.5)
            down = (low**2 - up**2) ** 0.5
        if up:
            shares.append(1 - calmer_noise(up, down - high, deviation) / up)
    return max(shares)


def stochastic(measured: Measured, model) -> None:
    """Anchors with a sampler that adds noise."""
    import comfy.samplers

    lab, setting = measured.lab, "SVDQuant + GPTQ, euler_ancestral"
    # the first half of the batch draws other noise than a whole one, so all of it
    job = dataclasses.replace(lab.unseen, sampler=comfy.samplers.sampler_object("euler_ancestral"))
    other = Measured(dataclasses.replace(lab, unseen=job, truth=job.sample(lab.base, 0)))
    other.add(setting, "none", model)
    other.add(setting, f"{ANCHORS} anchors", compensated(model, ANCHORS))
    measured.rows += [row | {"sampler": "euler_ancestral"} for row in other.rows]


def corrector_ms(channels: int = 16, size: int = 128) -> float:
    """Milliseconds of the offline corrector on a latent of FLUX at 1024 x 1024, one CPU thread."""
    import torch
    from slipstream.engine.correction.correctors import METHODS, corrected

    terms, slope = METHODS["with memory"], torch.randn(1, channels, size, size)
    theta = 0.01 * torch.randn(channels, 4)
    corrected(terms, theta, slope, slope, slope)
    began = time.process_time()
    for _ in range(20):
        corrected(terms, theta, slope, slope, slope)
    return (time.process_time() - began) * 1000 / 20


def measure(name: str, pictures: int, finish, in_time):
    """All rows of one model; finish: called with the rows after every setting; in_time: whether there is time for side
    questions. Yields once, between what has to be known and those."""
    lab = lab_of(name, pictures)
    measured = Measured(lab)
    rows, whole = measured.rows, name == "flux"
    rows.append({"model": lab.name, "name": "full", "table": "cost", "seconds": lab.seconds, "ms": corrector_ms()})
    models = quantised_models(lab)
    title, best = "SVDQuant + GPTQ", models["SVDQuant + GPTQ"]
    measured.add(title, "none", best)
    for count in (2, ANCHORS, 2 * ANCHORS) if whole else (2, ANCHORS):
        measured.add(title, f"{count} anchors", compensated(best, count))
    measured.add(title, f"{ANCHORS} anchors on the original", compensated(best, ANCHORS, "original weights"))
    measured.add(title, f"{SHARE:.0%} of the weights in 8 bit", models["raised"])
    finish(rows)
    if whole:
        stitched(measured)
        finish(rows)
    for order, title in enumerate(("reuse", "Taylor 1")):
        model = cached(lab.base, lab, order)
        measured.add(title, "none", model)
        for more in (1, 2, ANCHORS) if whole else (1, ANCHORS):
            measured.add(
                title, f"{COMPUTED + more} computed evaluations", cached(lab.base, lab, order, COMPUTED + more)
            )
        uncached(measured, title, model, order)
        terms_of(measured, title, model, False, EVERY if whole and not order else BRIEF)
        predictable(measured, title, False, order=order)
        finish(rows)
    for order, title in enumerate(("reuse", "Taylor 1")):
        title, model = f"SVDQuant + GPTQ, {title}", cached(best, lab, order)
        measured.add(title, "none", model)
        measured.add(title, f"{ANCHORS} anchors", compensated(model, ANCHORS))
        more = cached(best, lab, order, COMPUTED + ANCHORS)
        measured.add(title, f"{COMPUTED + ANCHORS} computed evaluations", more)
        terms_of(measured, title, model, True, (), ANCHORS)
        finish(rows)
    title = "SVDQuant + GPTQ"
    terms_of(measured, title, best, True, EVERY_QUANTISED if whole else ())
    terms_of(measured, title, best, True, (), ANCHORS)
    runs = predictable(measured, title, True, best)
    finish(rows)
    for title in QUANTISERS:
        if title in measured.plain:
            continue
        measured.add(title, "none", models[title])
        measured.add(title, f"{ANCHORS} anchors", compensated(models[title], ANCHORS))
        terms_of(measured, title, models[title], True, ())
        finish(rows)
    yield
    if in_time():
        stochastic(measured, best)
    finish(rows)
    placements(measured, "SVDQuant + GPTQ", best, runs[0].gram(), in_time)
    finish(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench compensation")
    parser.add_argument("--models", nargs="*", default=("flux", "unet"))
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=0.0, help="then leave out side questions; 0: never")
    parser.add_argument("--page", action="store_true", help="write the page from the rows there are")
    options = parser.parse_args()
    boot()
    import torch

    torch.set_num_threads(1)
    quick_layers()
    cpu_seconds()
    logging.getLogger("slipstream").setLevel(logging.WARNING)
    began, made = time.monotonic(), {}
    if OUT.exists():
        for row in json.loads(OUT.read_text()):
            made.setdefault(row["model"], []).append(row)

    def finish(rows: list[dict]) -> None:
        made[rows[0]["model"]] = rows
        save(OUT, [row for model in sorted(made) for row in made[model]])

    def in_time() -> bool:
        return not options.minutes or time.monotonic() - began < 60 * options.minutes

    parts = [measure(name, options.pictures, finish, in_time) for name in (() if options.page else options.models)]
    with torch.inference_mode():
        for _ in range(2):  # what has to be known of every model, then the side questions
            for part in parts:
                next(part, None)
    PAGE.write_text(page([row for model in sorted(made) for row in made[model]]))


if __name__ == "__main__":
    main()
