"""Random user actions against the real server; after each, plain runs are bit-identical and nothing is left behind.

    python dev.py bench abuse [--actions 1000] [--seed 1] [--verbose]

Writes bench/out/abuse.json. Two servers: one is abused, the other never sees a node of ours and gives the plain
latents. The same seed gives the same actions, so a broken promise is repeated by the printed command; the user then
goes on with an empty canvas.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import shutil
import time
from datetime import date
from pathlib import Path

from lab.boot import ROOT
from lab.rows import save

OUT = ROOT / "bench" / "out" / "abuse.json"
BASE = ROOT / ".dev" / "stress"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench abuse")
    parser.add_argument("--actions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the two servers; emptied at the start")
    parser.add_argument("--verbose", action="store_true", help="print every action")
    options = parser.parse_args(argv)
    shutil.rmtree(options.base, ignore_errors=True)
    keep = functools.partial(_keep, OUT)
    row = asyncio.run(run(options.base, options.actions, options.seed, options.verbose, keep))
    keep(row)
    print(json.dumps(row, indent=1))
    if row["broken"]:
        raise SystemExit(f"{len(row['broken'])} promises were broken; see above")


def _keep(path: Path, row: dict) -> None:
    save(path, [row])


async def run(base: Path, actions: int, seed: int, verbose: bool = False, keep=lambda row: None) -> dict:
    """So many actions of one seed; the row for the page. keep: is given the row so far, from time to time."""
    from .server import Session, StressServer
    from .user import Broken, User

    started, broken = time.monotonic(), []
    abused = StressServer(base / "abused")
    with abused as url, StressServer(base / "clean") as clean:
        async with Session(url) as session, Session(clean) as reference:
            user = User(session, reference, abused.log, seed)
            print(f"seed {seed}: {actions} actions", flush=True)
            for i in range(1, actions + 1):
                try:
                    said = await user.act()
                except Broken as error:
                    said = f"BROKEN {user.history[-1]}: {error}"
                    broken.append(f"action {i}: {error}")
                    print(f"{said}\nbefore it: {user.history[-6:-1]}\ncanvas: {user.canvas}", flush=True)
                    print(f"repeat: python dev.py bench abuse --seed {seed} --actions {i}", flush=True)
                    user.start_over()
                if verbose or i % 50 == 0:
                    print(f"{i:5} {time.monotonic() - started:6.0f} s  {said}", flush=True)
                if i % 50 == 0:
                    keep(row_of(user.tally, seed, i, broken, time.monotonic() - started))
    return row_of(user.tally, seed, actions, broken, time.monotonic() - started)


def row_of(tally, seed: int, actions: int, broken: list[str], seconds: float) -> dict:
    return {
        "name": "abuse",
        "date": date.today().isoformat(),
        "command": f"python dev.py bench abuse --seed {seed} --actions {actions}",
        "seed": seed,
        "actions": actions,
        "broken": broken,
        "seconds": seconds,
        "prompts": sum(tally.outcomes.values()) + tally.plain_checks,
        "plain_checks": tally.plain_checks,
        "repeats": tally.repeats,
        "reports": tally.reports,
        "filled_evaluations": tally.filled,
        "by_action": dict(tally.actions.most_common()),
        "outcomes": dict(tally.outcomes.most_common()),
        "refusals": dict(tally.sentences.most_common(40)),
    }


if __name__ == "__main__":
    main()
