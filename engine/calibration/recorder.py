"""Collects a run's statistics as it goes: a fixed sample of every snapshot's elements, never whole trajectories."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .statistics import TrajectoryStatistics

# Elements kept of one snapshot of one stream: the error of a mean over so many is below half a percent.
SAMPLE = 1 << 16


@dataclass
class Recorder:
    """Samples of the snapshots of one run, in host memory: at most steps x streams x `sample` float32 numbers.

    The same elements are taken at every step, so distances and inner products of the sample are unbiased estimates of
    those of the whole; where a snapshot has no more elements than the sample, they are exact. moments: the network's
    inputs are sampled too, for `channel_moments`. probed: evaluations, counted from 0, at which the growth of a
    disturbance is measured by one more evaluation each.
    """

    sample: int = SAMPLE
    seed: int = 0
    moments: bool = False
    probed: frozenset[int] = frozenset()
    times: list[float] = field(default_factory=list)
    out_of_order: bool = False
    growth: dict[int, float] = field(default_factory=dict)
    _rows: dict[Hashable, list[Tensor]] = field(default_factory=dict)
    _inputs: list[Tensor] = field(default_factory=list)
    _shape: torch.Size | None = None
    _index: dict[int, Tensor] = field(default_factory=dict)
    _evaluation: int = -1
    _slope: tuple[Tensor, float] | None = None

    @property
    def nbytes(self) -> int:
        rows = [*self._inputs, *(row for rows in self._rows.values() for row in rows)]
        return sum(row.numel() * row.element_size() for row in rows)

    def push(self, u: float, key: Hashable, parts: Sequence[Tensor], x: Tensor | None = None) -> None:
        """Take the sample of one stream's snapshot at time u, and of the network's input. Streams differ by key.

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
        if self.moments and x is not None and len(parts) == 1 and x.shape == parts[0].shape:
            self._shape = x.shape
            if len(self._inputs) < len(self.times):
                self._inputs.append(self._take(x))

    def _take(self, part: Tensor) -> Tensor:
        flat = part.detach().reshape(-1)
        if flat.numel() > self.sample:
            flat = flat[self._sampled(flat.numel()).to(flat.device)]
        return flat.to("cpu", torch.float32, copy=True)

    def _sampled(self, size: int) -> Tensor:
        """The places of the elements that are taken of a snapshot of `size`, the same ones every time."""
        if size not in self._index:
            generator = torch.Generator().manual_seed(self.seed)
            self._index[size] = torch.randint(size, (min(size, self.sample),), generator=generator)
        return self._index[size]

    def disturbance(self, x: Tensor, sigma: float, denoised: Tensor) -> Tensor | None:
        """What to add to x for one more evaluation at this sigma: what reusing the slope of the evaluation before would
        have added. None where this one is not probed."""
        self._evaluation += 1
        if not self.probed or sigma <= 0.0:
            return None
        slope, before = (x - denoised) / sigma, self._slope
        self._slope = slope, sigma
        if self._evaluation not in self.probed or before is None or before[0].shape != slope.shape:
            return None
        return (slope - before[0]) * (before[1] - sigma)

    def grown(self, disturbance: Tensor, change: Tensor) -> None:
        """Take the change of the denoised prediction that the disturbance made: the ratio of the norms is kept."""
        size = float(disturbance.norm())
        if size > 0.0:
            self.growth[self._evaluation] = float(change.norm()) / size

    def _whole(self) -> list[list[Tensor]]:
        if self.out_of_order:
            raise ValueError("this sampler goes back and forth between noise levels; use euler or dpmpp_2m")
        whole = [rows for rows in self._rows.values() if len(rows) == len(self.times)]
        if not whole:
            raise ValueError("no conditioning was active at every step; use one prompt from start to end")
        return whole

    def statistics(self) -> TrajectoryStatistics:
        """The mean over all streams that were there at every step. Raises ValueError where none was, or for a run that
        went back in time."""
        return TrajectoryStatistics.merged([TrajectoryStatistics.of(rows, self.times) for rows in self._whole()])

    def channel_moments(self) -> Tensor | None:
        """Means of all products of {q_0 .. q_(n-1), x_0 .. x_(n-1), 1} per channel, [C, 2n + 1, 2n + 1] float32.

        q: the model's outputs, x: its inputs, mean over streams. Least squares of any forecast's error on {forecast, x,
        1} follow from them. None where
        inputs and outputs are not of one shape.
        """
        n = len(self.times)
        if len(self._inputs) != n or self._shape is None:
            return None
        size, channels = self._shape.numel(), self._shape[1]
        places = self._sampled(size) if size > self.sample else torch.arange(size)
        channel = places // self._shape[2:].numel() % channels
        tables = []
        for rows in self._whole():
            values = torch.stack([*rows, *self._inputs, torch.ones_like(rows[0])]).double()
            each = [values[:, channel == c] for c in range(channels)]
            tables.append(torch.stack([v @ v.T / max(1, v.shape[1]) for v in each]))
        return torch.stack(tables).mean(0).float()


class Activations:
    """Per input channel of linear layers, the largest magnitude and the mean square seen: what a quantiser needs.

    layers: those that will be called, by name; a network may have others in their places when this is made.
    Watches through forward pre-hooks, which can neither change what runs nor stay behind; use as a context manager.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module]):
        self._layers = dict(layers)
        self._largest: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._hooks: list = []

    def __enter__(self) -> Activations:
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0])))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _see(self, name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        largest, squares = rows.abs().amax(0), rows.square().sum(0)
        if name in self._largest:
            largest, squares = torch.maximum(largest, self._largest[name]), squares + self._squares[name]
        self._largest[name], self._squares[name] = largest, squares
        self._rows[name] = self._rows.get(name, 0) + len(rows)

    def tables(self) -> dict[str, Tensor]:
        """{"activation/LAYER/absmax": [in features], "activation/LAYER/square": [in features]}, float32 on the CPU."""
        found = {}
        for name, largest in self._largest.items():
            found[f"activation/{name}/absmax"] = largest.cpu()
            found[f"activation/{name}/square"] = (self._squares[name] / max(1, self._rows[name])).cpu()
        return found
