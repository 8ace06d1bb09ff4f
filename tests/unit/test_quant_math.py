"""The mathematics of W4A4: what is exact is exact, what searches is never worse, and the methods rank as measured."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.kernels.reference import GELU_SHIFT, hadamard, regular_hadamard
from slipstream.quant.calibration import (
    ActivationStatistics,
    Collector,
    normal_steps,
    split_channels,
    uniform_steps,
)
from slipstream.quant.layer import (
    Outcome,
    Spec,
    output_error,
    quantise_group,
    quantise_linear,
    quantise_split,
    sqnr,
)
from slipstream.quant.linear import W4A4Linear
from slipstream.quant.rotate import rotate, rotation_size
from slipstream.quant.rounding import gptq, rounded_to_nearest, rtn, shrunk, weight_error
from slipstream.quant.smooth import SMALL_GRID, choose, modulation_span, smooth_factor
from slipstream.quant.svd import low_rank, truncated_svd

from bench.quality.quant_quality import synthetic_inputs, synthetic_weight
from lab.methods import METHODS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- rotation


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_orthogonal_symmetric_and_its_own_inverse(size):
    matrix = regular_hadamard(size).double()
    assert torch.equal(matrix, matrix.T) and torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert torch.allclose(matrix.sum(1), torch.ones(size, dtype=torch.float64))  # regular: no constant row
    x = normal(3, 2, 2 * size)
    expected = (x.view(3, 2, 2, size) @ matrix.float()).view_as(x)
    assert torch.allclose(rotate(x, size), expected, atol=1e-5)
    assert torch.allclose(rotate(rotate(x, size), size), x, atol=1e-5)


def test_the_matrix_is_a_kronecker_power():
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    assert torch.equal(regular_hadamard(4), four / 2)
    assert torch.equal(regular_hadamard(16), torch.kron(four, four) / 4)


def test_which_widths_are_rotated_and_by_how_much():
    assert [rotation_size(k) for k in (3072, 320, 80, 72)] == [256, 64, 16, 0]
    assert rotation_size(3072, 64) == 64
    assert rotate(torch.ones(1, 7), 0).tolist() == [[1.0] * 7]
    for size, k in ((8, 64), (256, 320), (2, 4), (1, 4), (-4, 8)):
        with pytest.raises(ValueError, match="power of 4 that divides"):
            hadamard(torch.ones(1, k), size)


# --- rounding


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([4, 8]))
def test_no_group_is_worse_with_a_searched_scale(seed, dtype, bits):
    weight = normal(4, 128, seed=seed) ** 3 * 10.0 ** (seed % 7 - 3)
    plain, searched = (rtn(weight, 64, bits, search, dtype) for search in (False, True))
    errors = [(r.dequantise() - weight).view(4, 2, 64).square().sum(-1) for r in (plain, searched)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert searched.scales.dtype == dtype and searched.codes.abs().max() <= 2 ** (bits - 1) - 1


def test_plain_rounding_is_absmax_over_7():
    weight = normal(3, 128)
    rounded = rtn(weight, 64, search=False)
    assert torch.allclose(rounded.scales, weight.view(3, 2, 64).abs().amax(-1) / 7)
    assert ((rounded.dequantise() - weight).view(3, 2, 64).abs() <= rounded.scales[..., None] * 0.5001).all()
    assert torch.equal(rounded_to_nearest(weight, 64), rounded.dequantise())
    assert not rtn(torch.zeros(2, 64)).codes.any()
    with pytest.raises(ValueError, match="do not divide"):
        rtn(weight, 100)


def correlated(n: int, k: int, seed: int) -> torch.Tensor:
    mixing = normal(16, k, seed=99)
    return normal(n, 16, seed=seed) @ mixing + 0.5 * normal(n, k, seed=seed + 1)


def test_gptq_is_never_worse_than_rounding_to_nearest_on_its_rows_and_better_on_others():
    weight, seen, unseen = normal(64, 192), correlated(400, 192, 1), correlated(400, 192, 5)
    hessian = seen.T @ seen
    plain, better = rtn(weight).dequantise(), gptq(weight, hessian, count=400)
    rows = [weight_error(weight, r, hessian) for r in (plain, better.dequantise())]
    assert better.reason == "" and (rows[1] <= rows[0] * (1 + 1e-4)).all()
    errors = [((r - weight) @ unseen.T).norm() for r in (plain, better.dequantise())]
    assert errors[1] < 0.7 * errors[0]
    assert torch.equal(gptq(weight, hessian, count=400).codes, better.codes)


def test_gptq_does_not_fit_noise():
    """As many independent rows as channels say nothing about correlations: shrunk, GPTQ is rounding to nearest."""
    rows, unseen, weight = normal(192, 192, seed=1), normal(2000, 192, seed=2), normal(32, 192)
    hessian = rows.T @ rows
    less = shrunk(hessian, 192)
    assert torch.equal(less.diagonal(), hessian.diagonal()) and less[0, 1:].norm() < 0.05 * hessian[0, 1:].norm()
    plain, careful, rash = rtn(weight), gptq(weight, hessian, count=192), gptq(weight, hessian)
    errors = [float(((r.dequantise() - weight) @ unseen.T).norm()) for r in (plain, careful, rash)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01) and errors[2] > 1.1 * errors[0]


def test_gptq_falls_back_with_a_reason():
    weight = normal(8, 128)
    indefinite = torch.ones(128, 128) * 100
    indefinite.fill_diagonal_(1.0)
    for hessian in (torch.full((128, 128), math.nan), torch.zeros(128, 128), indefinite):
        rounded = gptq(weight, hessian)
        assert "not positive definite" in rounded.reason and torch.equal(rounded.codes, rtn(weight).codes)
    with pytest.raises(ValueError, match="128 x 128"):
        gptq(weight, torch.eye(64))


# --- smoothing


def test_smooth_factors_and_their_guards():
    act, weight = torch.tensor([4.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 1.0, 0.0])
    factor = smooth_factor(act, weight, 0.5, 0.5)
    assert factor.tolist() == pytest.approx([2.0, 0.5, 1.0, 1.0])
    for bad in (math.nan, math.inf):
        assert smooth_factor(torch.tensor([bad, 1.0]), torch.ones(2), 0.5, 0.5).tolist() == [1.0, 1.0]
    wide = smooth_factor(torch.tensor([1e9, 1e-9]), torch.ones(2), 1.0, 0.0, limit=64)
    assert wide.tolist() == pytest.approx([64.0, 1 / 64])
    assert smooth_factor(torch.zeros(3), torch.zeros(3), 0.5, 0.5).tolist() == [1.0] * 3
    assert smooth_factor(act, weight, 0.0, 0.0).tolist() == [1.0] * 4


def test_the_least_error_of_a_grid_wins():
    grid = SMALL_GRID
    assert len(grid) == len(set(grid)) and grid[0] == (0.0, 0.0)
    best, errors = choose(grid[:3], lambda c: math.nan if c == grid[0] else 1 - c[0])
    assert best == grid[2] and len(errors) == 3
    assert choose(grid[:2], lambda c: math.nan)[0] == grid[0]


def test_the_modulation_span_bounds_what_a_modulated_norm_gives():
    scale, shift, gamma = normal(5, 32), normal(5, 32, seed=1), normal(32, seed=2).abs()
    span = modulation_span(scale, shift, gamma)
    for i in range(5):
        x = normal(20000, 32, seed=3) * gamma * (1 + scale[i]) + shift[i]
        assert (x.square().mean(0).sqrt() <= span * 1.03).all()
    assert torch.allclose(modulation_span(scale[:1], shift[:1]), ((1 + scale[0]) ** 2 + shift[0] ** 2).sqrt())
    with pytest.raises(ValueError, match="steps x channels"):
        modulation_span(scale, shift[:2])


# --- low-rank branch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_branch_and_residual_are_the_weight(dtype):
    weight, smooth = normal(96, 128), (normal(128, seed=1).abs() + 0.1).to(dtype)
    branch, left = low_rank(weight * smooth.float(), smooth, 16, dtype)
    assert branch.up.dtype == branch.down.dtype == dtype
    whole = left / smooth.float() + branch.up.float() @ branch.down.float().T
    assert torch.allclose(whole, weight, atol=1e-5)


def test_the_randomised_svd_is_nearly_the_exact_one_and_leaves_the_generator_alone():
    weight = normal(200, 160) + 3 * normal(200, 8, seed=1) @ normal(8, 160, seed=2)
    before = torch.get_rng_state()
    up, down = truncated_svd(weight, 16)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip((up, down), truncated_svd(weight, 16), strict=True))
    exact = torch.linalg.svdvals(weight)[16:].norm()
    assert exact <= (weight - up @ down.T).norm() * 1.0001 <= exact * 1.01
    assert truncated_svd(weight, 0)[0].shape == (200, 0)
    with pytest.raises(ValueError, match="rank 161 does not fit"):
        truncated_svd(weight, 161)


def test_refinement_keeps_the_best_round():
    weight, rows = synthetic_weight(128, 256), synthetic_inputs(256, 256, 30, 1)
    outcome = quantise_linear(weight, None, Spec(refine=8, rank=16), ActivationStatistics.of(rows))
    rounds = outcome.errors[len(Spec().grid) :]
    assert len(rounds) >= 2 and min(rounds) < rounds[0]
    assert all(later < earlier for earlier, later in pairwise(rounds[:-1]))  # it stops at the first that rises
    plain = quantise_linear(weight, None, Spec(rank=16), ActivationStatistics.of(rows)).layer
    assert output_error(weight, outcome.layer, rows) < output_error(weight, plain, rows)


def test_a_lora_goes_into_the_branch_exactly():
    weight = normal(96, 128)
    down, up = normal(8, 128, seed=4) * 0.1, normal(96, 8, seed=5) * 0.1
    for spec in (Spec(rank=16, storage=torch.float32), Spec(rank=0, storage=torch.float32), METHODS["convrot"]):
        spec = dataclasses.replace(spec, rotation=64 if spec.format == "convrot_w4a4" else 0)
        layer = quantise_linear(weight, None, spec).layer
        module = W4A4Linear(layer)
        module.set_lora(down.T, 0.7 * up)
        with_lora = module.layer()
        x = normal(10, 128, seed=6)
        assert torch.allclose(with_lora(x), layer(x) + 0.7 * x @ down.T @ up.T, atol=1e-4)
        assert torch.allclose(with_lora.dequantise(), layer.dequantise() + 0.7 * up @ down, atol=1e-5)
        assert with_lora.rank == layer.rank + 8 and layer.rank == (16 if spec.rank == 16 else 0)
    with pytest.raises(ValueError, match="cannot hold a low-rank branch"):
        with_lora.state_dict("P")
    with pytest.raises(ValueError, match="does not fit"):
        module.set_lora(down[:, :5].T, up)


# --- layers


def test_a_layer_without_rounded_activations_is_its_dequantised_weight():
    weight, bias, x = normal(64, 256) * 0.05, normal(64, seed=1), normal(20, 256, seed=2)
    statistics = ActivationStatistics.of(x.exp())
    for spec in (
        Spec("w4a16", rank=16),
        Spec("w4a16", rank=16, rotation=256),
        Spec("w4a16", rank=16, act_unsigned=True),
        Spec("w4a16", rank=0, rotation=64, smooth="modulation"),
    ):
        layer = quantise_linear(weight, bias, dataclasses.replace(spec, storage=torch.float32), statistics).layer
        assert torch.allclose(layer(x), x @ layer.dequantise().T + bias, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_with_huge_outliers_stay_finite(dtype):
    weight, x = synthetic_weight(64, 256).to(dtype), synthetic_inputs(64, 256, 1000, 1)
    for spec in METHODS.values():
        layer = quantise_linear(
            weight, None, dataclasses.replace(spec, rank=8), ActivationStatistics.of(x, hessian=True)
        ).layer
        assert all(torch.isfinite(t).all() for t in layer.tensors.values()) and torch.isfinite(layer(x.to(dtype))).all()
        assert output_error(weight, layer, x) < 0.35


def test_queries_keys_and_values_share_smooth_factor_and_down_projection():
    weights = [normal(64, 128, seed=i) for i in range(3)]
    biases = [normal(64, seed=9), None, normal(64, seed=8)]
    outcome = quantise_group(weights, biases, Spec(rank=16), ActivationStatistics.of(normal(64, 128, seed=5).exp()))
    first, second, third = outcome.layers
    assert first.proj_down is second.proj_down is third.proj_down and first.smooth is second.smooth is third.smooth
    assert second.bias is None and torch.equal(first.bias, biases[0])
    whole = quantise_linear(
        torch.cat(weights), None, Spec(rank=16), ActivationStatistics.of(normal(64, 128, seed=5).exp())
    )
    parts = torch.cat([layer.dequantise() for layer in outcome.layers])
    assert torch.equal(parts, whole.layer.dequantise()) and outcome.exponents == whole.exponents


def test_unsigned_activations_after_gelu():
    x = torch.nn.functional.gelu(synthetic_inputs(384, 256, 10, 1))
    weight, bias = synthetic_weight(128, 256), normal(128)
    assert x.min() + GELU_SHIFT > 0
    seen, unseen = ActivationStatistics.of(x[:256]), x[256:]
    signed, unsigned = (quantise_linear(weight, bias, Spec(rank=16, act_unsigned=u), seen).layer for u in (False, True))
    assert output_error(weight, unsigned, unseen, bias) < output_error(weight, signed, unseen, bias)
    finer = [output_error(weight, unsigned.with_act_bits(bits), unseen, bias) for bits in (4, 8, 16)]
    assert finer[0] > finer[1] > 0.98 * finer[2]
    assert unsigned.act_unsigned and not torch.equal(unsigned.bias, bias)
    assert quantise_linear(weight, None, Spec(rank=16, act_unsigned=True)).layer.bias is not None


def test_a_layer_behind_a_concatenation_is_split():
    """A quiet half beside a loud one whose boundary is no multiple of 256: blocks and groups stay on their side."""
    weight, bias = synthetic_weight(96, 448), normal(96)
    x = torch.cat((synthetic_inputs(256, 192, 1, 1), 40 * synthetic_inputs(256, 256, 1, 2)), 1)
    first, second = quantise_split(weight, bias, [Spec(rank=8), Spec(rank=8)], [192], ActivationStatistics.of(x))
    assert first.shape == (96, 192) and second.shape == (96, 256) and second.bias is None
    true = x @ weight.T + bias
    assert ((first(x[:, :192]) + second(x[:, 192:])) - true).norm() < 0.15 * true.norm()
    assert split_channels(448, [192]) == [(0, 192), (192, 448)]
    for boundaries, sentence in (([100], "not multiples of 64"), ([448], "do not rise"), ([256, 192], "do not rise")):
        with pytest.raises(ValueError, match=sentence):
            split_channels(448, boundaries)
    with pytest.raises(ValueError, match="2 parts need"):
        quantise_split(weight, bias, [Spec()], [192])


@pytest.mark.parametrize("magnitude", [10, 30, 100])
def test_the_methods_rank_as_measured(magnitude):
    """Outliers as in the research's section 7: calibrated on some rows, scored on others."""
    n = k = 512
    weight = synthetic_weight(n, k)
    seen = ActivationStatistics.of(synthetic_inputs(512, k, magnitude, 1), hessian=True)
    unseen = synthetic_inputs(256, k, magnitude, 2)

    def error(outcome: Outcome) -> float:
        return output_error(weight, outcome.layer, unseen)

    errors = {m: error(quantise_linear(weight, None, METHODS[m], seen)) for m in METHODS if m != "svdquant_refined"}
    assert errors["svdquant"] < 0.5 * errors["rtn"]
    assert errors["hadamard_svd"] < 0.6 * errors["convrot"]
    assert errors["svdquant_gptq"] < errors["svdquant"] and errors["hadamard_svdquant"] < errors["svdquant"]
    assert errors["hadamard_svdquant_gptq"] < errors["hadamard_svdquant"]
    assert errors["w4a8"] < errors["svdquant"] and errors["w4a16"] < 1.02 * errors["w4a8"]
    assert errors["int8_convrot"] < 0.3 * errors["convrot"]
    layer = quantise_linear(weight, None, METHODS["svdquant"], seen).layer
    finer = layer.with_act_bits(8)  # the same file
    assert output_error(weight, finer, unseen) < errors["svdquant"] and finer.weight is layer.weight
    assert sqnr(weight, layer, unseen) == pytest.approx(-20 * math.log10(errors["svdquant"]))
    spans = ActivationStatistics(seen.absmax)  # a profile without rows
    assert error(quantise_linear(weight, None, Spec(), spans)) < 0.6 * errors["rtn"]


