"""Which Hadamard rotation a layer gets, and the rotation itself.

Rotating weight and activation by the same orthogonal matrix leaves the layer as it is and spreads an outlier over its
block (QuaRot, arXiv 2404.00456; ConvRot, arXiv 2512.03673).
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.reference import hadamard

SIZES = (256, 64, 16)  # the host's `convrot_groupsize` is 256; smaller powers of 4 serve U-Net widths such as 320


def rotation_size(columns: int, largest: int = 256) -> int:
    """The largest of SIZES up to `largest` that divides `columns`, or 0: this width cannot be rotated."""
    return next((size for size in SIZES if size <= largest and columns % size == 0), 0)


def rotate(x: Tensor, size: int) -> Tensor:
    """x (..., K) times the block-diagonal Hadamard matrix; its own inverse; size 0 returns x. See `hadamard`."""
    return hadamard(x, size)
