"""The host's folder of networks: what is listed of it, and where a listed file is."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..engine.errors import SlipstreamError

FOLDER = "diffusion_models"


def listed(*endings: str) -> list[str]:
    """The files of models/diffusion_models with one of these endings in any case, for a list on the canvas."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(endings)]


def path_of(name: str, node: str) -> Path:
    """Where a file of the list is. Raises SlipstreamError, in the name of `node`."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise SlipstreamError(f"{node}: there is no file '{name}' in models/{FOLDER}; choose another from the list.")
    return Path(path)
