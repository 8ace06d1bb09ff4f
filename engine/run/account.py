"""What became of a run: its evaluations, and their account as plain data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from .evaluation import COMPUTED, FIRST, LAST, SCHEDULE, Evaluation
from .given import Given
from .streams import Streams

# A drift that differs from a profile's by more than this factor is told.
FAR_OFF = 2.0


class Accounted(Protocol):
    """What the account needs of a run."""

    given: Given
    streams: Streams
    evaluations: list[Evaluation]
    compensator: Any
    note: str
    level: str | None
    peak_bytes: int
    started: float


def report(run: Accounted) -> dict:
    """Numbers of the run so far, plain JSON data.

    Drifts are those of the filled evaluations. Seconds saved are measured within the run: a fill costs what it
    took, not 0.
    """
    given = run.given
    correction = None if run.compensator is None else run.compensator.words()
    computed = [e for e in run.evaluations if e.action == COMPUTED]
    filled = [e for e in run.evaluations if e.action != COMPUTED]
    drifts = [e.drift for e in filled if e.drift is not None]
    # The first evaluation carries one-time costs (loading, compiling), so it is left out where there are others.
    usual = computed[1:] or computed
    per_computed = sum(e.seconds for e in usual) / len(usual) if usual else 0.0
    note = run.note or ("" if filled else _why_none(run.evaluations, given.recipe.method))
    if correction and not filled:  # then the node shows the note alone
        note, correction = f"{correction}; {note}", ""
    saved = sum(max(0.0, per_computed - e.seconds) for e in filled)
    return {
        "model": given.model,
        "precision": given.precision,
        "sampler": given.sampler.name,
        "steps": given.clock.steps,
        "evaluations": len(run.evaluations),
        "computed": len(computed),
        "computed_share": sum(e.share for e in run.evaluations),
        "filled": len(filled),
        "seconds": time.perf_counter() - run.started,
        "seconds_saved": saved,
        "drift_mean": sum(drifts) / len(drifts) if drifts else None,
        "drift_max": max(drifts) if drifts else None,
        "cache_bytes": run.peak_bytes,
        "cache_place": ", ".join(sorted(run.streams.memory.places)),
        "site": run.level,
        "family": given.recipe.family,
        "chose": "" if run.note else given.recipe.chose,
        "remark": ", ".join(filter(None, (given.recipe.remark, _unexpected(given.expected_drift, drifts), correction))),
        "note": note,
        "compensation": None if run.compensator is None else run.compensator.report(),
        "plan": given.plan.as_json(),
        "trace": [asdict(e) for e in run.evaluations],
    }


def _why_none(evaluations: Sequence[Evaluation], method: str) -> str:
    """Why a run that might have skipped did not: the reason given most often, the unavoidable ones left out."""
    given = Counter(e.reason for e in evaluations if e.reason not in (FIRST, LAST))
    reason = given.most_common(1)[0][0] if given else "too few steps"
    if reason == SCHEDULE:
        reason = f"no evaluation was within the {method}"
        if method == "drift budget":
            reason += "; try the preset Fast, or Custom with a larger drift_budget"
    return f"nothing was skipped: {reason}"


def _unexpected(expected: object, drifts: Sequence[float]) -> str:
    """How far the drift is from what the profile expected, where they differ by more than a factor of two."""
    if not drifts or not isinstance(expected, float) or not expected > 0:  # a file may hold anything
        return ""
    factor = sum(drifts) / len(drifts) / expected
    if 1 / FAR_OFF <= factor <= FAR_OFF:
        return ""
    what = f"{factor:.1f} times what the profile expects ({100 * expected:.1f} %)"
    return f"the drift is {what}; calibrate with a prompt like this"
