"""The one shape of every result: a JSON list of {name, model, sampler, steps, evaluations, seconds, psnr_db, ...}."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from kernels.files import write_whole

COLUMNS = ("name", "model", "sampler", "steps", "evaluations", "seconds", "psnr_db", "psnr_min_db")


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def mean_db(values: Iterable[float], ceiling: float = 100.0) -> float:
    """Mean of PSNRs in which an identical result counts as `ceiling`; infinite where all are identical."""
    numbers = list(values)
    return math.inf if all(map(math.isinf, numbers)) else mean(min(v, ceiling) for v in numbers)


def save(path: Path, rows: Sequence[dict]) -> None:
    """Write the rows under a temporary name, then rename; infinite numbers (identical results) become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
    write_whole(path, (json.dumps(clean, indent=1) + "\n").encode())


def table(rows: Sequence[dict], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as a Markdown table."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "identical" if math.isinf(value) else f"{value:.2f}"
        return "" if value is None else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
