"""Other step caches beside ours: the same invariants, the same pictures, one table.

    python dev.py bench peers [--pack PATH --node CLASS [--inputs JSON] ...] [--models flux unet] [--pictures 4]

The host's EasyCache and LazyCache and our own nodes are always in it. --pack adds a node of any pack by the path of its
checkout, --inputs what differs from the node's defaults; give the three again for a further node. Every pack runs in a
process of its own, since some change the host for good. Nothing of a pack is copied: the table is all that is kept.
Writes bench/out/peers.json, a part for each host version, and docs/peers.md from it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab.boot import ROOT, boot
from lab.rows import mean, mean_db, save, table

from ..quality.fidelity import FIRST_SEED, PROMPTS, host_cache

OUT, PAGE = ROOT / "bench" / "out" / "peers.json", ROOT / "docs" / "peers.md"
STEPS = 28
TIMEOUT = 1800
# How much worse than the worse of the two alone a pair of caches may be before it counts as broken.
TOGETHER_DB = 3.0
# As in `peer_checks.CHECKS`, which needs the host to be imported; a test holds them together.
INVARIANTS = {
    "skips": "something is left out at all",
    "again": "the same seed twice is the same picture",
    "removed": "without the node, after a run with it, the plain picture is bit-identical",
    "cancelled": "a cancel stops at once and leaves the next runs clean",
    "freed": "no tensor of a run is left when it has ended",
    "split": "cond and uncond in one call or in two are the same picture",
    "inputs": "what the network is given is never written to",
    "sizes": "another size, batch or step count in between changes nothing",
    "clones": "two MODELs of one checkpoint in turns equal each alone",
    "heun": "two evaluations a step are counted right and stay near",
}
COLUMNS = ("name", "evaluations", "psnr_db", "psnr_min_db", "fewer_steps_db", "against_fewer_steps_db")

HEAD = """# Other caches beside ours

Written by `python dev.py bench peers`: every row is a node that leaves evaluations out, run by one harness
(`bench/survival/peers.py`, `peer_checks.py`) on the small trained Flux and SD1.5, euler, one CPU thread, float32.
A pack is taken by the path of its checkout and put through the host's own loader; no line of it is kept here.

- An evaluation counts when the middle of the network runs (a layer of single_blocks.0 or middle_block.0), whoever
  decides about it.
- PSNR is that of the final latent against the full run: {steps} steps, {pictures} held-out prompts and seeds. Beside it
  stands the plain sampler with as many steps as the row has evaluations: a cache below that is worth less than nothing.
- Small models rank no thresholds of large ones. What the invariants find holds for any size.
"""


@dataclass(frozen=True)
class Peer:
    """One row. node, inputs: a node of the pack at `pack`; without a pack ours or the host's, by name."""

    name: str
    pack: str = ""
    node: str = ""
    inputs: dict = field(default_factory=dict)


OURS = {
    "Cache Loader (Fast)": {"cache": {"preset": "Fast"}},
    "Cache Loader + Taylor Predictor": {"cache": {"preset": "Balanced"}, "predictor": {}},
    "Cache Loader (Fast) + Taylor Predictor": {"cache": {"preset": "Fast"}, "predictor": {}},
}
HOSTS = {
    "EasyCache 0.2 (host)": ("EasyCache", 0.2, False),
    "EasyCache 0.2 (host), its input copied first": ("EasyCache", 0.2, True),
    "LazyCache 0.2 (host)": ("LazyCache", 0.2, False),
}


