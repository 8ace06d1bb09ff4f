"""Schedules from statistics: the programmes find what trying everything finds, and keep to their limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine.calibration.choice import (
    SCHEDULES,
    STRETCH,
    Search,
    error_effects,
    evident,
    gaussian_jacobians,
    interpolated,
)
from slipstream.engine.calibration.search import (
    Solution,
    adjusted_sigmas,
    by_threshold,
    drift_walk,
    ertacache_walk,
    magnitude_ratios,
    predicted_error,
    programme_of_cachequant,
    programme_of_forecasts,
    step_coefficients,
    uniform,
)
from slipstream.engine.calibration.statistics import TrajectoryStatistics
from slipstream.engine.forecast.history import History
from slipstream.engine.forecast.predictors import Predictor

PREDICTORS = [Predictor("reuse", 0), Predictor("newton", 1), Predictor("newton", 2), Predictor("taylorseer", 2)]


def trajectory(steps: int, seed: int) -> list[torch.Tensor]:
    """A smooth path with a bend, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(24, generator=generator) for _ in range(3))
    t = torch.linspace(0, 1, steps)
    return [a + b * x + c * torch.sin(3 * x * x) + 0.01 * torch.randn(24, generator=generator) for x in t]


def statistics(steps: int, seed: int = 0) -> TrajectoryStatistics:
    return TrajectoryStatistics.of(trajectory(steps, seed), [float(i) for i in range(steps)])


def cachequant(stats: TrajectoryStatistics, count: int) -> Solution:
    return programme_of_cachequant(stats).solve(count)


def forecast_aware(
    stats: TrajectoryStatistics, count: int, predictor: Predictor, weights=None, max_gap=None
) -> Solution:
    """Its error is the root of what the programme adds up."""
    solution = programme_of_forecasts(stats, predictor, weights, max_gap).solve(count)
    return Solution(solution.keys, math.sqrt(solution.error))


def brute_force(stats: TrajectoryStatistics, count: int, predictor: Predictor, weights=None) -> Solution:
    """The same by trying every subset."""
    last = stats.steps - 1
    tried = ((0, *keys, last) for keys in itertools.combinations(range(1, last), count - 2))
    return min((Solution(k, predicted_error(stats, k, predictor, weights)) for k in tried), key=lambda s: s.error)


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: f"{p.rule}{p.order}")
def test_the_gram_matrix_gives_the_true_forecast_error(predictor):
    path = trajectory(9, 3)
    stats = TrajectoryStatistics.of(path, range(9))
    history = History(predictor.anchors)
    for anchor in (1, 3, 4)[-predictor.anchors :]:
        history.push(float(anchor), (path[anchor][None].double(),))
    forecast, _ = history.forecast(7.0, predictor)
    expected = (forecast[0][0] - path[7].double()).square().mean().item()
    errors = stats.forecast_errors((1, 3, 4)[-predictor.anchors :], predictor)
    assert len(errors) == 4 and errors[2] == pytest.approx(expected, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 12), st.integers(0, 100), st.sampled_from(PREDICTORS), st.data())
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
def test_error_effects_are_those_of_a_simulated_run(flow):
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
    for step, effect in enumerate(error_effects(sigmas, gaussian_jacobians(sigmas, variance, flow))):
        assert (run(step) - plain) / 1e-3 == pytest.approx(effect, rel=1e-5)


def test_merged_statistics_are_means_over_one_schedule():
    one, two = statistics(6, 1), statistics(6, 2)
    both = TrajectoryStatistics.merged([one, two])
    assert torch.allclose(both.gram, (one.gram + two.gram) / 2)
    with pytest.raises(ValueError, match="one schedule"):
        TrajectoryStatistics.merged([one, statistics(7)])
    with pytest.raises(ValueError, match="two 6 x 6 matrices"):
        TrajectoryStatistics(one.times, one.gram[:5], one.distance, one.size)


def bent(steps: int = 28) -> TrajectoryStatistics:
    """A path that hardly moves at first and bends in the middle: even spacing is not the best there."""
    generator = torch.Generator().manual_seed(5)
    a, b, c = (torch.randn(64, generator=generator) for _ in range(3))
    t = torch.linspace(0, 1, steps)
    return TrajectoryStatistics.of([a + b * torch.sigmoid(14 * (x - 0.5)) + 0.3 * c * x * x for x in t], range(steps))


def search(statistics: TrajectoryStatistics, predictor: Predictor = PREDICTORS[1]) -> Search:
    n = statistics.steps
    sigmas = [1.0 - i / n for i in range(n + 1)]
    return Search(statistics, predictor, sigmas, [1.0] * n)


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: f"{p.rule}{p.order}")
@pytest.mark.parametrize("count", [2, 7, 11, 28])
def test_every_method_gives_a_schedule_of_the_number_asked_for_and_always_the_same(predictor, count):
    one, two = search(bent(), predictor), search(bent(), predictor)
    found = one.candidates(count)
    assert found == two.candidates(count) and found == sorted(found, key=lambda c: (c.error, c.keys))
    for candidate in found:
        keys = candidate.keys
        assert len(keys) == count and keys[0] == 0 and keys[-1] == 27 and list(keys) == sorted(set(keys))
        assert candidate.schedule in SCHEDULES and candidate.drift >= 0
    if count == 28:
        assert found[0].error == found[0].drift == 0.0


