"""Hazards H01 to H15 and H40 to H49 with an Error Compensator: on a quantised model with and without a cache, and in a
switched run.

H01 and H06's forward hooks are also in tests/host/test_compensate.py. H09 is the guiders' order, which never reaches
the compensator: it sees what the guider has mixed. H18: its state is the run's, asserted by H14.
"""

from __future__ import annotations

import gc

import comfy.model_management
import pytest
import torch
from sampling import SIZE, relative
from scenes import guided, scheduled
from slipstream.demo import emoji
from slipstream.engine.correction.anchors import Carried
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.run.plan import ORIGINAL, UNCACHED, CompensatorConfig
from slipstream.host.compensate.compensator import Compensator
from slipstream.host.model import add_compensator
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.loras import quantised_modules
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch.segments import TURN, SwitchConfig
from slipstream.host.switch.switch import SwitchedRun, add_switch

STEPS = 10


@pytest.fixture(scope="module")
def bases(lab):
    """The small models in ConvRot's 4 bit, quantised once."""
    return {name: quantise(getattr(lab, name), QuantWish(format="convrot_w4a4")) for name in ("flux", "trained_unet")}


def compensated(lab, base, anchors: int = 3, cached: bool = True, node: str = "e", **options):
    model = add_compensator(base, CompensatorConfig("none", anchors, node_id=node, **options))
    return lab.every(model, 2, node=node + "c") if cached else model


def sample(lab, model, **options):
    return lab.sample(model, **{"steps": STEPS, **options})


def at_work(lab, model, filled: bool = True) -> dict:
    """The report of a run in which anchors were taken, and evaluations filled."""
    report = lab.report(model)
    assert report["compensation"]["anchors"] and (report["filled"] >= 3 or not filled)
    return report


def test_h01_strength_0_is_bit_identical_beside_a_cache(lab, bases):
    for cfg in (1.0, 3.0):
        model = add_compensator(lab.every(bases["flux"], 2), CompensatorConfig("none", 3, 0.0, node_id="e"))
        assert torch.equal(sample(lab, model, cfg=cfg), sample(lab, lab.every(bases["flux"], 2), cfg=cfg))


@pytest.mark.parametrize("name", ["flux", "trained_unet"])
def test_h02_h03_the_same_twice_and_nothing_stays(lab, bases, name):
    plain, model = sample(lab, bases[name]), compensated(lab, bases[name])
    assert torch.equal(sample(lab, model), sample(lab, model))
    at_work(lab, model)
    assert torch.equal(sample(lab, bases[name]), plain)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, Stopped])
def test_h04_h05_h06_h07_a_stopped_run_leaves_nothing(lab, bases, error):
    def alive():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) in (Compensator, Carried)}

    model = compensated(lab, bases["flux"])
    clean, before = sample(lab, model), alive()

    def stop(index, *_):
        if index == 4:
            raise error()

    with lab.calls(model) as runs, pytest.raises(error):
        sample(lab, model, callback=stop)
    assert len(runs) <= 5 + 2  # of five evaluations some are filled, two were anchors: not one more
    assert alive() <= before
    assert all("forward" not in vars(layer) for _, layer in quantised_modules(model))
    assert torch.equal(sample(lab, model), clean)


@pytest.mark.parametrize("cached", [True, False])
def test_h08_split_equals_batched(lab, split, cached):
    """Without rounded activations, which turn the last bit of a sum into another code: with them the 4-bit model alone
    is 18 % apart from itself at cfg 3."""
    layers = "\n".join(f"{part} = w4a16" for part in ("double_blocks", "single_blocks", "in", "final_layer"))
    base = quantise(lab.flux, QuantWish(format="svdquant_w4a4", act_bits=16, layers=layers))
    model = compensated(lab, base, cached=cached, reference=ORIGINAL)
    batched = sample(lab, model, cfg=3.0)
    split()
    assert relative(sample(lab, model, cfg=3.0), batched) < 1e-5
    at_work(lab, model, cached)


def test_h10_h11_inputs_stay_and_outputs_are_not_shared(lab, bases):
    model = compensated(lab, bases["flux"], cached=False)
    kept, changed = [], model.clone()
    plain = sample(lab, model)

    def spoil(arguments):
        denoised = arguments["denoised"]
        kept.append((arguments["input"], arguments["input"].clone()))
        return denoised.clone()

    changed.set_model_sampler_post_cfg_function(spoil)
    assert torch.equal(sample(lab, changed), plain)
    assert len(kept) == STEPS + 3 and all(torch.equal(x, before) for x, before in kept[-3:])


