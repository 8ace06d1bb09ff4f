"""Every family the host has, tiny and random, at every site: identical when off, split as batched, really skipped."""

from __future__ import annotations

import comfy.context_windows
import comfy.sample
import families
import pytest
import torch
from sampling import relative, runs_below
from slipstream.engine.families import UNKNOWN, architecture_of

STEPS = 9  # one more than where at most one step is skipped

# The host itself cannot split them, or gets another result: cond and uncond are not independent there.
NOT_INVARIANT = {"seedvr2", "ace_step15", "hunyuan3d21"}
# No block stack is known or safe to skip: cascades, a key-value cache across steps, swapped halves.
OUTPUT_ONLY = {"stable_cascade_c", "stable_cascade_b", "hidream_o1", "seedvr2", "hunyuan3d21", "triposplat"}

# Its pose branch lives in the same blocks and runs at every step, outside of what can be replaced.
RUNS_BESIDE = {"wan22_animate2"}


def sites_of(network) -> list[tuple[str, str]]:
    """(site, a module that a filled evaluation must not run)."""
    row = architecture_of(network)
    if row.unet:
        deep = "input_blocks.3" if network.middle_block is None else "middle_block"
        return [("U-Net depth", deep), ("U-Net encoder", "input_blocks.1")]
    if row.stacks:
        path = row.stacks[-1].path
        last = f"{path}.{list(network.get_submodule(path)._modules)[-1]}"
        return [("block stack", last), ("last block", last)]
    return []


def flat(latent) -> torch.Tensor:
    """One vector, also where the host nests the latents of several streams."""
    parts = latent.unbind() if latent.is_nested else (latent,)
    return torch.cat([part.reshape(-1) for part in parts])


def sample(model, name: str) -> torch.Tensor:
    latent = families.latent(name)
    noise = comfy.sample.prepare_noise(latent, 1)
    conds = families.conditioning(name, 11), families.conditioning(name, 12)
    with torch.inference_mode():
        out = comfy.sample.sample(
            model, noise, STEPS, 3.0, "euler", "simple", *conds, latent, seed=1, disable_pbar=True
        )
    return flat(out)


@pytest.mark.parametrize("name", families.available())
def test_family(lab, split, name, record_property):
    record_property("sites", check(lab, split, name, families.make(name)))


@pytest.mark.parametrize("name", families.available(families.LOADED))
def test_a_checkpoint_through_the_stock_loader(lab, split, name, tmp_path):
    base = families.load(name, tmp_path)
    assert architecture_of(base.model.diffusion_model) is architecture_of(families.make(name).model.diffusion_model)
    check(lab, split, name, base)


def check(lab, split, name: str, base) -> list[str]:
    """Off is identical, hooked is identical, filled runs skip what they say, split equals batched, nothing stays.

    Returns the sites, for the table of families.
    """
    network = base.model.diffusion_model
    sites = sites_of(network)
    assert bool(sites) != (name in OUTPUT_ONLY)
    plain = sample(base, name)
    assert plain.isfinite().all()
    off = lab.fast(base, drift_budget=0.0)
    assert torch.equal(sample(off, name), plain)
    models = {"model output": lab.every(base)}
    for site, inside in sites:
        hooked = lab.every(base, site=site, start_percent=0.99)
        assert torch.equal(sample(hooked, name), plain), site
        models[site] = model = lab.every(base, site=site)
        full = runs_below(base, inside, lambda: sample(base, name))
        some = runs_below(model, inside, lambda model=model: sample(model, name))
        assert some * 9 == full * 5 if name not in RUNS_BESIDE else some < full, site
    batched = {site: sample(model, name) for site, model in models.items()}
    for site, model in models.items():
        report = lab.report(model)
        assert (report["computed"], report["filled"]) == (5, 4), (site, report["note"])
        assert batched[site].isfinite().all() and 0 < relative(batched[site], plain) < 0.5, site
    assert torch.equal(sample(base, name), plain)
    if name not in NOT_INVARIANT:
        split()
        for site, model in models.items():
            error = relative(sample(model, name), batched[site])
            assert error < 1e-5, (site, error)
    return list(models)


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
