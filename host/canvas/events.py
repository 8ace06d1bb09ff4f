"""What a run tells the world: every evaluation to the canvas, one line of text on its nodes and in the log."""

from __future__ import annotations

import logging
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from .strip import STRIPS, prompt_of

log = logging.getLogger("slipstream")

# Reports are plain numbers, a few kB each; this many nodes' last runs are kept for the Report node and for a reload.
KEPT_REPORTS = 64

# By workflow and node: every copy of a template has the same node ids.
_reports: OrderedDict[tuple[str | None, str], dict] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes of the canvas, where there is no plan that names them."""

    node_ids: tuple[str, ...]


def server_of_host():
    """The host's server if this process has one; tests and scripts have none."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _workflow() -> str | None:
    """The workflow whose prompt is being executed; None for a client that names none."""
    server = server_of_host()
    return None if server is None else prompt_of(server)[1]


def evaluation(run, now) -> None:
    """Show on the canvas what became of one evaluation."""
    server = server_of_host()
    if server is not None:
        STRIPS.evaluation(server, run, now)


def finished(run, report: dict) -> None:
    """Keep the report for its nodes, write one line to the log, and end their strips; clients without get a text."""
    text = summary(report)
    log.info("Slipstream: %s", text)
    server, workflow = server_of_host(), _workflow()
    with _lock:
        for node in run.plan.node_ids:
            _reports[workflow, node] = report
            _reports.move_to_end((workflow, node))
        while len(_reports) > KEPT_REPORTS:
            _reports.popitem(last=False)
    if server is None or not run.plan.node_ids:
        return
    numbers = {k: v for k, v in report.items() if k != "trace"}
    # Where nothing was filled, why is what the user wants to know.
    said = report["chose"] if report["filled"] and report["chose"] else report["note"] or report["chose"]
    words = ", ".join(part for part in (said, report["remark"]) if part)
    drifts = [e.drift for e in run.evaluations]
    STRIPS.finished(server, run, {**numbers, "text": text, "words": words, "drifts": drifts})
    if STRIPS.shows(server.client_id):
        return
    for node in run.plan.node_ids:
        show(node, node_text(report))


def show(node_id: str, text: str) -> None:
    """Put a text on a node of the canvas."""
    server = server_of_host()
    if server is not None and node_id:
        server.send_progress_text(text, node_id, server.client_id)


def last_report(plan) -> dict | None:
    """The report of the last run of the workflow being executed whose plan had one of these nodes; None where there was
    none."""
    workflow = _workflow()
    with _lock:
        found = [_reports[workflow, node] for node in plan.node_ids if (workflow, node) in _reports]
    return found[-1] if found else None


def node_text(report: dict) -> str:
    """The summary in a few short lines, as much as a node shows; a run that skipped nothing gives its reason."""
    if not report["filled"]:
        return report.get("note") or summary(report)
    drift = f", off by {100 * report['drift_mean']:.1f} %" if report["drift_mean"] is not None else ""
    lines = [
        f"computed {report['computed']} of {report['evaluations']}{_share(report)}{drift}",
        f"{report['seconds']:.2f} s, about {report['seconds_saved']:.2f} s saved, {_megabytes(report)}",
        report["chose"] or report["note"],
    ]
    return "\n".join([*lines, *([report["remark"]] if report["remark"] else [])])


def _share(report: dict) -> str:
    """What the evaluations that ran some of their blocks add to the count; empty where there are none."""
    share = report["computed_share"]
    return "" if share == report["computed"] else f" in full, {share:.1f} worth of blocks"


def _megabytes(report: dict) -> str:
    place = report["cache_place"]
    return f"{report['cache_bytes'] / 1e6:.1f} MB" + (f" ({place})" if place and place != "cpu" else "")


def summary(report: dict) -> str:
    """One sentence for the log and the canvas."""
    total, filled = report["evaluations"], report["filled"]
    if not total:
        return "no evaluation was made"
    remark = f"; {report['remark']}" if report["remark"] else ""
    if not filled:
        done = f"computed all {total} evaluations of {report['sampler']} in {report['seconds']:.2f} s"
        return f"{done}; {report['note']}{remark}"
    drift = ""
    if report["drift_mean"] is not None:
        drift = (
            f", the filled ones off by {100 * report['drift_mean']:.1f} % (at most {100 * report['drift_max']:.1f} %)"
        )
    return (
        f"computed {report['computed']} of {total} evaluations of {report['sampler']}{_share(report)}{drift}, "
        f"{report['seconds']:.2f} s, about {report['seconds_saved']:.2f} s saved; "
        f"{report['chose'] or report['note']} for {report['family']}, cache {_megabytes(report)}" + remark
    )
