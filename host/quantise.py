"""Quantises a loaded MODEL on the canvas: its linear layers become `W4A4Linear`s by object patches of one clone.

What was tried in 0.3.75 and 0.33.0, with the same outcome, and decides how this is built; `tests/host/test_quantise.py`
shows each:

- An object patch alone loses a LoRA and breaks the next load. A clone shares `patches_uuid` with its original, so the
  host, asked for the clone while the original is loaded, exchanges the modules without unpatching or loading anything,
  and later puts the 16-bit backup of a patched weight into the quantised module, and the patched weight stays in the
  base model. With a uuid of its own, which `quantise` gives the clone, the host restores every weight before it
  exchanges the modules. That is the whole fault and the whole remedy; no injection is needed.
- Stock `patch_weight_to_device` with `W4A4Linear.set_weight` gives a LoRA's product to 6e-7 on layers that are loaded
  completely. Under partial load it does nothing: modules without `comfy_cast_weights`, which ours must not have because
  only the host's own layers may lie in its streams, are left where they are, unpatched. So LoRAs are given by an
  ON_LOAD callback, which every kind of load ends with, to every quantised layer, from the list `patches`: plain LoRAs
  as the factors of their file, other adapters as factors of what they change, or, where that is not of low rank, by
  quantising the patched original anew. LoRA nodes before and after this one are the same list, and a load with another
  list takes off what was there.
- The backups that the host makes of our unchanged weights are dropped then: modules with a backup are skipped when
  memory is to be freed.
- The dynamic loader puts its backups back after the object patches of the next clone are in place, so it would write
  codes into the network's own layers (read in 0.33.0, not run: it needs a card): a dynamic model is replaced by the
  host's non-dynamic copy of it.
- Weight hooks write floats into the parameter and cannot work; `W4A4Linear` refuses them in a sentence.
"""

from __future__ import annotations

import logging
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import comfy.lora
import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..quant import policy
from ..quant.calibration import Statistics
from ..quant.formats import FORMATS, GROUP_SIZE, QuantisedLinear
from ..quant.layer import METHODS, Spec, quantise_group, sqnr, with_spec
from ..quant.linear import W4A4Linear
from ..quant.policy import Choice
from ..quant.rotate import rotation_size
from . import profiles
from .errors import SlipstreamError

log = logging.getLogger("slipstream")

NODE = "W4A4 Quantize"
KEY = "slipstream_quantised"
PREFIX = "diffusion_model."
ACTIVATION = "activation/"  # of a layer's statistics in a profile
AUTO = "auto"
CHOICES = (AUTO, *FORMATS)
ACT_BITS = (4, 8, 16)

# Tokens of the made-up input that the quality guard measures a layer with: data-free, so a normal one.
GUARD_ROWS = 64

# Part of an adapter's change that the low-rank branch may lose before the layer is quantised anew with it.
LOSS = 1e-2

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class QuantWish:
    """What the node asks for.

    format: "auto" (rotated groups with a low-rank branch, the best without data) or a key of FORMATS, for the layers
    that the policy gives 4 bit; rank: of the branch, 0 to 128; layers: lines `part of a layer name = treatment`, see
    `policy.parse_overrides`; act_bits: 4, 8 or 16, of "auto" and "svdquant_w4a4"; guard_db: layers below this signal
    to noise on a made-up input get 8 or 16 bit, 0 leaves all; profile: a calibration's file with activation statistics,
    from whose ranges every layer's smooth factor is made, "" for none.
    """

    format: str = AUTO
    rank: int = 32
    layers: str = ""
    act_bits: int = 4
    guard_db: float = 0.0
    profile: str = ""


class Quantised:
    """The quantised layers of one network for one wish, by their path below `diffusion_model`.

    layers: what is placed; choices: what the policy and the guard decided for every linear layer of the network. Lives
    as long as a patcher or one of its layers does: a network that is loaded with them holds them, nothing else.
    """

    def __init__(self, layers: Mapping[str, W4A4Linear], choices: Mapping[str, Choice]) -> None:
        self.layers, self.choices = dict(layers), dict(choices)
        for layer in self.layers.values():
            layer.made = self

    def __deepcopy__(self, memo: dict) -> Quantised:
        return self  # a copy of one layer is not to copy them all


