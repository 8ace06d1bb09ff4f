"""H40 to H54 for every site, the whole model's output included."""

from __future__ import annotations

import pytest
import torch
from sampling import SIZE, TRAINED, relative
from scenes import EVERYWHERE, Site, everywhere, predicting


@everywhere
def test_h42_a_sampler_that_adds_noise_is_reused_and_stays_near(lab, site):
    model = site.every(lab, 2)
    result = lab.sample(model, sampler="euler_ancestral", steps=24)
    report = lab.report(model)
    assert {e["action"] for e in report["trace"]} == {"computed", "reused"}
    plain = lab.plain(site.model, sampler="euler_ancestral", steps=24)
    assert relative(result, plain) < 0.7 * relative(lab.plain(site.model, sampler="euler_ancestral", steps=12), plain)


@everywhere
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "dpm_2"])
def test_h40_h43_samplers_of_every_kind(lab, site, sampler):
    model = site.every(lab, 2)
    result = lab.sample(model, sampler=sampler)
    report = lab.report(model)
    assert report["filled"] >= 4 and report["trace"][-1]["action"] == "computed"
    plain = lab.plain(site.model, sampler=sampler)
    assert relative(result, plain) < 0.9 * relative(lab.plain(site.model, sampler=sampler, steps=4), plain)


@everywhere
def test_h44_h45_late_starts_and_few_steps(lab, site):
    model = site.every(lab, 2)
    latent = lab.plain(site.model, seed=5)
    lab.sample(model, latent=latent, denoise=0.6)
    assert lab.report(model)["filled"] >= 4
    assert torch.equal(lab.sample(model, steps=4), lab.plain(site.model, steps=4))
    lab.sample(model, steps=8)
    assert lab.report(model)["filled"] <= 1


@everywhere
def test_h47_what_an_inpaint_mask_keeps_is_exact(lab, site):
    model, base = site.every(lab), getattr(lab, site.model)
    latent = lab.plain(site.model, seed=5)
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 2:6, 2:6] = 1.0
    result = lab.sample(model, latent=latent, noise_mask=mask, cfg=3.0)
    assert lab.report(model)["filled"] >= 8
    kept = mask.expand_as(result) == 0
    plain = lab.sample(base, latent=latent, noise_mask=mask, cfg=3.0)
    assert torch.equal(result[kept], plain[kept])
    assert relative(result, plain) < 0.2


@everywhere
def test_h48_a_run_in_two_halves_starts_each_cold(lab, site):
    used = site.every(lab, 2)

    def halves(model):
        first = lab.sample(model, steps=24, last_step=12, force_full_denoise=False)
        return lab.sample(model, steps=24, start_step=12, latent=first, disable_noise=True)

    assert torch.equal(halves(used), halves(site.every(lab, 2)))
    trace = lab.report(used)["trace"]
    assert trace[0]["action"] == "computed" and any(e["action"] != "computed" for e in trace)
    plain = lab.plain(site.model, steps=24)
    assert relative(halves(used), plain) < relative(lab.plain(site.model, steps=12), plain)


@pytest.mark.parametrize("site", [s for s in EVERYWHERE if s.model == "unet"], ids=str)
@pytest.mark.parametrize("prediction", ["eps", "v_prediction", "x0", "edm"])
def test_h49_every_kind_of_prediction(lab, site, prediction):
    base, model = (predicting(one, prediction) for one in (lab.unet, site.every(lab, 2)))
    result, plain = lab.sample(model, steps=24), lab.sample(base, steps=24)
    assert lab.report(model)["filled"] >= 8
    assert relative(result, plain) < relative(lab.sample(base, steps=12), plain)


AS_TRAINED = [
    Site("flux", "model output", ""),
    Site("flux", "block stack", ""),
    Site("flux", "last block", ""),
    Site("trained_unet", "model output", ""),
    Site("trained_unet", "U-Net depth", "", depth=1),
    Site("trained_unet", "U-Net encoder", ""),
]


@pytest.mark.parametrize("site", AS_TRAINED, ids=str)
def test_h54_a_forecast_beats_reuse_and_both_beat_fewer_steps(lab, site):
    plain = lab.plain(site.model, steps=28, size=TRAINED)
    errors = {}
    for kind in ("Taylor", None):
        model = site.every(lab, 3, predictor=kind)
        errors[kind] = relative(lab.sample(model, steps=28, size=TRAINED), plain)
    computed = lab.report(model)["computed"]
    fewer = relative(lab.plain(site.model, steps=computed, size=TRAINED), plain)
    assert errors["Taylor"] < 0.6 * errors[None]
    assert errors["Taylor"] < 0.6 * fewer
    report = lab.report(model)
    assert 0 < report["seconds_saved"] < report["seconds"] * 10  # H55: time by the clock, not by the count
