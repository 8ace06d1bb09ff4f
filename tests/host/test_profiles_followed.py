"""A profile in a Cache Loader: followed, told where it does not fit, and between other runs."""

from __future__ import annotations

import dataclasses

import folder_paths
import pytest
import torch
from calibrating import calibrated, taylor, with_profile
from sampling import SIZE, relative
from slipstream.engine.errors import SlipstreamError
from slipstream.host.profiles import folder as profiles


@pytest.mark.parametrize("name,order", [("flux", None), ("flux", 1), ("flux", 2), ("trained_unet", 1), ("sd3", 2)])
def test_a_profile_is_followed_exactly(lab, folder, name, order):
    base = getattr(lab, name)
    plain = lab.sample(base, steps=28)
    profile = calibrated(lab, base if order is None else taylor(base, order))
    assert len(profile.keys) == 11 and profile.keys[0] == 0 and profile.keys[-1] == 27
    assert profiles.save("mine", profile) == "mine.safetensors" and profiles.files() == ["mine.safetensors"]
    model = with_profile(base, "mine.safetensors", order)
    lab.sample(model, steps=28)
    report = lab.report(model)
    assert tuple(e["index"] for e in report["trace"] if e["action"] == "computed") == profile.keys
    assert "profile mine" in report["chose"]
    # random weights: the drift measured at a few steps is far from the mean
    assert report["remark"] == "" or name == "sd3"
    assert torch.equal(lab.sample(base, steps=28), plain)  # nothing stayed behind


def test_other_step_counts_schedulers_and_starts(lab, folder):
    profiles.save("mine", calibrated(lab, taylor(lab.flux)))
    model = with_profile(lab.flux, "mine.safetensors")
    for options in ({"steps": 20}, {"steps": 50}, {"steps": 28, "scheduler": "beta"}):
        lab.sample(model, **options)
        report = lab.report(model)
        assert 0.2 < report["computed"] / report["evaluations"] < 0.6, options
        assert report["trace"][-1]["action"] == "computed"
    latent = lab.sample(lab.flux, seed=5)
    lab.sample(model, steps=28, latent=latent, denoise=0.5)
    assert lab.report(model)["filled"] >= 6
    assert torch.equal(lab.sample(model, steps=4), lab.sample(lab.flux, steps=4))


def test_a_profile_of_another_predictor_or_range_is_told(lab, folder):
    profiles.save("mine", calibrated(lab, taylor(lab.flux, 2)))
    other = with_profile(lab.flux, "mine.safetensors", 1)
    lab.sample(other, steps=28)
    assert "solved for another predictor (newton 2)" in lab.report(other)["remark"]
    stranger = with_profile(lab.sd3, "mine.safetensors", 2)
    lab.sample(stranger, steps=28)
    assert "measured on another model" in lab.report(stranger)["remark"] and lab.report(stranger)["filled"] >= 10
    foreign = with_profile(lab.unet, "mine.safetensors", 2)
    plain = lab.sample(lab.unet, steps=28)
    assert torch.equal(lab.sample(foreign, steps=28), plain)
    assert "does not fit, it was measured for sigmas from 1 to 0" in lab.report(foreign)["note"]


def test_a_drift_that_the_profile_did_not_expect_is_told(lab, folder):
    profile = calibrated(lab, taylor(lab.flux))
    profiles.save("hopeful", dataclasses.replace(profile, about={**profile.about, "predicted_drift": 0.001}))
    model = with_profile(lab.flux, "hopeful.safetensors")
    lab.sample(model, steps=28)
    assert "times what the profile expects (0.1 %); calibrate with a prompt like this" in lab.report(model)["remark"]


