"""One linear layer, or several that share their input, from a 16-bit weight to a QuantisedLinear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import GELU_SHIFT, quantise_activations
from .calibration import ActivationStatistics, evenly, split_channels
from .formats import FORMATS, GROUP_SIZE, GROUPS
from .packed import QuantisedLinear
from .rotate import rotate, rotation_size
from .rounding import Rounded, gptq, rounded_to_nearest, rtn
from .smooth import DATA_FREE_RANGE, SMALL_GRID, choose, smooth_factor
from .svd import Branch, low_rank, refine

# Rows on which candidates are compared, and outputs of the layer, at most.
SEARCH_ROWS, SEARCH_OUTPUTS = 128, 1536

# Power iterations of a candidate's branch: enough to rank candidates, the chosen one gets the full number.
SEARCH_ITERATIONS = 1

SMOOTHING = ("none", "search", "modulation")


@dataclass(frozen=True, slots=True)
class Spec:
    """How a layer is to be quantised.

    format: a key of FORMATS, which sets the bits of weight and activation. rank: of the low-rank branch, 16 to 128, 0
    for none. rotation: largest Hadamard block, 0 for none; formats that always rotate take 256 for 0.
    Per-row formats have neither branch nor smooth factor. smooth: "none"; "search" over `grid` by output error, which
    needs rows (with absmax alone: alpha = beta = 0.5); "modulation": alpha = beta = 0.5 on spans made without data.
    grid: (alpha, beta) candidates. refine: most rounds of fitting the branch to what rounding left. gptq: GPTQ on the
    residual, needs a Hessian or rows. scale_search: least squared error instead of absmax. act_unsigned: the input is a
    GELU's output. storage: 16-bit dtype of scales and branch, None for the weight's (bfloat16 for a float32 weight).
    Raises ValueError for what cannot be combined.
    """

    format: str = GROUPS.name
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


def spec_for(
    format: str,
    shape: tuple[int, int],
    rank: int = 32,
    smooth: str = "none",
    after_gelu: bool = False,
    rotated: bool = False,
) -> Spec:
    """How a layer of this shape (N, K) is quantised in a format as it is used, of what its tensors have a place for.

    rank: of the branch, at most; smooth: see `Spec`; after_gelu: the input is a GELU's output; rotated: rotate where
    the format leaves the choice.
    """
    return Spec(format, **FORMATS[format].options(*shape, rank, smooth, after_gelu, rotated))


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
    made = FORMATS[spec.format].quantise(Work(weight, spec, statistics, storage or torch.bfloat16))
    layers: list[QuantisedLinear] = []
    start = 0
    for one, bias in zip(weights, biases, strict=True):
        layers.append(_member(made, slice(start, start + len(one)), one.dtype, bias))
        start += len(one)
    return Outcome(tuple(layers), made.exponents, made.errors, made.rounded.reason)


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
    layers: list[QuantisedLinear] = []
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
    row = FORMATS[spec.format]
    if row.rotation(spec.rotation) and not rotation_size(k, row.rotation(spec.rotation)):
        raise ValueError(f"{k} input channels cannot be rotated: no block of 16, 64 or 256 divides them")
    if row.branch and spec.rank > min(k, sum(map(len, weights))):
        raise ValueError(f"a branch of rank {spec.rank} does not fit a layer of {k} input channels")
    if statistics is not None and statistics.channels != k:
        raise ValueError(f"the statistics are of {statistics.channels} channels, the layer has {k}")
    if spec.gptq and (statistics is None or (statistics.rows is None and statistics.hessian is None)):
        raise ValueError("GPTQ needs a calibration with rows or a Hessian")


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """The concatenated layer before it is cut up. correction: (N,), taken off the bias of unsigned layers; exponents
    and errors: see `Outcome`."""

    spec: Spec
    rounded: Rounded
    rotation: int
    smooth: Tensor | None = None
    branch: Branch | None = None
    correction: Tensor | None = None
    exponents: tuple[float, float] | None = None
    errors: tuple[float, ...] = ()


def _member(made: Made, rows: slice, dtype: torch.dtype, bias: Tensor | None) -> QuantisedLinear:
    spec, row = made.spec, FORMATS[made.spec.format]
    codes = made.rounded.codes[rows]
    if made.correction is not None:
        like = made.smooth if bias is None else bias
        wide = -made.correction[rows] if bias is None else bias.float() - made.correction[rows]
        bias = wide if like is None else wide.to(like.dtype)
    return QuantisedLinear(
        spec.format,
        (codes.shape[0], codes.shape[1]),
        dtype,
        row.pack(codes),
        row.stored_scale(made.rounded.scales[rows]).contiguous(),
        None if made.branch is None else made.branch.down,
        None if made.branch is None else made.branch.up[rows].contiguous(),
        made.smooth,
        bias,
        spec.group_size,
        spec.act_unsigned,
        made.rotation,
    )


class Work:
    """The state of one quantisation: weight float32 (N, K), the rows candidates are judged on and their true output."""

    def __init__(
        self, weight: Tensor, spec: Spec, statistics: ActivationStatistics | None, storage: torch.dtype
    ) -> None:
        self.weight, self.spec, self.statistics, self.storage = weight, spec, statistics, storage
        self.row = FORMATS[spec.format]
        largest = self.row.rotation(spec.rotation)
        self.rotation = rotation_size(weight.shape[1], largest) if largest else 0
        self.rows: Tensor | None = None
        self.target: Tensor | None = None
        if statistics is not None and statistics.rows is not None:
            self.rows = evenly(statistics.rows, SEARCH_ROWS).to(weight)

    def per_row(self) -> Made:
        """ConvRot: rotate, one float32 scale per row. See `convrot_linear`."""
        rotated = rotate(self.weight, self.rotation)
        rounded = self.round(rotated, torch.ones_like(self.weight[0]), rotated.shape[1], torch.float32)
        return Made(self.spec, rounded, self.rotation)

    def grouped(self) -> Made:
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
        rounded = self.round(rotate(left, self.rotation), smooth, spec.group_size, self.storage)
        correction = None
        if spec.act_unsigned:
            # of the rounded residual, not the exact one: then the shift leaves no error of its own
            correction = GELU_SHIFT * (rounded.dequantise() @ smooth.float().reciprocal())
        return Made(spec, rounded, self.rotation, smooth, branch, correction, exponents, tuple(errors))

    def round(self, main: Tensor, smooth: Tensor, group_size: int, dtype: torch.dtype) -> Rounded:
        """Codes of the main path's weight, by GPTQ if asked for."""
        bits, seen = self.row.weight_bits, self.statistics
        if not self.spec.gptq or seen is None:
            return rtn(main, group_size, bits, self.spec.scale_search, dtype)
        hessian, count = seen.hessian, seen.count
        if hessian is None:
            assert seen.rows is not None  # asked for by `_check`
            rows = seen.rows.to(main)
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
            main = rounded_to_nearest(
                rotate(left, self.rotation), self.spec.group_size, self.row.weight_bits, self.storage
            )
            return self.error(main, factor, branch, target)

        exponents, errors = choose(self.spec.grid, error)
        return smooth_factor(act, span, *exponents).to(self.storage), exponents, errors

    def refined(self, smoothed: Tensor, smooth: Tensor, first: Branch) -> tuple[Branch, list[float]]:
        """The branch after at most `spec.refine` rounds, and the error of every round."""

        def make(branch: Branch) -> tuple[Branch, Tensor, float]:
            left = rotate(smoothed - branch.smoothed(smooth), self.rotation)
            bits = self.row.weight_bits
            main = rtn(left, self.spec.group_size, bits, self.spec.scale_search, self.storage).dequantise()
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
