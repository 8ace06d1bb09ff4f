"""What has been computed: raw snapshots of one stream, oldest first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.reference import weighted_sum
from .predictors import SAME_TIME, Predictor

Value = Tensor | Sequence[Tensor]


def parts_of(value: Value) -> tuple[Tensor, ...]:
    """The tensors of a model output: most models return one, audio-video models a list."""
    return (value,) if torch.is_tensor(value) else tuple(value)


class History:
    """At most `capacity` snapshots of one stream, each a tuple of tensors with the time it was taken at.

    Stored tensors are private copies: nothing handed in is kept, nothing handed out is shared.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.times: list[float] = []
        self._snapshots: list[tuple[Tensor, ...]] = []

    def __len__(self) -> int:
        return len(self.times)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for snapshot in self._snapshots for t in snapshot)

    @property
    def newest(self) -> tuple[Tensor, ...]:
        """The newest snapshot itself: read it, never change or keep it."""
        return self._snapshots[-1]

    def push(self, u: float, parts: Sequence[Tensor]) -> None:
        """Keep a copy of `parts` as the snapshot at time u; a snapshot at the same time is replaced."""
        if self._snapshots and [t.shape for t in self.newest] != [t.shape for t in parts]:
            self.clear()
        for i, time in enumerate(self.times):
            if abs(time - u) < SAME_TIME:
                del self.times[i], self._snapshots[i]
                break
        self.times.append(u)
        self._snapshots.append(tuple(t.detach().clone() for t in parts))
        while len(self.times) > self.capacity:
            del self.times[0], self._snapshots[0]

    def forecast(self, u: float, predictor: Predictor) -> tuple[tuple[Tensor, ...], int]:
        """Return (new tensors forecast for time u, order used). Raises ValueError when nothing is stored."""
        weights, order = predictor.weights(self.times, u)
        parts = tuple(weighted_sum(column, weights) for column in zip(*self._snapshots, strict=True))
        return parts, order

    def clear(self) -> None:
        self.times.clear()
        self._snapshots.clear()
