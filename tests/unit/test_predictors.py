"""H50 to H53: forecasts are exact where they claim to be, and never infinite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine.families import ROWS
from slipstream.engine.forecast.history import History, Storage
from slipstream.engine.forecast.predictors import LEBESGUE_LIMIT, RULES, Predictor, newton, taylorseer
from slipstream.engine.forecast.schedules import AccumulatedChange, Drift, DriftBudget, Interval, Trace, span
from slipstream.engine.metrics import psnr, relative_error, relative_l1, ssim
from slipstream.engine.run.drift import measured
from slipstream.engine.run.plan import CacheConfig, Plan, check_cache
from slipstream.engine.run.recipe import described, resolve
from slipstream.engine.run.samplers import Sampler
from slipstream.kernels.reference import weighted_sum

gaps = st.lists(st.floats(0.3, 3.0), min_size=3, max_size=5)


def times_from(steps: list[float]) -> list[float]:
    times = [0.0]
    for step in steps:
        times.append(times[-1] + step)
    return times


@given(gaps, st.floats(0.1, 4.0), st.integers(0, 3), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_h50_newton_is_exact_on_polynomials_forward_on_uneven_grids(steps, ahead, order, coefficients):
    times = times_from(steps)
    order = min(order, len(times) - 1)
    u = times[-1] + ahead

    def value(t):
        return sum(c * t**k for k, c in enumerate(coefficients[: order + 1]))

    weights = newton(times, u, order)
    forecast = sum(w * value(t) for w, t in zip(weights, times, strict=True))
    scale = sum(abs(w * value(t)) for w, t in zip(weights, times, strict=True)) + 1
    assert forecast == pytest.approx(value(u), abs=1e-9 * scale)
    assert sum(weights) == pytest.approx(1.0, abs=1e-9 * sum(map(abs, weights)))


@given(gaps, st.floats(0.1, 4.0), st.floats(-2, 2), st.floats(-2, 2))
def test_h50_taylorseer_is_exact_on_lines_forward_on_uneven_grids(steps, ahead, offset, slope):
    times = times_from(steps)
    for order in (1, 2):
        weights = taylorseer(times, times[-1] + ahead, order)
        forecast = sum(w * (offset + slope * t) for w, t in zip(weights, times, strict=True))
        scale = sum(abs(w) for w in weights) * 30
        assert forecast == pytest.approx(offset + slope * (times[-1] + ahead), abs=1e-9 * scale)


def test_taylorseer_order_2_is_the_published_ladder():
    """Uniform spacing N, horizon k, s = k / N: F + s dF + s^2/2 d2F (research of the released code)."""
    s = 2 / 3
    weights = taylorseer([0.0, 3.0, 6.0], 8.0, 2)
    assert weights == pytest.approx([s * s / 2, -s - s * s, 1 + s + s * s / 2])
    assert taylorseer([0.0, 3.0], 8.0, 1) == pytest.approx(newton([0.0, 3.0], 8.0, 1))


@given(gaps, st.floats(0.0, 9.0), st.sampled_from(["newton", "taylorseer", "reuse"]), st.integers(0, 3))
def test_h51_the_order_lowers_itself(steps, ahead, rule, order):
    times = times_from(steps)
    for count in range(1, len(times) + 1):
        weights, used = Predictor(rule, order).weights(times[:count], times[count - 1] + ahead)
        assert used <= min(order, count - 1)
        assert len(weights) == count and sum(map(abs, weights)) <= LEBESGUE_LIMIT


def test_h51_a_repeated_time_replaces_its_snapshot():
    history = History(3)
    for u, value in ((0.0, 0.0), (1.0, 9.0), (1.0 + 1e-6, 1.0)):
        history.push(u, (torch.full((1, 2), value),))
    assert len(history) == 2
    forecast, order = history.forecast(2.0, Predictor("newton", 2))
    assert order == 1 and torch.allclose(forecast[0], torch.full((1, 2), 2.0), atol=1e-4)


def test_h52_zero_denominators():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert relative_l1(zero, zero).tolist() == [0.0, 0.0]
    assert relative_l1(one, zero).tolist() == [math.inf, math.inf]
    assert relative_error(zero, zero) == 0.0 and relative_error(one, zero) == math.inf
    assert psnr(zero, zero) == math.inf and psnr(one, zero) == -math.inf


def test_drift_is_of_a_picture_and_not_of_a_frame():
    """Cosmos has the batch behind the frames: one of eight that is off by half is a drift of a sixteenth."""
    frames = torch.ones(8, 4, 4, 2, 3)
    wrong = frames.clone()
    wrong[3, :, :, 1] *= 1.5
    assert relative_l1(wrong, frames, 3).tolist() == pytest.approx([0.0, 0.5 / 8])
    row = next(row for row in ROWS if row.name == "Cosmos")
    for site, dim in (("block stack", 3), ("last block", 3), ("model output", 0)):
        plan = Plan(check_cache(CacheConfig("Custom", site=site)))
        recipe = resolve(plan, Sampler("euler"), row, (1.0, 0.5, 0.0))
        assert recipe.batch_dim == dim
        history = History(1)
        history.push(0.0, (wrong,))
        drift, *_ = measured(history, Predictor("reuse", 0), 1.0, (frames,), None, recipe.batch_dim)
        assert float(drift) == pytest.approx(0.5 / 8 if dim else 0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_h53_half_precision_forecasts_stay_finite(dtype):
    top = torch.finfo(dtype).max
    snapshots = [torch.full((4,), -top, dtype=dtype), torch.full((4,), top, dtype=dtype)]
    result = weighted_sum(snapshots, [-2.0, 3.0])
    assert result.dtype == dtype and torch.equal(result, snapshots[1])


def test_weighted_sum_is_fresh_and_exact():
    snapshots = [torch.randn(3, 5) for _ in range(3)]
    kept = [s.clone() for s in snapshots]
    result = weighted_sum(snapshots, [0.0, 0.0, 1.0])
    assert torch.equal(result, snapshots[2])
    result.zero_()
    assert all(torch.equal(a, b) for a, b in zip(snapshots, kept, strict=True))
    assert torch.allclose(weighted_sum(snapshots, [1.0, -3.0, 3.0]), kept[0] - 3 * kept[1] + 3 * kept[2], atol=1e-5)
    for bad in ([], [1.0]):
        with pytest.raises(ValueError, match="one weight per snapshot"):
            weighted_sum(snapshots, bad)


def test_history_keeps_copies_within_its_capacity():
    history = History(2)
    value = torch.ones(1, 4)
    for u in range(4):
        history.push(float(u), (value,))
    value.fill_(7.0)
    assert history.times == [2.0, 3.0] and history.nbytes == 2 * 16
    assert torch.equal(history.newest[0], torch.ones(1, 4))
    history.push(4.0, (torch.ones(1, 9),))  # another shape: what was there is void
    assert history.times == [4.0]


@settings(max_examples=50)
@given(st.floats(0.01, 1.0), st.floats(0.5, 3.0), st.integers(0, 2))
def test_the_drift_budget_fills_exactly_up_to_the_expected_error(budget, gap, order):
    times = [gap * i for i in range(order + 1)]
    c = 0.003
    trace = Trace(28, times=times, drifts=[Drift(times[-1], c * 2.0, order, 2.0)])
    schedule = DriftBudget(budget)
    for ahead in (0.5, 1.0, 2.0, 5.0):
        u = times[-1] + ahead
        assert schedule.skip(trace, u, order) == (c * span(times, u, order) <= budget)
    assert not schedule.skip(Trace(28, times=times), times[-1] + 0.1, order)  # nothing measured yet


def test_interval_and_accumulated_change():
    trace = Trace(28, times=[3.0], rate=0.5, moved=0.1)
    assert [Interval(3).skip(trace, u, 1) for u in (4.0, 5.0, 6.0)] == [True, True, False]
    assert AccumulatedChange(0.06).skip(trace, 4.0, 1) and not AccumulatedChange(0.05).skip(trace, 4.0, 1)
    assert not AccumulatedChange(0.5).skip(Trace(28, times=[3.0]), 4.0, 1)


def test_ssim_of_equal_and_of_unrelated_pictures():
    picture = torch.rand(1, 16, 16, 3)
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert ssim(picture, torch.rand(1, 16, 16, 3)) < 0.5


@given(gaps, st.floats(0.1, 9.0), st.data())
def test_predictors_of_one_name_forecast_alike(steps, ahead, data):
    """A profile is trusted by the name of the predictor that it was solved for."""
    kinds = st.builds(
        Predictor,
        st.sampled_from(sorted(RULES)),
        st.integers(0, 2),
        st.sampled_from([0.5, 0.7]),
        st.just(28),
        st.booleans(),
    )
    one, other = data.draw(kinds), data.draw(kinds)
    if described(one) == described(other):
        times = times_from(steps)
        u = times[-1] + ahead
        assert one.weights(times, u) == other.weights(times, u) and one.per_token == other.per_token


def test_the_name_tells_what_a_user_can_choose():
    assert described(Predictor("newton", 1)) == "newton 1"  # as in profiles of before
    names = {described(Predictor("hermite", 1, scale)) for scale in (0.5, 0.71)}
    names |= {described(Predictor("taylorseer", 2, per_token=per_token)) for per_token in (False, True)}
    assert len(names) == 4


@pytest.mark.parametrize("storage", Storage)
def test_h53_a_forecast_beyond_half_precision_is_its_largest_number_wherever_it_lies(storage):
    history = History(2, storage)
    for time, value in ((0.0, 20000.0), (1.0, 60000.0)):
        history.push(time, (torch.full((2, 4), value, dtype=torch.float16),))
    (forecast,), order = history.forecast(3.0, Predictor("newton", 1))
    assert order == 1 and forecast.dtype == torch.float16
    assert torch.equal(forecast, torch.full((2, 4), 65504.0, dtype=torch.float16))
