"""Hazards H73 to H76: several models in one run equal what each would have done, and refuse before the first step."""

from __future__ import annotations

import gc

import comfy.hooks
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.supported_models
import pytest
import scenes
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from sampling import UNET, build, random_weights, relative
from slipstream.demo import emoji
from slipstream.engine.coordinates import FLOW, VARIANCE_EXPLODING
from slipstream.engine.errors import SlipstreamError
from slipstream.host.canvas import events
from slipstream.host.parts import SWITCH
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch.segments import NAMED, Boundary, Segment, SwitchConfig, joined, segments_of, span_at, spans
from slipstream.host.switch.switch import SwitchedRun, add_switch
from slipstream.host.switch.view import View

SMALL = {"steps": 5, "size": (8, 8)}
WAN_T2V, WAN_I2V = NAMED


def unet(seed: int = 0, width: int = 64):
    model = build(comfy.supported_models.SD15, {**UNET, "context_dim": width})
    model.model.diffusion_model.load_state_dict(random_weights(model.model.diffusion_model, seed))
    return model


@pytest.fixture(scope="module")
def twin():
    """A second load of the tiny U-Net."""
    return unet()


@pytest.fixture(scope="module")
def other():
    """Another model of the same family."""
    return unet(seed=3)


def switch(a, b, at=0.4, positive_b=None, negative_b=None, node="7", **config):
    return add_switch(a, b, SwitchConfig(at, node_id=node, **config), positive_b, negative_b)


class Asked:
    """What `events.last_report` wants to know."""

    node_ids = ("7",)


def report() -> dict:
    return events.last_report(Asked)


def counts() -> list[int]:
    return [segment["evaluations"] for segment in report()["segments"]]


def chain(lab, parts, steps=10, **options):
    """The same run cut into one run for each model, exact for euler: (model, first step, last step, own options)."""
    latent = None
    for model, first, last, own in parts:
        latent = lab.sample(
            model, latent=latent, steps=steps, start_step=first, last_step=last, disable_noise=first > 0,
            **{**options, **own},
        )  # fmt: skip
    return latent


# Exact


@scenes.every_sampler(comfy.samplers.KSampler.SAMPLERS)
def test_h73_a_twin_is_bit_identical(lab, twin, sampler):
    """Every sampler of the host, with both models really called; those that add noise and those with a memory too."""
    plain = lab.sample(lab.unet, sampler=sampler, cfg=3.0, **SMALL)
    model = switch(lab.unet, twin)
    with lab.calls(lab.unet) as first, lab.calls(twin) as second:
        assert torch.equal(lab.sample(model, sampler=sampler, cfg=3.0, **SMALL), plain)
    assert first and second and counts() == [len(first), len(second)]


def test_h73_image_to_image_inpainting_and_late_starts(lab, twin):
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 8:40] = 1.0
    model = switch(lab.unet, twin)
    for options in ({"denoise": 0.6}, {"noise_mask": mask, "denoise": 0.6}, {"start_step": 1, "last_step": 4}):
        plain = lab.sample(lab.unet, latent=latent, sampler="dpmpp_2m", **SMALL, **options)
        assert torch.equal(lab.sample(model, latent=latent, sampler="dpmpp_2m", **SMALL, **options), plain)
        assert min(counts()) > 0


