"""H80: the host records what a forward allocates and replays it; no run that may skip or keep is recorded.

Each case is run on a stand-in of the recorder (`tests/recorder.py`), then the plain model in the same prompt, then
again; and once with the mend taken out, where the stand-in has to raise.
"""

from __future__ import annotations

import contextlib

import comfy.samplers
import pytest
import recorder
import torch
from comfy.cli_args import args
from scenes import SITES
from slipstream.demo import emoji
from slipstream.engine.run.plan import LARGE_MODEL, UNCACHED, CacheConfig, CompensatorConfig
from slipstream.host import allocations
from slipstream.host import model as patcher
from slipstream.host.calibrate.calibrate import calibrate
from slipstream.host.calibrate.job import Job, Wish
from slipstream.host.model import add_cache, add_compensator
from slipstream.host.quantise import first_run
from slipstream.host.quantise.choose import FIRST_RUN, QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch import switch
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import add_switch
from slipstream.kernels import dispatch, lasting

STEPS = 9
SMALL = QuantWish(rank=4, layers="single_blocks = keep")


def switched(lab, **options):
    return add_switch(quantise(lab.flux, SMALL), lab.flux, SwitchConfig(**options))


# name -> the model of the lab that it belongs to, and that model with our nodes.
CASES = {str(site): (site.model, site.every) for site in SITES if site.model != "sd3"}  # skipped whole, if at all
CASES |= {
    "model output": ("flux", lambda lab: lab.every(lab.flux)),
    "drift budget": ("flux", lambda lab: lab.fast(lab.flux, preset="Balanced")),
    "first-block gate": (
        "flux", lambda lab: lab.fast(lab.flux, site="block stack", method="first-block gate", threshold=9.0)
    ),
    "confidence gate": (
        "flux", lambda lab: lab.fast(lab.flux, site="last block", method="confidence gate", threshold=9.0)
    ),
    "TeaCache's gate": (
        "flux", lambda lab: lab.fast(lab.flux, site="block stack", method="modulated change", threshold=9.0)
    ),
    "per token": ("flux", lambda lab: lab.every(lab.flux, site="last block", predictor="Per token")),
    "anchors on better weights": (
        "flux", lambda lab: add_compensator(quantise(lab.flux, SMALL), CompensatorConfig("none", 2, node_id="e"))
    ),
    "anchors on the uncached model": (
        "flux",
        lambda lab: add_compensator(
            lab.every(lab.flux), CompensatorConfig("none", 2, node_id="e", reference=UNCACHED)
        ),
    ),
    "two models": ("flux", switched),
    "anchors on the large model": (
        "flux",
        lambda lab: add_compensator(
            switched(lab, switch_at=0.5), CompensatorConfig("none", 2, node_id="e", reference=LARGE_MODEL)
        ),
    ),
}  # fmt: skip


@pytest.fixture
def unmended(monkeypatch):
    """Take the mend out wherever a run may want it."""

    def out():
        for module in (patcher, switch, first_run):
            monkeypatch.setattr(module, "unrecorded", lambda wanted=True: contextlib.nullcontext())

    return out


@pytest.mark.guards("H80", nodes="cache predictor compensator switch")
@pytest.mark.parametrize("case", CASES)
def test_h80_a_run_that_may_skip_is_not_recorded(lab, monkeypatch, unmended, case):
    name, make = CASES[case]
    base, model = getattr(lab, name), make(lab)

    def prompt():
        return [lab.sample(m, steps=STEPS, size=(8, 8)) for m in (model, base, model)]

    expected = prompt()
    record = recorder.install(monkeypatch, base)
    for _ in range(2):  # the second prompt begins with what the first one left
        assert all(torch.equal(a, b) for a, b in zip(prompt(), expected, strict=True))
        assert record.forwards == STEPS and args.disable_comfy_compiler is False  # those of the plain model
        record.prompt_ends()
    unmended()
    with pytest.raises(recorder.CompileError):
        prompt()


