"""What the first-time walk does on the page: a person's mouse and keys, and what that person then sees."""

from __future__ import annotations

import io
import math
import time
import urllib.parse
import urllib.request
from pathlib import Path

from tests.canvas import page as canvas

# A place of the canvas where nothing is, and the part of the page that is shown in the docs, in pixels.
FREE, GRAPH = (1010, 640), {"x": 60, "y": 85, "width": 720, "height": 600}
FIND = "(kind) => app.graph.nodes.find((node) => node.type === kind)"
# Where a slot or a title bar is on the screen. Argument: [node's type, "input" | "output" | "title", slot's name].
PLACE = """([kind, what, name]) => {
    const node = app.graph.nodes.find((node) => node.type === kind)
    const slots = what === "input" ? node.inputs : node.outputs
    const [x, y] = what === "title" ? [node.pos[0] + 60, node.pos[1] - 14]
        : node.getConnectionPos(what === "input", slots.findIndex((slot) => slot.name === name))
    const { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect()
    return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale]
}"""
# The same for a point of the graph.
POINT = """([x, y]) => {
    const { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect()
    return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale]
}"""
# The type of the node that an input is connected to.
SOURCE = """([kind, name]) => {
    const id = app.graph.nodes.find((node) => node.type === kind).inputs.find((input) => input.name === name)?.link
    const link = id == null ? null : app.graph.links.get?.(id) ?? app.graph.links[id]
    return link ? app.graph.getNodeById(link.origin_id).type : null
}"""
# What dialogs and notices say.
SAID = """() => [...document.querySelectorAll("[role=dialog], [role=alert], .p-dialog, [data-testid=error-overlay]")]
    .filter((element) => element.checkVisibility()).map((element) => element.innerText).join(" ")"""
UNKNOWN = """() => app.graph.nodes.filter((node) => !node.isVirtualNode && !node.subgraph
    && !LiteGraph.registered_node_types[node.type]).map((node) => node.type)"""


