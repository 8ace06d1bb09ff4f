"""Schedules, gates and the per-token choice: what each paper's rule decides, on numbers one can check by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine.forecast.history import History, Storage
from slipstream.engine.forecast.predictors import (
    RULES,
    Predictor,
    adams_bashforth,
    chebyshev,
    hermite,
    newton,
)
from slipstream.engine.forecast.schedules import (
    BlockMask,
    ConfidenceGate,
    Drift,
    DriftBudget,
    FirstBlockGate,
    KeySteps,
    Magnitude,
    ModulatedChange,
    Trace,
    fitted_ratios,
    power_grid,
    scaled_keys,
)
from slipstream.engine.forecast.token_select import candidates, choose, combine

gaps = st.lists(st.floats(0.3, 3.0), min_size=3, max_size=5)
polynomials = st.lists(st.floats(-2, 2), min_size=4, max_size=4)


def times_from(steps: list[float]) -> list[float]:
    times = [0.0]
    for step in steps:
        times.append(times[-1] + step)
    return times


def forecast(weights, times, coefficients):
    values = [sum(c * t**k for k, c in enumerate(coefficients)) for t in times]
    terms = [w * v for w, v in zip(weights, values, strict=True)]
    return sum(terms), 1 + sum(map(abs, terms))


@given(gaps, st.floats(0.1, 4.0), st.integers(1, 2), polynomials)
def test_h50_hermite_at_its_matched_scale_is_exact_on_polynomials(steps, ahead, order, coefficients):
    times = times_from(steps)
    u, polynomial = times[-1] + ahead, coefficients[: order + 1]
    value, scale = forecast(hermite(times, u, order), times, polynomial)
    assert value == pytest.approx(sum(c * u**k for k, c in enumerate(polynomial)), abs=1e-8 * scale)


@given(gaps, st.floats(0.1, 4.0), st.floats(-2, 2), st.floats(0.1, 1.0))
def test_hermite_damps_the_slope_by_twice_the_scale_squared(steps, ahead, slope, scale):
    times = times_from(steps)
    value, size = forecast(hermite(times, times[-1] + ahead, 1, scale), times, [0.0, slope])
    assert value == pytest.approx(slope * (times[-1] + 2 * scale**2 * ahead), abs=1e-8 * size)
    assert hermite(times, times[-1], 2, scale) == pytest.approx([0.0] * (len(times) - 1) + [1.0])


@given(gaps, st.floats(0.1, 4.0), st.integers(0, 3), polynomials)
def test_h50_adams_bashforth_is_exact_for_the_step_ahead(steps, ahead, order, coefficients):
    """Its value is what the step [u, u + 1] needs: the mean of the polynomial there."""
    times = times_from(steps)
    u, polynomial = times[-1] + ahead, coefficients[: order + 1]
    value, scale = forecast(adams_bashforth(times, u, order), times, polynomial)
    mean = sum(c * ((u + 1) ** (k + 1) - u ** (k + 1)) / (k + 1) for k, c in enumerate(polynomial))
    assert value == pytest.approx(mean, abs=1e-8 * scale)


def test_adams_bashforth_on_even_steps_is_the_textbook_method():
    assert adams_bashforth([0.0, 1.0], 1.0, 1) == pytest.approx([-1 / 2, 3 / 2])
    assert adams_bashforth([0.0, 1.0, 2.0], 2.0, 2) == pytest.approx([5 / 12, -16 / 12, 23 / 12])
    assert adams_bashforth([0.0, 1.0, 2.0, 3.0], 3.0, 3) == pytest.approx([-9 / 24, 37 / 24, -59 / 24, 55 / 24])


@given(gaps, st.floats(0.1, 4.0), polynomials)
def test_a_chebyshev_fit_without_ridge_is_the_interpolating_polynomial(steps, ahead, coefficients):
    times = times_from(steps)[:4]
    u = times[-1] + ahead
    fit = chebyshev(times, u, 3, steps=20, ridge=1e-12, mix=1.0)
    value, scale = forecast(fit, times, coefficients)
    assert value == pytest.approx(sum(c * u**k for k, c in enumerate(coefficients)), abs=1e-3 * scale * (1 + u) ** 3)
    half = chebyshev(times, u, 3, steps=20, ridge=1e-12, mix=0.5)
    assert half == pytest.approx([(a + b) / 2 for a, b in zip(fit, newton(times, u, 1), strict=True)])


@given(gaps, st.floats(0.0, 9.0), st.sampled_from(sorted(RULES)), st.integers(0, 4))
def test_h51_every_rule_lowers_its_order_by_itself(steps, ahead, rule, order):
    times = times_from(steps)
    predictor = Predictor(rule, min(order, RULES[rule].most), steps=28)
    for count in range(1, len(times) + 1):
        weights, used = predictor.weights(times[:count], times[count - 1] + ahead)
        assert len(weights) == count and used <= min(order, count - 1)
        assert all(map(math.isfinite, weights)) and sum(map(abs, weights)) <= 5.0 + 1e-9


# -- schedules -----------------------------------------------------------------------------------------------------


def keys_of(schedule, steps: int) -> list[int]:
    """The steps a schedule computes when nothing else forbids filling."""
    trace, computed = Trace(steps, times=[0.0]), [0]
    for step in range(1, steps):
        if not schedule.skip(trace, float(step), 0):
            computed.append(step)
            trace.times.append(float(step))
    return computed


def test_deepcache_power_grid_is_dense_at_its_centre():
    keys = power_grid(50, 5, 1.4, 15)  # the settings of the SD1.5 script of the paper's code
    assert len(keys) == 10 and keys[0] == 0 and 15 in keys
    spacing = [b - a for a, b in itertools.pairwise(keys)]
    assert min(spacing) == 2 and spacing[-1] == max(spacing)
    assert keys_of(KeySteps(keys), 50) == list(keys)
    with pytest.raises(ValueError, match="no power grid"):
        power_grid(4, 1, 1.01, 1)


def test_published_key_steps_keep_their_place_at_another_step_count():
    published = (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert scaled_keys(published, 50, 50) == published
    keys = scaled_keys(published, 50, 28)
    assert keys[0] == 0 and keys[-1] == 19 and keys_of(KeySteps(keys), 28) == list(keys)


def test_key_steps_between_the_grid_compute_the_first_evaluation_at_or_after_a_key():
    schedule, trace = KeySteps((0, 4)), Trace(10, times=[3.5])
    assert schedule.skip(trace, 3.9, 0) and not schedule.skip(trace, 4.5, 0)
    assert schedule.skip(Trace(10, times=[4.0]), 4.5, 0)


def test_magcache_adds_up_the_error_of_the_magnitude():
    ratios = (1.0, 1.1, 1.1, 1.0, 0.9)
    schedule = Magnitude(0.35, ratios, retention=0.2, most=3)
    trace = Trace(5, times=[0.0])
    assert not schedule.skip(trace, 0.9, 0)  # still in the retained part
    assert schedule.skip(trace, 1.0, 0)  # |1 - 1.1| = 0.1
    assert schedule.skip(trace, 2.0, 0)  # 0.1 + |1 - 1.21| = 0.31
    assert not schedule.skip(trace, 3.0, 0)  # 0.31 + 0.21
    assert not Magnitude(9.0, ratios, 0.0, 2).skip(trace, 3.0, 0)  # three fills in a row are too many
    assert fitted_ratios((1.0, 2.0, 3.0), 5) == (1.0, 1.0, 2.0, 3.0, 3.0) or fitted_ratios((1.0, 2.0, 3.0), 5) == (
        1.0, 1.0, 2.0, 2.0, 3.0,
    )  # fmt: skip
    assert fitted_ratios((1.0, 2.0, 3.0), 3) == (1.0, 2.0, 3.0)


def test_gates_compare_with_their_threshold():
    trace = Trace(28, times=[0.0])
    for gate in (FirstBlockGate(0.1), ConfidenceGate(0.1)):
        assert gate.accept(trace, 0.09) and not gate.accept(trace, 0.1) and not gate.accept(trace, math.nan)


def test_teacache_accumulates_its_polynomial_until_the_threshold():
    gate, trace = ModulatedChange(0.5, (2.0, 0.1)), Trace(28, times=[0.0])  # 2 x + 0.1
    assert gate.accept(trace, 0.1) and trace.accumulated == pytest.approx(0.3)
    assert not gate.accept(trace, 0.05) and trace.accumulated == pytest.approx(0.5)


def test_the_drift_budget_weighs_steps_by_what_they_do():
    trace = Trace(4, times=[0.0, 1.0], drifts=[Drift(1.0, 0.1, 0, 1.0)])
    assert not DriftBudget(0.09).skip(trace, 2.0, 0)
    assert DriftBudget(0.09, (1.0, 1.0, 0.5, 1.0)).skip(trace, 2.0, 0)


def test_a_block_mask_computes_what_its_table_names():
    """Its first and last step whole, and an evaluation between two steps by the row of the earlier one."""
    mask = BlockMask(((0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 1, 1), (0, 0, 0)))
    ran = [[mask.computes(mask.step(u), b) for b in range(3)] for u in (0.0, 0.9, 1.0, 1.5, 2.0, 4.0, 9.0)]
    assert ran == [[True] * 3] * 2 + [[True, False, True]] * 2 + [[False, False, True]] + [[True] * 3] * 2
    trace = Trace(5, times=[0.0])
    assert [mask.skip(trace, float(u), 0) for u in range(5)] == [False, True, True, False, False]
    assert mask.step(2.0 - 1e-12) == 2 and mask.blocks == 3


def test_a_block_mask_keeps_only_what_the_next_step_reuses():
    mask = BlockMask(((1, 1, 1), (1, 0, 1), (0, 0, 1), (1, 1, 1), (0, 0, 0)))
    assert [[mask.keeps(step, b) for b in range(3)] for step in range(5)] == [
        [False, True, False], [True, True, False], [False] * 3, [False] * 3, [False] * 3,
    ]  # fmt: skip
    assert mask.reused == 2


# -- per token -----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.5, 4.0))
def test_tap_chooses_for_every_token_the_row_that_forecasts_the_probe_best(seed, ahead):
    generator = torch.Generator().manual_seed(seed)
    times = [0.0, 1.0, 3.0]
    snapshots = [torch.randn(2, 5, 8, generator=generator) for _ in times]
    probe = torch.randn(2, 5, 8, generator=generator)
    rows = candidates(times, times[-1] + ahead)
    index = choose(snapshots, probe, rows)
    forecasts = torch.stack([sum(w * s for w, s in zip(row, snapshots, strict=True)) for row in rows])
    cosine = torch.nn.functional.cosine_similarity(forecasts, probe[None], dim=-1)
    best = cosine.max(0).values
    chosen = cosine.gather(0, index[None])[0]
    assert torch.allclose(chosen, best, atol=1e-4)
    expected = forecasts.gather(0, index[None, ..., None].expand(1, 2, 5, 8))[0]
    assert torch.allclose(combine(snapshots, index, rows), expected, atol=1e-4)


def test_tap_candidates_are_orders_and_horizons_without_repeats():
    rows = candidates([0.0, 2.0, 4.0], 6.0)
    assert [0.0, 0.0, 1.0] in rows and len(rows) == len({tuple(r) for r in rows})
    assert len(rows) == 5  # reuse, and two horizons (6 and 5; 4 and less are the newest snapshot) of orders 1 and 2
    assert len(candidates([1.0], 3.0)) == 1


# -- storage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_h69_snapshots_survive_their_storage(storage, dtype):
    history = History(2, storage)
    values = [torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2)]
    for u, value in enumerate(values):
        history.push(float(u), (value,))
    result, order = history.forecast(2.0, Predictor("newton", 1))
    expected = (2 * values[1].float() - values[0].float()).to(dtype)
    error = (result[0].float() - expected.float()).norm() / expected.float().norm()
    assert order == 1 and result[0].dtype == dtype and result[0].device == values[0].device
    assert error < (0.02 if storage is Storage.INT8 else 1e-6)
    full = 2 * values[0].numel() * values[0].element_size()
    assert history.nbytes == full if storage is not Storage.INT8 else history.nbytes < 0.6 * full
    values[1].zero_()
    assert history.newest[0].abs().max() > 0  # a copy, wherever it lies
