"""The real frontend against the real server, in both of its renderings: nodes, and the strip of one run. Skipped where
there is no Chromium."""

from __future__ import annotations

import re

from canvas.page import LOADER, PREDICTOR, ask, full

COMPUTED = "#3a8fd9"


def test_every_node_is_found_and_added(canvas):
    """From the search that a double click opens, by the name on the node."""
    nodes = [info for info in ask(f"{canvas.url}/object_info").values() if info["category"] == "slipstream"]
    assert len(nodes) >= 4
    canvas.load({"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}})
    for info in nodes:
        canvas.add(info["display_name"])
        canvas.page.wait_for_function("app.graph.nodes.length === 1")
        assert canvas.run("() => app.graph.nodes[0].type") == info["name"]
        canvas.run("() => app.graph.remove(app.graph.nodes[0])")


def test_the_strip_fills_and_tells(demo):
    """One bar per evaluation with its words, on both nodes; the workflow and the prompt do not know of it."""
    before = demo.run("() => app.graph.serialize().nodes.map((node) => node.widgets_values)")
    assert demo.strips() == {}
    demo.queue()
    strips = demo.wait(lambda s: full(s[LOADER]) and full(s[PREDICTOR]))
    strip = strips[LOADER]
    assert strip == strips[PREDICTOR] | {"shown": strip["shown"]}
    assert strip["shown"] > 40 and strip["curve"].count("L") >= 20
    computed = strip["bars"].count(COMPUTED)
    assert 8 <= computed <= 20 and strip["lines"][0].startswith(f"{computed} computed")
    assert re.match(r"[\d.]+ m?s, saved [\d.]+ m?s · off by [\d.]+ % · cache [\d.]+ MB · fp32$", strip["lines"][1])
    assert "Taylor 1" in strip["lines"][2]
    assert strip["label"].startswith(f"Slipstream, 28 evaluations: {computed} computed")
    assert strip["titles"][0].startswith("Evaluation 1, step 1 of 28: computed")
    assert all(" off by " in title for title in strip["titles"][3:])
    assert demo.run("() => app.graph.serialize().nodes.map((node) => node.widgets_values)") == before
    assert "slipstream_strip" not in demo.run("async () => JSON.stringify(await app.graphToPrompt())")
    # what the strip says is not said again below it
    widgets = demo.run("() => app.graph.nodes.flatMap((n) => n.widgets ?? []).map((widget) => widget.name)")
    assert widgets.count("slipstream_strip") == 2 and "$$node-text-preview" not in widgets


def test_why_nothing_was_done_is_said(demo):
    demo.set("KSampler", steps=4)
    demo.queue()
    strip = demo.wait(lambda s: len(s[LOADER]["bars"]) == 4)[LOADER]
    assert set(strip["bars"]) == {COMPUTED} and "at 4 steps every one of them counts" in strip["lines"][2]
    demo.set("KSampler", steps=12)
    demo.set(LOADER, preset="Custom", drift_budget=0.01)
    demo.queue()
    strip = demo.wait(lambda s: full(s[LOADER], 12) and "nothing" in s[LOADER]["lines"][2])[LOADER]
    assert set(strip["bars"]) == {COMPUTED} and "try the preset Fast" in strip["lines"][2]
