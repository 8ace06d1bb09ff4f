"""Every template in the real frontend, as an artist opens it: no node missing, nothing on the console, and the server
refuses nothing but the model files that are not there. All in the classic rendering, two in the new one."""

from __future__ import annotations

import json
import urllib.error

import pytest
from canvas.page import SETTINGS, Canvas, ask

from lab import workflow
from lab.server import ROOT

NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
NEW = ("slipstream_flux_dev", "slipstream_wan22_t2v")
PICTURE = "example.png"
# Dialogs and notices that speak of nodes, and what the graph holds in their place.
MISSING = """() => ({
    said: [...document.querySelectorAll("[role=dialog], [role=alert], .p-dialog")].map((e) => e.innerText)
        .filter((text) => /node/i.test(text)),
    unknown: app.graph.nodes.filter((n) => !n.isVirtualNode && !n.subgraph && !LiteGraph.registered_node_types[n.type])
        .map((n) => n.type),
})"""


@pytest.fixture(scope="module")
def opened(browser, server):
    """(a function that gives a tab in one rendering, what the server says of its nodes)"""
    tabs = {}

    def tab(vue: bool) -> Canvas:
        if vue not in tabs:
            ask(f"{server}/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": vue})
            tabs[vue] = Canvas(browser.new_context(viewport={"width": 1400, "height": 900}), server, timeout=120_000)
        return tabs[vue]

    return tab, ask(f"{server}/object_info")


def refused(canvas: Canvas, prompt: dict) -> set[tuple[str, str]]:
    """(node, value) of what the server objects to; a prompt that it takes is taken back."""
    try:
        ask(f"{canvas.url}/prompt", {"prompt": prompt})
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
        return {
            (node, str(one["extra_info"].get("received_value", one["extra_info"].get("input_name"))))
            for node, of_node in answer["node_errors"].items()
            for one in of_node["errors"]
        }
    canvas.idle()
    return set()


def check(canvas: Canvas, name: str, info: dict) -> None:
    graph = ask(f"{canvas.url}/api/workflow_templates/ComfyUI-Slipstream/{name}.json")
    canvas.load(graph)
    assert canvas.run(MISSING) == {"said": [], "unknown": []}, name
    prompt = canvas.run("async () => (await app.graphToPrompt()).output")
    # The canvas reads the values from the same places as the tests without a browser; it adds those of later inputs.
    saved = workflow.load(ROOT / "workflows" / f"{name}.json", info)
    assert {n: p["class_type"] for n, p in prompt.items()} == {n: p["class_type"] for n, p in saved.items()}
    for number, node in saved.items():
        inputs = prompt[number]["inputs"]
        assert {key: inputs.get(key) for key in node["inputs"]} == node["inputs"], f"{name}, {node['class_type']}"
    files = {(str(n["id"]), file["name"]) for n in graph["nodes"] for file in n["properties"].get("models", ())}
    if PICTURE not in info["LoadImage"]["input"]["required"]["image"][0]:
        files |= {(n, "image") for n, p in prompt.items() if p["class_type"] == "LoadImage"}
    found = {(n, "image" if value == PICTURE else value) for n, value in refused(canvas, prompt)}
    assert found == files, name


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_templates_open_and_validate(opened, vue):
    """Up to the model files; the demo's wholly, and their prompt is accepted."""
    tab, info = opened
    canvas = tab(vue)
    if canvas.run("() => Boolean(LiteGraph.vueNodesMode)") != vue:
        pytest.skip("this frontend has one rendering only")
    for name in NEW if vue else NAMES:
        check(canvas, name, info)
    assert canvas.errors == []
