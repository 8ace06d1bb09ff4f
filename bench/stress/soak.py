"""Hundreds of runs with all kinds of node chains in one real server, and whether anything grows.

    python dev.py bench soak [--cycles 16] [--warm 4]

Writes bench/out/soak.json. Every cycle queues each of the chains once, with other seeds and steps, failed and cancelled
runs among them, and ends with a plain run; then the server collects its garbage and counts. Growth is the slope of a
straight line through the counts after the first `warm` cycles. The same number of cycles of plain runs before them
tells what the host itself adds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from random import Random

from lab.boot import ROOT
from lab.rows import save, table

OUT = ROOT / "bench" / "out" / "soak.json"
BASE = ROOT / ".dev" / "soak"

# Growth per run that is taken for noise. A leaked run would add tensors, megabytes, and thousands of objects.
ALLOWED = {"tensors": 0.02, "tensor_bytes": 2000.0, "objects": 4.0, "resident_bytes": 60_000.0}
COLUMNS = ("name", "runs", "counted", "slope_per_run", "allowed", "first", "last")

CACHE, TAYLOR, QUANTISE = "SlipstreamCacheLoader", "SlipstreamTaylorPredictor", "SlipstreamW4A4Quantize"
COMPENSATE, SWITCH, LORA, FAIL = (
    "SlipstreamErrorCompensator",
    "SlipstreamHybridSwitch",
    "LoraLoaderModelOnly",
    "StressFail",
)
UNET = {"model": "tiny_sd15_emoji.safetensors"}
CUSTOM = {"preset": "Custom", "drift_budget": 1.0, "max_skip": 2}

# Name -> (settings, nodes with the values that are not their first).
CHAINS: dict[str, tuple[dict, list[tuple[str, dict]]]] = {
    "cache": ({}, [(CACHE, {})]),
    "cache, Taylor": ({}, [(CACHE, {"preset": "Fast"}), (TAYLOR, {})]),
    "block stack, int8": ({}, [(CACHE, {**CUSTOM, "method": "interval", "site": "block stack",
                                        "cache_device": "int8"})]),
    "last block, per token": ({}, [(CACHE, {**CUSTOM, "method": "interval", "site": "last block"}),
                                   (TAYLOR, {"kind": "Per token", "order": 1})]),
    "guided batch": ({"cfg": 3.0, "batch": 2}, [(CACHE, {}), (TAYLOR, {"kind": "Hermite"})]),
    "U-Net depth": (UNET, [(CACHE, {**CUSTOM, "method": "interval", "site": "U-Net depth"}), (TAYLOR, {})]),
    "U-Net encoder": (UNET, [(CACHE, {**CUSTOM, "method": "key steps", "site": "U-Net encoder"})]),
    "4 bit": ({}, [(QUANTISE, {})]),
    "4 bit, LoRA, cache, compensated": ({}, [(LORA, {}), (QUANTISE, {}), (CACHE, {}), (TAYLOR, {}),
                                             (COMPENSATE, {"anchors": 2})]),
    "4 bit at the first run": ({}, [(QUANTISE, {"calibration": "first run", "activations": "8 bit"})]),
    "switched, cached": ({}, [(CACHE, {}), (TAYLOR, {}), (SWITCH, {})]),
    "an error in a cached run": ({}, [(CACHE, {}), (TAYLOR, {}), (FAIL, {"kind": "error", "at": 3})]),
    "out of memory in 4 bit": ({}, [(QUANTISE, {}), (CACHE, {}), (FAIL, {"kind": "memory", "at": 1})]),
    "a cancelled cached run": ({}, [(CACHE, {}), (TAYLOR, {}), (FAIL, {"kind": "cancel", "at": 2})]),
    "plain": ({}, []),
}  # fmt: skip
ENDS = {
    "an error in a cached run": "failed",
    "out of memory in 4 bit": "failed",
    "a cancelled cached run": "interrupted",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench soak")
    parser.add_argument("--cycles", type=int, default=16)
    parser.add_argument("--warm", type=int, default=4, help="cycles that are not counted")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the server; emptied at the start")
    options = parser.parse_args(argv)
    shutil.rmtree(options.base, ignore_errors=True)
    rows = asyncio.run(run(options.base, options.cycles, options.warm))
    save(OUT, rows)
    print(table(rows, COLUMNS))
    grown = [row["name"] for row in rows if row["grows"]]
    if grown:
        raise SystemExit(f"growth: {', '.join(grown)}")


async def run(base: Path, cycles: int, warm: int) -> list[dict]:
    """A row for each count: its slope over plain cycles and over those with our nodes."""
    from .server import Session, StressServer

    rng, number, started = Random(1), 0, time.monotonic()
    counts: dict[str, list[dict]] = {"plain": [], "chains": []}
    outcomes: dict[str, int] = {}
    with StressServer(base) as url:
        async with Session(url) as session:
            for kind, chains in (("plain", ["plain"] * len(CHAINS)), ("chains", list(CHAINS))):
                for cycle in range(cycles if kind == "chains" else max(cycles // 2, warm + 4)):
                    for name in chains:
                        number += 1
                        outcome = await session.run(graph(name, rng, number))
                        wanted = ENDS.get(name, "done")
                        if outcome.kind != wanted:
                            raise SystemExit(f"{name}: {outcome.kind} where {wanted} belongs: {outcome.message}")
                        outcomes[outcome.kind] = outcomes.get(outcome.kind, 0) + 1
                    await session.send("/history", {"clear": True})  # the host keeps every prompt until it is told
                    counts[kind].append({"run": number, **await session.census()})
                    seen = counts[kind][-1]
                    print(f"{kind} {cycle + 1:3} {time.monotonic() - started:6.0f} s  {json.dumps(seen)}", flush=True)
    print(json.dumps(outcomes))
    rows = []
    for what, allowed in ALLOWED.items():
        base_slope, slope = (fitted(counts[kind][warm:], what) for kind in ("plain", "chains"))
        counted = counts["chains"][warm:]
        rows.append({
            "name": what,
            "date": date.today().isoformat(),
            "command": f"python dev.py bench soak --cycles {cycles} --warm {warm}",
            "runs": len(CHAINS) * len(counts["chains"]),
            "counted": len(CHAINS) * len(counted),
            "slope_per_run": slope,
            "slope_of_plain_runs": base_slope,
            "allowed": allowed,
            "first": counted[0][what],
            "last": counted[-1][what],
            "most": max(c[what] for c in counted),
            "least": min(c[what] for c in counted),
            "grows": slope > allowed,
            "chains": len(CHAINS),
            "seconds": time.monotonic() - started,
            "outcomes": outcomes,
            "counts": [c[what] for c in counts["chains"]],
        })  # fmt: skip
    return rows


def graph(name: str, rng: Random, number: int) -> dict:
    """One chain as a prompt, with settings that differ from run to run."""
    from .canvas import NODES, Canvas, Part

    settings, nodes = CHAINS[name]
    canvas = Canvas()
    canvas.settings |= {"steps": rng.choice((6, 8)), "seed": number, **settings}
    for kind, values in nodes:
        canvas.wire.append(Part(kind, {k: choices[0] for k, choices in NODES[kind].items()} | values))
    return canvas.graph(number)


def fitted(counts: Sequence[dict], what: str) -> float:
    """Slope per run of the straight line through the counts, by least squares."""
    xs, ys = [c["run"] for c in counts], [c[what] for c in counts]
    middle, mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle) ** 2 for x in xs)
    return sum((x - middle) * (y - mean) for x, y in zip(xs, ys, strict=True)) / spread


if __name__ == "__main__":
    main()