def test_h73_a_picture_turned_back_into_noise(lab, twin):
    """The schedule rises, so what comes first is what has least noise."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    sigmas = torch.tensor([0.03, 0.5, 1.0, 2.0, 4.0, 8.0])
    options = {"sigmas": sigmas, "latent": latent, "disable_noise": True, "size": (8, 8)}
    plain = lab.sample(lab.unet, **options)
    assert torch.equal(lab.sample(switch(lab.unet, twin), **options), plain) and counts() == [2, 3]
    lab.sample(switch(lab.unet, twin, 3.0, unit="sigma"), **options)
    assert counts() == [4, 1]


def test_a_batch_and_runs_without_a_switch_in_them(lab, twin):
    plain = lab.sample(lab.unet, batch=3, cfg=3.0, **SMALL)
    assert torch.equal(lab.sample(switch(lab.unet, twin), batch=3, cfg=3.0, **SMALL), plain)
    for at, last in ((1.0, 5), (0.0, 5), (0.4, 1)):
        plain = lab.sample(lab.unet, last_step=last, **SMALL)
        assert torch.equal(lab.sample(switch(lab.unet, twin, at), last_step=last, **SMALL), plain)
        assert counts() == [last]
    assert lab.sample(switch(lab.unet, twin), sigmas=torch.tensor([1.0]), **SMALL).shape == plain.shape


# Two and three models, against the same by hand


@pytest.mark.card
def test_two_models_equal_two_runs_one_after_the_other(lab, other):
    by_hand = chain(lab, [(lab.unet, 0, 4, {}), (other, 4, 10, {})], cfg=3.0)
    model = switch(lab.unet, other)
    assert relative(lab.sample(model, steps=10, cfg=3.0), by_hand) < 2e-5
    assert counts() == [4, 6]
    once, again = (lab.sample(model, steps=10, cfg=3.0, sampler="dpmpp_2m_sde") for _ in range(2))
    assert torch.equal(once, again)
    backward = chain(lab, [(other, 0, 4, {}), (lab.unet, 4, 10, {})], cfg=3.0)
    assert relative(lab.sample(switch(lab.unet, other, order="b then a"), steps=10, cfg=3.0), backward) < 2e-5


@pytest.mark.parametrize("order", ["early node first", "late node first", "on the second input"])
def test_h76_chained_nodes_make_one_list(lab, other, order):
    third = unet(seed=5)
    by_hand = chain(lab, [(lab.unet, 0, 2, {}), (other, 2, 6, {}), (third, 6, 10, {})])
    if order == "early node first":
        model = switch(switch(lab.unet, other, 0.2, node="6"), third, 0.6)
    elif order == "late node first":
        model = switch(switch(lab.unet, third, 0.6, node="6"), other, 0.2)
    else:
        model = switch(lab.unet, switch(other, third, 0.6, node="6"), 0.2)
    assert relative(lab.sample(model, steps=10), by_hand) < 2e-5
    assert counts() == [2, 4, 4] and len(segments_of(model)) == 3
    assert events.last_report(type("Sixth", (), {"node_ids": ("6",)})) == report()


@pytest.mark.card
def test_there_and_back_again(lab, other):
    by_hand = chain(lab, [(lab.unet, 0, 3, {}), (other, 3, 7, {}), (lab.unet, 7, 10, {})])
    model = switch(switch(lab.unet, other, 0.3), lab.unet, 0.7)
    for _ in range(2):
        assert relative(lab.sample(model, steps=10), by_hand) < 2e-5
    assert counts() == [3, 4, 3] and report()["swaps"] == 2


def test_each_model_has_its_prompt_and_cfg(lab, other):
    own = {"positive": emoji.conditioning("red heart"), "negative": emoji.conditioning("cat face"), "cfg": 1.5}
    by_hand = chain(lab, [(lab.unet, 0, 4, {}), (other, 4, 10, own)], cfg=4.0)
    model = switch(lab.unet, other, 0.4, own["positive"], own["negative"], cfg_b=1.5)
    assert relative(lab.sample(model, steps=10, cfg=4.0), by_hand) < 2e-5
    first = chain(lab, [(other, 0, 4, own), (lab.unet, 4, 10, {})], cfg=4.0)
    model = switch(lab.unet, other, 0.4, own["positive"], own["negative"], cfg_b=1.5, order="b then a")
    assert relative(lab.sample(model, steps=10, cfg=4.0), first) < 2e-5
    only_cfg = chain(lab, [(lab.unet, 0, 4, {}), (other, 4, 10, {"cfg": 1.0})], cfg=4.0)
    assert relative(lab.sample(switch(lab.unet, other, cfg_b=1.0), steps=10, cfg=4.0), only_cfg) < 2e-5


def lora(model, seed: int, strength: float = 1.0):
    model = model.clone()
    key = next(k for k in model.model.state_dict() if k.endswith("attn1.to_q.weight"))
    shape = model.model.state_dict()[key].shape
    change = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    assert model.add_patches({key: ("diff", (change,))}, strength)
    return model


def test_h74_clones_of_one_checkpoint_are_swapped(lab):
    """Two clones share their weights: loaded together they would silently be one model."""
    one, two = lora(lab.unet, 1), lora(lab.unet, 2)
    parts = [(one, 0, 3, {}), (two, 3, 7, {}), (one, 7, 10, {})]
    by_hand = chain(lab, parts)
    plain = lab.sample(lab.unet, steps=10)
    assert relative(lab.sample(one, steps=10), lab.sample(two, steps=10)) > 1e-3
    for memory in ("auto", "swap", "keep both"):
        model = switch(switch(one, two, 0.3, memory=memory), one, 0.7, memory=memory)
        assert relative(lab.sample(model, steps=10), by_hand) < 2e-5
        assert report()["swaps"] == 2 and report()["swap_seconds"] > 0
        assert ("one checkpoint" in report()["remark"]) == (memory == "keep both")
    assert torch.equal(lab.sample(lab.unet, steps=10), plain)


def test_h74_a_sampler_that_looks_ahead_goes_back_to_the_first_clone(lab):
    """heunpp2 asks for the next two steps' levels, so the turn goes over, back and over again."""
    results = []
    for a, b in ((lab.unet, lab.unet), (unet(), unet())):
        results.append(lab.sample(switch(lora(a, 1), lora(b, 2)), sampler="heunpp2", **SMALL))
        assert report()["swaps"] == 3
    assert torch.equal(*results)


