"""The table of implementations of a quantised linear layer: what each needs, what it is in words, how it is run.

Triton and comfy-kitchen are imported when an implementation that needs them is considered, and are missed by nobody.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import plain
from .interpret import INTERPRET
from .lasting import lasting
from .layer import Layer
from .reference import GELU_SHIFT

HALVES = (torch.float16, torch.bfloat16)
Config = tuple[int, ...]

# Any Triton that can be imported expands weights. What multiplies on tensor cores, and K0's rotation, needs 3.4: of K1
# 3.2 aborts the whole process while it compiles, and 3.3 compiles neither.
TRITON, TENSOR_CORES = (3, 0), (3, 4)

# What the output of an implementation may differ by, relative, in 16 bit: its own roundings and the reference's are
# 2^-9 each in bfloat16, the branch's projection another, and a code that lies between two integers may fall either way.
ROUNDING = 0.015

# comfy-kitchen divides by smooth and rounds scales in 16 bit, so that many codes fall the other way: 0.04 seen of its
# eager backend at K = 3072, no further from the 16-bit layer than ours.
HALF_SCALES = 0.08

# One scale per token and output instead of one per group: seen 0.01 on normal inputs.
FOLDING = 0.05


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the Triton that can be imported, or None."""
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.language")
        major, minor = triton.__version__.split(".")[:2]
        return int(major), int(minor)
    except Exception:  # a broken installation raises anything
        return None


@lru_cache(maxsize=1)
def kitchen():
    """comfy-kitchen, or None."""
    try:
        return importlib.import_module("comfy_kitchen")
    except Exception:
        return None


@dataclass(frozen=True, slots=True)
class Problem:
    """What decides which implementation can be used: where, how many rows M, and the layer.

    device: torch's device type; capability: of a CUDA card, (0, 0) elsewhere; hip: an AMD card behind torch's `cuda`.
    """

    device: str
    capability: tuple[int, int]
    hip: bool
    dtype: torch.dtype
    m: int
    layer: Layer

    @classmethod
    def of(cls, x: Tensor, layer: Layer) -> Problem:
        """x: (M, K)."""
        hip = torch.version.hip is not None
        cuda = x.device.type == "cuda" and not hip
        capability = torch.cuda.get_device_capability(x.device) if cuda else (0, 0)
        return cls(x.device.type, capability, hip and x.device.type == "cuda", x.dtype, len(x), layer)

    def triton(self, oldest: tuple[int, int] = TRITON) -> bool:
        """Triton of a version can work here; in the interpreter it does on the CPU."""
        version = triton_version()
        return version is not None and version >= oldest and (self.device == "cuda" or INTERPRET)

    @property
    def tiled(self) -> bool:
        """The shape suits our kernels: whole groups of 64 and whole rotation blocks in a tile."""
        layer = self.layer
        block = layer.k % 64 == 0 and layer.rotation in (0, 4, 16, 64, 256) and layer.k % max(1, layer.rotation) == 0
        return block and (layer.per_row or layer.group_size == 64)

    @property
    def tensor_cores(self) -> bool:
        """Triton's int8 products: not before Ampere (3.3 and newer cannot), not on AMD (inline PTX)."""
        card = (self.dtype in HALVES and self.capability >= (8, 0)) or INTERPRET
        return self.triton(TENSOR_CORES) and self.tiled and card

    @property
    def per_token(self) -> bool:
        """One scale per token can serve: the format says so, or 8-bit activations are rotated and have no outliers."""
        layer = self.layer
        folds = layer.act_bits == 8 and layer.rotation >= 16 and layer.group_size == 64
        return layer.act_bits == layer.weight_bits if layer.per_row else folds


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute a layer. words: for the user. fits: whether it can; run(x (M, K), layer, config) -> (M, N);
    configs: what is measured, ((),) for one way only; like: act_bits of the reference that it has to agree with within
    `tolerance`, None for the layer's own."""

    name: str
    words: str
    fits: Callable[[Problem], bool]
    run: Callable[[Tensor, Layer, Config], Tensor]
    configs: Callable[[Problem], tuple[Config, ...]] = lambda problem: ((),)
    like: int | None = None
    tolerance: float | Callable[[Layer], float] = ROUNDING


_memo = threading.local()


