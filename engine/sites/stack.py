"""The block stack of a transformer as a site: its first blocks run, the rest is run or filled.

Two quantities can be cached. STACK keeps the residual of the blocks after the first `first` (what they add to the
image tokens): first-block caches, MagCache, TeaCache. FEATURES keeps the image tokens after the last block, from which
the final layer is computed anew: TaylorSeer's lite form, CG-Taylor. While a stack is filled its blocks hand their
input through, and the last one returns the forecast; none of them runs. Text tokens do not matter after the stack.
A third, EACH, skips single blocks and has a file of its own, `each_block.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import Architecture, Stack
from ..forecast.history import parts_of
from ..forecast.schedules import Probe
from .calls import CURRENT, Asked, Call, Keys, Parts, PatchedForward, split
from .levels import STACK
from .streams import read, result, stand_in


class Blocks:
    """The blocks of one network in running order, and how a run meets them."""

    def __init__(self, network: torch.nn.Module, row: Architecture):
        self.row = row
        self.order: dict[tuple, int] = {}
        self.stacks: list[Stack] = []
        for stack in row.stacks:
            for index in range(len(_container(network, stack.path))):
                self.order[stack.path, index] = len(self.stacks)
                self.stacks.append(stack)

    def __len__(self) -> int:
        return len(self.stacks)


def _container(network: torch.nn.Module, path: str) -> list[tuple[str, torch.nn.Module]]:
    """The blocks of one stack; none where a variant of the family has no such stack, which the run then says."""
    try:
        return list(network.get_submodule(path).named_children())
    except AttributeError:
        return []


def block_sizes(network: torch.nn.Module, row: Architecture) -> list[int]:
    """Parameters of every block in running order: what it costs, near enough to weigh one block against another."""
    return [
        sum(parameter.numel() for parameter in block.parameters())
        for stack in row.stacks
        for _, block in _container(network, stack.path)
    ]


def patched_forwards(patcher: Any, network: torch.nn.Module, row: Architecture) -> dict[str, PatchedForward]:
    """Object patches for the stacks that the host cannot replace blocks of: {patcher key: forward}."""
    patches = {}
    for stack in row.stacks:
        if stack.key is not None:
            continue
        for index, (child, _) in enumerate(_container(network, stack.path)):
            key = f"diffusion_model.{stack.path}.{child}.forward"
            patches[key] = PatchedForward((stack.path, index), patcher.get_model_object(key))
    return patches


class BlockSite:
    """Blocks as seen by one run: which blocks always run, what is stored, and where the image tokens are."""

    def __init__(self, run: Asked, network: torch.nn.Module, row: Architecture, first: int, level: str):
        self.run = run
        self.row = row
        self.blocks = Blocks(network, row)
        self.first = min(first, len(self.blocks) - 1)
        self.level = level
        self.image_first: bool | None = None  # where text and image share a sequence: seen once, in the first call

    def attach(self, options: dict) -> None:
        """Chain a function in front of every block of `options["patches_replace"]["dit"]`."""
        table = options.setdefault("patches_replace", {}).setdefault("dit", {})
        for stack in self.row.stacks:
            if stack.key is None:
                continue
            for (path, index), _ in self.blocks.order.items():
                if path == stack.path:
                    key = (stack.key, index)
                    table[key] = _Replacement((path, index), table.get(key))

    def call(self, keys: Keys) -> Call:
        return BlockCall(self, keys)


class _Replacement:
    """One entry of `patches_replace["dit"]`: the entry that was there, or the block, unless the run fills it."""

    def __init__(self, name: tuple, inner: Callable | None):
        self.name = name
        self.inner = inner

    def __call__(self, args: dict, extra: dict) -> dict:
        def compute(*_: Any, **__: Any) -> dict:
            return extra["original_block"](args) if self.inner is None else self.inner(args, extra)

        call = CURRENT.get()
        return compute() if call is None else call.layer(self.name, compute, (args,), {})


class BlockCall:
    """One run of the network through its blocks."""

    def __init__(self, site: BlockSite, keys: Keys):
        self.site = site
        self.keys = keys
        self.tokens = 0  # image tokens in the stream
        self.entered: Parts | None = None  # image tokens before block 0, where a probe needs them
        self.base: Parts | None = None  # image tokens before the first cached block
        self.probe: Parts | None = None
        self.filled: list[Parts] | None = None
        self.latest: Parts = ()  # the image stream as the previous block left it
        self.modulated: Tensor | None = None
        self.decided = False

    def layer(self, name: tuple, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Stand in for one block."""
        site = self.site
        number = site.blocks.order.get(name)
        if number is None or (site.run.note and self.filled is None):  # a call on another card may refuse in mid-call
            return original(*args, **kwargs)
        stack = site.blocks.stacks[number]
        stream = parts_of(read(stack, args, kwargs))
        if number == 0:
            self.tokens = stream[0].shape[1]
            # the token count may change in a run (keyframe masks, a prompt of another length): each has its history
            shape = [n for d, n in enumerate(stream[0].shape) if d != site.row.batch_dim]
            self.keys = [(*key, *shape) for key in self.keys]
            if site.first and site.run.probe is Probe.RESIDUAL:
                self.entered = tuple(t.clone() for t in stream)
        image = self._image(stack, stream)
        if image is None:
            return original(*args, **kwargs)
        if number >= site.first and not self.decided:  # later than `first` where another pack replaced that block
            self.decided = True
            self._decide(image, args, kwargs)
        last = number == len(site.blocks) - 1
        if self.filled is None:
            output = original(*args, **kwargs)
            self.latest = parts_of(result(stack, output))
            if last:
                self._keep(self._image(stack, self.latest))
            return output
        self.latest = stream
        return stand_in(stack, args, kwargs, self._forecast(stream) if last and number >= site.first else stream)

    # -- the image tokens ----------------------------------------------------------------------------------------

    def _image(self, stack: Stack, stream: Parts) -> Parts | None:
        """The image tokens of a block's stream, as views; None where they cannot be found."""
        if not stack.joint or self.site.row.batch_dim:
            return stream
        joint = stream[0]
        if joint.shape[1] == self.tokens:
            return stream
        if self.site.image_first is None:
            self.site.image_first = self._find(joint)
            if self.site.image_first is None:
                self.site.run.refuse("the image tokens of this model could not be told from the text")
                return None
        return (joint[:, : self.tokens] if self.site.image_first else joint[:, -self.tokens :],)

    def _find(self, joint: Tensor) -> bool | None:
        """Whether the image comes before the text: hosts have changed that order, so it is looked up, not listed."""
        image = self.latest[0] if self.latest else joint[:, :0]
        if image.shape[1] != self.tokens or joint.shape[1] < self.tokens:
            return None
        if torch.equal(joint[:, -self.tokens :], image):
            return False
        return True if torch.equal(joint[:, : self.tokens], image) else None

    # -- deciding, filling, keeping ------------------------------------------------------------------------------

    def _decide(self, image: Parts, args: tuple, kwargs: dict) -> None:
        run, dim = self.site.run, self.site.row.batch_dim
        probe = None
        if run.probe is Probe.RESIDUAL and self.entered is not None:
            probe = tuple(now - before for now, before in zip(image, self.entered, strict=True))
        elif run.probe is Probe.FORECAST:
            probe = image
        elif run.probe is Probe.MODULATED and self.modulated is not None:
            probe = (self.modulated,)
        elif run.probe is Probe.EMBEDDING:
            vec = args[0].get("vec") if args and isinstance(args[0], dict) else None
            probe = (vec,) if torch.is_tensor(vec) else None
        self.entered = None
        if probe is not None:
            self.probe = probe
            chunks = split(probe, len(self.keys), dim)
        else:
            chunks = None
        self.filled = run.fill(self.keys, chunks)
        if self.site.level == STACK:
            self.base = tuple(t.clone() for t in image)  # blocks and controls write into their input
        if self.probe is image and self.filled is None:
            self.probe = tuple(t.clone() for t in image)

    def _forecast(self, stream: Parts) -> Parts:
        """What the last block returns: its stream with the forecast in the place of the image tokens."""
        dim = self.site.row.batch_dim
        assert self.filled is not None
        value = tuple(torch.cat(column, dim) for column in zip(*self.filled, strict=True))
        if self.base is not None:
            value = tuple(base + residual for base, residual in zip(self.base, value, strict=True))
        if value[0].shape == stream[0].shape:
            return value
        joint = stream[0].clone()
        place = slice(0, self.tokens) if self.site.image_first else slice(joint.shape[1] - self.tokens, None)
        joint[:, place] = value[0]
        return (joint,)

    def _keep(self, image: Parts | None) -> None:
        if image is None:
            return
        dim, count = self.site.row.batch_dim, len(self.keys)
        base = None
        if self.base is None:
            value = tuple(t.clone() for t in image)
        else:
            value = tuple(now - before for now, before in zip(image, self.base, strict=True))
            base = split(self.base, count, dim)
        probes = None if self.probe is None else split(self.probe, count, dim)
        self.site.run.keep(self.keys, split(value, count, dim), probes, base, owned=True)
        self.base = self.probe = None
