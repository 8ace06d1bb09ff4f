"""Safetensors files of quantised models: written tensor after tensor, read tensor after tensor.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes one after the other
without holes (github.com/huggingface/safetensors). `Writer` leaves room for the header and fills it in at the end, so
neither names nor sizes have to be known before, and no more than one tensor is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.files import whole
from .packed import SPLIT, description_of, json_tensor

QUANTISATION = "_quantization_metadata"  # the host's name of the metadata that lists the quantised layers
VERSION = "1.0"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}

# What an entry of the header takes beside the name: dtype, up to six sizes and two offsets of 15 digits.
ENTRY = 240
ALIGN = 8


class Writer:
    """Writes `path`, whole or not at all; whatever fails, an older file stays as it was. Use it with `with`.

    names: of everything that will be added, at least; they set the room for the header, with the metadata given.
    `metadata` may be replaced until the end by one that is not longer. `size`: bytes of the file so far.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> None:
        self.path, self.metadata = path, dict(metadata)
        room = 64 + len(_json(self.metadata)) + sum(len(_json(name)) + ENTRY for name in names)
        self._room = -(-room // ALIGN) * ALIGN
        self._whole = whole(path)
        self._entries: dict[str, dict] = {}
        self._later: dict[str, Tensor] = {}
        self._offset = 0

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._whole.__enter__()
        self._file.seek(8 + self._room)
        return self

    @property
    def size(self) -> int:
        return 8 + self._room + self._offset

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of any device. Raises OSError, and ValueError for a name twice or a dtype without a name."""
        if name in self._entries or name in self._later:
            raise ValueError(f"{name} is there twice")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold")
        tensor = tensor.detach()
        if tensor.numel() * tensor.element_size() % ALIGN:
            # what follows would not be aligned, which some readers need: these few go to the end, widest elements first
            self._later[name] = tensor.to("cpu", copy=True)
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        end = self._offset + data.nbytes
        entry = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._offset, end]}
        self._entries[name], self._offset = entry, end

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException as failed:
                self._whole.__exit__(type(failed), failed, failed.__traceback__)
                raise
        self._whole.__exit__(kind, error, trace)

    def _finish(self) -> None:
        for name in sorted(self._later, key=lambda name: -self._later[name].element_size()):
            self._write(name, self._later[name])
        header = _json({"__metadata__": self.metadata} | self._entries).encode()
        if len(header) > self._room:
            raise ValueError(f"the header takes {len(header)} bytes, {self._room} were kept free for it")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def quantisation(layers: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """The metadata that lists the quantised layers: {name: description}, see `QuantisedLinear.description`."""
    return {QUANTISATION: json.dumps({"format_version": VERSION, "layers": dict(layers)})}


class File(Mapping[str, Tensor]):
    """A safetensors file as a mapping from names to tensors, each read when it is asked for; `close` it.

    metadata: the file's own, {} without. Raises ValueError in one sentence when it is no safetensors file or is cut
    off.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._open = safe_open(str(path), "pt")
            self._file = self._open.__enter__()
            self._names = dict.fromkeys(self._file.keys())
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"it is damaged or no safetensors file ({error})") from None
        except OSError as error:
            raise ValueError(f"it cannot be read ({error.strerror or error})") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def outline(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of a tensor, which is not read."""
        found = self._file.get_slice(name)
        dtype = BY_NAME.get(found.get_dtype())
        return tuple(found.get_shape()), self[name].dtype if dtype is None else dtype

    def close(self) -> None:
        """Let go of the file; tensors that were read and not copied stay valid."""
        self._open.__exit__(None, None, None)


class Described(Mapping[str, Tensor]):
    """A file's tensors, with a `comfy_quant` for every layer that only the metadata describes, as the host reads it.

    layers: the names of all quantised layers, the parts of a split one not among them. Raises ValueError when the
    metadata is not what it should be.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._tensors, self._added = tensors, {}
        try:
            listed = json.loads(metadata.get(QUANTISATION, "{}")).get("layers", {})
            listed = {str(name): dict(found) for name, found in listed.items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"its metadata {QUANTISATION} is not the JSON of a list of layers") from None
        for name, found in listed.items():
            if f"{name}.comfy_quant" not in tensors:
                self._added[f"{name}.comfy_quant"] = json_tensor(found)
        names = [name.removesuffix(".comfy_quant") for name in self if name.endswith(".comfy_quant")]
        split = tuple(f"{name}.part" for name in names if description_of(name, self).get("format") == SPLIT)
        self.layers = [name for name in names if not name.startswith(split)]

    def __getitem__(self, name: str) -> Tensor:
        return self._added[name] if name in self._added else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._added

    def __len__(self) -> int:
        return len(self._tensors) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._tensors
