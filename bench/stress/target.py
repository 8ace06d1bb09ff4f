"""What one fuzzed thing is, and what the targets share. Needs a booted host."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import comfy.sample
import folder_paths
import torch

from demo import emoji

Case = Callable[[], object]
NAME = "fuzzed.safetensors"


class Target:
    """One thing that reads. share: of the cases of a long run; folder: the only place where it may write."""

    share = 1.0

    def __init__(self, folder: Path):
        self.folder = folder

    def case(self, rng: Random) -> Case:
        raise NotImplementedError


def place_of(folder: Path, name: str) -> Path:
    """The host's folder of this name becomes one below `folder`."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    folder_paths.folder_names_and_paths[name] = ([str(place)], {".safetensors", ".sft", ".gguf"})
    folder_paths.filename_list_cache.pop(name, None)
    return place


def sample(model, steps: int = 5) -> torch.Tensor:
    """A short sampling at the smallest size; the result has to be finite."""
    latent = torch.zeros(1, 16, 4, 4)
    text = emoji.conditioning("hamburger")
    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        found = comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=1
        )
    assert math.isfinite(float(found.abs().max())), "a sampling that is not finite"
    return found
