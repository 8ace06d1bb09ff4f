"""The Speed & Quality Report: its numbers, the runs it makes itself, its verdict and its card."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import folder_paths
import numpy as np
import pytest
import torch
from sampling import Lab
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.run.plan import CacheConfig
from slipstream.host import gauge
from slipstream.host.canvas import events
from slipstream.host.canvas.colours import COLOURS, as_image
from slipstream.host.model import add_cache
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.host.report import card as report_card
from slipstream.host.report import report
from slipstream.host.report import runs as report_runs
from slipstream.host.report.card import draw, marks
from slipstream.host.report.fewer import fewer_sigmas
from slipstream.host.report.plain import plain_of
from slipstream.host.report.report import Connected
from slipstream.host.report.runs import Sampling
from slipstream.host.switch.segments import SwitchConfig, segments_of
from slipstream.host.switch.switch import add_switch
from slipstream.nodes.report import Report

STEPS, SIZE = 10, (8, 8)


@pytest.fixture
def out(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def vae():
    return emoji.load_vae()


def sigmas(model, steps=STEPS, scheduler="simple"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def sampled(lab: Lab, model, **options) -> torch.Tensor:
    """The host's own sampling, as KSampler does it."""
    return lab.sample(model, size=SIZE, **options)


def sampling(lab: Lab, model, sampler="euler", tell=report_runs.silent, **options) -> Sampling:
    """What `sampled` does, as the node is given it."""
    latent = {"samples": lab.latent(model, 1, SIZE)}
    prompt = emoji.conditioning(emoji.PROMPTS[:1])
    return Sampling(
        prompt, None, 1.0, comfy.samplers.sampler_object(sampler), sigmas(model, **options), latent, 1, tell
    )


def make(given: Connected) -> dict:
    """The JSON of a report, which holds no number that JSON does not know."""
    with torch.inference_mode():
        text = report.make_report(given, "card")[1]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


def own_psnr(value, true, peak):
    return 10 * math.log10(peak**2 / float(((np.float64(value) - np.float64(true)) ** 2).mean()))


def own_ssim(x, y, n=8):
    """Wang's formula over every window of n x n."""
    x, y = (np.lib.stride_tricks.sliding_window_view(np.float64(p), (n, n), axis=(0, 1)) for p in (x, y))
    mx, my = x.mean((-2, -1)), y.mean((-2, -1))
    cov = (x * y).mean((-2, -1)) - mx * my
    top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    return float((top / ((mx**2 + my**2 + 1e-4) * (x.var((-2, -1)) + y.var((-2, -1)) + 9e-4))).mean())


def test_what_it_samples_itself_is_what_the_host_samples_and_the_numbers_are_right(lab, vae, out, monkeypatch):
    """One node gives all four results; counted in the network; one strip, that of the accelerated run."""
    flux, fast = lab.flux, lab.every(lab.flux, 3, node="fast")
    strips = []
    monkeypatch.setattr(events, "evaluation", lambda run, now: strips.append(run.plan.node_ids))
    with lab.calls(flux) as calls:
        numbers = make(Connected(model=fast, vae=vae, sampling=sampling(lab, flux)))
    assert strips == [("fast", "fastp")] * STEPS and numbers["run"] == lab.report(fast)
    rows = {row["name"]: row for row in numbers["rows"]}
    count = numbers["run"]["computed"]
    fewer = f"{count} plain steps"
    assert list(rows) == ["accelerated", "plain", fewer, "another seed"]
    made = [rows[name]["evaluations"] for name in rows]
    assert made == [count, STEPS, count, STEPS] and sum(made) == len(calls)
    results = {
        "accelerated": sampled(lab, fast, steps=STEPS), "plain": sampled(lab, flux, steps=STEPS),
        fewer: sampled(lab, flux, steps=count), "another seed": sampled(lab, flux, steps=STEPS, seed=2),
    }  # fmt: skip
    pictures = {name: vae.decode(latent)[0].numpy() for name, latent in results.items()}
    true = results["plain"]
    assert rows["plain"]["latent_relative_error"] == 0.0 and rows["plain"]["picture_ssim"] == 1.0
    for name in ("accelerated", fewer, "another seed"):
        row = rows[name]
        assert row["latent_psnr_db"] == pytest.approx(own_psnr(results[name], true, float(true.max() - true.min())))
        assert row["picture_psnr_db"] == pytest.approx(own_psnr(pictures[name], pictures["plain"], 1.0))
        assert row["picture_ssim"] == pytest.approx(own_ssim(pictures[name], pictures["plain"]))
        assert row["seconds"] > 0 and row["peak_memory_bytes"] > 1e7
    assert numbers["drift_mean"] == numbers["run"]["drift_mean"] > 0
    assert f"{fewer} of the same cost" in numbers["verdict"]
    assert sorted(p.name for p in out.iterdir()) == ["card_00001_.json", "card_00001_.png"]


