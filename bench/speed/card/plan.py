"""What a run on a card has to tell, the most telling first: a run cut short still tells the rest of it."""

from __future__ import annotations

from dataclasses import dataclass

DRY = "SLIPSTREAM_CARD_DRY"  # in the environment of a worker that measures nothing


def one_line(error: Exception) -> str:
    """An error as a row can hold it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class NotThere(Exception):
    """A package, a host or a part of a card that a line needs and this machine has not; the message says which."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the plan.

    question: what is known afterwards; seconds: the most it may take on a card; run: module and function here, which
    is given a `Bench` and yields rows.
    """

    name: str
    question: str
    seconds: int
    run: str


PLAN = (
    Line("card", "which card this is, and what it does at best", 30, "kernels:card"),
    Line("correctness", "does every kernel agree with float64, and what does a first call cost", 100, "kernels:agree"),
    Line("tests", "do the promises hold on a card", 75, "tests:on_a_card"),
    Line("small models", "are cache and 4 bit as near to the plain run as on the CPU", 60, "small:small_models"),
    Line("calls", "microseconds of the host's side per quantised layer", 20, "calls:per_layer"),
    Line("K0", "how far the quantising pass is above the bytes it moves", 25, "kernels:k0"),
    Line("products", "the products alone, as a share of the card's rates", 35, "kernels:products"),
    Line("FLUX, 16 bit", "a step of a whole model, alone and cached; where the card idles", 60, "flux:plain"),
    Line("FLUX, W4A4", "the same in 4 bit, with its memory and the wait of the first run", 110, "flux:w4a4"),
    Line("FLUX, int8_convrot", "the same in what most files have", 80, "flux:int8"),
    Line("layers", "which way serves which shape, beside 16 bit", 60, "kernels:layers"),
    Line("compile, graphs", "do torch.compile and a CUDA graph take quantised layers", 60, "calls:compiled"),
)
NAMES = tuple(line.name for line in PLAN)
