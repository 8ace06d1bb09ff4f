"""The hazards' rows for the inner sites: blocks (replaced by the host or patched), last block, U-Net depth, encoder.

`test_state.py`, `test_conditioning.py` and `test_samplers.py` have the same rows for the whole model's output.
"""

from __future__ import annotations

import gc
import math

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import TRAINED, relative
from scenes import SITES, Site, every_site, every_site_deeper, repeated
from slipstream.engine.forecast.history import History
from slipstream.engine.run.run import Run
from slipstream.engine.sites.stack import BlockCall, BlockSite
from slipstream.engine.sites.unet import DepthCall, EncoderCall, UNetSite


class Counted:
    """Counts how often each parameterised leaf below a module runs."""

    def __init__(self, model, path: str):
        module = model.model.diffusion_model.get_submodule(path)
        leaves = [m for m in module.modules() if not list(m.children()) and list(m.parameters(recurse=False))]
        self.runs = 0
        self._hooks = [leaf.register_forward_pre_hook(self._count) for leaf in leaves]

    def _count(self, module, args):
        self.runs += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


@pytest.mark.card
@every_site
def test_what_is_skipped_really_does_not_run(lab, site):
    base, model = getattr(lab, site.model), site.every(lab)
    with Counted(base, site.inside) as plain:
        lab.sample(base)
    with Counted(model, site.inside) as skipped:
        lab.sample(model)
    report = lab.report(model)
    assert report["site"] == site.site.replace("last block", "last-block features")
    assert (report["computed"], report["filled"]) == (8, 8)
    assert plain.runs > 0 and skipped.runs * 2 == plain.runs


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


@pytest.mark.parametrize("method", ["drift budget", "first-block gate", "confidence gate"])
@pytest.mark.parametrize("name", ["flux", "trained_unet"])
def test_h08_h09_measured_decisions_do_not_depend_on_the_split(lab, split, name, method):
    inner = "block stack" if name == "flux" else "U-Net depth"
    model = lab.fast(getattr(lab, name), method=method, site=inner, threshold=0.15)
    options = {"cfg": 3.0, "steps": 28, "size": TRAINED}
    batched, together = lab.sample(model, **options), lab.report(model)
    split()
    separate, apart = lab.sample(model, **options), lab.report(model)
    assert together["filled"] >= 6
    assert [e["action"] for e in together["trace"]] == [e["action"] for e in apart["trace"]]
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


@every_site
def test_h11_an_edited_result_does_not_reach_the_cache(lab, site):
    model = site.every(lab, predictor=None)
    clean = lab.sample(model)
    spoiled = model.clone()

    def spoil(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        kept = out.clone()
        out.fill_(math.nan)
        return kept

    spoiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", spoil)
    assert torch.equal(lab.sample(spoiled), clean)


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


DEPTHS = [Site("unet", "U-Net depth", "middle_block", depth=d) for d in range(4)]


@pytest.mark.parametrize("site", [s for s in SITES if s.site != "U-Net depth"] + DEPTHS, ids=str)
def test_a_fill_at_equal_input_reproduces_the_full_output(lab, site):
    """DeepCache at any depth and Faster Diffusion bit for bit; a block stack's residual within rounding."""
    differences, report = repeated(lab, site.every(lab, 2))
    assert report["filled"] >= 12
    filled = [d for d, e in zip(differences, report["trace"][1::2], strict=True) if e["action"] != "computed"]
    assert len(filled) >= 5
    assert max(filled) <= (0.0 if site.site != "block stack" else 5e-6)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_faster_diffusion_decodes_the_steps_between_two_keys_in_one_batch(lab, split, monkeypatch, cfg):
    model = lab.fast(lab.unet, site="U-Net encoder")
    with lab.calls(model) as together:
        batched = lab.sample(model, cfg=cfg, steps=28)
    report = lab.report(model)
    conds = 1 if cfg == 1.0 else 2
    assert report["filled"] >= 14 and max(together) >= 4 * conds
    assert len(together) < report["computed"] + report["filled"] / 2  # far fewer runs than evaluations
    split()
    assert relative(lab.sample(model, cfg=cfg, steps=28), batched) < 1e-5
    monkeypatch.setattr(Run, "certain_fills", lambda self, step: [])
    with lab.calls(model) as one_by_one:
        sequential = lab.sample(model, cfg=cfg, steps=28)
    assert len(one_by_one) == conds * 28 and lab.report(model)["filled"] == report["filled"]
    assert relative(sequential, batched) < 1e-5


def test_prior_noise_adds_a_little_in_the_later_half(lab):
    plain = lab.sample(lab.fast(lab.unet, site="U-Net encoder"), steps=28)
    noisy = lab.sample(lab.fast(lab.unet, site="U-Net encoder", prior_noise=True), steps=28)
    assert 1e-5 < relative(noisy, plain) < 0.05
    latents = []
    model = lab.fast(lab.unet, site="U-Net encoder", prior_noise=True)
    lab.sample(model, steps=28, callback=lambda step, denoised, x, total: latents.append(x.clone()))
    reference = []
    lab.sample(
        lab.fast(lab.unet, site="U-Net encoder"),
        steps=28,
        callback=lambda step, denoised, x, total: reference.append(x.clone()),
    )
    same = [torch.equal(a, b) for a, b in zip(latents, reference, strict=True)]
    assert same[5] and not same[-1]  # only from half of the times on


def test_a_layer_that_another_pack_replaced_is_noticed(lab):
    """Not silent: a stack that is never reached computes everything and the node says so."""
    model = site_model = lab.every(lab.lumina, site="block stack")
    for key in list(site_model.object_patches):
        model.add_object_patch(key, site_model.object_patches[key].original)
    assert torch.equal(lab.sample(model), lab.sample(lab.lumina))
    assert "was not reached" in lab.report(model)["note"]


@pytest.mark.parametrize(
    "site", [s for s in DEPTHS if s.depth < 3] + [s for s in SITES if "encoder" in s.site], ids=str
)
@pytest.mark.parametrize("pack", ["FreeU", "PatchModelAddDownscale"])
def test_h17_patches_by_block_keep_their_blocks(lab, site, pack):
    """FreeU and Deep Shrink act on some blocks' features by number: on skipped ones too, and a fill is still exact."""
    from comfy_extras import nodes_freelunch, nodes_model_downscale

    node = getattr(nodes_freelunch, pack, None) or getattr(nodes_model_downscale, pack)
    values = (1.3, 1.4, 0.9, 0.2) if pack == "FreeU" else (2, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")
    patch = getattr(node, "execute", None) or node().patch

    def patched(model):
        out = patch(model, *values)
        return (out.result if hasattr(out, "result") else out)[0]

    base, model = patched(lab.unet), patched(site.every(lab, 2))
    plain = lab.sample(base)
    assert relative(plain, lab.plain("unet")) > 1e-3  # the patch does something
    assert relative(lab.sample(model), plain) < 0.2 and lab.report(model)["filled"] >= 5
    differences, report = repeated(lab, model)
    filled = [d for d, e in zip(differences, report["trace"][1::2], strict=True) if e["action"] != "computed"]
    assert len(filled) >= 5 and max(filled) == 0.0
