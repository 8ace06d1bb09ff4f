"""The levels inside a network: how each is met, and what a run opens there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..families import Architecture
from . import stack, unet
from .calls import Asked, PatchedForward
from .each_block import EachSite
from .levels import DEPTH, EACH, ENCODER, FEATURES, STACK
from .stack import BlockSite
from .unet import UNetSite


@dataclass(frozen=True, slots=True)
class Inner:
    """One level. site: opened for one run with (run, network, its row, blocks that always run, the level's name);
    patches: of a patcher, its network and row, the forwards to patch, {patcher key: forward}."""

    site: Callable[[Asked, torch.nn.Module, Architecture, int, str], Any]
    patches: Callable[[Any, torch.nn.Module, Architecture], dict[str, PatchedForward]]


INNER: dict[str, Inner] = {
    STACK: Inner(BlockSite, stack.patched_forwards),
    FEATURES: Inner(BlockSite, stack.patched_forwards),
    EACH: Inner(EachSite, stack.patched_forwards),
    DEPTH: Inner(UNetSite, unet.patched_forwards),
    ENCODER: Inner(UNetSite, unet.patched_forwards),
}
