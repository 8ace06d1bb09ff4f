"""H20 to H31 for every site, the whole model's output included."""

from __future__ import annotations

import comfy.hooks
import comfy.model_management
import comfy.samplers
import node_helpers
import pytest
import torch
from sampling import SIZE, relative
from scenes import EVERYWHERE, controlled, everywhere, guided, repeated, scheduled, skip_layer_guided
from slipstream.demo import emoji


@everywhere
def test_h20_cfg_1_to_3_to_1(lab, site):
    used = site.every(lab)
    for cfg in (1.0, 3.0, 1.0):
        assert torch.equal(lab.sample(used, cfg=cfg), lab.sample(site.every(lab), cfg=cfg))
        assert lab.report(used)["filled"] >= 8


@pytest.mark.parametrize("site", [s for s in EVERYWHERE if s.model == "flux"], ids=str)
def test_h21_cfg_appears_in_mid_run(lab, split, site):
    model = site.every(lab)
    result = guided(lab, model)
    trace = lab.report(model)["trace"]
    changed = [e for e in trace if e["reason"] == "the active conditioning changed"]
    assert len(changed) == 1 and changed[0]["action"] == "computed"
    assert relative(result, guided(lab, lab.flux)) < 0.2
    split()
    assert relative(guided(lab, model), result) < 1e-5


@everywhere
def test_h22_a_prompt_schedule_computes_the_new_prompt(lab, split, site):
    model = site.every(lab)
    result = lab.sample(model, positive=scheduled(), cfg=3.0)
    trace = lab.report(model)["trace"]
    changed = [e["index"] for e in trace if e["reason"] == "the active conditioning changed"]
    assert changed and all(trace[i]["action"] == "computed" for i in changed)
    assert sum(e["action"] != "computed" for e in trace) >= 5
    split()
    assert relative(lab.sample(model, positive=scheduled(), cfg=3.0), result) < 1e-5


