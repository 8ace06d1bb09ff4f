"""What is stored of every stream of a run.

A stream is what one conditioning sees of the model: its key holds the cond index, the host's uuid, the context window,
the shape, dtype and device, and how many calls of the same kind came before in this evaluation.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..forecast.history import History, Storage
from ..forecast.schedules import Probe
from ..forecast.token_select import candidates, choose, combine
from ..sites.calls import Key, Keys, Parts
from .evaluation import Open
from .given import Given, Memory


class NoRoom(Exception):
    """The budget has no room; the message is a sentence."""


class Streams:
    """The histories of one run and of what its gate looks at. The host may call from several threads at once."""

    def __init__(self, given: Given, memory: Memory):
        self.predictor, self.memory = given.predictor, memory
        self.probe = given.probe
        self.lock = threading.Lock()
        self.histories: dict[Key, History] = {}
        self.probes: dict[Key, History] = {}
        gate = given.schedule.order + 1 if given.schedule is not None and self.probe is Probe.FORECAST else 1
        self._probe_anchors = max(gate, self.predictor.anchors) if self.predictor.per_token else gate

    @property
    def nbytes(self) -> int:
        return sum(h.nbytes for h in (*self.histories.values(), *self.probes.values()))

    def keys(self, opened: Open, options: dict, x: Tensor) -> Keys | None:
        """The streams in one model call on x [B, ...], in batch order; None where the options do not tell them."""
        conds, uuids = options.get("cond_or_uncond"), options.get("uuids")
        if not conds or x.shape[0] % len(conds):
            return None
        window = options.get("context_window")
        window = tuple(getattr(window, "index_list", ())) if window is not None else ()
        keys = []
        with self.lock:
            for i, cond in enumerate(conds):
                shape = (x.shape[0] // len(conds), *x.shape[1:])
                kind = (cond, uuids[i] if uuids else None, window, shape, x.dtype, x.device)
                keys.append((*kind, opened.seen[kind]))
                opened.seen[kind] += 1
        return keys

    def stored(self, keys: Keys) -> list[History] | None:
        """What is stored of these streams, None where one has nothing; another thread may drop them all meanwhile."""
        found = [self.histories.get(key) for key in keys]
        whole = [history for history in found if history]
        return whole if len(whole) == len(found) else None

    def forecast(self, key: Key, history: History, u: float, probe: Parts | None) -> tuple[Parts, int]:
        """(new tensors forecast for time u, the order used). probe: this evaluation's, for a choice per token."""
        seen = self.probes.get(key)
        if not self.predictor.per_token or probe is None or seen is None or seen.times != history.times:
            return history.forecast(u, self.predictor)
        rows = candidates(history.times, u)
        index = choose(seen.column(), probe[0], rows)
        order = self.predictor.weights(history.times, u)[1]
        return tuple(combine(history.column(p), index, rows) for p in range(len(history.newest))), order

    def see(self, u: float, keys: Keys, probes: list[Parts]) -> None:
        """Keep the newest probe of each stream, whatever becomes of the evaluation."""
        for key, probe in zip(keys, probes, strict=False):
            self.probes.setdefault(key, History(1)).push(u, probe)

    def push_probe(self, u: float, key: Key, probe: Parts, owned: bool) -> None:
        """Store the probe of a computed evaluation beside its snapshot."""
        if key in self.probes and self._beside:
            self.probes[key].push(u, probe, owned)

    @property
    def _beside(self) -> bool:
        return self.probe in (Probe.RESIDUAL, Probe.FORECAST)

    def opened(self, key: Key, parts: Parts, probe: Parts | None) -> History:
        """The history of a stream; a new one, and one for its probe, where there is none yet. Raises NoRoom."""
        history = self.histories.get(key)
        if history is not None:
            return history
        size = nbytes(parts) * self.predictor.anchors
        probed = probe is not None and self._beside
        if probe is not None and probed:
            size += nbytes(probe) * self._probe_anchors
        storage = self.room(size, parts[0].device)
        history = self.histories[key] = History(self.predictor.anchors, storage)
        if probed:
            self.probes[key] = History(self._probe_anchors, storage)
        return history

    def room(self, size: int, device: torch.device) -> Storage:
        """Where `size` bytes of a prompt go. Raises NoRoom where the budget has none."""
        storage = self.memory.place(size, device)
        if storage is None:
            limit = self.memory.limit(device) / 1e6
            raise NoRoom(f"the cache needs {size / 1e6:.1f} MB per prompt, more than the budget of {limit:.1f} MB")
        return storage

    def orders(self, histories: list[History], u: float) -> list[int]:
        """The orders of the forecasts for time u."""
        return [self.predictor.weights(history.times, u)[1] for history in histories]

    def forget(self) -> None:
        """Drop every snapshot and what was planned for them."""
        self.histories.clear()
        self.probes.clear()
        self.memory.planned = 0


def nbytes(parts: Parts) -> int:
    """Bytes of these tensors."""
    return sum(t.numel() * t.element_size() for t in parts)
