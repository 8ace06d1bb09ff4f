"""The first-time walk: from an empty ComfyUI folder, by the README alone, to a faster picture, each step timed.

    python dev.py bench walk [--keep DIR] [--page]

Takes a fresh copy of the host that COMFYUI_PATH names, without models and custom nodes, clones this checkout's last
commit into it, starts it as a user does, and does the rest in its own page with mouse and keys, in a headless Chromium.
Whatever the console or the log says against our files is a stumble. Adds this host's column to bench/out/walk.json and
writes docs/first_walk.md and its two pictures from all of them (--page: only that, nothing is walked).
"""

from __future__ import annotations

import argparse
import json
import os
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
from importlib import metadata
from pathlib import Path

from lab.boot import ROOT, register_torchvision_schemas
from lab.rows import save

from .walk_page import write_page
from .walk_tab import Tab, likeness

OUT = ROOT / "bench" / "out" / "walk.json"
PICTURES = {name: ROOT / "docs" / f"walk_{name}.jpg" for name in ("before", "after")}
PACK, SHIPPED_AS, DEMO = "ComfyUI-Slipstream", "slipstream", "slipstream_demo"
MODEL = "tiny_flux_emoji.safetensors"
TEMPLATE = "slipstream_flux_dev"
LOADER, PREDICTOR = "SlipstreamCacheLoader", "SlipstreamTaylorPredictor"
SEED = 7
VIEW = 0.6, 80, 130  # scale, and where the graph's origin is on the canvas, in pixels
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
STARTUP = 300  # seconds that the host may take to answer

