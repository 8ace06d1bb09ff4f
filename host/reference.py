"""The reference of an anchor: for one evaluation, better weights in the places of a model's 4-bit layers.

Rounded weights err the same way on neighbouring steps, rounded activations do not, so an anchor needs better weights:
an 8-bit copy is as good as the 16-bit original (`docs/compensation.md`), at half its memory. The copy is made at the
first anchor, lies in RAM and goes to the device layer by layer, call by call. It belongs to the layers, not to a run,
so that the next run does not make it again, and goes with them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import comfy.lora
import torch
from torch import Tensor

from ..quant.layer import METHODS, quantise_linear, with_spec
from ..quant.linear import W4A4Linear
from ..quant.rotate import rotation_size
from .plan import EIGHT_BIT
from .quant_loras import PREFIX, original, quantised_modules

# 8-bit copies: the 4-bit layer -> (which LoRAs are in it, the copy on the CPU).
_COPIES: WeakKeyDictionary[W4A4Linear, tuple[object, W4A4Linear]] = WeakKeyDictionary()


class Reference:
    """What a patcher's quantised layers were made from. seconds: of making copies; nbytes: what they hold."""

    def __init__(self, patcher, kind: str = EIGHT_BIT):
        self.patcher, self.kind = patcher, kind
        self.seconds, self.nbytes = 0.0, 0
        self.layers, self.quantised = _with_originals(patcher, kind)
        self._forwards: dict[str, object] = {}

    @property
    def why_not(self) -> str:
        """Why nothing better than the model itself can be asked; empty where something can."""
        if self.layers:
            return ""
        if self.quantised:
            return "the 16-bit weights are not in memory, as this model comes from a quantised file"
        return "no layer of this model is quantised"

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the reference. The layers' own forward is back afterwards whatever happens.

        An attribute of the instance hides the class's forward and is deleted again: nothing is moved or loaded.
        """
        if len(self._forwards) < len(self.layers):
            self._make()
        try:
            for path, (layer, _) in self.layers.items():
                layer.forward = self._forwards[path]
            yield
        finally:
            for layer, _ in self.layers.values():
                layer.__dict__.pop("forward", None)

    def _make(self) -> None:
        started = time.perf_counter()
        for path, (layer, own) in self.layers.items():
            if self.kind == EIGHT_BIT and rotation_size(own.weight.shape[1]):
                copy = self._copy(path, layer, own)
                self.nbytes += sum(p.numel() * p.element_size() for p in copy.parameters())
                self._forwards[path] = copy.forward
            else:
                self._forwards[path] = self._original(path, own)
        self.seconds = time.perf_counter() - started

    def _copy(self, path: str, layer: W4A4Linear, own: torch.nn.Module) -> W4A4Linear:
        patched = any(self.patcher.patches.get(f"{path}.{part}") for part in ("weight", "bias"))
        mark = self.patcher.patches_uuid if patched else None
        known = _COPIES.get(layer)
        if known is not None and known[0] == mark:
            return known[1]
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = (self._patched(path, own, part) for part in ("weight", "bias"))
            spec = with_spec(METHODS["int8_convrot"], group_size=rotation_size(weight.shape[1]))
            copy = W4A4Linear(quantise_linear(weight, bias, spec).layer).to("cpu")
        _COPIES[layer] = mark, copy
        return copy

    def _patched(self, path: str, own: torch.nn.Module, part: str) -> Tensor | None:
        """The original's parameter with the patcher's LoRAs, on the load device; a private tensor where there are."""
        tensor = original(self.patcher, path.removeprefix(PREFIX), own, part)
        patches = self.patcher.patches.get(f"{path}.{part}")
        if tensor is None or not patches:
            return None if tensor is None else tensor.clone() if part == "bias" else tensor
        return comfy.lora.calculate_weight(patches, tensor.float().clone(), f"{path}.{part}").to(tensor.dtype)

    def _original(self, path: str, own: torch.nn.Module):
        def forward(x: Tensor) -> Tensor:
            weight, bias = (self._patched(path, own, part) for part in ("weight", "bias"))
            there = {"device": x.device, "dtype": x.dtype}
            return torch.nn.functional.linear(x, weight.to(**there), None if bias is None else bias.to(**there))

        return forward

    def close(self) -> None:
        """Let go of the patcher and its layers; the copies stay with those."""
        self.layers, self._forwards, self.patcher = {}, {}, None


def _with_originals(patcher, kind: str) -> tuple[dict[str, tuple[W4A4Linear, torch.nn.Module]], int]:
    """{path: (layer, its original)} of a loaded patcher's layers that the reference is better than, and how many such
    layers it has with or without an original."""
    found, count = {}, 0
    for path, layer in quantised_modules(patcher):
        if kind == EIGHT_BIT and layer.format == "int8_convrot":
            continue
        count += 1
        own = patcher.object_patches_backup.get(path)
        if own is not None and not isinstance(own, W4A4Linear):
            found[path] = layer, own
    return found, count
