"""A user who never stops: random actions against a real server, and what must be true after each of them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from .canvas import BAD, NODES, WORDS, Canvas, Part, Space, key
from .server import Outcome, Session

# Who may speak in a refusal: our nodes by their names on the canvas, and the host's own validation of a prompt.
NAMES = ("Cache Loader", "Taylor Predictor", "W4A4 Quantize", "Error Compensator", "Hybrid Model Switch", "Calibrate")
HOST = ("value_not_in_list", "value_bigger_than_max", "value_smaller_than_min", "invalid_input_type",
        "custom_validation_failed", "required_input_missing")  # fmt: skip
# Lines that no healthy server writes, whatever is asked of it.
ALARMS = re.compile(r"Task exception was never|Error handling request|Fatal Python error|Segmentation|never awaited")
# What the host itself writes when its database in memory is let go of in another thread, once, soon after it starts.
HOST_NOISE = ("sqlalchemy", "SQLite objects created in a thread")
TWICE = ("heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde")


class Broken(AssertionError):
    """A promise that did not hold."""


def expect(holds: bool, words: str) -> None:
    if not holds:
        raise Broken(words)


@dataclass
class Tally:
    """What was done: numbers for the page."""

    actions: Counter = field(default_factory=Counter)
    outcomes: Counter = field(default_factory=Counter)
    plain_checks: int = 0
    repeats: int = 0
    reports: int = 0
    filled: int = 0
    sentences: Counter = field(default_factory=Counter)


class User:
    """One seed's sequence of actions. reference: a session with another server that never saw a node of ours."""

    def __init__(self, session: Session, reference: Session, log: Path, seed: int, space: Space | None = None):
        self.session, self.reference, self.log, self.space = session, reference, log, space or Space()
        self.rng = Random(seed)
        self.canvas = Canvas(self.space)
        self.tally = Tally()
        self.number = 0
        self.read = log.stat().st_size  # what the host says while it starts is its own
        self.plain: dict[str, torch.Tensor] = {}
        self.known: dict[str, tuple[str, object]] = {}
        self.last: Outcome | None = None
        self.history: list[str] = []

    # What a user does, and how often.
    EDITS = (("connect", 14), ("remove", 4), ("bypass", 5), ("move", 2), ("widget", 12), ("setting", 8))
    QUEUES = (("queue", 26), ("again", 4), ("two", 6), ("cancel", 7), ("withdraw", 3), ("fail", 8), ("mistake", 7),
              ("rival", 3), ("free", 6), ("clear", 3))  # fmt: skip

    async def act(self) -> str:
        """One action; returns what it was. Raises Broken."""
        names, weights = zip(*self.EDITS, *self.QUEUES, strict=True)
        said = ""
        while not said:
            name = self.rng.choices(names, weights)[0]
            if name == "connect" and sum(p.on for p in self.canvas.wire) >= 5:
                name = "remove"
            self.history.append(name)
            said = getattr(self.canvas, name)(self.rng) if name in dict(self.EDITS) else await getattr(self, name)()
            self.history.pop()
        self.tally.actions[name] += 1
        self.history.append(said)
        return said

    def start_over(self) -> None:
        """An empty canvas after a broken promise, so that one fault is not told many times."""
        self.canvas = Canvas(self.space)
        self.known.clear()
        self.read = self.log.stat().st_size

    # -- actions that queue --------------------------------------------------------------------------------------

    async def queue(self) -> str:
        outcome = await self.session.run(self._graph())
        return "queue: " + await self._judge(outcome)

    async def again(self) -> str:
        """The very same prompt: the host answers with what it has."""
        graph = self._graph()
        first = await self.session.run(graph)
        said = await self._judge(first, plain=False)
        second = await self.session.run(graph)
        expect(first.kind == second.kind, f"queued again: {first.kind}, then {second.kind} ({second.message})")
        if first.kind == "done" and second.outputs:
            same = torch.equal(await self.session.latent(first), await self.session.latent(second))
            expect(same, "queued again: another latent")
        self._check_log(failing=first.kind != "done")
        await self._plain()
        return f"again: {said}"

    async def two(self) -> str:
        """Two prompts in the queue, with a change between them."""
        first, before = self._graph(), self._copy()
        names = self.rng.choices(("widget", "setting", "bypass"), k=2)
        edits = [getattr(self.canvas, name)(self.rng) for name in names]
        second = self._graph()
        outcomes = [(await self.session.post(graph))[1] for graph in (first, second)]
        after, self.canvas = self.canvas, before
        said = await self._judge(await self.session.finish(outcomes[0]), plain=False)
        self.canvas = after
        said += ", " + await self._judge(await self.session.finish(outcomes[1]))
        return f"two ({'; '.join(edits)}): {said}"

    async def cancel(self) -> str:
        """Interrupted after so many steps; the run after it is as ever."""
        after = self.rng.randrange(4)
        prompt, outcome = await self.session.post(self._graph())
        await self.session.finish(outcome, lambda o: len(o.named("progress")) >= after)
        await self.session.send("/interrupt", {"prompt_id": prompt})
        await self.session.finish(outcome)
        words = outcome.message or outcome.kind
        expect(outcome.kind != "failed" or self._clear(outcome.message), f"cancelled: {words}")
        await self._settled()
        self.tally.outcomes["cancelled" if outcome.kind == "interrupted" else "cancelled too late"] += 1
        await self._plain()
        return f"cancel after {after}: {outcome.kind}; then " + await self._judge(
            await self.session.run(self._graph()), plain=False
        )

    async def withdraw(self) -> str:
        """Two in the queue, and the second is deleted before its turn."""
        _, outcome = await self.session.post(self._graph())
        prompt, second = await self.session.post(self.canvas.plain(self._next()))
        await self.session.send("/queue", {"delete": [prompt]})
        said = await self._judge(await self.session.finish(outcome), plain=False)
        queue = json.loads(await self.session.get("/queue"))
        if any(item[1] == prompt for item in queue["queue_running"] + queue["queue_pending"]):
            await self.session.finish(second)  # the first had ended before we could delete it
        await self._plain()
        return f"withdraw: {said}"

    async def fail(self) -> str:
        """A node that raises in the middle of a run: an error, out of memory, or a cancel."""
        values = {name: self.rng.choice(choices) for name, choices in NODES["StressFail"].items()}
        place = self.rng.randint(0, len(self.canvas.wire))
        self.canvas.wire.insert(place, Part("StressFail", values))
        try:
            outcome = await self.session.run(self._graph())
        finally:
            self.canvas.wire.pop(place)
        kind = "interrupted" if values["kind"] == "cancel" else "failed"
        if outcome.kind == "refused":
            expect(self._validated(outcome.message), f"refused without a sentence: {outcome.message}")
        elif outcome.kind == "failed":
            ours = WORDS in outcome.message and kind == "failed"
            expect(ours or self._clear(outcome.message), f"failed on purpose, and said: {outcome.message}")
        elif outcome.kind == "done":
            # later evaluations may be filled, or another model's
            late = values["at"] > 0 or self.canvas.on("SlipstreamHybridSwitch")
            expect(bool(late), "a node that raises at the first evaluation did not")
        else:
            expect(outcome.kind == kind, f"failed on purpose ({values['kind']}): {outcome.kind}")
        self._check_log(failing=True)
        self.tally.outcomes[f"on purpose: {values['kind']} -> {outcome.kind}"] += 1
        await self._plain()
        said = f"fail {values['kind']} at {values['at']}, place {place}: {outcome.kind}"
        if self.rng.random() < 0.5:
            said += "; then " + await self._judge(await self.session.run(self._graph()), plain=False)
        return said

    async def mistake(self) -> str:
        """A value that no widget offers."""
        there = [bad for bad in BAD if self.canvas.on(bad[0])]
        if not there:
            return ""
        self.canvas.bad = self.rng.choice(there)
        try:
            graph = self._graph()
            outcome = await self.session.run(graph)
        finally:
            bad, self.canvas.bad = self.canvas.bad, None
        expect(outcome.kind in ("refused", "failed"), f"{bad} was taken: {outcome.kind}")
        if outcome.kind == "refused":
            expect(self._validated(outcome.message), f"{bad}: {outcome.message}")
        else:
            expect(self._clear(outcome.message), f"{bad}: {outcome.type}: {outcome.message}")
        self._check_log(failing=True)
        self.tally.outcomes[f"mistake {outcome.kind}"] += 1
        await self._plain()
        return f"mistake {bad}: {outcome.kind}"

    async def rival(self) -> str:
        """Another step cache on the same model."""
        if not (self.canvas.on("SlipstreamCacheLoader") or self.canvas.on("SlipstreamTaylorPredictor")):
            return ""
        self.canvas.connect(self.rng, "EasyCache")
        try:
            outcome = await self.session.run(self._graph())
        finally:
            self.canvas.wire = [part for part in self.canvas.wire if part.kind != "EasyCache"]
        expect(outcome.kind in ("failed", "refused"), f"two step caches: {outcome.kind}")
        expect(outcome.kind == "refused" or self._clear(outcome.message), f"two step caches: {outcome.message}")
        self._check_log(failing=True)
        self.tally.outcomes["rival refused"] += 1
        await self._plain()
        return "rival: refused"

    async def free(self) -> str:
        wish = {"unload_models": True, "free_memory": self.rng.random() < 0.5}
        expect(await self.session.send("/free", wish) == 200, "/free was not taken")
        await self._plain()
        return f"free {wish}"

    async def clear(self) -> str:
        """The canvas is emptied, or the model's nodes are all bypassed."""
        if self.rng.random() < 0.5:
            self.canvas = Canvas(self.space)
        else:
            for part in self.canvas.wire:
                part.on = False
        return "clear: " + await self._judge(await self.session.run(self._graph()))

    # -- what must hold ------------------------------------------------------------------------------------------

    async def _judge(self, outcome: Outcome, plain: bool = True) -> str:
        """Whether the prompt that was queued from the canvas ended as it should; then the plain run."""
        self.last = outcome
        expect(outcome.kind in ("done", "refused", "failed"), f"ended as {outcome.kind}")
        told, result = outcome.kind, None
        if outcome.kind == "done":
            result = await self.session.latent(outcome)
            width, height = self.canvas.settings["size"]
            shape = (self.canvas.settings["batch"], 16, height // 8, width // 8)
            expect(tuple(result.shape) == shape, f"a latent of {tuple(result.shape)} where {shape} was asked for")
            expect(bool(result.isfinite().all()), "a latent that is not finite")
            self._check_reports(outcome)
            self._check_log(failing=False)
        else:
            words = self._validated if outcome.kind == "refused" else self._clear
            expect(words(outcome.message), f"{outcome.kind}: {outcome.type}: {outcome.message}")
            told = f"{outcome.kind} ({outcome.message[:90]})"
            self.tally.sentences[outcome.message[:160]] += 1
            self._check_log(failing=True)
        self.tally.outcomes[outcome.kind] += 1
        self._check_repeat(outcome.kind, result if result is not None else outcome.message)
        if plain:
            await self._plain()
        return told

    def _check_repeat(self, kind: str, result: object) -> None:
        """The same canvas as some time ago gives the same latent, or the same sentence."""
        quantise = self.canvas.on("SlipstreamW4A4Quantize")
        if quantise is not None and quantise.values["calibration"] == "first run":
            return  # measured at whatever ran first
        name = key(self.canvas.graph(0))
        if name not in self.known:
            self.known[name] = kind, result
            return
        self.tally.repeats += 1
        before, was = self.known[name]
        expect(before == kind, f"the same canvas was {before} and is {kind}: {result}")
        same = torch.equal(was, result) if kind == "done" else was == result
        expect(bool(same), "the same canvas as before gives another result")

    def _check_reports(self, outcome: Outcome) -> None:
        steps, sampler = self.canvas.settings["steps"], self.canvas.settings["sampler"]
        most = (2 if sampler in TWICE else 1) * steps + 1
        finished = outcome.named("slipstream.finished")
        told = [p for p in ("SlipstreamCacheLoader", "SlipstreamTaylorPredictor") if self.canvas.on(p)]
        ran = any(data["node"] == "5" for data in outcome.named("executing") if data["node"])
        if told and ran:
            expect(bool(finished), "a cached run without a report")
        for report in finished:
            if "computed" not in report:
                continue  # of a switch, which counts its models' steps
            self.tally.reports += 1
            self.tally.filled += report["filled"]
            total = report["computed"] + report["filled"]
            expect(report["evaluations"] == total <= most, f"{report['evaluations']} evaluations of {most} at most")
            expect(total == 0 or report["computed"] >= 1, "no evaluation was computed")
            expect(report["steps"] <= steps, f"{report['steps']} steps of {steps}")
            expect(-1e-9 <= report["computed"] - report["computed_share"] <= 0 or report["computed_share"] <= total,
                   "the share of the work is more than all of it")  # fmt: skip
            for name in ("drift_mean", "drift_max", "seconds", "seconds_saved", "cache_bytes"):
                value = report[name]
                expect(value is None or (math.isfinite(value) and value >= 0), f"{name} is {value}")

    def _check_log(self, failing: bool) -> None:
        """No error in the server's log, but for the one that was asked for."""
        with self.log.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        self.read += len(new)
        text = new.decode(errors="replace")
        alarm = ALARMS.search(text)
        expect(alarm is None, f"the log says: {alarm and text[alarm.start() : alarm.start() + 600]}")
        if not failing and not all(known in text for known in HOST_NOISE):
            at = text.find("Traceback (most recent call last)")
            expect(at < 0, f"an error in the log of a run that ended well: {text[max(0, at - 300) : at + 1500]}")

    async def _plain(self) -> None:
        """A run without any node of ours is bit-identical to that of a server that never had one."""
        graph = self.canvas.plain(self._next())
        name = key(graph)
        if name not in self.plain:
            clean = await self.reference.run(graph)
            expect(clean.kind == "done", f"the plain run of another server: {clean.kind} {clean.message}")
            self.plain[name] = await self.reference.latent(clean)
        outcome = await self.session.run(graph)
        expect(outcome.kind == "done", f"the plain run: {outcome.kind} {outcome.message}")
        expect(bool(torch.equal(await self.session.latent(outcome), self.plain[name])), "the plain run has changed")
        expect(not outcome.named("slipstream.finished"), "a plain run with a report of ours")
        self._check_log(failing=False)
        self.tally.plain_checks += 1

    async def _settled(self) -> None:
        queue = json.loads(await self.session.get("/queue"))
        expect(not queue["queue_running"] and not queue["queue_pending"], "the queue is not empty after a cancel")
        self._check_log(failing=True)

    @staticmethod
    def _clear(message: str) -> bool:
        """One sentence of ours: who says it, what, and nothing of Python's."""
        return message.startswith(NAMES) and "\n" not in message and "Traceback" not in message and len(message) < 500

    @staticmethod
    def _validated(message: str) -> bool:
        """What the host says about a prompt that it does not take, or one of our sentences in it."""
        found = json.loads(message)
        errors = [e for node in (found.get("node_errors") or {}).values() for e in node["errors"]]
        return bool(errors) and all(e["type"] in HOST for e in errors)

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _graph(self) -> dict:
        return self.canvas.graph(self._next())

    def _copy(self) -> Canvas:
        wire = [Part(p.kind, dict(p.values), p.on) for p in self.canvas.wire]
        return Canvas(self.space, dict(self.canvas.settings), wire)