@pytest.mark.guards("H80", nodes="cache predictor quantize files report")
@pytest.mark.parametrize("name", ["flux", "unet", "lumina"])
def test_h80_what_every_step_repeats_is_recorded_as_without_us(lab, monkeypatch, name):
    """Off, at few steps, outside of every range: nothing is kept, so the host's compiler may work."""
    base = getattr(lab, name)
    off = add_cache(base, CacheConfig(node_id="1", preset="Off"))
    few = lab.fast(base, preset="Balanced")
    expected = lab.sample(base, steps=4)
    record = recorder.install(monkeypatch, base)
    for model in (base, off, few):
        assert torch.equal(lab.sample(model, steps=4), expected)
    assert record.forwards == 12


@pytest.mark.guards("H80", nodes="calibrate")
def test_h80_a_calibration_is_not_recorded(lab, monkeypatch, unmended):
    model = lab.flux
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    job = Job(
        model, ((emoji.conditioning("hamburger"), 1),), emoji.conditioning(""), 1.0,
        comfy.samplers.sampler_object("euler"), sigmas, {"samples": lab.latent(model, size=(8, 8))},
    )  # fmt: skip
    record = recorder.install(monkeypatch, model)
    with torch.inference_mode():
        calibrate(job, Wish(check=0))
    assert not record.forwards and args.disable_comfy_compiler is False
    unmended()
    with pytest.raises(recorder.CompileError), torch.inference_mode():
        calibrate(job, Wish(check=0))


@pytest.mark.guards("H80", nodes="quantize files")
def test_h80_quantised_layers_alone_are_recorded_and_keep_outside_of_it(lab, monkeypatch):
    """What is compared and measured at a layer's first call happens once, and what kernels keep stays."""
    dispatch.reset()
    base, model = lab.flux, quantise(lab.flux, SMALL)
    dispatch.use("dequant_torch")
    try:
        expected = lab.sample(model, steps=STEPS, size=(8, 8))
        record = recorder.install(monkeypatch, base)
        dispatch.reset()
        assert torch.equal(lab.sample(model, steps=STEPS, size=(8, 8)), expected)
        assert record.forwards == STEPS
        record.prompt_ends()
        dispatch.reset()
        lasting.allocate_in(contextlib.nullcontext)
        with pytest.raises(recorder.CompileError):
            lab.sample(model, steps=STEPS, size=(8, 8))
    finally:
        lasting.allocate_in(allocations.outside)
        dispatch.use(None)
        dispatch.reset()


@pytest.mark.guards("H80", nodes="quantize")
def test_h80_a_first_run_that_measures_is_not_recorded(lab, monkeypatch, unmended):
    record = recorder.install(monkeypatch, lab.flux)

    def first(rank):
        model = quantise(lab.flux, QuantWish(rank=rank, calibration=FIRST_RUN, evaluations=3, guard_db=15.0))
        return lab.sample(model, steps=STEPS, size=(8, 8))

    first(4)
    assert record.forwards >= STEPS and args.disable_comfy_compiler is False
    record.prompt_ends()
    unmended()
    with pytest.raises(recorder.CompileError):
        first(5)  # another wish, or the layers of before serve


@pytest.mark.guards("H80", nodes="cache predictor")
def test_h80_the_users_switch_is_as_it_was_whatever_happens(lab, monkeypatch, caplog):
    model = lab.every(lab.flux)
    recorder.install(monkeypatch, model)
    monkeypatch.setattr(allocations._record, "said", False)

    def fail(*_):
        assert args.disable_comfy_compiler is True
        raise KeyboardInterrupt

    with caplog.at_level("INFO", "slipstream"):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                lab.sample(model, steps=STEPS, size=(8, 8), callback=fail)
    assert args.disable_comfy_compiler is False
    assert sum("compiler rests" in line for line in caplog.messages) == 1
    with allocations.unrecorded():
        with allocations.unrecorded():  # a run in a run, or on another thread: the last one out puts it back
            pass
        assert args.disable_comfy_compiler is True
    assert args.disable_comfy_compiler is False
    args.disable_comfy_compiler = True  # who started the host without a compiler keeps it so
    with pytest.raises(KeyboardInterrupt):
        lab.sample(model, steps=STEPS, size=(8, 8), callback=fail)
    assert args.disable_comfy_compiler is True
    monkeypatch.undo()  # a host without a compiler is not given the switch of one
    monkeypatch.delattr(args, "disable_comfy_compiler", raising=False)
    lab.sample(model, steps=STEPS, size=(8, 8))
    assert not hasattr(args, "disable_comfy_compiler")
