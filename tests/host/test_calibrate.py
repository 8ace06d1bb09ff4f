"""Calibrate and its profiles in the real host: one full run, a schedule, and a Cache Loader that follows it."""

from __future__ import annotations

import dataclasses

import comfy.samplers
import pytest
import torch
from calibrating import calibrated, job, sigmas_of, taylor, with_profile
from sampling import SIZE, TRAINED, relative
from slipstream.demo import emoji
from slipstream.engine.calibration.profile import Profile
from slipstream.engine.calibration.search import uniform
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.run.plan import CacheConfig
from slipstream.host import model as patcher
from slipstream.host.calibrate.calibrate import calibrate
from slipstream.host.calibrate.job import Wish
from slipstream.host.profiles import folder as profiles


@pytest.mark.parametrize("name", ["flux", "trained_unet"])
def test_the_solved_schedule_beats_even_spacing_on_another_prompt_and_seed(lab, folder, name):
    base = taylor(getattr(lab, name), 2)
    profile = calibrated(lab, base, speed_up=3.5)
    even = Profile(uniform(28, len(profile.keys)), profile.sigmas, profile.statistics, profile.model, profile.site,
                   profile.predictor)  # fmt: skip
    for label, one in (("solved", profile), ("even", even)):
        profiles.save(label, one)
    errors = {"solved": 0.0, "even": 0.0}
    for prompt, seed in (("cat face", 31), ("red heart", 32), ("strawberry", 33)):
        plain = lab.sample(getattr(lab, name), steps=28, prompts=[prompt], seed=seed)
        for label in errors:
            model = with_profile(getattr(lab, name), f"{label}.safetensors", 2)
            errors[label] += relative(lab.sample(model, steps=28, prompts=[prompt], seed=seed), plain)
    assert errors["solved"] < 0.9 * errors["even"]


@pytest.mark.parametrize("site", ["block stack", "last block"])
def test_an_inner_site_is_calibrated_where_it_is_used(lab, folder, site):
    base = taylor(patcher.add_cache(lab.flux, CacheConfig("Custom", site=site, node_id="1")))
    profile = calibrated(lab, base)
    profiles.save("inner", profile)
    model = with_profile(lab.flux, "inner.safetensors")
    lab.sample(model, steps=28)
    assert lab.report(model)["site"] == profile.site and lab.report(model)["filled"] == 17


@pytest.mark.parametrize("stage", ["full run", "checking", "ECAD"])
def test_a_cancelled_calibration_leaves_nothing(lab, folder, stage):
    plain = lab.sample(lab.flux)

    def tell(sentence, steps):
        def stop(step, *_):
            if step == 5:
                raise comfy.model_management.InterruptProcessingException

        return stop if sentence.startswith(stage) else None

    wish = {"schedule": "ECAD (blocks)"} if stage == "ECAD" else {}
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrated(lab, lab.flux, tell=tell, check=3, runs=2, wish=wish)
    assert list(folder.iterdir()) == []
    assert torch.equal(lab.sample(lab.flux), plain)


def test_max_drift_computes_as_few_steps_as_keep_within_it(lab, folder):
    base = taylor(lab.flux)
    counts = []
    for limit in (0.1, 0.05, 0.02):
        profile = calibrated(lab, base, wish={"goal": "max drift", "max_drift": limit}, check=3)
        assert profile.about["predicted_drift"] <= limit
        counts.append(len(profile.keys))
    assert counts == sorted(counts) and counts[0] < counts[-1]
    with pytest.raises(SlipstreamError, match=r"Calibrate: no schedule keeps the drift within 1e-06; try 2e-06"):
        calibrated(lab, base, wish={"goal": "max drift", "max_drift": 1e-6})


def test_the_schedule_that_wins_was_sampled_and_is_the_nearest(lab, folder):
    profile = calibrated(lab, taylor(lab.flux), check=4, runs=2, size=TRAINED)
    checked = {c["schedule"]: c["psnr_db"] for c in profile.about["checked"]}
    assert 3 <= len(checked) <= 4 and "even" in checked
    assert checked[profile.about["schedule"]] > max(checked.values()) - 1.5 > checked["even"] - 1.5
    profiles.save("mine", profile)
    model = with_profile(lab.flux, "mine.safetensors")
    options = {"steps": 28, "size": TRAINED}
    plain = lab.sample(lab.flux, prompts=["hamburger"], seed=7, **options)
    one = relative(lab.sample(model, prompts=["hamburger"], seed=7, **options), plain)
    plain = lab.sample(lab.flux, prompts=[emoji.PROMPTS[0]], seed=8, **options)
    two = relative(lab.sample(model, prompts=[emoji.PROMPTS[0]], seed=8, **options), plain)
    assert (one + two) / 2 == pytest.approx(profile.about["measured_error"], rel=1e-4)


