"""Reads nunchaku's published SVDQuant INT4 checkpoints of FLUX.1: natural tensors under the host's layer names.

Layouts, key names and the modulation's interleave: deepcompressor 69f3473 (`backend/nunchaku`, `backend/tinychat`, what
writes the files) and nunchaku 3a3cc3d (`models/normalization.py`, `kernels/awq/gemv_awq.cu`, what reads them). Byte
orders below are those of little-endian files, as safetensors always are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128  # nunchaku pads N and K to whole tiles of its 4-bit matrix product
GROUP = 64  # columns per weight scale
RANK_TILE = 16
HALF = (torch.float16, torch.bfloat16)
FOREIGN = "the file is damaged, or it is no svdq-int4 FLUX.1 checkpoint of nunchaku"


@dataclass(frozen=True, slots=True, eq=False)
class NunchakuLayer:
    """One W4A4 linear layer of a nunchaku file, of N outputs, K inputs and rank R.

    codes: int8 (N, K), -8..7; scales: (K/64, N), weight = codes * scales; smooth: (K,), divides the input; down: (K, R)
    and up: (N, R), for the input as it comes; bias: (N,). unsigned: the 4-bit activations are 0..15 of
    (x + 0.171875) / smooth, and the bias holds the correction for that shift, of the main path and of the low-rank one.
    """

    codes: Tensor
    scales: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    unsigned: bool = False


def _tensor(
    tensors: Mapping[str, Tensor], key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> Tensor:
    """The tensor, with everything about it checked; None in shape is any size."""
    if key not in tensors:
        raise ValueError(f"'{key}' is missing: {FOREIGN}.")
    value = tensors[key]
    fits = value.ndim == len(shape) and all(n in (None, have) for n, have in zip(shape, value.shape, strict=True))
    if value.dtype not in dtypes or not fits:
        wanted = " x ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"'{key}' is {value.dtype} of shape {tuple(value.shape)} where {' or '.join(map(str, dtypes))} of "
            f"{wanted} belongs: {FOREIGN}."
        )
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"'{key}' holds values that are not finite: {FOREIGN}.")
    return value


def _whole(key: str, what: str, size: int, tile: int) -> int:
    if size < tile or size % tile:
        raise ValueError(f"'{key}' has {size} {what}, which is not a multiple of {tile}: {FOREIGN}.")
    return size


def _unpack_codes(packed: Tensor) -> Tensor:
    """int8 (N, K/2) in tiles of 128 x 64, eight nibbles of a row together, to int8 (N, K)."""
    n, k = packed.shape[0], packed.shape[1] * 2
    # tile of N, tile of K, pack of 16 rows, row lane, column lane, half of the pack, half of the columns, byte
    lanes = packed.contiguous().view(torch.uint8).reshape(n // TILE, k // GROUP, 8, 8, 4, 2, 2, 4)
    nibbles = torch.stack((lanes & 15, lanes >> 4), -1).flatten(-2)
    return ((nibbles ^ 8).to(torch.int8) - 8).permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k)


def _unpack_scales(packed: Tensor) -> Tensor:
    """(G, N) with the channels of each 128 as the lanes of a warp load them, to (G, N) in order."""
    g, n = packed.shape
    return packed.reshape(n // TILE, g, 8, 4, 2, 2).permute(1, 0, 2, 4, 3, 5).reshape(g, n)


def _unpack_low_rank(packed: Tensor, down: bool) -> Tensor:
    """(C, R) in tiles of 16 x 16, row lanes before column lanes, to (C, R): down has the rank as rows of a tile."""
    c, r = packed.shape
    tiles = (
        packed.reshape(c // 16, r // 16, 8, 4, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(c // 16, r // 16, 16, 16)
    )
    return tiles.permute(0, 3, 1, 2).reshape(c, r) if down else tiles.permute(0, 2, 1, 3).reshape(c, r)


def unpack_layer(
    tensors: Mapping[str, Tensor], name: str, unsigned: bool = False, shape: tuple[int, int] | None = None
) -> NunchakuLayer:
    """The layer whose tensors are `name.qweight`, `name.wscales`, ...; N and K with the padding unless shape cuts it.

    `lora_down` and `lora_up` (R = 0) and `bias` (zeros) may be absent. Raises ValueError for anything that is not as
    nunchaku writes it, FP4 files among it.
    """
    for key in (f"{name}.wcscales", f"{name}.wtscale"):
        if key in tensors:
            raise ValueError(f"'{key}' belongs to nunchaku's FP4 format: take the svdq-int4 file of the same model.")
    packed = _tensor(tensors, f"{name}.qweight", (torch.int8,), (None, None))
    n = _whole(f"{name}.qweight", "rows", packed.shape[0], TILE)
    k = _whole(f"{name}.qweight", "columns", packed.shape[1] * 2, TILE)
    scales = _tensor(tensors, f"{name}.wscales", HALF, (k // GROUP, n))
    h = (scales.dtype,)
    smooth = _tensor(tensors, f"{name}.smooth", h, (k,))
    if not (smooth > 0).all():
        raise ValueError(f"'{name}.smooth' holds values that are not above 0, and inputs are divided by it: {FOREIGN}.")
    rows, columns = shape or (n, k)
    if rows > n or columns > k or columns % GROUP:
        raise ValueError(f"'{name}' is {n} x {k} with its padding, and cannot be cut to {rows} x {columns}.")
    bias = torch.zeros(n, dtype=scales.dtype)
    if f"{name}.bias" in tensors:
        bias = _unpack_scales(_tensor(tensors, f"{name}.bias", h, (n,))[None])[0]
    down, up = torch.zeros(k, 0, dtype=scales.dtype), torch.zeros(n, 0, dtype=scales.dtype)
    if f"{name}.lora_down" in tensors or f"{name}.lora_up" in tensors:
        packed_down = _tensor(tensors, f"{name}.lora_down", h, (k, None))
        rank = _whole(f"{name}.lora_down", "ranks", packed_down.shape[1], RANK_TILE)
        down = _unpack_low_rank(packed_down, True)
        up = _unpack_low_rank(_tensor(tensors, f"{name}.lora_up", h, (n, rank)), False)
    return NunchakuLayer(
        codes=_unpack_codes(packed)[:rows, :columns],
        scales=_unpack_scales(scales)[: columns // GROUP, :rows],
        smooth=_unpack_scales(smooth[None])[0, :columns],
        down=down[:columns],
        up=up[:rows],
        bias=bias[:rows],
        unsigned=unsigned,
    )


# deepcompressor adds this to each split's bias: 1 to every scale, which x * (1 + scale) + shift has beside it.
SPLIT_BIAS = {3: (0.0, 1.0, 0.0), 6: (0.0, 1.0, 0.0, 0.0, 1.0, 0.0)}


def unpack_modulation(tensors: Mapping[str, Tensor], name: str, splits: int) -> tuple[Tensor, Tensor]:
    """(weight (N, K), bias (N,)) of an AWQ W4A16 layer whose outputs are interleaved: shift, scale, gate of channel 0.

    splits: 6 in double blocks, 3 in single ones. The result is in the order of the original layer, all shifts, then all
    scales, and so on, and without the 1 that the file has added to the scales' bias. Dequantised in float32 as
    codes * wscales + wzeros, returned in the file's dtype.
    """
    packed = _tensor(tensors, f"{name}.qweight", (torch.int32,), (None, None))
    n, k = packed.shape[0] * 4, packed.shape[1] * 2
    _whole(f"{name}.qweight", "columns", k, GROUP)
    _whole(f"{name}.qweight", "rows", n, 4 * splits)
    groups = k // GROUP
    scales = _tensor(tensors, f"{name}.wscales", HALF, (None, n))
    zeros = _tensor(tensors, f"{name}.wzeros", (scales.dtype,), tuple(scales.shape))
    # tinychat pads the groups to a multiple of 16 with zeros
    if scales.shape[0] not in (groups, -(-groups // 16) * 16):
        raise ValueError(f"'{name}.wscales' has {scales.shape[0]} groups where {groups} belong: {FOREIGN}.")
    bias = _tensor(tensors, f"{name}.bias", (scales.dtype,), (n,))
    # four rows, tile of 64 columns, row, half of the tile, 16-bit word, byte, nibble
    words = packed.contiguous().view(torch.uint8).reshape(n // 4, groups, 4, 2, 8, 2)
    codes = torch.stack((words & 15, words >> 4), -1).permute(0, 2, 1, 3, 5, 6, 4).reshape(n, groups, GROUP)
    weight = codes.float() * scales[:groups].t().float()[..., None] + zeros[:groups].t().float()[..., None]
    weight = weight.reshape(n // splits, splits, k).transpose(0, 1).reshape(n, k)
    delta = torch.tensor(SPLIT_BIAS[splits])
    natural = (bias.float().reshape(n // splits, splits) - delta).t().reshape(n)
    return weight.to(scales.dtype), natural.to(scales.dtype)


# nunchaku's name in a block to the host's, and whether the 4-bit activations are unsigned.
DOUBLE = {
    "qkv_proj": ("img_attn.qkv", False),
    "qkv_proj_context": ("txt_attn.qkv", False),
    "out_proj": ("img_attn.proj", False),
    "out_proj_context": ("txt_attn.proj", False),
    "mlp_fc1": ("img_mlp.0", False),
    "mlp_fc2": ("img_mlp.2", True),
    "mlp_context_fc1": ("txt_mlp.0", False),
    "mlp_context_fc2": ("txt_mlp.2", True),
}
DOUBLE_MODULATION = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}
DOUBLE_NORMS = {
    "norm_q": "img_attn.norm.query_norm",
    "norm_k": "img_attn.norm.key_norm",
    "norm_added_q": "txt_attn.norm.query_norm",
    "norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE_NORMS = {"norm_q": "norm.query_norm", "norm_k": "norm.key_norm"}
SINGLE = ("qkv_proj", "mlp_fc1", "out_proj", "mlp_fc2")
OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_W4A4 = ("qweight", "wscales", "smooth", "smooth_orig", "lora_down", "lora_up", "bias", "wcscales", "wtscale")
_AWQ = ("qweight", "wscales", "wzeros", "bias")
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d{1,4})\.(.+)")


def _keys(layers: Iterable[str], ends: Iterable[str]) -> set[str]:
    return {f"{layer}.{end}" for layer in layers for end in ends}


_DOUBLE_KEYS = _keys(DOUBLE, _W4A4) | _keys(DOUBLE_MODULATION, _AWQ) | _keys(DOUBLE_NORMS, ("weight",))
_SINGLE_KEYS = _keys(SINGLE, _W4A4) | _keys(("norm.linear",), _AWQ) | _keys(SINGLE_NORMS, ("weight",))
_OUTSIDE_KEYS = _keys(OUTSIDE, ("weight", "bias"))


def blocks_of(keys: Iterable[str]) -> tuple[int, int]:
    """(double, single blocks) of a FLUX.1 checkpoint; ValueError where a key is foreign or a block is missing."""
    doubles: set[int] = set()
    singles: set[int] = set()
    for key in keys:
        block = _BLOCK.fullmatch(key)
        known = _OUTSIDE_KEYS if block is None else _SINGLE_KEYS if block[1] else _DOUBLE_KEYS
        if (key if block is None else block[3]) not in known:
            raise ValueError(f"'{key}' is not a name of nunchaku's FLUX.1 files: {FOREIGN}.")
        if block is not None:
            (singles if block[1] else doubles).add(int(block[2]))
    for kind, numbers in (("Double", doubles), ("Single", singles)):
        missing = next(i for i in range(len(numbers) + 1) if i not in numbers)
        if missing < len(numbers):
            raise ValueError(f"{kind} block {missing} is missing: {FOREIGN}.")
    if not doubles and not singles:
        raise ValueError(f"There is no transformer block in the file: {FOREIGN}.")
    return len(doubles), len(singles)


def w4a4_layers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[NunchakuLayer, ...]]]:
    """(the host's layer name, its parts) of every W4A4 layer, read one after the other.

    One part, or two for `linear2`: attention and GELU outputs lie side by side along K, each with its own kind of
    activations, and the results (with both biases) are summed. `linear1` is one part: its halves share their input.
    """
    doubles, singles = blocks_of(tensors)
    for i in range(doubles):
        for theirs, (ours, unsigned) in DOUBLE.items():
            yield f"double_blocks.{i}.{ours}", (unpack_layer(tensors, f"transformer_blocks.{i}.{theirs}", unsigned),)
    for i in range(singles):
        qkv, fc1, out, fc2 = (
            unpack_layer(tensors, f"single_transformer_blocks.{i}.{part}", part == "mlp_fc2") for part in SINGLE
        )
        yield f"single_blocks.{i}.linear1", (_side_by_side(qkv, fc1, f"single_transformer_blocks.{i}"),)
        if out.codes.shape[0] != fc2.codes.shape[0]:
            raise ValueError(
                f"'single_transformer_blocks.{i}' has an out_proj and an mlp_fc2 of other sizes: {FOREIGN}."
            )
        yield f"single_blocks.{i}.linear2", (out, fc2)


def _side_by_side(first: NunchakuLayer, second: NunchakuLayer, block: str) -> NunchakuLayer:
    """Two layers of the same input as one of N1 + N2 outputs; the low-rank branches stay apart (rank R1 + R2)."""
    if first.smooth.shape != second.smooth.shape or not torch.equal(first.smooth, second.smooth):
        raise ValueError(f"'{block}' has a qkv_proj and an mlp_fc1 with other smooth factors: {FOREIGN}.")
    return NunchakuLayer(
        codes=torch.cat((first.codes, second.codes)),
        scales=torch.cat((first.scales, second.scales), 1),
        smooth=first.smooth,
        down=torch.cat((first.down, second.down), 1),
        up=torch.block_diag(first.up, second.up),
        bias=torch.cat((first.bias, second.bias)),
    )


def plain_weights(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(the host's parameter name, tensor) of everything else: modulation dequantised, embedders and norms as they are.

    The norms are called `.scale`, as in the original FLUX.1 files; newer hosts call the parameter `.weight`.
    """
    doubles, singles = blocks_of(tensors)
    for i in range(doubles):
        block, host = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for theirs, ours in DOUBLE_MODULATION.items():
            weight, bias = unpack_modulation(tensors, f"{block}.{theirs}", 6)
            yield f"{host}.{ours}.weight", weight
            yield f"{host}.{ours}.bias", bias
        for theirs, ours in DOUBLE_NORMS.items():
            yield f"{host}.{ours}.scale", _float(tensors, f"{block}.{theirs}.weight", 1)
    for i in range(singles):
        block, host = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        weight, bias = unpack_modulation(tensors, f"{block}.norm.linear", 3)
        yield f"{host}.modulation.lin.weight", weight
        yield f"{host}.modulation.lin.bias", bias
        for theirs, ours in SINGLE_NORMS.items():
            yield f"{host}.{ours}.scale", _float(tensors, f"{block}.{theirs}.weight", 1)
    for theirs, ours in OUTSIDE.items():
        # FLUX.1-schnell has no guidance
        if theirs.startswith("time_text_embed.guidance") and f"{theirs}.weight" not in tensors:
            continue
        for end, dimensions in (("weight", 2), ("bias", 1)):
            value = _float(tensors, f"{theirs}.{end}", dimensions)
            # diffusers has scale before shift in the last modulation, the host shift before scale
            yield f"{ours}.{end}", torch.cat(value.chunk(2)[::-1]) if theirs == "norm_out.linear" else value


def _float(tensors: Mapping[str, Tensor], key: str, dimensions: int) -> Tensor:
    return _tensor(tensors, key, (*HALF, torch.float32), (None,) * dimensions)
