"""What the server sends for the strips and keeps of them, without a browser: nothing lost, few messages, bounded."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from slipstream.host.canvas.strip import INTERVAL, KEPT_NODES, KEPT_RUNS, Strips


class Server:
    """What the strips use of the host's server, with its loop in a thread of its own."""

    def __init__(self, workflow: str | None = "w"):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.client_id, self.last_prompt_id, self.workflow = "tab", "p1", workflow
        self.prompt_queue = self
        self.sent: list[tuple[float, str, dict, str | None]] = []

    def get_current_queue_volatile(self):
        named = {"extra_pnginfo": {"workflow": {"id": self.workflow}}} if self.workflow else {}
        return [(0, self.last_prompt_id, {}, named)], []

    def send_sync(self, event, data, sid=None):
        self.sent.append((time.monotonic(), event, data, sid))


class Run:
    """What the strips use of a run."""

    def __init__(self, *nodes: str, steps: int = 20):
        self.plan = SimpleNamespace(node_ids=nodes)
        self.clock = SimpleNamespace(steps=steps)
        self.evaluations: list = []

    def evaluate(self, strips: Strips, server: Server, action: str = "computed", drift: float | None = None) -> None:
        index = len(self.evaluations)
        self.evaluations.append(
            SimpleNamespace(
                index=index, u=float(index), action=action, share=1.0, seconds=0.001, reason="", drift=drift, order=0
            )
        )
        strips.evaluation(server, self, self.evaluations[-1])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.loop.call_soon_threadsafe(server.loop.stop)


def test_a_thousand_evaluations_a_second_are_few_messages_and_no_cell_is_lost(server):
    strips, run = Strips(), Run("3")
    started = time.monotonic()
    for i in range(1000):
        run.evaluate(strips, server, drift=i / 1000)
        time.sleep(0.0003)
    strips.finished(server, run, {"seconds": 1.0})
    took = time.monotonic() - started
    messages = [data for _, event, data, _ in server.sent if event == "slipstream.evaluation"]
    cells = [cell["index"] for data in messages for cell in data["cells"]]
    assert cells == list(range(1000)) and server.sent[-1][1] == "slipstream.finished"
    assert len(messages) <= took / INTERVAL + 2


def test_the_last_cell_does_not_wait_for_the_next_evaluation(server):
    strips, run = Strips(), Run("3")
    for _ in range(2):
        run.evaluate(strips, server)
    time.sleep(4 * INTERVAL)
    assert [cell["index"] for _, _, data, _ in server.sent for cell in data["cells"]] == [0, 1]


def test_a_measured_drift_reaches_the_evaluations_filled_before_it(server):
    strips, run = Strips(), Run("3")
    for action in ("computed", "forecast", "forecast"):
        run.evaluate(strips, server, action)
    time.sleep(4 * INTERVAL)
    for i in (1, 2):
        run.evaluations[i].drift = i / 100
    run.evaluate(strips, server, "computed", 0.03)
    strips.finished(server, run, {})
    shown = {cell["index"]: cell["drift"] for _, _, data, _ in server.sent for cell in data.get("cells", ())}
    assert shown == {0: None, 1: 0.01, 2: 0.02, 3: 0.03}


def test_an_evaluation_becomes_an_anchor_after_it_has_ended(server):
    """Its result is corrected then; the last one's too."""
    strips, run = Strips(), Run("3")
    for i in range(3):
        run.evaluate(strips, server)
        time.sleep(4 * INTERVAL)
        run.evaluations[-1].anchor = i != 1
    strips.finished(server, run, {})
    shown = {cell["index"]: cell["action"] for _, _, data, _ in server.sent for cell in data.get("cells", ())}
    assert shown == {0: "anchor", 1: "computed", 2: "anchor"}


def test_who_comes_later_gets_the_last_prompts_runs_of_his_workflow_only(server):
    strips = Strips()
    for prompt, runs in (("p1", 1), ("p2", 2)):
        server.last_prompt_id = prompt
        for _ in range(runs):
            run = Run("3", "4")
            run.evaluate(strips, server)
    (first, second) = strips.of_workflow("w", {"p2"})
    assert first["run"] < second["run"] and not first["stopped"] and len(second["cells"]) == 1
    assert [run["stopped"] for run in strips.of_workflow("w")] == [True, True]
    assert not list(strips.of_workflow("other")) and not list(strips.of_workflow(None))
    server.workflow = "other"
    Run("3").evaluate(strips, server)
    assert [run["nodes"] for run in strips.of_workflow("other")] == [["3"]]


def test_without_a_workflows_name_only_the_client_that_queued_is_told():
    server, strips, run = Server(workflow=None), Strips(), Run("3")
    run.evaluate(strips, server)
    strips.finished(server, run, {})
    assert {sid for *_, sid in server.sent} == {"tab"}
    server.loop.call_soon_threadsafe(server.loop.stop)


def test_what_is_kept_is_bounded_and_a_run_without_nodes_sends_nothing(server):
    strips = Strips()
    for i in range(2 * KEPT_NODES):
        Run(f"n{i}").evaluate(strips, server)
    for _ in range(3 * KEPT_RUNS):
        Run("same").evaluate(strips, server)
    kept = list(strips.of_workflow("w"))
    assert len(kept) == KEPT_NODES - 1 + KEPT_RUNS
    Run().evaluate(strips, server)
    assert len(list(strips.of_workflow("w"))) == len(kept)
