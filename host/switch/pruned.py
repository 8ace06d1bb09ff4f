"""Loads diffusers U-Nets that the host does not know but whose layers it has: BK-SDM's pruned SD1.5 and their like.

The host knows diffusers' U-Nets by a list of structures, and its own layout by looking. So the structure is read from
the names in the file, the tensors get the host's names, one for one, and the host's loader does the rest. Only
safetensors are read, and only as data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import comfy.model_detection
import comfy.sd
import comfy.utils
from safetensors import SafetensorError
from torch import Tensor

from ...engine.errors import SlipstreamError
from ..model_files import listed, path_of
from .bridge import name_of

NODE = "Load Pruned UNet"
KIND = ".safetensors"


def files() -> list[str]:
    """What the node offers."""
    return listed(KIND)


def load(name: str):
    """The file of models/diffusion_models as a ModelPatcher. Raises SlipstreamError."""
    return load_file(path_of(name, NODE))


def load_file(path: Path, disable_dynamic: bool = False):
    """The U-Net in a safetensors file, in the host's or in diffusers' layout. Raises SlipstreamError.

    disable_dynamic: what a newer host asks for when it wants a copy that stays where it is loaded.
    """
    if path.suffix.lower() != KIND:
        raise SlipstreamError(f"{NODE}: {path.name} is no safetensors file; convert it, nothing else is read here.")
    try:
        state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except (SafetensorError, OSError, ValueError, RuntimeError):
        raise SlipstreamError(f"{NODE}: {path.name} is damaged or no safetensors file; download it again.") from None
    options = {"metadata": metadata, **({"disable_dynamic": True} if disable_dynamic else {})}
    if not any(key.startswith("down_blocks.") for key in state):
        model = _built(state, path.name, options)
    else:
        # The host takes some pruned U-Nets for others of the same depth, so the names in the file come first.
        try:
            model = _built(renamed(state, path.name), path.name, options)
        except SlipstreamError:
            if comfy.model_detection.model_config_from_diffusers_unet(state) is None:
                raise
            model = _built(state, path.name, options)
    if hasattr(model, "cached_patcher_init"):
        model.cached_patcher_init = (load_file, (path,))
    return model


def _built(state: dict[str, Tensor], file: str, options: dict):
    """The host's loader on these tensors. Raises SlipstreamError where it knows no model, or not this one."""
    given = set(state)
    try:
        model = comfy.sd.load_diffusion_model_state_dict(state, **options)
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:  # it builds what the names promise
        layer = re.search(r"size mismatch for ([\w.]+)", str(error))
        what = f"its layer {layer[1]} has a shape" if layer else "it has layers"
        raise SlipstreamError(
            f"{NODE}: {file} cannot be loaded, {what} that the host cannot build; choose a pruned SD1.5, SD2 or SDXL."
        ) from None
    if model is None:
        raise SlipstreamError(
            f"{NODE}: {file} is of no kind that the host can build; pruned SD1.5, SD2 and SDXL can be loaded."
        )
    missing = sorted(key for key in model.model.diffusion_model.state_dict() if key not in given)
    if missing and "input_blocks.0.0.weight" in given:  # else the names are not yet the network's
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SlipstreamError(f"{NODE}: {file} is incomplete, it lacks {missing[0]}{more}; download it again.")
    return model


def summary(model) -> str:
    """One line for the node."""
    count = sum(p.numel() for p in model.model.diffusion_model.parameters())
    return f"{name_of(model)}, {count / 1e6:.0f} million parameters"


def renamed(state: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """A diffusers U-Net's tensors under the host's names, every one of them. Raises SlipstreamError."""
    names = comfy.utils.unet_to_diffusers(structure(state, file))
    foreign = sorted(key for key in state if key not in names)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise SlipstreamError(
            f"{NODE}: {file} has layers that the host's U-Net has not ({foreign[0][:80]}{more}); it is no pruned "
            "SD1.5, SD2 or SDXL."
        )
    return {names[key]: value for key, value in state.items()}


def structure(state: Mapping[str, Tensor], file: str) -> dict:
    """The host's description of a diffusers U-Net, from the names and shapes of its tensors. Raises SlipstreamError."""
    entry = state.get("conv_in.weight")
    if entry is None or entry.ndim != 4 or not any(key.startswith("down_blocks.0.resnets.0.") for key in state):
        raise SlipstreamError(
            f"{NODE}: {file} is no U-Net in diffusers' layout; use Load Diffusion Model for other models."
        )
    keys = list(state)
    down = [_depths(keys, f"down_blocks.{i}") for i in range(_count(keys, "down_blocks"))]
    up = [_depths(keys, f"up_blocks.{i}") for i in range(_count(keys, "up_blocks"))]
    blocks = [len(depths) for depths in down]
    if not all(blocks) or [len(depths) - 1 for depths in up] != blocks[::-1]:
        raise SlipstreamError(
            f"{NODE}: {file} has {blocks} residual blocks on the way down and {[len(d) for d in up]} on the way up, "
            "which the host's U-Net cannot have; it is incomplete or of another kind."
        )
    middle = -2
    if _count(keys, "mid_block.resnets"):
        middle = _count(keys, "mid_block.attentions.0.transformer_blocks") or -1
    widths = [state.get(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(len(down))]
    return {
        "num_res_blocks": blocks,
        "channel_mult": [0 if w is None else w.shape[0] // entry.shape[0] for w in widths],
        "transformer_depth": [depth for depths in down for depth in depths],
        "transformer_depth_output": [depth for depths in up for depth in depths][::-1],
        "transformer_depth_middle": middle,
    }


def _count(keys: Iterable[str], part: str) -> int:
    """How many of `part.0`, `part.1`, ... there are, without a gap."""
    found = {int(key[len(part) + 1 :].split(".")[0]) for key in keys if re.match(re.escape(part) + r"\.\d+\.", key)}
    return next(i for i in range(len(found) + 1) if i not in found)


def _depths(keys: list[str], block: str) -> list[int]:
    """The number of transformer blocks beside each residual block."""
    counts = range(_count(keys, f"{block}.resnets"))
    return [_count(keys, f"{block}.attentions.{i}.transformer_blocks") for i in counts]