def areas():
    """A prompt for everything, another for the upper left quarter: calls of two shapes in every evaluation."""
    corner = node_helpers.conditioning_set_values(
        emoji.conditioning("red heart"),
        {"area": (SIZE[0] // 2, SIZE[1] // 2, 0, 0), "strength": 1.0, "set_area_to_bounds": False},
    )
    return emoji.conditioning("cat face") + corner


def masks():
    left = torch.zeros(1, *SIZE)
    left[..., : SIZE[1] // 2] = 1.0
    half = {"mask_strength": 1.0, "set_area_to_bounds": False}
    return node_helpers.conditioning_set_values(emoji.conditioning("cat face"), {"mask": left, **half}) + (
        node_helpers.conditioning_set_values(emoji.conditioning("red heart"), {"mask": 1.0 - left, **half})
    )


@everywhere
@pytest.mark.parametrize("positive", [areas, masks], ids=["h23_areas", "h24_masks"])
def test_h23_h24_regional_prompts_are_filled_and_split_equals_batched(lab, split, site, positive):
    model = site.every(lab)
    result = lab.sample(model, positive=positive(), cfg=3.0)
    assert lab.report(model)["filled"] >= 8
    plain = lab.plain(site.model, positive=positive, cfg=3.0)
    assert relative(result, plain) < 0.2
    split()
    assert relative(lab.sample(model, positive=positive(), cfg=3.0), result) < 1e-5


@everywhere
def test_h27_a_negative_of_another_length(lab, site):
    tokens, values = emoji.conditioning("hamburger")[0]
    long = [[torch.cat([tokens] * 5 + [tokens[:, :1]], 1), values]]  # too different to be padded into one batch
    model = site.every(lab)
    result = lab.sample(model, negative=long, cfg=3.0)
    assert lab.report(model)["filled"] >= 8
    assert relative(result, lab.sample(getattr(lab, site.model), negative=long, cfg=3.0)) < 0.2
    assert torch.equal(lab.sample(model, negative=long, cfg=3.0), result)


CONTROLLED = [s for s in EVERYWHERE if s.model in ("flux", "unet")]


@pytest.mark.parametrize("site", CONTROLLED, ids=str)
def test_h28_a_controlnet_range_computes_at_its_edges(lab, split, site):
    model, base = site.every(lab, 2), getattr(lab, site.model)
    positive = controlled(site.model, 0.2, 0.7)
    result = lab.sample(model, positive=positive, cfg=3.0, steps=24)
    trace = lab.report(model)["trace"]
    changed = [e for e in trace if e["reason"] == "the active conditioning changed"]
    assert len(changed) == 2 and all(e["action"] == "computed" for e in changed)
    assert lab.report(model)["filled"] >= 6
    plain = lab.sample(base, positive=positive, cfg=3.0, steps=24)
    without = lab.plain(site.model, cfg=3.0, steps=24)
    assert relative(plain, without) > 1e-3  # the control does something
    assert relative(result, plain) < 0.2
    split()
    assert relative(lab.sample(model, positive=positive, cfg=3.0, steps=24), result) < 1e-5


@pytest.mark.parametrize("site", [s for s in CONTROLLED if s.site != "model output"], ids=str)
def test_h28_a_fill_with_a_controlnet_reproduces_the_full_output(lab, caplog, site):
    """Residuals added inside what is skipped are in the cached features, the others are added anew, none twice."""
    differences, report = repeated(lab, site.every(lab, 2), positive=controlled(site.model))
    filled = [d for d, e in zip(differences, report["trace"][1::2], strict=True) if e["action"] != "computed"]
    assert len(filled) >= 5 and max(filled) <= (0.0 if site.site != "block stack" else 5e-6)
    assert "control could not be applied" not in caplog.text


@pytest.mark.parametrize("site", [s for s in EVERYWHERE if s.model == "flux"], ids=str)
def test_h29_a_lora_schedule_computes_where_its_strength_changes(lab, site):
    weight = lab.flux.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    patch = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    hooks = comfy.hooks.create_hook_lora({"diffusion_model.double_blocks.0.img_mlp.0.diff": patch}, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    positive = comfy.hooks.set_hooks_for_conditioning(emoji.conditioning("hamburger"), hooks)
    model = site.every(lab)
    plain, without = lab.sample(lab.flux, positive=positive), lab.plain("flux")
    result = lab.sample(model, positive=positive)
    trace = lab.report(model)["trace"]
    changed = [e for e in trace if e["reason"] == "the active conditioning changed"]
    assert changed and changed[0]["action"] == "computed"
    assert lab.report(model)["filled"] >= 6
    assert relative(plain, without) > 0.02
    assert relative(result, plain) < 0.5 * relative(plain, without)


@pytest.mark.parametrize("site", [s for s in EVERYWHERE if s.model == "unet"], ids=str)
def test_h30_perturbed_attention_has_a_history_of_its_own(lab, site):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    patch = getattr(PerturbedAttentionGuidance, "execute", None) or PerturbedAttentionGuidance().patch
    results = []
    for model in (getattr(lab, site.model), site.every(lab)):
        guided_model = patch(model, 3.0)
        guided_model = (guided_model.result if hasattr(guided_model, "result") else guided_model)[0]
        results.append(lab.sample(guided_model, cfg=3.0))
    assert lab.report(guided_model)["filled"] >= 8
    assert relative(results[0], lab.plain(site.model, cfg=3.0)) > 1e-3
    assert relative(results[1], results[0]) < 0.2


@pytest.mark.parametrize("site", [s for s in EVERYWHERE if s.model == "flux"], ids=str)
def test_h30_an_extra_pass_that_skips_a_block_is_apart(lab, site):
    results = []
    for model in (lab.flux, site.every(lab)):
        model = skip_layer_guided(model, 1)
        results.append(lab.sample(model, cfg=3.0))
    assert lab.report(model)["filled"] >= 8
    assert relative(results[0], lab.plain("flux", cfg=3.0)) > 1e-3
    assert relative(results[1], results[0]) < 0.2


@pytest.mark.parametrize("site", [s for s in EVERYWHERE if s.model == "flux"], ids=str)
def test_h31_reference_latents(lab, site):
    reference = lab.plain("flux", seed=9)
    positive = node_helpers.conditioning_set_values(emoji.conditioning("hamburger"), {"reference_latents": [reference]})
    model = site.every(lab)
    result = lab.sample(model, positive=positive, cfg=3.0)
    assert lab.report(model)["filled"] >= 8
    plain = lab.sample(lab.flux, positive=positive, cfg=3.0)
    assert relative(plain, lab.plain("flux", cfg=3.0)) > 1e-3
    assert relative(result, plain) < 0.2
