"""The Speed & Quality Report of a run that several models shared."""

from __future__ import annotations

import json

import folder_paths
import torch
from slipstream.demo import emoji
from slipstream.host import report
from slipstream.host.patcher import add_cache
from slipstream.host.plan import CacheConfig
from slipstream.host.segments import SwitchConfig
from slipstream.host.switch import add_switch


def test_a_switched_run_is_found_and_told_by_its_models(lab, monkeypatch, tmp_path):
    """Also where a cache on one of the models has a report of its own; and the strip knows every mark."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    small = add_cache(emoji.load_small_flux(), CacheConfig(preset="Off", node_id="cache"))
    plain = add_cache(lab.flux, CacheConfig(preset="Off", node_id="plain"))
    switched = add_switch(small, lab.flux, SwitchConfig(0.25, node_id="switch"))
    results = [{"samples": lab.sample(model, steps=8)} for model in (switched, plain)]
    card, text, _ = report.make_report(*results, switched, plain, emoji.load_vae(), "card")
    numbers = json.loads(text)
    assert [s["evaluations"] for s in numbers["run"]["segments"]] == [2, 6]
    assert "2 of 8 evaluations by a small model" in numbers["verdict"] and "times as fast" in numbers["verdict"]
    assert report.marks(numbers["run"]) == {"computed": 6, "small model": 2}

    def has(card, colour):
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return bool(((card[0] - wanted).abs().amax(-1) < 0.01).any())

    assert has(card, report.COLOURS["small model"]) and not has(card, report.COLOURS["remote"])
    trace = numbers["run"]["trace"]
    trace[0].update(action="remote"), trace[3].update(anchor=True), trace[4].update(action="something new")
    marked = report.as_image(report.draw(numbers, None))
    assert all(has(marked, report.COLOURS[mark]) for mark in ("remote", "anchor", "computed"))