# What was quantised already: network -> wish -> Quantised; an entry goes with the last patcher that holds it.
_MADE: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakValueDictionary[tuple[QuantWish, float], Quantised]]
_MADE = weakref.WeakKeyDictionary()


def quantised(model) -> Quantised | None:
    """What `quantise` put on this ModelPatcher or one it was cloned from, or None."""
    return model.get_attachment(KEY)


def quantise(model, wish: QuantWish = QuantWish(), progress: Progress | None = None):
    """A clone of the ModelPatcher whose linear layers are quantised; the model given is left as it was.

    progress: called with (layers done, layers in all) after every layer. LoRAs on the model, or added to the clone
    later, go on top of the quantised original weights. The same model and wish again, while the result of the first
    time is in use, costs nothing. Raises SlipstreamError, and the host's own exception when the user cancels.
    """
    _check(wish)
    if quantised(model) is not None:
        raise SlipstreamError(f"{NODE}: this model already went through a {NODE}; remove one of the two.")
    model = _static(model)
    made = _MADE.setdefault(model.model, weakref.WeakValueDictionary())
    seen = _seen(model, wish.profile)
    key = (wish, _content(seen))  # a profile of this name may be another one by now
    found = made.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = _quantised_layers(model, wish, seen, progress)
        made[key] = found
    clone = model.clone()
    saved = 0
    for name, layer in found.layers.items():
        replaced = model.get_model_object(PREFIX + name)
        saved += comfy.model_management.module_size(replaced) - comfy.model_management.module_size(layer)
        clone.add_object_patch(PREFIX + name, layer)
    # the host measures the network as it is loaded now, which may be without these layers
    clone.size = model.model_size() - saved
    clone.patches_uuid = uuid.uuid4()  # or the host would take what is loaded now for this clone's weights
    clone.set_attachments(KEY, found)
    clone.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, give_loras)
    return clone


def _check(wish: QuantWish) -> None:
    if wish.format not in CHOICES:
        raise SlipstreamError(f"{NODE}: there is no format '{wish.format}'; choose one of {', '.join(CHOICES)}.")
    if wish.act_bits not in ACT_BITS:
        raise SlipstreamError(f"{NODE}: activations of {wish.act_bits} bit are not known; choose 4, 8 or 16.")
    if not 0 <= wish.rank <= 128:
        raise SlipstreamError(f"{NODE}: rank is {wish.rank}, but it must be between 0 (no branch) and 128; try 32.")
    if not 0 <= wish.guard_db <= 100:
        raise SlipstreamError(f"{NODE}: guard_db is {wish.guard_db}, but it must be between 0 (off) and 100; try 15.")


def _static(model):
    """The model itself, or the host's non-dynamic copy of it, with the patches of this one."""
    if not getattr(model, "is_dynamic", bool)():
        return model
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError:
        raise SlipstreamError(
            f"{NODE}: this model's loader gives no copy for a static load; load it with one of the host's own loaders, "
            "or start the host with --disable-dynamic-vram."
        ) from None


def _linears(model) -> dict[str, torch.nn.Module]:
    """The network's own linear layers by path, also while another patcher's layers are in their places."""
    network = model.get_model_object("diffusion_model")
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = model.get_model_object(PREFIX + name)
    return {name: module for name, module in found.items() if getattr(module, "weight", None) is not None}


def _seen(model, name: str) -> dict[str, Statistics]:
    """Activation statistics by layer from a profile; empty without one. Raises SlipstreamError."""
    if not name:
        return {}
    profile = profiles.load(name, NODE)
    layers = {key.split("/")[1] for key in profile.extras if key.startswith(ACTIVATION)}
    if not layers:
        raise SlipstreamError(
            f"{NODE}: the profile {name} holds no activation statistics; calibrate again with activation_statistics on."
        )
    if profile.model and profile.model != profiles.fingerprint(model):
        log.warning("%s: the profile %s was measured on another model; calibrate again for the best result", NODE, name)
    tables = profile.extras
    return {
        layer: Statistics(tables[f"{ACTIVATION}{layer}/absmax"], tables[f"{ACTIVATION}{layer}/square"])
        for layer in sorted(layers)
    }


