"""The reference of an anchor: what is asked beside the model itself at a few evaluations.

Better weights in the places of a model's 4-bit layers. Rounded weights err the same way on neighbouring steps, rounded
activations do not, so an anchor needs better weights: an 8-bit copy is as good as the 16-bit original
(`docs/compensation.md`), at half its memory. The copy is made at the first anchor, lies in RAM and goes to the device
layer by layer, call by call. It belongs to the layers, not to a run, so that the next run does not make it again, and
goes with them.

Beside these, the large model of a switched run, for the smaller one; and the model itself without its cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

import comfy.lora
import torch
from torch import Tensor

from ...engine.correction.anchors import DECAY, automatic
from ...engine.run.plan import AUTOMATIC, EIGHT_BIT, LARGE_MODEL, UNCACHED
from ...engine.sites.calls import ASKING
from ...quant.formats import FORMATS, INT8
from ...quant.layer import quantise_linear, spec_for
from ...quant.linear import W4A4Linear
from ..quantise.loras import PREFIX, original, quantised_modules
from ..switch.segments import TURN

# Two models differ by a smooth function of the state, which lasts longer than what rounding does
# (bench/quality/compensation.py, 2 anchors in 12 steps: 40.2 dB with all of it, 37.3 dB with .9 left per step).
MODEL_DECAY = 1.0

# Two runs may ask for better weights of one layer at the same time.
_lock = threading.Lock()

# 8-bit copies: the 4-bit layer -> (which LoRAs are in it, the copy on the CPU).
_COPIES: WeakKeyDictionary[W4A4Linear, tuple[object, W4A4Linear]] = WeakKeyDictionary()


class Reference(Protocol):
    """What anchors ask.

    kind: of the plan's REFERENCES; seconds: of making it ready; nbytes: what it holds, and `where`; why_not: why it
    cannot be asked in this run, empty where it can; expected: whether the user has to hear of that; of_fills: whether
    it tells of filled evaluations alone, which are then the only ones to be asked for and to be corrected; decay: what
    is left of its difference one step later.
    """

    kind: str
    where: str
    seconds: float
    nbytes: int
    expected: bool
    why_not: str
    of_fills: bool
    decay: float

    def anchors(self, steps: int, own: int) -> int:
        """How many anchors add about a tenth to the time of a run of so many steps, of which `own` are the model's."""

    def unable(self) -> str:
        """Why it cannot be asked at this evaluation, empty where it can."""

    def asked(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Its prediction of the clean latent. evaluate: makes the evaluation again."""

    def close(self) -> None:
        """Let go of what belongs to the run."""


def reference_of(patcher, wanted: str = AUTOMATIC) -> Reference:
    """The reference of a run; patcher: of its model, loaded."""
    if wanted == UNCACHED:
        return Uncached()
    if wanted == LARGE_MODEL:
        return LargeModel()
    found = BetterWeights(patcher, EIGHT_BIT if wanted == AUTOMATIC else wanted)
    turn = TURN.get()
    larger = turn is not None and turn.larger is not None
    return LargeModel() if wanted == AUTOMATIC and larger and not found.quantised else found


class Uncached:
    """The model without its cache, at evaluations that this would have filled."""

    kind, where, expected, why_not, of_fills = UNCACHED, "", True, "", True
    seconds, nbytes, decay = 0.0, 0, 1.0

    def anchors(self, steps: int, own: int) -> int:
        return automatic(own)

    def unable(self) -> str:
        return ""

    def asked(self, evaluate: Callable[[], Tensor]) -> Tensor:
        return evaluate()  # the run's evaluation is closed, so its cache neither fills nor sees this one

    def close(self) -> None:
        pass


class LargeModel:
    """The largest model of a switched run, in the span of a smaller one."""

    kind, where, expected, of_fills = LARGE_MODEL, "on the device at anchors", True, False
    seconds, nbytes, decay = 0.0, 0, MODEL_DECAY

    @property
    def why_not(self) -> str:
        turn = TURN.get()
        if turn is None:
            return "no Hybrid Model Switch joins this model with a larger one"
        return "no larger model than this one shares the run" if turn.larger is None else ""

    def anchors(self, steps: int, own: int) -> int:
        # in evaluations of the large model, by their weights; one at least, as nothing else does so much here
        work = steps - own + own * TURN.get().larger.share
        return max(1, automatic(round(work))) if automatic(own) else 0

    def unable(self) -> str:
        return TURN.get().larger.why_not

    def asked(self, evaluate: Callable[[], Tensor]) -> Tensor:
        larger = TURN.get().larger
        self.nbytes = larger.nbytes
        return larger.ask()

    def close(self) -> None:
        pass


class BetterWeights:
    """What a patcher's quantised layers were made from, or an 8-bit copy of it."""

    where, of_fills, decay = "of RAM", False, DECAY

    def __init__(self, patcher, kind: str = EIGHT_BIT):
        self.patcher, self.kind = patcher, kind
        self.seconds, self.nbytes = 0.0, 0
        self.layers, self.quantised = _with_originals(patcher, kind)
        self._forwards: dict[str, object] = {}
        copies = [dict(quantised_modules(copy)) for copy in patcher.get_additional_models_with_key("multigpu")]
        # where each is: in the network, and in its copies on further cards
        self._places = {
            path: [layer, *(copy[path] for copy in copies if path in copy)] for path, (layer, _) in self.layers.items()
        }

    @property
    def why_not(self) -> str:
        """Why nothing better than the model itself can be asked; empty where something can."""
        if self.layers:
            return ""
        if self.quantised:
            return "the 16-bit weights are not in memory, as this model comes from a quantised file"
        return "no layer of this model is quantised"

    @property
    def expected(self) -> bool:
        return bool(self.quantised)

    def anchors(self, steps: int, own: int) -> int:
        return automatic(own)

    def unable(self) -> str:
        return ""

    def asked(self, evaluate: Callable[[], Tensor]) -> Tensor:
        with self.in_place():
            return evaluate()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the reference in the threads whose ASKING is this one; others notice nothing.

        An attribute of the instance hides the class's forward and is deleted again: nothing is moved or loaded.
        """
        if len(self._forwards) < len(self.layers):
            self._make()
        token = ASKING.set(self)
        try:
            with _lock:
                for path, layers in self._places.items():
                    for layer in layers:
                        if "forward" not in layer.__dict__:
                            layer.forward = _Forward(layer)
                        layer.forward.better[self] = self._forwards[path]
            yield
        finally:
            ASKING.reset(token)
            with _lock:
                for layer in (layer for layers in self._places.values() for layer in layers):
                    if "forward" in layer.__dict__:
                        layer.forward.better.pop(self, None)
                        if not layer.forward.better:
                            del layer.forward

    def _make(self) -> None:
        started = time.perf_counter()
        for path, (layer, own) in self.layers.items():
            if self.kind == EIGHT_BIT and INT8.fits(own.weight.shape[1]):
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
            spec = spec_for(INT8.name, tuple(weight.shape))
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
        self.layers, self._forwards, self._places, self.patcher = {}, {}, {}, None


class _Forward:
    """A layer's forward while somebody asks for better weights. better: who asks -> what computes for them."""

    def __init__(self, layer: W4A4Linear):
        self.layer = layer
        self.better: dict[object, Callable] = {}

    def __call__(self, x: Tensor) -> Tensor:
        forward = self.better.get(ASKING.get())
        return type(self.layer).forward(self.layer, x) if forward is None else forward(x)


def _with_originals(patcher, kind: str) -> tuple[dict[str, tuple[W4A4Linear, torch.nn.Module]], int]:
    """{path: (layer, its original)} of a loaded patcher's layers that the reference is better than, and how many such
    layers it has with or without an original."""
    found, count = {}, 0
    for path, layer in quantised_modules(patcher):
        if kind == EIGHT_BIT and FORMATS[layer.format].weight_bits >= INT8.weight_bits:
            continue
        count += 1
        own = patcher.object_patches_backup.get(path)
        if own is not None and not isinstance(own, W4A4Linear):
            found[path] = layer, own
    return found, count
