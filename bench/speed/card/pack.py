"""Packs what a bare machine lacks: the host's own files, and the packages that an image for cards does not have."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

from lab.boot import ROOT

FOLDER = ROOT / ".card"

# The host without its front end, its weights and its tests: folders, and files beside them.
FOLDERS = ("comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "app", "utils", "middleware")
FILES = (
    "folder_paths.py", "comfyui_version.py", "node_helpers.py", "latent_preview.py", "cuda_malloc.py", "nodes.py",
    "execution.py",
)  # fmt: skip
KINDS, LARGEST = (".py", ".json", ".yaml"), 300_000  # tokenizers are larger; nothing here reads one

# Pure Python that the host imports and that images with torch and Triton do not bring.
PACKAGES = ("torchsde", "trampoline")


def pack(folder: Path, host: Path | None = None) -> None:
    """Make `folder` anew: host/ and site/ from the host and the environment that this runs in."""
    host = host or Path(os.environ["COMFYUI_PATH"])
    shutil.rmtree(folder, ignore_errors=True)
    found = [path for name in FOLDERS for path in (host / name).rglob("*")] + [host / name for name in FILES]
    for path in found:
        if path.is_file() and path.suffix in KINDS and path.stat().st_size <= LARGEST:
            _copy(path, folder / "host" / path.relative_to(host))
    for name in PACKAGES:
        for file in importlib.metadata.files(name):
            if file.suffix == ".py":
                _copy(Path(file.locate()), folder / "site" / file)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
