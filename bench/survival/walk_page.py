"""docs/first_walk.md, from what the walks of `bench/survival/walk.py` found."""

from __future__ import annotations

import re

from kernels.files import write_whole
from lab.boot import ROOT

PAGE = ROOT / "docs" / "first_walk.md"
# A load up to this is called quiet: the walk itself keeps about two cores busy.
QUIET = 4.0

# What walks have found so far, and what came of it. Only what really happened; the newest last.
FOUND: list[tuple[str, str]] = [
    (
        "A profile measured on ComfyUI 0.3.75 was silently not taken on 0.33.0: two of Flux's parameters have another "
        "name there, so it looked like another model's.",
        "Profiles now fit across these releases.",
    ),
    (
        "The README sent to a menu that is not there, and did not say that the templates' entry has the folder's name.",
        "It names both now.",
    ),
]

# What is still there; a line leaves with its cause.
OPEN = [
    "The pack has no public address yet, and most of a full clone is history and workshop: 2 MB are shipped.",
    "A clone also lists the five demo templates. Without the nodes of `demo/`, which `python dev.py serve` brings, "
    "they open with nodes missing.",
    "Beside a KSampler, the Report needs *KSamplerSelect* and *BasicScheduler* set to the same values by hand.",
]


def write_page(rows: list[dict]) -> None:
    write_whole(PAGE, page(rows).encode())


def page(rows: list[dict]) -> str:
    """rows: one per host, the older first; all have the same steps."""
    hosts = [f"ComfyUI {row['host']}" for row in rows]
    lines = [
        "# The first-time walk",
        "",
        "From an empty ComfyUI folder to a faster picture, by the README alone. `python dev.py bench walk` walks "
        "it and writes this page: a fresh copy of ComfyUI without models and without other packs, `git clone` of "
        "this pack's last commit, the real server on the processor, the real page in a headless Chromium with a "
        "new profile, the mouse and the keys that a person uses. No graphics card, and nothing prepared. The "
        "host's own template package and help pages are not installed there. The small trained model of `demo/` "
        "stands for yours, with the demo's nodes for its text encoder and VAE: its pictures are 64 pixels wide, so "
        "seconds here tell how quickly a person gets there, and the strip tells what was saved; on your model both "
        "are larger.",
        "",
        *(machine(row) for row in rows),
        "",
        "| | step | " + " | ".join(f"{host}, seconds" for host in hosts) + " |",
        "|---|---|" + "---|" * len(rows),
    ]
    for number, steps in enumerate(zip(*(row["steps"] for row in rows), strict=True), 1):
        lines.append(f"| {number} | {steps[0]['name']} | " + " | ".join(f"{s['seconds']:.1f}" for s in steps) + " |")
    total = (f"{sum(step['seconds'] for step in row['steps']):.0f}" for row in rows)
    walked = (f"{sum(step['seconds'] for step in until_faster(row)):.0f}" for row in rows)
    lines += [
        "| | **to the faster picture** (without step 3) | " + " | ".join(walked) + " |",
        "| | all | " + " | ".join(total) + " |",
        "",
        "A person reads and looks, so drawing and typing take longer than here. Steps 1 to 4 are once, step 5 at every "
        "start of ComfyUI.",
        "",
        "## What was seen",
        "",
    ]
    for number, steps in enumerate(zip(*(row["steps"] for row in rows), strict=True), 1):
        words = [shown(step["seen"]) for step in steps]
        head = f"{number}. **{steps[0]['name']}**"
        if len(set(words)) == 1:
            lines.append(f"{head}: {words[0]}.")
        else:
            lines += [head, *(f"   - {host}: {said}." for host, said in zip(hosts, words, strict=True))]
    lines += [
        "",
        "The plain workflow after step 10, and with the two nodes after step 12:",
        "",
        "![The plain workflow after its run](walk_before.jpg)",
        "",
        "![The same with Cache Loader and Taylor Predictor, after a run of the same seed](walk_after.jpg)",
        "",
        "## Stumbles",
        "",
        "Every error or warning of the page's console or the server's log that names this pack counts.",
        "",
    ]
    now = [f"- {host}: {stumble}" for host, row in zip(hosts, rows, strict=True) for stumble in row["stumbles"]]
    lines += now or ["In these walks: none of those."]
    if OPEN:
        lines += ["", "Still in the way of a person who walks it:", "", *(f"- {what}" for what in OPEN)]
    if FOUND:
        lines += ["", "Found in earlier walks, and removed:", ""]
        lines += [f"- {what} {then}" for what, then in FOUND]
    return "\n".join(lines) + "\n"


def shown(seen: list[str]) -> str:
    """What was seen as one line; a long dialog by its beginning, counts of the strip apart from each other."""
    line = re.sub(r"(computed|reused|forecast)(?=\d)", r"\1, ", "; ".join(seen))
    return re.sub("“([^”]{200})[^”]*”", r"“\1 …”", line).replace(".”", "”")


def until_faster(row: dict) -> list[dict]:
    """The steps up to the run with the nodes, without the one that only proves what pip brings."""
    end = next(i for i, step in enumerate(row["steps"]) if "same seed" in step["name"])
    return [step for step in row["steps"][: end + 1] if "has nothing" not in step["name"]]


def machine(row: dict) -> str:
    low, high = sorted(row["load"])
    busy = "" if high <= QUIET else ", **a busy machine**: most steps are shorter on a quiet one"
    return (
        f"- {row['date']}, ComfyUI {row['host']} with frontend {row['frontend']}, {row['cores']} processor cores, "
        f"other work and this at a load of {low} to {high}{busy}."
    )
