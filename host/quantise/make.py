"""Makes the quantised layers of a network, one group at a time, and sees whether they are good enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import comfy.model_management
import torch
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...quant import policy
from ...quant.calibration import ActivationStatistics
from ...quant.formats import FORMATS, INT8
from ...quant.layer import quantise_group, spec_for, sqnr
from ...quant.linear import W4A4Linear
from ...quant.packed import QuantisedLinear
from ...quant.policy import Choice
from . import nvfp4
from .choose import Choices, QuantWish, becomes_hosts, network_row, planned, spec_of
from .loras import NODE, original
from .modulation import outstanding, spans
from .placed import Quantised
from .teller import Teller, in_words

# Tokens that the quality guard measures a layer with: held out of a first run's, or normally distributed ones.
GUARD_ROWS = 64


def without_data(model) -> dict[str, ActivationStatistics]:
    """What the network's norms and modulation tell of a layer's input, of the layers where that is worth smoothing."""
    found = outstanding(spans(model.get_model_object("diffusion_model"), network_row(model).modulation))
    return {name: ActivationStatistics(span) for name, span in found.items()}


def quantised_layers(
    model, wish: QuantWish, seen: Callable[[str], ActivationStatistics | None], how: str, tell: Teller
) -> Quantised:
    """seen: gives what is known of the input of a group by its first layer, asked once."""
    plan = planned(model, wish)
    choices, layers, values = dict(plan.choices), {}, {}
    everything = [name for names in plan.groups.values() for name in names]
    tell.begin(len(everything), plan.weights(everything))
    with torch.inference_mode(False), torch.no_grad():
        with in_words(model, "before the first layer"):
            _make_room(model, plan)
        for names in plan.groups.values():
            comfy.model_management.throw_exception_if_processing_interrupted()
            with in_words(model, f"at the layer {names[0]} ({' x '.join(map(str, plan.shapes[names[0]]))})"):
                found, measured = quantised_group(model, names, plan, choices, wish, seen(names[0]))
            layers.update(found)
            values.update(measured)
            tell.done(len(names), plan.weights(names))
    return Quantised(layers, choices, saved_bytes(plan, layers), values, how)


def saved_bytes(plan: Choices, layers: Mapping[str, W4A4Linear]) -> int:
    size = comfy.model_management.module_size
    return sum(size(plan.linears[name]) - size(layer) for name, layer in layers.items())


def _make_room(model, plan: Choices) -> None:
    """Ask the host for the memory that the largest group takes: float32 weight, smoothed, residual, codes, SVD."""
    if model.load_device.type != "cpu":
        largest = max(map(plan.weights, plan.groups.values()))
        comfy.model_management.free_memory(6 * 4 * largest, model.load_device)


def weight_and_bias(model, name: str, module: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of a layer without any patch; a bias goes into the new layer, and is not to share its memory with the old."""
    bias = original(model, name, module, "bias")
    return original(model, name, module), None if bias is None else bias.clone()


def quantised_group(
    model,
    names: list[str],
    plan: Choices,
    choices: dict[str, Choice],
    wish: QuantWish,
    seen: ActivationStatistics | None,
) -> tuple[dict[str, W4A4Linear], dict[str, float]]:
    """Quantise the layers of one group; returns them, and what the guard measured, whose changes go into `choices`."""
    originals = {name: weight_and_bias(model, name, plan.linears[name]) for name in names}
    weights, biases = map(list, zip(*originals.values(), strict=True))
    if becomes_hosts(choices[names[0]], wish):
        return {name: _of_the_host(model, name, *both) for name, both in originals.items()}, {}
    # a span without a mean square was not measured, and is trusted less
    smooth = "none" if seen is None else "modulation" if seen.square is None else "search"
    each = (spec_of(choices[name], wish, plan.shapes[name], smooth) for name in names)
    specs = [spec for spec in each if spec is not None]
    spec = replace(specs[0], rank=max(spec.rank for spec in specs))
    held_out = None
    if wish.guard_db and seen is not None:
        seen, held_out = _held_out(seen)
    if wish.gptq and seen is not None and seen.rows is not None and FORMATS[spec.format].weight_bits == 4:
        spec = replace(spec, gptq=True)
    try:
        found = dict(zip(names, quantise_group(weights, biases, spec, seen).layers, strict=True))
        if wish.guard_db and held_out is None:
            held_out = _made_up(weights[0].shape[1], choices[names[0]].after_gelu, seen)
        values = _guard(found, originals, choices, wish.guard_db, held_out) if wish.guard_db else {}
    except ValueError as error:
        raise SlipstreamError(f"{NODE}: {names[0]}: {error}; use a file without damage.") from None
    return {name: module_of(layer, model.offload_device) for name, layer in found.items()}, values


def _of_the_host(model, name: str, weight: Tensor, bias: Tensor | None) -> torch.nn.Module:
    """The layer in NVFP4. Raises SlipstreamError."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    try:
        return nvfp4.layer(weight, bias, dtype, model.load_device)
    except ValueError as error:
        raise SlipstreamError(f"{NODE}: {name}: {error}; use a file without damage.") from None


def _held_out(seen: ActivationStatistics) -> tuple[ActivationStatistics, Tensor | None]:
    """Statistics without the rows that the guard scores with, and those; all for both where there are only a few."""
    rows = seen.rows
    if rows is None or len(rows) < 4 * GUARD_ROWS:
        return seen, rows
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[:: len(rows) // GUARD_ROWS] = True
    return replace(seen, rows=rows[~held]), rows[held]


def _made_up(channels: int, after_gelu: bool, seen: ActivationStatistics | None) -> Tensor:
    """Rows (n, K) that nobody measured: normally distributed, as large as what is known of the channels."""
    rows = torch.randn(GUARD_ROWS, channels, generator=torch.Generator().manual_seed(0))
    if after_gelu:
        return torch.nn.functional.gelu(rows)
    return rows if seen is None else rows * (seen.absmax if seen.square is None else seen.square.sqrt())


def _guard(
    found: dict[str, QuantisedLinear],
    originals: Mapping[str, tuple[Tensor, Tensor | None]],
    choices: dict[str, Choice],
    floor_db: float,
    rows: Tensor,
) -> dict[str, float]:
    """Replace 4-bit layers whose output is worse than the floor, or take them out; returns what was measured, in dB.

    rows: of the input, (n, K).
    """
    values = {}
    for name, layer in found.items():
        weight, bias = originals[name]
        if FORMATS[layer.format].weight_bits == 4:
            values[name] = sqnr(weight, layer, rows.to(weight.device), bias)
    reasons = policy.protection_reasons(values, None, floor_db)
    for name, treatment in policy.protect(values, None, floor_db).items():
        choices[name] = replace(choices[name], treatment=treatment, why=reasons[name])
        del found[name]
        if treatment == "w8a8":
            found[name] = in_8_bit(*originals[name])
    return values


def in_8_bit(weight: Tensor, bias: Tensor | None) -> QuantisedLinear:
    return quantise_group([weight], [bias], spec_for(INT8.name, tuple(weight.shape))).layer


def module_of(layer: QuantisedLinear, device: torch.device) -> W4A4Linear:
    module = W4A4Linear(layer).to(device)
    module.managed = True
    return module
