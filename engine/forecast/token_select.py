"""Per-token choice between forecasts (TAP, arXiv 2603.03792): a cheap probe, computed for real, decides.

The probe is the output of the first block. Every candidate (order, horizon) is a weight row over the stored
snapshots; for each token the row whose forecast of the probe has the smallest cosine distance to the true probe also
forecasts the cached features. Only the m x m Gram matrix of each token's probe snapshots is needed for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.reference import rounded
from .predictors import Predictor

# As published: orders 0, 1, 2 and the true horizon or up to four steps less.
ORDERS = (0, 1, 2)
SHORTER = (0, 1, 2, 3, 4)


def candidates(times: Sequence[float], u: float) -> list[list[float]]:
    """The weight rows to choose from at u: TaylorSeer's ladder of every order at every horizon, without repeats.

    times: of the stored snapshots, newest last. Orders that lack snapshots or would be unstable fall to lower ones.
    """
    rows: list[list[float]] = []
    for order in ORDERS:
        for less in SHORTER:
            row = Predictor("taylorseer", order).weights(times, max(times[-1], u - less))[0]
            if row not in rows:
                rows.append(row)
    return rows


def choose(snapshots: Sequence[Tensor], probe: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """Index [...] of the best row for every token.

    snapshots: m stored probes [..., D]; probe: the true one, same shape; rows: P rows of m weights.
    """
    stored = torch.stack([s.to(probe.device).float() for s in snapshots], -2)
    weights = torch.tensor(rows, dtype=torch.float32, device=probe.device)
    gram = stored @ stored.transpose(-1, -2)
    along = (stored @ probe.float().unsqueeze(-1)).squeeze(-1)
    dots = along @ weights.T
    norms = torch.einsum("pi,...ij,pj->...p", weights, gram, weights).clamp_min(1e-20).sqrt()
    return (dots / norms).argmax(-1)


def combine(snapshots: Sequence[Tensor], index: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """The forecast [..., D] in which every token uses its own row; summed in float32, in the snapshots' dtype."""
    weights = torch.tensor(rows, dtype=torch.float32, device=index.device)[index]
    total = torch.zeros_like(snapshots[0], dtype=torch.float32)
    for j, snapshot in enumerate(snapshots):
        total += weights[..., j, None] * snapshot.float()
    return rounded(total, snapshots[0].dtype)