def test_h12_h13_h14_runs_and_clones_do_not_mix(lab, bases):
    first, second = compensated(lab, bases["flux"]), compensated(lab, bases["flux"], 1, False, "f")
    results = [sample(lab, first), sample(lab, second), sample(lab, first, size=(8, 24)), sample(lab, first, steps=14)]
    again = [sample(lab, second), sample(lab, first, steps=14), sample(lab, first, size=(8, 24)), sample(lab, first)]
    for value, other in zip(results, (again[3], again[0], again[2], again[1]), strict=True):
        assert torch.equal(value, other)


def test_h15_h16_the_same_model_object_again_and_a_second_node(lab, bases):
    model = compensated(lab, bases["flux"])
    sample(lab, model, seed=1)
    sample(lab, model, seed=2)
    at_work(lab, model)
    with pytest.raises(SlipstreamError, match="remove one of the two"):
        compensated(lab, model, node="g")


def test_h17_h22_another_wrapper_and_a_prompt_schedule(lab, bases, split):
    calls, base = [], bases["flux"].clone()

    def wrapper(apply_model, arguments):
        calls.append(1)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    base.set_model_unet_function_wrapper(wrapper)
    model = compensated(lab, base, cached=False)
    result = sample(lab, model, positive=scheduled(), steps=16)
    assert len(calls) == at_work(lab, model, False)["computed"] + 3
    full = sample(lab, lab.flux, positive=scheduled(), steps=16)
    unchanged = sample(lab, lab.flux, positive=emoji.conditioning("cat face"), steps=16)
    assert relative(result, full) < 0.9 * relative(unchanged, full)


def test_h21_a_negative_that_appears_voids_the_residual(lab, bases, monkeypatch):
    forgotten = []
    forget = Compensator.forget
    monkeypatch.setattr(Compensator, "forget", lambda self: (forgotten.append(self.carried.residual), forget(self))[1])
    model = compensated(lab, bases["flux"], cached=False)
    assert guided(lab, model, STEPS).isfinite().all()
    assert forgotten[0] is not None  # an anchor came before, and was dropped in mid-run


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "uni_pc", "euler_ancestral"])
def test_h40_h43_every_sampler_counts_its_anchors(lab, bases, sampler):
    model = compensated(lab, bases["flux"], cached=False)
    with lab.calls(model) as runs:
        result = sample(lab, model, sampler=sampler)
    report = at_work(lab, model, False)
    assert result.isfinite().all() and len(report["compensation"]["anchors"]) == 3
    assert len(runs) == report["evaluations"] + 3
    full = sample(lab, lab.flux, sampler=sampler)
    assert relative(result, full) < 1.1 * relative(sample(lab, bases["flux"], sampler=sampler), full)


@pytest.mark.parametrize("scheduler", ["karras", "beta"])
def test_h41_anchors_are_at_times_not_at_sigmas(lab, bases, scheduler):
    model = compensated(lab, bases["trained_unet"], cached=False)
    assert sample(lab, model, scheduler=scheduler).isfinite().all()
    assert at_work(lab, model, False)["compensation"]["anchors"] == [4.0, 7.0, 9.0]


def test_h44_h47_a_later_start_and_an_inpaint_mask(lab, bases):
    model = compensated(lab, bases["flux"], 2)
    latent = sample(lab, lab.flux)
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :4] = 1.0
    result = sample(lab, model, latent=latent, denoise=0.6, noise_mask=mask)
    at_work(lab, model)
    assert torch.allclose(result[..., 4:], latent[..., 4:], atol=1e-4)
    assert relative(result[..., :4], latent[..., :4]) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_h45_few_steps_have_no_anchors_by_themselves(lab, bases, steps):
    model = compensated(lab, bases["flux"], -1, cached=False)
    assert torch.equal(sample(lab, model, steps=steps), sample(lab, bases["flux"], steps=steps))


def test_h46_h48_a_schedule_that_goes_up_again_is_left_alone(lab, bases):
    import comfy.samplers

    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.7, 0.4, 0.2, 0.0])
    model = compensated(lab, bases["flux"], cached=False)
    noise = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(1))

    def run(which):
        guider = comfy.samplers.CFGGuider(which)
        guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
        with torch.inference_mode():
            euler = comfy.samplers.sampler_object("euler")
            return guider.sample(noise, lab.latent(which), euler, sigmas, disable_pbar=True, seed=1)

    assert torch.equal(run(model), run(bases["flux"]))
    assert "not a falling schedule" in lab.report(model)["note"]