def _content(seen: Mapping[str, Statistics]) -> float:
    """A number that two sets of statistics hardly share."""
    return float(sum(s.square.double().sum() + s.absmax.double().sum() for s in seen.values()))


def _quantised_layers(model, wish: QuantWish, seen: Mapping[str, Statistics], progress: Progress | None) -> Quantised:
    network, linears = model.get_model_object("diffusion_model"), _linears(model)
    classes = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(network).__mro__]
    shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
    try:
        choices = policy.plan(shapes, policy.policy_for(classes), wish.layers, policy.LIMITS)
    except ValueError as error:
        raise SlipstreamError(f"{NODE}: {error}") from None
    specs = {
        name: spec for name, choice in choices.items() if (spec := _spec(choice, wish, shapes[name], name in seen))
    }
    for name in specs:
        _refuse_quantised(name, linears[name])
    if not specs:
        kind = type(model.model).__name__
        raise SlipstreamError(
            f"{NODE}: this model ({kind}) has no linear layer that can be quantised among its {len(shapes)}; connect a "
            "larger model, or name layers in 'layers'."
        )
    groups: dict[str, list[str]] = {}
    for name in specs:
        groups.setdefault(choices[name].group, []).append(name)
    _make_room(model, linears, groups)
    layers: dict[str, W4A4Linear] = {}
    done = 0
    for names in groups.values():
        comfy.model_management.throw_exception_if_processing_interrupted()
        layers.update(_group(model, names, linears, specs, choices, wish, seen.get(names[0])))
        done += len(names)
        if progress is not None:
            progress(done, len(specs))
    return Quantised(layers, choices)


def _spec(choice: Choice, wish: QuantWish, shape: tuple[int, int], seen: bool = False) -> Spec | None:
    """How a layer of shape (N, K) is quantised; None: it stays. A width that 4-bit groups do not fit gets 8 bit. seen:
    the ranges of its input are known."""
    n, k = shape
    if choice.treatment == "keep" or not rotation_size(k):
        return None
    careful = choice.treatment == "w4a16"
    if choice.treatment == "w8a8" or wish.format == "int8_convrot" or k % GROUP_SIZE:
        return _per_row("int8_convrot", k)
    if wish.format == "convrot_w4a4":
        return _per_row("int8_convrot" if careful else "convrot", k)  # of the host's formats the finer one
    bits = 16 if careful else wish.act_bits if wish.format in (AUTO, "svdquant_w4a4") else FORMATS[wish.format].act_bits
    name = {4: "svdquant_w4a4", 8: "w4a8", 16: "w4a16"}[bits]
    rotated = wish.format == AUTO and not choice.after_gelu
    base = METHODS["hadamard_svd"] if rotated else METHODS["svdquant"]
    smooth = "search" if seen else "none"
    unsigned = choice.after_gelu and not rotated
    return with_spec(base, format=name, rank=min(wish.rank, n, k), smooth=smooth, act_unsigned=unsigned)


def _per_row(method: str, k: int) -> Spec:
    """The method with a group size that divides K, which its scales per row do not depend on."""
    return with_spec(METHODS[method], group_size=rotation_size(k))


def _refuse_quantised(name: str, module: torch.nn.Module) -> None:
    weight = module.weight
    plain = type(weight) in (Tensor, torch.nn.Parameter) and type(weight.data) is Tensor
    if isinstance(module, W4A4Linear) or not plain or not weight.is_floating_point():
        kind = type(weight).__name__ if not plain else str(weight.dtype).removeprefix("torch.")
        raise SlipstreamError(
            f"{NODE}: the layer {name} of this model is quantised already ({kind}); load its 16-bit or fp8 file."
        )


