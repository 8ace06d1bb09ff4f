"""What a filled evaluation gives at the inner sites: the full output again, packed and beside other packs."""

from __future__ import annotations

import math

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import TRAINED, relative
from scenes import SITES, Counted, Site, every_site, everywhere, repeated
from slipstream.demo import emoji
from slipstream.engine.run.run import Run


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


@everywhere
def test_h25_conds_packed_two_and_one_keep_their_histories(lab, monkeypatch, site):
    """Three conds in a call, then two and one: the same picture, though the packing changes in mid-run."""
    model = site.every(lab)
    positive = emoji.conditioning("cat face") + emoji.conditioning("red heart")
    together = lab.sample(model, positive=positive, cfg=3.0)
    true_free, base = comfy.model_management.get_free_memory, model.model
    needed, calls = base.memory_required, []

    def required(shape, *args, **kwargs):
        calls.append(shape[0])
        return 1.0 if shape[0] < 3 else 1e30

    def free(device=None, torch_free_too=False):
        return true_free(device, True) if torch_free_too else 1e20

    def pack(step, *_):
        if step == 4:  # from here on, memory is short
            monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
            monkeypatch.setattr(base, "memory_required", required)

    try:
        apart = lab.sample(model, positive=positive, cfg=3.0, callback=pack)
    finally:
        monkeypatch.setattr(base, "memory_required", needed)
    assert 3 in calls and 2 in calls
    assert lab.report(model)["filled"] >= 8
    assert relative(apart, together) < 1e-5


@everywhere
def test_h26_images_of_a_batch_share_only_the_decision(lab, site):
    model = site.every(lab)
    alone = lab.sample(model, prompts=["cat face"])
    both = lab.sample(model, prompts=["cat face", "red heart"])
    assert lab.report(model)["filled"] >= 8
    assert relative(both[:1], alone) < 1e-5
