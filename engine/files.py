"""Files: what they may be called, and that they are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import unicodedata
from pathlib import Path

# Windows opens a device under these names, whatever ends the name has.
DEVICES = re.compile(r"(CON|PRN|AUX|NUL|(COM|LPT)[0-9]) *(\..*)?", re.IGNORECASE)


def is_file_name(name: str) -> bool:
    """Whether this names a file of at most 121 characters on every system: no path, no drive, no device."""
    # ¹ and full-width letters count as the ones they look like
    return bool(re.fullmatch(r"\w[\w .+-]{0,120}", name)) and not DEVICES.fullmatch(unicodedata.normalize("NFKC", name))


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name beside `path`, then rename; whatever fails, an older file stays as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