def test_the_plain_run_is_bit_identical_also_where_it_samples_a_given_result_again(lab, out):
    fast = lab.every(lab.flux, 3, node="again")
    samples = {"samples": sampled(lab, fast, steps=STEPS)}
    before = lab.report(fast)
    given = Connected(samples, None, fast, sampling=sampling(lab, lab.flux), floors="none")
    numbers = make(given)
    assert lab.report(fast) is before and len(numbers["rows"]) == 2
    with torch.inference_mode():
        again = given.sampling.plain(plain_of(fast))
    assert torch.equal(again.latent["samples"], sampled(lab, lab.flux, steps=STEPS)) and again.evaluations == STEPS
    assert numbers["latent_psnr_db"] == pytest.approx(
        report.compare(samples["samples"], again.latent["samples"])["latent_psnr_db"]
    )


def test_quantised_weights_are_taken_out_for_the_plain_run_and_are_back_after_it(lab, out):
    """And their fewer steps are those of equal time, because an evaluation is not the same thing."""
    flux = lab.flux
    true = sampled(lab, flux, steps=6)
    four = quantise(flux, QuantWish(rank=8))
    samples = sampled(lab, four, steps=6)
    given = Connected({"samples": samples}, None, four, sampling=sampling(lab, flux, steps=6), floors="none")
    numbers = make(given)
    assert numbers["latent_psnr_db"] == pytest.approx(report.compare(samples, true)["latent_psnr_db"])
    sizes = numbers["weights_bytes"]
    assert sizes["accelerated"] < 0.6 * sizes["plain"] == pytest.approx(0.6 * flux.model_size())
    off = plain_of(four)
    with torch.inference_mode():
        assert torch.equal(given.sampling.plain(off).latent["samples"], true)
    assert off.model.model_size() == flux.model_size() and report._by_time(given, off)
    assert torch.equal(sampled(lab, four, steps=6), samples) and torch.equal(sampled(lab, flux, steps=6), true)


def test_plain_of_a_switch_is_the_large_model_but_experts_of_one_size_both_stay(lab, out):
    small, large = emoji.load_small_flux(), lab.flux
    off = plain_of(add_switch(small, lab.every(large, 3), SwitchConfig(0.5, node_id="s")))
    assert off.model.model is large.model and len(segments_of(off.model)) == 1 and "largest model" in off.what
    experts = add_switch(lab.every(large, 3), lab.every(large, 3), SwitchConfig(0.5, node_id="s"))
    asked = sampling(lab, large)
    off = plain_of(experts)
    assert len(segments_of(off.model)) == 2 and "both models" in off.what
    with torch.inference_mode():
        taken = asked.plain(off)
    assert taken.evaluations == STEPS and torch.equal(taken.latent["samples"], sampled(lab, large, steps=STEPS))


