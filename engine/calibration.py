"""Collects a run's statistics as it goes: a fixed sample of every snapshot's elements, never whole trajectories."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .statistics import Statistics

# Elements kept of one snapshot of one stream: the error of a mean over so many is below half a percent.
SAMPLE = 1 << 16


@dataclass
class Recorder:
    """Samples of the snapshots of one run, in host memory: at most steps x streams x `sample` float32 numbers.

    The same elements are taken at every step, so distances and inner products of the sample are unbiased estimates of
    those of the whole; where a snapshot has no more elements than the sample, they are exact.
    """

    sample: int = SAMPLE
    seed: int = 0
    times: list[float] = field(default_factory=list)
    out_of_order: bool = False
    _rows: dict[Hashable, list[Tensor]] = field(default_factory=dict)
    _index: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(row.numel() * row.element_size() for rows in self._rows.values() for row in rows)

    def push(self, u: float, key: Hashable, parts: Sequence[Tensor]) -> None:
        """Take the sample of one stream's snapshot at time u. Streams are told apart by key.

        A time before the newest is not taken, and `statistics` will say so: nothing is raised in mid-sampling.
        """
        if not self.times or u > self.times[-1]:
            self.times.append(u)
        elif u < self.times[-1]:
            self.out_of_order = True
            return
        rows = self._rows.setdefault(key, [])
        row = torch.cat([self._take(part) for part in parts])
        if len(rows) == len(self.times):
            rows[-1] = row  # the same time again, as heun has it: the later one counts
        else:
            rows.append(row)

    def _take(self, part: Tensor) -> Tensor:
        flat = part.detach().reshape(-1)
        if flat.numel() > self.sample:
            index = self._index.get(flat.numel())
            if index is None:
                generator = torch.Generator().manual_seed(self.seed)
                index = torch.randint(flat.numel(), (self.sample,), generator=generator)
                self._index[flat.numel()] = index
            flat = flat[index.to(flat.device)]
        return flat.to("cpu", torch.float32, copy=True)

    def statistics(self) -> Statistics:
        """The mean over all streams that were there at every step. Raises ValueError where none was, or for a run that
        went back in time."""
        if self.out_of_order:
            raise ValueError("this sampler goes back and forth between noise levels; use euler or dpmpp_2m")
        whole = [rows for rows in self._rows.values() if len(rows) == len(self.times)]
        if not whole:
            raise ValueError("no conditioning was active at every step; use one prompt from start to end")
        return Statistics.merged([Statistics.of(rows, self.times) for rows in whole])
