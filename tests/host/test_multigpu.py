"""Hazard H68: the host's multi-GPU clones, on processors that are told apart by name alone.

`MultiGPU CFG Split` loads a copy of the model for every further card and evaluates the prompts of a step in threads,
one per card. Here the cards are `cpu` and `cpu:1`; which network a thread computes with is seen by hooks.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from sampling import Lab, relative
from slipstream.demo import emoji
from slipstream.engine.run.plan import CompensatorConfig
from slipstream.host.model import add_compensator
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import add_switch
from slipstream.quant.linear import W4A4Linear

multigpu = pytest.importorskip("comfy.multigpu", reason="this host has no multi-GPU clones")
import comfy.model_management  # noqa: E402

CARDS = [torch.device("cpu"), torch.device("cpu", 1)]
STEPS = 10


@pytest.fixture(scope="module")
def second() -> Lab:
    """The models of the second card: loaded once, as a loader would."""
    return Lab()


@pytest.fixture
def share(monkeypatch, second):
    """share(model, name) -> the model after the host's MultiGPU CFG Split for two cards. name: of the lab's models."""
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: CARDS)

    def shared_out(model, name="flux"):
        model = model.clone()
        model.cached_patcher_init = (lambda: getattr(second, name), ())
        return multigpu.create_multigpu_deepclones(model, 2)

    yield shared_out
    comfy.model_management.unload_all_models()  # a loader would give the second card a network without patches


def copies(model) -> list:
    return model.get_additional_models_with_key("multigpu")


@contextlib.contextmanager
def watched(model):
    """{thread: {cards whose own network's layers it ran}}, filled while the model is sampled."""
    seen: dict[int, set[str]] = {}
    handles = []
    for patcher in (model, *copies(model)):
        own = dict(patcher.model.diffusion_model.named_modules())
        own |= {key: patch for key, patch in patcher.object_patches.items() if isinstance(patch, torch.nn.Module)}
        for module in own.values():
            if list(module.parameters(recurse=False)):

                def see(module, args, card=str(patcher.load_device)):
                    seen.setdefault(threading.get_ident(), set()).add(card)

                handles.append(module.register_forward_pre_hook(see))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def same_on_two_cards(lab, split, one, two, filled=1, cfg=3.0, **options):
    """Sample both; the second has to give the same picture and account, each card with layers of its own.

    One card evaluates the prompts one by one, as two do: a sum over another batch is rounded differently.
    """
    split()
    alone = lab.sample(one, cfg=cfg, steps=STEPS, **options)
    expected = lab.report(one)
    with watched(two) as seen:
        shared = lab.sample(two, cfg=cfg, steps=STEPS, **options)
    report = lab.report(two)
    assert sorted(map(sorted, seen.values())) == [["cpu"], ["cpu:1"]], "a card computed with another one's weights"
    assert torch.equal(shared, alone)
    assert report["filled"] == expected["filled"] >= filled
    assert report["evaluations"] == expected["evaluations"]
    told = [[(e["action"], e["order"], e["anchor"]) for e in r["trace"]] for r in (expected, report)]
    assert told[0] == told[1]
    return expected, report


@pytest.mark.parametrize(
    "name, site",
    [
        ("flux", "model output"),
        ("flux", "block stack"),
        ("lumina", "block stack"),  # met through object patches, as the U-Net is
        ("unet", "U-Net depth"),
        ("unet", "U-Net encoder"),
        ("sd3", "model output"),  # at the slope: both threads find at once that there is no better place
    ],
    ids=lambda value: value.replace(" ", "_"),
)
def test_h68_caches_and_forecasts_on_two_cards_equal_one(lab, share, split, name, site):
    model = lab.every(getattr(lab, name), site=site)
    same_on_two_cards(lab, split, model, share(model, name), filled=3)


def test_h68_the_split_may_come_before_our_nodes_and_a_run_leaves_nothing(lab, share, split):
    two = lab.every(share(lab.lumina, "lumina"), site="block stack")
    same_on_two_cards(lab, split, lab.every(lab.lumina, site="block stack"), two, filled=3)
    plain, shared = lab.lumina, share(lab.lumina, "lumina")
    assert relative(lab.sample(shared, cfg=3.0, steps=4), lab.sample(plain, cfg=3.0, steps=4)) < 1e-5


def test_h68_measured_decisions_and_drifts_are_those_of_one_card(lab, share, split):
    model = lab.fast(lab.flux, method="drift budget", drift_budget=0.2)
    expected, report = same_on_two_cards(lab, split, model, share(model))
    for one, two in zip(expected["trace"], report["trace"], strict=True):
        assert (one["drift"] is None) == (two["drift"] is None)
        assert one["drift"] is None or two["drift"] == pytest.approx(one["drift"], rel=1e-3)


def test_h68_a_gate_in_which_one_prompt_decides_for_all_is_refused_in_words(lab, share):
    """The prompts run at the same time, so whichever came first would decide, each time another one."""
    model = lab.fast(lab.flux, method="first-block gate", site="block stack", threshold=0.5)
    two = share(model)
    result = lab.sample(two, cfg=3.0, steps=STEPS)
    assert "several GPUs" in lab.report(two)["note"] and not lab.report(two)["filled"]
    assert relative(result, lab.sample(lab.flux, cfg=3.0, steps=STEPS)) < 1e-5


def placed(patcher) -> dict:
    return {key: layer for key, layer in patcher.object_patches.items() if isinstance(layer, W4A4Linear)}


def test_h68_quantised_layers_are_copied_to_the_other_card_once(lab, share, split):
    model = lab.every(quantise(lab.flux, QuantWish(rank=8)))
    two = share(model)
    same_on_two_cards(lab, split, model, two, filled=3)
    own, other = placed(two), placed(copies(two)[0])
    assert own.keys() == other.keys() and not any(own[key] is other[key] for key in own)
    lab.sample(two, cfg=3.0, steps=4)
    assert all(placed(copies(two)[0])[key] is layer for key, layer in other.items())
    key, layer = next(iter(own.items()))
    lora = two.clone()
    lora.add_patches({f"{key}.weight": ("diff", (torch.ones(layer.out_features, layer.in_features),))})
    assert relative(lab.sample(lora, cfg=3.0, steps=4), lab.sample(two, cfg=3.0, steps=4)) > 1e-3


def test_h68_anchors_ask_the_better_weights_on_both_cards(lab, share, split):
    model = lab.every(quantise(lab.flux, QuantWish(rank=8)))
    model = add_compensator(model, CompensatorConfig(anchors=2, node_id="c"))
    expected, report = same_on_two_cards(lab, split, model, share(model), filled=3)
    assert len(report["compensation"]["anchors"]) == len(expected["compensation"]["anchors"]) == 2


@pytest.mark.parametrize("first", [True, False])
def test_h68_a_model_on_two_cards_in_a_switched_run(lab, share, first):
    small = emoji.load_small_flux()

    def run(large):
        a, b = (large, small) if first else (small, large)
        return lab.sample(add_switch(lab.every(a, node="a"), b, SwitchConfig(0.5)), cfg=3.0, steps=STEPS)

    assert relative(run(share(lab.flux)), run(lab.flux)) < 1e-5