def test_a_switched_run_is_found_and_told_by_its_models(lab, vae, out):
    """Also where a cache on one of the models has a report of its own; and the strip knows every mark."""
    small = add_cache(emoji.load_small_flux(), CacheConfig(preset="Off", node_id="cache"))
    plain = add_cache(lab.flux, CacheConfig(preset="Off", node_id="plain"))
    switched = add_switch(small, lab.flux, SwitchConfig(0.25, node_id="switch"))
    results = [{"samples": sampled(lab, model, steps=8)} for model in (switched, plain)]
    with torch.inference_mode():
        card, text, _, _ = report.make_report(Connected(*results, switched, plain, vae), "card")
    numbers = json.loads(text)
    assert [s["evaluations"] for s in numbers["run"]["segments"]] == [2, 6] and len(numbers["rows"]) == 2
    assert "2 of 8 evaluations by a small model" in numbers["verdict"]
    assert marks(numbers["run"]) == {"computed": 6, "small model": 2}

    def has(card, colour):
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return bool(((card[0] - wanted).abs().amax(-1) < 0.01).any())

    assert has(card, COLOURS["small model"]) and not has(card, COLOURS["remote"])
    trace = numbers["run"]["trace"]
    trace[0].update(action="remote"), trace[3].update(anchor=True), trace[4].update(action="something new")
    numbers["rows"] = [{k: math.inf if v is None else v for k, v in row.items()} for row in numbers["rows"]]
    marked = as_image(draw(numbers, []))
    assert all(has(marked, COLOURS[mark]) for mark in ("remote", "anchor", "computed"))


def test_a_cancelled_report_writes_nothing_and_leaves_the_strip(lab, out):
    fast = lab.every(lab.flux, 3, node="stop")
    samples = {"samples": sampled(lab, fast, steps=STEPS)}
    before = lab.report(fast)

    def tell(sentence, steps):
        def callback(step, *rest):
            if "another seed" in sentence and step == 3:
                raise comfy.model_management.InterruptProcessingException

        return callback

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        make(Connected(samples, None, fast, sampling=sampling(lab, lab.flux, tell=tell)))
    assert not list(out.iterdir()) and lab.report(fast) is before


def test_nothing_skipped_and_nan_are_said(lab, vae, out):
    asked = sampling(lab, lab.flux, steps=4)
    same = make(Connected(model=lab.fast(lab.flux, node="few"), sampling=asked, floors="fewer steps"))
    assert same["verdict"].startswith("Identical to the plain result (nothing is skipped: at 4 steps")
    assert len(same["rows"]) == 2 and "cost as much as the plain one" in " ".join(same["remarks"])
    broken = lab.latent(lab.flux, 2, SIZE)
    broken[0, 0, 0, 0] = math.nan
    told = make(Connected({"samples": broken}, {"samples": torch.rand_like(broken)}, vae=vae))
    assert "NaN" in told["verdict"] and told["latent_psnr_db"] is None and told["picture_shown"] == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(steps=12), "made with 10 steps of euler, but 12 steps of euler are connected here"),
        (dict(sampler="heun"), "10 steps of euler, but 10 steps of heun"),
        (dict(scheduler="karras"), "made with other sigmas"),
        (dict(steps=0), "the sigmas have no step"),
    ],
)
def test_samples_of_another_sampling_are_refused_before_anything_runs(lab, out, change, sentence):
    fast = lab.every(lab.flux, 3, node="other")
    samples = {"samples": sampled(lab, fast, steps=STEPS)}
    asked = sampling(lab, lab.flux, **{k: v for k, v in change.items() if v})
    asked = asked if change.get("steps") != 0 else replace(asked, sigmas=asked.sigmas[:1])
    with lab.calls(fast) as calls, pytest.raises(SlipstreamError, match=sentence):
        make(Connected(samples, None, fast, sampling=asked))
    large = {"samples": torch.zeros(1, 16, 24, 16)}
    with lab.calls(fast) as more, pytest.raises(SlipstreamError, match=r"\[1, 16, 24, 16\] but latent_image gives"):
        make(Connected(large, None, lab.flux, sampling=sampling(lab, lab.flux)))
    assert not calls and not more and not list(out.iterdir())


