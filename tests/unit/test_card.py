"""`python dev.py card`: every line of its plan runs without a card, a line that dies costs its own rows, and what a
machine with a card is given fits where it has to."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from shipped import ROOT, listed

from bench.speed.card import pack, run
from bench.speed.card.plan import NAMES, PLAN

MEGABYTE = 1 << 20
FITS, PICTURES = 62 * MEGABYTE, 5_000_000
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"}


def test_every_line_of_the_plan_runs_dry(tmp_path):
    command = [sys.executable, "-m", "bench.speed.card.run", "--out", tmp_path, "--seconds", "150", "--dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["line"] for row in rows)) == list(NAMES)
    failed = [row for row in rows if "failed" in row]
    assert not failed, done.stdout[-3000:]
    assert len(list(tmp_path.iterdir())) <= 8
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"\n## {name}\n" in page for name in NAMES) and "CPU, dry" in page
    # as right as a kernel has to be, and as near as on the CPU
    errors = [row["error"] for row in rows if row["line"] == "correctness" and "error" in row]
    assert len(errors) > 8 and max(errors) < 0.02
    assert min(row["psnr_db"] for row in rows if "psnr_db" in row) > 30
    assert {row["filled"] for row in rows if row.get("cache") == "every third"} == {4}


# In the worker's place: writes a row for each line, dies at the second and hangs at the third.
STAND_IN = """
import json, os, sys, time
path, names = sys.argv[1], json.loads(sys.argv[2])
for name in names:
    print(chr(30) + name, flush=True)
    if name == NAMES[1]:
        os.abort()
    with open(path, "a") as file:
        file.write(json.dumps({"line": name, "name": "row"}) + chr(10))
    if name == NAMES[2]:
        time.sleep(60)
"""


def test_a_line_that_dies_or_hangs_costs_its_own_rows(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(f"NAMES = {list(NAMES)}\n{STAND_IN}")
    monkeypatch.setattr(run, "WORKER", (sys.executable, script))
    monkeypatch.setattr(run, "LEAST", 0.0)
    lines = [run.Line(line.name, line.question, 2, line.run) for line in PLAN[:5]]
    log = run.Log(tmp_path / "out")
    began = time.monotonic()
    run.measure(lines, log, 30, dry=True)
    rows = log.read()
    assert time.monotonic() - began < 20
    assert [(row["line"], row.get("failed", "row")) for row in rows] == [
        (NAMES[0], "row"),
        (NAMES[1], "the process ended with -6"),
        (NAMES[2], "row"),
        (NAMES[2], "cut short: its time is over"),
        (NAMES[3], "row"),
        (NAMES[4], "row"),
    ]
    with pytest.raises(FileExistsError):
        run.Log(tmp_path / "out")  # what was measured is not written over
    log = run.Log(tmp_path / "short")
    run.measure(lines[2:], log, 1, dry=True)
    assert [row.get("failed", "row") for row in log.read()] == [
        "row",
        "cut short: the time is over",
        *["not reached"] * 2,
    ]


def test_tree_and_pack_fit_in_one_small_archive(tmp_path):
    """What a machine without a network is sent: 62 MiB with what is packed."""
    pack.pack(tmp_path / "pack")
    packed = pack.size(tmp_path / "pack")
    assert (tmp_path / "pack/host/comfy/samplers.py").is_file() and (tmp_path / "pack/site/torchsde").is_dir()
    files = [path for name in listed("--exclude-standard") if (path := ROOT / name).is_file()]
    assert packed > 1_000_000 and packed + sum(path.stat().st_size for path in files) < FITS
    assert sum(path.stat().st_size for path in files if path.suffix in SUFFIXES) < PICTURES
