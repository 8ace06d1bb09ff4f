"""Single blocks as a site: at every step a table says which blocks run; the others add again what they last added.

Unlike at the sites in `stack.py` later blocks do run, so the residual of every stream is kept: image and text where a
block has two, their one sequence where it has one, each stream of an audio-video model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..families import Architecture
from ..forecast.history import parts_of
from .calls import Asked, Call, Keys, Parts, split
from .stack import BlockSite
from .streams import read, read_second, result, result_second, stand_in


class EachSite(BlockSite):
    """The blocks of one run, each skipped by itself."""

    def __init__(self, run: Asked, network: torch.nn.Module, row: Architecture, first: int, level: str):
        super().__init__(run, network, row, first, level)
        self.textless: set[int] = set()  # blocks that return no text: they read it only, or none is needed after them

    def call(self, keys: Keys) -> Call:
        return EachCall(self, keys)


class EachCall:
    """One run of the network through its blocks."""

    def __init__(self, site: EachSite, keys: Keys):
        self.site = site
        self.keys = keys
        self.entered = False

    def layer(self, name: tuple, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Stand in for one block."""
        site, run, dim = self.site, self.site.run, self.site.row.batch_dim
        number = site.blocks.order.get(name)
        if number is None or run.note:
            return original(*args, **kwargs)
        stack = site.blocks.stacks[number]
        image, text = parts_of(read(stack, args, kwargs)), _tensors(read_second(stack, args, kwargs))
        if not self.entered:
            self.entered = True
            # another token count in mid-run (keyframe masks, a longer prompt) has residuals of its own
            sizes = [n for t in (*image, *text) for d, n in enumerate(t.shape) if d != dim]
            self.keys = [(*key, *sizes) for key in self.keys]
        given = image if number in site.textless else (*image, *text)
        added = self._added(number, given)
        run.blocks.count(ran=added is None)
        if added is not None:
            sums = tuple(t + residual for t, residual in zip(given, added, strict=True))
            return stand_in(stack, args, kwargs, sums[: len(image)], sums[len(image) :])
        if not run.blocks.keeps(number):
            run.blocks.keep(self.keys, number, None)
            return original(*args, **kwargs)
        before = tuple(t.detach().clone() for t in given)  # blocks and controls write into their input
        output = original(*args, **kwargs)
        now, now_text = parts_of(result(stack, output)), _tensors(result_second(stack, output))
        if not now_text:
            site.textless.add(number)
            before = before[: len(image)]
        if [t.shape for t in before] != [t.shape for t in (*now, *now_text)]:
            run.refuse(f"block {number} of this model does not return the streams that it is given")
            return output
        changes = tuple(t.detach() - b for t, b in zip((*now, *now_text), before, strict=True))
        run.blocks.keep(self.keys, number, split(changes, len(self.keys), dim))
        return output

    def _added(self, number: int, given: Parts) -> Parts | None:
        """What the block added to the batch when it last ran; None where it has to run."""
        chunks = self.site.run.blocks.residuals(self.keys, number)
        if chunks is None:
            return None
        columns = zip(*chunks, strict=True)
        added = tuple(c[0] if len(c) == 1 else torch.cat(c, self.site.row.batch_dim) for c in columns)
        return added if [r.shape for r in added] == [t.shape for t in given] else None


def _tensors(value: Any) -> Parts:
    """The tensors of a stream that may not be there."""
    return () if value is None else parts_of(value)