@pytest.mark.parametrize("name", ["flux", "trained_unet"])
def test_h49_flow_and_noise_prediction_come_nearer(lab, bases, name):
    full = sample(lab, getattr(lab, name), steps=16, batch=2)
    plain = relative(sample(lab, bases[name], steps=16, batch=2), full)
    model = compensated(lab, bases[name], 4, cached=False)
    assert relative(sample(lab, model, steps=16, batch=2), full) < 0.85 * plain


# -- anchors on the large model of a switch, and on the uncached one -------------------------------------------------


def stitched(lab, anchors: int = 2, cached: bool = False, **options):
    """(a small model that hands over to the large one, the small one by itself, for its report)."""
    small = add_compensator(emoji.load_small_flux(), CompensatorConfig("none", anchors, node_id="e", **options))
    if cached:
        small = lab.every(small, 2, node="ec")
    return add_switch(small, lab.flux, SwitchConfig(0.7)), small


def test_h02_h12_h13_h14_h15_a_switched_run_with_anchors_is_the_same_again(lab):
    model, small = stitched(lab)
    results = [sample(lab, model), sample(lab, model, size=(8, 24)), sample(lab, model, steps=14)]
    other, _ = stitched(lab, 1)
    sample(lab, other)
    again = [sample(lab, model, steps=14), sample(lab, model, size=(8, 24)), sample(lab, model)]
    assert all(torch.equal(a, b) for a, b in zip(results, reversed(again), strict=True))
    at_work(lab, small, False)


@pytest.mark.parametrize("memory", ["swap", "keep both"])
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, Stopped])
def test_h04_h05_h07_a_stopped_switched_run_leaves_nothing(lab, error, memory):
    def alive():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) in (Compensator, Carried, SwitchedRun)}

    _, small = stitched(lab)
    model = add_switch(small, lab.flux, SwitchConfig(0.7, memory=memory))
    clean, before = sample(lab, model), alive()

    def stop(index, *_):
        if index == 2:  # after the first anchor
            raise error()

    with pytest.raises(error):
        sample(lab, model, callback=stop)
    assert alive() <= before and TURN.get() is None
    assert torch.equal(sample(lab, model), clean)


@pytest.mark.parametrize("cached", [True, False])
def test_h08_split_equals_batched_with_the_large_model(lab, split, cached):
    model, small = stitched(lab, cached=cached)
    batched = sample(lab, model, cfg=3.0)
    split()
    assert relative(sample(lab, model, cfg=3.0), batched) < 1e-5
    at_work(lab, small, False)


def test_h08_split_equals_batched_with_the_uncached_model(lab, split):
    model = lab.every(add_compensator(lab.flux, CompensatorConfig("none", 2, node_id="e", reference=UNCACHED)), 4)
    batched = sample(lab, model, cfg=3.0)
    split()
    assert relative(sample(lab, model, cfg=3.0), batched) < 1e-5
    at_work(lab, model)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_h40_h43_the_large_model_serves_every_sampler(lab, sampler):
    model, small = stitched(lab)
    full, result = sample(lab, lab.flux, sampler=sampler), sample(lab, model, sampler=sampler)
    plain = sample(lab, add_switch(emoji.load_small_flux(), lab.flux, SwitchConfig(0.7)), sampler=sampler)
    assert relative(result, full) < relative(plain, full)
    assert len(at_work(lab, small, False)["compensation"]["anchors"]) == 2


def test_h10_h21_h22_a_prompt_schedule_voids_what_the_large_model_told(lab, monkeypatch):
    forgotten = []
    forget = Compensator.forget
    monkeypatch.setattr(Compensator, "forget", lambda self: (forgotten.append(self.carried.residual), forget(self))[1])
    model, small = stitched(lab, 4)
    assert sample(lab, model, positive=scheduled(), steps=16).isfinite().all()
    at_work(lab, small, False)
    assert any(residual is not None for residual in forgotten)


def test_h44_h47_a_later_start_and_an_inpaint_mask_in_a_switched_run(lab):
    model, small = stitched(lab)
    latent, mask = sample(lab, lab.flux), torch.zeros(1, 1, *SIZE)
    mask[..., :4] = 1.0
    result = sample(lab, model, latent=latent, denoise=0.6, noise_mask=mask)
    assert torch.allclose(result[..., 4:], latent[..., 4:], atol=1e-4)
    at_work(lab, small, False)
