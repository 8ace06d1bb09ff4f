"""The policy table without a host: rules, groups, limits, what users type, and protection by sensitivity."""

from __future__ import annotations

import re

import pytest
from slipstream.quant.policy import (
    DEFAULT,
    INT8_GAIN_DB,
    ROWS,
    TREATMENTS,
    Choice,
    Limits,
    parse_overrides,
    plan,
    policy_for,
    protect,
    protection_reasons,
)

FLUX = policy_for("Flux")
BLOCK = {
    "img_in": (3072, 64),
    "time_in.in_layer": (3072, 256),
    "double_blocks.0.img_attn.qkv": (9216, 3072),
    "double_blocks.0.img_mlp.0": (12288, 3072),
    "double_blocks.0.img_mlp.2": (3072, 12288),
    "double_blocks.0.img_mod.lin": (18432, 3072),
    "single_blocks.0.linear2": (3072, 15360),
    "final_layer.linear": (64, 3072),
}
UNET = policy_for("Stable Diffusion U-Net")


def test_rules_are_well_formed():
    for row in (*ROWS, DEFAULT):
        for rule in row.rules:
            compiled = re.compile(rule.pattern)
            assert rule.treatment in TREATMENTS and rule.why
            assert not rule.after_gelu or (rule.feeder and rule.treatment == "w4a4")
            assert not rule.group or rule.treatment == "w4a4"
            assert ("\\1" in rule.group + rule.feeder) == (compiled.groups > 0)


def test_a_set_is_found_by_its_name_and_any_other_name_gives_the_default():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert [policy_for(name) for name in names] == list(ROWS)
    assert all(policy_for(name) is DEFAULT for name in ("", "flux", DEFAULT.name, "comfy.ldm.flux.model.Flux"))


def test_flux_is_planned_as_published():
    chosen = plan(BLOCK, FLUX)
    assert {name: choice.treatment for name, choice in chosen.items()} == {
        "img_in": "keep",
        "time_in.in_layer": "keep",
        "double_blocks.0.img_attn.qkv": "w4a4",
        "double_blocks.0.img_mlp.0": "w4a4",
        "double_blocks.0.img_mlp.2": "w4a4",
        "double_blocks.0.img_mod.lin": "w4a16",
        "single_blocks.0.linear2": "w4a4",
        "final_layer.linear": "keep",
    }
    assert [name for name, choice in chosen.items() if choice.after_gelu] == ["double_blocks.0.img_mlp.2"]
    assert all(choice.why and choice.group == name for name, choice in chosen.items())


def test_flux2_has_the_same_names_and_a_gated_activation():
    gated = BLOCK | {"double_blocks.0.img_mlp.0": (18432, 3072), "double_blocks.0.img_mlp.2": (3072, 9216)}
    choice = plan(gated, FLUX)["double_blocks.0.img_mlp.2"]
    assert choice.treatment == "w4a4" and not choice.after_gelu and "gated" in choice.why


def test_a_unets_self_attention_shares_its_input_and_the_prompt_stays():
    root = "input_blocks.4.1.transformer_blocks.3."
    shapes = {f"{root}attn{a}.to_{x}": (640, 640 if a == 1 or x == "q" else 2048) for a in (1, 2) for x in "qkv"}
    shapes |= {
        f"{root}ff.net.2": (640, 2560),
        "input_blocks.4.1.proj_in": (640, 640),
        "input_blocks.0.0": (320, 4, 3, 3),
    }
    chosen = plan(shapes, UNET)
    assert {chosen[f"{root}attn1.to_{x}"].group for x in "qkv"} == {f"{root}attn1.qkv"}
    assert chosen[f"{root}attn2.to_q"] == Choice("w4a4", f"{root}attn2.to_q", False, chosen[f"{root}attn2.to_q"].why)
    assert chosen[f"{root}attn2.to_k"].treatment == chosen["input_blocks.4.1.proj_in"].treatment == "keep"
    assert not chosen[f"{root}ff.net.2"].after_gelu
    assert "input_blocks.0.0" not in chosen


def test_attention_that_is_given_a_context_has_no_common_input():
    root = "input_blocks.1.1.transformer_blocks.0.attn1.to_"
    chosen = plan({f"{root}q": (320, 320), f"{root}k": (320, 768), f"{root}v": (320, 768)}, UNET)
    assert all(choice.treatment == "w4a4" and choice.group == name for name, choice in chosen.items())


@pytest.mark.parametrize(
    ("shape", "treatment"),
    [((1024, 64), "w4a4"), ((1023, 64), "keep"), ((4096, 48), "keep"), ((4096, 72), "keep"), ((256, 256), "w4a4")],
)
def test_small_layers_are_left_alone(shape, treatment):
    name = "double_blocks.0.img_attn.qkv"
    assert plan({name: shape}, FLUX)[name].treatment == treatment
    assert plan({name: shape}, FLUX, limits=None)[name].treatment == "w4a4"
    assert plan({name: shape}, FLUX, limits=Limits(values=10**9))[name].treatment == "keep"


