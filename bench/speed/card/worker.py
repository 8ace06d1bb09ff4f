"""The process in which lines of the plan are measured; `run.py` starts it and outlives it."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from .plan import DRY, PLAN, NotThere, one_line
from .run import MARK

UNUSABLE = 3


@dataclass
class Bench:
    """What a line is given. device: where it measures; dry: tiny shapes on the CPU; rates: operations and bytes per
    second by name, measured by the first line, empty without it."""

    device: object
    dry: bool
    rates: dict[str, float] = field(default_factory=dict)

    def sync(self) -> None:
        """Wait until the device has done what it was given."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def release(bench: Bench) -> None:
    """Give back what the allocator holds: the next line may need it, or processes that it starts."""
    import torch

    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    path, names = Path(sys.argv[1]), json.loads(sys.argv[2])
    import torch

    dry = bool(os.environ.get(DRY))
    if not dry and not torch.cuda.is_available():
        raise SystemExit("There is no card on this machine; --dry runs every line on the CPU.")
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]  # of a worker before this one
    rates = {row["name"]: row["rate_si"] for row in known if "rate_si" in row}
    bench = Bench(torch.device("cpu" if dry else "cuda", None if dry else 0), dry, rates)
    began = time.monotonic()

    def emit(row: dict) -> None:
        if "rate_si" in row:
            bench.rates[row["name"]] = row["rate_si"]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "at": round(time.monotonic() - began, 1)}) + "\n")

    for line in (line for line in PLAN if line.name in names):
        print(MARK + line.name, flush=True)
        started = time.monotonic()
        count = 0
        try:
            module, name = line.run.split(":")
            for row in getattr(importlib.import_module(f".{module}", __package__), name)(bench):
                emit({"line": line.name, **row})
                count += 1
        except NotThere as missing:
            emit({"line": line.name, "not there": str(missing)})
        except Exception as error:
            traceback.print_exc()
            emit({"line": line.name, "failed": one_line(error)})
            try:
                bench.sync()
            except Exception:
                os._exit(UNUSABLE)  # what this process does on the card fails from now on; the next one's does not
        release(bench)
        print(f"{line.name}: {count} rows in {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