def quantised(x: Tensor, layer: Layer, per_row: bool, packed: bool = True):
    """K0's result for a layer; the one of the last call where the layers share it and x is the same memory.

    The share's key promises that x is not changed between its layers: in inference mode nothing tells. A layer that
    comes a second time is given a new one.
    """
    quantise = importlib.import_module(".activations", __package__).quantise
    options = {"bits": layer.act_bits, "unsigned": layer.unsigned, "rotation": layer.rotation, "per_row": per_row}
    make = partial(quantise, x, layer.smooth, layer.proj_down, packed=packed, **options)
    if layer.share is None:
        return make()
    key, layers = layer.share
    storage = x.untyped_storage()
    version = 0 if x.is_inference() else x._version
    mark = (key, layer.kind, per_row, packed, storage._cdata, x.data_ptr(), x.shape, x.stride(), version)
    weight = layer.weight.data_ptr()
    last = getattr(_memo, "last", None)
    if last is not None and last[0] == mark and not last[1].expired() and weight not in last[2]:
        last[2].add(weight)
        result = last[3]
        if len(last[2]) >= layers:
            _memo.last = None
        return result
    if layers < 2:
        _memo.last = None
        return make()
    with lasting():
        result = make()
    _memo.last = (mark, StorageWeakRef(storage), {weight}, result)
    return result


def forget() -> None:
    """Free what this thread keeps for layers that share an input."""
    _memo.last = None


def _int8_triton(x: Tensor, layer: Layer, config: Config) -> Tensor:
    gemm = importlib.import_module(".gemm", __package__)
    q = quantised(x, layer, layer.per_row)
    return gemm.linear(
        q.codes, q.scales, layer.weight, layer.weight_scale, x.dtype, q.low, layer.proj_up, layer.bias,
        act_bits=layer.act_bits, unsigned=layer.unsigned and layer.act_bits == 4, tile=gemm.Tile(*config),
    )  # fmt: skip


def _fold_triton(x: Tensor, layer: Layer, config: Config) -> Tensor:
    gemm = importlib.import_module(".gemm", __package__)
    weight, scale = importlib.import_module(".dequant", __package__).int8_weight(layer)
    q = quantised(x, layer, True)
    return gemm.linear(
        q.codes, q.scales, weight, scale, x.dtype, q.low, layer.proj_up, layer.bias, act_bits=8, tile=gemm.Tile(*config)
    )


def _tiles(problem: Problem, rows: bool = False) -> tuple[Config, ...]:
    gemm = importlib.import_module(".gemm", __package__)
    found = gemm.tiles(problem.m, problem.capability, rows or problem.layer.per_row)
    return tuple((t.m, t.n, t.warps, t.stages) for t in found)


def _int4_native(x: Tensor, layer: Layer, config: Config) -> Tensor:
    native = importlib.import_module(".int4_native", __package__)
    q = quantised(x, layer, layer.per_row)
    return native.linear(
        q.codes, q.scales, layer.weight, layer.weight_scale, x.dtype, q.low, layer.proj_up, layer.bias,
        unsigned=layer.unsigned, rows=config[0],
    )  # fmt: skip


def _fits_int4(problem: Problem) -> bool:
    cards = ((8, 0), (8, 6), (8, 7), (8, 9))  # others emulate the instruction
    layer = problem.layer
    right = layer.act_bits == layer.weight_bits == 4 and problem.dtype in HALVES and problem.capability in cards
    return right and problem.tiled and problem.triton((3, 5)) and not INTERPRET


