"""What a quantised layer owes a patcher: its original's parameters without any patch, and the patcher's LoRAs.

`host/quantise/quantise.py` tells why LoRAs are given when a load is over and not by the host's own patching.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import comfy.lora
import torch
from torch import Tensor

from ...quant.layer import Spec, quantise_group
from ...quant.linear import W4A4Linear
from ...quant.packed import QuantisedLinear

log = logging.getLogger("slipstream")

NODE = "W4A4 Quantize"
PREFIX = "diffusion_model."

# Part of an adapter's change that the low-rank branch may lose before the layer is quantised anew with it.
LOSS = 1e-2


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


def give_loras(patcher, *args, **kwargs) -> None:
    """ON_LOAD: every quantised layer of the loaded patcher gets what its patches say of it, and nothing else.

    Layers placed by object patches and those of a network loaded from a quantised file alike; what another patcher of
    the same network gave, its mark being another, goes.
    """
    lossy = {}
    for path, module in quantised_modules(patcher):
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


def quantised_modules(patcher) -> Iterator[tuple[str, W4A4Linear]]:
    """(path in the model, layer) of every quantised layer this patcher computes with when it is loaded."""
    placed = patcher.object_patches
    network = patcher.get_model_object("diffusion_model")
    for name, module in network.named_modules():
        if isinstance(module, W4A4Linear) and PREFIX + name not in placed:
            own = patcher.get_model_object(PREFIX + name)  # another patcher's layer may be in its place now
            if isinstance(own, W4A4Linear):
                yield PREFIX + name, own
    yield from ((path, module) for path, module in placed.items() if isinstance(module, W4A4Linear))


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
    """Quantise the patched original weight again, if that is nearer to it than the branch came; where the network is
    of a quantised file there is no original, and a layer in parts is not made anew."""
    own, like = patcher.object_patches_backup.get(path), module.layer(lora=False)
    if own is None or isinstance(own, W4A4Linear) or not isinstance(like, QuantisedLinear):
        return
    name, stored = path.removeprefix(PREFIX), module.layer(patcher.load_device)
    bias = original(patcher, name, own, "bias")
    true = comfy.lora.calculate_weight(patches, original(patcher, name, own).float().clone(), f"{path}.weight")
    if bias is not None and on_bias:
        bias = comfy.lora.calculate_weight(on_bias, bias.float().clone(), f"{path}.bias").to(bias.dtype)
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
