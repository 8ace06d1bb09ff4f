"""A page of the real frontend in a headless Chromium, as the tests of the canvas use it."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from dev import BROWSERS
from lab.server import ROOT

# Sandbox and GPU are not to be had in a container; the rest keeps it from the network.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]
# Our files by their address, our own warnings by their first word.
OURS = ("/extensions/ComfyUI-Slipstream/", "Slipstream:")
# Nothing opens over the canvas, whoever used this server's folder before.
# The nodes of the demo workflow that have a strip.
LOADER, PREDICTOR = "SlipstreamCacheLoader", "SlipstreamTaylorPredictor"
DEMO = json.loads((ROOT / "workflows" / "slipstream_demo.json").read_text())

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Workflow.ConfirmDelete": False}


@contextmanager
def chromium():
    """A headless Chromium with a new profile; skips where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("no browser tests: the Python package playwright is not installed (.ci/dev-requirements.txt)")
    program = os.environ.get("SLIPSTREAM_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no browser tests: no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


# Bars by their colour, their words, the picture's label, the line, the three lines of text, the height on the screen.
STRIPS = """() => Object.fromEntries(
    [app.graph, ...app.graph.nodes.map((node) => node.subgraph)].flatMap((graph) => graph?.nodes ?? [])
        .map((node) => [node.type, node.widgets?.find((widget) => widget.name === "slipstream_strip")?.element])
        .filter(([, element]) => element)
        .map(([type, element]) => [type, {
            bars: [...element.querySelectorAll("rect[fill]")].map((bar) => bar.getAttribute("fill")),
            titles: [...element.querySelectorAll("title")].map((title) => title.textContent),
            label: element.querySelector("svg").getAttribute("aria-label"),
            curve: element.querySelector("path").getAttribute("d"),
            lines: [...element.querySelectorAll("div")].map((line) => line.textContent),
            shown: element.checkVisibility() ? element.offsetHeight : 0,
            busy: element.ariaBusy === "true",
            resting: element.classList.contains("resting"),
        }]))"""


def ask(url: str, data: object = None):
    """The JSON that the server answers."""
    body = None if data is None else json.dumps(data).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as answer:
        text = answer.read()
    return json.loads(text) if text else None


class Canvas:
    """One tab. `errors` is what the console or a page error has said about our files."""

    def __init__(self, context, url: str, timeout: float = 30_000):
        self.errors: list[str] = []
        self.url = url
        self.page = context.new_page()
        self.page.set_default_timeout(timeout)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self._note(str(error) + (getattr(error, "stack", "") or "")))
        self.page.goto(url)
        self.ready()

    def _heard(self, message) -> None:
        if message.type in ("error", "warning"):
            self._note(f"{message.text} {message.location.get('url', '')}")

    def _note(self, text: str) -> None:
        if any(name in text for name in OURS):
            self.errors.append(text)

    def ready(self) -> None:
        """Wait until a page that is being loaded shows its workflow, and no longer exchanges it for another."""
        state = "window.app?.extensionManager && window.app?.vueAppReady && window.app.graph?.nodes.length"
        self.page.wait_for_function(state)
        seen, identity = None, ""
        while seen != identity:
            seen, identity = identity, self.run("() => app.graph.id")
            self.page.wait_for_timeout(400)

    def run(self, script: str, argument: object = None):
        """The value of a JavaScript function of one argument; promises are waited for."""
        return self.page.evaluate(script, argument)

    def load(self, graph: dict) -> None:
        """Open a workflow as the canvas opens a file."""
        self.run("async (graph) => { await app.loadGraphData(graph) }", graph)

    def set(self, kind: str, **values) -> None:
        """Set widgets of the first node of a type."""
        self.run(
            """([kind, values]) => {
                const node = app.graph.nodes.find((node) => node.type === kind)
                for (const [name, value] of Object.entries(values)) {
                    const widget = node.widgets.find((widget) => widget.name === name)
                    widget.value = value
                    widget.callback?.(value)
                }
            }""",
            [kind, values],
        )

    def mode(self, kind: str, mode: int) -> None:
        """0 runs, 2 is muted, 4 is bypassed."""
        self.run("([kind, mode]) => { app.graph.nodes.find((node) => node.type === kind).mode = mode }", [kind, mode])

    def queue(self) -> None:
        """Queue the workflow; the run may go on afterwards."""
        self.run("async () => { await app.queuePrompt(0) }")

    def add(self, name: str, at: tuple[float, float] = (650, 450), drop: tuple[float, float] = (950, 700)) -> None:
        """Add a node as a person does: double click at a free place, type its name, take it from the list."""
        from playwright.sync_api import TimeoutError

        box = self.page.locator("input[role=combobox]:visible")
        offer = self.page.get_by_role("option").filter(has=self.page.get_by_text(name, exact=True)).first
        for _ in range(6):  # a page that has just been loaded may close what is opened on it
            try:
                self.page.keyboard.press("Escape")
                self.page.mouse.dblclick(*at)
                box.fill(name, timeout=1500)
                offer.click(timeout=3000)
                return self.page.mouse.click(*drop)  # newer canvases let it follow the mouse until then
            except TimeoutError:
                continue
        raise AssertionError(f"the search does not offer {name}")

    def strips(self) -> dict[str, dict]:
        """What the strips show, by their node's type."""
        return self.run(STRIPS)

    def wait(self, test: Callable[[dict], object], timeout: float = 30.0) -> dict:
        """The strips once they pass the test."""
        deadline = time.monotonic() + timeout
        while True:
            strips = self.strips()
            try:
                if test(strips):
                    return strips
            except (KeyError, IndexError):
                pass
            if time.monotonic() > deadline:
                seen = {kind: (len(s["bars"]), s["lines"], s["busy"]) for kind, s in strips.items()}
                raise AssertionError(f"the strips did not become what was waited for; they are {seen}")
            self.page.wait_for_timeout(50)

    def idle(self) -> None:
        """Stop whatever the server does and wait until its queue is empty."""
        ask(f"{self.url}/queue", {"clear": True})
        deadline = time.monotonic() + 60
        while ask(f"{self.url}/prompt")["exec_info"]["queue_remaining"]:
            ask(f"{self.url}/interrupt", {})
            assert time.monotonic() < deadline, "the server does not stop"
            time.sleep(0.1)


def full(strip: dict, bars: int = 28) -> bool:
    """Whether a strip has all its bars and nothing runs."""
    return len(strip["bars"]) == bars and not strip["busy"]
