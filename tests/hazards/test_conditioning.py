"""Hazards H20 to H26: every conditioning has a history of its own, and a change of what is active voids forecasts."""

from __future__ import annotations

import pytest
import torch
from sampling import relative
from scenes import guided, scheduled
from slipstream.demo import emoji
from slipstream.engine.run.conditions import active_conditioning


def test_h20_cfg_1_to_3_to_1(lab):
    used = lab.every(lab.flux)
    for cfg in (1.0, 3.0, 1.0):
        with lab.calls(used) as runs:
            result = lab.sample(used, cfg=cfg)
        assert torch.equal(result, lab.sample(lab.every(lab.flux), cfg=cfg))
        assert set(runs) == {1 if cfg == 1.0 else 2} and len(runs) == lab.report(used)["computed"] < 16


def test_h21_cfg_appears_in_mid_run(lab, split):
    model = lab.every(lab.flux)
    result = guided(lab, model)
    trace = lab.report(model)["trace"]
    changed = [e for e in trace if e["reason"] == "the active conditioning changed"]
    assert len(changed) == 1 and changed[0]["action"] == "computed"
    assert changed[0]["sigma"] <= 0.5 < trace[changed[0]["index"] - 1]["sigma"]
    assert sum(e["action"] != "computed" for e in trace) >= 6
    assert relative(result, guided(lab, lab.flux)) < 0.2
    split()
    assert relative(guided(lab, model), result) < 1e-5


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_h22_a_prompt_schedule_computes_the_new_prompt(lab, split, cfg):
    model = lab.every(lab.flux)
    result = lab.sample(model, positive=scheduled(), cfg=cfg)
    trace = lab.report(model)["trace"]
    changed = [e["index"] for e in trace if e["reason"] == "the active conditioning changed"]
    assert changed and all(trace[i]["action"] == "computed" for i in changed)
    assert sum(e["action"] != "computed" for e in trace) >= 5
    plain = lab.sample(lab.flux, positive=scheduled(), cfg=cfg)
    unchanged = lab.sample(lab.flux, positive=emoji.conditioning("cat face"), cfg=cfg)
    assert relative(result, plain) < 0.5 * relative(unchanged, plain)  # the second prompt has taken effect
    split()
    assert relative(lab.sample(model, positive=scheduled(), cfg=cfg), result) < 1e-5


def test_h26_images_of_a_batch_share_only_the_decision(lab):
    model = lab.every(lab.flux)
    alone = lab.sample(model, prompts=["cat face"])  # the first row of the noise does not depend on the batch size
    both = lab.sample(model, prompts=["cat face", "red heart"])
    assert lab.report(model)["filled"] >= 8
    assert relative(both[:1], alone) < 1e-5


def test_h26_the_decision_is_the_worst_of_the_batch(lab):
    model = lab.fast(lab.flux)

    def first_drift(prompts):
        lab.sample(model, prompts=prompts)
        return lab.report(model)["trace"][1]["drift"]

    drifts = {}
    for second in ("red heart", "panda", "strawberry"):
        drifts[second] = first_drift(["cat face", second])
    alone = first_drift(["cat face"])
    assert all(d >= alone * (1 - 1e-5) for d in drifts.values())
    assert len({round(d, 6) for d in drifts.values()}) > 1  # the second picture does count


class Control:
    """What `active_conditioning` reads of a ControlNet: its sigma range and the one before it in the chain."""

    def __init__(self, start, end, previous=None):
        self.timestep_range, self.previous_controlnet = (start, end), previous


def test_h28_a_controlnet_that_starts_or_ends_changes_what_is_active():
    chain = Control(0.8, 0.4, Control(1.0, 0.6))
    seen = [active_conditioning([[{"uuid": "a", "control": chain}], None], s) for s in (0.9, 0.7, 0.5, 0.2)]
    assert len(set(seen)) == 4
    assert seen[1] == active_conditioning([[{"uuid": "a", "control": chain}], None], 0.75)
