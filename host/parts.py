"""The register of parts: what our nodes put on a ModelPatcher, one row each.

A row is all that the rest of the pack needs to know of a part: in which order its sampling is called, how a plan holds
it, and how a model is rid of it. An attachment that has put more on a patcher than its own key holds has a method
`take_off(patcher)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from comfy.patcher_extension import WrappersMP

from ..engine.run.plan import (
    CacheConfig,
    CompensatorConfig,
    PredictorConfig,
    check_cache,
    check_compensator,
    check_predictor,
)

RUN, SWITCH, QUANTISED, KERNELS = "slipstream", "slipstream_switch", "slipstream_quantised", "slipstream_kernels"
# What a calibration hands to a run on a patcher of its own: its recorder, a profile that is in no file, its fit.
RECORDER, PROFILE, FIT = "slipstream_recorder", "slipstream_profile", "slipstream_fit"


@dataclass(frozen=True, slots=True)
class Part:
    """One part.

    key: of its attachment and its OUTER_SAMPLE wrapper; node: the id of the node that puts it on; entry, config, check:
    its name in a Plan, the class of that entry, and what completes it or raises SlipstreamError, where a run has it;
    order: of its wrapper, below 0 before those of other packs and above 0 behind, the lowest first; 0 where it was put.
    """

    key: str
    node: str
    entry: str = ""
    config: type | None = None
    check: Callable[[Any], Any] | None = None
    order: int = 0


PARTS = (
    # Before all: a cache that stands before it would answer for the other model.
    Part(SWITCH, "SlipstreamHybridSwitch", order=-2),
    # Before any cache, so that no cache's run is open while a first run is measured.
    Part(QUANTISED, "SlipstreamW4A4Quantize", order=-1),
    Part(RUN, "SlipstreamCacheLoader", "cache", CacheConfig, check_cache),
    Part(RUN, "SlipstreamTaylorPredictor", "predictor", PredictorConfig, check_predictor),
    Part(RUN, "SlipstreamErrorCompensator", "compensator", CompensatorConfig, check_compensator),
    Part(RECORDER, "SlipstreamCalibrate"),
    Part(PROFILE, "SlipstreamCalibrate"),
    Part(FIT, "SlipstreamCalibrate"),
    Part(KERNELS, "SlipstreamW4A4Quantize"),
)

# The classes of a plan's entries, as `Plan.from_json` wants them.
ENTRIES: dict[str, type] = {part.entry: part.config for part in PARTS if part.config is not None}

KEYS = tuple(dict.fromkeys(part.key for part in PARTS))
_ORDER = {part.key: part.order for part in PARTS}


def part_of(config: object) -> Part:
    """The row of a plan's entry."""
    return next(part for part in PARTS if part.config is type(config))


def put_on(patcher, key: str, attachment: object = None, sample: Callable | None = None) -> None:
    """Put a part on this patcher.

    attachment: in the place of the one it has, None leaves that; sample: its OUTER_SAMPLE wrapper in the place of the
    one it has, None takes that away.
    """
    if attachment is not None:
        patcher.set_attachments(key, attachment)
    patcher.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, key)
    if sample is None:
        return
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, sample)
    wrappers = patcher.wrappers[WrappersMP.OUTER_SAMPLE]
    ordered = sorted(wrappers.items(), key=lambda item: _ORDER.get(item[0], 0))  # stable: the others stay as they are
    wrappers.clear()
    wrappers.update(ordered)


def take_off(patcher, keys: Iterable[str] = KEYS) -> None:
    """Rid this patcher of these parts. Patched forwards may stay: without a run they are the layer itself."""
    for key in keys:
        leave = getattr(patcher.get_attachment(key), "take_off", None)
        if leave is not None:
            leave(patcher)
        patcher.remove_attachments(key)
        patcher.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, key)
