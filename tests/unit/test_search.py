"""Schedules from statistics: the programmes find what trying everything finds, and keep to their limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine.history import History
from slipstream.engine.predictors import Predictor
from slipstream.engine.search import (
    brute_force,
    cachequant,
    error_gains,
    forecast_aware,
    predicted_error,
    uniform,
)
from slipstream.engine.statistics import Statistics

PREDICTORS = [Predictor("reuse", 0), Predictor("newton", 1), Predictor("newton", 2), Predictor("taylorseer", 2)]


def trajectory(steps: int, seed: int) -> list[torch.Tensor]:
    """A smooth path with a bend, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(24, generator=generator) for _ in range(3))
    t = torch.linspace(0, 1, steps)
    return [a + b * x + c * torch.sin(3 * x * x) + 0.01 * torch.randn(24, generator=generator) for x in t]


def statistics(steps: int, seed: int = 0) -> Statistics:
    return Statistics.of(trajectory(steps, seed), [float(i) for i in range(steps)])


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: f"{p.rule}{p.order}")
def test_the_gram_matrix_gives_the_true_forecast_error(predictor):
    path = trajectory(9, 3)
    stats = Statistics.of(path, range(9))
    history = History(predictor.anchors)
    for anchor in (1, 3, 4)[-predictor.anchors :]:
        history.push(float(anchor), (path[anchor][None].double(),))
    forecast, _ = history.forecast(7.0, predictor)
    expected = (forecast[0][0] - path[7].double()).square().mean().item()
    errors = stats.forecast_errors((1, 3, 4)[-predictor.anchors :], predictor)
    assert len(errors) == 4 and errors[2] == pytest.approx(expected, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 10), st.integers(0, 100), st.sampled_from(PREDICTORS), st.data())
def test_the_programme_equals_brute_force(steps, seed, predictor, data):
    count = data.draw(st.integers(2, steps))
    weights = data.draw(st.lists(st.floats(0.1, 4.0), min_size=steps, max_size=steps))
    stats = statistics(steps, seed)
    solved = forecast_aware(stats, count, predictor, weights)
    tried = brute_force(stats, count, predictor, weights)
    assert solved.error == pytest.approx(tried.error, rel=1e-7, abs=1e-7)
    assert solved.error == pytest.approx(predicted_error(stats, solved.keys, predictor, weights), rel=1e-7, abs=1e-7)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 12), st.integers(0, 100), st.data())
def test_cachequant_equals_brute_force(steps, seed, data):
    count = data.draw(st.integers(2, steps))
    stats = statistics(steps, seed)

    def cost(keys):
        return sum(float(stats.distance[a, a + 1 : b].sum()) for a, b in itertools.pairwise(keys))

    best = min(cost((0, *m, steps - 1)) for m in itertools.combinations(range(1, steps - 1), count - 2))
    solved = cachequant(stats, count)
    assert solved.error == pytest.approx(best) and cost(solved.keys) == pytest.approx(best)


@given(st.integers(2, 60), st.data())
def test_schedules_keep_first_last_and_number(steps, data):
    count = data.draw(st.integers(2, steps))
    keys = uniform(steps, count)
    assert len(keys) == count and keys[0] == 0 and keys[-1] == steps - 1 and list(keys) == sorted(set(keys))


def test_the_largest_gap_is_kept_or_refused():
    stats = statistics(12)
    solved = forecast_aware(stats, 5, PREDICTORS[1], max_gap=4)
    assert max(b - a for a, b in itertools.pairwise(solved.keys)) <= 4 and len(solved.keys) == 5
    with pytest.raises(ValueError, match="cannot keep every gap within 2"):
        forecast_aware(stats, 5, PREDICTORS[1], max_gap=2)
    for count in (1, 13):
        with pytest.raises(ValueError, match="it must be 2"):
            forecast_aware(stats, count, PREDICTORS[0])


def test_a_schedule_that_knows_its_predictor_beats_even_spacing():
    stats = statistics(40, 7)
    for predictor in PREDICTORS[:2]:
        even = predicted_error(stats, uniform(40, 12), predictor)
        assert forecast_aware(stats, 12, predictor).error < 0.8 * even


@pytest.mark.parametrize("flow", [True, False])
def test_error_gains_are_those_of_a_simulated_run(flow):
    """An error at one step of an Euler run on Gaussian data, against the same run without it."""
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.0] if flow else [8.0, 4.0, 1.5, 0.4, 0.0]
    variance = 0.6

    def slope(x, s):
        gain = (1 - s) * variance / ((1 - s) ** 2 * variance + s * s) if flow else variance / (variance + s * s)
        return (x - gain * x) / s

    def run(wrong):
        x = 1.7
        for i, (s, following) in enumerate(itertools.pairwise(sigmas)):
            x += (following - s) * (slope(x, s) + (1e-3 if i == wrong else 0.0))
        return x

    plain = run(None)
    for step, gain in enumerate(error_gains(sigmas, variance, flow)):
        assert ((run(step) - plain) / 1e-3) ** 2 == pytest.approx(gain, rel=1e-5)


def test_merged_statistics_are_means_over_one_schedule():
    one, two = statistics(6, 1), statistics(6, 2)
    both = Statistics.merged([one, two])
    assert torch.allclose(both.gram, (one.gram + two.gram) / 2)
    with pytest.raises(ValueError, match="one schedule"):
        Statistics.merged([one, statistics(7)])
    with pytest.raises(ValueError, match="two 6 x 6 matrices"):
        Statistics(one.times, one.gram[:5], one.distance, one.size)
