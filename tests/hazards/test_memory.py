"""H69: the cache's bytes are counted, capped and shown, whatever the site; and a fill costs next to nothing."""

from __future__ import annotations

import time
import weakref

import comfy.model_management
import pytest
import torch
from sampling import TRAINED, relative
from scenes import SITES, every_site
from slipstream.engine.forecast.history import Storage
from slipstream.engine.run.run import Run
from slipstream.host.canvas import events
from slipstream.host.memory import AUTOMATIC_SHARE, Memory

# The tiny Flux at 64 image tokens of width 256, in float32: one snapshot, as `docs/memory.md` has it.
SNAPSHOT = 64 * 256 * 4


@pytest.mark.card
@pytest.mark.parametrize(
    ("options", "snapshots"),
    [
        ({"site": "last block"}, 2),
        ({"site": "block stack"}, 2),
        ({"site": "last block", "predictor": None}, 1),
        ({"site": "block stack", "method": "first-block gate"}, 3),
        ({"site": "last block", "method": "confidence gate"}, 4),
        ({"site": "last block", "predictor": "Per token"}, 6),
    ],
)
def test_h69_the_count_is_the_formula(lab, options, snapshots):
    model = lab.fast(lab.flux, **options)
    lab.sample(model, size=TRAINED)
    assert lab.report(model)["cache_bytes"] == snapshots * SNAPSHOT
    lab.sample(model, cfg=3.0, batch=2, size=TRAINED)
    assert lab.report(model)["cache_bytes"] == 2 * 2 * snapshots * SNAPSHOT


@pytest.mark.card
@every_site
def test_h69_eight_bits_halve_the_cache_and_stay_near(lab, site):
    full, small = site.every(lab, 2, node="1"), site.every(lab, 2, cache_device="int8", node="2")
    reference, result = lab.sample(full), lab.sample(small)
    report = lab.report(small)
    assert report["filled"] == lab.report(full)["filled"] and report["cache_place"] == "int8"
    assert report["cache_bytes"] < 0.55 * lab.report(full)["cache_bytes"]
    plain = lab.sample(getattr(lab, site.model))
    assert relative(result, reference) < 0.05
    assert relative(result, plain) < 0.2


def test_h69_a_tight_budget_compresses_and_a_tighter_one_computes(lab, monkeypatch):
    base = lab.flux
    need = 2 * SNAPSHOT

    def sampled(limit):
        monkeypatch.setattr(Memory, "limit", lambda self, device: limit)
        model = lab.every(base, site="last block")
        return lab.sample(model, size=TRAINED), lab.report(model)

    _, report = sampled(need)
    assert report["cache_place"] == "cpu" and report["filled"] >= 8
    _, report = sampled(need - 1)
    assert report["cache_place"] == "int8" and report["filled"] >= 8 and report["cache_bytes"] < need
    result, report = sampled(0.3 * need)
    assert report["filled"] == 0 and report["cache_bytes"] == 0
    assert "more than the budget" in report["note"] and "MB" in events.node_text(report)
    assert torch.equal(result, lab.sample(base, size=TRAINED))


def test_h69_what_a_prompt_change_frees_is_free_again(lab, monkeypatch):
    """A schedule of prompts voids the history; the new one takes the room of the old, not more."""
    from scenes import scheduled

    monkeypatch.setattr(Memory, "limit", lambda self, device: 2 * SNAPSHOT)
    model = lab.every(lab.flux, site="last block")
    lab.sample(model, positive=scheduled(), size=TRAINED)
    report = lab.report(model)
    assert report["filled"] >= 4 and report["cache_place"] == "cpu"


def test_h69_on_a_card_the_order_is_card_then_ram_and_the_host_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 1000.0)
    monkeypatch.setattr(
        comfy.model_management, "free_memory", lambda size, device, keep_loaded: told.append((size, device.type))
    )
    card = torch.device("cuda")
    memory = Memory()
    assert memory.limit(card) == AUTOMATIC_SHARE * 1000
    assert [memory.place(100, card) for _ in range(3)] == [Storage.DEVICE, Storage.DEVICE, Storage.RAM]
    assert told == [(100, "cuda")] * 2 and not memory.full
    assert Memory("int8").place(100, card) is Storage.INT8
    assert Memory("RAM", 1).place(10**9, card) is Storage.RAM
    assert Memory("GPU", 1).place(10**7, card) is Storage.RAM  # the budget holds, whatever is asked for


