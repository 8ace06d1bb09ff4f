"""One linear layer, or several that share their input, from a 16-bit weight to a QuantisedLinear."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import GELU_SHIFT, quantise_activations
from .calibration import ActivationStatistics, evenly, split_channels
from .formats import FORMATS, GROUP_SIZE, QuantisedLinear, pack_int4
from .rotate import rotate, rotation_size
from .rounding import Rounded, gptq, rounded_to_nearest, rtn
from .smooth import DATA_FREE_RANGE, SMALL_GRID, choose, smooth_factor
from .svd import Branch, low_rank, refine

__all__ = ["METHODS", "Outcome", "Spec", "quantise_group", "quantise_linear", "quantise_split"]

# Rows on which candidates are compared, and outputs of the layer, at most.
SEARCH_ROWS, SEARCH_OUTPUTS = 128, 1536

# Power iterations of a candidate's branch: enough to rank candidates, the chosen one gets the full number.
SEARCH_ITERATIONS = 1

SMOOTHING = ("none", "search", "modulation")


@dataclass(frozen=True, slots=True)
class Spec:
    """How a layer is to be quantised.

    format: a key of FORMATS, which sets the bits of weight and activation. rank: of the low-rank branch, 16 to 128, 0
    for none. rotation: largest Hadamard block, 0 for none; per-row formats always rotate (by 256 if 0 is given).
    Per-row formats have neither branch nor smooth factor. smooth: "none"; "search" over `grid` by output error, which
    needs rows (with absmax alone: alpha = beta = 0.5); "modulation": alpha = beta = 0.5 on spans made without data.
    grid: (alpha, beta) candidates. refine: most rounds of fitting the branch to what rounding left. gptq: GPTQ on the
    residual, needs a Hessian or rows. scale_search: least squared error instead of absmax. act_unsigned: the input is a
    GELU's output. storage: 16-bit dtype of scales and branch, None for the weight's (bfloat16 for a float32 weight).
    Raises ValueError for what cannot be combined.
    """

    format: str = "svdquant_w4a4"
    rank: int = 32
    rotation: int = 0
    group_size: int = GROUP_SIZE
    smooth: str = "search"
    grid: tuple[tuple[float, float], ...] = SMALL_GRID
    refine: int = 0
    gptq: bool = False
    scale_search: bool = True
    act_unsigned: bool = False
    storage: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}, choose one of {', '.join(FORMATS)}")
        if self.smooth not in SMOOTHING:
            raise ValueError(f"unknown smoothing {self.smooth!r}, choose one of {', '.join(SMOOTHING)}")
        if self.rank < 0 or self.refine < 0 or self.group_size < 1 or self.rotation < 0:
            raise ValueError("rank, rotation and refinement cannot be negative, and a group has at least one channel")
        if not self.grid:
            raise ValueError("the search for a smooth factor needs at least one candidate")
        if self.act_unsigned and (self.rotation or FORMATS[self.format].per_row):
            raise ValueError("unsigned activations need group scales and no rotation, which would make them negative")

    @property
    def act_bits(self) -> int:
        """Bits of an activation on the main path; 16: not rounded."""
        return FORMATS[self.format].act_bits


# The methods by name; what each needs, costs and gives is in docs/quant_quality.md. `hadamard_*` (groups, rotation) are
# the best of their class but read by this pack only; `svdquant*` is comfy-kitchen's layout, `*convrot` the host's.
METHODS = {
    "rtn": Spec(rank=0, smooth="none", scale_search=False),
    "convrot": Spec("convrot_w4a4", smooth="none", scale_search=False),
    "int8_convrot": Spec("int8_convrot", smooth="none", scale_search=False),
    "hadamard_svd": Spec(rotation=256, smooth="none"),
    "svdquant": Spec(),
    "svdquant_refined": Spec(refine=20),
    "svdquant_gptq": Spec(gptq=True),
    "hadamard_svdquant": Spec(rotation=256),
    "hadamard_svdquant_gptq": Spec(rotation=256, gptq=True),
    "w4a8": Spec("w4a8"),
    "w4a16": Spec("w4a16"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What quantising gave. layers: one per weight, sharing smooth factor and down-projection (the same tensors).

    exponents: (alpha, beta) chosen, None where nothing was smoothed; errors: the candidates' relative squared output
    errors in the grid's order, then those of the refinement; reason: why GPTQ was not used, "" where it was or was not
    asked for.
    """

    layers: tuple[QuantisedLinear, ...]
    exponents: tuple[float, float] | None = None
    errors: tuple[float, ...] = ()
    reason: str = ""

    @property
    def layer(self) -> QuantisedLinear:
        """The layer, of an outcome that has one."""
        (only,) = self.layers
        return only


