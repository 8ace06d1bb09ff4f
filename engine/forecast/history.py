"""What has been computed: raw snapshots of one stream, oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ...kernels.reference import rounded, weighted_sum
from .predictors import SAME_TIME, Predictor

Value = Tensor | Sequence[Tensor]


def parts_of(value: Value) -> tuple[Tensor, ...]:
    """The tensors of a model output: most models return one, audio-video models a list."""
    return (value,) if torch.is_tensor(value) else tuple(value)


class Storage(Enum):
    """Where snapshots lie: as computed, in host memory, or as 8-bit integers with one scale per last-dimension row."""

    DEVICE = "device"
    RAM = "RAM"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it is kept. scale is None where the values are kept as they are."""

    values: Tensor
    scale: Tensor | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def pack(cls, value: Tensor, storage: Storage, owned: bool) -> Stored:
        """Keep a private copy of `value`; an owned one is nobody else's and is kept itself where that is possible."""
        value = value.detach()
        device, dtype = value.device, value.dtype
        if storage is Storage.INT8 and value.ndim:
            wide = value.float()
            scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
            return cls((wide / scale).round_().to(torch.int8), scale, device, dtype)
        if storage is Storage.RAM:
            return cls(value.to("cpu", copy=not owned), None, device, dtype)
        return cls(value if owned else value.clone(), None, device, dtype)

    def read(self) -> Tensor:
        """The value on the device and in the dtype it came in (8-bit: float32); never to be written to."""
        values = self.values.to(self.device)
        return values if self.scale is None else values.float() * self.scale

    @property
    def nbytes(self) -> int:
        scale = 0 if self.scale is None else self.scale.numel() * self.scale.element_size()
        return self.values.numel() * self.values.element_size() + scale


class History:
    """At most `capacity` snapshots of one stream, each a tuple of tensors with the time it was taken at.

    Stored tensors are private copies: nothing handed in is kept, nothing handed out is shared.
    """

    def __init__(self, capacity: int, storage: Storage = Storage.DEVICE):
        self.capacity = capacity
        self.storage = storage
        self.times: list[float] = []
        self._snapshots: list[tuple[Stored, ...]] = []

    def __len__(self) -> int:
        return len(self.times)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for snapshot in self._snapshots for t in snapshot)

    @property
    def newest(self) -> tuple[Tensor, ...]:
        """The newest snapshot itself: read it, never change or keep it."""
        return tuple(t.read() for t in self._snapshots[-1])

    @property
    def last(self) -> tuple[Tensor, ...]:
        """The newest snapshot in the dtype it came in, for reuse: read it, never change or keep it."""
        return tuple(t.read().to(t.dtype) for t in self._snapshots[-1])

    def column(self, part: int = 0) -> list[Tensor]:
        """One part of every snapshot, oldest first: read them, never change or keep them."""
        return [snapshot[part].read() for snapshot in self._snapshots]

    def push(self, u: float, parts: Sequence[Tensor], owned: bool = False) -> None:
        """Keep a copy of `parts` as the snapshot at time u; a snapshot at the same time is replaced.

        owned: the tensors are the caller's own copies and are handed over.
        """
        if self._snapshots and [t.values.shape for t in self._snapshots[-1]] != [t.shape for t in parts]:
            self.clear()
        for i, time in enumerate(self.times):
            if abs(time - u) < SAME_TIME:
                del self.times[i], self._snapshots[i]
                break
        self.times.append(u)
        self._snapshots.append(tuple(Stored.pack(t, self.storage, owned) for t in parts))
        while len(self.times) > self.capacity:
            del self.times[0], self._snapshots[0]

    def forecast(self, u: float, predictor: Predictor) -> tuple[tuple[Tensor, ...], int]:
        """Return (new tensors forecast for time u, order used). Raises ValueError when nothing is stored."""
        weights, order = predictor.weights(self.times, u)
        return self.combine(weights), order

    def combine(self, weights: Sequence[float]) -> tuple[Tensor, ...]:
        """New tensors: the weighted sum of the snapshots, in the dtype they came in."""
        sums = []
        for column in zip(*self._snapshots, strict=True):
            used = [(t, w) for t, w in zip(column, weights, strict=True) if w] or [(column[-1], 0.0)]
            total = weighted_sum([t.read() for t, _ in used], [w for _, w in used])
            sums.append(rounded(total, column[0].dtype))
        return tuple(sums)

    def clear(self) -> None:
        self.times.clear()
        self._snapshots.clear()
