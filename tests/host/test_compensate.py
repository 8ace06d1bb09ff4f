"""The Error Compensator in the real host: anchors on better weights, fitted terms, honest accounts."""

from __future__ import annotations

import dataclasses
import math

import comfy.samplers
import comfy.weight_adapter
import folder_paths
import pytest
import torch
from sampling import relative
from slipstream.demo import emoji
from slipstream.engine.calibration.profile import Profile
from slipstream.engine.correction.anchors import placed
from slipstream.engine.correction.corrections import THETA, as_extras, correction_of, merged, moments_of
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.metrics import psnr
from slipstream.engine.run.plan import (
    LARGE_MODEL,
    ORIGINAL,
    UNCACHED,
    CacheConfig,
    CompensatorConfig,
    Plan,
    check_compensator,
)
from slipstream.host.calibrate.calibrate import calibrate, summary
from slipstream.host.calibrate.job import Job, Wish
from slipstream.host.canvas import events
from slipstream.host.compensate.reference import LargeModel
from slipstream.host.model import add_cache, add_compensator, plan_of
from slipstream.host.parts import ENTRIES
from slipstream.host.profiles import folder as profiles
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.loras import quantised_modules
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch.segments import TURN, Larger, SwitchConfig, Turn
from slipstream.host.switch.switch import add_switch

STEPS = 8
MLP = "diffusion_model.double_blocks.0.img_mlp.0"


