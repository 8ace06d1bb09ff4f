"""Where profiles live: `models/slipstream_profiles`, found and listed by the host's own folder list."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import folder_paths

from ..engine.profile import Profile, ProfileError
from .errors import SlipstreamError

FOLDER = "slipstream_profiles"
NONE = "none"


def register() -> None:
    """Make the folder known to the host, beside its own model folders."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        path = os.path.join(folder_paths.models_dir, FOLDER)
        folder_paths.folder_names_and_paths[FOLDER] = ([path], {".safetensors"})


def names() -> list[str]:
    """The profiles there are, for a list on the canvas."""
    register()
    return [NONE, *folder_paths.get_filename_list(FOLDER)]


def load(name: str) -> Profile:
    """Read a profile by the name in the list. Raises SlipstreamError."""
    register()
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise SlipstreamError(
            f"Cache Loader: there is no profile '{name}' in models/{FOLDER}; choose another, or none, or calibrate."
        )
    try:
        return Profile.load(Path(path))
    except ProfileError as error:
        raise SlipstreamError(f"Cache Loader: {error}; choose another profile, or none, or calibrate again.") from None


def save(name: str, profile: Profile) -> str:
    """Write a profile and return its name in the list. Raises SlipstreamError for a name with a path in it."""
    register()
    if not re.fullmatch(r"[\w][\w .+-]{0,120}", name):
        raise SlipstreamError(
            f"Calibrate: '{name}' is no file name; use letters, digits, spaces, dots, dashes and underscores."
        )
    file = name if name.endswith(".safetensors") else f"{name}.safetensors"
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    profile.save(folder / file)
    return file


def fingerprint(model) -> str:
    """Which model a profile was measured on: its class, and names and shapes of its parameters, not their values."""
    network = model.get_model_object("diffusion_model")
    digest = hashlib.sha256(type(model.model).__name__.encode())
    for name, parameter in sorted(network.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    return digest.hexdigest()[:16]