# Of the user's own workflow, with room between loader and sampler: the graph's x and y.
LAYOUT = {
    "UNETLoader": (0, 0), "SlipstreamDemoPrompt": (0, 150), "EmptySD3LatentImage": (0, 420),
    "SlipstreamDemoVAE": (0, 600), "KSampler": (720, 0), "VAEDecode": (720, 350), "SaveImage": (720, 470),
}  # fmt: skip
REPORT_WIRES = (
    (PREDICTOR, "MODEL", "model"), ("SlipstreamDemoVAE", "VAE", "vae"),
    ("SlipstreamDemoPrompt", "CONDITIONING", "positive"), ("EmptySD3LatentImage", "LATENT", "latent_image"),
    ("KSamplerSelect", "SAMPLER", "sampler"), ("BasicScheduler", "SIGMAS", "sigmas"),
)  # fmt: skip


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
            walk = Walk(options.keep or Path(folder))
            row = walk.walk()
            rows = sorted([r for r in rows if r["host"] != row["host"]] + [row], key=lambda r: numbers(r["host"]))
            for name, picture in walk.pictures.items():
                if rows[-1] is row:  # the page shows the newest host
                    shutil.copyfile(picture, PICTURES[name])
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
        self.pictures: dict[str, Path] = {}
        self.tab: Tab | None = None
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
        before, load = torch_files(), os.getloadavg()[0]
        self.install()
        with self.server(), browser() as chromium:
            self.at_the_page(chromium)
        self.read_log()
        self.as_shipped()
        if torch_files() != before:
            self.stumbles.append("torch is not what it was before")
        return {
            "host": host_version(self.comfy),
            "frontend": metadata.version("comfyui_frontend_package"),
            "date": str(date.today()),
            "cores": os.cpu_count(),
            "load": [round(load, 1), round(os.getloadavg()[0], 1)],
            "steps": self.steps,
            "stumbles": self.stumbles,
        }

    def install(self) -> None:
        pack = self.packs / PACK
        with self.step("Clone the pack into `custom_nodes`") as seen:
            run("git", "clone", "-q", ROOT, pack)
            seen.append(f"{megabytes(pack):.0f} MB, {megabytes(pack / '.git'):.0f} of them history")
        with self.step("`pip install -r requirements.txt`") as seen:
            said = run(
                sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-r", pack / "requirements.txt"
            )
            new = [line for line in said.splitlines() if line.startswith("Successfully installed")]
            seen.append(new[0] if new else "everything was there already")
        with self.step("The same in an environment that has nothing") as seen:
            seen.append(self.empty_environment(pack / "requirements.txt"))
        with self.step("Put a model where models belong") as seen:
            target = self.packs / DEMO
            shutil.copytree(pack / "demo", target, ignore=shutil.ignore_patterns("out", "profiles", "__pycache__"))
            shutil.move(target / "models" / MODEL, self.comfy / "models" / "diffusion_models" / MODEL)
            seen.append("the small model of `demo/` stands for yours, its nodes for text encoder and VAE")

    def empty_environment(self, requirements: Path) -> str:
        """What pip brings where not even numpy is there."""
        place = self.folder / "empty"
        run(sys.executable, "-m", "venv", place)
        python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        try:
            run(python, *PIP[1:], "install", "-q", "-r", requirements)
        except RuntimeError:
            return "not measured: no package registry in reach"
        listed = json.loads(run(python, *PIP[1:], "list", "--format", "json"))
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
            command = [sys.executable, "-m", "bench.survival.walk", "--serve", self.comfy, "--cpu", "--port", str(port)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            self.wait_for_server(process)
            for seconds, failed, pack in re.findall(r"([\d.]+) seconds(.*): .*[/\\](\S+)", self.text()):
                if pack in (PACK, SHIPPED_AS):
                    seen.append(f"{seconds} s of these are the pack's{failed}")
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
        """Lines of the log that warn of us, and tracebacks that go through our files."""
        for line in self.text().splitlines():
            ours = re.search("slipstream", line, re.IGNORECASE)
            if ours and re.search("warning|error|failed|deprecat|cannot", line, re.IGNORECASE):
                self.stumbles.append(f"the log: {line.strip()}")
        for block in re.findall(r"^Traceback.*\n(?:[ \t].*\n)+.*", self.text(), re.MULTILINE):
            if any(f"custom_nodes{os.sep}{pack}" in block for pack in (PACK, SHIPPED_AS)):
                self.stumbles.append(f"the log: {block.splitlines()[-1]}")

    def at_the_page(self, chromium) -> None:
        with self.step("Open the page for the first time") as seen:
            self.tab = tab = Tab(chromium, self.url, PACK)
            names = tab.templates()
            seen.append(f"the template browser is open; under *Extensions* stands {PACK} with {len(names)} templates")
        with self.step(f"Click *{TEMPLATE}*") as seen:
            seen.append(tab.template(TEMPLATE))
        with self.step("Open your own workflow: Ctrl+O") as seen:
            path = self.folder / "my workflow.json"
            path.write_text(json.dumps(own_workflow()), encoding="utf-8")
            tab.open_file(path)
            tab.view(*VIEW)
            seen.append("loader, prompts, KSampler with 28 euler steps, decoder, picture; no node of this pack in it")
        with self.step("Press *Run*") as seen:
            seen.append(f"a picture after {tab.press_run()['seconds']:.1f} s, the loading of the model included")
        with self.step("Type another seed, press *Run*") as seen:
            tab.set("KSampler", seed=SEED)
            plain = tab.press_run()
            seen.append(f"a picture after {plain['seconds']:.2f} s")
        self.picture("before")
        with self.step("Double click, type *Cache Loader*; again, *Taylor Predictor*; draw three wires") as seen:
            tab.place("Cache Loader", LOADER, 400, 0)
            tab.place("Taylor Predictor", PREDICTOR, 400, 560)
            tab.wire("UNETLoader", "MODEL", LOADER, "model")
            tab.wire(LOADER, "MODEL", PREDICTOR, "model")
            tab.wire(PREDICTOR, "MODEL", "KSampler", "model")
            seen.append("every input left as it comes")
        with self.step("Press *Run*: the same seed") as seen:
            fast = tab.press_run()
            strip = tab.wait(lambda strips: not strips[LOADER]["busy"])[LOADER]
            seen.append(f"a picture after {fast['seconds']:.2f} s, {likeness(plain['images'][0], fast['images'][0])}")
            seen.append("the strip says “" + " / ".join(strip["lines"]) + "”")
        self.picture("after")
        with self.step("Add *Speed & Quality Report* and its sampler and sigmas; seven wires; *Run*") as seen:
            seen.append(f"“{self.report()}”")
        with self.step("Select Cache Loader, press its *i*") as seen:
            tab.view(VIEW[0], VIEW[1], 300)  # the buttons over a node need room
            seen.append(tab.help(LOADER))

    def report(self) -> str:
        """The short way of the node's page; its verdict."""
        tab = self.tab
        tab.place("Speed & Quality Report", "SlipstreamReport", 1060, 0)
        tab.place("KSamplerSelect", "KSamplerSelect", 0, 760)
        tab.place("BasicScheduler", "BasicScheduler", 400, 820)
        tab.set("BasicScheduler", scheduler="simple", steps=28)
        tab.wire("UNETLoader", "MODEL", "BasicScheduler", "model")
        for source, output, name in REPORT_WIRES:
            tab.wire(source, output, "SlipstreamReport", name)
        return " ".join(text for text in tab.press_run()["texts"] if "plain" in text)

    def picture(self, name: str) -> None:
        self.pictures[name] = self.folder / f"{name}.jpg"
        self.tab.picture(self.pictures[name])

    def as_shipped(self) -> None:
        """The pack as the registry ships it, under the name that Manager gives its folder, in the same ComfyUI."""
        from tests.shipped import shipped

        for pack in (PACK, DEMO):
            shutil.rmtree(self.packs / pack)
        place = self.packs / SHIPPED_AS
        with self.step("The same from the registry: only what it ships, in the folder that Manager makes") as seen:
            for name in shipped():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, place / name)
            seen.append(f"{len(shipped())} files, {megabytes(place):.1f} MB")
        self.tab = None
        with self.server(), browser() as chromium, self.step("Open the page, a template and a node's help") as seen:
            self.tab = Tab(chromium, self.url, SHIPPED_AS)
            self.tab.browse_templates()
            seen.append(f"{len(self.tab.templates())} templates, none of the demo")
            self.tab.template(TEMPLATE)
            self.tab.view(VIEW[0], -300, 400)  # below what the page says of missing model files
            seen.append(self.tab.help(LOADER))
        self.read_log()
        self.tab = None