def test_a_quantised_clone_is_a_side_of_its_own(lab):
    """W4A4 Quantize replaces layers of the shared network; each side gets its own back at every switch."""
    quantised = quantise(lab.flux, QuantWish(format="convrot_w4a4"))
    for first, second in ((quantised, lab.flux), (lab.flux, quantised)):
        by_hand = chain(lab, [(first, 0, 3, {}), (second, 3, 6, {})], steps=6)
        assert relative(lab.sample(switch(first, second, 0.5), steps=6), by_hand) < 2e-5
    assert relative(by_hand, lab.sample(lab.flux, steps=6)) > 1e-4


# Coordinates


def denoiser(a, b):
    """Of a variance exploding x: a is x / (1 + sigma), b is x / (1 + sigma^2); both are finite for pure noise too."""
    return torch.tanh(a) + 0.3 * torch.sin(2 * b)


class Toy(torch.nn.Module):
    """A network that is one known denoiser, told in the terms of any kind of prediction."""

    dtype = torch.float32

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timesteps, transformer_options=None, **_):
        sigma = transformer_options["sigmas"].double().reshape(-1, 1, 1, 1)
        x = x.double()
        if self.kind == "flow":
            clean = denoiser(x, x * (1 - sigma) / ((1 - sigma) ** 2 + sigma**2))
            return ((x - clean) / sigma).float()
        length = (sigma**2 + 1).sqrt()
        x = x * length
        clean = denoiser(x / (1 + sigma), x / length**2)
        told = {
            "eps": (x - clean) / sigma,
            "v": (x / length**2 - clean) * length / sigma,
            "edm": (clean - x / length**2) * length / sigma,
        }[self.kind]
        return told.float()


def toy(kind: str, shift: float = 1.0):
    model = unet()
    sampling = comfy.model_sampling
    base, prediction = {
        "eps": (sampling.ModelSamplingDiscrete, sampling.EPS),
        "v": (sampling.ModelSamplingDiscrete, sampling.V_PREDICTION),
        "edm": (sampling.ModelSamplingContinuousEDM, sampling.EDM),
        "flow": (sampling.ModelSamplingDiscreteFlow, sampling.CONST),
    }[kind]
    model.model.model_sampling = type("Sampling", (base, prediction), {})(model.model.model_config)
    if kind == "flow":
        model.model.model_sampling.set_parameters(shift=shift)
    model.model.diffusion_model = Toy(kind)
    return model


