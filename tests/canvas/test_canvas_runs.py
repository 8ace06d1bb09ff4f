"""The strip through a run's whole life, in both renderings: cancelled, reloaded, in a second tab, in a subgraph."""

from __future__ import annotations

import uuid

from canvas.page import DEMO, LOADER, PREDICTOR, full

COMPUTED = "#3a8fd9"
BYPASSED = 4
# Enough evaluations that a page is loaded twice before they are done; no test waits for their end.
LONG = 2500


def begun(strip: dict) -> bool:
    return any(title.startswith("Evaluation 1,") for title in strip["titles"])


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
