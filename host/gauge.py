"""The most memory in use while something runs: what torch has allocated on a card, else the process's RAM."""

from __future__ import annotations

import contextlib
import threading
import time

import torch

ON_CARD, IN_RAM = "GPU, allocated by torch", "RAM of the process"

# The device types that work behind the CPU and count what torch allocates.
CARDS = ("cuda", "xpu")

# Seconds between two looks at the process's RAM; one look takes about 20 microseconds.
INTERVAL = 0.01


def clocked(device: torch.device) -> float:
    """The time in seconds, with what was started on the device done, so that work is charged where it was asked for."""
    if device.type in CARDS:
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()


class Gauge:
    """A context manager; `reading` says what was seen. The count of a card is torch's own peak, set back on entry.

    watch_ram: without a card look at the process's RAM all the while, from a thread; else nothing is known then. On
    leaving the card has finished its work, so that a clock read afterwards is right.
    """

    def __init__(self, device: torch.device, watch_ram: bool = False):
        self._device = device
        self._card = getattr(torch, device.type, None) if device.type in CARDS else None
        self._watch_ram = watch_ram and self._card is None
        self._most: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def reading(self) -> dict:
        """{"peak_memory_bytes", "peak_memory_of"}; both None where nothing is known."""
        of = None if self._most is None else IN_RAM if self._card is None else ON_CARD
        return {"peak_memory_bytes": self._most, "peak_memory_of": of}

    def __enter__(self) -> Gauge:
        if self._card is not None:
            with contextlib.suppress(RuntimeError):  # an allocator without statistics
                self._card.reset_peak_memory_stats(self._device)
        elif self._watch_ram:
            self._thread = threading.Thread(target=self._watch, name="slipstream memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        if self._card is not None and kind is None:
            self._card.synchronize(self._device)
            with contextlib.suppress(RuntimeError):
                self._most = int(self._card.max_memory_allocated(self._device))

    def _watch(self) -> None:
        try:
            import psutil
        except ImportError:  # the host brings it; without it the number is left out
            return
        process = psutil.Process()
        while True:
            self._most = max(self._most or 0, process.memory_info().rss)
            if self._stop.wait(INTERVAL):
                return