def test_smoothing_from_the_modulation_needs_no_data():
    """Outliers that come through the modulation are known before the model runs."""
    weight = synthetic_weight(256, 512)
    scale, shift = 0.3 * normal(4, 512), 0.3 * normal(4, 512, seed=1)
    scale[:, ::60] += 30.0
    x = normal(200, 512, seed=2) * (1 + scale[2]) + shift[2]
    spans = ActivationStatistics(modulation_span(scale, shift))
    for rotation in (0, 256):
        blind = quantise_linear(weight, None, Spec(rank=16, rotation=rotation, smooth="none")).layer
        seeing = quantise_linear(weight, None, Spec(rank=16, rotation=rotation, smooth="modulation"), spans).layer
        assert output_error(weight, seeing, x) < 0.7 * output_error(weight, blind, x)


def test_an_identical_layer_has_no_error():
    weight = torch.zeros(8, 64)
    layer = quantise_linear(weight, None, Spec(rank=0)).layer
    assert output_error(weight, layer, normal(3, 64)) == 0 and sqnr(weight, layer, normal(3, 64)) == math.inf


def test_what_cannot_be_quantised_is_said_in_one_sentence():
    weight = normal(32, 128)
    rows = ActivationStatistics.of(normal(8, 64))
    cases = [
        (lambda: Spec("w3"), "unknown format"),
        (lambda: Spec(smooth="maybe"), "unknown smoothing"),
        (lambda: Spec(rank=-1), "cannot be negative"),
        (lambda: Spec(grid=()), "at least one candidate"),
        (lambda: Spec(act_unsigned=True, rotation=256), "no rotation"),
        (lambda: quantise_linear(normal(32, 100), None, Spec()), "not a multiple of 64"),
        (lambda: quantise_linear(normal(32, 128, 1), None, Spec()), "two-dimensional"),
        (lambda: quantise_linear(weight, normal(3), Spec()), "one number per row"),
        (lambda: quantise_linear(weight, None, Spec(rank=64)), "rank 64 does not fit"),
        (lambda: quantise_linear(weight * math.nan, None, Spec()), "NaN"),
        (lambda: quantise_linear(weight, None, Spec(), rows), "statistics are of 64 channels"),
        (lambda: quantise_linear(weight, None, Spec(gptq=True)), "GPTQ needs a calibration"),
        (lambda: quantise_group([], [], Spec()), "every weight needs a bias"),
        (lambda: quantise_linear(weight, None, Spec()).layer.with_act_bits(3), "3-bit activations"),
        (lambda: quantise_linear(weight, None, METHODS["convrot"]).layer.with_act_bits(8), "cannot run"),
        (lambda: ActivationStatistics(torch.ones(4), rows=torch.ones(2, 3)), "rows of the activation statistics"),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)