@pytest.fixture(scope="module")
def flux4(lab):
    """The small Flux in ConvRot's 4 bit, quantised once for all tests of this file."""
    return quantise(lab.flux, QuantWish(format="convrot_w4a4"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty profile folder of our own."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, profiles.FOLDER, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def with_anchors(model, anchors: int, **options):
    return add_compensator(model, CompensatorConfig("none", anchors, node_id="e", **options))


def sample(lab, model, **options):
    return lab.sample(model, **{"steps": STEPS, **options})


def told(lab, model) -> dict:
    return lab.report(model)["compensation"]


def with_lora(model, strength: float):
    layer = model.get_model_object(MLP)
    n, k = layer.out_features, layer.in_features
    generator = torch.Generator().manual_seed(5)
    file = {
        "x.lora_up.weight": torch.randn(n, 4, generator=generator) * 0.3 / 2,
        "x.lora_down.weight": torch.randn(4, k, generator=generator) / math.sqrt(k),
    }
    found = comfy.weight_adapter.LoRAAdapter.load("x", file, 2.0, None, set())
    clone = model.clone()
    assert clone.add_patches({f"{MLP}.weight": found}, strength)
    return clone


def test_anchors_bring_a_quantised_model_nearer_and_are_counted(lab, flux4):
    full, plain = (sample(lab, model, batch=3, steps=20) for model in (lab.flux, flux4))
    model = with_anchors(flux4, 5)
    with lab.calls(model) as runs:
        result = sample(lab, model, batch=3, steps=20)
    assert psnr(result, full) > psnr(plain, full) + 1.0
    report, account = lab.report(model), told(lab, model)
    assert len(runs) == 25 and report["evaluations"] == report["computed"] == 20
    assert len(account["anchors"]) == 5 and account["anchor_seconds"] > 0 and account["reference_bytes"] > 1e6
    trace = report["trace"]
    assert [e["u"] for e in trace if e["anchor"]] == account["anchors"]
    assert [e["correction"] is not None for e in trace] == [e["u"] >= account["anchors"][0] for e in trace]
    text = events.node_text(report)
    assert "5 anchors on the 8-bit copy" in text and "MB of RAM" in text and "corrected by" in text


@pytest.mark.parametrize("strength", [0.0, 0.8])
def test_the_original_weights_at_every_step_are_the_model_itself(lab, flux4, strength):
    """Also with a LoRA, which the reference has to have as the 4-bit layers do."""
    loaded = with_lora(flux4, strength) if strength else flux4
    true = sample(lab, with_lora(lab.flux, strength) if strength else lab.flux)
    assert relative(sample(lab, loaded), true) > 1e-2
    assert relative(sample(lab, with_anchors(loaded, STEPS, reference=ORIGINAL)), true) < 1e-4
    assert relative(sample(lab, with_anchors(loaded, STEPS)), true) < 2e-2  # by 8 bit, and by no other LoRA


def test_an_8_bit_copy_is_made_once_and_anew_for_another_lora(lab, flux4):
    model = with_anchors(flux4, 1)
    first = sample(lab, model)
    assert torch.equal(sample(lab, model), first) and told(lab, model)["reference_seconds"] < 0.1
    changed = with_anchors(with_lora(flux4, 0.8), 1)
    assert relative(sample(lab, changed), first) > 1e-2
    assert torch.equal(sample(lab, model), first)


def test_nothing_to_do_is_bit_identical(lab, flux4, folder):
    """strength 0, neither profile nor anchors, a full model: not one bit; with a cache beside it too."""
    for base in (lab.flux, flux4):
        plain = sample(lab, base)
        for config in ({"strength": 0.0}, {"anchors": 0}):
            model = add_compensator(base, CompensatorConfig("none", node_id="e", **config))
            with lab.calls(model) as runs:
                assert torch.equal(sample(lab, model), plain)
            assert len(runs) == STEPS
    assert torch.equal(sample(lab, add_compensator(lab.flux, CompensatorConfig(node_id="e"))), sample(lab, lab.flux))
    cached = lab.every(lab.flux, 2)
    result = sample(lab, add_compensator(cached, CompensatorConfig(strength=0.0, node_id="e")))
    assert torch.equal(result, sample(lab, cached))


def test_what_cannot_be_done_is_said(lab, flux4):
    model = with_anchors(lab.flux, 3)
    assert torch.equal(sample(lab, model), sample(lab, lab.flux))
    assert "no anchors: no layer of this model is quantised" in events.node_text(lab.report(model))
    model = with_anchors(flux4, -1)
    sample(lab, model, steps=4)
    assert "no anchors at 4 steps" in events.node_text(lab.report(model))
    with pytest.raises(SlipstreamError, match="Error Compensator; remove one of the two"):
        with_anchors(model, 1)
    for wrong in ({"anchors": -2}, {"strength": 1.5}, {"terms": "magic"}, {"reference": "a friend"}):
        with pytest.raises(SlipstreamError, match=r"^Error Compensator: .*\.$"):
            check_compensator(CompensatorConfig(**wrong))
    plan = plan_of(model)
    assert Plan.from_json(plan.as_json(), ENTRIES) == plan and plan.node_ids == ("e",)


def test_an_error_at_an_anchor_leaves_the_layers_as_they_are(lab, flux4):
    plain, model = sample(lab, flux4), with_anchors(flux4, 2)

    calls = []

    def failing(arguments, extra):
        calls.append(1)
        if len(calls) == 3:  # evaluations 0 and 1, then the anchor at 1
            raise RuntimeError("out of memory")
        return extra["original_block"](arguments)

    broken = model.clone()
    broken.set_model_patch_replace(failing, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(lab, broken)
    assert all("forward" not in vars(layer) for _, layer in quantised_modules(model))
    assert torch.equal(sample(lab, flux4), plain)


# -- fitted terms ----------------------------------------------------------------------------------------------------


def job_of(lab, model, runs: int = 3, batch: int = 4, steps: int = 16) -> Job:
    each = tuple((emoji.conditioning(emoji.PROMPTS[:batch]), 7 + i) for i in range(runs))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = {"samples": lab.latent(model, batch)}
    return Job(
        model, each, emoji.conditioning([""] * batch), 1.0, comfy.samplers.sampler_object("euler"), sigmas, latent
    )


@pytest.fixture(scope="module")
def fitted(lab) -> Profile:
    """A calibration of the small Flux, reuse at two fifths of the steps, with its correction."""
    with torch.inference_mode():
        return calibrate(job_of(lab, lab.flux), Wish(speed_up=2.5, check=0, correction=True))


def test_a_calibrated_correction_helps_on_pictures_it_has_not_seen(lab, folder, fitted):
    about = fitted.about["correction"]
    assert about["terms"] and about["gain_db"] > 0.2 and max(about["ages"]) > 0
    assert f"correction '{about['terms']}'" in summary(fitted)
    profiles.save("mine", fitted)
    cached = add_cache(lab.flux, CacheConfig(node_id="c", profile="mine.safetensors"))
    model = add_compensator(cached, CompensatorConfig(node_id="e"))
    prompts = ["angry face", "fox face", "banana", "pizza"]
    full, plain, result = (
        sample(lab, m, steps=16, prompts=prompts, seed=900) for m in (lab.flux, cached, model)
    )  # fmt: skip
    assert psnr(result, full) > psnr(plain, full) + 0.2
    account = told(lab, model)
    assert account["terms"] == about["terms"] and account["steps_corrected"] > 5 and not account["anchors"]
    assert "dB expected" in events.node_text(lab.report(model))
    off = add_compensator(cached, CompensatorConfig(node_id="e", terms="off"))
    assert torch.equal(sample(lab, off, steps=16, prompts=prompts, seed=900), plain)
    with pytest.raises(SlipstreamError, match="the profile has the terms"):
        sample(lab, add_compensator(cached, CompensatorConfig(node_id="e", terms="PTQD")))
    named = add_compensator(lab.flux, CompensatorConfig("mine.safetensors", node_id="e"))
    assert torch.equal(sample(lab, named, steps=16), sample(lab, lab.flux, steps=16))
    assert "fitted for other computed steps" in events.node_text(lab.report(named))
    sample(lab, model, steps=12)
    assert "16 steps of euler only" in events.node_text(lab.report(model))


def test_a_correction_does_not_serve_what_it_was_not_fitted_for(lab, folder, fitted, flux4):
    profiles.save("mine", fitted)
    for model, sampler, words in (
        (flux4, "euler", "fitted on another model"),
        (lab.flux, "euler_ancestral", "fitted with euler and do not serve euler_ancestral"),
    ):
        model = add_compensator(model, CompensatorConfig("mine.safetensors", 0, node_id="e"))
        sample(lab, model, sampler=sampler)
        assert words in events.node_text(lab.report(model)) and not told(lab, model)["terms"]


def test_a_damaged_correction_is_one_sentence(lab, folder, fitted):
    about = fitted.about["correction"]
    for wrong in (
        {"about": fitted.about | {"correction": about | {"ages": about["ages"][:-1]}}},
        {"about": fitted.about | {"correction": about | {"terms": "../secret"}}},
        {"extras": fitted.extras | {THETA: torch.zeros(16, 16, 9)}},
    ):
        profiles.save("wrong", dataclasses.replace(fitted, **wrong))
        model = add_compensator(lab.flux, CompensatorConfig("wrong.safetensors", node_id="e"))
        assert torch.equal(sample(lab, model), sample(lab, lab.flux))
        assert "the profile's correction does not fit" in events.node_text(lab.report(model))
    assert correction_of(dataclasses.replace(fitted, about={})) is None


def test_corrections_of_two_calibrations_merge(fitted):
    again = Profile.from_bytes(fitted.to_bytes(), "x")
    theta = merged(fitted, again, fitted.about["correction"]["terms"])
    moments = moments_of(fitted)
    assert theta.shape == fitted.extras[THETA].shape and theta.isfinite().all()
    assert torch.allclose((moments + moments_of(again)).count, 2 * moments.count)
    assert set(as_extras(None, moments, None)) == {k for k in fitted.extras if k.startswith("correction/")} - {THETA}


def test_no_evidence_means_no_correction(lab):
    """One run cannot test what it gives, and the profile says so; nothing is corrected with it."""
    with torch.inference_mode():
        profile = calibrate(job_of(lab, lab.flux, runs=1, batch=1), Wish(check=0, correction=True))
    assert profile.about["correction"]["terms"] == "" and THETA not in profile.extras
    assert "one run" in summary(profile)


def test_a_quantised_models_profile_says_where_anchors_go(lab, folder, flux4):
    before = add_compensator(flux4, CompensatorConfig("none", 2, terms="cumulative"))
    with torch.inference_mode():
        profile = calibrate(
            job_of(lab, before, runs=2, batch=1, steps=STEPS), Wish(speed_up=1.0, check=0, correction=True)
        )
    about = profile.about["correction"]
    assert about["anchored"] and len(profile.keys) == STEPS
    found = correction_of(profile)
    assert found.solvable and about["flow"] and found.anchors_for(profile.sigmas, 2) is None
    noise = dataclasses.replace(found, about=about | {"flow": False})
    solved = noise.anchors_for(profile.sigmas, 2)
    assert len(solved) == 2 and len(noise.anchors_for(profile.sigmas[::2], 2)) == 2
    profiles.save("mine", profile)
    model = add_compensator(flux4, CompensatorConfig("mine.safetensors", 2, node_id="e"))
    sample(lab, model)
    assert told(lab, model)["anchors"] == list(placed(profile.sigmas, 2, True))
    changed = dataclasses.replace(profile, about=profile.about | {"correction": noise.about})
    profiles.save("mine", changed)
    sample(lab, model)
    assert told(lab, model)["anchors"] == list(solved)


def test_on_one_model_of_a_switched_run(lab, flux4, small):
    """Anchors work in a segment as in a run of its own, all of them there, and strength 0 is no node there too."""

    def stitched(model):
        return sample(lab, switched(small, model, 0.25), steps=16)

    full, plain = stitched(lab.flux), stitched(flux4)
    model = with_anchors(flux4, 3)
    assert psnr(stitched(model), full) > psnr(plain, full) + 0.5
    assert told(lab, model)["anchors"] == [5.0, 7.0, 11.0] and lab.report(model)["evaluations"] == 12
    assert torch.equal(stitched(with_anchors(flux4, 3, strength=0.0)), plain)


# -- the large model of a switch, and the uncached one ---------------------------------------------------------------


def switched(small, large, at: float = 0.5, **options):
    return add_switch(small, large, SwitchConfig(at, node_id="s", **options))


@pytest.fixture(scope="module")
def small():
    return emoji.load_small_flux()


def test_a_small_model_is_corrected_by_the_large_one_it_hands_over_to(lab, small):
    """Two anchors of the large model serve all early steps, far better than so many more steps of it would."""
    full, plain, earlier = (
        sample(lab, m, batch=2, steps=16)
        for m in (lab.flux, switched(small, lab.flux), switched(small, lab.flux, 0.375))
    )
    corrected = add_compensator(small, CompensatorConfig("none", 2, node_id="e"))
    model = switched(corrected, lab.flux)
    with lab.calls(lab.flux) as large:
        result = sample(lab, model, batch=2, steps=16)
    assert psnr(result, full) > max(psnr(plain, full), psnr(earlier, full)) + 2.0
    assert torch.equal(sample(lab, model, batch=2, steps=16), result)
    account = told(lab, corrected)
    assert len(large) == 10 and account["anchors"] == [1.0, 3.0] and account["reference"] == LARGE_MODEL
    assert account["reference_bytes"] == lab.flux.model_size() and account["anchor_seconds"] > 0
    assert "2 anchors on the large model of a switch" in events.node_text(lab.report(corrected))
    run = events.last_report(Nodes(("s",)))
    assert [(s["evaluations"], s["anchors"]) for s in run["segments"]] == [(8, 0), (8, 2)] and run["swaps"] == 5
    assert "8 + 2 anchors on" in run["note"] and [e["anchor"] for e in run["trace"]].count(True) == 2
    assert torch.equal(sample(lab, switched(small, lab.flux), batch=2, steps=16), plain)


class Nodes:
    def __init__(self, node_ids):
        self.node_ids = node_ids


def test_auto_asks_the_large_model_for_a_tenth_of_the_run():
    """Counted in its own evaluations: a run that is mostly the large model's can afford more of them."""
    token = TURN.set(Turn(0, 12, Larger("large", 100, 0.3, lambda: None)))
    try:
        count = LargeModel().anchors
        assert [count(30, 12), count(30, 24), count(8, 6), count(30, 4)] == [2, 1, 1, 0]
    finally:
        TURN.reset(token)


def test_a_small_model_behind_the_large_one_and_one_of_the_other_kind_of_noise(lab, small):
    """The small one later in the run; a U-Net that predicts noise where the large one predicts a flow, both ways."""
    full = sample(lab, lab.flux, steps=12)
    for model in (small, lab.trained_unet):
        plain = sample(lab, switched(lab.flux, model, 0.75), steps=12)
        corrected = add_compensator(model, CompensatorConfig("none", 3, node_id="e"))
        result = sample(lab, switched(lab.flux, corrected, 0.75), steps=12)
        assert told(lab, corrected)["anchors"] == pytest.approx([9, 10, 11], abs=0.2)
        assert relative(result, full) < 1e-3 < relative(plain, full)
    corrected = add_compensator(lab.trained_unet, CompensatorConfig("none", 2, node_id="e"))
    result = sample(lab, switched(corrected, lab.flux), steps=12, scheduler="normal")
    assert result.isfinite().all() and len(told(lab, corrected)["anchors"]) == 2


def test_the_large_model_is_not_asked_about_noise_it_does_not_know(lab, small):
    corrected = add_compensator(small, CompensatorConfig("none", 1, node_id="e"))
    sample(lab, switched(corrected, lab.trained_unet), steps=8)  # a flow begins at noise that is infinite to a U-Net
    assert told(lab, corrected)["anchors"] == [1.0]
    early, plain = (switched(model, lab.trained_unet, 3 / 32) for model in (corrected, small))
    assert torch.equal(sample(lab, early, steps=32), sample(lab, plain, steps=32))
    assert "knows noise only up to 14.6" in events.node_text(lab.report(corrected))


@pytest.mark.parametrize(
    ("options", "joined", "words"),
    [
        ({"reference": LARGE_MODEL}, False, "no Hybrid Model Switch joins this model"),
        ({"reference": UNCACHED}, False, "no evaluation was filled by a cache"),
        ({"anchors": -1}, True, "no anchors at 4 steps"),
        ({"strength": 0.0}, True, ""),
    ],
)
def test_without_another_model_or_a_fill_nothing_changes(lab, small, options, joined, words):
    corrected = add_compensator(small, CompensatorConfig(**{"profile": "none", "anchors": 2, "node_id": "e"} | options))
    join = (lambda m: switched(m, lab.flux)) if joined else (lambda m: m)
    assert torch.equal(sample(lab, join(corrected)), sample(lab, join(small)))
    assert words in events.node_text(lab.report(corrected))


def test_an_error_in_the_large_model_at_an_anchor_ends_the_run_clean(lab, small):
    corrected = add_compensator(small, CompensatorConfig("none", 2, node_id="e"))
    clean = sample(lab, switched(corrected, lab.flux))
    broken = lab.flux

    def failing(arguments, extra):
        raise RuntimeError("out of memory")

    broken.set_model_patch_replace(failing, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(lab, switched(corrected, broken))
    assert TURN.get() is None
    assert torch.equal(sample(lab, switched(corrected, lab.flux)), clean)


@pytest.mark.parametrize(
    ("name", "site"),
    [("flux", "model output"), ("flux", "block stack"), ("flux", "last block"), ("trained_unet", "U-Net depth")],
)
def test_uncached_anchors_at_every_fill_are_the_full_model(lab, name, site):
    base = getattr(lab, name)
    cached = lab.every(base, 2, site=site)
    model = add_compensator(cached, CompensatorConfig("none", 12, node_id="e", reference=UNCACHED))
    full, result = sample(lab, base, steps=12), sample(lab, model, steps=12)
    assert relative(result, full) < 1e-5 < relative(sample(lab, cached, steps=12), full)
    report = lab.report(model)
    assert report["filled"] >= 3 and len(set(told(lab, model)["anchors"])) == report["filled"]
    assert "anchors on the uncached model" in events.node_text(report)


def test_reuse_from_an_uncached_anchor_on_is_reuse_from_a_computed_evaluation(lab):
    """docs/compensation.md: d_0 + (d_a - d_0) = d_a, so such an anchor is one more computed evaluation."""
    cached = lab.every(lab.flux, 5, predictor=None)
    model = add_compensator(cached, CompensatorConfig("none", 1, node_id="e", reference=UNCACHED))
    slopes, sigmas = [], []

    def see(step, denoised, x, _):
        slopes.append((x, denoised))

    sample(lab, model, steps=16, callback=see)
    trace = lab.report(model)["trace"]
    sigmas = [e["sigma"] for e in trace]
    slopes = [(x - denoised) / sigma for (x, denoised), sigma in zip(slopes, sigmas, strict=True)]
    (anchor,) = [e["index"] for e in trace if e["anchor"]]
    assert trace[anchor]["action"] == trace[anchor + 1]["action"] == "reused"
    assert relative(slopes[anchor + 1], slopes[anchor]) < 1e-4
    after = next(e["index"] for e in trace[anchor:] if e["action"] == "computed")
    assert all(e["correction"] is None for e in trace[after:])
