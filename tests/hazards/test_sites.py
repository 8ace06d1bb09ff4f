"""The hazards' rows for the inner sites: blocks (replaced by the host or patched), last block, U-Net depth, encoder.

`test_state.py`, `test_conditioning.py` and `test_samplers.py` have the same rows for the whole model's output.
"""

from __future__ import annotations

import gc

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import relative
from scenes import Counted, every_site, every_site_deeper
from slipstream.engine.forecast.history import History
from slipstream.engine.run.run import Run
from slipstream.engine.sites.stack import BlockCall, BlockSite
from slipstream.engine.sites.unet import DepthCall, EncoderCall, UNetSite


@pytest.mark.card
@every_site_deeper
def test_h01_off_is_bit_identical(lab, site):
    base = getattr(lab, site.model)
    plain = lab.plain(site.model, cfg=3.0)
    hooked = site.every(lab, start_percent=0.99)  # stored at every evaluation, never filled
    assert torch.equal(lab.sample(hooked, cfg=3.0), plain)
    assert lab.report(hooked)["cache_bytes"] > 0
    off = lab.fast(base, site=site.site, drift_budget=0.0)
    assert torch.equal(lab.sample(off, cfg=3.0), plain)
    assert torch.equal(lab.sample(base, cfg=3.0), plain)  # H03: what was patched is not there any more


@pytest.mark.card
@every_site
def test_h02_h15_the_second_queue_is_the_same_and_still_skips(lab, site):
    model = site.every(lab)
    first = lab.sample(model, cfg=3.0)
    assert torch.equal(lab.sample(model, cfg=3.0), first)
    lab.sample(model, seed=2)
    assert lab.report(model)["filled"] >= 8


class Stopped(Exception):
    pass


@every_site_deeper
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, Stopped])
def test_h04_h05_a_cancelled_run_leaves_nothing(lab, site, error):
    base, model = getattr(lab, site.model), site.every(lab)
    plain, clean = lab.plain(site.model), lab.sample(model)

    def stop(step, *_):
        if step == 6:
            raise error()

    with Counted(model, site.inside) as runs, pytest.raises(error):
        lab.sample(model, callback=stop)
    with Counted(base, site.inside) as one:
        lab.sample(base, steps=1)
    assert runs.runs == 4 * one.runs  # evaluations 0, 1, 2 and 5 of seven
    assert torch.equal(lab.sample(model), clean)
    assert torch.equal(lab.sample(base), plain)


@every_site
def test_h06_an_error_inside_the_network_leaves_nothing(lab, site):
    base, model = getattr(lab, site.model), site.every(lab)
    plain, clean = lab.plain(site.model), lab.sample(model)
    network, calls = model.model.diffusion_model, []
    leaves = [m for m in network.get_submodule(site.inside).modules() if not list(m.children())]

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")

    hook = leaves[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            lab.sample(model)
    finally:
        hook.remove()
    assert torch.equal(lab.sample(model), clean)
    assert torch.equal(lab.sample(base), plain)


@every_site_deeper
def test_h07_no_tensor_is_reachable_after_the_run(lab, site):
    kinds = (Run, History, BlockSite, BlockCall, UNetSite, DepthCall, EncoderCall)

    def alive():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) in kinds}

    model, before = site.every(lab), alive()
    lab.sample(model)
    assert lab.report(model)["cache_bytes"] > 0
    assert alive() <= before


@every_site
@pytest.mark.parametrize("batch", [1, 2])
def test_h08_split_equals_batched(lab, split, site, batch):
    model = site.every(lab)
    batched = lab.sample(model, cfg=3.0, batch=batch)
    split()
    separate = lab.sample(model, cfg=3.0, batch=batch)
    assert lab.report(model)["filled"] >= 8
    assert relative(separate, batched) < 1e-5


@every_site_deeper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_h10_half_precision_inputs_are_never_written_to(lab, site, dtype):
    model = site.every(lab)
    model.set_model_compute_dtype(dtype)
    checked = []

    def outside(executor, *args, **kwargs):
        before = [a.clone() if torch.is_tensor(a) else None for a in args]
        out = executor(*args, **kwargs)
        assert all(b is None or torch.equal(a, b) for a, b in zip(args, before, strict=True))
        checked.append(out.isfinite().all())
        return out

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", outside)
    lab.sample(model, cfg=3.0)
    assert len(checked) == 16 and all(checked)
    assert lab.report(model)["filled"] >= 8


@every_site_deeper
def test_h12_h13_sizes_batches_and_steps_change_between_runs(lab, site):
    used = site.every(lab)
    for options in ({"size": (16, 16)}, {"size": (8, 24)}, {"batch": 3}, {"steps": 9}, {"batch": 1}):
        assert torch.equal(lab.sample(used, **options), lab.sample(site.every(lab), **options))


@every_site
def test_h14_two_clones_in_turns_equal_each_alone(lab, site):
    slow, quick = site.every(lab, 2, node="1"), site.every(lab, 4, predictor=None, node="2")
    alone = [lab.sample(slow, cfg=3.0), lab.sample(quick)]
    for _ in range(2):
        assert torch.equal(lab.sample(slow, cfg=3.0), alone[0])
        assert torch.equal(lab.sample(quick), alone[1])


@every_site_deeper
def test_h17_other_wrappers_and_replacements_are_still_called(lab, site):
    calls = {"function": 0, "block": 0}

    def function_wrapper(apply_model, arguments):
        calls["function"] += 1
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def block(args, extra):
        calls["block"] += 1
        return extra["original_block"](args)

    key = "single_block" if site.site == "block stack" else "double_block"
    for first in ("ours", "theirs"):
        calls.update(function=0, block=0)
        model = site.every(lab) if first == "ours" else getattr(lab, site.model).clone()
        model.set_model_unet_function_wrapper(function_wrapper)
        model.set_model_patch_replace(block, "dit", key, 1)
        if first == "theirs":
            model = lab.every(model, site=site.site, depth=site.depth)
        result = lab.sample(model)
        assert calls["function"] == 16
        assert calls["block"] == (8 if site.model in ("flux", "sd3") else 0)  # a filled block is not run at all
        # with foreign patches the encoder's decoder steps run one by one: the same but for rounding
        assert relative(result, lab.sample(site.every(lab))) <= (1e-5 if site.site == "U-Net encoder" else 0.0)


@every_site
def test_h18_a_run_inside_another_run(lab, site):
    outer_model = site.every(lab, node="1")
    inner_base = "unet" if site.model != "unet" else "flux"
    inner_site = "U-Net depth" if inner_base == "unet" else "block stack"
    inner_model = lab.every(getattr(lab, inner_base), site=inner_site, node="2")
    alone = [lab.sample(outer_model), lab.sample(inner_model)]
    inner = []

    def between(step, *_):
        if step in (3, 7):
            inner.append(lab.sample(inner_model))

    assert torch.equal(lab.sample(outer_model, callback=between), alone[0])
    assert all(torch.equal(result, alone[1]) for result in inner) and len(inner) == 2