def _make_room(model, linears: Mapping[str, torch.nn.Module], groups: Mapping[str, list[str]]) -> None:
    """Ask the host for the memory that the largest group takes: float32 weight, smoothed, residual, codes, SVD."""
    if model.load_device.type != "cpu":
        largest = max(sum(linears[name].weight.numel() for name in names) for names in groups.values())
        comfy.model_management.free_memory(6 * 4 * largest, model.load_device)


def original(model, name: str, module: torch.nn.Module, part: str = "weight") -> Tensor | None:
    """A parameter of a layer as it is without any patch, on the model's load device; scaled fp8 scaled up."""
    key = f"{PREFIX}{name}.{part}"
    tensor = getattr(module, part)
    if tensor is None:
        return None
    try:
        in_place = model.model.get_submodule(PREFIX + name) is module
    except AttributeError:
        in_place = False
    # a backup is of the module that is in its place now
    if in_place and key in model.hook_backup:
        tensor = model.hook_backup[key][0]
    elif in_place and key in model.backup:
        tensor = model.backup[key].weight
    tensor = tensor.detach().to(model.load_device)
    convert = getattr(module, f"convert_{part}", None)
    if convert is not None:
        return convert(tensor.to(torch.float32, copy=True), inplace=True)
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _group(
    model,
    names: list[str],
    linears: Mapping[str, torch.nn.Module],
    specs: Mapping[str, Spec],
    choices: dict[str, Choice],
    wish: QuantWish,
    seen: Statistics | None,
) -> dict[str, W4A4Linear]:
    """Quantise the layers of one group; the guard's changes are noted in `choices`."""
    weights = [original(model, name, linears[name]) for name in names]
    # a bias may go into the new layer as it is, and is not to share its memory with the base model's
    biases = [None if (b := original(model, name, linears[name], "bias")) is None else b.clone() for name in names]
    spec = with_spec(specs[names[0]], rank=max(specs[name].rank for name in names))
    try:
        found = dict(zip(names, quantise_group(weights, biases, spec, seen).layers, strict=True))
        if wish.guard_db:
            _guard(found, dict(zip(names, zip(weights, biases, strict=True), strict=True)), choices, wish.guard_db)
    except ValueError as error:
        raise SlipstreamError(f"{NODE}: {names[0]}: {error}; use a file without damage.") from None
    return {name: _module(layer, model.offload_device) for name, layer in found.items()}


