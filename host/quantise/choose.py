"""What W4A4 Quantize is asked for, and which layers of a network become what by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...quant import policy
from ...quant.formats import FORMATS, GROUP_SIZE
from ...quant.layer import METHODS, Spec, with_spec
from ...quant.linear import W4A4Linear
from ...quant.policy import Choice
from ...quant.rotate import rotation_size
from . import nvfp4
from .loras import NODE, PREFIX

AUTO, FIRST_RUN = "auto", "first run"


@dataclass(frozen=True, slots=True)
class QuantWish:
    """What the node asks for.

    format: "auto" (rotated groups with a low-rank branch, the best without data) or a key of FORMATS, for the layers
    that the policy gives 4 bit; rank: of the branch, 0 to 128; layers: lines `part of a layer name = treatment`, see
    `policy.parse_overrides`; act_bits: 4, 8 or 16, of "auto" and "svdquant_w4a4"; guard_db: layers below this signal
    to noise get 8 or 16 bit, 0 leaves all; calibration: "" for none, FIRST_RUN to measure `evaluations` steps of the
    user's own first sampling, or a profile with activation statistics, whose ranges smooth every layer; gptq: round by
    GPTQ, with a first run only.
    """

    format: str = AUTO
    rank: int = 32
    layers: str = ""
    act_bits: int = 4
    guard_db: float = 0.0
    calibration: str = ""
    gptq: bool = False
    evaluations: int = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """linears, shapes, choices: of all linear layers by name; groups: key -> names, of those to be quantised."""

    linears: dict[str, torch.nn.Module]
    shapes: dict[str, tuple[int, int]]
    choices: dict[str, Choice]
    groups: dict[str, list[str]] = field(default_factory=dict)

    def weights(self, names: Sequence[str]) -> int:
        """How many numbers these layers have."""
        return sum(math.prod(self.shapes[name]) for name in names)


def linears_of(model) -> dict[str, torch.nn.Module]:
    """The network's own linear layers by path, also while another patcher's layers are in their places."""
    network = model.get_model_object("diffusion_model")
    found = {
        name: model.get_model_object(PREFIX + name) for name, module in network.named_modules() if _is_linear(module)
    }
    return {name: module for name, module in found.items() if getattr(module, "weight", None) is not None}


def _is_linear(module: torch.nn.Module) -> bool:
    # the newest host's Linear of mixed precision is none of torch's
    return isinstance(module, torch.nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def classified(model, overrides: str = "") -> dict[str, Choice]:
    """What the policy of the network's family says of every linear layer. Raises ValueError for bad overrides."""
    shapes = {name: (module.out_features, module.in_features) for name, module in linears_of(model).items()}
    return policy.plan(shapes, policy.policy_for(_classes(model)), overrides, policy.LIMITS)


def planned(model, wish: QuantWish) -> Plan:
    """What is to be quantised. Raises SlipstreamError where nothing can be."""
    linears = linears_of(model)
    for name, module in linears.items():
        if isinstance(module, W4A4Linear):
            _refuse_quantised(name, module)
    shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
    try:
        choices = classified(model, wish.layers)
    except ValueError as error:
        raise SlipstreamError(f"{NODE}: {error}") from None
    plan = Plan(linears, shapes, choices)
    for name, choice in choices.items():
        if spec_of(choice, wish, shapes[name]) is not None:
            _refuse_quantised(name, linears[name])
            plan.groups.setdefault(choice.group, []).append(name)
    if not plan.groups:
        kind = type(model.model).__name__
        raise SlipstreamError(
            f"{NODE}: this model ({kind}) has no linear layer that can be quantised among its {len(shapes)}; connect a "
            "larger model, or name layers in 'layers'."
        )
    return plan


def _classes(model) -> list[str]:
    """The names of the network's class and its bases, nearest first."""
    network = model.get_model_object("diffusion_model")
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(network).__mro__]


def spec_of(choice: Choice, wish: QuantWish, shape: tuple[int, int], smooth: str = "none") -> Spec | None:
    """How a layer of shape (N, K) is quantised; None: it stays. A width that 4-bit groups do not fit gets 8 bit.

    smooth: of `Spec`, for formats that smooth. With NVFP4 it tells of the layers that do not become the host's.
    """
    n, k = shape
    if choice.treatment == "keep" or not rotation_size(k):
        return None
    careful = choice.treatment == "w4a16"
    if choice.treatment == "w8a8" or wish.format == "int8_convrot" or k % GROUP_SIZE:
        return _per_row("int8_convrot", k)
    if wish.format in ("convrot_w4a4", nvfp4.FORMAT):
        return _per_row("int8_convrot" if careful else "convrot", k)  # of the host's formats the finer one
    bits = 16 if careful else wish.act_bits if wish.format in (AUTO, "svdquant_w4a4") else FORMATS[wish.format].act_bits
    name = {4: "svdquant_w4a4", 8: "w4a8", 16: "w4a16"}[bits]
    rotated = wish.format == AUTO and not choice.after_gelu
    base = METHODS["hadamard_svd"] if rotated else METHODS["svdquant"]
    unsigned = choice.after_gelu and not rotated
    return with_spec(base, format=name, rank=min(wish.rank, n, k), smooth=smooth, act_unsigned=unsigned)


def _per_row(method: str, k: int) -> Spec:
    """The method with a group size that divides K, which its scales per row do not depend on."""
    return with_spec(METHODS[method], group_size=rotation_size(k))


def _refuse_quantised(name: str, module: torch.nn.Module) -> None:
    weight = module.weight
    plain = type(weight) in (Tensor, torch.nn.Parameter) and type(weight.data) is Tensor
    if not plain and "FP8" in str(getattr(module, "layout_type", "")):
        return  # scaled fp8, which the host scales up
    if isinstance(module, W4A4Linear) or not plain or not weight.is_floating_point():
        kind = type(weight).__name__ if not plain else str(weight.dtype).removeprefix("torch.")
        raise SlipstreamError(
            f"{NODE}: the layer {name} of this model is quantised already ({kind}); load its 16-bit or fp8 file."
        )