class NotLoaded(Exception):
    """The pack does not load on this host; the message is the host's own last line about it."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench peers")
    parser.add_argument("--pack", action="append", default=[], help="the folder of another pack")
    parser.add_argument("--node", action="append", default=[], help="the class key of its node")
    parser.add_argument("--inputs", action="append", default=[], help="JSON of the inputs that are not defaults")
    parser.add_argument("--models", nargs="+", default=["flux", "unet"])
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # where a process for one pack leaves its rows
    options = parser.parse_args()
    packs = packs_of(options.pack, options.node, options.inputs, parser.error)
    if options.rows:
        options.rows.write_text(json.dumps(measure(packs, benches(options.models, options.pictures))))
        return
    clean = benches(options.models, options.pictures)
    rows = measure([Peer(name) for name in (*HOSTS, *OURS)], clean)
    for peer in packs:
        rows += in_a_process(peer, rows[0]["host"], options.models, options.pictures)
    for row in rows:  # here, where no pack has been
        if "psnr_db" in row:
            row["fewer_steps_db"] = clean[row["model"]].fewer_steps(round(row["evaluations"]))
            row["against_fewer_steps_db"] = row["psnr_db"] - row["fewer_steps_db"]
    new = {(row["host"], row["name"], row["model"]) for row in rows}
    kept = json.loads(OUT.read_text()) if OUT.exists() else []
    others = [row for row in kept if (row["host"], row["name"], row["model"]) not in new]
    first = [*HOSTS, *OURS]
    save(OUT, sorted(others + rows, key=lambda row: first.index(row["name"]) if row["name"] in first else len(first)))
    PAGE.write_text(page(json.loads(OUT.read_text()), options.pictures), encoding="utf-8")
    print(page(rows, options.pictures))


def packs_of(paths: list[str], nodes: list[str], inputs: list[str], error: Callable) -> list[Peer]:
    """The rows that the command line asks for; error: called with a sentence."""
    inputs = inputs + ["{}"] * (len(paths) - len(inputs))
    if len(nodes) != len(paths) or len(inputs) != len(paths):
        error("--pack, --node and --inputs belong together: give each as often as the others.")
    peers = []
    for path, node, text in zip(paths, nodes, inputs, strict=True):
        folder = Path(path).expanduser().resolve()
        if not folder.exists():
            error(f"--pack {path}: there is no such folder.")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as wrong:
            error(f"--inputs {text}: {wrong}.")
        shown = ", ".join(f"{k} {v}" for k, v in values.items() if not isinstance(v, str | bool))
        peers.append(Peer(f"{node} {shown} ({version_of(folder)})".replace("  ", " "), str(folder), node, values))
    return peers


def version_of(folder: Path) -> str:
    """The folder's name and, where it is the root of a clone, its commit."""
    asked = ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"]
    commit = ""
    if (folder / ".git").exists():
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return f"{folder.name} {commit}".strip()


def in_a_process(peer: Peer, host: str, models: list[str], pictures: int) -> list[dict]:
    """The rows of one pack, measured where it can change nothing for the others."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.survival.peers", "--rows", str(out), "--pictures", str(pictures)]
        command += ["--pack", peer.pack, "--node", peer.node, "--inputs", json.dumps(peer.inputs), "--models", *models]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
            reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"not done after {TIMEOUT} s"
        if out.exists():
            return json.loads(out.read_text())
    return [{"host": host, "name": peer.name, "model": model, "loads": reason} for model in models]


def benches(models: list[str], pictures: int) -> dict[str, Bench]:
    """The host in this process, and a bench for each model."""
    boot()
    import torch

    torch.set_num_threads(1)
    return {model: Bench(model, pictures) for model in models}


def measure(peers: list[Peer], on: dict[str, Bench]) -> list[dict]:
    """A row for each peer and model."""
    import comfyui_version

    rows, host = [], comfyui_version.__version__
    for model, bench in on.items():
        for peer in peers:
            row = {"host": host, "name": peer.name, "model": model}
            try:
                wrap = wrapper(peer)
            except NotLoaded as reason:
                rows.append({**row, "loads": str(reason)})
                continue
            rows.append({**row, **bench.row(wrap, bool(peer.pack) or peer.name in HOSTS)})
            print(model, peer.name, {k: v["says"] for k, v in rows[-1]["checks"].items()}, flush=True)
    return rows


def wrapper(peer: Peer) -> Callable:
    """What the peer's node does to a MODEL. Raises NotLoaded."""
    if peer.name in HOSTS:
        return host_cache(*HOSTS[peer.name])
    if peer.name in OURS:
        return lambda model: ours(model, **OURS[peer.name])
    cls = loaded(Path(peer.pack), peer.node)

    def wrap(model):
        v3 = hasattr(cls, "define_schema")
        given = {"model": model, **defaults(cls), **peer.inputs}
        result = cls.execute(**given).result if v3 else getattr(cls(), cls.FUNCTION)(**given)
        return result[0]

    return wrap


