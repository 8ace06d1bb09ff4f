"""What calibration keeps of a linear layer's input, and at which steps of the schedule it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

# Rows of a reservoir: 512 as in the research's prototype; a layer of width 3072 keeps 3 MB in bfloat16.
ROWS = 512


@dataclass(frozen=True, slots=True, eq=False)
class ActivationStatistics:
    """The input of one linear layer (of K channels) as calibration saw it.

    absmax: float32 (K,), largest |x|; square: float32 (K,), mean of x^2, None where only spans are known (modulation);
    rows: (n <= 512, K), a uniform sample of the inputs, or None; hessian: float32 (K, K), sum of x x^T, or None;
    count: how many inputs were seen. These are the tables `activation/LAYER/...` of a profile, and more.
    Raises ValueError when the widths differ.
    """

    absmax: Tensor
    square: Tensor | None = None
    rows: Tensor | None = None
    hessian: Tensor | None = None
    count: int = 0

    def __post_init__(self) -> None:
        k = self.absmax.numel()
        widths = {"absmax": tuple(self.absmax.shape) == (k,)}
        if self.square is not None:
            widths["square"] = tuple(self.square.shape) == (k,)
        if self.rows is not None:
            widths["rows"] = self.rows.ndim == 2 and self.rows.shape[1] == k and len(self.rows) > 0
        if self.hessian is not None:
            widths["hessian"] = tuple(self.hessian.shape) == (k, k)
        wrong = [name for name, right in widths.items() if not right]
        if wrong:
            raise ValueError(f"{wrong[0]} of the activation statistics does not fit the {k} channels of absmax")

    @property
    def channels(self) -> int:
        """K."""
        return self.absmax.numel()

    @classmethod
    def of(cls, inputs: Tensor, limit: int = ROWS, hessian: bool = False) -> ActivationStatistics:
        """The statistics of inputs (..., K) held at once; a calibration streams them with a `Collector`."""
        collector = Collector(inputs.shape[-1], limit, hessian)
        collector.add(inputs)
        return collector.statistics()

    def merged(self, other: ActivationStatistics, limit: int = ROWS) -> ActivationStatistics:
        """Both runs together; what either lacks is dropped. Raises ValueError when the channels differ.

        Rows are drawn from both in proportion to what each run saw, deterministically.
        """
        if self.channels != other.channels:
            raise ValueError(f"statistics of {self.channels} and {other.channels} channels are of different layers")
        total = self.count + other.count
        square = rows = hessian = None
        if self.square is not None and other.square is not None:
            share = self.count / total if total else 0.5
            square = self.square * share + other.square * (1 - share)
        if self.rows is not None and other.rows is not None:
            share = self.count / total if total else 0.5
            kept = min(limit, len(self.rows) + len(other.rows))
            # neither run can give more rows than it has, so the other fills up
            first = min(len(self.rows), max(kept - len(other.rows), round(kept * share)))
            rows = torch.cat((evenly(self.rows, first), evenly(other.rows, kept - first)))
        if self.hessian is not None and other.hessian is not None:
            hessian = self.hessian + other.hessian
        return ActivationStatistics(torch.maximum(self.absmax, other.absmax), square, rows, hessian, total)

    def part(self, start: int, stop: int) -> ActivationStatistics:
        """The statistics of the channels start..stop-1."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[..., start:stop]

        hessian = None if self.hessian is None else self.hessian[start:stop, start:stop]
        return ActivationStatistics(self.absmax[start:stop], cut(self.square), cut(self.rows), hessian, self.count)


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly spaced: a short run's reservoir is in the order of its calls."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float64, device=rows.device).round().long()]


