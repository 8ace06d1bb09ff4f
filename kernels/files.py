"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

PART = ".part"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which is `path` from the end on; whatever fails, an older file stays as it was.

    It has a temporary name beside `path`, of this process and thread: two that write one name do not share it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{PART}")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`, see `whole`. Raises OSError."""
    with whole(path) as file:
        file.write(data)


def left_over(path: Path, alive: Callable[[int], bool]) -> list[Path]:
    """What writers of `path` left behind that were killed. alive: whether a process of this number runs."""
    found = []
    threads = {str(thread.ident) for thread in threading.enumerate()}
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.*{PART}"):
        process, _, thread = part.name[len(path.name) + 1 : -len(PART)].partition(".")
        if process.isdecimal() and thread.isdecimal():
            # a restarted container gives the same number again
            own = int(process) == os.getpid()
            if thread not in threads if own else not alive(int(process)):
                found.append(part)
    return found
