"""Where profiles live: `models/slipstream_profiles`, found and listed by the host's own folder list."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...engine.calibration.profile import Profile, ProfileError
from ...engine.errors import SlipstreamError
from ...engine.files import is_file_name

FOLDER = "slipstream_profiles"
USER_FOLDER = "__slipstream"  # of the user; the host serves no folder whose name starts with two underscores
NONE, AUTO = CHOICES = "none", "auto"

# The name of a profile that a calibration hands over and that is in no file.
HANDED = "(calibration)"


def register() -> None:
    """Make the folder known to the host, beside its own model folders."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        path = os.path.join(folder_paths.models_dir, FOLDER)
        folder_paths.folder_names_and_paths[FOLDER] = ([path], {".safetensors"})


def names() -> list[str]:
    """What there is to choose from, for a list on the canvas."""
    return [AUTO, NONE, *files()]


def files() -> list[str]:
    """The profiles there are."""
    register()
    return folder_paths.get_filename_list(FOLDER)


def load(name: str, node: str = "Cache Loader") -> Profile:
    """Read a profile by the name in the list, for a node. Raises SlipstreamError."""
    register()
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise SlipstreamError(
            f"{node}: there is no profile '{name}' in models/{FOLDER}; choose another, or none, or calibrate."
        )
    try:
        return Profile.load(Path(path))
    except ProfileError as error:
        raise SlipstreamError(f"{node}: {error}; choose another profile, or none, or calibrate again.") from None


def fitting(
    model: str, predictor: str, site: str, sampler: str, sigmas: Sequence[float]
) -> tuple[str, Profile] | tuple[None, None]:
    """The profile that `auto` takes for this sampling, with its name; (None, None) where none fits.

    It fits if it was measured on this model (a fingerprint), site and predictor, and over this range of sigmas. Of
    several, one of the same sampler goes first, then of the same number of steps, then the newest.
    """
    found = []
    for name in files():
        path = Path(folder_paths.get_full_path(FOLDER, name) or "")
        try:
            changed = path.stat().st_mtime_ns
            profile = _read(path, changed)
            if (profile.model, profile.predictor, profile.site) != (model, predictor, site):
                continue
            profile.keys_for(sigmas)
        except (OSError, ProfileError):
            continue  # a damaged file, or another range: not for this run, and the user did not ask for it
        same = (profile.about.get("sampler") == sampler, profile.steps == len(sigmas) - 1, changed)
        found.append((same, name, profile))
    if not found:
        return None, None
    _, name, profile = max(found, key=lambda f: (f[0], f[1]))
    return name, profile


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> Profile:
    """A profile without its further statistics, remembered while its file stays as it is."""
    return dataclasses.replace(Profile.load(path), extras={})


def file_name(name: str) -> str | None:
    """The file a profile of this name is written to; None for a name with a path, or nothing, in it."""
    if not is_file_name(name):
        return None
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def save(name: str, profile: Profile) -> str:
    """Write a profile and return its name in the list. Raises SlipstreamError for a name with a path in it."""
    register()
    file = file_name(name)
    if file is None:
        raise SlipstreamError(
            f"Calibrate: '{name}' is no file name; use letters, digits, spaces, dots, dashes and underscores."
        )
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profile.save(folder / file)
    except OSError as error:
        raise SlipstreamError(
            f"Calibrate: {file} could not be written ({error.strerror or error}); check room and rights of "
            f"models/{FOLDER}."
        ) from error
    # The host lists a folder anew when its time changes, and two changes within one clock tick look like one.
    folder_paths.filename_list_cache.pop(FOLDER, None)
    return file


def _first_name(name: str) -> str:
    """A parameter's name as ComfyUI 0.3.75 has it; Flux's `query_norm.scale` is `query_norm.weight` in later ones."""
    return re.sub(r"\b(query|key)_norm\.weight$", r"\1_norm.scale", name)


def fingerprint(model) -> str:
    """Which model a profile was measured on: its class, and names and shapes of its parameters, not their values.

    Of this patcher's own modules: another patcher's may lie in the network now (quantised layers).
    """
    network = model.get_model_object("diffusion_model")
    shapes = {}
    for path, found in network.named_modules():
        module = model.get_model_object(f"diffusion_model.{path}") if path else found
        for name, parameter in module.named_parameters(recurse=False):
            shapes[_first_name(f"{path}.{name}" if path else name)] = tuple(parameter.shape)
    digest = hashlib.sha256(type(model.model).__name__.encode())
    for name, shape in sorted(shapes.items()):
        digest.update(f"{name}{shape}".encode())
    return digest.hexdigest()[:16]