class Collector:
    """Accumulates the statistics of one layer over the calls of a calibration run; give every layer one of its own.

    Rows are kept by reservoir sampling (Vitter's algorithm R): each input row has the same chance, whatever its step.
    They are kept in the input's dtype on the CPU. The random numbers are those of `seed`, no global state is touched.
    """

    def __init__(self, channels: int, limit: int = ROWS, hessian: bool = False, seed: int = 0) -> None:
        self._absmax = torch.zeros(channels)
        self._squares = torch.zeros(channels, dtype=torch.float64)
        self._hessian = torch.zeros(channels, channels) if hessian else None
        self._rows: Tensor | None = None
        self._limit, self._count = limit, 0
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, inputs: Tensor, rows: int | None = None) -> None:
        """Take in a call's input (..., K); of more than `rows` tokens take an even choice (video inputs are long).

        Raises ValueError when the channels differ from the layer's.
        """
        if inputs.shape[-1] != self._absmax.numel():
            raise ValueError(f"the layer takes {self._absmax.numel()} channels, the input has {inputs.shape[-1]}")
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        if rows is not None:
            x = evenly(x, rows)
        if not len(x):
            return
        wide = x.float()
        self._absmax = torch.maximum(self._absmax, wide.abs().amax(0).cpu())
        self._squares += wide.square().sum(0).double().cpu()
        if self._hessian is not None:
            self._hessian = self._hessian.to(x.device).addmm_(wide.T, wide)
        self._sample(x)
        self._count += len(x)

    def _sample(self, x: Tensor) -> None:
        free = max(0, self._limit - self._count)
        if free:
            head = x[:free].to("cpu", copy=True)
            self._rows = head if self._rows is None else torch.cat((self._rows, head))
        later = x[free:]
        if not len(later) or not self._limit:
            return
        seen = torch.arange(self._count + free, self._count + len(x), dtype=torch.float64) + 1
        places = (torch.rand(len(later), generator=self._generator, dtype=torch.float64) * seen).long()
        chosen = (places < self._limit).nonzero().flatten()
        # of two rows drawn for one place the later stays, as if they had come one at a time
        last = {int(places[i]): int(i) for i in chosen}
        if last and self._rows is not None:
            self._rows[list(last)] = later[list(last.values())].to(self._rows)

    def statistics(self) -> ActivationStatistics:
        """What was seen so far. Raises ValueError when nothing was."""
        if not self._count:
            raise ValueError("the layer was not called during calibration")
        square = (self._squares / self._count).float()
        hessian = None if self._hessian is None else self._hessian.cpu().clone()
        rows = None if self._rows is None else self._rows.clone()
        return ActivationStatistics(self._absmax.clone(), square, rows, hessian, self._count)


def normal_steps(steps: int, count: int, mean: float = 0.4, spread: float = 0.4) -> list[int]:
    """PTQ4DM's rule (arXiv 2211.15736): calibrate at normally distributed time steps, more of them near the clean end.

    steps: length S of the schedule, step 0 the noisiest; count: inputs wanted. Diffusion time t ~ Normal(mean, spread),
    as a share of the whole, clamped to [0, 1]; instead of drawing, its quantiles at (i + 1/2) / count are taken.
    Returns `count` step indices in rising order; one that occurs m times is to give m times the rows.
    Raises ValueError unless both are positive.
    """
    _positive(steps, count)
    normal = NormalDist(mean, spread)
    times = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    last = steps - 1
    return sorted(last - round(min(1.0, max(0.0, t)) * last) for t in times)


def uniform_steps(steps: int, count: int) -> list[int]:
    """Q-Diffusion's rule (arXiv 2302.04304): every c-th step, c = steps // count, so that all of time is covered.

    Returns min(count, steps) distinct step indices in rising order, from step 0. Raises ValueError unless both are
    positive.
    """
    _positive(steps, count)
    interval = max(1, steps // count)
    return list(range(0, steps, interval))[:count]


def _positive(steps: int, count: int) -> None:
    if steps < 1 or count < 1:
        raise ValueError(f"a choice of steps needs a schedule and a count of at least 1, got {steps} and {count}")


def split_channels(channels: int, boundaries: Sequence[int], group_size: int = 64) -> list[tuple[int, int]]:
    """The channel ranges on both sides of concatenations: [(0, b0), (b0, b1), ...], each a layer input of its own.

    Q-Diffusion's shortcut splitting: at a U-Net's skip concatenation the two halves have different spans, and so have
    attention and MLP in the joined input of FLUX's single blocks. Each range is smoothed, rotated and scaled by itself.
    A scale belongs to a group of 64 channels counted from the start of its range, so no group straddles a boundary when
    every boundary is a multiple of 64; that is demanded here. Raises ValueError otherwise, or when boundaries are not
    rising inside the channels.
    """
    edges = [0, *boundaries, channels]
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"boundaries {list(boundaries)} do not rise inside the {channels} channels")
    if any(edge % group_size for edge in edges):
        raise ValueError(f"boundaries {list(boundaries)} of {channels} channels are not multiples of {group_size}")
    return list(pairwise(edges))
