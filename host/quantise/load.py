"""Load Quantized Model: a file with packed layers becomes a model of the host without its 16-bit weights ever existing.

The host detects a model by the shapes of its weights, so it gets, for every packed layer, a tensor of the original
shape and dtype that holds one number (stride 0). Its linear layers are made by operations of ours, on the meta device;
when the host loads the state dict into them, a stand-in is known again by its identity, which no renaming of keys on
the way changes, and the packed layer takes the linear's place. Nothing of this depends on a host's version: 0.3.75 and
0.33.0 are tested.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...quant import nunchaku
from ...quant.files import QUANTISATION, Described, File
from ...quant.formats import GROUPS
from ...quant.linear import W4A4Linear
from ...quant.packed import QuantisedLinear, QuantisedSplit, read_layer
from ..model_files import listed, path_of
from ..parts import QUANTISED
from .choose import classified
from .kernels import keep_choices
from .loras import give_loras
from .placed import share_inputs

log = logging.getLogger("slipstream")

NODE = "Load Quantized Model"
ENDINGS = (".safetensors", ".sft")

# Layers of the host's operations that are made without memory.
LATE = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "Embedding")


def names() -> list[str]:
    """The safetensors files of the host's diffusion_models folders, for a list on the canvas."""
    return listed(*ENDINGS)


def opened(name: str, node: str) -> File:
    """A file by its name in the list, to be closed. Raises SlipstreamError."""
    path = path_of(name, node)
    if not name.lower().endswith(ENDINGS):
        kind = "a GGUF file; load it with the loader of ComfyUI-GGUF" if name.endswith(".gguf") else "no safetensors"
        raise SlipstreamError(f"{node}: {name} is {kind}, or choose a safetensors file.")
    try:
        return File(path)
    except ValueError as error:
        raise SlipstreamError(f"{node}: {name} cannot be loaded, {error}; download or save it again.") from None


def load(name: str):
    """The model of a quantised file of diffusion_models, as the host's own loader would give a 16-bit one.

    Files of Save Quantized Model, of other writers of comfy-kitchen's formats, and nunchaku's INT4 FLUX.1. Raises
    SlipstreamError.
    """
    file = opened(name, NODE)
    try:
        with torch.inference_mode(False), torch.no_grad():
            plain, layers = _nunchaku(file) if _is_nunchaku(file) else _packed(file)
            if not layers:
                raise SlipstreamError(
                    f"{NODE}: {name} is not quantised in 4 bit or int8 with rotation; load it with Load Diffusion "
                    "Model, or quantise it with Quantize Model File."
                )
            metadata = {key: text for key, text in file.metadata.items() if key != QUANTISATION}
            outlines = {
                f"{layer}.weight": ((module.out_features, module.in_features), module.original_dtype)
                for layer, module in layers.items()
            }
            found = build(plain, outlines, {} if _is_nunchaku(file) else metadata, NODE, name)
    except SlipstreamError:
        raise
    except ValueError as error:
        raise SlipstreamError(f"{NODE}: {name}: {str(error).rstrip('.')}; download or save it again.") from None
    finally:
        file.close()
    placed = {}
    for path, key in found.places.items():
        module = layers.pop(key.removesuffix(".weight"))
        module.managed = True
        placed[path.removesuffix(".weight")] = module.to(found.model.offload_device)
        found.place(path.removesuffix(".weight"), module)
    if layers:
        raise SlipstreamError(
            f"{NODE}: {name}: this host has no place for the layer {next(iter(layers))}; update ComfyUI, or load a "
            "file of another model."
        )
    model = found.model
    share_inputs(placed, classified(model))
    keep_choices()
    model.size = 0  # to be measured anew, with the packed layers
    model.add_callback_with_key(CallbacksMP.ON_LOAD, QUANTISED, give_loras)
    model.cached_patcher_init = (load, (name,))  # how newer hosts make a copy for another card
    return model


def _packed(file: File) -> tuple[dict[str, Tensor], dict[str, W4A4Linear]]:
    """(the plain tensors, the quantised layers) of a file in the host's or comfy-kitchen's layout."""
    tensors = Described(file, file.metadata)
    own: dict[str, list[str]] = {name: [] for name in tensors.layers}
    plain = {}
    for key in tensors:
        owner = key.rpartition(".")[0]
        owner = owner if owner in own else owner.rpartition(".")[0]
        if owner in own:
            own[owner].append(key)
        else:
            plain[key] = tensors[key]
    layers = {}
    for name, keys in own.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            # copies: the file is to be free again when it is loaded
            layers[name] = W4A4Linear(read_layer(name, {key: tensors[key].clone() for key in keys}))
        except ValueError as error:
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from None
        if layers[name].bias is not None:
            plain[f"{name}.bias"] = layers[name].bias.detach()
    return plain, layers


def _is_nunchaku(file: File) -> bool:
    return any(key.endswith(".qweight") for key in file)


def _nunchaku(file: File) -> tuple[dict[str, Tensor], dict[str, W4A4Linear]]:
    layers = {}
    for name, parts in nunchaku.w4a4_layers(file):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found = tuple(natural(part) for part in parts)
        layers[name] = W4A4Linear(found[0] if len(found) == 1 else QuantisedSplit(found))
    plain = dict(nunchaku.plain_weights(file))
    for name, module in layers.items():
        plain[f"{name}.bias"] = module.bias.detach()
    return plain, layers


