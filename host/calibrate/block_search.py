"""ECAD for the user's own sampling: which blocks to compute at which steps, found on some runs, chosen on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ...engine.calibration.choice import Search
from ...engine.calibration.ecad import Genome, evolve, missing
from ...engine.calibration.profile import BLOCKS, Profile
from ...engine.families import Architecture, architecture_of
from ...engine.metrics import relative_error
from ...engine.run.recipe import lacks
from ...engine.sites.levels import EACH
from ...engine.sites.stack import block_sizes
from ..profiles.folder import fingerprint
from .job import Job, Tell, Wish
from .recording import Recorded, about, following, size_of

# The search needs a run to learn from and one to be chosen by; how many points of its front are sampled there, at most.
FEWEST_RUNS, FRONT = 2, 8


def trouble(job: Job, row: Architecture) -> str:
    """Why this job cannot be searched; empty where it can."""
    why = lacks(EACH, row) or missing()
    if not why and len(job.runs) < FEWEST_RUNS:
        why = f"ECAD's search is checked on a run it has not seen; set runs to at least {FEWEST_RUNS}"
    return why


def search_blocks(job: Job, wish: Wish, recorded: Recorded, search: Search, tell: Tell) -> Profile:
    """The block schedule that ECAD's search finds on all runs but the last, chosen by its error on the last."""
    network = job.model.get_model_object("diffusion_model")
    row = architecture_of(network)
    sizes = block_sizes(network, row)
    values = job.values
    steps, held_out = len(values) - 1, len(job.runs) - 1
    count = 0

    def profile_of(blocks: Tensor, told: dict | None = None) -> Profile:
        keys = tuple(i for i in range(steps) if bool(blocks[i].all()))
        return Profile(keys, values, recorded.statistics, fingerprint(job.model), EACH, "", told or {},
                       extras={**recorded.extras, BLOCKS: blocks})  # fmt: skip

    def error_of(blocks: Tensor, runs: Sequence[int] = range(held_out)) -> float:
        nonlocal count
        count += 1
        model = following(job.model, profile_of(blocks))
        callback = tell(f"ECAD: sampling {count} of about {wish.ecad_runs}", job.steps)
        return sum(relative_error(job.sample(model, r, callback), recorded.finals[r]) for r in runs) / len(runs)

    found = evolve(error_of, steps, sizes, max(1, wish.ecad_runs // held_out), seed=job.runs[0][1])
    if wish.goal == "speed-up":
        limit = 1.0 / wish.speed_up
        near = sorted(found, key=lambda g: abs(g.cost - limit))[:FRONT]
    else:
        near = sorted(found, key=lambda g: abs(g.error - wish.max_drift))[:FRONT]
    tried = [dataclasses.replace(g, held_out=error_of(g.blocks, [held_out])) for g in near]
    chosen = _chosen(tried, wish)
    even = search.keys("even", max(2, round(chosen.cost * steps)))
    told = about(job, recorded) | {
        "schedule": "ECAD",
        "blocks": len(sizes),
        "cost": chosen.cost,
        "samplings": count,
        "front": [[g.cost, g.error, g.held_out] for g in sorted(tried, key=lambda g: g.cost)],
        "predicted_error": chosen.error,
        "measured_error": chosen.held_out,
        "overfitted": chosen.held_out / chosen.error if chosen.error else 1.0,
        "whole_steps_error": search.result_error(even) / size_of(job.model, recorded.finals),
    }
    return profile_of(chosen.blocks, told)


def _chosen(tried: Sequence[Genome], wish: Wish) -> Genome:
    """The least held-out error within the cost, or the least cost within the error; else the nearest to it."""
    if wish.goal == "speed-up":
        within = [g for g in tried if g.cost <= 1.0 / wish.speed_up]
        return min(within, key=lambda g: g.held_out) if within else min(tried, key=lambda g: g.cost)
    within = [g for g in tried if g.held_out <= wish.max_drift]
    return min(within, key=lambda g: g.cost) if within else min(tried, key=lambda g: g.held_out)
