"""ECAD's search on a model of a network: it finds the blocks that matter, keeps its rules, and repeats itself."""

from __future__ import annotations

import pytest
import torch
from slipstream.engine.calibration import ecad

STEPS, SIZES = 10, [100, 100, 300]


def error_of(table: torch.Tensor) -> float:
    """Block 0 matters at every step, block 1 not at all, block 2 at the even steps."""
    reused = 1.0 - table.double()
    return float(reused[:, 0].sum() + 0.01 * reused[:, 1].sum() + reused[::2, 2].sum() + 0.01 * reused[1::2, 2].sum())


def test_the_search_finds_what_matters_and_beats_its_seeds():
    found = ecad.evolve(error_of, STEPS, SIZES, 400)
    assert found == sorted(found, key=lambda g: g.cost) and len(found) > 5
    seeds = [ecad.Genome(t, ecad.cost_of(t, SIZES), error_of(t)) for t in ecad.heuristics(STEPS, 3, SIZES)]
    for seed in seeds:
        assert any(g.cost <= seed.cost + 1e-9 and g.error <= seed.error + 1e-9 for g in found)
    even = next(s for s in seeds if abs(s.cost - 0.5) < 0.06)
    rival = [g for g in found if g.cost <= even.cost]
    assert rival and min(g.error for g in rival) < 0.7 * even.error
    for genome in found:
        assert genome.blocks[0].all() and genome.blocks[-1].all() and genome.blocks.dtype == torch.uint8
        assert genome.cost == ecad.cost_of(genome.blocks, SIZES) and genome.error == error_of(genome.blocks)


def test_the_same_seed_gives_the_same_front_and_the_budget_is_kept():
    calls = []

    def counted(table):
        calls.append(table)
        return error_of(table)

    one = ecad.evolve(counted, STEPS, SIZES, 60, seed=3)
    assert len(calls) <= 60 + len(ecad.heuristics(STEPS, 3, SIZES))
    two = ecad.evolve(error_of, STEPS, SIZES, 60, seed=3)
    assert [(g.cost, g.error) for g in one] == [(g.cost, g.error) for g in two]
    assert all(torch.equal(a.blocks, b.blocks) for a, b in zip(one, two, strict=True))


def test_an_error_in_an_evaluation_stops_the_search():
    def cancelled(table):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ecad.evolve(cancelled, STEPS, SIZES, 60)


def test_cost_is_the_share_of_the_parameters_that_run():
    table = torch.zeros(4, 3, dtype=torch.uint8)
    table[0] = table[3] = 1
    table[1, 2] = 1
    assert ecad.cost_of(table, SIZES) == pytest.approx((2 * 500 + 300) / 2000)


def test_without_the_package_there_is_one_sentence(monkeypatch):
    import sys

    assert ecad.missing() == ""
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    assert ecad.missing().startswith("ECAD's search needs the package pymoo")
