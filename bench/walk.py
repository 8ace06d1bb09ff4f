"""The first-time walk: from an empty ComfyUI folder, by the README alone, to a faster picture, with the time of each step.

    python dev.py bench walk [--keep DIR] [--page]

Takes a fresh copy of the host that COMFYUI_PATH names, without models and custom nodes, clones this checkout's last
commit into it, starts it as a user does, and does the rest in its own page with mouse and keys, in a headless Chromium.
Whatever the console or the log says against our files is a stumble. Adds this host's column to bench/out/walk.json and
writes docs/first_walk.md and its two pictures from all of them (--page: only that, nothing is walked).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from engine.files import write_whole

from .boot import ROOT, register_torchvision_schemas
from .rows import save
from .walk_page import write_page

OUT = ROOT / "bench" / "out" / "walk.json"
PICTURES = {name: ROOT / "docs" / f"walk_{name}.jpg" for name in ("before", "after")}
PACK, SHIPPED_AS, DEMO = "ComfyUI-Slipstream", "slipstream", "slipstream_demo"
MODEL = "tiny_flux_emoji.safetensors"
TEMPLATE = "slipstream_flux_dev"
SEED = 7
STARTUP = 300  # seconds that the host may take to answer

# Where a slot or a title bar is on the screen. Argument: [node's type, "input" | "output" | "title", slot's name].
PLACE = """([kind, what, name]) => {
    const node = app.graph.nodes.find((node) => node.type === kind)
    const slots = what === "input" ? node.inputs : node.outputs
    const [x, y] = what === "title" ? [node.pos[0] + 60, node.pos[1] - 14]
        : node.getConnectionPos(what === "input", slots.findIndex((slot) => slot.name === name))
    const { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect()
    return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale]
}"""
# [type, slot] that an input of a node is connected to.
SOURCE = """([kind, name]) => {
    const node = app.graph.nodes.find((node) => node.type === kind)
    const id = node.inputs.find((input) => input.name === name)?.link
    const link = id == null ? null : app.graph.links.get?.(id) ?? app.graph.links[id]
    return link ? app.graph.getNodeById(link.origin_id).type : null
}"""
LAYOUT = {  # of the user's own workflow: room between loader and sampler
    "UNETLoader": (0, 0), "SlipstreamDemoPrompt": (0, 150), "EmptySD3LatentImage": (0, 420),
    "SlipstreamDemoVAE": (0, 600), "KSampler": (800, 0), "VAEDecode": (800, 350), "SaveImage": (800, 470),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--serve"]:
        return serve(Path(argv[1]), argv[2:])
    parser = argparse.ArgumentParser(prog="python dev.py bench walk")
    parser.add_argument("--keep", type=Path, help="walk in this empty folder and leave it there")
    parser.add_argument("--page", action="store_true", help="only write the page from bench/out/walk.json")
    options = parser.parse_args(argv)
    rows = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else []
    if not options.page:
        with tempfile.TemporaryDirectory(prefix="first-walk-", ignore_cleanup_errors=True) as folder:
            row = Walk(options.keep or Path(folder)).walk()
        rows = sorted([r for r in rows if r["host"] != row["host"]] + [row], key=lambda r: numbers(r["host"]))
        save(OUT, rows)
    write_page(rows)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def serve(folder: Path, options: list[str]) -> None:
    """Become the host: `python main.py`, after what this environment's torchvision needs."""
    register_torchvision_schemas()
    sys.argv = [str(folder / "main.py"), *options]
    sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    os.chdir(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")


class Walk:
    """One walk in one folder. `steps` is what was done: {name, seconds, seen}; `stumbles` what was in the way."""

    def __init__(self, folder: Path):
        self.comfy = folder / "ComfyUI"
        self.packs = self.comfy / "custom_nodes"
        self.log = folder / "log.txt"
        self.folder = folder
        self.steps: list[dict] = []
        self.stumbles: list[str] = []
        self.tab = None
        self.url = ""

    @contextmanager
    def step(self, name: str):
        """Time what is done inside; it adds to the list what a user sees."""
        seen: list[str] = []
        print(f"{len(self.steps) + 1:2} {name}", flush=True)
        started = time.monotonic()
        try:
            yield seen
        finally:
            seconds = time.monotonic() - started
            self.steps.append({"name": name, "seconds": round(seconds, 1), "seen": seen})
            print(f"   {seconds:.1f} s  {'; '.join(seen)}", flush=True)
            if self.tab:
                self.stumbles += [f"{name}: {error}" for error in self.tab.errors]
                self.tab.errors.clear()

    def walk(self) -> dict:
        source = Path(os.environ["COMFYUI_PATH"]).resolve()
        copy_host(source, self.comfy)
        before, load = library("torch"), os.getloadavg()[0]
        self.install()
        with self.server(), browser() as chromium:
            self.at_the_page(chromium)
        self.read_log()
        self.as_shipped()
        if library("torch") != before:
            self.stumbles.append("torch is not what it was before")
        return {
            "host": host_version(self.comfy), "frontend": library("comfyui_frontend_package"), "date": str(date.today()),
            "cpu": f"{os.cpu_count()} cores, {platform.system()}", "load": [round(load, 1), round(os.getloadavg()[0], 1)],
            "steps": self.steps, "stumbles": self.stumbles,
        }  # fmt: skip

    def install(self) -> None:
        pack = self.packs / PACK
        with self.step("Clone the pack into `custom_nodes`") as seen:
            run("git", "clone", "-q", ROOT, pack)
            seen.append(f"{megabytes(pack):.0f} MB, {megabytes(pack / '.git'):.0f} of them history")
        with self.step("`pip install -r requirements.txt`") as seen:
            said = run(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-r", pack / "requirements.txt")
            new = [line for line in said.splitlines() if line.startswith("Successfully installed")]
            seen.append(new[0] if new else "everything was there already")
        with self.step("The same in an environment that has nothing") as seen:
            seen.append(self.empty_environment(pack / "requirements.txt"))
        with self.step("Put a model where models belong") as seen:
            target = self.packs / DEMO
            shutil.copytree(pack / "demo", target, ignore=shutil.ignore_patterns("out", "__pycache__"))
            shutil.move(target / "models" / MODEL, self.comfy / "models" / "diffusion_models" / MODEL)
            seen.append("the small model of `demo/` stands for yours, its nodes for text encoder and VAE")

    def empty_environment(self, requirements: Path) -> str:
        """What pip brings where not even numpy is there."""
        place = self.folder / "empty"
        run(sys.executable, "-m", "venv", place)
        python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        try:
            run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", requirements)
        except RuntimeError:
            return "not measured: no package registry in reach"
        listed = json.loads(run(python, "-m", "pip", "list", "--disable-pip-version-check", "--format", "json"))
        names = [entry["name"].lower() for entry in listed]
        if any("torch" in name for name in names):
            self.stumbles.append(f"requirements.txt pulls {', '.join(n for n in names if 'torch' in n)}")
        return f"{len(names) - 1} packages, {'no' if 'torch' not in names else 'with'} torch"

    @contextmanager
    def server(self):
        """ComfyUI as a user starts it, on a free port, ready when entered."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with self.step("`python main.py`") as seen, self.log.open("wb") as log:
            command = [sys.executable, "-m", "bench.walk", "--serve", self.comfy, "--cpu", "--port", str(port)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            self.wait_for_server(process)
            found = re.findall(r"([\d.]+) seconds(.*): .*[/\\](\S+)", self.text())
            seen += [f"{seconds} s of these are the pack's{failed}" for seconds, failed, name in found if name in (PACK, SHIPPED_AS)]
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)

    def wait_for_server(self, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + STARTUP
        while process.poll() is None and time.monotonic() < deadline:
            try:
                return urllib.request.urlopen(self.url + "/system_stats", timeout=5).close()
            except OSError:
                time.sleep(0.1)
        process.kill()
        raise RuntimeError("ComfyUI did not start:\n" + "\n".join(self.text().splitlines()[-15:]))

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def read_log(self) -> None:
        """Lines of the log that warn of us, and failures of any kind."""
        for line in self.text().splitlines():
            ours = re.search("slipstream", line, re.I) and re.search("warning|error|failed|deprecat|cannot", line, re.I)
            if ours or line.startswith("Traceback"):
                self.stumbles.append(f"the log: {line.strip()}")

    def at_the_page(self, chromium) -> None:
        with self.step("Open the page for the first time") as seen:
            self.open(chromium)
            count = self.templates()
            seen.append(f"the template browser is open; at its left, under *Extensions*, stands {PACK} with {count}")
        with self.step(f"Click {PACK}, then {TEMPLATE}") as seen:
            seen.append(self.template(TEMPLATE))
        with self.step("Open your own workflow (Ctrl+O)") as seen:
            path = self.folder / "my workflow.json"
            path.write_text(json.dumps(own_workflow()), encoding="utf-8")
            self.open_file(path)
            seen.append("model, prompts, KSampler with 28 euler steps, picture; no node of this pack in it")
        with self.step("Press Run") as seen:
            first = self.run_button()
            seen.append(f"a picture after {first['seconds']:.1f} s, loading the model included")
        with self.step("Type another seed, press Run") as seen:
            self.tab.set("KSampler", seed=SEED)
            plain = self.run_button()
            seen.append(f"a picture after {plain['seconds']:.2f} s")
        self.picture("before")
        with self.step("Double click, type *Cache Loader*; again, *Taylor Predictor*; draw the three wires") as seen:
            self.add("Cache Loader", "SlipstreamCacheLoader", 380, -20)
            self.add("Taylor Predictor", "SlipstreamTaylorPredictor", 380, 540)
            self.wire("UNETLoader", "MODEL", "SlipstreamCacheLoader", "model")
            self.wire("SlipstreamCacheLoader", "MODEL", "SlipstreamTaylorPredictor", "model")
            self.wire("SlipstreamTaylorPredictor", "MODEL", "KSampler", "model")
            seen.append("everything left as it comes")
        with self.step("Press Run, same seed") as seen:
            fast = self.run_button()
            strip = self.tab.wait(lambda strips: not strips["SlipstreamCacheLoader"]["busy"])["SlipstreamCacheLoader"]
            seen.append(f"a picture after {fast['seconds']:.2f} s, {likeness(plain['image'], fast['image'])}")
            seen.append("the strip says: " + " / ".join(strip["lines"]))
        self.picture("after")
        with self.step("Select Cache Loader, press its *i*") as seen:
            seen.append(self.help("SlipstreamCacheLoader"))
        with self.step("Add *Speed & Quality Report*, *KSamplerSelect* and *BasicScheduler*, wire them, press Run") as seen:
            seen.append(self.report())

    def as_shipped(self) -> None:
        """The pack as the registry ships it, under the name Manager gives it, in the same ComfyUI."""
        from tests.shipped import shipped

        files = shipped()
        shutil.rmtree(self.packs / PACK)
        shutil.rmtree(self.packs / DEMO)
        with self.step("The same from the registry: only what it ships, in the folder that Manager makes") as seen:
            for name in files:
                target = self.packs / SHIPPED_AS / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)
            seen.append(f"{len(files)} files, {megabytes(self.packs / SHIPPED_AS):.1f} MB")
        with self.server(), browser() as chromium, self.step("Open the page, its templates and a node's help") as seen:
            self.open(chromium)
            self.tab.page.keyboard.press("Control+Alt+t")
            seen.append(self.help("SlipstreamCacheLoader"))
        self.read_log()
