"""Save Quantized Model and Quantize Model File: quantised models written to the host's diffusion_models folder.

What is written is what the host's own loader reads: the network's tensors under their own names without a prefix (which
`load_diffusion_model` finds in every family, and process_unet_state_dict of both hosts leaves alone), quantised layers
as `QuantisedLinear.state_dict` has them, and the host's list of them in the metadata. A file whose layers are all of
formats that the host registers (convrot_w4a4, int8_tensorwise) is read by its stock loader; others by ours.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import folder_paths
import psutil
import torch
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...engine.files import is_file_name
from ...kernels.files import left_over
from ...quant.files import Writer, quantisation
from ...quant.formats import LONGEST
from ...quant.layer import quantise_group, spec_for
from ...quant.linear import TENSORS, W4A4Linear
from ...quant.packed import QuantisedLinear, QuantisedSplit
from ..model_files import FOLDER
from . import nvfp4
from .choose import FIRST_RUN, QuantWish, most_bytes, planned
from .load import opened
from .loras import NODE, PREFIX, original, quantised_modules
from .make import quantised_group, without_data
from .quantise import check_wish, quantised, ranges_of, settled
from .source import FILE, FileModel
from .teller import Progress

log = logging.getLogger("slipstream")

SAVE = "Save Quantized Model"

# Left free on the disk beside the file.
SPARE = 64 << 20


def save(model, name: str, progress: Progress | None = None) -> tuple[str, str]:
    """Write a quantised model, its LoRAs included; returns the file's name in the list and a line about it.

    LoRAs of 16-bit layers are merged as the host merges them, those of layers with a low-rank branch become part of it;
    a layer of a format without one is quantised anew with its LoRA. progress: called with (tensors done, in all).
    One tensor at a time is copied. Raises SlipstreamError, and the host's own exception when the user cancels.
    """
    file, path = target(name, SAVE)
    try:
        model = settled(model)
    except SlipstreamError:
        raise SlipstreamError(
            f"{SAVE}: this model is quantised when it is first sampled; run a sampler with it, then save it."
        ) from None
    if not dict(quantised_modules(model)) and not _of_the_host(model):
        raise SlipstreamError(f"{SAVE}: this model has no quantised layer; connect it behind a W4A4 Quantize.")
    # what is written is what is sampled with: the host puts every patch in its place
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    with torch.inference_mode(False), torch.no_grad():
        packed = {path.removeprefix(PREFIX): module for path, module in quantised_modules(model)}
        hosts = _of_the_host(model)
        plain = _plain(model, packed.keys() | hosts.keys())
        for layer, module in hosts.items():
            plain |= {key: (tensor, torch.detach) for key, tensor in module.state_dict(prefix=f"{layer}.").items()}
        merged = [name for name, module in packed.items() if _homeless(module.layer())]
        size = sum(module_bytes(module) for module in packed.values()) + sum(_bytes(t) for t, _ in plain.values())
        keys = [*plain, *(key for layer, module in packed.items() for key in packed_names(layer, module))]
        descriptions = {layer: _final(module.layer()).description() for layer, module in packed.items()}
        metadata = quantisation(descriptions) | _config(model)
        done, total = 0, len(plain) + len(packed)
        with writing(path, keys, metadata, size, SAVE) as out:
            for key, (tensor, read) in plain.items():
                out.add(key, read(tensor))
                done = step(done, total, progress)
            for layer, module in packed.items():
                for key, tensor in _stored(model, layer, module).state_dict(layer).items():
                    out.add(key, tensor)
                done = step(done, total, progress)
    if merged:
        log.warning(
            "%s: %s has no place for a LoRA in the format of %d layers; they were quantised again with it, so the "
            "picture changes a little",
            SAVE, file, len(merged),
        )  # fmt: skip
    return listed(file, path, len(packed) + len(hosts))


def quantise_file(source: str, name: str, wish: QuantWish, progress: Progress | None = None) -> tuple[str, str]:
    """Quantise a file of diffusion_models into another; returns the new file's name in the list and a line about it.

    The same as loading it, `quantise` and `save`, with one group of layers in memory at a time. progress: called with
    (layers done, layers in all). Raises SlipstreamError, and the host's own exception when the user cancels.
    """
    file, path = target(name, FILE)
    with _named():
        check_wish(wish)
        if wish.calibration == FIRST_RUN:
            raise SlipstreamError(
                f"{FILE}: a file is never sampled, so there is no first run; choose none or a profile as calibration."
            )
        opened_file = opened(source, FILE)
        try:
            with torch.inference_mode(False), torch.no_grad():
                layers = _group_by_group(FileModel(opened_file, source), wish, path, progress)
        finally:
            opened_file.close()
    return listed(file, path, layers)


def _group_by_group(of: FileModel, wish: QuantWish, path: Path, progress: Progress | None) -> int:
    """Write everything; returns how many layers are quantised."""
    plan = planned(of.model, wish)
    seen = ranges_of(of.model, wish.calibration) or without_data(of.model)
    choices, found, done = dict(plan.choices), {}, 0
    names = {name for group in plan.groups.values() for name in group}
    plain = [key for key in of.keys if key.rpartition(".")[0] not in names]
    size = sum(map(of.nbytes, plain)) + sum(most_bytes(plan.choices[name], wish, plan.shapes[name]) for name in names)
    # the guard may leave a layer as it is, so both kinds of names get room
    keys = [*of.keys, *(f"{name}.{end}" for name in names for end in (*TENSORS, *nvfp4.TENSORS))]
    room = of.metadata | quantisation(dict.fromkeys(names, LONGEST))
    with writing(path, keys, room, size, FILE) as out:
        for key in plain:
            comfy.model_management.throw_exception_if_processing_interrupted()
            out.add(key, of.tensor(key))
        for group in plan.groups.values():
            layers = quantised_group(of.model, group, plan, choices, wish, seen.get(group[0]))[0]
            for name in group:
                if name in layers:
                    tensors = _tensors(name, layers[name], found)
                else:
                    own = (f"{name}.weight", f"{name}.bias")
                    tensors = {key: of.tensor(key) for key in own if key in of.keys}
                for key, tensor in tensors.items():
                    out.add(key, tensor)
            layers = tensors = None
            done = step(done + len(group) - 1, len(names), progress)
        out.metadata = of.metadata | quantisation(found)
    return sum(name in found or choices[name].treatment != "keep" for name in names)


def _tensors(name: str, module: torch.nn.Module, described: dict[str, dict]) -> dict[str, Tensor]:
    """What is written of a layer; of ours also what the file's metadata says."""
    if not isinstance(module, W4A4Linear):
        return module.state_dict(prefix=f"{name}.")
    layer = module.layer()
    described[name] = layer.description()
    return layer.state_dict(name)