@pytest.mark.parametrize("first,second", [
    ("eps", "v"), ("v", "eps"), ("eps", "edm"), ("eps", "flow"), ("flow", "eps"), ("flow", "v"), ("edm", "flow"),
    ("flow", "flow"),
])  # fmt: skip
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_predictions_of_every_kind_meet(lab, first, second, sampler):
    """Each toy is the same denoiser, so a run over two of them is the run of the first alone."""
    alone = toy(first)
    plain = lab.sample(alone, sampler=sampler, **SMALL)
    result = lab.sample(switch(alone, toy(second, 3.0), 0.6), sampler=sampler, **SMALL)
    assert relative(result, plain) < 2e-5
    assert min(counts()) >= 2


def test_the_trained_flow_and_the_trained_noise_prediction_share_a_picture(lab):
    """Flux and SD1.5 kinds on one latent space: each result is nearer to its models than they are to each other."""
    flow, noise = lab.flux, lab.trained_unet
    apart = relative(lab.sample(flow, steps=12), lab.sample(noise, steps=12))
    for model, near in ((switch(flow, noise, 0.6), flow), (switch(flow, noise, 0.2, order="b then a"), flow)):
        mixed = lab.sample(model, steps=12)
        assert mixed.isfinite().all() and 0 < relative(mixed, lab.sample(near, steps=12)) < apart
        assert min(counts()) >= 2


# Caches, guiders and other packs


def cached(node, model, values=(0.2, 0.15, 0.95, False)):
    return node.execute(model, *values).result[0]


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
@pytest.mark.parametrize("side", ["a before", "a after", "b", "both"])
def test_h76_the_host_s_caches_serve_their_own_model_only(lab, other, node, side):
    """A cache that stands before the switch would answer for both models."""
    a, b = lab.unet, other
    model = {
        "a before": lambda: switch(cached(node, a), b),
        "a after": lambda: cached(node, switch(a, b)),
        "b": lambda: switch(a, cached(node, b)),
        "both": lambda: cached(node, switch(a, cached(node, b))),
    }[side]()
    with lab.calls(a) as first, lab.calls(b) as second:
        result = lab.sample(model, steps=20, size=(8, 8))
    assert result.isfinite().all() and counts() == [8, 12]
    assert len(first) < 8 if side != "b" else len(first) == 8
    assert len(second) < 12 if side in ("b", "both") else len(second) == 12
    assert torch.equal(lab.sample(model, steps=20, size=(8, 8)), result)


@pytest.mark.parametrize("side", ["a before", "a after", "b", "both"])
def test_h76_our_caches_start_cold_on_each_side(lab, other, side):
    def every(model, node):
        return lab.every(model, 2, node=node)

    a, b = lab.unet, other
    model = {
        "a before": lambda: switch(every(a, "a"), b),
        "a after": lambda: every(switch(a, b), "a"),
        "b": lambda: switch(a, every(b, "b")),
        "both": lambda: every(switch(a, every(b, "b")), "a"),
    }[side]()
    with lab.calls(a) as first, lab.calls(b) as second:
        result = lab.sample(model, steps=20, size=(8, 8), cfg=3.0)
    assert counts() == [8, 12]
    for node, calls, own in (("a", first, 8), ("b", second, 12)):
        trace = events.last_report(type("Node", (), {"node_ids": (node,)}))
        if side == "both" or side[0] == node:
            assert trace["evaluations"] == own and trace["filled"] >= 2 and trace["computed"] == len(calls)
            assert [e["action"] for e in trace["trace"]][:2] == ["computed", "computed"]
            assert round(trace["trace"][0]["u"], 3) == (0 if node == "a" else 8)
        else:
            assert len(calls) == own
    assert torch.equal(lab.sample(model, steps=20, size=(8, 8), cfg=3.0), result)


def test_a_cached_model_that_begins_with_a_prompt_of_its_own(lab, other):
    """It stands in for the sampler's model, so its cache is opened for both; the one that worked is told."""
    text = emoji.conditioning("red heart")
    model = switch(lab.unet, lab.every(other, 2, node="b"), 0.5, text, order="b then a")
    lab.sample(model, steps=12, size=(8, 8))
    told = events.last_report(type("Node", (), {"node_ids": ("b",)}))
    assert told["evaluations"] == 6 and told["filled"] >= 1 and counts() == [6, 6]


