"""The smoke set that `python dev.py hosts` runs in every release passes on the host under test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.survival.smoke import CHECKS, Smoke, demand, outcome

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_smoke_set_passes(tmp_path):
    """In a process of its own, as the command runs it: the host's loader imports the pack under a name of its own."""
    out = tmp_path / "smoke.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.survival.smoke", "--out", out], cwd=ROOT, capture_output=True, text=True
    )
    results = json.loads(out.read_text())
    assert list(results) == ["start", *CHECKS]
    assert done.returncode == 0 and all(result["passed"] for result in results.values()), done.stdout


def test_a_broken_check_is_a_row_and_not_the_end(capsys):
    """Also one that fails in its own way; the others still run."""

    def broken():
        demand(False, "3 of 12\nevaluations")

    assert outcome("x", broken) | {"seconds": 0} == {
        "passed": False, "seconds": 0, "says": "AssertionError: 3 of 12 evaluations",
    }  # fmt: skip
    assert outcome("x", lambda: Smoke().missing)["says"].startswith("AttributeError")
    assert "FAIL x" in capsys.readouterr().out