def _guard(
    found: dict[str, QuantisedLinear],
    originals: Mapping[str, tuple[Tensor, Tensor | None]],
    choices: dict[str, Choice],
    floor_db: float,
) -> None:
    """Replace layers whose output on normally distributed input is worse than the floor, or take them out."""
    values = {}
    for name, layer in found.items():
        weight, bias = originals[name]
        rows = torch.randn(GUARD_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
        rows = torch.nn.functional.gelu(rows) if choices[name].after_gelu else rows
        if FORMATS[layer.format].weight_bits == 4:
            values[name] = sqnr(weight, layer, rows, bias)
    reasons = policy.protection_reasons(values, None, floor_db)
    for name, treatment in policy.protect(values, None, floor_db).items():
        choices[name] = replace(choices[name], treatment=treatment, why=reasons[name])
        del found[name]
        if treatment == "w8a8":
            weight, bias = originals[name]
            found[name] = quantise_group([weight], [bias], _per_row("int8_convrot", weight.shape[1])).layer


def _module(layer: QuantisedLinear, device: torch.device) -> W4A4Linear:
    module = W4A4Linear(layer).to(device)
    module.managed = True
    return module


def give_loras(patcher, *args, **kwargs) -> None:
    """ON_LOAD: every quantised layer of the patcher gets what the patcher's patches say of it, and nothing else."""
    lossy = {}
    for path, module in patcher.object_patches.items():
        if not isinstance(module, W4A4Linear):
            continue
        for part in ("weight", "bias"):
            patcher.backup.pop(f"{path}.{part}", None)  # of what `set_weight` left as it was
        if module.lora_of != patcher.patches_uuid:
            _give(patcher, path, module)
            if module.lora_error > LOSS:
                lossy[path] = module.lora_error
    if lossy:
        log.warning(
            "%s: an adapter on %d quantised layers is no plain LoRA; up to %.0f%% of its change of %s is lost",
            NODE, len(lossy), 100 * max(lossy.values()), max(lossy, key=lossy.get),
        )  # fmt: skip


def _give(patcher, path: str, module: W4A4Linear) -> None:
    patches = patcher.patches.get(f"{path}.weight", [])
    on_bias = patcher.patches.get(f"{path}.bias", [])
    mark, bias = patcher.patches_uuid, None
    with torch.inference_mode(False), torch.no_grad():
        if on_bias and module.bias is not None:
            stored = module.bias.detach().float()
            bias = comfy.lora.calculate_weight(on_bias, stored.clone(), f"{path}.bias") - stored
        parts = [_factors(patch, module) for patch in patches]
        if all(part is not None for part in parts):
            parts = [part for part in parts if part[0].shape[1]]
            down = torch.cat([part[0] for part in parts], 1) if parts else None
            up = torch.cat([part[1] for part in parts], 1) if parts else None
            module.set_lora(down, up, bias, mark)
            return
        weight = module.convert_weight(module.weight.to(patcher.load_device))
        patched = comfy.lora.calculate_weight(patches, weight.clone(), f"{path}.weight")
        if patched.shape != weight.shape:
            log.warning("%s: an adapter changes the shape of %s, which is quantised; it is left out", NODE, path)
            patched = weight
        module.set_change(patched - weight, bias, mark)
        if module.lora_error > LOSS:
            _anew(patcher, path, module, patches, on_bias)


def _anew(patcher, path: str, module: W4A4Linear, patches: list, on_bias: list) -> None:
    """Quantise the patched original weight again, if that is nearer to it than the branch came."""
    own = patcher.object_patches_backup.get(path)
    if own is None:
        return
    name, stored = path.removeprefix(PREFIX), module.layer(patcher.load_device)
    bias = original(patcher, name, own, "bias")
    true = comfy.lora.calculate_weight(patches, original(patcher, name, own).float().clone(), f"{path}.weight")
    if bias is not None and on_bias:
        bias = comfy.lora.calculate_weight(on_bias, bias.float().clone(), f"{path}.bias").to(bias.dtype)
    like = module.layer(lora=False)
    spec = Spec(
        like.format,
        like.rank,
        like.rotation,
        like.group_size,
        smooth="none",
        act_unsigned=like.act_unsigned,
        storage=None if like.smooth is None else like.smooth.dtype,
    )
    found = quantise_group([true], [bias], spec).layer
    found = replace(found, dtype=module.original_dtype)
    if float((found.dequantise() - true).norm()) < float((stored.dequantise() - true).norm()):
        device, mark = module.weight.device, module.lora_of
        module.set_whole(W4A4Linear(found).to(device).layer(), mark)


def _factors(patch: tuple, module: W4A4Linear) -> tuple[Tensor, Tensor] | None:
    """down (K, r) and up (N, r) of one of the host's patches, strength included, float32 on the module's device; of
    strength 0 with r = 0. None where the patch is more than a product of two matrices on a part of the layer."""
    strength, adapter, strength_model, offset, function = patch
    if getattr(adapter, "name", None) != "lora" or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, *others = adapter.weights
    if any(other is not None for other in others):
        return None
    n, k = module.out_features, module.in_features
    device = module.weight.device
    up, down = up.flatten(1).to(device, torch.float32), down.flatten(1).to(device, torch.float32)
    rank = down.shape[0]
    rows, columns = (offset[2] if offset and offset[0] == axis else size for axis, size in ((0, n), (1, k)))
    if tuple(up.shape) != (rows, rank) or tuple(down.shape) != (rank, columns):
        return None
    scale = strength * (1.0 if alpha is None else alpha / rank)
    if not scale:
        return up.new_zeros(k, 0), up.new_zeros(n, 0)
    up, down = up * scale, down.T
    if offset is not None:
        axis, start, length = offset
        whole = up.new_zeros((n, k)[axis], rank)
        whole[start : start + length] = (up, down)[axis]
        up, down = (whole, down) if axis == 0 else (up, whole)
    return down, up