def test_a_cache_on_a_model_in_other_coordinates_sees_its_own_schedule(lab):
    model = switch(lab.trained_unet, lab.every(lab.flux, 2, node="b"), 0.3)
    assert lab.sample(model, steps=20).isfinite().all()
    trace = events.last_report(type("Node", (), {"node_ids": ("b",)}))
    assert [round(e["u"], 2) for e in trace["trace"]] == pytest.approx(range(6, 20), abs=0.2)
    assert trace["filled"] >= 4 and all(e["sigma"] < 1 for e in trace["trace"])


def guided(lab, model, guider, steps=6):
    latent = lab.latent(model, size=(8, 8))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)


def dual(model):
    guider = Guider_DualCFG(model)
    guider.set_conds(*(emoji.conditioning(p) for p in ("hamburger", "red heart", "")))
    guider.set_cfg(4.0, 2.0)
    return guider


def perpendicular(model):
    guider = Guider_PerpNeg(model)
    guider.set_conds(*(emoji.conditioning(p) for p in ("hamburger", "red heart", "")))
    guider.set_cfg(4.0, 1.5)
    return guider


def turned_on(model):
    guider = scenes.GuiderThatTurnsCfgOn(model)
    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    return guider


@pytest.mark.parametrize("guider", [dual, perpendicular, turned_on])
def test_every_guider_guides_both_models(lab, twin, guider):
    plain = guided(lab, lab.unet, guider(lab.unet))
    model = switch(lab.unet, twin)
    with lab.calls(twin) as second:
        assert torch.equal(guided(lab, model, guider(model)), plain)
    assert second


def test_guidance_patches_belong_to_their_model(lab, twin):
    """What a node such as PAG or RescaleCFG puts on one model is not done to the other's output."""
    seen = []

    def note(name):
        def hook(args):
            seen.append(name)
            return args["denoised"]

        return hook

    a, b = lab.unet, twin.clone()
    a.set_model_sampler_post_cfg_function(note("a"))
    b.set_model_sampler_post_cfg_function(note("b"))
    lab.sample(switch(a, b), **SMALL)
    assert seen == ["a"] * 2 + ["b"] * 3


def test_a_guider_with_a_model_of_its_own_is_refused(lab, twin):
    guider = comfy.samplers.CFGGuider(switch(lab.unet, twin))
    guider.uncond_model_patcher = lab.unet
    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    with pytest.raises(SlipstreamError, match="the guider CFGGuider brings a second model"):
        guided(lab, lab.unet, guider)


def test_a_cfg_without_a_negative_is_refused(lab, twin):
    guider = comfy.samplers.CFGGuider(switch(lab.unet, twin, cfg_b=3.0))
    guider.inner_set_conds({"positive": emoji.conditioning("hamburger")})  # as BasicGuider has it
    with pytest.raises(SlipstreamError, match="cfg_b is 3, but this guider has no negative"):
        guided(lab, lab.unet, guider)


def test_a_controlnet_is_each_model_s_own_with_its_own_range(lab, twin):
    """One object would keep the range of the model that was prepared last."""
    positive = scenes.controlled("unet", 0.0, 0.5)
    control = positive[0][1]["control"]
    options = dict(steps=8, cfg=3.0, positive=positive)
    plain = lab.sample(lab.unet, **options)
    assert relative(plain, lab.sample(lab.unet, steps=8, cfg=3.0)) > 1e-3
    made = []
    original = scenes.Residuals.copy

    def copy(self):
        made.append(original(self))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes.Residuals, "copy", copy)
        before = control.calls
        assert torch.equal(lab.sample(switch(lab.unet, twin, 0.25), **options), plain)
    assert len(made) == 1 and made[0].calls > 0 and control.calls > before
    assert made[0].timestep_range is None and control.timestep_range is None


