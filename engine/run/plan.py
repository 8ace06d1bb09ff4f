"""What the nodes ask for: an immutable plan, checked when it is made, and what each of its choices stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ..correction.correctors import METHODS as CORRECTORS
from ..errors import SlipstreamError
from ..forecast.history import Storage
from ..forecast.predictors import KINDS
from ..sites.levels import OFFERED


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The Cache Loader's part.

    drift_budget: relative L1 of the output, 0 skips nothing; start and end percent: the part of the sampling in which
    evaluations may be filled, as the host counts it; max_skip: steps filled in a row, at most, 0 takes the authors'
    number; site: what is cached; depth: first blocks that always run, or the U-Net depth, -1 chooses; threshold: of the
    gates, 0 takes the authors'; prior_noise: Faster Diffusion's injection; profile: a calibration's file, in the
    place of method and preset.
    """

    preset: str = "Balanced"
    method: str = "auto"
    drift_budget: float = 0.10
    start_percent: float = 0.0
    end_percent: float = 1.0
    max_skip: int = 6
    node_id: str = ""
    site: str = "auto"
    depth: int = -1
    threshold: float = 0.0
    prior_noise: bool = False
    cache_device: str = "auto"
    memory_budget_mb: int = 0
    profile: str = ""


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """The Taylor Predictor's part. order -1 means automatic; scale: damping of Hermite."""

    kind: str = "Taylor"
    order: int = -1
    node_id: str = ""
    scale: float = 0.5


@dataclass(frozen=True, slots=True)
class CompensatorConfig:
    """The Error Compensator's part.

    profile: a calibration's file, `auto` for the Cache Loader's, or `none`; anchors: evaluations at which the reference
    is asked too, -1 chooses, 0 for none; strength: of both, 0 does nothing at all; terms: `auto`, what the calibration
    found to help, `off`, or a key of the engine's METHODS that the profile has to hold; reference: of REFERENCES.
    """

    profile: str = "auto"
    anchors: int = -1
    strength: float = 1.0
    terms: str = "auto"
    node_id: str = ""
    reference: str = "auto"


