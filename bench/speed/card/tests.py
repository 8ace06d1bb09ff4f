"""The tests marked `card`, which every machine runs on its CPU, on the card."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from ...boot import ROOT
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
        subprocess.run([*command, *chosen], cwd=ROOT, check=False)
        if not report.is_file():
            raise RuntimeError("the tests did not start; the log says why")
        for case in xml.parse(report).getroot().iter("testcase"):
            bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
            row = {"name": case.get("name"), "file": case.get("classname"), "seconds": float(case.get("time"))}
            says = "" if bad is None else " ".join(bad.get("message", "").split())[:200]
            kind = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
            yield {**row, kind: says or "yes"}