# --- calibration


def test_the_reservoir_is_uniform_whatever_the_calls():
    """2000 rows in uneven calls, 100 kept, 60 times: each tenth of the stream gets its share of the places."""
    stream = torch.arange(2000.0)[:, None]
    counts = torch.zeros(10)
    for seed in range(60):
        collector = Collector(1, limit=100, seed=seed)
        for part in stream.split([1, 30, 500, 69, 1400]):
            collector.add(part)
        kept = collector.statistics().rows.flatten()
        assert len(kept.unique()) == 100
        counts += torch.histc(kept, 10, 0, 2000)
    assert ((counts / 600 - 1).abs() < 0.15).all()


def test_streamed_and_merged_statistics_are_those_of_the_whole():
    x = normal(300, 64)
    collector = Collector(64, limit=512, hessian=True)
    for part in x.split(70):
        collector.add(part.view(1, len(part), 64))
    streamed = collector.statistics()
    merged = ActivationStatistics.of(x[:100], hessian=True).merged(ActivationStatistics.of(x[100:], hessian=True))
    for found in (streamed, merged):
        assert found.count == 300 and torch.equal(found.absmax, x.abs().amax(0))
        assert torch.allclose(found.square, x.square().mean(0), rtol=1e-4)
        assert torch.allclose(found.hessian, x.T @ x, atol=1e-3) and found.rows.shape == (300, 64)
    assert torch.equal(streamed.rows, x)
    few = ActivationStatistics.of(x[:100], 40).merged(ActivationStatistics.of(x[100:], 40), 30)
    of_first = sum(any(torch.equal(row, r) for r in x[:100]) for row in few.rows)
    assert len(few.rows) == 30 and of_first == 10
    assert streamed.part(16, 32).hessian.shape == (16, 16)
    assert ActivationStatistics(torch.ones(64)).merged(streamed).rows is None
    with pytest.raises(ValueError, match="different layers"):
        streamed.merged(ActivationStatistics(torch.ones(3)))
    with pytest.raises(ValueError, match="not called"):
        Collector(4).statistics()
    with pytest.raises(ValueError, match="takes 4 channels"):
        Collector(4).add(torch.ones(2, 5))
    long = Collector(4, limit=10)
    long.add(normal(1000, 4), rows=8)
    assert long.statistics().count == 8


@given(st.integers(1, 60), st.integers(1, 80))
def test_calibration_steps_lie_in_the_schedule(steps, count):
    normal_ones, uniform_ones = normal_steps(steps, count), uniform_steps(steps, count)
    assert len(normal_ones) == count and len(uniform_ones) == min(count, steps) == len(set(uniform_ones))
    for found in (normal_ones, uniform_ones):
        assert found == sorted(found) and set(found) <= set(range(steps))


def test_calibration_steps_as_published():
    assert uniform_steps(50, 25) == list(range(0, 50, 2))
    found = normal_steps(101, 1001)
    assert found[500] == 60  # the median is t = 0.4 of the time, counted from the clean end
    assert sum(s == 100 for s in found) / 1001 == pytest.approx(0.16, abs=0.02)  # one deviation below: clamped
    with pytest.raises(ValueError, match="at least 1"):
        uniform_steps(0, 3)
