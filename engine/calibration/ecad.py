"""ECAD's evolutionary search (ICLR 2026, arXiv 2506.15682) for which blocks to compute at which steps.

The genome is a table [steps, blocks] of bits, 1 = compute, 0 = reuse what the block added when it last ran; NSGA-II
with the authors' operators (four-point crossover 0.9, bit flips 0.05, seeds from heuristic schedules) on two aims,
cost and error. The algorithm is pymoo's, which is only needed for this search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .search import uniform

CROSSOVER, FLIPS, POINTS = 0.9, 0.05, 4

# A population is a tenth of all evaluations, which leaves about ten generations; it always holds every seed.
GENERATIONS = 10


@dataclass(frozen=True)
class Genome:
    """blocks: [steps, blocks] uint8; cost: share of the network's work that is done; error: of the calibration runs;
    held_out: of runs the search has not seen, where it was measured."""

    blocks: Tensor
    cost: float
    error: float
    held_out: float | None = None


def missing() -> str:
    """Why the search cannot run here, empty where it can."""
    try:
        import pymoo.algorithms.moo.nsga2  # noqa: F401
    except ImportError:
        return "ECAD's search needs the package pymoo; install it with `pip install pymoo` and restart"
    return ""


def cost_of(blocks: Tensor, sizes: Sequence[int]) -> float:
    """Share of the work that a table leaves, blocks weighted by `sizes` (their parameters)."""
    weights = torch.tensor(sizes, dtype=torch.float64)
    return float((blocks.double() @ weights).sum() / (len(blocks) * weights.sum()))


def heuristics(steps: int, blocks: int, sizes: Sequence[int]) -> list[Tensor]:
    """Tables to begin with: even spacing at several distances, for all blocks or for those after the first few."""
    found = []
    for first in sorted({0, blocks // 4, blocks // 2}):
        for every in (2, 3, 4, 5):
            table = torch.zeros(steps, blocks, dtype=torch.uint8)
            table[:, :first] = 1
            table[list(uniform(steps, max(2, round(steps / every))))] = 1
            found.append(table)
    return sorted(found, key=lambda t: cost_of(t, sizes))


def evolve(
    error_of: Callable[[Tensor], float], steps: int, sizes: Sequence[int], evaluations: int, seed: int = 0
) -> list[Genome]:
    """The front of cost against error after about `evaluations` calls of error_of, cheapest first.

    error_of: error of the result with a table of blocks; it may raise to stop the search. sizes: parameters of each
    block. The first and the last step are always computed in full. Deterministic under a seed.
    """
    import numpy as np
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.operators.crossover.pntx import PointCrossover
    from pymoo.operators.mutation.bitflip import BitflipMutation
    from pymoo.optimize import minimize

    blocks = len(sizes)
    seen: dict[bytes, Genome] = {}

    def table_of(bits: Any) -> Tensor:
        inner = torch.from_numpy(np.ascontiguousarray(bits, dtype=np.uint8)).reshape(steps - 2, blocks)
        full = torch.ones(1, blocks, dtype=torch.uint8)
        return torch.cat([full, inner, full])

    class Search(ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(n_var=(steps - 2) * blocks, n_obj=2, xl=0, xu=1, vtype=bool)

        def _evaluate(self, bits: Any, out: dict, *args: Any, **kwargs: Any) -> None:
            key = np.packbits(bits.astype(bool)).tobytes()
            if key not in seen:
                table = table_of(bits)
                seen[key] = Genome(table, cost_of(table, sizes), error_of(table))
            out["F"] = [seen[key].cost, seen[key].error]

    start = [table[1:-1].reshape(-1).bool().numpy() for table in heuristics(steps, blocks, sizes)]
    population = max(len(start), evaluations // GENERATIONS)
    generator = np.random.default_rng(seed)
    while len(start) < population:
        parent = start[int(generator.integers(len(start)))]
        start.append(parent ^ (generator.random(parent.shape) < FLIPS))
    algorithm = NSGA2(
        pop_size=population,
        sampling=np.array(start),
        crossover=PointCrossover(prob=CROSSOVER, n_points=POINTS),
        mutation=BitflipMutation(prob=1.0, prob_var=FLIPS),
        eliminate_duplicates=True,
    )
    minimize(Search(), algorithm, ("n_eval", evaluations), seed=seed, verbose=False)
    return front(list(seen.values()))


def front(genomes: Sequence[Genome]) -> list[Genome]:
    """Those that no other one beats in both cost and error, cheapest first."""
    best: list[Genome] = []
    for genome in sorted(genomes, key=lambda g: (g.cost, g.error)):
        if not best or genome.error < best[-1].error:
            best.append(genome)
    return best