@contextmanager
def _named() -> Iterator[None]:
    """What is said in the name of the node for loaded models is said in this one's."""
    try:
        yield
    except SlipstreamError as error:
        raise SlipstreamError(str(error).replace(f"{NODE}:", f"{FILE}:", 1)) from error


def target(name: str, node: str) -> tuple[str, Path]:
    """(name in the list, path) of a file to be written. Raises SlipstreamError for a name that leads out of the folder
    or is none."""
    parts = re.split(r"[/\\]", name)
    if not all(is_file_name(part) and not part.endswith((" ", ".")) for part in parts):
        raise SlipstreamError(
            f"{node}: '{name}' is no file name; use letters, digits, spaces, dots, dashes and underscores, and / for a "
            "subfolder."
        )
    file = os.path.join(*parts)
    file = file if file.endswith(".safetensors") else f"{file}.safetensors"
    folders = folder_paths.get_folder_paths(FOLDER)
    # the host keeps the old name of the folder, unet, before the new one
    folder = next((found for found in folders if os.path.basename(os.path.normpath(found)) == FOLDER), folders[0])
    return file, Path(folder) / file


@contextmanager
def writing(path: Path, names, metadata: Mapping[str, str], size: int, node: str) -> Iterator[Writer]:
    """A `Writer` for a file of about `size` bytes; what the disk says becomes a sentence."""
    try:
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < size + SPARE:
            raise SlipstreamError(
                f"{node}: {path.name} takes {size / 1e6:.0f} MB and the disk of models/{FOLDER} has {free / 1e6:.0f} "
                "MB left; make room, or choose a smaller format."
            )
        for old in left_over(path, psutil.pid_exists):
            old.unlink(missing_ok=True)
        with Writer(path, names, metadata) as out:
            yield out
    except OSError as error:
        raise SlipstreamError(
            f"{node}: {path.name} could not be written ({error.strerror or error}); check room and rights of "
            f"models/{FOLDER}."
        ) from error


def listed(file: str, path: Path, layers: int) -> tuple[str, str]:
    """Let the host's list know of a new file; its name there and a line about it."""
    # the host lists a folder anew when its time changes, and two changes within one clock tick look like one
    folder_paths.filename_list_cache.pop(FOLDER, None)
    text = f"{file}: {layers} quantised layers, {path.stat().st_size / 1e6:.1f} MB"
    log.info("%s", text)
    return file, text


