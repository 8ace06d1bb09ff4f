"""Pictures of the templates: each graph as the real frontend draws it, from the real server."""

from __future__ import annotations

import io
import json
from pathlib import Path

from lab.server import BASE, Server
from tests.canvas.page import SETTINGS, Canvas, ask, chromium

# Drawn large, so that the canvas writes every widget out, then made smaller.
WINDOW, SHOWN, MOST = (2400, 1500), (800, 500), 60_000

# The whole graph in the middle of the window, nothing else on it.
FIT = """([left, top, right, bottom]) => {
    const nodes = app.graph.nodes, groups = app.graph.groups ?? app.graph._groups
    const boxes = [...nodes.map((n) => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]),
        ...groups.map((g) => [g.pos[0], g.pos[1], g.pos[0] + g.size[0], g.pos[1] + g.size[1]])]
    const [x0, y0] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])))
    const [x1, y1] = [2, 3].map((i) => Math.max(...boxes.map((box) => box[i])))
    const scale = Math.min((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))
    const ds = app.canvas.ds
    ds.scale = scale
    ds.offset[0] = (left + right) / 2 / scale - (x0 + x1) / 2
    ds.offset[1] = (top + bottom) / 2 / scale - (y0 + y1) / 2
    app.canvas.show_info = false
    app.canvas.setDirty(true, true)
}"""
# Everything of the page that is not the canvas or a widget on it.
BARE = """.side-tool-bar-container, .comfyui-body-top, .comfyui-body-bottom, .comfyui-body-left, .comfyui-body-right,
.p-toast, .p-dialog-mask, .graph-canvas-panel .p-buttongroup, .splitter-overlay-root, .p-splitter-gutter
{ opacity: 0 !important }"""


def draw(paths: list[Path], log: Path = BASE / "pictures.txt") -> None:
    """A .jpg beside each of the files, of at most MOST bytes."""
    from PIL import Image

    with Server(log) as url, chromium() as browser:
        ask(f"{url}/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": False})
        context = browser.new_context(viewport=dict(width=WINDOW[0], height=WINDOW[1]))
        canvas = Canvas(context, url, timeout=180_000)
        canvas.page.add_style_tag(content=BARE)
        for path in paths:
            canvas.load(json.loads(path.read_text(encoding="utf-8")))
            canvas.page.keyboard.press("Escape")
            canvas.run(FIT, [30, 30, WINDOW[0] - 30, WINDOW[1] - 30])
            canvas.page.wait_for_timeout(800)
            picture = Image.open(io.BytesIO(canvas.page.screenshot())).convert("RGB").resize(SHOWN, Image.LANCZOS)
            for quality in range(88, 30, -4):
                picture.save(path.with_suffix(".jpg"), quality=quality, optimize=True)
                if path.with_suffix(".jpg").stat().st_size <= MOST:
                    break