def test_the_coherent_schedule_is_expected_to_be_the_best_of_all():
    one = search(bent())
    for count in (7, 10, 14):
        errors = {s: one.result_error(one.keys(s, count)) for s in ("even", "CacheQuant", "forecast-aware", "weighted")}
        assert one.result_error(one.keys("coherent", count)) <= min(errors.values()) + 1e-12
        assert one.result_error(one.keys("coherent", count)) < 0.7 * errors["even"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 2.0))
def test_the_expected_error_is_that_of_a_linear_run(seed, growth):
    """Errors that all point the same way, in a model whose Jacobian is the measured one: no forgetting, no stretch."""
    n, generator = 12, torch.Generator().manual_seed(seed)
    keys = (0, 3, 4, 8, 11)
    direction = torch.randn(30, generator=generator, dtype=torch.float64)
    path = [direction * float(v) for v in torch.randn(n, generator=generator, dtype=torch.float64)]
    sigmas = [1.0 - i / n for i in range(n + 1)]
    one = Search(TrajectoryStatistics.of(path, range(n)), PREDICTORS[0], sigmas, [growth / STRETCH] * n)
    one._coherence = torch.ones(n, n, dtype=torch.float64)
    delta, newest = torch.zeros(30, dtype=torch.float64), path[0]
    for i in range(n):
        newest = path[i] if i in keys else newest
        ratio = sigmas[i + 1] / sigmas[i]
        delta = (ratio + (1 - ratio) * growth) * delta + (sigmas[i + 1] - sigmas[i]) * (newest - path[i])
    assert one.result_error(keys) == pytest.approx(delta.square().mean().sqrt().item(), rel=1e-6, abs=1e-9)


def test_thresholds_are_those_of_the_published_rules():
    stats = bent()
    for threshold in (0.05, 0.2, 0.6):
        keys, newest = [0], 0
        for step in range(1, 27):
            if float(stats.distance[newest, step] / stats.size[step]) >= threshold:
                keys.append(step)
                newest = step
        assert ertacache_walk(stats, threshold) == (*keys, 27)
    ratios = magnitude_ratios(stats)
    rows = stats.gram.diagonal().sqrt()
    assert ratios[0] == 1.0 and ratios[9] == pytest.approx(float(rows[9] / rows[8]))
    for budget in (0.02, 0.1):
        keys = drift_walk(stats, PREDICTORS[0], budget)
        for a, b in itertools.pairwise(keys):
            errors = [math.sqrt(e) for e in stats.forecast_errors([a], PREDICTORS[0])[: b - a]]
            assert all(e <= budget for e in errors[:-1]) and (errors[-1] > budget or b == 27)
    assert (
        by_threshold(lambda t: ertacache_walk(stats, t), 9) is None
        or len(by_threshold(lambda t: ertacache_walk(stats, t), 9)) == 9
    )


def test_step_coefficients_shorten_reused_steps_and_keep_both_ends():
    stats = bent()
    keys = uniform(28, 10)
    factors = step_coefficients(stats, keys)
    assert all(factors[k] == 1.0 for k in keys) and all(0.0 <= f <= 1.0 for f in factors) and min(factors) < 1.0
    sigmas = [1.0 - i / 28 for i in range(29)]
    adjusted = adjusted_sigmas(sigmas, factors)
    assert adjusted[0] == 1.0 and adjusted[-1] == 0.0 and len(adjusted) == 29
    assert all(a >= b for a, b in itertools.pairwise(adjusted))
    assert adjusted_sigmas(sigmas, [1.0] * 28) == pytest.approx(sigmas)
    first = next(i for i, f in enumerate(factors) if f < 1)
    step = sigmas[first] - sigmas[first + 1]
    assert adjusted[first] - adjusted[first + 1] == pytest.approx(factors[first] * step)


def test_evidence_is_what_exceeds_the_spread_of_the_runs():
    expected, better = [50.0, 60.0, 55.0, 52.0], [52.0, 61.5, 57.5, 53.0]
    unclear = [40.0, 72.0, 55.0, 52.0]  # better on average, because of one run
    assert evident([expected, better]) == 1 and evident([better, expected]) == 0
    assert evident([expected, unclear]) == 0 and evident([expected, unclear, better]) == 2
    assert evident([expected]) == 0 and evident([[50.0], [50.9]]) == 0 and evident([[50.0], [51.1]]) == 1
    assert evident([expected, expected]) == 0


def test_measured_values_are_carried_over_to_all_steps():
    assert interpolated({2: 1.0, 6: 3.0}, 9) == pytest.approx((1, 1, 1, 1.5, 2, 2.5, 3, 3, 3))
    assert interpolated({4: 0.7}, 3) == pytest.approx((0.7, 0.7, 0.7))