@pytest.mark.parametrize(
    ("name", "shape", "treatment"),
    [
        ("blocks.0.attn.qkv", (768, 256), "w4a4"),
        ("blocks.0.attn.qkv", (768, 240), "keep"),
        ("stages.1.layers.0.mlp.fc1", (1024, 512), "w4a4"),
        ("blocks.0.cross_attn.to_kv", (1024, 512), "w8a8"),
        ("blocks.0.adaLN_modulation.1", (1024, 512), "keep"),
        ("blocks.0.mod.lin", (1024, 512), "keep"),
        ("blocks.0.norm1.linear", (1024, 512), "keep"),
        ("blocks.0.time_emb.1", (1024, 512), "keep"),
        ("t_embedder.mlp.0", (1024, 512), "keep"),
        ("final_layer.0.linear", (1024, 512), "keep"),
        ("last_blocks.0.linear", (1024, 512), "keep"),
        ("proj_out", (1024, 512), "keep"),
        ("cond_proj.1", (1024, 512), "keep"),
        ("blocks.0.moe.gate", (1024, 512), "keep"),
    ],
)
def test_an_unknown_network_gets_the_careful_default(name, shape, treatment):
    choice = plan({name: shape}, DEFAULT)[name]
    assert choice.treatment == treatment and choice.group == name and not choice.after_gelu


def test_overrides_come_first_and_the_first_of_them_wins():
    chosen = plan(BLOCK, FLUX, "# mine\n\n img_mlp\\.2 = w8a8 \nimg_mlp = keep\nfinal = w4a16")
    assert chosen["double_blocks.0.img_mlp.2"].treatment == "w8a8"
    assert chosen["double_blocks.0.img_mlp.0"].treatment == "keep"
    assert chosen["final_layer.linear"].treatment == "w4a16"
    assert chosen["double_blocks.0.img_attn.qkv"].treatment == "w4a4"
    assert "img_mlp = keep" in chosen["double_blocks.0.img_mlp.0"].why


def test_an_override_keeps_what_is_known_of_the_layer():
    choice = plan(BLOCK, FLUX, "img_mlp = w4a4")["double_blocks.0.img_mlp.2"]
    assert choice.after_gelu and "your line" in choice.why
    root = "transformer_blocks.0.attn1.to_"
    shapes = {f"{root}{x}": (640, 640) for x in "qkv"}
    chosen = plan(shapes, UNET, r"to_k = w8a8")
    assert chosen[f"{root}k"].group == f"{root}k"
    assert {chosen[f"{root}{x}"].group for x in "qv"} == {"transformer_blocks.0.attn1.qkv"}


def test_an_override_cannot_ask_for_what_the_kernels_cannot_do():
    choice = plan({"blocks.0.w2": (640, 170)}, DEFAULT, "w2 = w4a4")["blocks.0.w2"]
    assert choice.treatment == "keep" and "170" in choice.why


def test_an_expression_with_an_equals_sign_is_read_to_the_last_one():
    assert parse_overrides("img(?=_mlp) = keep")[0].pattern == "img(?=_mlp)"


@pytest.mark.parametrize(
    ("text", "line", "advice"),
    [
        ("img_mlp", "Line 1 of the layer overrides, 'img_mlp'", "img_mlp.2 = w8a8"),
        ("img_mlp = keep\nqkv = int4", "Line 2 of the layer overrides, 'qkv = int4'", "w4a4, w4a16, w8a8, keep"),
        ("= keep", "Line 1", "for example"),
        ("img_(mlp = keep", "'img_(mlp = keep'", "double_blocks.0."),
        ("x{9999999999999} = keep", "no valid regular expression", "img_mlp"),
        ("nothing_like_it = keep", "'nothing_like_it'", "a part of a name"),
    ],
)
def test_a_bad_line_is_named_in_one_sentence(text, line, advice):
    with pytest.raises(ValueError) as caught:
        plan(BLOCK, FLUX, text)
    sentence = str(caught.value)
    assert line in sentence and advice in sentence and sentence.endswith(".") and "\n" not in sentence


SQNR = {"a": 30.0, "b": 11.0, "c": 25.0, "d": -20.0, "e": 11.0}


def test_every_layer_below_the_floor_is_raised_and_the_worst_to_16_bit():
    assert protect(SQNR, None, 12.0) == {"d": "keep", "b": "w8a8", "e": "w8a8"}
    assert list(protect(SQNR, None, 12.0)) == ["d", "b", "e"]
    assert protect({"x": 12.0 - INT8_GAIN_DB}, None, 12.0) == {"x": "w8a8"}


def test_the_worst_share_is_raised_whatever_its_error():
    assert protect(SQNR, 0.2, None) == {"d": "w8a8"}
    assert list(protect(SQNR, 0.5, None)) == ["d", "b", "e"]
    assert list(protect(SQNR, 0.8, 12.0)) == ["d", "b", "e", "c"]
    assert protect(SQNR, 1.0, None).keys() == SQNR.keys()
    assert protect(SQNR, None, None) == protect(SQNR, 0.0, None) == protect({}, 0.5, 12.0) == {}


def test_protection_does_not_depend_on_the_order_and_says_why():
    turned = dict(reversed(SQNR.items()))
    assert list(protect(turned, 0.5, 12.0).items()) == list(protect(SQNR, 0.5, 12.0).items())
    reasons = protection_reasons(SQNR, 0.8, 12.0)
    assert reasons.keys() == protect(SQNR, 0.8, 12.0).keys()
    assert "11.0 dB" in reasons["b"] and "12 dB" in reasons["b"] and "worst 4" in reasons["c"]


def test_a_broken_measurement_counts_as_the_worst():
    assert list(protect({"a": 3.0, "b": float("nan")}, 0.5, None)) == ["b"]


def test_a_share_outside_of_0_to_1_is_a_mistake():
    with pytest.raises(ValueError, match="from 0 to 1"):
        protect(SQNR, 5, None)
