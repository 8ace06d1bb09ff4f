"""The strip on the canvas: what became of every evaluation, sent while a run goes on and kept for who comes later.

A page that is reloaded, a second tab and a workflow opened again ask for the last runs of a workflow's nodes; a message
names the workflow it was queued from, so that another workflow with the same node ids is not shown a foreign run.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from aiohttp import web

EVENT = "slipstream.evaluation"
FINISHED = "slipstream.finished"
ROUTE = "/slipstream/strips"

# Seconds between two messages. A strip that changes 20 times a second looks alive; a model that makes a thousand
# evaluations a second does not send a thousand messages.
INTERVAL = 0.05
# Seconds without a new cell after which the loop is no longer asked to look.
IDLE = 5.0
# A cell is about 150 bytes: the last runs of this many nodes, and of a run at most so many evaluations, are kept.
KEPT_NODES = 64
KEPT_CELLS = 4096
# Runs of one prompt on one node (two samplers share a Cache Loader, a detailer runs one per face).
KEPT_RUNS = 8
KEPT_PAGES = 64
LONGEST_NAME = 200  # of a page; the host gives it 32 characters


@dataclass(slots=True, eq=False)
class Strip:
    """One run as the canvas shows it. head: what does not change; cells: one dict per evaluation; sent: how many of
    them every page has; client: whom to send to, None for all pages; end: what `finished` adds, None before."""

    head: dict
    client: str | None = None
    cells: list[dict] = field(default_factory=list)
    state: dict = field(default_factory=dict)
    sent: int = 0
    end: dict | None = None

    def message(self, start: int = 0) -> dict:
        """The strip from cell `start` on, as plain JSON data; a page puts cells where their index says."""
        return {**self.head, **self.state, "cells": self.cells[start:], **(self.end or {})}


class Strips:
    """The strips of the last runs, by node. Samplers add, the server's loop sends; one lock for both."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_node: OrderedDict[str, list[Strip]] = OrderedDict()
        self._open: WeakKeyDictionary[object, Strip] = WeakKeyDictionary()
        self._waiting: list[Strip] = []
        self._ticking = False
        self._last = 0
        self._pages: OrderedDict[str, None] = OrderedDict()

    def evaluation(self, server, run, now) -> None:
        """Take one evaluation of a run; it is sent with what else comes within INTERVAL seconds."""
        if not run.plan.node_ids:
            return
        with self._lock:
            strip = self._open.get(run) or self._start(server, run)
            if len(strip.cells) >= KEPT_CELLS:
                return
            late, changed = _late(strip, run), len(strip.cells)
            # A computed evaluation shows how far off those filled before it were.
            for earlier in reversed(run.evaluations[:changed] if now.drift is not None else ()):
                if earlier.action == "computed" or earlier.drift is None:
                    break
                changed = earlier.index
                strip.cells[changed]["drift"] = _short(earlier.drift)
            strip.cells.append(_cell(now))
            strip.state = {
                "cache_bytes": getattr(run, "peak_bytes", 0),
                "words": getattr(run, "note", "") or getattr(getattr(run, "recipe", None), "chose", ""),
            }
            strip.sent = min(strip.sent, changed, late)
            if strip not in self._waiting:
                self._waiting.append(strip)
            wake, self._ticking = not self._ticking, True
        if wake:
            server.loop.call_soon_threadsafe(self._tick, server)

    def finished(self, server, run, end: dict) -> None:
        """Send what is left of the run and how it ended, and keep both."""
        with self._lock:
            strip = self._open.get(run) or self._start(server, run)
            late = _late(strip, run)
            if late < len(strip.cells):
                strip.sent = min(strip.sent, late)
                self._waiting += [strip] if strip not in self._waiting else []
            self._send(server)
            strip.end = {"finished": True, **end}
            server.send_sync(FINISHED, {**strip.head, **strip.end}, strip.client)

    def shows(self, client: str | None) -> bool:
        """Whether this client is a page with strips, which needs no text beside them."""
        return client in self._pages

    def of_workflow(self, workflow: object, running: Iterable[str] = ()) -> Iterator[dict]:
        """The last runs of a workflow's nodes, oldest first. running: the prompts being executed."""
        with self._lock:
            kept = {strip.head["run"]: strip for strips in self._by_node.values() for strip in strips}
            for _, strip in sorted(kept.items()):
                if workflow and strip.head["workflow"] == workflow:
                    yield {**strip.message(), "stopped": strip.end is None and strip.head["prompt_id"] not in running}

    def open_page(self, client: object) -> None:
        """Remember a page that has strips."""
        if isinstance(client, str) and 0 < len(client) <= LONGEST_NAME:
            self._pages[client] = None
            self._pages.move_to_end(client)
            while len(self._pages) > KEPT_PAGES:
                self._pages.popitem(last=False)

    # -- with the lock held --------------------------------------------------------------------------------------

    def _start(self, server, run) -> Strip:
        """A new strip for a run, which takes the place of its nodes' strips of earlier prompts."""
        prompt, workflow = prompt_of(server)
        # In the order of their start, also across a restart of the server.
        self._last = max(self._last + 1, time.time_ns() // 1_000_000)
        clock = getattr(run, "clock", None)
        strip = self._open[run] = Strip(
            {
                "run": self._last,
                "nodes": list(run.plan.node_ids),
                "prompt_id": prompt,
                "workflow": workflow,
                "steps": getattr(clock, "steps", 0),
                "precision": getattr(run, "precision", ""),
            },
            # Without a workflow's name nobody else can tell whether the nodes are theirs.
            None if workflow else server.client_id,
        )
        for node in run.plan.node_ids:
            same = [s for s in self._by_node.get(node, ()) if (s.head["prompt_id"], s.head["workflow"])
                    == (prompt, workflow)]  # fmt: skip
            self._by_node[node] = [*same[1 - KEPT_RUNS :], strip]
            self._by_node.move_to_end(node)
        while len(self._by_node) > KEPT_NODES:
            self._by_node.popitem(last=False)
        return strip

    def _send(self, server) -> None:
        for strip in self._waiting:
            server.send_sync(EVENT, strip.message(strip.sent), strip.client)
            strip.sent = len(strip.cells)
        self._waiting.clear()

    # -- in the server's loop ------------------------------------------------------------------------------------

    def _tick(self, server, idle: int = 0) -> None:
        """Send what waits, every INTERVAL. Waking the loop makes the sampler wait for it, so the loop looks by itself
        and stops only where nothing has come for a while."""
        with self._lock:
            idle = 0 if self._waiting else idle + 1
            self._send(server)
            again = self._ticking = idle * INTERVAL < IDLE
        if again:
            server.loop.call_later(INTERVAL, self._tick, server, idle)


# The second thing in the pack that outlives a run (beside the reports of `events`): numbers, bounded, behind a lock.
STRIPS = Strips()


def register(server) -> None:
    """Add the route to the host's server."""

    async def open_page(request: web.Request) -> web.Response:
        """POST /slipstream/strips with {"client", "workflow"}: {"runs"} of the workflow's nodes, oldest first."""
        try:
            body = await request.json()
        except (ValueError, RecursionError, LookupError):
            body = None
        if not isinstance(body, dict):
            return web.json_response({"error": "Slipstream: what was sent is no JSON with a workflow."}, status=400)
        STRIPS.open_page(body.get("client"))
        running = {item[1] for item in _running(server)}
        return web.json_response({"runs": list(STRIPS.of_workflow(body.get("workflow"), running))})

    server.routes.post(ROUTE)(open_page)


def _late(strip: Strip, run) -> int:
    """Which cell has become an anchor since it was taken, one past the last where none has: a result is corrected
    when its evaluation has ended."""
    last = len(strip.cells) - 1
    if last < 0 or strip.cells[last]["action"] == "anchor" or not getattr(run.evaluations[last], "anchor", False):
        return last + 1
    strip.cells[last]["action"] = "anchor"
    return last


def _cell(now) -> dict:
    """One evaluation as it is sent."""
    cell = {
        "index": now.index,
        "step": round(now.u, 3),
        "action": "anchor" if getattr(now, "anchor", False) else now.action,
        "share": round(now.share, 3),
        "seconds": round(now.seconds, 6),
        "reason": now.reason,
        "drift": _short(now.drift),
    }
    return {**cell, "order": now.order} if now.order else cell


def _short(drift: float | None) -> float | None:
    return None if drift is None else float(f"{drift:.4g}")


def _running(server) -> list[tuple]:
    """The host's queue items being executed: (number, prompt id, prompt, extra data, ...)."""
    queue = getattr(server, "prompt_queue", None)
    look = getattr(queue, "get_current_queue_volatile", None) or getattr(queue, "get_current_queue", None)
    return look()[0] if look is not None else []


def prompt_of(server) -> tuple[str | None, str | None]:
    """The prompt being executed and the id of the workflow it was queued from; None for what the client left out."""
    prompt = getattr(server, "last_prompt_id", None)
    for item in _running(server):
        if item[1] == prompt:
            workflow = (item[3].get("extra_pnginfo") or {}).get("workflow")
            identity = workflow.get("id") if isinstance(workflow, dict) else None
            return prompt, identity if isinstance(identity, str) else None
    return prompt, None