def test_what_is_missing_is_named(lab):
    latent = {"samples": lab.latent(lab.flux, 1, SIZE)}
    asked = sampling(lab, lab.flux)
    for given, sentence in (
        (Connected(), "samples is not connected; connect it, or positive, sampler, sigmas and latent_image"),
        (Connected(latent), "reference is not connected"),
        (Connected(latent, latent, floors="fewer steps"), "for 'fewer steps' connect positive"),
        (Connected(latent, latent, floors="best"), "there is no floor 'best'"),
        (Connected(reference=latent, sampling=asked, reference_model=lab.flux), "connect model"),
        (Connected(latent, {"samples": lab.latent(lab.flux, 2, SIZE)}), "sample both at the same size"),
        (Connected({"samples": SimpleNamespace(is_nested=True)}, latent), "several tensors"),
    ):
        with pytest.raises(SlipstreamError, match=sentence):
            make(given)


def test_the_node_samples_and_shows_the_verdict(lab, out, monkeypatch):
    """Its widgets have no names that a canvas takes for a seed to change after every run."""
    told = []
    monkeypatch.setattr(Report, "hidden", SimpleNamespace(unique_id="9"), raising=False)
    monkeypatch.setattr("slipstream.nodes.report.show", lambda node, text: told.append((node, text)))
    asked = sampling(lab, lab.flux, steps=8)
    with torch.inference_mode():
        done = Report.execute(
            "card", model=lab.flux, positive=asked.positive, sampler=asked.sampler, sigmas=asked.sigmas,
            latent_image=asked.latent, sampler_seed=1, floors="none",
        )  # fmt: skip
    verdict = json.loads(done.result[1])["verdict"]
    assert verdict == done.ui["text"][0] == "Identical to the plain result."
    assert told == [("9", "sampling: accelerated run"), ("9", "sampling: plain run"), ("9", verdict)]
    assert not {"seed", "noise_seed"} & {i.id for i in Report.define_schema().inputs}


def row(name, db, ssim=0.99, **more):
    return {
        "name": name, "steps": 28, "evaluations": 28.0, "seconds": 2.0, "seconds_only_once": 0.0,
        "peak_memory_bytes": 10**9, "peak_memory_of": gauge.ON_CARD, "latent_psnr_db": db,
        "latent_relative_error": 0.1, "picture_psnr_db": db, "picture_ssim": ssim, **more,
    }  # fmt: skip


RUN = {
    "evaluations": 28, "computed": 11, "computed_share": 11.0, "filled": 17, "note": "", "sampler": "dpmpp_2m",
    "site": "block stack", "chose": "first-block gate 0.08, " * 9, "drift_mean": 0.05, "drift_max": 0.3, "seconds": 1.0,
    "trace": [{"index": i, "action": "forecast" if i % 3 else "computed", "drift": 0.01 * i} for i in range(28)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "fewer", "seed", "speed", "sentence"),
    [
        (53.1, 44.0, 12, 2.42, "2.4 times as fast; nearer to the plain picture (53.1 dB) than 11 plain steps of the "
         "same cost (44.0 dB); another seed would be 12 dB away."),
        (40.0, 44.0, 12, 2.0, "2 times as fast; farther from the plain picture (40.0 dB) than 11 plain steps of the "
         "same cost (44.0 dB), so fewer steps do better; another seed would be 12 dB away."),
        (44.2, 44.0, None, 1.02, "As fast as the plain run; as near to the plain picture (44.2 dB) as 11 plain steps "
         "of the same cost (44.0 dB), so fewer steps do as well."),
        (13.0, 44.0, 12, 2.0, "2 times as fast; no nearer to the plain picture (13.0 dB) than another seed (12.0 dB): "
         "see that seed, prompts and latent are those of the samples, or skip less."),
        (35.0, None, None, 0.5, "Slower, 2 times the time, 11 of 28 evaluations computed; 35.0 dB between the two "
         "pictures, small differences."),
        (math.inf, None, None, 2.0, "Identical to the plain result."),
    ],
)  # fmt: skip
def test_the_verdict_is_one_honest_sentence(error, fewer, seed, speed, sentence):
    rows = [row("accelerated", error), row("plain", math.inf)]
    rows += [row("11 plain steps", fewer)] if fewer else []
    rows += [row("another seed", seed)] if seed else []
    assert report.verdict(rows, RUN, speed) == sentence