def quantise_linear(
    weight: Tensor, bias: Tensor | None, spec: Spec, statistics: ActivationStatistics | None = None
) -> Outcome:
    """Quantise one layer. weight: (N, K) float; bias: (N,) or None; statistics: of the layer's input, or None.

    Computes in float32 on the weight's device. Raises ValueError in one sentence when the width cannot be quantised,
    the weight is not finite, or statistics are missing or of another width.
    """
    return quantise_group([weight], [bias], spec, statistics)


def quantise_group(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    spec: Spec,
    statistics: ActivationStatistics | None = None,
) -> Outcome:
    """Quantise layers that share their input (q, k, v): one smooth factor, one down-projection from the SVD of all.

    weights: (N_i, K) each; see `quantise_linear`. Source: deepcompressor, which concatenates q, k and v the same way.
    """
    _check(weights, biases, spec, statistics)
    weight = torch.cat([w.float() for w in weights]) if len(weights) > 1 else weights[0].float()
    if not all(map(torch.isfinite, torch.aminmax(weight))):
        raise ValueError("the weight holds infinite numbers or NaN and cannot be quantised")
    storage = spec.storage or (weights[0].dtype if weights[0].dtype in (torch.float16, torch.bfloat16) else None)
    work = _Work(weight, spec, statistics, storage or torch.bfloat16)
    whole, exponents, errors, reason = work.per_row() if FORMATS[spec.format].per_row else work.grouped()
    layers, start = [], 0
    for one, bias in zip(weights, biases, strict=True):
        layers.append(_member(whole, slice(start, start + len(one)), one.dtype, bias))
        start += len(one)
    return Outcome(tuple(layers), exponents, tuple(errors), reason)


def quantise_split(
    weight: Tensor,
    bias: Tensor | None,
    specs: Sequence[Spec],
    boundaries: Sequence[int],
    statistics: ActivationStatistics | None = None,
) -> tuple[QuantisedLinear, ...]:
    """Quantise a layer behind a concatenation as one layer per part; their outputs, each on its channels, add up.

    specs: one per part (FLUX's single blocks: attention signed, MLP unsigned); boundaries: see `split_channels`. The
    first layer carries the bias. Raises ValueError as `quantise_linear` and `split_channels` do.
    """
    ranges = split_channels(weight.shape[1], boundaries)
    if len(specs) != len(ranges):
        raise ValueError(f"{len(ranges)} parts need as many specifications, got {len(specs)}")
    layers = []
    for (start, stop), spec in zip(ranges, specs, strict=True):
        seen = None if statistics is None else statistics.part(start, stop)
        layers.append(quantise_linear(weight[:, start:stop], None if layers else bias, spec, seen).layer)
    return tuple(layers)


def output_error(weight: Tensor, layer: QuantisedLinear, rows: Tensor, bias: Tensor | None = None) -> float:
    """||layer(x) - (x W^T + bias)|| / ||x W^T|| over rows (n, K), with the layer's exact arithmetic in float32.

    bias: the original one, None if it had none. Infinite when the true output is zero and the layer's is not.
    """
    x = rows.float()
    true = x @ weight.float().T
    found = layer(x, kernel="reference") - (0 if bias is None else bias.float())
    noise, size = float((found - true).norm()), float(true.norm())
    return noise / size if size else (math.inf if noise else 0.0)


def sqnr(weight: Tensor, layer: QuantisedLinear, rows: Tensor, bias: Tensor | None = None) -> float:
    """Signal to quantisation noise of the layer's output in dB, 10 log10(||y||^2 / ||layer(x) - y||^2)."""
    error = output_error(weight, layer, rows, bias)
    return -20 * math.log10(error) if error else math.inf


