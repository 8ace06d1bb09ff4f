"""Families through the host's own loader, and what is special about single ones."""

from __future__ import annotations

import comfy.context_windows
import comfy.sample
import families
import pytest
import torch
from family_checks import check, sample
from sampling import relative
from slipstream.engine.families import UNKNOWN, architecture_of


@pytest.mark.parametrize("name", families.available(families.LOADED))
def test_a_checkpoint_through_the_stock_loader(lab, split, name, tmp_path):
    base = families.load(name, tmp_path)
    assert architecture_of(base.model.diffusion_model) is architecture_of(families.make(name).model.diffusion_model)
    check(lab, split, name, base)


def test_an_unknown_model_is_cached_at_its_output_and_says_so(lab):
    base = families.make("stable_cascade_c")
    assert architecture_of(base.model.diffusion_model) is UNKNOWN
    model = lab.every(base)
    sample(model, "stable_cascade_c")
    report = lab.report(model)
    assert report["filled"] and "not in Slipstream's table" in report["remark"]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("stable_cascade_c", {"site": "block stack"}, "needs a transformer that Slipstream knows"),
        ("sd15", {"site": "last block"}, "needs a transformer"),
        ("flux", {"site": "U-Net depth"}, "needs a U-Net, and this is a Flux"),
        ("sd15", {"site": "U-Net depth", "method": "magnitude"}, "has no settings for this"),
        ("flux", {"site": "model output", "predictor": "Per token"}, "needs the blocks of a transformer"),
        ("flux", {"method": "modulated change", "predictor": "Per token"}, "needs another gate than TeaCache's"),
    ],
)
def test_what_a_family_lacks_is_computed_plainly_and_said(lab, caplog, name, options, sentence):
    base = families.make(name)
    model = lab.fast(base, **options)
    with caplog.at_level("INFO", "slipstream"):
        result = sample(model, name)
    assert torch.equal(result, sample(base, name))
    report = lab.report(model)
    assert report["filled"] == 0 and sentence in report["note"]
    assert caplog.text.count(sentence) == 1


def test_an_automatic_site_falls_back_with_a_remark(lab):
    model = lab.fast(families.make("sd15"), method="magnitude", drift_budget=0.3)
    sample(model, "sd15")
    report = lab.report(model)
    assert "has no settings for this" in report["remark"] and "drift budget" in report["chose"]


@pytest.mark.parametrize("name", ["flux", "ltxv", "lumina2", "hunyuan_video", "hidream", "wan21", "mochi"])
def test_teacache_sees_the_modulated_input_of_its_families(lab, name):
    base = families.make(name)
    hooks = sum(len(m._forward_pre_hooks) for m in base.model.diffusion_model.modules())
    model = lab.fast(base, method="modulated change", threshold=10.0, predictor=None)
    result = sample(model, name)
    report = lab.report(model)
    reasons = [e["reason"] for e in report["trace"][2:-1]]
    assert set(reasons) <= {"within budget", "the first block changed", "max skip"}, reasons
    assert result.isfinite().all() and report["site"] == "block stack"
    assert sum(len(m._forward_pre_hooks) for m in base.model.diffusion_model.modules()) == hooks


@pytest.mark.parametrize("name", ["flux", "chroma", "hunyuan_video", "wan21"])
def test_magcache_has_a_table_for_its_families(lab, name):
    base = families.make(name)
    model = lab.fast(base, method="magnitude", threshold=9.0, predictor=None)
    sample(model, name)
    assert lab.report(model)["filled"] >= 3 and lab.report(model)["site"] == "block stack"


def test_h31_an_image_to_video_model_gives_fewer_channels_than_it_takes(lab):
    base = families.make("wan21_i2v")
    plain = sample(base, "wan21_i2v")
    for kind in ("Taylor", "Residual reuse"):
        model = lab.every(base, predictor=kind)
        assert relative(sample(model, "wan21_i2v"), plain) < 0.3
        assert lab.report(model)["filled"] >= 4


@pytest.mark.parametrize("site", ["model output", "block stack", "last block"])
def test_h33_context_windows_have_histories_of_their_own(lab, split, site):
    base = families.make("wan21").clone()
    handler = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=3, context_overlap=1, dim=2,
    )  # fmt: skip
    base.model_options["context_handler"] = handler

    def long(model):
        latent = torch.zeros(1, 16, 7, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 1)
        conds = families.conditioning("wan21", 11), families.conditioning("wan21", 12)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 12, 3.0, "euler", "simple", *conds, latent, seed=1, disable_pbar=True
            )

    plain, model = long(base), lab.every(base, site=site)
    result = long(model)
    report = lab.report(model)
    assert report["filled"] >= 5 and relative(result, plain) < 0.2
    one = lab.every(families.make("wan21"), site=site)
    sample(one, "wan21")
    # three or four windows of three frames, by host version, each with what one run of three frames keeps
    assert 3 <= report["cache_bytes"] / lab.report(one)["cache_bytes"] <= 4
    split()
    assert relative(long(model), result) < 1e-5
