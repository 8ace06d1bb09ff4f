"""Hazards H40 to H46: every sampler and schedule of the host, counted by sigma and never by index."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from sampling import TRAINED, relative
from scenes import every_sampler
from slipstream.engine.run.clock import Clock
from slipstream.engine.run.samplers import sampler_traits

TWO_EVALUATIONS = ["heun", "heunpp2", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2"]
MULTISTEP = ["dpmpp_2m", "uni_pc", "uni_pc_bh2", "res_multistep", "er_sde", "lms", "ipndm", "ipndm_v", "deis"]


@pytest.mark.parametrize("sampler", TWO_EVALUATIONS)
def test_h40_two_evaluations_in_a_step_are_one_step(lab, sampler):
    model = lab.every(lab.flux)
    with lab.calls(model) as runs:
        result = lab.sample(model, sampler=sampler)
    report = lab.report(model)
    assert result.isfinite().all()
    assert report["steps"] == 16 < report["evaluations"]
    assert len(runs) == report["computed"] and report["filled"] >= 8
    assert all(-0.01 <= e["u"] <= 16 for e in report["trace"])
    assert report["trace"][-1]["action"] == "computed"


def test_h40_a_sigma_that_comes_twice_is_one_measurement(lab):
    """heun evaluates 0, 1, 1, 2, 2, ...: order 1 needs three different times before the first fill."""
    model = lab.every(lab.flux)
    lab.sample(model, sampler="heun")
    trace = lab.report(model)["trace"]
    assert [round(e["u"]) for e in trace[:5]] == [0, 1, 1, 2, 2]
    assert [e["action"] for e in trace[:4]] == ["computed"] * 4 and trace[4]["action"] != "computed"


@pytest.mark.parametrize("scheduler", ["simple", "karras", "beta", "exponential", "sgm_uniform", "kl_optimal"])
@pytest.mark.parametrize("name", ["flux", "unet"])
def test_h41_the_coordinate_follows_the_schedule(lab, name, scheduler):
    model = lab.every(getattr(lab, name), 2)
    result = lab.sample(model, scheduler=scheduler, steps=24)
    trace = lab.report(model)["trace"]
    assert [round(e["u"], 4) for e in trace] == list(range(24))  # one step is 1, however the sigmas are spaced
    assert lab.report(model)["filled"] >= 10
    plain = lab.plain(name, scheduler=scheduler, steps=24)
    fewer = lab.plain(name, scheduler=scheduler, steps=12)
    assert relative(result, plain) < 0.7 * relative(fewer, plain)


def test_h41_a_shifted_schedule(lab):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    patch = getattr(ModelSamplingFlux, "execute", None) or ModelSamplingFlux().patch
    patched = patch(lab.flux, max_shift=1.15, base_shift=0.5, width=512, height=512)
    patched = (patched.result if hasattr(patched, "result") else patched)[0]
    model = lab.every(patched, 2)
    result = lab.sample(model, steps=24)
    assert lab.report(model)["filled"] >= 10
    plain = lab.sample(patched, steps=24)
    assert relative(result, plain) < 0.8 * relative(lab.sample(patched, steps=12), plain)


@pytest.mark.parametrize("sampler", MULTISTEP)
def test_h43_multistep_samplers_stay_close_and_end_on_a_computed_step(lab, sampler):
    plain, fewer = (lab.plain("flux", sampler=sampler, steps=n, size=TRAINED) for n in (24, 6))
    model = lab.fast(lab.flux, drift_budget=0.1)
    result = lab.sample(model, sampler=sampler, steps=24, size=TRAINED)
    report = lab.report(model)
    assert report["filled"] >= 4 and report["trace"][-1]["action"] == "computed"
    assert relative(result, plain) < 0.5 * relative(fewer, plain)


@pytest.mark.parametrize("options", [{"denoise": 0.6}, {"start_step": 5}, {"start_step": 5, "last_step": 13}])
def test_h44_a_first_run_that_starts_late(lab, options):
    model = lab.every(lab.flux)
    latent = lab.plain("flux", seed=5)
    lab.sample(model, latent=latent, **options)
    trace = lab.report(model)["trace"]
    assert [e["action"] for e in trace[:2]] == ["computed", "computed"]  # order 1 needs two, whatever sigma they have
    assert trace[-1]["action"] == "computed"
    assert any(e["action"] == "forecast" for e in trace)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_h45_up_to_4_steps_nothing_is_skipped(lab, steps):
    model = lab.every(lab.flux, 2)
    assert torch.equal(lab.sample(model, steps=steps), lab.sample(lab.flux, steps=steps))
    assert "every one of them counts" in lab.report(model)["note"]


@pytest.mark.parametrize("steps", [5, 6, 8])
def test_h45_up_to_8_steps_at_most_one_is_skipped(lab, steps):
    model = lab.every(lab.flux, 2, predictor="Reuse")
    lab.sample(model, steps=steps)
    report = lab.report(model)
    assert report["filled"] == 1
    assert report["trace"][0]["action"] == report["trace"][-1]["action"] == "computed"


def off_grid(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
    """Euler as a custom sampler might do it: sigmas slightly off, and a schedule entry that is nonsense."""
    extra_args["model_options"]["transformer_options"]["sample_sigmas"] = torch.tensor([0.0, 0.0])
    for i in range(len(sigmas) - 1):
        sigma = sigmas[i] * (1 - 1e-4)
        denoised = model(x, sigma * x.new_ones(x.shape[0]), **extra_args)
        x = x + (x - denoised) / sigma * (sigmas[i + 1] - sigmas[i])
    return x


def test_h46_no_sigma_is_looked_up_by_equality(lab):
    model = lab.every(lab.flux)
    sampler = comfy.samplers.KSAMPLER(off_grid)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 16)
    latent = lab.latent(model)
    guider = comfy.samplers.CFGGuider(model)
    from slipstream.demo import emoji

    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    with torch.inference_mode():
        guider.sample(torch.randn_like(latent), latent, sampler, sigmas, disable_pbar=True, seed=1)
    report = lab.report(model)
    assert report["evaluations"] == 16 and report["filled"] >= 8
    assert report["trace"][-1]["action"] == "computed"


@every_sampler(comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_of_the_host_runs(lab, sampler):
    """It either skips or says why not; the result is finite and the last evaluation is computed."""
    model = lab.every(lab.flux, 2)
    assert lab.sample(model, sampler=sampler, steps=12).isfinite().all()
    report = lab.report(model)
    assert report["trace"][-1]["action"] == "computed"
    assert report["filled"] or sampler in report["note"]


def test_samplers_that_add_noise_are_known():
    def noisy(name, **options):
        sampler = comfy.samplers.ksampler(name, options) if options else comfy.samplers.sampler_object(name)
        return sampler_traits(sampler).stochastic

    assert {n for n in comfy.samplers.SAMPLER_NAMES if noisy(n)} >= {"euler_ancestral", "dpmpp_sde", "lcm", "er_sde"}
    assert not any(noisy(n) for n in ("euler", "heun", "dpmpp_2m", "uni_pc", "res_multistep", "ddim", "exp_heun_2_x0")
                   if n in comfy.samplers.SAMPLER_NAMES)  # fmt: skip
    assert not noisy("euler_ancestral", eta=0.0)
    assert noisy("euler", s_churn=1.0)


def test_a_schedule_that_rises_is_computed_plainly(lab):
    model = lab.every(lab.flux, 2)
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.0])
    lab.sample(model, sigmas=sigmas)
    report = lab.report(model)
    assert report["filled"] == 0 and "not a falling schedule" in report["note"]
    assert Clock((1.0, 0.5, 0.5, 0.0)).decreasing  # a repeated sigma is no rise
