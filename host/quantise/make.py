"""Makes the quantised layers of a network: which, how, one group at a time, and whether they are good enough."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...engine.families import Architecture, row_of
from ...quant import policy
from ...quant.calibration import Statistics
from ...quant.formats import FORMATS, GROUP_SIZE, QuantisedLinear
from ...quant.layer import METHODS, Spec, quantise_group, sqnr, with_spec
from ...quant.linear import W4A4Linear
from ...quant.policy import Choice
from ...quant.rotate import rotation_size
from ..canvas.events import show
from ..parts import QUANTISED as KEY
from ..parts import put_on
from . import nvfp4
from .loras import NODE, PREFIX, give_loras, original
from .modulation import outstanding, spans

AUTO, FIRST_RUN = "auto", "first run"

# Tokens that the quality guard measures a layer with: held out of a first run's, or normally distributed ones.
GUARD_ROWS = 64

Progress = Callable[[int, int], None]


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
class Check:
    """The first run's end: signal to noise of its last denoised latent against the 16-bit network's, in dB, before and
    after `raised` layers got 8 bit."""

    before: float
    after: float
    raised: tuple[str, ...] = ()


class Quantised:
    """The quantised layers of one network for one wish, by their path below `diffusion_model`.

    layers: what is placed; choices: what the policy and the guard decided for every linear layer of the network. Lives
    as long as a patcher or one of its layers does: a network that is loaded with them holds them, nothing else.
    saved: bytes less than the originals; sqnr: dB of the 4-bit layers that the guard measured; how: what the layers
    were made from, in words.
    """

    def __init__(
        self,
        layers: Mapping[str, W4A4Linear],
        choices: Mapping[str, Choice],
        saved: int = 0,
        sqnr: Mapping[str, float] | None = None,
        how: str = "",
        check: Check | None = None,
    ) -> None:
        self.layers, self.choices = dict(layers), dict(choices)
        self.saved, self.sqnr, self.how, self.check = saved, dict(sqnr or {}), how, check
        self.id = uuid.uuid4()
        self._copies: weakref.WeakKeyDictionary[torch.nn.Module, Quantised] = weakref.WeakKeyDictionary()
        for layer in self.layers.values():
            layer.made = self
        share_inputs(self.layers, choices)

    def __deepcopy__(self, memo: dict) -> Quantised:
        return self  # a copy of one layer is not to copy them all

    def take_off(self, patcher) -> None:
        """Put the network's own weights back where these layers are placed."""
        size = patcher.model_size() + self.saved
        for name in self.layers:
            patcher.object_patches.pop(PREFIX + name, None)
        patcher.size = size
        # else the host would take the quantised layers that are loaded now for this patcher's weights
        patcher.patches_uuid = uuid.uuid4()
        for callback in (CallbacksMP.ON_LOAD, CallbacksMP.ON_CLONE):
            patcher.remove_callbacks_with_key(callback, KEY)

    def own_layers(self, patcher, clone) -> None:
        """ON_CLONE: a clone with another network, for another card, gets copies of the layers; once per network."""
        if clone.model is patcher.model:
            return
        found = self._copies.get(clone.model)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                layers = {name: copy.deepcopy(layer).to(clone.offload_device) for name, layer in self.layers.items()}
            found = self._copies[clone.model] = Quantised(
                layers, self.choices, self.saved, self.sqnr, self.how, self.check
            )
        for name, layer in found.layers.items():
            clone.object_patches[PREFIX + name] = layer


def share_inputs(layers: Mapping[str, torch.nn.Module], choices: Mapping[str, Choice]) -> None:
    """Let the layers of a group that were made with one smooth factor and one projection quantise their input once."""
    groups: dict[str, list[W4A4Linear]] = {}
    for name, layer in layers.items():
        if isinstance(layer, W4A4Linear):
            groups.setdefault(choices[name].group if name in choices else name, []).append(layer)
    for members in groups.values():
        first = _input_side(members[0])
        if len(members) > 1 and all(_same(first, _input_side(layer)) for layer in members[1:]):
            share = (uuid.uuid4(), len(members))
            for layer in members:
                layer.share = share


def _input_side(layer: W4A4Linear) -> tuple:
    found = layer.layer(lora=False)
    tensors = (getattr(found, "smooth", None), getattr(found, "proj_down", None))
    return tensors, (layer.format, layer.rotation, getattr(found, "act_unsigned", None))


def _same(one: tuple, other: tuple) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return one[1] == other[1] and all(map(equal, one[0], other[0]))


def place(patcher, found: Quantised) -> None:
    """Put the layers on this patcher, which may be waiting for them, in the memory that they take."""
    size = patcher.model_size()
    for name, layer in found.layers.items():
        replaced = patcher.get_model_object(PREFIX + name)
        size += comfy.model_management.module_size(layer) - comfy.model_management.module_size(replaced)
        patcher.add_object_patch(PREFIX + name, layer)
    # the host measures the network as it is loaded now, which may be without these layers
    patcher.size = size
    # of its own, or the host would take what is loaded now for this patcher's weights; the same for clones with the
    # same layers and LoRAs, which really have the same weights
    patcher.patches_uuid = uuid.uuid5(found.id, str(patcher.patches_uuid))
    put_on(patcher, KEY, found)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, give_loras)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, found.own_layers)


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


