"""Help and words in the user's language, in the real frontend: the page that its panel opens, names on the node, the
strip. Skipped where there is no Chromium."""

from __future__ import annotations

import pytest
from canvas.page import SETTINGS, Canvas, ask

NODE = "SlipstreamCacheLoader"
# Frontends before this one drop every pack's translated names when they load a language (ComfyUI_frontend, pull 7214).
NAMES_KEPT = (1, 36)
EMPTY = {"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}}
WORDS = {
    "en": ("Cache Loader", "drift_budget", "Skips the model at steps", "1 computed1 forecast", "nothing is skipped"),
    "zh": (
        "缓存加载器 (Cache Loader)",
        "误差预算",
        "在输出可以由之前的结果填补",
        "计算 1 次预测 1 次",
        "没有跳过：误差预算为 0",
    ),
}
ADD = """(kind) => {
    const node = LiteGraph.createNode(kind)
    node.pos = [500, 300]
    app.graph.add(node)
    app.canvas.ds.reset()
    app.canvas.setDirty(true, true)
}"""
# What the server would send of a run of two evaluations.
RUN = """(id) => {
    const cell = (index, action) =>
        ({ index, step: index, action, share: 1, seconds: 0.5, reason: "last step", drift: 0.1 })
    app.api.dispatchEvent(new CustomEvent("slipstream.finished", { detail: {
        run: 1, nodes: [String(id)], prompt_id: "p", workflow: null, steps: 2, finished: true, seconds: 1,
        seconds_saved: 0.5, drift_mean: 0.1, cache_bytes: 2e6, cache_place: "int8",
        words: "nothing is skipped: the drift budget is 0", cells: [cell(0, "computed"), cell(1, "forecast")],
    } }))
}"""


@pytest.mark.parametrize("language", WORDS)
def test_help_names_and_strip_speak_the_users_language(browser, server, language):
    """One node as a user with this language sees it; the help's picture loads."""
    title, name, sentence, counts, why = WORDS[language]
    ask(f"{server}/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": False, "Comfy.Locale": language})
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    canvas = Canvas(context, server)
    canvas.load(EMPTY)
    canvas.run(ADD, NODE)
    node = canvas.run(
        """() => {
            const node = app.graph.nodes[0]
            return { id: node.id, title: node.title, labels: node.widgets.map((widget) => widget.label ?? widget.name) }
        }"""
    )
    version = canvas.run("() => window.__COMFYUI_FRONTEND_VERSION__")
    if language != "en" and tuple(int(part) for part in version.split(".")[:2]) < NAMES_KEPT:
        title, name = WORDS["en"][:2]
    assert node["title"] == title and name in node["labels"]

    canvas.run(RUN, node["id"])
    lines = canvas.wait(lambda strips: strips[NODE]["lines"][2])[NODE]["lines"]
    assert lines[0] == counts and "int8" in lines[1] and why in lines[2]

    canvas.run("() => { app.canvas.selectNode(app.graph.nodes[0]) }")
    canvas.page.get_by_test_id("info-button").click()
    content = canvas.page.locator(".node-help-content")
    content.get_by_text(sentence).first.wait_for()
    picture = content.locator("img").first
    picture.wait_for()
    assert picture.get_attribute("src").endswith(f"/extensions/ComfyUI-Slipstream/docs/images/{NODE}.png")
    assert picture.evaluate("async (image) => { await image.decode(); return image.naturalWidth }") >= 400
    # The frontend asks for docs/<node>/en.md first, and takes docs/<node>.md where there is none.
    assert [error for error in canvas.errors if f"{NODE}/en.md" not in error] == []
    context.close()
