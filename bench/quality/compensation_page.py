"""docs/compensation.md from the rows of `bench compensation`."""

from __future__ import annotations

from pathlib import Path

from lab.rows import table

from .compensation_models import COMPUTED, FIT_BATCH, FIT_RUNS, SMALL_STEPS, STEPS

TEXT = Path(__file__).with_name("compensation_text.md")
ANCHORS = 3


def page(rows: list[dict]) -> str:
    """docs/compensation.md: the text with its numbers and tables put in."""
    shown = [row for row in rows if "gain_db" in row]
    names = dict.fromkeys(_column(row) for row in rows if row.get("table") == "bound")
    share = [row["variance_share"] for row in rows if "variance_share" in row]
    numbers = {"pictures": max(r["pictures"] for r in shown), "steps": STEPS, "computed": COMPUTED,
               "fit": FIT_RUNS * FIT_BATCH, "small": SMALL_STEPS}  # fmt: skip
    parts = {"gains": table(_told(shown), COLUMNS), "summary": summary(rows), "references": references(rows),
             "bound": table(_side_by_side(rows), ("what is known", *names)),
             "variance": f"at most {100 * max(share, default=0.0):.2g} %"}  # fmt: skip
    text = TEXT.read_text()
    for name, value in numbers.items():
        text = text.replace("{" + name + "}", str(value))
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    return text


COLUMNS = ("model", "setting", "correction", "PSNR (dB)", "gain (dB)", "+-", "better", "evaluations", "CPU s")


def _told(rows: list[dict]) -> list[dict]:
    found = []
    for row in rows:
        chose = f" ({row['chose']})" if "chose" in row else ""
        found.append({
            "model": row["model"].split("_")[1], "setting": row["setting"], "correction": row["name"] + chose,
            "PSNR (dB)": row["psnr_db"], "gain (dB)": f"{row['gain_db']:+.2f}" if row["name"] != "none" else "",
            "+-": row["error_db"] if row["name"] != "none" else "", "evaluations": row["evaluations"],
            "better": f"{row['better']} of {row['pictures']}" if row["name"] != "none" else "", "CPU s": row["seconds"],
        })  # fmt: skip
    return found


REFERENCES = ("model", "setting", "reference", "anchors", "gain (dB)", "time (%)", "s per anchor", "MB")
SIDE = ("left per step", "even", "rule", "solved", "euler_ancestral")


def references(rows: list[dict]) -> str:
    """What each reference gives, and what it takes: one row for every kind, number and setting."""
    found = []
    for row in rows:
        if not row.get("added_pct") or any(word in row["setting"] + row["name"] for word in SIDE) or "chose" in row:
            continue
        anchors = len(row["anchors"])
        each = (row["anchor_seconds"] - (row["made_seconds"] or 0.0)) / anchors
        found.append({
            "model": row["model"].split("_")[1], "setting": row["setting"], "reference": row["reference"],
            "anchors": anchors, "gain (dB)": f"{row['gain_db']:+.2f}", "time (%)": f"+{row['added_pct']:.0f}",
            "s per anchor": each, "MB": row["memory_mb"] or 0.0,
        })  # fmt: skip
    return table(found, REFERENCES)


def _column(row: dict) -> str:
    return f"{row['model'].split('_')[1]}: {row['setting']}"


def _side_by_side(rows: list[dict]) -> list[dict]:
    bound = [row for row in rows if row.get("table") == "bound"]
    names = dict.fromkeys(row["name"] for row in bound)
    return [
        {"what is known": name}
        | {_column(row): f"{row['explained_pct']:.1f} %" for row in bound if row["name"] == name}
        for name in names
    ]


def summary(rows: list[dict]) -> str:
    """The goals, with what was measured."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and "gain_db" in row]
        best = next((r for r in mine if r["setting"] == "SVDQuant + GPTQ" and r["name"] == f"{ANCHORS} anchors"), None)
        plain = next((r for r in mine if r["setting"] == "SVDQuant + GPTQ" and r["name"] == "none"), None)
        raised = next((r for r in mine if r["name"].endswith("in 8 bit")), None)
        if best is not None:
            lines.append(
                f"- **{model}**: {ANCHORS} anchors in {STEPS} steps bring SVDQuant + GPTQ from {plain['psnr_db']:.1f} "
                f"to {best['psnr_db']:.1f} dB, {best['gain_db']:+.2f} +- {best['error_db']:.2f} dB, for "
                f"{100 * ANCHORS / STEPS:.0f} % more evaluations and {best['added_pct']:.0f} % more CPU seconds, with "
                f"the making of the 8-bit copy of {best['memory_mb']:.1f} MB. "
                f"The same share of the weights in 8 bit instead gives {raised['gain_db']:+.2f} dB."
            )
        fewer = next((r for r in mine if r["setting"] == "SVDQuant + GPTQ" and r["name"] == "2 anchors"), None)
        if fewer is not None:
            lines.append(
                f"- {model}: 2 anchors give {fewer['gain_db']:+.2f} +- {fewer['error_db']:.2f} dB for "
                f"{fewer['added_pct']:.0f} % more CPU seconds. Asked for were 1.2 dB for 10 %."
            )
        small = {r["name"]: r for r in mine if r["setting"].startswith("small model")}
        if "2 anchors" in small:
            instead = small[f"for {SMALL_STEPS - 2} steps instead"]
            lines.append(
                f"- **{model}**: with a small model for {SMALL_STEPS} of {STEPS} steps, 2 anchors on the large one "
                f"bring {small['none']['psnr_db']:.1f} to {small['2 anchors']['psnr_db']:.1f} dB; the large one for 2 "
                f"steps more instead gives {instead['psnr_db']:.1f} dB."
            )
        auto = [r for r in mine if r["name"] == "auto"]
        if auto:
            worst, top = min(auto, key=lambda r: r["gain_db"]), max(auto, key=lambda r: r["gain_db"])
            lines.append(
                f"- {model}: with `auto`, fitted terms give between {worst['gain_db']:+.2f} dB ({worst['setting']}) "
                f"and {top['gain_db']:+.2f} dB ({top['setting']}) in {len(auto)} settings."
            )
    cost = [row for row in rows if row.get("table") == "cost"]
    if cost:
        lines.append(
            f"- The fitted terms take {cost[0]['ms']:.2f} ms on one CPU thread for a latent of FLUX at 1024 x 1024, "
            "whose step is about 110 TFLOP (4608 tokens, 12 billion weights): 0.5 % of a step even on a card that does "
            f"{110 / (cost[0]['ms'] / 5):.0f} TFLOP/s."
        )
    return "\n".join(lines)