def _check(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], spec: Spec, statistics: ActivationStatistics | None
) -> None:
    if not weights or len(weights) != len(biases):
        raise ValueError(f"every weight needs a bias or None, got {len(weights)} and {len(biases)}")
    k = weights[0].shape[-1]
    if any(w.ndim != 2 or w.shape[1] != k or not w.is_floating_point() for w in weights):
        raise ValueError("only two-dimensional floating-point weights of one width can be quantised together")
    if any(b is not None and tuple(b.shape) != (len(w),) for w, b in zip(weights, biases, strict=True)):
        raise ValueError("a bias does not have one number per row of its weight")
    if k % spec.group_size:
        raise ValueError(f"{k} input channels are not a multiple of {spec.group_size}, the layer stays in 16 bit")
    if (spec.rotation or FORMATS[spec.format].per_row) and not rotation_size(k, spec.rotation or 256):
        raise ValueError(f"{k} input channels cannot be rotated: no block of 16, 64 or 256 divides them")
    if not FORMATS[spec.format].per_row and spec.rank > min(k, sum(map(len, weights))):
        raise ValueError(f"a branch of rank {spec.rank} does not fit a layer of {k} input channels")
    if statistics is not None and statistics.channels != k:
        raise ValueError(f"the statistics are of {statistics.channels} channels, the layer has {k}")
    if spec.gptq and (statistics is None or (statistics.rows is None and statistics.hessian is None)):
        raise ValueError("GPTQ needs a calibration with rows or a Hessian")


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """The concatenated layer before it is cut up. correction: (N,), taken off the bias of unsigned layers."""

    spec: Spec
    rounded: Rounded
    rotation: int
    smooth: Tensor | None = None
    branch: Branch | None = None
    correction: Tensor | None = None


def _member(whole: _Whole, rows: slice, dtype: torch.dtype, bias: Tensor | None) -> QuantisedLinear:
    spec, row = whole.spec, FORMATS[whole.spec.format]
    codes = whole.rounded.codes[rows]
    scales = whole.rounded.scales[rows]
    scale = scales if row.weight_bits == 8 else scales.flatten() if row.per_row else scales.T
    if whole.correction is not None:
        like = whole.smooth if bias is None else bias
        wide = -whole.correction[rows] if bias is None else bias.float() - whole.correction[rows]
        bias = wide.to(like.dtype)
    return QuantisedLinear(
        spec.format,
        tuple(codes.shape),
        dtype,
        pack_int4(codes) if row.weight_bits == 4 else codes.contiguous(),
        scale.contiguous(),
        None if whole.branch is None else whole.branch.down,
        None if whole.branch is None else whole.branch.up[rows].contiguous(),
        whole.smooth,
        bias,
        spec.group_size,
        spec.act_unsigned,
        whole.rotation,
    )


