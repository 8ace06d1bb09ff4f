"""A U-Net's inner sites: its deep branch (DeepCache) and its encoder (Faster Diffusion).

The host's own forward runs every time. A layer whose work is not needed hands on a small placeholder with the right
number of channels, and the layer after which the cached features are due returns them instead; so block numbers,
patches by block (FreeU, Deep Shrink, IPAdapter) and ControlNet stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import Architecture
from ..forecast.schedules import Probe
from .calls import Asked, Keys, Parts, PatchedForward, split
from .levels import DEPTH

# Placeholders keep this much of height and width: packs that resize features must not get down to nothing.
PLACEHOLDER = 8

# Decoder steps run together at most: each needs all encoder features of its own.
DECODED_AT_ONCE = 8


def _layers(network: Any) -> list[tuple[tuple, str]]:
    """((part, block, layer, is last of its block), path) of all layers in running order."""
    found = []
    parts = [("input", i, f"input_blocks.{i}", block) for i, block in enumerate(network.input_blocks)]
    parts.append(("middle", 0, "middle_block", network.middle_block))
    parts += [("output", i, f"output_blocks.{i}", block) for i, block in enumerate(network.output_blocks)]
    for part, index, path, block in parts:
        children = [] if block is None else list(block.named_children())
        for place, (child, _) in enumerate(children):
            found.append(((part, index, place, place == len(children) - 1), f"{path}.{child}"))
    return found


def patched_forwards(patcher: Any, network: torch.nn.Module, row: Architecture) -> dict[str, PatchedForward]:
    """Object patches for all layers of a U-Net: {patcher key: forward}."""
    patches = {}
    for name, path in _layers(network):
        key = f"diffusion_model.{path}.forward"
        patches[key] = PatchedForward(name, patcher.get_model_object(key))
    return patches


class UNetSite:
    """A U-Net as seen by one run."""

    def __init__(self, run: Asked, network: Any, row: Architecture, depth: int, level: str):
        self.run = run
        self.level = level
        self.blocks = len(network.output_blocks)
        middle = network.middle_block is not None and len(list(network.middle_block.children())) > 0
        # Without a middle block (KOALA) nothing lies below the deepest level, so there is nothing to cache there.
        self.depth = min(depth, self.blocks - (1 if middle else 2))
        self.last_encoder = ("middle", 0) if middle else ("input", self.blocks - 1)
        self.ahead: dict[tuple, Tensor] = {}  # outputs decoded in advance, by step and the conds of the call

    def attach(self, options: dict) -> None:
        """Nothing to chain: the layers are met through their patched forwards."""

    def call(self, keys: Keys) -> DepthCall | EncoderCall:
        return DepthCall(self, keys) if self.level == DEPTH else EncoderCall(self, keys)


def _placeholder(original: Callable, x: Tensor) -> Tensor:
    """Zeros with the channels the layer would give."""
    module = getattr(original, "__self__", None)
    channels = getattr(module, "out_channels", None) or x.shape[1]
    return x.new_zeros(x.shape[0], channels, *[min(PLACEHOLDER, n) for n in x.shape[2:]])


def own_control(args: tuple, kwargs: dict) -> tuple[tuple, dict, dict | None]:
    """The forward's arguments with a private copy of the ControlNet lists, which the host pops entries from."""

    def is_control(value: Any) -> bool:
        return isinstance(value, dict) and "sigmas" not in value and isinstance(value.get("output"), list)

    for i, value in enumerate(args):
        if is_control(value):
            copy = {k: list(v) if isinstance(v, list) else v for k, v in value.items()}
            return (*args[:i], copy, *args[i + 1 :]), kwargs, copy
    if is_control(kwargs.get("control")):
        copy = {k: list(v) if isinstance(v, list) else v for k, v in kwargs["control"].items()}
        return args, {**kwargs, "control": copy}, copy
    return args, kwargs, None


def _mute(entries: list | None, keep_first_popped: int = 0, count: int | None = None) -> None:
    """Blank `count` (all) of the control entries that will be popped after the next `keep_first_popped`."""
    if not entries:
        return
    end = len(entries) - keep_first_popped
    start = 0 if count is None else max(0, end - count)
    for i in range(start, end):
        entries[i] = None


