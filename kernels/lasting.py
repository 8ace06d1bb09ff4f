"""Where kernels allocate what outlives a call: in the ordinary allocator, also where a host records a forward's.

Some hosts record what a forward allocates and replay the addresses in the next one. What is kept beyond a call, and
what is allocated at a first call only, must stay out of that record; how is the host's business, so it is handed in.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

_outside: Callable[[], AbstractContextManager] = contextlib.nullcontext
_inside = threading.local()


def allocate_in(outside: Callable[[], AbstractContextManager]) -> None:
    """Let `outside()` surround every allocation that lasts, on the thread that makes it."""
    global _outside
    _outside = outside


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """What is allocated here is in no host's record. Within another one it does nothing: a host's pause does not count,
    so the inner end would end the outer one too."""
    if getattr(_inside, "now", False):
        yield
        return
    _inside.now = True
    try:
        with _outside():
            yield
    finally:
        _inside.now = False
