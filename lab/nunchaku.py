"""Writes what `quant/nunchaku.py` reads: checkpoints in nunchaku's layout, for tests and benches."""

from __future__ import annotations

import torch
from slipstream.quant.nunchaku import GROUP, RANK_TILE, SPLIT_BIAS, TILE, NunchakuLayer
from torch import Tensor


def _pack_codes(codes: Tensor) -> Tensor:
    n, k = codes.shape
    lanes = codes.reshape(n // TILE, 8, 2, 8, k // GROUP, 2, 4, 8).permute(0, 4, 1, 3, 6, 2, 5, 7).contiguous()
    nibbles = lanes.view(torch.uint8) & 15
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).reshape(n, k // 2).view(torch.int8)


def _pack_scales(scales: Tensor) -> Tensor:
    g, n = scales.shape
    return scales.reshape(g, n // TILE, 8, 2, 4, 2).permute(1, 0, 2, 4, 3, 5).reshape(g, n)


def _pack_low_rank(matrix: Tensor, down: bool) -> Tensor:
    c, r = matrix.shape
    tiles = matrix.reshape(c // 16, 16, r // 16, 16).permute((0, 2, 3, 1) if down else (0, 2, 1, 3))
    return tiles.reshape(c // 16, r // 16, 2, 8, 2, 4, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(c, r)


def pack_layer(layer: NunchakuLayer, name: str) -> dict[str, Tensor]:
    """The inverse of `unpack_layer`: pads N and K to 128 and R to 16 as deepcompressor does."""
    n, k = (-(-size // TILE) * TILE for size in layer.codes.shape)
    r = -(-layer.down.shape[1] // RANK_TILE) * RANK_TILE
    found = {
        "qweight": _pack_codes(_padded(layer.codes, (n, k), 0)),
        "wscales": _pack_scales(_padded(layer.scales, (k // GROUP, n), 1)),
        "smooth": _pack_scales(_padded(layer.smooth[None], (1, k), 1))[0],
        "bias": _pack_scales(_padded(layer.bias[None], (1, n), 1))[0],
    }
    if r:
        found["lora_down"] = _pack_low_rank(_padded(layer.down, (k, r), 0), True)
        found["lora_up"] = _pack_low_rank(_padded(layer.up, (n, r), 0), False)
    return {f"{name}.{key}": value for key, value in found.items()}


def _padded(matrix: Tensor, shape: tuple[int, int], value: float) -> Tensor:
    rows, columns = (size - have for size, have in zip(shape, matrix.shape, strict=True))
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows), value=value)


def pack_modulation(
    codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor, name: str, splits: int
) -> dict[str, Tensor]:
    """The inverse: codes (N, K) 0..15, scales and zeros (K/64, N), bias (N,), all in the original layer's order."""
    n, k = codes.shape
    turned = torch.arange(n).reshape(splits, n // splits).t().reshape(-1)
    words = codes[turned].to(torch.uint8).reshape(n // 4, 4, k // GROUP, 2, 2, 2, 8).permute(0, 2, 1, 3, 6, 4, 5)
    packed = (words[..., 0] | words[..., 1] << 4).contiguous().reshape(n // 4, k * 2).view(torch.int32)
    delta = torch.tensor(SPLIT_BIAS[splits], dtype=bias.dtype).repeat(n // splits)
    return {
        f"{name}.qweight": packed,
        f"{name}.wscales": scales[:, turned],
        f"{name}.wzeros": zeros[:, turned],
        f"{name}.bias": bias[turned] + delta,
    }
