"""The tests marked `card`, which every machine runs on its CPU, on the card."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from lab.boot import ROOT

from .plan import NotThere
from .worker import Bench


def on_a_card(bench: Bench) -> Iterator[dict]:
    """A row for each test: passed, failed with its sentence, or skipped with its reason."""
    if importlib.util.find_spec("pytest") is None:
        raise NotThere("pytest")
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        files = [
            str(path) for path in ROOT.glob("tests/*/test_*.py") if "mark.card" in path.read_text(encoding="utf-8")
        ]
        command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", f"--junitxml={report}"]
        chosen = ["-m", "card", *(["-k", "test_h01 and 1.0-flux"] if bench.dry else [])]
        subprocess.run([*command, "--continue-on-collection-errors", *chosen], cwd=ROOT, check=False)
        if not report.is_file():
            raise RuntimeError("the tests did not start; the log says why")
        for case in xml.parse(report).getroot().iter("testcase"):
            row = {"name": case.get("name"), "file": case.get("classname"), "seconds": float(case.get("time"))}
            yield row | outcome(case)


def outcome(case: xml.Element) -> dict[str, str]:
    """What became of a test; a file that needs a package this machine lacks is not there."""
    bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
    if bad is None:
        return {"passed": "yes"}
    missing = re.search(r"ModuleNotFoundError: (No module named '[^']+')", bad.text or "")
    if bad.tag == "error" and missing:
        return {"not there": missing[1]}
    return {"skipped" if bad.tag == "skipped" else "failed": " ".join(bad.get("message", "").split())[:200]}