class _Work:
    """The state of one quantisation: weight float32 (N, K), the rows candidates are judged on and their true output."""

    def __init__(
        self, weight: Tensor, spec: Spec, statistics: ActivationStatistics | None, storage: torch.dtype
    ) -> None:
        self.weight, self.spec, self.statistics, self.storage = weight, spec, statistics, storage
        row = FORMATS[spec.format]
        self.rotation = rotation_size(weight.shape[1], spec.rotation or 256) if spec.rotation or row.per_row else 0
        self.rows = self.target = None
        if statistics is not None and statistics.rows is not None:
            self.rows = evenly(statistics.rows, SEARCH_ROWS).to(weight)

    def per_row(self) -> tuple[_Whole, None, list[float], str]:
        """ConvRot: rotate, one float32 scale per row. See `convrot_linear`."""
        rotated = rotate(self.weight, self.rotation)
        bits = FORMATS[self.spec.format].weight_bits
        rounded = self.round(rotated, torch.ones_like(self.weight[0]), rotated.shape[1], bits, torch.float32)
        return _Whole(self.spec, rounded, self.rotation), None, [], rounded.reason

    def grouped(self) -> tuple[_Whole, tuple[float, float] | None, list[float], str]:
        """SVDQuant: smooth, take the branch off, rotate, round in groups."""
        spec = self.spec
        smooth, exponents, errors = self.smooth()
        smoothed = self.weight * smooth.float()
        branch, left = low_rank(smoothed, smooth, spec.rank, self.storage)
        if spec.refine and spec.rank:
            branch, tried = self.refined(smoothed, smooth, branch)
            errors += tried
            left = smoothed - branch.smoothed(smooth)
        del smoothed
        rounded = self.round(rotate(left, self.rotation), smooth, spec.group_size, 4, self.storage)
        correction = None
        if spec.act_unsigned:
            # of the rounded residual, not the exact one: then the shift leaves no error of its own
            correction = GELU_SHIFT * (rounded.dequantise() @ smooth.float().reciprocal())
        return _Whole(spec, rounded, self.rotation, smooth, branch, correction), exponents, errors, rounded.reason

    def round(self, main: Tensor, smooth: Tensor, group_size: int, bits: int, dtype: torch.dtype) -> Rounded:
        """Codes of the main path's weight, by GPTQ if asked for."""
        if not self.spec.gptq:
            return rtn(main, group_size, bits, self.spec.scale_search, dtype)
        hessian, count = self.statistics.hessian, self.statistics.count
        if hessian is None:
            rows = self.statistics.rows.to(main)
            hessian, count = rows.T @ rows, len(rows)
        inverse = smooth.float().reciprocal()
        hessian = hessian.to(main) * inverse * inverse[:, None]
        # rows, then columns: the Hessian of rotated inputs
        hessian = rotate(rotate(hessian, self.rotation).T.contiguous(), self.rotation)
        return gptq(main, hessian, group_size, bits, self.spec.scale_search, dtype, count)

    def smooth(self) -> tuple[Tensor, tuple[float, float] | None, list[float]]:
        """(factor in the storage dtype (K,), exponents, errors of the candidates)."""
        ones = torch.ones(self.weight.shape[1], dtype=self.storage, device=self.weight.device)
        if self.spec.smooth == "none" or self.statistics is None:
            return ones, None, []
        act = self.statistics.absmax.to(self.weight.device)
        if self.spec.act_unsigned:
            act = act + GELU_SHIFT
        span = torch.maximum(self.weight.amax(0), -self.weight.amin(0))
        if self.spec.smooth == "modulation":
            return smooth_factor(act, span, 0.5, 0.5, DATA_FREE_RANGE).to(self.storage), (0.5, 0.5), []
        if self.rows is None:
            return smooth_factor(act, span, 0.5, 0.5).to(self.storage), (0.5, 0.5), []

        part = evenly(self.weight, SEARCH_OUTPUTS)
        rank, target = min(self.spec.rank, len(part)), self.rows @ part.T

        def error(exponents: tuple[float, float]) -> float:
            factor = smooth_factor(act, span, *exponents).to(self.storage)
            branch, left = low_rank(part * factor.float(), factor, rank, self.storage, SEARCH_ITERATIONS)
            main = rounded_to_nearest(rotate(left, self.rotation), self.spec.group_size, 4, self.storage)
            return self.error(main, factor, branch, target)

        exponents, errors = choose(self.spec.grid, error)
        return smooth_factor(act, span, *exponents).to(self.storage), exponents, errors

    def refined(self, smoothed: Tensor, smooth: Tensor, first: Branch) -> tuple[Branch, list[float]]:
        """The branch after at most `spec.refine` rounds, and the error of every round."""

        def make(branch: Branch) -> tuple[Branch, Tensor, float]:
            left = rotate(smoothed - branch.smoothed(smooth), self.rotation)
            main = rtn(left, self.spec.group_size, 4, self.spec.scale_search, self.storage).dequantise()
            return branch, rotate(main, self.rotation), self.error(main, smooth, branch)

        def again(rounded: Tensor) -> Branch:
            return low_rank(smoothed - rounded, smooth, self.spec.rank, self.storage)[0]

        found = refine(first, make, again, self.spec.refine)
        return found.best, found.errors

    def error(self, main: Tensor, smooth: Tensor, branch: Branch, target: Tensor | None = None) -> float:
        """Relative squared output error of the complete fake-quantised layer; without rows, of the smoothed weight.

        target: the true output, of a part of the outputs.
        """
        if self.rows is None:
            smoothed = self.weight * smooth.float()
            difference = rotate(main, self.rotation) + branch.smoothed(smooth) - smoothed
            return float(difference.square().sum() / smoothed.square().sum().clamp_min(1e-30))
        if target is None:
            target = self.target = self.rows @ self.weight.T if self.target is None else self.target
        shift = GELU_SHIFT if self.spec.act_unsigned else 0.0
        inputs = rotate((self.rows + shift) / smooth.float(), self.rotation)
        found = (self.rows @ branch.down.float()) @ branch.up.float().T
        if shift:
            found -= shift * (main @ smooth.float().reciprocal())
        found.addmm_(fake_quantised(inputs, self.spec), main.T)
        return float((found - target).square().sum() / target.square().sum().clamp_min(1e-30))


def fake_quantised(inputs: Tensor, spec: Spec) -> Tensor:
    """What a layer of `spec` makes of its smoothed and rotated input (n, K): rounded and scaled back, float32."""
    if spec.act_bits == 16:
        return inputs
    codes, scales = quantise_activations(
        inputs, bits=spec.act_bits, group_size=spec.group_size, unsigned=spec.act_unsigned and spec.act_bits == 4
    )
    groups = codes.float().view(len(inputs), -1, spec.group_size)
    return groups.mul_(scales[..., None]).view(inputs.shape)


def with_spec(spec: Spec, **changes: object) -> Spec:
    """`spec` with some fields changed; for tables of methods."""
    return dataclasses.replace(spec, **changes)
