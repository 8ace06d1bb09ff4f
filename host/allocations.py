"""Keeps our tensors out of the host's record of a forward's allocations (its compiler, on by default since 0.34).

Such a host records what a network's forward allocates, once, and gives out the same addresses in every later forward.
An evaluation that is filled allocates less, one that asks for better weights more, and what is kept for the next
evaluation would lie where another forward writes. To pause the record around what is kept lets one prompt pass and
crashes the next one, so there is none while a run may skip.

No public call does that. The host reads its own command-line switch at every forward, and `unrecorded` sets it for the
time of a run: the one place where more is touched than public patcher calls. Written after the sources of
`comfy/model_prefetch.py` that other projects carry, and tested with a stand-in of the recorder (`tests/recorder.py`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

from comfy.cli_args import args

log = logging.getLogger("slipstream")

SWITCH = "disable_comfy_compiler"


class _Record:
    """How many runs want no record, and what the user's switch was before the first of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs, self.given, self.said = 0, False, False


_record = _Record()


@contextlib.contextmanager
def unrecorded(wanted: bool = True) -> Iterator[None]:
    """The host records and replays no forward's allocations meanwhile, in any thread; nothing is done where `wanted`
    is false or the host has no such record."""
    if not wanted or not hasattr(args, SWITCH):
        yield
        return
    with _record.lock:
        if not _record.runs:
            _record.given = getattr(args, SWITCH)
            setattr(args, SWITCH, True)
        _record.runs += 1
        if not _record.given and not _record.said:
            _record.said = True
            log.info("Slipstream: ComfyUI's compiler rests in runs that may skip, because it replays allocations.")
    try:
        yield
    finally:
        with _record.lock:
            _record.runs -= 1
            if not _record.runs:
                setattr(args, SWITCH, _record.given)


def outside() -> AbstractContextManager:
    """What is allocated in this context, on this thread, is in no record: for what lasts where a run is recorded."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause()