def ours(model, cache: dict, predictor: dict | None = None):
    from slipstream.engine.run.plan import CacheConfig, PredictorConfig
    from slipstream.host.model import add_cache, add_predictor

    model = add_cache(model, CacheConfig(**cache, node_id="peers"))
    return model if predictor is None else add_predictor(model, PredictorConfig(**predictor))


def loaded(pack: Path, node: str):
    """The class of a node, through the host's own loader. Raises NotLoaded with what the host logged."""
    import nodes

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        done = asyncio.run(nodes.load_custom_node(str(pack)))
    finally:
        logging.getLogger().removeHandler(handler)
    if not done:
        text = said[-1].strip().splitlines()[-1] if said else "the host's loader says nothing"
        # without the paths of this machine
        raise NotLoaded(re.sub(r" \([^()]*\.py\)", "", text.rsplit("custom nodes: ", 1)[-1]))
    if node not in nodes.NODE_CLASS_MAPPINGS:
        raise NotLoaded(f"it has no node {node}")
    return nodes.NODE_CLASS_MAPPINGS[node]


def defaults(cls) -> dict:
    """The values of a node's widgets when it is dropped on the canvas; works for both kinds of node."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in cls.INPUT_TYPES().get(group, {}).items():
            options = options[0] if options else {}
            if "default" in options:
                found[name] = options["default"]
            elif isinstance(kind, list) and kind:
                found[name] = kind[0]
            elif kind == "COMBO" and options.get("options"):
                found[name] = options["options"][0]
    return found


class Bench:
    """One small model, its full runs, and the measurements of a row."""

    def __init__(self, name: str, pictures: int):
        from slipstream.demo import emoji

        from .peer_checks import Subject

        self.name, self.pictures = name, pictures
        self.load = emoji.load_flux if name == "flux" else emoji.load_unet
        self.base = self.load()
        self.plain = Subject(name, self.base, lambda model: model)
        self.fewer: dict[int, float] = {}
        self.full = None

    def row(self, wrap: Callable, with_ours: bool) -> dict:
        """Invariants, fidelity and, for a peer, what happens beside our nodes."""
        from .peer_checks import Subject, examine

        if self.full is None:
            self.full, _ = self.samples(lambda model: model, STEPS)
        subject = Subject(self.name, self.base, wrap, self.plain.plain)
        found = {"loads": "", "checks": examine(subject)}
        scores = None
        try:
            latents, computed = self.samples(wrap, STEPS)
            scores = self.scores(latents)
            found |= {"evaluations": computed, "psnr_db": mean_db(scores), "psnr_min_db": min(scores)}
        except Exception as error:
            found["failed"] = one_line(error)
        if with_ours:
            found["together"] = self.together(wrap, scores)
        return found

    def samples(self, wrap: Callable, steps: int, pictures: int | None = None, base=None):
        """(latents, mean evaluations); base: another copy of the model."""
        from .peer_checks import Subject

        subject = self.plain if base is None else Subject(self.name, base, wrap)
        latents, counts = [], []
        for i in range(pictures or self.pictures):
            with subject.runs() as runs:
                model = wrap(subject.base.clone())
                latents.append(subject.sample(model, steps, seed=FIRST_SEED + i, prompt=PROMPTS[i % len(PROMPTS)]))
            counts.append(len(runs))
        return latents, mean(counts)

    def scores(self, latents) -> list[float]:
        from slipstream.engine.metrics import psnr

        return [psnr(value, truth) for value, truth in zip(latents, self.full, strict=False)]

    def fewer_steps(self, steps: int) -> float:
        """PSNR of the plain sampler with so many steps."""
        if steps not in self.fewer:
            self.fewer[steps] = mean_db(self.scores(self.samples(lambda model: model, steps)[0]))
        return self.fewer[steps]

    def together(self, wrap: Callable, alone: list[float] | None) -> dict[str, str]:
        """H16: the peer's node and ours on one MODEL: refused by name, or as good as the worse of the two alone."""
        from slipstream.engine.errors import SlipstreamError

        def our(model):
            return ours(model, **OURS["Cache Loader + Taylor Predictor"])

        least = min([self.scores(self.samples(our, STEPS, 1)[0])[0], *(alone or [])[:1]]) - TOGETHER_DB
        said = {}
        for order, both in (("ours after it", lambda m: our(wrap(m))), ("it after ours", lambda m: wrap(our(m)))):
            try:
                # a copy of its own, on which the pack has left nothing
                latents, computed = self.samples(both, STEPS, 1, self.load())
            except SlipstreamError as refusal:
                said[order] = f"refused: {str(refusal).split(';')[0]}"
            except Exception as error:
                said[order] = f"error: {one_line(error)}"
            else:
                near = self.scores(latents)[0]
                said[order] = f"{'works' if near >= least else '**broken**'}: {computed:.0f} of {STEPS}, {near:.0f} dB"
        return said


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def page(rows: list[dict], pictures: int) -> str:
    """The whole page from the rows."""
    parts = [HEAD.format(steps=STEPS, pictures=pictures)]
    parts.append(
        "| invariant | what has to hold |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in INVARIANTS.items())
    )
    hosts = sorted({row["host"] for row in rows}, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    for host in hosts:
        for model in ("flux", "unet"):
            chosen = [row for row in rows if row["host"] == host and row["model"] == model]
            if chosen:
                parts += [f"## ComfyUI {host}, small {'Flux' if model == 'flux' else 'SD1.5'}", tables(chosen)]
    return "\n\n".join(parts) + "\n"


def tables(rows: list[dict]) -> str:
    ran = [
        {**row, **{k: math.inf for k in ("psnr_db", "psnr_min_db") if k in row and row[k] is None}}  # identical
        for row in rows
        if not row["loads"] and not fails(row["checks"])
    ]
    head = ["", *INVARIANTS]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        reason = f"does not load: {row['loads']}" if row["loads"] else fails(row["checks"])
        if reason:
            lines.append([row["name"], reason, *[""] * (len(INVARIANTS) - 1)])
        else:
            lines.append([row["name"], *(cell(row["checks"][name]) for name in INVARIANTS)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text += "\n\n" + table([row for row in ran if "failed" not in row], COLUMNS)
    together = [row for row in rows if row.get("together")]
    if together:
        text += (
            "\n\nWith our Cache Loader and Taylor Predictor on the same MODEL:\n\n| | ours after it | it after ours |\n"
        )
        text += "| --- | --- | --- |\n"
        text += "\n".join("| " + " | ".join([row["name"], *row["together"].values()]) + " |" for row in together)
    return text


def fails(checks: dict) -> str:
    """What is said of a node that cannot sample at all: the one error that every check met; else nothing."""
    said = {check["says"] for check in checks.values()}
    return f"does not run: {said.pop()}" if len(said) == 1 and checks["skips"]["held"] is None else ""


def cell(check: dict) -> str:
    word = {True: "yes", False: "**no**", None: "**error**"}[check["held"]]
    return f"{word}: {check['says']}".replace("|", "/")


if __name__ == "__main__":
    main()
