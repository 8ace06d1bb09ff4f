"""The real frontend against the real server, in both of its renderings: nodes, templates, and the strip through a run's
whole life. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
import uuid
from types import SimpleNamespace

import pytest
from canvas.page import SETTINGS, Canvas, ask

from lab.server import ROOT

LOADER, PREDICTOR = "SlipstreamCacheLoader", "SlipstreamTaylorPredictor"
DEMO = json.loads((ROOT / "workflows" / "slipstream_demo.json").read_text())
COMPUTED = "#3a8fd9"
BYPASSED = 4
# Enough evaluations that a page is loaded twice before they are done; no test waits for their end.
LONG = 2500


@pytest.fixture(scope="module", params=["classic", "vue"])
def tabs(request, browser, server):
    """A browser window with one tab open, in one rendering."""
    vue = request.param == "vue"
    ask(f"{server}/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": vue})
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    first = Canvas(context, server)
    if first.run("() => Boolean(LiteGraph.vueNodesMode)") != vue:
        pytest.skip(f"this frontend has no {request.param} rendering")
    yield SimpleNamespace(first=first, new=lambda: Canvas(context, server), seed=iter(range(1000 + 500 * vue, 10**6)))
    context.close()


@pytest.fixture
def canvas(tabs):
    """The tab, with nothing running; whatever our files said on its console fails the test."""
    tabs.first.idle()
    yield tabs.first
    tabs.first.idle()
    assert tabs.first.errors == []


@pytest.fixture
def demo(canvas, tabs):
    """The tab with the demo workflow open, under a name and with a seed that no test had."""
    canvas.load({**DEMO, "id": str(uuid.uuid4())})
    canvas.set("KSampler", seed=next(tabs.seed))
    return canvas


def full(strip: dict, bars: int = 28) -> bool:
    return len(strip["bars"]) == bars and not strip["busy"]


def begun(strip: dict) -> bool:
    return any(title.startswith("Evaluation 1,") for title in strip["titles"])


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


def test_cancel_requeue_and_bypass(demo, tabs):
    demo.set("KSampler", steps=LONG)
    demo.set(LOADER, preset="Off")
    demo.queue()
    demo.wait(lambda s: 3 < len(s[LOADER]["bars"]) < LONG)
    demo.run("() => app.api.interrupt()")
    stopped = demo.wait(lambda s: "stopped after" in s[LOADER]["lines"][2])
    assert len(stopped[LOADER]["bars"]) < LONG
    demo.set("KSampler", steps=20)
    demo.set(LOADER, preset="Balanced")
    demo.queue()
    demo.wait(lambda s: full(s[LOADER], 20) and full(s[PREDICTOR], 20))
    # Bypassed, the predictor's strip is of a run before; the loader's is of this one.
    demo.mode(PREDICTOR, BYPASSED)
    demo.set("KSampler", steps=24)
    demo.queue()
    strips = demo.wait(lambda s: full(s[LOADER], 24))
    assert strips[PREDICTOR]["resting"] and len(strips[PREDICTOR]["bars"]) == 20
    assert "took no part" in strips[PREDICTOR]["lines"][2] and not strips[LOADER]["resting"]


def test_reload_in_mid_run_and_a_second_tab(demo, tabs):
    """Both show the evaluations from before they were there, and go on; another workflow is shown nothing."""
    demo.set("KSampler", steps=LONG)
    demo.set(LOADER, preset="Off")
    demo.queue()
    demo.wait(lambda s: len(s[LOADER]["bars"]) > 5)
    demo.page.reload()
    demo.ready()
    seen = demo.wait(lambda s: begun(s[LOADER]))[LOADER]
    demo.wait(lambda s: len(s[LOADER]["bars"]) > len(seen["bars"]))
    second = tabs.new()
    second.load({**DEMO, "id": str(uuid.uuid4())})
    second.page.wait_for_timeout(300)
    assert second.strips() == {}
    second.load(demo.run("() => app.graph.serialize()"))
    seen = second.wait(lambda s: begun(s[LOADER]))[LOADER]
    second.wait(lambda s: len(s[LOADER]["bars"]) > len(seen["bars"]))
    demo.run("() => app.api.interrupt()")
    for tab in (demo, second):
        assert "stopped after" in tab.wait(lambda s: "stopped" in s[LOADER]["lines"][2])[LOADER]["lines"][2]
    assert second.errors == []
    second.page.close()


def test_in_a_subgraph_and_for_two_samplers(demo):
    """A node's id is then a path; two samplers of one prompt are one strip, side by side."""
    # Otherwise the host may take the output it kept of an equal node with another id (V3 nodes, all versions so far).
    demo.set(LOADER, preset="Safe")
    demo.run(
        """() => {
            const node = app.graph.nodes.find((node) => node.type === "SlipstreamCacheLoader")
            app.graph.convertToSubgraph(new Set([node]))
            const first = app.graph.nodes.find((node) => node.type === "KSampler")
            const second = LiteGraph.createNode("KSampler")
            app.graph.add(second)
            for (const [i, input] of first.inputs.entries()) {
                const link = app.graph.links.get?.(input.link) ?? app.graph.links[input.link]
                if (link && input.name !== "latent_image") {
                    app.graph.getNodeById(link.origin_id).connect(link.origin_slot, second, i)
                }
            }
            const after = app.graph.nodes.find((node) => node.type === "SaveLatent")
            first.connect(0, second, second.inputs.findIndex((input) => input.name === "latent_image"))
            second.connect(0, after, 0)
            for (const widget of second.widgets) {
                const set = { steps: 12, denoise: 0.5, cfg: 1, sampler_name: "euler", scheduler: "simple" }[widget.name]
                if (set !== undefined) widget.value = set
            }
        }"""
    )
    demo.queue()
    strips = demo.wait(lambda s: full(s[PREDICTOR], 40) and full(s[LOADER], 40))
    assert "sampling 2 of this prompt" in strips[LOADER]["lines"][2]
    assert strips[PREDICTOR]["shown"] > 40 and not strips[LOADER]["shown"]
    demo.run("() => app.canvas.setGraph(app.graph.nodes.find((node) => node.subgraph).subgraph)")
    demo.page.wait_for_function(
        "[...document.querySelectorAll('.slipstream-strip')].some((e) => e.checkVisibility() && e.offsetHeight > 40)"
    )
    demo.run("() => app.canvas.setGraph(app.graph)")
