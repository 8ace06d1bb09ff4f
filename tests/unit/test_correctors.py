"""The corrector's algebra: what it promises is derived in docs/compensation.md and checked here on known systems."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine.correction.anchors import Carried, automatic, expected, placed, solved
from slipstream.engine.correction.correctors import (
    CUMULATIVE,
    FEATURES,
    LARGEST,
    METHODS,
    MIXED,
    TEACHER,
    Corrector,
    Moments,
    Terms,
    corrected,
    stacked,
    wanted,
)

from lab.noise import calmer_noise

SHAPE = (2, 3, 4, 4)


def propagated(sigmas: list[float], jacobians: list[float], errors: list[float]) -> list[float]:
    """How an error per step builds up in an Euler run: delta before every step and at the end, n + 1 values.

    delta_{i+1} = (r + (1 - r) J) delta_i + h e_i with r the ratio of the sigmas and h their difference; J: Jacobian of
    the denoiser in the direction looked at (0: noise the model ignores, 1: the data's own, above 1: undecided).
    """
    deltas = [0.0]
    for i, error in enumerate(errors):
        ratio = sigmas[i + 1] / sigmas[i] if sigmas[i] else 0.0
        kept = ratio + (1 - ratio) * jacobians[i]
        deltas.append(kept * deltas[-1] + (sigmas[i + 1] - sigmas[i]) * error)
    return deltas


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flow", [True, False], ids=["flow", "eps"])
@pytest.mark.parametrize("variance", [4.0, 1.0, 0.05])
def test_errors_build_up_as_derived(flow, variance):
    """The propagation equation against an Euler run of the exact denoiser of Gaussian data, error and all."""
    steps = 12
    sigmas = (
        [1.0 - i / steps for i in range(steps + 1)] if flow else [8.0 * (1 - i / steps) ** 2 for i in range(steps + 1)]
    )

    def jacobian(s: float) -> float:
        return (1 - s) * variance / ((1 - s) ** 2 * variance + s * s) if flow else variance / (variance + s * s)

    errors = drawn(1, steps).double().tolist()
    x = faster = 0.7
    for i, error in enumerate(errors):
        s, step = sigmas[i], sigmas[i + 1] - sigmas[i]
        x, faster = (v + step * ((v - jacobian(s) * v) / s + e) for v, e in ((x, 0.0), (faster, error)))
    told = propagated(sigmas, [jacobian(s) for s in sigmas[:-1]], errors)
    assert told[-1] == pytest.approx(faster - x, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(METHODS)))
def test_no_coefficients_change_nothing(seed, name):
    terms = METHODS[name]
    slope = drawn(seed)
    found = corrected(terms, torch.zeros(3, terms.width(3)), slope, drawn(seed + 1), drawn(seed + 2))
    assert torch.equal(found, slope)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_row_finds_an_error_of_its_own_form(name):
    """Published corrections as rows of one: an error that has a row's form is taken back whole by its fit."""
    terms = METHODS[name]
    slope, state, previous = drawn(1), drawn(2), drawn(3)
    theta = 0.1 * drawn(4, 3, terms.width(3))
    if terms.shared:
        theta[:] = theta[:1]
        if terms.own_bias:
            theta[:, terms.features.index("one")] = torch.tensor([0.1, 0.0, -0.1])
    true = corrected(terms, theta, slope, state, previous)
    moments = Moments.empty(2, 3, terms.width(3))
    moments.add(1, stacked(terms, slope, state, previous), true - slope)
    fitted = moments.theta(terms, 1, ridge=1e-9)
    near = 0.05 if terms.own_bias else 1e-4  # gain first, bias then: not at once
    assert torch.allclose(corrected(terms, fitted, slope, state, previous), true, atol=near)
    assert moments.gain_db(1, fitted) > (15 if terms.own_bias else 60)
    assert not moments.theta(terms, 0).any() and moments.gain_db(0, fitted) == 0.0


def test_no_more_than_half_of_the_slope_is_corrected():
    terms = METHODS["CacheQuant"]
    slope = drawn(1)
    found = corrected(terms, torch.full((3, 2), 9.0), slope, slope)
    sizes = (found - slope).flatten(1).norm(dim=1) / slope.flatten(1).norm(dim=1)
    assert torch.allclose(sizes, torch.full((2,), LARGEST), atol=1e-5)


def test_a_cumulative_target_lands_on_the_reference():
    """Euler with what CUMULATIVE wants is at the reference's next state, whatever went wrong before; MIXED later."""
    state, lost, true, slope = (drawn(i) for i in range(4))
    step, x = -0.1, state + 0.3 * lost
    want = wanted(CUMULATIVE, true, slope, state - x, step)
    assert torch.allclose(x + step * (slope + want), state + step * true, atol=1e-5)
    part = wanted(MIXED, true, slope, state - x, step, left=9)
    assert torch.allclose(4 * (part - (true - slope)), want - (true - slope), atol=1e-4)
    assert torch.equal(wanted(TEACHER, true, slope, state - x, step), true - slope)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_moments_of_two_runs_merge_by_adding(seed, split):
    terms = METHODS["cumulative"]
    slope, state, want = (drawn(seed + i, 6, 3, 4, 4) for i in range(3))
    whole, first, second = (Moments.empty(1, 3, 3) for _ in range(3))
    whole.add(0, stacked(terms, slope, state, None), want)
    for part, rows in ((first, slice(0, split)), (second, slice(split, None))):
        part.add(0, stacked(terms, slope[rows], state[rows], None), want[rows])
    assert torch.allclose((first + second).theta(terms, 0), whole.theta(terms, 0), atol=1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        first + Moments.empty(1, 3, 4)


def test_a_corrector_is_read_between_its_steps_and_never_at_another_age():
    theta = torch.arange(1.0, 5.0).reshape(4, 1, 1).expand(4, 2, 1).clone()
    corrector = Corrector(Terms(("slope",), TEACHER), theta, (0, 1, 1, 0))
    assert float(corrector.at(1.25, 1)[0]) == pytest.approx(2.25)
    assert float(corrector.at(0.2, 0)[0]) == pytest.approx(1.0)
    assert corrector.at(1.0, 0) is None and corrector.at(9.0, 0) is None and corrector.at(0.8, 0) is None
    with pytest.raises(ValueError, match="row per step"):
        Corrector(Terms(("slope", "one"), TEACHER), theta, (0, 1, 1, 0))
    with pytest.raises(ValueError, match="a corrector has some of"):
        Terms(("slope", "wishes"), TEACHER)
    assert all(set(m.features) <= set(FEATURES) for m in METHODS.values())


def test_ptqd_takes_off_the_variance_that_is_there_already():
    """Euler ancestral on pure noise: with the calmer noise the state's variance is the intended one."""
    up, step, deviation = 0.5, -0.4, 0.8
    left = calmer_noise(up, step, deviation)
    assert left**2 + (step * deviation) ** 2 == pytest.approx(up**2)
    assert calmer_noise(0.1, -1.0, 0.5) == 0.0 and calmer_noise(up, step, 0.0) == up


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 8, 20, 30, 50])
def test_anchors_are_distinct_steps_of_the_schedule(steps, flow):
    sigmas = [1 - i / steps for i in range(steps + 1)]
    for count in range(steps + 3):
        found = placed(sigmas, count, flow)
        assert list(found) == sorted(set(found)) and len(found) == min(count, steps)
        assert all(0 <= step < steps for step in found)
    assert automatic(steps) <= max(1, math.ceil(steps / 10)) and (steps >= 5 or not automatic(steps))


def test_solved_anchors_are_the_best_ones():
    """Greedy and exchange against all sets, on residuals of slowly changing direction and growing size."""
    import itertools

    steps = 9
    rows = torch.cumsum(drawn(3, steps, 40).double(), 0) * torch.linspace(0.5, 2, steps)[:, None]
    gram, effects = rows @ rows.T / 40, [-0.1] * steps
    best = min(itertools.combinations(range(steps), 2), key=lambda a: expected(gram, effects, a))
    assert solved(gram, effects, 2) == best
    assert expected(gram, effects, best) < expected(gram, effects, ())
    assert expected(gram, effects, range(steps)) == pytest.approx(0.0)


def test_a_carried_residual_fades_and_fits_its_shape_only():
    carried = Carried(0.5)
    assert carried.at(1.0, drawn(1)) is None
    carried.take(2.0, torch.ones(SHAPE))
    assert torch.equal(carried.at(4.0, drawn(1)), torch.full(SHAPE, 0.25)) and carried.nbytes == 96 * 4
    assert carried.at(4.0, drawn(1, 1, 3, 4, 4)) is None
    carried.clear()
    assert carried.at(4.0, drawn(1)) is None