def test_h69_room_is_made_of_what_is_not_running_or_the_cache_goes_to_ram(lab, monkeypatch):
    """The host's own `free_memory`, on a device that stands for a card: it would unload the network in mid-forward."""
    management, card, unloaded = comfy.model_management, torch.device("meta"), []
    running, idle = lab.flux, lab.unet
    monkeypatch.setattr(management, "current_loaded_models", [])
    for model in (running, idle):
        model.load_device = card
        loaded = management.LoadedModel(model)
        loaded.real_model, loaded.currently_used = weakref.ref(model.model), model is running
        management.current_loaded_models.append(loaded)

    def free(device=None, torch_free_too=False):
        return (1000.0 * len(unloaded), 0.0) if torch_free_too else 1000.0 * len(unloaded)

    monkeypatch.setattr(management, "get_free_memory", free)
    monkeypatch.setattr(management.LoadedModel, "model_memory", lambda self: 1000)
    monkeypatch.setattr(management.LoadedModel, "model_offloaded_memory", lambda self: 0)
    monkeypatch.setattr(
        management.LoadedModel, "model_unload", lambda self, *rest, **others: unloaded.append(self.model) or True
    )
    memory = Memory("GPU", 1)
    assert memory.place(100, card) is Storage.DEVICE
    assert [model is idle for model in unloaded] == [True]
    assert memory.place(5000, card) is Storage.RAM and len(unloaded) == 1  # what runs stays, though room is short


def test_the_node_shows_what_was_chosen_and_how_much_is_kept(lab):
    model = lab.fast(lab.flux, site="last block", method="first-block gate", threshold=0.2)
    lab.sample(model, steps=28, size=TRAINED)
    report = lab.report(model)
    text = events.node_text(report)
    assert text.splitlines()[2] == "last-block features from block 1, first-block gate 0.2, Taylor 1"
    assert text.splitlines()[1].endswith("saved, 0.2 MB")
    assert "computed" in text.splitlines()[0] and len(text.splitlines()) == 3
    automatic = lab.fast(lab.trained_unet)
    lab.sample(automatic, steps=28, size=TRAINED)
    chosen = "model output, drift budget 0.04, Taylor 1 for Stable Diffusion U-Net, cache 0.0 MB"
    assert chosen in events.summary(lab.report(automatic))


def test_a_filled_evaluation_costs_less_than_one_percent(lab, monkeypatch):
    """What Slipstream itself takes for one, at the model output: deciding, forecasting, counting, telling.

    The host's own work for a step comes on top (about 0.3 ms, whatever fills it). The fastest of each is taken: a busy
    machine delays, it never speeds up.
    """
    spent = [0.0]

    def timed(name):
        inner = getattr(Run, name)

        def wrapper(self, *args, **kwargs):
            started = time.perf_counter()
            try:
                return inner(self, *args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - started

        monkeypatch.setattr(Run, name, wrapper)

    for name in ("begin", "conditioning", "keys", "fill", "end"):
        timed(name)
    model, ours = lab.every(lab.flux), []
    prompts = ["grinning face", "red heart", "cat face", "hamburger"]

    def at_step(*_):
        ours.append(spent[0])
        spent[0] = 0.0

    lab.sample(model, prompts=prompts, size=TRAINED, callback=at_step)
    trace = lab.report(model)["trace"]
    filled = [t for t, e in zip(ours, trace, strict=True) if e["action"] != "computed"]
    computed = [e["seconds"] for e in trace if e["action"] == "computed"]
    assert len(filled) == 8 and min(filled) < 0.01 * min(computed)


def test_sites_are_those_of_the_table():
    assert {s.site for s in SITES} == {"block stack", "last block", "U-Net depth", "U-Net encoder"}