class DepthCall:
    """DeepCache: input blocks 0..depth and the last depth + 1 output blocks run, the features between are cached."""

    def __init__(self, site: UNetSite, keys: Keys):
        self.site = site
        self.keys = keys
        self.control: dict | None = None
        self.filled: list[Parts] | None = None
        self.decided = False
        self.probe: Parts | None = None
        shallow = site.blocks - 1 - site.depth
        self.producer = ("output", shallow - 1) if shallow else ("middle", 0)

    def layer(self, name: tuple, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Stand in for one layer."""
        part, block, _, last = name
        site = self.site
        deep = part == "middle" or (block > site.depth if part == "input" else block < site.blocks - 1 - site.depth)
        if not deep or site.run.note:
            return original(*args, **kwargs)
        if not self.decided:
            self.decided = True
            self._decide(args[0])
        produces = last and (part, block) == self.producer
        if self.filled is not None:
            if produces:
                return torch.cat([parts[0] for parts in self.filled])
            return _placeholder(original, args[0])
        output = original(*args, **kwargs)
        if produces:
            probes = None if self.probe is None else split(self.probe, len(self.keys))
            site.run.keep(self.keys, split((output.clone(),), len(self.keys)), probes, owned=True)
            self.probe = None
        return output

    def _decide(self, shallow: Tensor) -> None:
        run = self.site.run
        gated = run.probe in (Probe.RESIDUAL, Probe.FORECAST)
        chunks = None
        if gated:
            self.probe = (shallow.clone(),)
            chunks = split(self.probe, len(self.keys))
        self.filled = run.fill(self.keys, chunks)
        if self.filled is not None and self.control is not None:
            skipped = self.site.blocks - 1 - self.site.depth
            _mute(self.control.get("input"))
            if self.producer[0] != "middle":
                _mute(self.control.get("middle"))
            _mute(self.control.get("output"), count=skipped)


class EncoderCall:
    """Faster Diffusion: the features of all input blocks and the middle block are cached, the decoder runs."""

    def __init__(self, site: UNetSite, keys: Keys, filled: list[Parts] | None = None):
        self.site = site
        self.keys = keys
        self.control: dict | None = None
        self.filled = filled
        self.decided = filled is not None
        self.features: list[Tensor] = []

    def layer(self, name: tuple, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Stand in for one layer."""
        part, block, _, last = name
        run = self.site.run
        if part == "output" or run.note:
            return original(*args, **kwargs)
        if not self.decided:
            self.decided = True
            self.filled = run.fill(self.keys)
        if self.filled is not None:
            place = block if part == "input" else self.site.blocks
            if not last:
                return _placeholder(original, args[0])
            return torch.cat([parts[place] for parts in self.filled])
        output = original(*args, **kwargs)
        if last:
            self.features.append(output.clone())
            if (part, block) == self.site.last_encoder:
                run.keep(self.keys, split(tuple(self.features), len(self.keys)), owned=True)
                self.features = []
                self.site.ahead.clear()
        return output


def decode_ahead(call: EncoderCall, executor: Callable, args: tuple, kwargs: dict, options: dict) -> Tensor | None:
    """The output of a filled evaluation, decoded in one batch with those that are certain to be filled after it.

    args, kwargs: of the network's forward, x and the timesteps [rows] first. None where this evaluation is not a matter
    for it; then the network runs as usual. The decoder sees the noise level but not the latent, so the evaluations
    until the next key step are independent of each other.
    """
    site, run = call.site, call.site.run
    step = run.grid_step()
    if step is None or call.control is not None or run.several:
        return None
    if options.get("patches") or options.get("patches_replace"):
        return None  # they may depend on the noise level, of which a batch has several
    now = (step, *call.keys)
    if now not in site.ahead:
        steps = [step, *run.certain_fills(step)][:DECODED_AT_ONCE]
        if len(steps) < 2:
            return None
        filled = [run.forecast_at(call.keys, float(s)) for s in steps]
        whole = [one for one in filled if one is not None]
        if len(whole) < len(filled):
            return None
        rows = args[0].shape[0]
        times = torch.cat([torch.full_like(args[1], run.timestep(s)) for s in steps])
        many = [_repeat(a, rows, len(steps)) for a in args]
        many[1] = times
        extra = {k: _repeat(v, rows, len(steps)) for k, v in kwargs.items()}
        repeated = {**options, **{k: list(options[k]) * len(steps) for k in ("cond_or_uncond", "uuids")}}
        many = [repeated if a is options else a for a in many]
        extra = {k: repeated if v is options else v for k, v in extra.items()}
        call.decided, call.filled = True, [parts for one in whole for parts in one]
        outputs = executor(*many, **extra).chunk(len(steps))
        site.ahead.update({(s, *call.keys): part for s, part in zip(steps, outputs, strict=True)})
        call.decided, call.filled = False, None
    output = site.ahead.pop(now)
    return output if run.mark_filled(call.keys) else None


def _repeat(value: Any, rows: int, times: int) -> Any:
    if torch.is_tensor(value) and value.ndim and value.shape[0] == rows:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value