@pytest.mark.parametrize("scheduler", ["simple", "karras", "beta"])
def test_fewer_steps_are_those_of_the_same_scheduler(lab, scheduler):
    model = lab.unet
    whole = sigmas(model, 20, scheduler)
    found, name = fewer_sigmas(model, whole, 7)
    assert torch.allclose(found, sigmas(model, 7, scheduler)) and name in comfy.samplers.SCHEDULER_NAMES
    part = sigmas(model, 33, scheduler)[-21:]  # as at denoise 0.6
    found, name = fewer_sigmas(model, part, 7)
    assert len(found) == 8 and name != "interpolated" and found[0] == pytest.approx(float(part[0]), rel=0.3)
    own = torch.linspace(5.0, 0.0, 21) ** 1.3
    found, name = fewer_sigmas(model, own, 7)
    assert name == "interpolated" and found[0] == own[0] and found[-1] == 0 and bool((found.diff() < 0).all())


def test_memory_is_torchs_on_a_card_and_the_processs_ram_elsewhere(monkeypatch):
    asked = []
    for name, value in (("reset_peak_memory_stats", None), ("synchronize", None), ("max_memory_allocated", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda device, n=name, v=value: asked.append(n) or v)
    with gauge.Gauge(torch.device("cuda", 0)) as card:
        asked.append("work")
    assert asked == ["reset_peak_memory_stats", "work", "synchronize", "max_memory_allocated"]
    assert card.reading() == {"peak_memory_bytes": 7, "peak_memory_of": gauge.ON_CARD}
    with gauge.Gauge(torch.device("cpu"), watch_ram=True) as ram:
        block = torch.ones(30_000_000)
    assert ram.reading()["peak_memory_bytes"] > 4 * block.numel() and ram.reading()["peak_memory_of"] == gauge.IN_RAM
    with gauge.Gauge(torch.device("cpu")) as unknown:
        pass
    assert unknown.reading() == {"peak_memory_bytes": None, "peak_memory_of": None}


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (48, 320), (480, 360)])
def test_no_text_of_the_card_lies_on_another_or_outside(shape, monkeypatch):
    """Long names and sentences, many marks, pictures of any shape."""
    boxes = []
    place = report_card._Page.text

    def seen(page, x, y, words, size=10, **style):
        wide, tall = page.wide(words, size, style.get("weight", "normal")), 0.9 * size / 72
        left = x - wide if style.get("ha") == "right" else x
        top = y - tall if style.get("va") == "baseline" else y
        if words.strip():
            boxes.append((left, top, left + wide, top + tall, words))
        place(page, x, y, words, size, **style)

    monkeypatch.setattr(report_card._Page, "text", seen)
    run = copy.deepcopy(RUN)
    for e, action in zip(
        run["trace"], ("reused", "remote", "small model", "something of a later version"), strict=False
    ):
        e["action"] = action
    rows = [row("accelerated", 53.1, picture_psnr_min_db=50.0, picture_shown=2, pictures=4), row("plain", math.inf)]
    rows += [row("111 plain steps", 44.0), row("another seed", 12.0, seconds=12345.678)]
    numbers = {
        "run": run,
        "rows": rows,
        "model": "QwenImage",
        "seed": 2**64 - 1,
        "weights_bytes": {"accelerated": 1, "plain": 2},
        "remarks": ["something long that has to be wrapped " * 6],
        "verdict": "A sentence of many words. " * 8,
    }
    picture = torch.rand(*shape, 3).numpy()
    tiles = [report_card.Tile(r["name"], picture * 0.9**i) for i, r in enumerate(rows)]
    card = as_image(draw(numbers, tiles))
    high, wide = card.shape[1:3]
    assert wide == 1200
    for left, top, right, bottom, words in boxes:
        assert left >= 0.3 and right <= 11.75 and top >= 0.3 and bottom <= high / 100 - 0.3, words
    for i, (left, top, right, bottom, words) in enumerate(boxes):
        for other in boxes[:i]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, f"{words!r} and {other[4]!r}"
