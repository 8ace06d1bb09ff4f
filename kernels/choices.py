"""The file of what was measured: per card and versions, the implementation chosen for each layer kind and shape."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import torch

from .files import write_whole
from .implementations import triton_version

VERSION = 1  # of the kernels: choices measured with others are measured again

_writing = threading.Lock()


def header(label: str) -> dict:
    """What choices hold for: the card's name and the versions."""
    version = triton_version()
    triton = None if version is None else list(version)
    return {"version": VERSION, "device": label, "torch": torch.__version__, "triton": triton}


class Choices:
    """Key -> {name, config, milliseconds}, in memory and, with a folder, in a file of it.

    A file that is missing, damaged, of another card or of other versions is as good as empty, and replaced.
    """

    def __init__(self, folder: Path | None, label: str):
        self.header = header(label)
        mark = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:10]
        self.path = None if folder is None else folder / f"kernels-{mark}.json"
        self.entries: dict[str, dict] = self._in_file()

    def _in_file(self) -> dict[str, dict]:
        try:
            found = {} if self.path is None else json.loads(self.path.read_text(encoding="utf-8"))
            if found.get("header") == self.header:
                return {k: v for k, v in found["choices"].items() if _readable(v)}
        except (OSError, ValueError, AttributeError, KeyError, RecursionError):
            pass
        return {}

    def get(self, key: str) -> dict:
        """The entry, or an empty one."""
        return self.entries.get(key, {})

    def keep(self, key: str, entry: dict) -> None:
        """Remember an entry and write the file whole under another name first. Raises OSError when it cannot be."""
        self.entries[key] = entry
        if self.path is None:
            return
        with _writing:
            # another card of the same kind, or another process, may have added to it
            self.entries = {**self._in_file(), **self.entries}
            text = json.dumps({"header": self.header, "choices": self.entries}, indent=1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, text.encode())


def _readable(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    return isinstance(entry.get("config"), list) and isinstance(entry.get("milliseconds"), dict)