def classified(model, overrides: str = "") -> dict[str, Choice]:
    """What the policy of the network's family says of every linear layer. Raises ValueError for bad overrides."""
    shapes = {name: (module.out_features, module.in_features) for name, module in linears_of(model).items()}
    return policy.plan(shapes, policy.policy_for(_row(model).policy), overrides, policy.LIMITS)


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


def _row(model) -> Architecture:
    """Of the network's class as it stands: below a wrapper the layers have other names than the rules expect."""
    return row_of(type(model.get_model_object("diffusion_model")))


def without_data(model) -> dict[str, Statistics]:
    """What the network's norms and modulation tell of a layer's input, of the layers where that is worth smoothing."""
    found = outstanding(spans(model.get_model_object("diffusion_model"), _row(model).modulation))
    return {name: Statistics(span) for name, span in found.items()}


def quantised_layers(
    model, wish: QuantWish, seen: Callable[[str], Statistics | None], how: str, tell: Teller
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


def saved_bytes(plan: Plan, layers: Mapping[str, W4A4Linear]) -> int:
    size = comfy.model_management.module_size
    return sum(size(plan.linears[name]) - size(layer) for name, layer in layers.items())


@contextlib.contextmanager
def in_words(model, where: str) -> Iterator[None]:
    """Memory and disk errors as one sentence; the model is left as it was in any case."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said, by_type = str(error).lower(), isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        if not by_type and "out of memory" not in said and "can't allocate memory" not in said:
            raise
        comfy.model_management.soft_empty_cache()
        raise SlipstreamError(
            f"{NODE}: the memory of {model.load_device} or the computer ran out {where}; close other programs, or "
            "choose a smaller rank or fewer evaluations, and queue again."
        ) from None
    except OSError as error:
        raise SlipstreamError(
            f"{NODE}: the model's file could not be read {where} ({error}); see whether its disk is there, "
            "and load the model again."
        ) from None


class Teller:
    """Says how far the work is: numbers for a bar, and words for a node."""

    def __init__(self, progress: Progress | None, node_id: str) -> None:
        self._progress, self._node_id = progress, node_id
        self.begin(0, 0)

    def begin(self, layers: int, weights: int) -> None:
        """The work is so many layers, of so many weights together."""
        self._layers, self._weights, self._done, self._share, self._groups = layers, weights, 0, 0, 0
        self._started = time.monotonic()

    def done(self, layers: int, weights: int) -> None:
        """So many more layers are quantised."""
        self._done, self._share, self._groups = self._done + layers, self._share + weights, self._groups + 1
        self.say(f"quantising layer {self._done} of {self._layers}{self._left()}")
        if self._progress is not None:
            self._progress(self._done, self._layers)

    def _left(self) -> str:
        spent = time.monotonic() - self._started
        if self._groups < 3 or spent < 1:  # too early to tell
            return ""
        left = spent * (self._weights - self._share) / self._share
        return f", {left:.0f} s left" if left < 90 else f", {left / 60:.0f} min left"

    def say(self, sentence: str) -> None:
        """Show it on the node."""
        show(self._node_id, sentence)


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


def _make_room(model, plan: Plan) -> None:
    """Ask the host for the memory that the largest group takes: float32 weight, smoothed, residual, codes, SVD."""
    if model.load_device.type != "cpu":
        largest = max(map(plan.weights, plan.groups.values()))
        comfy.model_management.free_memory(6 * 4 * largest, model.load_device)


def weight_and_bias(model, name: str, module: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of a layer without any patch; a bias goes into the new layer, and is not to share its memory with the old."""
    bias = original(model, name, module, "bias")
    return original(model, name, module), None if bias is None else bias.clone()


def quantised_group(
    model, names: list[str], plan: Plan, choices: dict[str, Choice], wish: QuantWish, seen: Statistics | None
) -> tuple[dict[str, W4A4Linear], dict[str, float]]:
    """Quantise the layers of one group; returns them, and what the guard measured, whose changes go into `choices`."""
    originals = {name: weight_and_bias(model, name, plan.linears[name]) for name in names}
    weights, biases = map(list, zip(*originals.values(), strict=True))
    if wish.format == nvfp4.FORMAT and choices[names[0]].treatment == "w4a4":
        return {name: _of_the_host(model, name, *both) for name, both in originals.items()}, {}
    # a span without a mean square was not measured, and is trusted less
    smooth = "none" if seen is None else "modulation" if seen.square is None else "search"
    specs = [spec_of(choices[name], wish, plan.shapes[name], smooth) for name in names]
    spec = with_spec(specs[0], rank=max(spec.rank for spec in specs))
    held_out = None
    if wish.guard_db and seen is not None:
        seen, held_out = _held_out(seen)
    if wish.gptq and seen is not None and seen.rows is not None and FORMATS[spec.format].weight_bits == 4:
        spec = with_spec(spec, gptq=True)
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


def _held_out(seen: Statistics) -> tuple[Statistics, Tensor | None]:
    """Statistics without the rows that the guard scores with, and those; all for both where there are only a few."""
    rows = seen.rows
    if rows is None or len(rows) < 4 * GUARD_ROWS:
        return seen, rows
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[:: len(rows) // GUARD_ROWS] = True
    return replace(seen, rows=rows[~held]), rows[held]


def _made_up(channels: int, after_gelu: bool, seen: Statistics | None) -> Tensor:
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
    return quantise_group([weight], [bias], _per_row("int8_convrot", weight.shape[1])).layer


def module_of(layer: QuantisedLinear, device: torch.device) -> W4A4Linear:
    module = W4A4Linear(layer).to(device)
    module.managed = True
    return module