def test_lora_hooks_of_a_prompt_work_on_both_models(lab, twin):
    key = next(k for k in twin.model.state_dict() if k.endswith("attn1.to_q.weight"))
    change = torch.randn(twin.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(1)) * 2
    hooks = comfy.hooks.create_hook_lora({key.replace(".weight", ".diff"): change}, 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(emoji.conditioning("hamburger"), hooks)
    plain = lab.sample(lab.unet, positive=positive, cfg=3.0, **SMALL)
    assert relative(plain, lab.sample(lab.unet, positive=emoji.conditioning("hamburger"), cfg=3.0, **SMALL)) > 1e-3
    for second in (twin, lab.unet):
        model = switch(lab.unet, second)
        assert torch.equal(lab.sample(model, positive=positive, cfg=3.0, **SMALL), plain)
        assert torch.equal(lab.sample(model, cfg=3.0, **SMALL), lab.sample(lab.unet, cfg=3.0, **SMALL))


def test_prompt_schedules_end_where_the_model_s_own_table_says(lab, twin):
    plain = lab.sample(lab.unet, positive=scenes.scheduled(), **SMALL)
    assert torch.equal(lab.sample(switch(lab.unet, twin, 0.2), positive=scenes.scheduled(), **SMALL), plain)


def test_a_lora_after_the_switch_belongs_to_the_model_that_begins(lab, other):
    late, early = lora(switch(lab.unet, other), 1), switch(lora(lab.unet, 1), other)
    assert torch.equal(lab.sample(late, steps=6), lab.sample(early, steps=6))


# Nothing is left


def alive():
    gc.collect()
    return {id(o) for o in gc.get_objects() if type(o) in (SwitchedRun, View)}


@pytest.mark.parametrize("error", [RuntimeError, comfy.model_management.InterruptProcessingException])
def test_an_error_in_the_second_model_leaves_nothing(lab, other, error):
    plain, alone = lab.sample(lab.unet, **SMALL), lab.sample(other, **SMALL)
    model = switch(lab.unet, lab.every(other, 2, node="b"))
    clean = lab.sample(model, **SMALL)
    failing = []

    def fail(module, args):
        if failing:
            raise error("stop")

    hook = other.model.diffusion_model.register_forward_pre_hook(fail)
    options = dict(model.model_options)
    before = alive()
    try:
        failing.append(True)
        with pytest.raises(error):
            lab.sample(model, **SMALL)
    finally:
        hook.remove()
    assert alive() <= before and dict(model.model_options) == options
    assert all(m.model.current_patcher is None for m in (lab.unet, other))
    assert torch.equal(lab.sample(model, **SMALL), clean)
    assert torch.equal(lab.sample(lab.unet, **SMALL), plain) and torch.equal(lab.sample(other, **SMALL), alone)


def test_neither_model_is_changed_and_clones_carry_the_list(lab, other):
    wrappers = {k: dict(v) for k, v in lab.unet.wrappers.items()}
    model = switch(lab.unet, other)
    assert (
        lab.unet.wrappers == wrappers
        and lab.unet.get_attachment(SWITCH) is None
        and other.get_attachment(SWITCH) is None
    )
    assert torch.equal(lab.sample(model.clone(), **SMALL), lab.sample(model, **SMALL))


@pytest.mark.parametrize("memory", ["auto", "swap", "keep both"])
def test_memory_is_the_host_s_to_manage_and_its_seconds_are_told(lab, memory):
    first, second = unet(1), unet(2)
    comfy.model_management.unload_all_models()
    here = []

    def loaded(step, *_):
        models = [m.model.model for m in comfy.model_management.current_loaded_models if m.model is not None]
        here.append((first.model in models, second.model in models))

    plain = lab.sample(switch(unet(1), unet(2)), **SMALL)
    comfy.model_management.unload_all_models()
    assert torch.equal(lab.sample(switch(first, second, memory=memory), callback=loaded, **SMALL), plain)
    assert here[0] == (True, memory == "keep both") and here[-1] == (memory != "swap", True)
    assert report()["swap_seconds"] > 0


def test_the_cost_is_told_on_the_node_and_in_the_report(lab):
    small = build(comfy.supported_models.SD15, {**UNET, "model_channels": 64})
    lab.sample(switch(lab.unet, small, 0.4), **SMALL)
    told = report()
    assert [s["mark"] for s in told["segments"]] == ["small model", "computed"]
    assert [e["action"] for e in told["trace"]] == ["small model"] * 2 + ["computed"] * 3
    assert [(s["first"], s["last"]) for s in told["segments"]] == [(0, 2), (2, 5)]
    assert told["counts"] == {"small model": 2, "computed": 3} and told["evaluations"] == 5
    assert all(s["seconds"] > 0 for s in told["segments"])
    assert sum(s["seconds"] for s in told["segments"]) + told["swap_seconds"] <= told["seconds"] * 1.01
    text = events.node_text(told)
    assert text.startswith("2 on SD15 #1 (") and ", then 3 on SD15 #2 (" in text and "for 1 swap" in text
    assert "2 on SD15 #1" in events.summary(told)


def test_a_server_is_told_every_evaluation_and_the_end(lab, twin, monkeypatch):
    sent = []

    class Server:
        client_id = "page"

        class loop:
            call_soon_threadsafe = staticmethod(lambda call, *args: None)

        def send_sync(self, name, data, client):
            sent.append((name, data))

        def send_progress_text(self, text, node, client):
            sent.append((node, text))

    monkeypatch.setattr(events, "server_of_host", Server)
    lab.sample(switch(lab.unet, twin), **SMALL)
    assert ("7", events.node_text(report())) in sent
    ends = [data for name, data in sent if name == "slipstream.finished"]
    assert len(ends) == 1 and ends[0]["nodes"] in (["7"], ("7",)) and ends[0]["evaluations"] == 5


# Where a boundary lies


def test_boundaries_become_steps_of_the_run_s_own_schedule():
    flow = (1.0, 0.95, 0.9, 0.875, 0.8, 0.5, 0.2, 0.0)
    assert [Boundary(f).step(flow, FLOW) for f in (0, 0.4, 0.5, 1)] == [0, 3, 4, 7]
    assert Boundary(0.9, "sigma").step(flow, FLOW) == 3  # a level belongs to what comes before it
    assert Boundary(0, WAN_T2V).step(flow, FLOW) == 4 and Boundary(0, WAN_I2V).step(flow, FLOW) == 3
    exploding = tuple(t / (1 - t) if t < 1 else 1e4 for t in flow)
    assert Boundary(0, WAN_T2V).step(exploding, VARIANCE_EXPLODING) == 4
    assert Boundary(2.0, "sigma").step(flow, FLOW) == 0 and Boundary(0.0, "sigma").step(flow, FLOW) == 7


def test_spans_leave_no_step_out_and_the_last_word_counts():
    sigmas = tuple(1 - i / 10 for i in range(11))
    a, b, c = Segment(node_id="a"), Segment(node_id="b"), Segment(node_id="c")

    def of(segments):
        return [(s.segment.node_id, s.first, s.last) for s in spans(segments, sigmas, FLOW)]

    later = joined((a,), (c,), Boundary(0.6))
    assert of(joined(later, (b,), Boundary(0.2))) == [("a", 0, 2), ("b", 2, 6), ("c", 6, 10)]
    assert of(joined(later, (b,), Boundary(0.6))) == [("a", 0, 6), ("b", 6, 10)]
    assert of(joined(later, (b,), Boundary(0.0))) == [("b", 0, 6), ("c", 6, 10)]
    assert of(joined(later, (b,), Boundary(1.0))) == [("a", 0, 6), ("c", 6, 10)]
    assert of(joined((a,), joined((b,), (c,), Boundary(0.2)), Boundary(0.5))) == [("a", 0, 5), ("c", 5, 10)]
    found = spans(joined(later, (b,), Boundary(0.2)), sigmas, FLOW)
    assert [span_at(found, sigmas, s) for s in (1.2, 1.0, 0.81, 0.8, 0.8000001, 0.75, 0.4, 0.0)] == [
        0, 0, 0, 1, 1, 1, 2, 2,
    ]  # fmt: skip


def test_samplers_that_evaluate_between_the_steps_stay_with_the_step_s_model(lab, twin):
    """dpm_2 looks halfway to the next step: that evaluation is the first model's until its last step is done."""
    lab.sample(switch(lab.unet, twin, 0.4), sampler="dpm_2", steps=10, size=(8, 8))
    trace = report()["trace"]
    assert all((e["u"] < 3.999) == (e["reason"] == "SD15 #1") for e in trace)


# Refusals: one sentence with both names, before any step


def refused(lab, model, match, **options):
    networks = [s.runner.patcher for s in segments_of(model) if s.runner.patcher is not None]
    with lab.calls(model) as first, lab.calls(networks[0]) as second, pytest.raises(SlipstreamError, match=match) as e:
        lab.sample(model, **{**SMALL, **options})
    assert not first and not second
    assert str(e.value).count(". ") == 0 and str(e.value).startswith("Hybrid Model Switch: ")


def test_h75_other_latents(lab):
    with pytest.raises(SlipstreamError, match="FluxSchnell and SD15 have different latents"):
        switch(lab.flux, lab.unet)


def test_h75_noise_beyond_the_second_model(lab):
    flow, noise = lab.flux, lab.trained_unet
    refused(lab, switch(flow, noise, 0.0), "TinySD15 would work for FluxSchnell at sigma 1, pure noise, but it knows")
    refused(lab, switch(flow, noise, 0.02), r"only up to 14.61; switch at 0\.\d+ of the steps", steps=100)
    exploding = toy("edm")
    refused(lab, switch(exploding, unet(), 0.0), r"at sigma 120, but it knows noise only up to 14.61; switch at 0.20")
    assert lab.sample(switch(noise, flow, 0.0), **SMALL).isfinite().all()


def test_h75_text_of_another_width(lab):
    wide = unet(width=96)
    refused(lab, switch(lab.unet, wide), "the conditioning of SD15 .first. is 64 wide, but SD15 .second. reads 96")
    narrow = emoji.conditioning("hamburger")
    refused(lab, switch(lab.unet, wide, 0.4, narrow, narrow), "positive_b and negative_b are 64 wide")
    fitting = [[torch.zeros(1, 8, 96), {}]]
    assert lab.sample(switch(lab.unet, wide, 0.4, fitting, fitting), cfg=3.0, **SMALL).isfinite().all()


def test_h75_kinds_of_prediction_without_a_bridge(lab):
    odd = unet()
    odd.model.model_sampling = type(
        "Odd", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.IMG_TO_IMG), {}
    )()
    refused(lab, switch(lab.unet, odd), "cannot be exchanged .variance exploding, IMG_TO_IMG.")
    patched = lab.unet
    patched.add_object_patch("model_sampling", toy("flow").model.model_sampling)
    refused(lab, switch(lab.unet, patched), "its own clone count noise in different ways")


