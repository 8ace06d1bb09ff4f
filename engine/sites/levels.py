"""The levels of a network at which something can be taken: one row each, by the name that reports and profiles hold."""

from __future__ import annotations

from dataclasses import dataclass

MODEL_OUTPUT = "model output"
STACK = "block stack"
FEATURES = "last-block features"
EACH = "each block"
DEPTH = "U-Net depth"
ENCODER = "U-Net encoder"

# What the model output turns out to be, seen at the first computed evaluation.
NETWORK = "network output"
SLOPE = "slope at the model boundary"
DENOISED = "denoised prediction"


@dataclass(frozen=True, slots=True)
class Level:
    """One level.

    word: on the canvas, empty where only a profile leads there; blocks, unet: what kind of network has it; tokens: what
    is stored has a row per token of the network; gated: a probe at its first layers may decide; forecast: False where
    residuals are only reused; first: blocks that always run where the user does not say; place: how `first` is told;
    method: what `auto` means there, empty for the family's own.
    """

    name: str
    word: str = ""
    blocks: bool = False
    unet: bool = False
    tokens: bool = False
    gated: bool = False
    forecast: bool = True
    first: int = 0
    place: str = ""
    method: str = ""


ROWS = (
    Level(MODEL_OUTPUT, "model output"),
    Level(STACK, "block stack", blocks=True, tokens=True, gated=True, first=1, place=" from block {}"),
    Level(FEATURES, "last block", blocks=True, tokens=True, gated=True, place=" from block {}"),
    Level(DEPTH, "U-Net depth", unet=True, gated=True, place=" {}"),
    Level(ENCODER, "U-Net encoder", unet=True, method="key steps"),
    Level(EACH, blocks=True, forecast=False),
)

LEVELS = {row.name: row for row in ROWS}

# What the canvas offers -> the level's name.
OFFERED = {row.word: row.name for row in ROWS if row.word}
