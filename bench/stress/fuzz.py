"""Hostile files and values for everything that reads or accepts some; each works or says one clear sentence.

    python dev.py bench fuzz [--cases 20000] [--seed 1] [--only NAME] [--case N]

Writes bench/out/fuzz.json. `--only` takes one target, `--case` repeats a single case of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from datetime import date
from pathlib import Path
from random import Random

from lab.boot import ROOT, boot
from lab.rows import save

OUT = ROOT / "bench" / "out" / "fuzz.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench fuzz")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="a target's name")
    parser.add_argument("--case", type=int, help="this one alone")
    options = parser.parse_args(argv)
    boot()
    logging.getLogger().setLevel(logging.CRITICAL)  # warnings about damaged files are the answer, not the news
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), options.cases, options.seed, options.only, options.case, print)
    faults = {what: n for row in rows for what, n in row["faults"].items()}
    if options.only is None and options.case is None:
        save(OUT, rows)
    print(json.dumps(rows, indent=1))
    if faults:
        raise SystemExit(f"{len(faults)} kinds of faults; see above")


def run(
    folder: Path, cases: int, seed: int, only: str | None = None, one: int | None = None, tell=lambda *a, **k: None
):
    """So many cases, shared out over the targets; a row for each. folder: outside of which nothing may be written."""
    import folder_paths
    import torch

    from . import judge
    from .targets import TARGETS

    torch.set_num_threads(1)
    inner = folder / "inner"
    shares = sum(t.share for t in TARGETS)
    rows, known = [], dict(folder_paths.folder_names_and_paths)
    own = {"output_directory": folder_paths.output_directory, "user_directory": folder_paths.get_user_directory()}
    folder_paths.output_directory = str(inner / "output")
    folder_paths.set_user_directory(str(inner / "user"))
    try:
        for kind in TARGETS:
            name = kind.__name__
            if only not in (None, name):
                continue
            started, count = time.monotonic(), cases if only else max(2, math.ceil(cases * kind.share / shares))
            place = inner / name if name != "Servers" else inner / "user"
            place.mkdir(parents=True, exist_ok=True)
            target, verdicts = kind(place), judge.Verdicts()
            for number in range(count) if one is None else (one,):
                judge.judge(target.case(Random(f"{seed} {name} {number}")), verdicts, name, number)
            for stray in judge.strays(folder, inner):
                verdicts.fault(f"{name}: a file outside of its folder", stray)
            row = {
                "name": name,
                "reads": (kind.__doc__ or "").strip().splitlines()[0],
                "date": date.today().isoformat(),
                "command": f"python dev.py bench fuzz --cases {cases} --seed {seed}",
                "cases": verdicts.cases,
                "works": verdicts.works,
                "told": verdicts.told,
                "faults": dict(verdicts.faults),
                "seconds": time.monotonic() - started,
            }
            rows.append(row)
            tell(f"{name:16} {row['cases']:6} cases, {row['works']} work, {row['told']} told, "
                 f"{sum(verdicts.faults.values())} faults, {row['seconds']:.0f} s", flush=True)  # fmt: skip
            for what, details in verdicts.first.items():
                tell(f"--- {what} ({verdicts.faults[what]} times)\n{details}", flush=True)
    finally:
        folder_paths.folder_names_and_paths.clear()
        folder_paths.folder_names_and_paths.update(known)
        folder_paths.output_directory = own["output_directory"]
        folder_paths.set_user_directory(own["user_directory"])
    return rows


if __name__ == "__main__":
    main()
