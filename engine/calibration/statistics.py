"""What a calibration keeps of a trajectory: a few n x n numbers, from which the error of every forecast follows.

A forecast is a weighted sum of snapshots, so its squared error is a quadratic form of the Gram matrix of the run's
snapshots: with w~ = (1 at the true step, -w at the anchors), error = w~^T G w~.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..forecast.predictors import Predictor


@dataclass(frozen=True)
class TrajectoryStatistics:
    """What one calibration keeps of a trajectory of n snapshots q_i.

    times: step coordinate of each; gram [n, n] float64: mean over elements of q_i q_j; distance [n, n] float64: mean
    |q_i - q_j|; size [n] float64: mean |q_i|. Averages over prompts and conds are taken by `merged`.
    """

    times: tuple[float, ...]
    gram: Tensor
    distance: Tensor
    size: Tensor

    def __post_init__(self) -> None:
        n = len(self.times)
        if n < 2 or self.gram.shape != (n, n) or self.distance.shape != (n, n) or self.size.shape != (n,):
            raise ValueError(f"statistics of {n} steps need two {n} x {n} matrices and {n} sizes")

    @property
    def steps(self) -> int:
        return len(self.times)

    @classmethod
    def of(cls, snapshots: Sequence[Tensor], times: Sequence[float]) -> TrajectoryStatistics:
        """The statistics of a whole trajectory; for tests and short runs, a calibration streams them."""
        rows = torch.stack([s.detach().reshape(-1).double() for s in snapshots])
        size = rows.shape[1]
        distance = torch.cdist(rows, rows, p=1) / size
        return cls(tuple(times), rows @ rows.T / size, distance, rows.abs().mean(1))

    @classmethod
    def merged(cls, runs: Sequence[TrajectoryStatistics]) -> TrajectoryStatistics:
        """The mean of several runs over the same schedule. Raises ValueError where the schedules differ."""
        if any(run.times != runs[0].times for run in runs):
            raise ValueError("only runs over one schedule can be merged")
        return cls(
            runs[0].times,
            torch.stack([run.gram for run in runs]).mean(0),
            torch.stack([run.distance for run in runs]).mean(0),
            torch.stack([run.size for run in runs]).mean(0),
        )

    def forecast_errors(self, anchors: Sequence[int], predictor: Predictor) -> list[float]:
        """Mean squared errors of the forecasts from the snapshots at `anchors` (sorted) for every step after them."""
        times = [self.times[a] for a in anchors]
        later = range(anchors[-1] + 1, self.steps)
        if not later:
            return []
        weights = torch.tensor([weights_at(predictor, times, self.times[i]) for i in later], dtype=torch.float64)
        index = list(anchors)
        own = self.gram.diagonal()[later.start :]
        cross = (weights * self.gram[later.start :, index]).sum(1)
        among = ((weights @ self.gram[index][:, index]) * weights).sum(1)
        return (own - 2 * cross + among).clamp_min(0).tolist()


def weights_at(predictor: Predictor, times: Sequence[float], u: float) -> list[float]:
    """`predictor.weights`, remembered by differences of times where only those matter: a programme asks very often."""
    if not predictor.shifted:
        return predictor.weights(times, u)[0]
    return list(_weights_by_distance(predictor, tuple(round(t - u, 9) for t in times)))


@lru_cache(maxsize=1 << 16)
def _weights_by_distance(predictor: Predictor, distances: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(predictor.weights(distances, 0.0)[0])