@pytest.mark.parametrize("config,match", [
    ({"at": 1.5}, "switch_at is 1.5"), ({"at": -1.0, "unit": "sigma"}, "switch_at is -1.0"),
    ({"unit": "percent"}, "there is no unit 'percent'"), ({"order": "c"}, "there is no order 'c'"),
    ({"memory": "all"}, "there is no memory 'all'"),
])  # fmt: skip
def test_values_that_cannot_be_are_told_when_the_node_runs(lab, twin, config, match):
    with pytest.raises(SlipstreamError, match=match):
        switch(lab.unet, twin, **config)


def test_families_that_share_latents_can_be_wired(lab):
    """Lumina 2 and the small Flux: one latent space, two networks, texts of two encoders."""
    lumina = lab.lumina
    if type(lumina.model.latent_format) is not type(lab.flux.model.latent_format):
        pytest.skip("this host gives them different latents")
    text = emoji.conditioning("hamburger")
    assert lab.sample(switch(lab.flux, lumina, 0.5, text, text), steps=4).isfinite().all()


def test_the_node_makes_what_it_says(lab, twin):
    from slipstream.nodes.hybrid_switch import HybridSwitch

    assert HybridSwitch.GET_SCHEMA().node_id == "SlipstreamHybridSwitch"
    HybridSwitch.hidden = type("Hidden", (), {"unique_id": "7"})
    model = HybridSwitch.execute(lab.unet, twin, 0.4, "fraction of steps", "a then b", "auto").result[0]
    assert torch.equal(lab.sample(model, **SMALL), lab.sample(lab.unet, **SMALL)) and counts() == [2, 3]