def test_auto_takes_a_fitting_profile_before_the_preset(lab, folder):
    def automatic(preset="Balanced", order=1, model=None):
        model = with_profile(model or lab.flux, "auto", order, preset=preset)
        lab.sample(model, steps=28)
        return lab.report(model)

    assert "drift budget" in automatic()["chose"]
    profiles.save("order two", calibrated(lab, taylor(lab.flux, 2)))
    profiles.save("other model", calibrated(lab, taylor(lab.sd3, 1)))
    (folder / "broken.safetensors").write_bytes(b"nothing")
    folder_paths.filename_list_cache.clear()
    assert "drift budget" in automatic()["chose"]
    mine = calibrated(lab, taylor(lab.flux, 1))
    profiles.save("mine", mine)
    report = automatic()
    assert "profile mine" in report["chose"] and report["plan"]["cache"]["profile"] == "mine.safetensors"
    assert tuple(e["index"] for e in report["trace"] if e["action"] == "computed") == mine.keys
    safe, fast = automatic("Safe"), automatic("Fast")
    assert safe["computed"] > len(mine.keys) > fast["computed"] and "profile mine" in fast["chose"]
    assert "profile order two" in automatic(order=2)["chose"]
    assert automatic("Off")["filled"] == 0
    custom = automatic("Custom")
    assert "drift budget" in custom["chose"] and custom["filled"] > 0
    ancestral = with_profile(lab.flux, "auto", 1)
    lab.sample(ancestral, steps=28, sampler="euler_ancestral")
    assert "profile" not in lab.report(ancestral)["chose"]


def test_names_and_missing_files(lab, folder):
    profile = calibrated(lab, lab.flux)
    for bad in ("../up", "a/b", "", ".hidden", "x\0y"):
        with pytest.raises(SlipstreamError, match="is no file name"):
            profiles.save(bad, profile)
    for bad in ("nowhere.safetensors", "../../etc/passwd"):
        with pytest.raises(SlipstreamError, match="there is no profile"):
            with_profile(lab.flux, bad)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(SlipstreamError, match="damaged"):
        with_profile(lab.flux, "broken.safetensors")


def test_h12_to_h15_profiles_between_runs(lab, folder):
    """Other sizes and batches, the next queue, two clones with different profiles in turns: each as if alone."""
    profiles.save("slow", calibrated(lab, taylor(lab.flux), speed_up=2.0))
    profiles.save("quick", calibrated(lab, taylor(lab.flux), speed_up=3.5))
    used = with_profile(lab.flux, "slow.safetensors")
    for options in ({"size": (8, 24)}, {"batch": 2}, {"steps": 20}, {}):
        fresh = with_profile(lab.flux, "slow.safetensors")
        assert torch.equal(lab.sample(used, **{"steps": 28, **options}), lab.sample(fresh, **{"steps": 28, **options}))
        assert lab.report(used)["filled"] >= 6
    quick = with_profile(lab.flux, "quick.safetensors")
    alone = [lab.sample(used, steps=28, cfg=3.0), lab.sample(quick, steps=28)]
    for _ in range(2):
        assert torch.equal(lab.sample(used, steps=28, cfg=3.0), alone[0])
        assert torch.equal(lab.sample(quick, steps=28), alone[1])


def test_h44_h47_h48_profiles_with_late_starts_masks_and_halves(lab, folder, split):
    profiles.save("mine", calibrated(lab, taylor(lab.flux)))
    used, latent = with_profile(lab.flux, "mine.safetensors"), lab.sample(lab.flux, seed=5)
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 2:6, 2:6] = 1.0
    kept = mask.expand_as(latent) == 0
    result = lab.sample(used, steps=28, latent=latent, noise_mask=mask)
    assert torch.equal(result[kept], lab.sample(lab.flux, steps=28, latent=latent, noise_mask=mask)[kept])
    assert lab.report(used)["filled"] == 17

    def halves(model):
        first = lab.sample(model, steps=28, last_step=14, force_full_denoise=False)
        return lab.sample(model, steps=28, start_step=14, latent=first, disable_noise=True)

    assert torch.equal(halves(used), halves(with_profile(lab.flux, "mine.safetensors")))
    trace = lab.report(used)["trace"]
    assert trace[0]["action"] == trace[-1]["action"] == "computed" and any(e["action"] != "computed" for e in trace)
    batched = lab.sample(used, steps=28, cfg=3.0)
    split()
    assert relative(lab.sample(used, steps=28, cfg=3.0), batched) < 1e-5
