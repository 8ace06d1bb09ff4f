"""Everything a card can tell in ten minutes, on a machine that may be bare and taken away.

    python dev.py card --out DIR [--seconds 570] [--lines "K0" products] [--dry]
    python dev.py card --pack

Writes rows.jsonl, a row as it comes, log.txt, and at the end gpu.md, a page like docs/gpu.md. --dry: every line of the
plan in tiny shapes on the CPU; its rows are no measurement. --pack: puts what a machine without network needs beside
this checkout and its own Python (torch, Triton, transformers) into .card, which is then used.

The lines run in a process of their own: one that crashes, hangs or leaves the card unusable costs its own rows only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lab.boot import ROOT
from lab.rows import table

from .plan import DRY, NAMES, PLAN, Line

MARK = "\x1e"  # before the worker's word that a line begins
WORKER = (sys.executable, "-u", "-m", "bench.speed.card.worker")
LEAST = 12.0  # seconds that starting another process is worth

HEAD = """# On a card

Written by `{command}` on {device}, {date}, torch {torch}, Triton {triton}, ComfyUI {host}. Milliseconds are the median
of repeated calls on warm data. Shares are of the rates measured in the same run: {rates}.

`roofline_ms` is the larger of the multiplications at the measured int8 rate and the bytes at the measured bandwidth;
what beats it does not multiply in int8. `layers` contains everything a layer does: K0, the product, branch and bias.
Whole FLUX models have random weights: their seconds and memory mean something, their pictures do not, so a cache that
goes by the measured drift skips nothing there, and the rows *every third* show what a filled step costs.
{note}"""
HOPPER = """
On Hopper the 4-bit instruction is emulated and int8 is no more than twice as fast as bfloat16, so nothing here shows
what a GeForce card gains, whose int8 rate is four times its bfloat16 rate; K2 and K3 are shown for their numbers only.
"""


class Log:
    """rows.jsonl and log.txt of a folder; every row is on the disk before the next one is measured."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, folder / "rows.jsonl"
        self.rows.touch(exist_ok=False)  # what was measured before is not lost
        self._text = (folder / "log.txt").open("w", encoding="utf-8")
        self._began = time.monotonic()

    def row(self, line: Line, **values: object) -> None:
        """A row of the runner's own: what became of a line."""
        row = {"line": line.name, **values, "at": round(time.monotonic() - self._began, 1)}
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.say(f"{line.name}: {values}\n")

    def say(self, text: str) -> None:
        """Text on the screen and in the log."""
        print(text, end="", flush=True)
        self._text.write(text)
        self._text.flush()

    def read(self) -> list[dict]:
        return [json.loads(line) for line in self.rows.read_text(encoding="utf-8").splitlines()]


class Worker:
    """A process that runs lines one after the other; `current` is the one it is at, since `since`."""

    def __init__(self, lines: list[Line], log: Log, dry: bool):
        command = [*WORKER, str(log.rows), json.dumps([line.name for line in lines])]
        environment = dict(os.environ)
        if dry:
            environment |= {"CUDA_VISIBLE_DEVICES": "", DRY: "1"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=os.name != "nt",
        )  # fmt: skip
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._left = list(lines)
        self.current, self.since = lines[0], time.monotonic()

    def _listen(self) -> None:
        for text in self._process.stdout:
            self._said.put(text)
        self._said.put(None)

    def watch(self, log: Log, until: float) -> tuple[list[Line], str]:
        """The lines not begun when it ended, and what ended it in the middle of one; "" where it came to the end."""
        while True:
            limit = min(self.since + self.current.seconds, until)
            try:
                text = self._said.get(timeout=max(0.05, limit - time.monotonic()))
            except queue.Empty:
                self.kill()
                return self._left, "cut short: the time is over" if limit == until else "cut short: its time is over"
            if text is None:
                code = self._process.wait()
                return self._left, f"the process ended with {code}" if code else ""
            if text.startswith(MARK):
                name = text[1:].strip()
                self.current, self.since = next(line for line in self._left if line.name == name), time.monotonic()
                self._left.remove(self.current)
            else:
                log.say(text)

    def kill(self) -> None:
        """End it with everything it started."""
        with contextlib.suppress(ProcessLookupError):
            if os.name == "nt":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def measure(lines: list[Line], log: Log, seconds: float, dry: bool) -> None:
    """Run the lines within the time, each at most its own; what is not reached has a row that says so."""
    until = time.monotonic() + seconds
    while lines and time.monotonic() < until - LEAST:
        worker = Worker(lines, log, dry)
        try:
            left, why = worker.watch(log, until)
        finally:
            worker.kill()
        if why:
            log.row(worker.current, failed=why)
        if len(left) == len(lines):
            lines = lines[1:]
            break  # it did not even begin, and another would not either; the log says why
        lines = left
    for line in lines:
        log.row(line, failed="not reached")


def page(rows: list[dict], command: str) -> str:
    """The rows as a page, one table a line of the plan."""
    about = next((row for row in rows if row.get("name") == "about"), {})
    rates = "; ".join(f"{r['name']} {r['rate']:.0f} {r['unit']}" for r in rows if "rate" in r) or "not measured"
    known = {key: about.get(key, "unknown") for key in ("device", "date", "torch", "triton", "host")}
    note = HOPPER if list(about.get("capability", ()))[:1] == [9] else ""
    text = HEAD.format(command=command, rates=rates, note=note, **known)
    for line in PLAN:
        part = [{k: v for k, v in row.items() if k not in ("line", "at")} for row in rows if row["line"] == line.name]
        part = [row for row in part if row.get("name") != "about"]
        if part:
            text += f"\n## {line.name}\n\n{line.question.capitalize()}.\n\n{shown(part)}\n"
    return text


def shown(rows: list[dict]) -> str:
    """A table with small numbers in four digits, and without columns that are empty everywhere."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value not in (None, "")))

    def cell(value: object) -> object:
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")

    return table([{key: cell(value) for key, value in row.items() if value is not None} for row in rows], columns)


def chosen(names: list[str]) -> Iterator[Line]:
    """The lines of these names in the plan's order, always with the card itself, whose rates the others need."""
    wanted = {NAMES[0], *names}
    return (line for line in PLAN if line.name in wanted)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py card")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--lines", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--pack", action="store_true")
    options = parser.parse_args()
    if options.pack:
        from .pack import FOLDER, pack, size

        pack(FOLDER)
        print(f"{FOLDER.relative_to(ROOT)}: {size(FOLDER) / 1e6:.1f} MB")
        return
    if options.out is None:
        parser.error("--out DIR is needed")
    if options.seconds <= LEAST:
        parser.error(f"--seconds is {options.seconds:.0f}, which is not enough to begin; try 570")
    try:
        log = Log(options.out)
    except FileExistsError:
        parser.error(f"--out {options.out} is a file or has rows of another run; name another folder")
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the worker is ended with us
    command = f"python dev.py card --out DIR --seconds {options.seconds:.0f}" + " --dry" * options.dry
    try:
        measure(list(chosen(options.lines)), log, options.seconds, options.dry)
    finally:
        rows = log.read()
        (options.out / "gpu.md").write_text(page(rows, command), encoding="utf-8")
        failed = [row for row in rows if "failed" in row]
        log.say(f"{len(rows)} rows, {len(failed)} of them failed, in {options.out}\n")
    if len(failed) == len(rows):
        sys.exit("Nothing was measured.")


if __name__ == "__main__":
    main()
