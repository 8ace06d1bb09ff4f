"""The browser of a test file, the server that it looks at, and a tab in each rendering."""

from __future__ import annotations

import uuid
from types import SimpleNamespace

import pytest
from canvas.page import DEMO, SETTINGS, Canvas, ask, chromium


@pytest.fixture(scope="module")
def browser():
    with chromium() as program:
        yield program


@pytest.fixture(scope="module")
def server(browser, comfy):
    """The server's address; its canvas' settings are afterwards what they were."""
    before = ask(f"{comfy.url}/settings")
    yield comfy.url
    ask(f"{comfy.url}/settings", {"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en", **before})


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