class Tab(canvas.Canvas):
    """One tab of a browser with a new profile, on a server that nobody has used before."""

    def __init__(self, chromium, url: str, folder: str):
        self.ours = (*canvas.OURS, f"/extensions/{folder}/")
        self.folder = folder
        context = chromium.new_context(viewport={"width": 1400, "height": 900})
        super().__init__(context, url, timeout=120_000)

    def _note(self, text: str) -> None:
        # The frontend asks for docs/<node>/en.md first, and takes docs/<node>.md where there is none.
        if any(name in text for name in self.ours) and not text.endswith("/en.md"):
            self.errors.append(text)

    def ready(self) -> None:
        """On the first visit the canvas is empty."""
        self.page.wait_for_function("window.app?.extensionManager && window.app?.vueAppReady && window.app.graph")

    def browse_templates(self) -> None:
        """By the menu at the top left."""
        self.page.keyboard.press("Escape")
        self.page.locator(".comfy-menu-button-wrapper").click()
        self.page.get_by_role("menuitem", name="Browse Templates").click()

    def templates(self) -> list[str]:
        """Choose our entry in the template browser, which is open; the names of what it offers."""
        self.page.get_by_text(self.folder, exact=True).first.click()
        cards = self.page.locator("[data-testid^=template-workflow-slipstream]")
        cards.first.wait_for()
        self.page.wait_for_timeout(500)
        names = cards.evaluate_all("cards => cards.map((card) => card.dataset.testid)")
        return sorted(name.removeprefix("template-workflow-") for name in names)

    def template(self, name: str) -> str:
        """Open a template by a click on its card; what the page then says."""
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.page.wait_for_function("app.graph.nodes.length > 0")
        self.page.wait_for_timeout(2000)  # whatever it has to say
        unknown, said = self.run(UNKNOWN), " ".join(self.run(SAID).split())
        self.page.keyboard.press("Escape")
        count = self.run("() => app.graph.nodes.length")
        words = f"{count} nodes, " + (f"unknown are {', '.join(unknown)}" if unknown else "none missing")
        return f"{words}; the page says: “{said}”" if said else words

    def open_file(self, path: Path) -> None:
        """Ctrl+O, and the file in the dialog that follows."""
        from playwright.sync_api import TimeoutError

        for _ in range(4):  # a page that is still opening a workflow does not hear the keys
            try:
                with self.page.expect_file_chooser(timeout=5_000) as chooser:
                    self.page.mouse.click(*FREE)
                    self.page.keyboard.press("Control+o")
                chooser.value.set_files(path)
                break
            except TimeoutError:
                continue
        self.page.wait_for_function("app.graph.nodes.some((node) => node.type === 'SlipstreamDemoPrompt')")
        self.page.wait_for_timeout(1000)

    def press_run(self, timeout: float = 300.0) -> dict:
        """{seconds, images, texts} of the run that the button starts, seconds as the host times it."""
        before = set(canvas.ask(f"{self.url}/history"))
        button = self.page.get_by_test_id("queue-button")
        button.or_(self.page.get_by_role("button", name="Run", exact=True)).first.click()
        deadline = time.monotonic() + timeout
        while True:
            done = {k: v for k, v in canvas.ask(f"{self.url}/history").items() if k not in before}
            if done:
                break
            if time.monotonic() > deadline:
                raise AssertionError(f"no picture after {timeout:.0f} s; the page says: {self.run(SAID)}")
            self.page.wait_for_timeout(50)
        (entry,) = done.values()
        times = {kind: data["timestamp"] for kind, data in entry["status"]["messages"]}
        if "execution_success" not in times:
            raise AssertionError(f"the run failed: {entry['status']['messages'][-1]}")
        outputs = entry["outputs"].values()
        return {
            "seconds": (times["execution_success"] - times["execution_start"]) / 1000,
            "images": [self.fetch(image) for output in outputs for image in output.get("images", ())],
            "texts": [text for output in outputs for text in output.get("text", ())],
        }

    def fetch(self, image: dict) -> bytes:
        with urllib.request.urlopen(f"{self.url}/view?{urllib.parse.urlencode(image)}") as answer:
            return answer.read()

    def view(self, scale: float, left: float, top: float) -> None:
        """Zoom, with the graph's origin at this point of the canvas."""
        self.run(
            """([scale, left, top]) => {
                const ds = app.canvas.ds
                ds.scale = scale
                ds.offset[0] = left / scale
                ds.offset[1] = top / scale
                app.canvas.setDirty(true, true)
            }""",
            [scale, left, top],
        )
        self.page.wait_for_timeout(300)

    def place(self, name: str, kind: str, x: float, y: float) -> None:
        """Add a node by the search that a double click opens, and drag it by its title to this point of the graph."""
        there = f"(kind) => Boolean(({FIND})(kind))"
        for _ in range(3):
            spot = self.run(POINT, [x + 200, y + 60])  # newer canvases hold the node by its middle
            try:
                self.add(name, spot, spot)
                self.page.wait_for_timeout(500)
            except AssertionError:  # a busy page is slower than its search waits
                continue
            if self.run(there, kind):
                break
        for _ in range(4):
            self.page.wait_for_timeout(400)  # a second press that comes sooner is a double click
            at = self.run(f"(kind) => Array.from(({FIND})(kind).pos)", kind)
            if abs(at[0] - x) + abs(at[1] - y) < 30:
                return
            self.drag(self.run(PLACE, [kind, "title", ""]), self.run(POINT, [x + 60, y - 14]))
        raise AssertionError(f"{name} does not come to its place")

    def wire(self, source: str, output: str, target: str, name: str) -> None:
        """Draw a wire from an output to an input."""
        self.drag(self.run(PLACE, [source, "output", output]), self.run(PLACE, [target, "input", name]))
        if self.run(SOURCE, [target, name]) != source:
            raise AssertionError(f"the wire from {source} to {target} did not hold")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*start)
        self.page.wait_for_timeout(100)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=12)
        self.page.wait_for_timeout(100)
        self.page.mouse.up()
        self.page.wait_for_timeout(200)

    def help(self, kind: str) -> str:
        """Select a node, press the button for its help; what opens."""
        self.run("(kind) => { app.canvas.selectNode(app.graph.nodes.find((node) => node.type === kind)) }", kind)
        self.page.get_by_test_id("info-button").click()
        content = self.page.locator(".node-help-content")
        picture = content.locator("img").first
        picture.wait_for()
        width = picture.evaluate("async (image) => { await image.decode(); return image.naturalWidth }")
        words = len(content.inner_text().split())
        return f"its page opens beside the canvas: {words} words and a picture {width} pixels wide"

    def picture(self, path: Path, most: int = 60_000) -> None:
        """The part of the page with the graph, as a JPEG of at most so many bytes."""
        from PIL import Image

        self.page.mouse.click(*FREE)  # nothing is selected
        self.page.wait_for_timeout(300)
        shot = Image.open(io.BytesIO(self.page.screenshot(clip=GRAPH))).convert("RGB")
        for quality in range(85, 20, -5):
            data = io.BytesIO()
            shot.save(data, "JPEG", quality=quality, optimize=True)
            if data.tell() <= most:
                break
        path.write_bytes(data.getvalue())


def likeness(one: bytes, other: bytes) -> str:
    """PSNR of two pictures in words."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float) for data in (one, other))
    error = ((a - b) ** 2).mean()
    return f"{10 * math.log10(255**2 / error):.1f} dB PSNR to the plain one" if error else "identical to the plain one"