def natural(layer: nunchaku.NunchakuLayer) -> QuantisedLinear:
    """A layer of nunchaku as one of ours, with the same numbers."""
    return QuantisedLinear(
        GROUPS.name,
        tuple(layer.codes.shape),
        layer.scales.dtype,
        GROUPS.pack(layer.codes),
        layer.scales.contiguous(),
        layer.down.contiguous(),
        layer.up.contiguous(),
        layer.smooth.contiguous(),
        layer.bias.contiguous(),
        act_unsigned=layer.unsigned,
    )


# The network


@dataclass
class Built:
    """A model of the host with some weights left out.

    places: path of a parameter below `diffusion_model` that is on the meta device -> its key in the file.
    """

    model: object
    places: dict[str, str]

    def place(self, path: str, module: torch.nn.Module) -> None:
        """Put a module in the place of the layer at this path. Raises ValueError where the sizes differ."""
        parent, _, child = path.rpartition(".")
        network = self.model.model.diffusion_model
        there = network.get_submodule(path)
        sizes = (there.out_features, there.in_features), (module.out_features, module.in_features)
        if sizes[0] != sizes[1]:
            raise ValueError(f"{path} is {sizes[1]} in the file and {sizes[0]} in the model")
        setattr(network.get_submodule(parent), child, module)


@dataclass
class _Book:
    """What the late layers of one network note down. keys: of the stand-ins by their identity; as_filed: tensors keep
    the file's dtype instead of the one that the host computes in."""

    keys: dict[int, str]
    as_filed: bool = False
    places: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


class Weightless:
    """Mixed into a layer with parameters on the meta device, which stay there when the network is moved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        return super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)


class _Late(Weightless):
    """Mixed into a layer of the host's operations: on the meta device until it is loaded, and longer for a stand-in."""

    book: _Book

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "device": "meta"})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        self.book.missing = missing_keys  # one list for the whole network
        for name, parameter in list(self._parameters.items()):
            if parameter is None:
                continue
            key = f"{prefix}{name}"
            value = state_dict.get(key)
            if value is None:
                missing_keys.append(key)
            elif value.shape != parameter.shape:
                errors.append(f"{key} is {tuple(value.shape)} in the file, {tuple(parameter.shape)} in the model")
            elif id(value) in self.book.keys:
                self.book.places[key] = self.book.keys[id(value)]
            else:
                dtype = value.dtype if self.book.as_filed else parameter.dtype
                value = value.detach().to(dtype, copy=True)
                self._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


def _operations(book: _Book) -> type:
    base = comfy.ops.manual_cast
    kinds = {name: getattr(base, name) for name in LATE if hasattr(base, name)}
    late = {name: type(name, (_Late, kind), {"book": book}) for name, kind in kinds.items()}
    return type("LateOperations", (base,), late)


def build(
    tensors: Mapping[str, Tensor],
    outlines: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str],
    node: str,
    file: str,
    as_filed: bool = False,
) -> Built:
    """The model that the host detects in a file's tensors; those in `outlines`, (shape, dtype) by key, are left out.

    A key of `outlines` that lands in no late layer is read from `tensors` if it is there. as_filed: what late layers
    load keeps its dtype. Raises SlipstreamError.
    """
    left_out = dict(outlines)
    while True:
        built, lost = _built(tensors, left_out, metadata, node, file, as_filed)
        lost = [key for key in lost if key in tensors]
        if not lost:
            return built
        left_out = {key: outline for key, outline in left_out.items() if key not in lost}


def _built(tensors, outlines, metadata, node: str, file: str, as_filed: bool) -> tuple[Built, list[str]]:
    state = {key: tensors[key] for key in tensors if key not in outlines}
    stand_ins = {key: torch.zeros((), dtype=dtype).expand(shape) for key, (shape, dtype) in outlines.items()}
    book = _Book({id(tensor): key for key, tensor in stand_ins.items()}, as_filed)
    state.update(stand_ins)
    options = {"metadata": dict(metadata), "disable_dynamic": True}  # our layers are not of the host's own kind
    known = inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters
    try:
        model = comfy.sd.load_diffusion_model_state_dict(
            state,
            model_options={"custom_operations": _operations(book)},
            **{name: value for name, value in options.items() if name in known},
        )
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
        raise SlipstreamError(
            f"{node}: {file} is damaged, or of a model that this host does not know ({what}); download or save it "
            "again, or update ComfyUI."
        ) from error
    if model is None:
        raise SlipstreamError(
            f"{node}: {file} is not whole, or of a model that this host does not know; download or save it again, or "
            "update ComfyUI."
        )
    parameters = dict(model.model.diffusion_model.named_parameters())
    missing = [key for key in book.missing if key in parameters]
    if missing:
        raise SlipstreamError(f"{node}: {file} has no {missing[0]}; the file is not whole, download or save it again.")
    placed = set(book.places.values())
    return Built(model, book.places), [key for key in stand_ins if key not in placed]
