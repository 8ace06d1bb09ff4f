"""Whether a case ended as it may: it works, or says one sentence of ours, soon, in little memory, in its folder."""

from __future__ import annotations

import resource
import signal
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / folder) for folder in ("engine", "quant", "kernels", "host", "nodes"))
SECONDS = 10.0  # of processor time for one case
MEGABYTES = 512.0  # that one case may add to the most this process ever occupied
LONGEST = 700  # characters of a sentence


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Verdicts:
    """works, told: how many cases ended so; faults: what went wrong -> how often, with the first of each kept."""

    works: int = 0
    told: int = 0
    faults: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.works + self.told + sum(self.faults.values())

    def fault(self, what: str, details: str) -> None:
        self.faults[what] += 1
        self.first.setdefault(what, details)


def judge(case, verdicts: Verdicts, name: str, number: int) -> None:
    """Run one case and note how it ended. number: of the seed that repeats it."""
    before = most_memory()
    try:
        with within(SECONDS):
            case()
        verdicts.works += 1
    except Hang:
        verdicts.fault(f"{name}: more than {SECONDS:.0f} s", f"case {number}\n{traceback.format_exc()[-1500:]}")
    except MemoryError:
        verdicts.fault(f"{name}: a huge allocation", f"case {number}\n{traceback.format_exc()[-1500:]}")
    except Exception as error:
        why = not_a_sentence(error)
        if why:
            where = place(error)
            details = f"case {number}: {why}\n{''.join(traceback.format_exception(error))[-2500:]}"
            verdicts.fault(f"{name}: {why} at {where}", details)
        else:
            verdicts.told += 1
    if (grown := most_memory() - before) > MEGABYTES:
        verdicts.fault(f"{name}: a huge allocation", f"case {number}: {grown:.0f} MB")


def not_a_sentence(error: Exception) -> str:
    """What is wrong with an error as an answer to bad input; empty where it is one sentence of ours."""
    from slipstream.engine.errors import SlipstreamError, on_one_line
    from slipstream.host.remote.http import NoAnswer

    kind, words = type(error).__name__, str(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = isinstance(error, SlipstreamError | NoAnswer) or (
        isinstance(error, ValueError)
        and bool(frames)
        and frames[-1].filename.startswith(OURS)
        and (frames[-1].line or "").startswith("raise")
    )
    if not ours:
        return kind
    if not words.strip():
        return f"{kind} without words"
    if not isinstance(error, SlipstreamError | NoAnswer):
        words = on_one_line(words)  # the host part says it in its own
    if any(c < " " for c in words):
        return f"{kind} on several lines"
    if len(words) > LONGEST:
        return f"{kind} of more than {LONGEST} characters"
    return ""


def place(error: Exception) -> str:
    """File and line where our code last was."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(OURS)] or frames[-1:]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Hang after so much processor time; where the system has no such timer, nothing is measured."""
    if not hasattr(signal, "SIGPROF"):
        yield
        return

    def late(*arguments):
        raise Hang

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def most_memory() -> float:
    """Megabytes this process occupied at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def strays(folder: Path, allowed: Path) -> list[str]:
    """Files below `folder` that are not below `allowed`."""
    return [str(p) for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(allowed)]
