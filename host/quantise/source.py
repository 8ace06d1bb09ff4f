"""A 16-bit or fp8 file as a model of the host whose weights stay in the file.

The host builds the network without the weights (see `host/quantise/load.py`); its linear layers then read their weight
from the file each time they are asked for it, so that everything that quantises a loaded model works on it unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import comfy.model_detection
import torch
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...quant.files import QUANTISATION, Described, File
from ...quant.packed import description_of
from .load import Weightless, build

FILE = "Quantize Model File"

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
# What scaled fp8 files have beside a weight, in the host's old and new names; scales first.
SCALES = (".scale_weight", ".weight_scale")
BESIDE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")

Outlines = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class FileModel:
    """model: a ModelPatcher whose linear layers are `FileLinear`s; metadata: of the file, to be handed on.

    Raises SlipstreamError for a file that is quantised already, damaged, or in another layout than the host's.
    """

    def __init__(self, file: File, name: str) -> None:
        self._tensors = tensors = Source(file, name)
        outlines = {key: tensors.outline(key) for key in tensors if key.endswith(".weight")}
        outlines = {key: outline for key, outline in outlines.items() if len(outline[0]) > 1}
        _refuse_foreign(tensors, outlines, name)
        self.metadata = {key: text for key, text in file.metadata.items() if key != QUANTISATION}
        built = build(tensors, outlines, self.metadata, FILE, name, as_filed=True)
        self.model, self._places = built.model, built.places
        network = self.model.model.diffusion_model
        for key, origin in built.places.items():
            path, _, part = key.rpartition(".")
            if part == "weight" and isinstance(network.get_submodule(path), torch.nn.Linear):
                built.place(path, FileLinear(network.get_submodule(path), tensors, origin))
        self._state = network.state_dict()

    @property
    def keys(self) -> list[str]:
        """The names of the network's tensors."""
        return list(self._state)

    def tensor(self, key: str) -> Tensor:
        """A tensor of the network, read from the file where it is not in memory."""
        return self._tensors[self._places[key]] if self._state[key].is_meta else self._state[key]

    def nbytes(self, key: str) -> int:
        """Its bytes; it is not read."""
        found = self._state[key]
        return found.numel() * found.element_size()


def _refuse_foreign(tensors: Source, outlines: Outlines, source: str) -> None:
    """Refuse files whose layers the host would put together from several tensors, which takes the whole model."""
    state = {
        key: torch.zeros((), dtype=outlines[key][1]).expand(outlines[key][0]) if key in outlines else tensors[key]
        for key in tensors
    }
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    prefix = prefix if any(key.startswith(prefix) for key in state) else ""
    try:
        known = comfy.model_detection.detect_unet_config(state, prefix, metadata={}) is not None
    except (KeyError, IndexError, AttributeError):
        known = True  # a damaged file: loading tells what is missing
    if not known:
        raise SlipstreamError(
            f"{FILE}: {source} is not in the layout of ComfyUI (a diffusers file?); load it with Load Diffusion Model "
            "and use W4A4 Quantize and Save Quantized Model instead."
        )


class Source(Mapping[str, Tensor]):
    """A 16-bit or fp8 file as the plain tensors of a model; a scaled fp8 weight is scaled up when it is read.

    Raises SlipstreamError for a file that is quantised already.
    """

    def __init__(self, file: File, name: str) -> None:
        try:
            self._tensors = Described(file, file.metadata)
            kinds = {layer: description_of(layer, self._tensors).get("format") for layer in self._tensors.layers}
        except ValueError as error:
            raise SlipstreamError(f"{FILE}: {name}: {error}; download it again.") from None
        packed = next((kind for kind in kinds.values() if kind not in FLOAT8), None)
        packed = packed or next(("svdquant" for key in file if key.endswith(".qweight")), None)
        if packed is not None:
            raise SlipstreamError(f"{FILE}: {name} is quantised already ({packed}); choose its 16-bit or fp8 file.")
        self._file = file
        self._scales = {}
        for end in SCALES:
            layers = (key.removesuffix(end) for key in file if key.endswith(end))
            self._scales |= {f"{layer}.weight": f"{layer}{end}" for layer in layers if f"{layer}.weight" in file}
        aside = {f"{key.removesuffix('.weight')}{end}" for key in self._scales for end in BESIDE}
        self._keys = dict.fromkeys(key for key in file if key not in aside and not key.endswith("scaled_fp8"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __getitem__(self, key: str) -> Tensor:
        tensor, scale = self._file[key], self.scale(key)
        return tensor if scale is None else (tensor.float() * scale).bfloat16()

    def stored(self, key: str) -> Tensor:
        """As it is in the file."""
        return self._file[key]

    def scale(self, key: str) -> Tensor | None:
        """What the stored weight is multiplied by, float32."""
        return self._file[self._scales[key]].float() if key in self._scales else None

    def outline(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) as it is read."""
        shape, dtype = self._file.outline(key)
        return shape, torch.bfloat16 if key in self._scales else dtype


class FileLinear(Weightless, torch.nn.Linear):
    """A linear layer whose weight is read from the file at every use; its parameter, on the meta device, has its size.

    linear: the layer of the host whose place it takes, with its bias.
    """

    def __init__(self, linear: torch.nn.Linear, tensors: Source, key: str) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._parameters["weight"] = linear.weight
        self.register_parameter("bias", linear.bias)
        self._tensors, self._key = tensors, key
        if tensors.scale(key) is not None:
            self.convert_weight = self._scaled_up  # the host's question before patching; without it dtypes stay

    @property
    def weight(self) -> Tensor:
        """As it is in the file, not scaled up."""
        return self._tensors.stored(self._key)

    def _scaled_up(self, weight: Tensor, inplace: bool = False, **kwargs: object) -> Tensor:
        return weight.float() * self._tensors.scale(self._key).to(weight.device)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._tensors[self._key].to(input)
        return torch.nn.functional.linear(input, weight, None if self.bias is None else self.bias.to(input))
