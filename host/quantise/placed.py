"""The quantised layers of one network, and how they are put in the places of its own."""

from __future__ import annotations

import copy
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...quant.linear import W4A4Linear
from ...quant.policy import Choice
from ..parts import QUANTISED, put_on
from .loras import PREFIX, give_loras


@dataclass(frozen=True, slots=True)
class Check:
    """The first run's end: signal to noise of its last denoised latent against the 16-bit network's, in dB, before and
    after `raised` layers got 8 bit."""

    before: float
    after: float
    raised: tuple[str, ...] = ()


class Quantised:
    """The quantised layers of one network for one wish, by their path below `diffusion_model`.

    layers: what is placed; choices: what the policy and the guard decided for every linear layer of the network. Lives
    as long as a patcher or one of its layers does: a network that is loaded with them holds them, nothing else.
    saved: bytes less than the originals; sqnr: dB of the 4-bit layers that the guard measured; how: what the layers
    were made from, in words.
    """

    def __init__(
        self,
        layers: Mapping[str, W4A4Linear],
        choices: Mapping[str, Choice],
        saved: int = 0,
        sqnr: Mapping[str, float] | None = None,
        how: str = "",
        check: Check | None = None,
    ) -> None:
        self.layers, self.choices = dict(layers), dict(choices)
        self.saved, self.sqnr, self.how, self.check = saved, dict(sqnr or {}), how, check
        self.id = uuid.uuid4()
        self._copies: weakref.WeakKeyDictionary[torch.nn.Module, Quantised] = weakref.WeakKeyDictionary()
        for layer in self.layers.values():
            layer.made = self
        share_inputs(self.layers, choices)

    def __deepcopy__(self, memo: dict) -> Quantised:
        return self  # a copy of one layer is not to copy them all

    def take_off(self, patcher) -> None:
        """Put the network's own weights back where these layers are placed."""
        size = patcher.model_size() + self.saved
        for name in self.layers:
            patcher.object_patches.pop(PREFIX + name, None)
        patcher.size = size
        # else the host would take the quantised layers that are loaded now for this patcher's weights
        patcher.patches_uuid = uuid.uuid4()
        for callback in (CallbacksMP.ON_LOAD, CallbacksMP.ON_CLONE):
            patcher.remove_callbacks_with_key(callback, QUANTISED)

    def own_layers(self, patcher, clone) -> None:
        """ON_CLONE: a clone with another network, for another card, gets copies of the layers; once per network."""
        if clone.model is patcher.model:
            return
        found = self._copies.get(clone.model)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                layers = {name: copy.deepcopy(layer).to(clone.offload_device) for name, layer in self.layers.items()}
            found = self._copies[clone.model] = Quantised(
                layers, self.choices, self.saved, self.sqnr, self.how, self.check
            )
        for name, layer in found.layers.items():
            clone.object_patches[PREFIX + name] = layer


def share_inputs(layers: Mapping[str, torch.nn.Module], choices: Mapping[str, Choice]) -> None:
    """Let the layers of a group that were made with one smooth factor and one projection quantise their input once."""
    groups: dict[str, list[W4A4Linear]] = {}
    for name, layer in layers.items():
        if isinstance(layer, W4A4Linear):
            groups.setdefault(choices[name].group if name in choices else name, []).append(layer)
    for members in groups.values():
        first = _input_side(members[0])
        if len(members) > 1 and all(_same(first, _input_side(layer)) for layer in members[1:]):
            share = (uuid.uuid4(), len(members))
            for layer in members:
                layer.share = share


def _input_side(layer: W4A4Linear) -> tuple:
    found = layer.layer(lora=False)
    tensors = (getattr(found, "smooth", None), getattr(found, "proj_down", None))
    return tensors, (layer.format, layer.rotation, getattr(found, "act_unsigned", None))


def _same(one: tuple, other: tuple) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return one[1] == other[1] and all(map(equal, one[0], other[0]))


def place(patcher, found: Quantised) -> None:
    """Put the layers on this patcher, which may be waiting for them, in the memory that they take."""
    size = patcher.model_size()
    for name, layer in found.layers.items():
        replaced = patcher.get_model_object(PREFIX + name)
        size += comfy.model_management.module_size(layer) - comfy.model_management.module_size(replaced)
        patcher.add_object_patch(PREFIX + name, layer)
    # the host measures the network as it is loaded now, which may be without these layers
    patcher.size = size
    # of its own, or the host would take what is loaded now for this patcher's weights; the same for clones with the
    # same layers and LoRAs, which really have the same weights
    patcher.patches_uuid = uuid.uuid5(found.id, str(patcher.patches_uuid))
    put_on(patcher, QUANTISED, found)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, QUANTISED)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, QUANTISED, give_loras)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, QUANTISED)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, QUANTISED, found.own_layers)