@pytest.mark.parametrize("name", ["flux", "trained_unet"])
def test_expected_drift_and_error_are_those_of_another_prompt(lab, folder, name):
    profile = calibrated(lab, taylor(getattr(lab, name)), runs=3, check=3, size=TRAINED)
    profiles.save("mine", profile)
    model, drifts, errors = with_profile(getattr(lab, name), "mine.safetensors"), [], []
    for prompt, seed in (("strawberry", 41), ("panda", 42), ("red apple", 43)):
        options = {"steps": 28, "prompts": [prompt], "seed": seed, "size": TRAINED}
        plain = lab.sample(getattr(lab, name), **options)
        errors.append(relative(lab.sample(model, **options), plain))
        drifts.append(lab.report(model)["drift_mean"])
        assert "the drift is" not in lab.report(model)["remark"]
    assert 0.5 < sum(drifts) / 3 / profile.about["predicted_drift"] < 2
    assert 0.4 < sorted(errors)[1] / profile.about["predicted_error"] < 2.5


@pytest.mark.parametrize("name", ["flux", "trained_unet"])
def test_with_a_negative_prompt_a_mask_and_a_batch(lab, folder, name):
    base, latent = taylor(getattr(lab, name)), lab.latent(getattr(lab, name), 2)
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 2:] = 1.0
    wish = Wish(check=2)
    guided = dataclasses.replace(job(lab, base, cfg=3.0), latent={"samples": latent, "noise_mask": mask})
    with torch.inference_mode():
        profile = calibrate(guided, wish)
    assert profile.about["cfg"] == 3.0 and profile.about["measured_error"] < 0.2
    profiles.save("mine", profile)
    model = with_profile(getattr(lab, name), "mine.safetensors")
    lab.sample(model, steps=28, cfg=3.0, batch=2)
    assert lab.report(model)["computed"] == 11


def test_further_statistics_are_kept_when_asked_for_and_nothing_watches_afterwards(lab, folder):
    plain = lab.sample(lab.flux, steps=28)
    bare = calibrated(lab, lab.flux)
    assert bare.extras == {}
    profile = calibrated(lab, lab.flux, wish={"correction": True, "activations": True})
    assert profile.keys == bare.keys
    moments = profile.extras["moments"]
    assert moments.shape == (16, 57, 57) and torch.allclose(moments[:, 56, 56], torch.ones(16))
    gram = moments[:, :28, :28].mean(0).double()
    assert torch.allclose(gram, profile.statistics.gram, rtol=1e-4, atol=1e-5)
    layers = {n for n, m in lab.flux.model.diffusion_model.named_modules() if isinstance(m, torch.nn.Linear)}
    kept = {n.split("/")[1] for n in profile.extras if n.startswith("activation/")}
    assert kept and kept <= layers and len(kept) > len(layers) / 2
    network = lab.flux.model.diffusion_model
    assert all(not m._forward_pre_hooks for m in network.modules())
    assert torch.equal(lab.sample(lab.flux, steps=28), plain)
    profiles.save("large", profile)
    assert Profile.load(folder / "large.safetensors").extras.keys() == profile.extras.keys()


def test_ertacaches_step_coefficient_gives_the_sigmas_to_sample_with(lab, folder):
    given = tuple(float(s) for s in sigmas_of(lab.flux))
    profile = calibrated(lab, lab.flux, wish={"schedule": "ERTACache + step coefficient"})
    assert profile.sigmas[0] == given[0] and profile.sigmas[-1] == given[-1] and profile.sigmas != given
    assert profile.about["schedule"] == "ERTACache" and profile.keys_for(profile.sigmas) == profile.keys
    assert calibrated(lab, lab.flux, wish={"schedule": "ERTACache"}).sigmas == given
    with pytest.raises(SlipstreamError, match="step coefficient is for reuse"):
        calibrated(lab, taylor(lab.flux), wish={"schedule": "ERTACache + step coefficient"})


def test_ecad_finds_a_block_schedule_and_samples_it_on_a_run_it_has_not_seen(lab, folder):
    wish = {"schedule": "ECAD (blocks)", "ecad_runs": 30}
    with pytest.raises(SlipstreamError, match="set runs to at least 2"):
        calibrated(lab, lab.flux, wish=wish)
    with pytest.raises(SlipstreamError, match="each block"):
        calibrated(lab, lab.trained_unet, wish=wish, runs=2)
    profile = calibrated(lab, lab.flux, wish=wish, runs=2, steps=12, speed_up=2.0)
    assert profile.blocks.shape == (12, 5) and profile.about["cost"] <= 0.5 and profile.about["overfitted"] > 0
    profiles.save("blocks", profile)
    model = patcher.add_cache(lab.flux, CacheConfig(node_id="1", profile="blocks.safetensors"))
    plain = lab.sample(lab.flux, steps=12, prompts=[emoji.PROMPTS[0]], seed=8)
    result = lab.sample(model, steps=12, prompts=[emoji.PROMPTS[0]], seed=8)
    assert relative(result, plain) == pytest.approx(profile.about["measured_error"], rel=1e-4)
    assert lab.report(model)["site"] == "each block" and lab.report(model)["remark"] == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 4}, "4 steps leave nothing to skip"),
        ({"speed_up": 0.5}, "speed_up is 0.5"),
        ({"speed_up": 20.0}, "between 1 and 14"),
        ({"sampler": "dpm_adaptive"}, "dpm_adaptive cannot be served"),
        ({"sampler": "dpm_2"}, "evaluates the model"),
        ({"sampler": "heunpp2"}, "back and forth between noise levels"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(lab, folder, options, sentence):
    with pytest.raises(SlipstreamError, match=r"^Calibrate: ") as caught:
        calibrated(lab, lab.flux, **options)
    assert sentence in str(caught.value)