@dataclass(frozen=True, slots=True)
class Plan:
    """All parts that the nodes on one MODEL wire have added; None means the node is not there."""

    cache: CacheConfig | None = None
    predictor: PredictorConfig | None = None
    compensator: CompensatorConfig | None = None

    @property
    def node_ids(self) -> tuple[str, ...]:
        parts = (self.cache, self.predictor, self.compensator)
        return tuple(part.node_id for part in parts if part is not None and part.node_id)

    def as_json(self) -> dict:
        """The plan as plain JSON data, without the parts that are not there."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: dict, kinds: Mapping[str, type]) -> Plan:
        """The inverse of `as_json`. kinds: the class of each part by its name, see `host/parts.py`. Unknown parts and
        values raise SlipstreamError."""
        try:
            return cls(**{key: kinds[key](**value) for key, value in data.items()})
        except (KeyError, TypeError) as error:
            raise SlipstreamError(f"Slipstream plan: {error} is not known to this version; update the pack.") from None


# What a preset sets; Custom takes the node's own values, Off counts and times without skipping anything. Where the
# cache lies is the user's in every preset.
# Source of the numbers: `bench/quality/fidelity.py` on the trained small Flux, 28 euler steps (README, table).
_AUTO = {
    "method": "auto", "start_percent": 0.0, "end_percent": 1.0, "site": "auto", "depth": -1, "threshold": 0.0,
    "prior_noise": False,
}  # fmt: skip
PRESETS: dict[str, dict] = {
    "Balanced": {**_AUTO, "drift_budget": 0.10, "max_skip": 6},
    "Safe": {**_AUTO, "drift_budget": 0.05, "max_skip": 4},
    "Fast": {**_AUTO, "drift_budget": 0.20, "max_skip": 6},
    "Custom": {},
    "Off": {**_AUTO, "drift_budget": 0.0},
}

METHODS = (
    "auto",
    "drift budget",
    "interval",
    "accumulated change",
    "power grid",
    "key steps",
    "first-block gate",
    "confidence gate",
    "modulated change",
    "magnitude",
)
SITES = ("auto", *OFFERED)

# Where snapshots are wished to lie; None leaves it to what is free.
DEVICES = {"auto": None, "GPU": Storage.DEVICE, "RAM": Storage.RAM, "int8": Storage.INT8}


def check_cache(config: CacheConfig) -> CacheConfig:
    """Return the config with its preset applied, or raise SlipstreamError."""
    node = "Cache Loader"
    if config.preset not in PRESETS:
        raise SlipstreamError(
            f"{node}: there is no preset '{config.preset}'; choose one of {', '.join(PRESETS)} (Balanced suits most)."
        )
    if config.method not in METHODS:
        raise SlipstreamError(f"{node}: there is no method '{config.method}'; choose one of {', '.join(METHODS)}.")
    if not 0.0 <= config.drift_budget <= 1.0:
        raise SlipstreamError(
            f"{node}: drift_budget is {config.drift_budget}, but it must be between 0 (skip nothing) and 1; try 0.10."
        )
    for name in ("start_percent", "end_percent"):
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise SlipstreamError(f"{node}: {name} is {value}, but it must be between 0 (start) and 1 (end).")
    if config.start_percent >= config.end_percent:
        raise SlipstreamError(
            f"{node}: start_percent {config.start_percent} is not before end_percent {config.end_percent}; "
            "set the start lower or the end higher."
        )
    if not 0 <= config.max_skip <= 20:
        raise SlipstreamError(f"{node}: max_skip is {config.max_skip}, but it must be between 0 and 20; try 6.")
    if config.site not in SITES:
        raise SlipstreamError(f"{node}: there is no site '{config.site}'; choose one of {', '.join(SITES)}.")
    if not -1 <= config.depth <= 99:
        raise SlipstreamError(f"{node}: depth is {config.depth}, but it must be -1 (automatic) or 0 to 99; try 1.")
    if not 0.0 <= config.threshold <= 10.0:
        raise SlipstreamError(
            f"{node}: threshold is {config.threshold}, but it must be between 0 (the authors') and 10; try 0."
        )
    if config.cache_device not in DEVICES:
        raise SlipstreamError(
            f"{node}: there is no cache device '{config.cache_device}'; choose one of {', '.join(DEVICES)}."
        )
    if not 0 <= config.memory_budget_mb <= 1_000_000:
        raise SlipstreamError(
            f"{node}: memory_budget_mb is {config.memory_budget_mb}, but it must be 0 (automatic) or a positive number "
            "of megabytes; try 1000."
        )
    return dataclasses.replace(config, **PRESETS[config.preset])


def check_predictor(config: PredictorConfig) -> PredictorConfig:
    """Return the config, or raise SlipstreamError."""
    node = "Taylor Predictor"
    if config.kind not in KINDS:
        raise SlipstreamError(f"{node}: there is no kind '{config.kind}'; choose one of {', '.join(KINDS)}.")
    if config.order not in (-1, 0, 1, 2, 3):
        raise SlipstreamError(f"{node}: order is {config.order}, but it must be -1 (automatic), 0, 1, 2 or 3; try -1.")
    if not 0.1 <= config.scale <= 1.0:
        raise SlipstreamError(f"{node}: scale is {config.scale}, but it must be between 0.1 and 1; try 0.5.")
    return config


# What anchors ask, see `host/compensate/reference.py`; `auto` is the 8-bit copy of a quantised model, else the large
# one of a switch.
AUTOMATIC, EIGHT_BIT, ORIGINAL, LARGE_MODEL, UNCACHED = REFERENCES = (
    "auto", "8-bit copy", "original weights", "large model of a switch", "uncached model",
)  # fmt: skip

TERMS = ("auto", "off", *CORRECTORS)
MOST_ANCHORS = 100


def check_compensator(config: CompensatorConfig) -> CompensatorConfig:
    """Return the config, or raise SlipstreamError."""
    node = "Error Compensator"
    if not -1 <= config.anchors <= MOST_ANCHORS:
        raise SlipstreamError(
            f"{node}: anchors is {config.anchors}, but it must be -1 (automatic) or 0 to {MOST_ANCHORS}; try -1."
        )
    if not 0.0 <= config.strength <= 1.0:
        raise SlipstreamError(f"{node}: strength is {config.strength}, but it must be between 0 and 1; try 1.")
    if config.terms not in TERMS:
        raise SlipstreamError(f"{node}: there are no terms '{config.terms}'; choose one of {', '.join(TERMS)}.")
    if config.reference not in REFERENCES:
        raise SlipstreamError(
            f"{node}: there is no reference '{config.reference}'; choose one of {', '.join(REFERENCES)}."
        )
    return config
