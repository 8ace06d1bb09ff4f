"""What files may be called."""

from __future__ import annotations

import re
import unicodedata

# Windows opens a device under these names, whatever ends the name has.
DEVICES = re.compile(r"(CON|PRN|AUX|NUL|(COM|LPT)[0-9]) *(\..*)?", re.IGNORECASE)


def is_file_name(name: str) -> bool:
    """Whether this names a file of at most 121 characters on every system: no path, no drive, no device."""
    # ¹ and full-width letters count as the ones they look like
    return bool(re.fullmatch(r"\w[\w .+-]{0,120}", name)) and not DEVICES.fullmatch(unicodedata.normalize("NFKC", name))
