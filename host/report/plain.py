"""The model without Slipstream."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..parts import QUANTISED, take_off
from ..quantise.loras import quantised_modules
from ..quantise.quantise import quantised
from ..switch.bridge import name_of
from ..switch.segments import Local, segments_of, without_switch
from ..switch.switch import SMALLER, with_segments


@dataclass(frozen=True, slots=True)
class Plain:
    """A model with every part of Slipstream off, and the conditioning and cfg that it wants instead of the sampler's.

    what: why it is not simply the model, for the report; empty where it is.
    """

    model: object
    positive: list | None = None
    negative: list | None = None
    cfg: float = 0.0
    what: str = ""


def plain_of(model) -> Plain:
    """What this MODEL is without acceleration: without cache and forecasts, its 16-bit weights in their places, and of
    a small and a large model the large one. Models of one size, such as Wan 2.2's experts, both stay."""
    segments = segments_of(model)
    base = _switched_off(without_switch(model))
    if len(segments) < 2:
        return Plain(base, what=_still_quantised(base))
    patchers = [base if s.given else _switched_off(s.runner.patcher) for s in segments]
    sizes = [patcher.model_size() for patcher in patchers]
    largest = sizes.index(max(sizes))
    if min(sizes) >= SMALLER * max(sizes):
        experts = tuple(
            dataclasses.replace(s, runner=s.runner if s.given else Local(patcher), node_id="")
            for s, patcher in zip(segments, patchers, strict=True)
        )
        return Plain(with_segments(base, experts), what="plain are both models of the switch, as they are of one size")
    chosen, patcher = segments[largest], patchers[largest]
    return Plain(
        patcher, chosen.positive, chosen.negative, chosen.cfg, f"plain is the largest model alone ({name_of(patcher)})"
    )


def _switched_off(model):
    """A clone without what our nodes put on it."""
    clone = model.clone()
    take_off(clone)
    return clone


def _still_quantised(model) -> str:
    if next(quantised_modules(model), None) is None:
        return ""
    return "the plain run has the same quantised weights, as their file holds no others; connect reference_model"


def weights(model) -> dict | None:
    """Bytes of the weights, {"accelerated", "plain"}; None where nothing is quantised."""
    found = quantised(model)
    if found is None:
        return None
    size = model.model_size()
    before = size + found.saved if model.get_attachment(QUANTISED) is found else size
    return {"accelerated": before - found.saved, "plain": before}
