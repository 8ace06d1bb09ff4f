"""What the registry ships: the files git knows, without those that `.comfyignore` names."""

from __future__ import annotations

import ast
import subprocess
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def listed(*options: str) -> set[str]:
    """Paths of the files that git knows or, by the options, would know. Skips the test outside of a checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", *options]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this folder is no git checkout, so nothing tells which files are shipped")
    return set(found.split("\0")) - {""}


@lru_cache(maxsize=1)
def shipped() -> tuple[str, ...]:
    """Paths relative to ROOT, with slashes, sorted. New files that git does not ignore count."""
    ignored = listed("--ignored", f"--exclude-from={ROOT / '.comfyignore'}")
    return tuple(sorted(name for name in listed("--exclude-standard") - ignored if (ROOT / name).is_file()))


@cache
def tree(path: Path) -> ast.Module:
    """A Python file as its syntax tree, parsed once for all promises; it must not change afterwards."""
    return ast.parse(path.read_text(encoding="utf-8"))
