"""What W4A4 Quantize is asked for, and which layers of a network become what by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...engine.families import Architecture, row_of
from ...quant import policy
from ...quant.formats import FORMATS, GROUPS, INT8, Format
from ...quant.layer import Spec, spec_for
from ...quant.linear import W4A4Linear
from ...quant.policy import Choice
from . import nvfp4
from .loras import NODE, PREFIX

AUTO, FIRST_RUN = "auto", "first run"

# The formats on the canvas; the host's own where it has them.
CHOICES = (AUTO, *FORMATS, *([nvfp4.FORMAT] if nvfp4.available() else []))


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
class Choices:
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
    return policy.plan(shapes, policy.policy_for(network_row(model).policy), overrides, policy.LIMITS)


def planned(model, wish: QuantWish) -> Choices:
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
    plan = Choices(linears, shapes, choices)
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


def network_row(model) -> Architecture:
    """Of the network's class as it stands: below a wrapper the layers have other names than the rules expect."""
    return row_of(type(model.get_model_object("diffusion_model")))


def explained() -> str:
    """The formats in the words of their rows, those of equal words together."""
    named: dict[str, list[str]] = {}
    for name, row in FORMATS.items():
        named.setdefault(row.words, []).append(name)
    named[nvfp4.WORDS] = [nvfp4.FORMAT]
    return " ".join(f"{', '.join(names)}: {words}." for words, names in named.items())


def wanted(wish: QuantWish) -> Format:
    """The format that a wish names; of the host's own ones, that of the layers that do not become the host's."""
    if wish.format == AUTO:
        return GROUPS
    return nvfp4.BESIDE if wish.format == nvfp4.FORMAT else FORMATS[wish.format]


def becomes_hosts(choice: Choice, wish: QuantWish) -> bool:
    """Whether the layer becomes one of the host's own."""
    return wish.format == nvfp4.FORMAT and choice.treatment == "w4a4"


def spec_of(choice: Choice, wish: QuantWish, shape: tuple[int, int], smooth: str = "none") -> Spec | None:
    """How a layer of shape (N, K) is quantised; None: it stays. A width that the format does not fit gets 8 bit.

    smooth: of `Spec`, for formats that smooth.
    """
    k = shape[1]
    if choice.treatment == "keep" or not INT8.fits(k):
        return None
    row = wanted(wish)
    row = FORMATS[row.careful or row.name] if choice.treatment == "w4a16" else row.asked_for(wish.act_bits)
    if choice.treatment == "w8a8" or not row.fits(k):
        row = INT8
    return spec_for(row.name, shape, wish.rank, smooth, choice.after_gelu, rotated=wish.format == AUTO)


def most_bytes(choice: Choice, wish: QuantWish, shape: tuple[int, int]) -> int:
    """Most bytes that the quantised layer takes; 8 bit where the guard may choose them."""
    if becomes_hosts(choice, wish):
        return nvfp4.most_bytes(*shape)
    spec = spec_of(choice, wish, shape)
    row = FORMATS[spec.format] if spec is not None and not wish.guard_db else INT8
    return row.nbytes(*shape, 0 if spec is None else spec.rank)


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
