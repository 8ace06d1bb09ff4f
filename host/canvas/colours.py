"""The colours and words in which the pack's pictures show what became of an evaluation."""

from __future__ import annotations

import io

import torch
from torch import Tensor

SMALL, REMOTE, ANCHOR = "small model", "remote", "anchor"


WORDS = {SMALL: "by a small model", REMOTE: "on another server"}


# Colours that colour-blind readers tell apart (Okabe and Ito; Tableau), one per thing that can become of an evaluation.
COLOURS = {
    "computed": "#0072B2", "forecast": "#E69F00", "reused": "#56B4E9", ANCHOR: "#009E73", REMOTE: "#D55E00",
    SMALL: "#B07AA1",
}  # fmt: skip


OTHER = "#999999"


def as_image(png: bytes) -> Tensor:
    """A PNG file's content as the host's IMAGE, [1, H, W, 3] in [0, 1]."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels)[None]