def step(done: int, total: int, progress: Progress | None) -> int:
    """One more is done: raises the host's exception when the user cancels."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    if progress is not None:
        progress(done + 1, total)
    return done + 1


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def module_bytes(module: W4A4Linear) -> int:
    """Bytes of a layer with its LoRA, as it is written."""
    return _final(module.layer()).nbytes


def packed_names(layer: str, module: W4A4Linear) -> list[str]:
    """Every name that a layer may have tensors under, for the header's room."""
    stored = module.layer()
    parts = [layer]
    if isinstance(stored, QuantisedSplit):
        parts += [f"{layer}.part{i}" for i in range(len(stored.parts))]
    return [f"{part}.{name}" for part in parts for name in (*TENSORS, "comfy_quant")]


# What is there


def _of_the_host(model) -> dict[str, torch.nn.Module]:
    """The layers that W4A4 Quantize made in a format of the host's own, by path below `diffusion_model`."""
    found = quantised(model)
    layers = {} if found is None else found.layers
    return {name: layer for name, layer in layers.items() if not isinstance(layer, W4A4Linear)}


def _plain(model, packed: Collection[str]) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Key in the file -> (tensor as the network holds it, how it becomes what is written), of all but packed layers."""
    network = model.model.diffusion_model
    state = network.state_dict()
    found = {}
    own = set(packed)
    for path, module in network.named_modules():
        convert = getattr(module, "convert_weight", None)
        if path in own or convert is None or getattr(module, "weight", None) is None:
            continue
        if module.weight.dtype.itemsize == 1 or type(module.weight.data) is not Tensor:
            own.add(path)  # scaled fp8 and the host's other formats: written in 16 bit
            found[f"{path}.weight"] = (module.weight, _Converted(convert, _sixteen(model)))
            if module.bias is not None:
                found[f"{path}.bias"] = (module.bias, torch.detach)
    for key, tensor in state.items():
        if key.rpartition(".")[0] not in own:
            found[key] = (tensor, torch.detach)
    return found | {key: (tensor, torch.detach) for key, tensor in _marks(model).items()}


class _Converted:
    """A scaled weight scaled up."""

    def __init__(self, convert: Callable[..., Tensor], dtype: torch.dtype) -> None:
        self.convert, self.dtype = convert, dtype

    def __call__(self, weight: Tensor) -> Tensor:
        plain = type(weight.data) is Tensor
        weight = weight.detach().to(torch.float32, copy=True) if plain else weight.detach()
        return self.convert(weight, inplace=True).to(self.dtype)


def _sixteen(model) -> torch.dtype:
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def _marks(model) -> dict[str, Tensor]:
    """What a family keeps beside its network, and empty tensors that tell the host how to sample it."""
    base = model.model
    # an older host puts the network's own tensors between
    arguments = {"unet_state_dict": {}} if "unet_state_dict" in _names(base.state_dict_for_saving) else {}
    prefixes = tuple(base.model_config.process_unet_state_dict_for_saving({"": None}))
    found = base.state_dict_for_saving(**arguments)
    marks = {key: t for key, t in found.items() if isinstance(t, Tensor) and not key.startswith(prefixes)}
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        if isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
            marks["edm_vpred.sigma_max"] = torch.as_tensor(sampling.sigma_max).float()
            marks["edm_vpred.sigma_min"] = torch.as_tensor(sampling.sigma_min).float()
        elif getattr(sampling, "zsnr", False):
            marks["ztsnr"] = torch.zeros(0)
    return {key: tensor for key, tensor in marks.items() if key != "scaled_fp8"}


def _names(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _config(model) -> dict[str, str]:
    """The metadata that the host reads LTX's sizes from, which it keeps nowhere else."""
    config = model.model.model_config.unet_config
    if not str(config.get("image_model", "")).startswith("ltx"):
        return {}
    plain = {
        key: value for key, value in config.items() if isinstance(value, (bool, int, float, str, list, type(None)))
    }
    return {"config": json.dumps({"transformer": plain})}


# Layers with a LoRA


def _final(layer: QuantisedLinear | QuantisedSplit) -> QuantisedLinear | QuantisedSplit:
    """The layer as it will be written: without a branch that its format has no place for."""
    return replace(layer, proj_down=None, proj_up=None) if _homeless(layer) else layer


def _homeless(layer: QuantisedLinear | QuantisedSplit) -> bool:
    return isinstance(layer, QuantisedLinear) and layer.homeless_branch


def _stored(model, name: str, module: W4A4Linear) -> QuantisedLinear | QuantisedSplit:
    layer = module.layer()
    if not _homeless(layer):
        return layer
    path = PREFIX + name
    own = model.object_patches_backup.get(path)
    if own is None:
        true = module.layer(model.load_device).dequantise()
    else:
        weight = original(model, name, own).float().clone()
        true = comfy.lora.calculate_weight(model.patches.get(f"{path}.weight", []), weight, f"{path}.weight")
    bias = None if layer.bias is None else layer.bias.to(true.device)
    return replace(quantise_group([true], [bias], spec_for(layer.format, layer.shape)).layer, dtype=layer.dtype)
