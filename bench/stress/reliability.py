"""docs/reliability.md from the results of the benches abuse, soak and fuzz.

python dev.py bench reliability
"""

from __future__ import annotations

import json
from pathlib import Path

from kernels.files import write_whole
from lab.boot import ROOT
from lab.rows import table

OUT = ROOT / "bench" / "out"
PAGE = ROOT / "docs" / "reliability.md"
TEXT = Path(__file__).with_name("reliability_text.md")


def main() -> None:
    found = {}
    for name in ("abuse", "soak", "fuzz"):
        path = OUT / f"{name}.json"
        if not path.is_file():
            raise SystemExit(f"{path.relative_to(ROOT)} is not there; run `python dev.py bench {name}` first.")
        found[name] = json.loads(path.read_text())
    write_whole(PAGE, page(found["abuse"][0], found["soak"], found["fuzz"]).encode())
    print(f"{PAGE.relative_to(ROOT)} is written")


def page(abuse: dict, soak: list[dict], fuzz: list[dict]) -> str:
    """The text with its numbers and tables put in."""
    from .judge import MEGABYTES, SECONDS

    parts = {
        "abuse_command": abuse["command"],
        "abuse_date": abuse["date"],
        "abuse_minutes": f"{abuse['seconds'] / 60:.0f}",
        "actions": abuse["actions"],
        "prompts": abuse["prompts"],
        "plain_checks": abuse["plain_checks"],
        "repeats": abuse["repeats"],
        "reports": abuse["reports"],
        "filled": abuse["filled_evaluations"],
        "broken": len(abuse["broken"]),
        "abuse_table": side_by_side(abuse["by_action"], abuse["outcomes"]),
        "soak_command": soak[0]["command"],
        "soak_date": soak[0]["date"],
        "soak_runs": soak[0]["runs"],
        "chains": soak[0]["chains"],
        "counted": soak[0]["counted"],
        "soak_table": table([grown(row) for row in soak], tuple(grown(soak[0]))),
        "fuzz_command": fuzz[0]["command"],
        "fuzz_date": fuzz[0]["date"],
        "seconds": f"{SECONDS:.0f}",
        "megabytes": f"{MEGABYTES:.0f}",
        "fuzz_table": table([told(row) for row in (*fuzz, summed(fuzz))], tuple(told(fuzz[0]))),
    }
    text = TEXT.read_text()
    for name, value in parts.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def side_by_side(actions: dict[str, int], outcomes: dict[str, int]) -> str:
    """Two tallies as one table."""
    left, right = list(actions.items()), list(outcomes.items())
    empty = ("", "")
    rows = []
    for i in range(max(len(left), len(right))):
        (action, n), (outcome, m) = (part[i] if i < len(part) else empty for part in (left, right))
        rows.append({"action": action, "times": n, "outcome": outcome, "": m})
    return table(rows, ("action", "times", "outcome", ""))


def grown(row: dict) -> dict:
    """One count of the soak: bytes as kilobytes, the rest as they are."""
    scale = 1000.0 if row["name"].endswith("_bytes") else 1.0
    unit = " (kB)" if scale > 1 else ""
    numbers = {
        "first": row["first"] / scale,
        "last": row["last"] / scale,
        "slope per run": row["slope_per_run"] / scale,
        "plain runs": row["slope_of_plain_runs"] / scale,
        "allowed": row["allowed"] / scale,
    }
    return {"alive": row["name"].removesuffix("_bytes").replace("_", " ") + unit} | {
        name: f"{value:.0f}" if name in ("first", "last") else f"{value:.2f}" for name, value in numbers.items()
    }


def told(row: dict) -> dict:
    return {
        "what": row["reads"].rstrip("."),
        "cases": row["cases"],
        "work": row["works"],
        "one sentence": row["told"],
        "faults": sum(row["faults"].values()),
    }


def summed(rows: list[dict]) -> dict:
    counts = {name: sum(row[name] for row in rows) for name in ("cases", "works", "told")}
    return {"reads": "all", "faults": {"all": sum(sum(row["faults"].values()) for row in rows)}, **counts}


if __name__ == "__main__":
    main()