def _int8_cublas(x: Tensor, layer: Layer, config: Config) -> Tensor:
    problem = Problem.of(x, layer)
    if not (problem.triton(TENSOR_CORES) and problem.tiled):
        return plain.int8_linear(x, layer)

    def codes(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        quantise = importlib.import_module(".activations", __package__).quantise
        options = {"bits": layer.act_bits, "unsigned": layer.unsigned, "rotation": layer.rotation}
        q = quantise(x, layer.smooth, **options, per_row=True, packed=False)
        return q.codes, q.scales

    return plain.int8_linear(x, layer, codes, importlib.import_module(".dequant", __package__).int8_weight)


def _fits_cublas(problem: Problem) -> bool:
    layer = problem.layer
    whole = problem.m > 16 and layer.n % 8 == 0 and layer.k % 8 == 0 and problem.dtype in HALVES
    int8 = layer.act_bits in (4, 8) and (problem.per_token or (layer.per_row and layer.act_bits == 4))
    return problem.capability >= (7, 5) and whole and int8 and hasattr(torch, "_int_mm")


def _kitchen(x: Tensor, layer: Layer, config: Config) -> Tensor:
    ck = kitchen()
    if not layer.per_row:
        like = layer.weight_scale.new_empty(0, dtype=x.dtype)
        main = x + GELU_SHIFT if layer.unsigned else x
        smooth = x.new_ones(layer.k) if layer.smooth is None else layer.smooth.to(x.dtype)
        down = x.new_zeros(layer.k, 16) if not layer.rank else layer.proj_down.to(x.dtype)
        up = x.new_zeros(layer.n, 16) if not layer.rank else layer.proj_up.to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        codes, scales, low = ck.quantize_svdquant_w4a4(main, smooth, down, 256, layer.unsigned, x)
        out = ck.scaled_mm_svdquant_w4a4(
            codes, layer.weight, scales, layer.weight_scale.to(like), low, up, bias, layer.unsigned
        )
        return out[: len(x)]
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if layer.weight_bits == 4:
        scale = layer.weight_scale.float().view(-1)
        out = ck.convrot_w4a4_linear(x.contiguous(), layer.weight, scale, bias, layer.rotation)
    else:
        scale = layer.weight_scale.float().view(-1, 1)
        out = ck.int8_linear(
            x.contiguous(), layer.weight, scale, bias, x.dtype, convrot=True, convrot_groupsize=layer.rotation
        )
    return plain.finish(out, x, layer)


def _fits_kitchen(problem: Problem) -> bool:
    layer = problem.layer
    groups = layer.act_bits == 4 and layer.group_size == 64 and not layer.rotation
    rows = layer.per_row and layer.act_bits == layer.weight_bits and layer.rotation == 256
    # its 4-bit kernels trap before Ampere, which would end the whole process's use of the card
    return (groups or rows) and problem.capability >= (8, 0) and problem.dtype in HALVES and kitchen() is not None


def _dequant_triton(x: Tensor, layer: Layer, config: Config) -> Tensor:
    expand = importlib.import_module(".dequant", __package__).expand
    return plain.dequantised_linear(x, layer, expand, x.element_size())


TABLE = (
    Implementation(
        "int4_native",
        "4-bit tensor cores (Triton)",
        _fits_int4,
        _int4_native,
        lambda problem: ((128,), (64,)),
    ),
    Implementation("kitchen", "comfy-kitchen's kernels", _fits_kitchen, _kitchen, tolerance=HALF_SCALES),
    Implementation(
        "int8_triton",
        "int8 tensor cores, unpacked in registers (Triton)",
        lambda p: (
            p.tensor_cores
            and p.layer.act_bits in (4, 8)
            and (not p.layer.per_row or p.layer.act_bits == p.layer.weight_bits)
        ),
        _int8_triton,
        _tiles,
    ),
    Implementation(
        "fold_triton",
        "int8 tensor cores, group scales folded into one per output (Triton)",
        lambda p: p.tensor_cores and p.per_token and not p.layer.per_row,
        _fold_triton,
        partial(_tiles, rows=True),
        like=16,
        tolerance=FOLDING,
    ),
    Implementation(
        "int8_cublas",
        "int8 tensor cores (cuBLAS)",
        _fits_cublas,
        lambda x, layer, config: _int8_cublas(x, layer, config),
        # folded, the weight is not the reference's any more
        tolerance=lambda layer: ROUNDING if layer.per_row else FOLDING,
    ),
    Implementation(
        "dequant_triton",
        "weight expanded to 16 bit, activations not rounded (Triton and cuBLAS)",
        lambda p: p.device == "cuda" and p.triton() and p.tiled,
        _dequant_triton,
        like=16,
    ),
    Implementation(
        "dequant_torch",
        "weight expanded to 16 bit, activations not rounded (plain torch)",
        lambda p: True,
        lambda x, layer, config: plain.dequantised_linear(x, layer),
        like=16,
    ),
    Implementation(
        "reference",
        "the exact reference, slow (plain torch)",
        lambda p: True,
        lambda x, layer, config: layer.reference(x),
    ),
)