def browser():
    from tests.canvas.page import chromium

    return chromium()


def copy_host(source: Path, target: Path) -> None:
    """A checkout as it is unpacked: no models, no other packs, no files of a user, no caches."""
    kept_empty = {str(source / name) for name in ("custom_nodes", "user", "input", "output", "temp")}

    def left_out(folder: str, names: list[str]) -> set[str]:
        if folder in kept_empty:
            return set(names)
        left = {name for name in names if name in (".git", "__pycache__")}
        if folder.startswith(str(source / "models")):
            left |= {name for name in names if not Path(folder, name).is_dir()}
        return left

    shutil.copytree(source, target, ignore=left_out)


def host_version(comfy: Path) -> str:
    return re.search(r'"([\d.]+)"', (comfy / "comfyui_version.py").read_text(encoding="utf-8"))[1]


def torch_files() -> tuple[str, str]:
    """What pip noted when torch was installed."""
    found = metadata.distribution("torch")
    return found.version, found.read_text("RECORD") or ""


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {(done.stdout + done.stderr)[-500:]}")
    return done.stdout


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def own_workflow() -> dict:
    """The demo's workflow without a node of this pack, with room between loader and sampler."""
    graph = json.loads((ROOT / "workflows" / "slipstream_demo.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"] if node["type"] in LAYOUT}
    loader, sampler = (next(n for n in nodes.values() if n["type"] == kind) for kind in ("UNETLoader", "KSampler"))
    into = sampler["inputs"][0]["link"]
    graph["links"] = [
        [link[0], loader["id"], 0, *link[3:]] if link[0] == into else link
        for link in graph["links"] if link[0] == into or (link[1] in nodes and link[3] in nodes)
    ]  # fmt: skip
    kept = {link[0] for link in graph["links"]}
    for node in nodes.values():
        node["pos"] = list(LAYOUT[node["type"]])
        if node.get("title") == "Negative":
            node["pos"][1] += 130
        for output in node["outputs"]:
            output["links"] = [link for link in output["links"] or () if link in kept]
    loader["outputs"][0]["links"] = [into]
    return {**graph, "id": "7f0c6a1e-0d2b-4c53-9a53-1f0e5a3f2c11", "nodes": list(nodes.values())}


if __name__ == "__main__":
    main()
