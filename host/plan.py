"""What the nodes ask for: an immutable plan, checked when it is made, and what each of its choices stands for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..engine.predictors import Predictor
from ..engine.schedules import AccumulatedChange, DriftBudget, Interval, Schedule
from .errors import SlipstreamError
from .sampling import Sampler


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The Cache Loader's part.

    drift_budget: relative L1 of the output, 0 skips nothing; start and end percent: the part of the sampling in which
    evaluations may be filled, as the host counts it; max_skip: steps filled in a row, at most.
    """

    preset: str = "Balanced"
    method: str = "auto"
    drift_budget: float = 0.10
    start_percent: float = 0.0
    end_percent: float = 1.0
    max_skip: int = 6
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """The Taylor Predictor's part. order -1 means automatic."""

    kind: str = "Taylor"
    order: int = -1
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All parts that the nodes on one MODEL wire have added; None means the node is not there."""

    cache: CacheConfig | None = None
    predictor: PredictorConfig | None = None

    @property
    def node_ids(self) -> tuple[str, ...]:
        return tuple(part.node_id for part in (self.cache, self.predictor) if part is not None and part.node_id)

    def as_json(self) -> dict:
        """The plan as plain JSON data, without the parts that are not there."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: dict) -> Plan:
        """The inverse of `as_json`; unknown parts and values raise SlipstreamError."""
        kinds = {"cache": CacheConfig, "predictor": PredictorConfig}
        try:
            return cls(**{key: kinds[key](**value) for key, value in data.items()})
        except (KeyError, TypeError) as error:
            raise SlipstreamError(f"Slipstream plan: {error} is not known to this version; update the pack.") from None


# What a preset sets; Custom takes the node's own values, Off counts and times without skipping anything.
# Source of the numbers: `bench/fidelity.py` on the trained small Flux, 28 euler steps (README, table).
PRESETS: dict[str, dict] = {
    "Balanced": {"method": "auto", "drift_budget": 0.10, "start_percent": 0.0, "end_percent": 1.0, "max_skip": 6},
    "Safe": {"method": "auto", "drift_budget": 0.05, "start_percent": 0.0, "end_percent": 1.0, "max_skip": 4},
    "Fast": {"method": "auto", "drift_budget": 0.20, "start_percent": 0.0, "end_percent": 1.0, "max_skip": 6},
    "Custom": {},
    "Off": {"drift_budget": 0.0},
}

# Plain reuse errs the same way at every step it fills, so its errors add up: presets give it this share of the budget.
# With it a Cache Loader alone is about as good as fewer steps at equal evaluations; with the whole budget it was worse.
REUSE_SHARE = 0.5

METHODS = ("auto", "drift budget", "interval", "accumulated change")
KINDS = {"Taylor": "newton", "TaylorSeer": "taylorseer", "Reuse": "reuse"}


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
            raise SlipstreamError(f"{node}: {name} is {value}, but it must be between 0 and 1.")
    if config.start_percent >= config.end_percent:
        raise SlipstreamError(
            f"{node}: start_percent {config.start_percent} is not before end_percent {config.end_percent}; "
            "set the start lower or the end higher."
        )
    if not 1 <= config.max_skip <= 20:
        raise SlipstreamError(f"{node}: max_skip is {config.max_skip}, but it must be between 1 and 20; try 6.")
    return dataclasses.replace(config, **PRESETS[config.preset])


def check_predictor(config: PredictorConfig) -> PredictorConfig:
    """Return the config, or raise SlipstreamError."""
    node = "Taylor Predictor"
    if config.kind not in KINDS:
        raise SlipstreamError(f"{node}: there is no kind '{config.kind}'; choose one of {', '.join(KINDS)}.")
    if config.order not in (-1, 0, 1, 2):
        raise SlipstreamError(f"{node}: order is {config.order}, but it must be -1 (automatic), 0, 1 or 2.")
    return config


def schedule_for(cache: CacheConfig) -> Schedule | None:
    """The schedule a checked config asks for; None where nothing may be skipped."""
    if cache.drift_budget <= 0.0:
        return None
    if cache.method == "interval":
        return Interval(cache.max_skip + 1)
    if cache.method == "accumulated change":
        return AccumulatedChange(cache.drift_budget)
    return DriftBudget(cache.drift_budget)


def predictor_for(config: PredictorConfig | None, sampler: Sampler) -> Predictor:
    """The predictor for a run: without a Taylor Predictor, and for samplers that add noise, plain reuse.

    With fresh noise between steps reuse beat every extrapolation tried (research on analytic flows, 8.7).
    """
    if config is None or sampler.stochastic or config.kind == "Reuse" or config.order == 0:
        return Predictor("reuse", 0)
    return Predictor(KINDS[config.kind], 1 if config.order < 0 else config.order)


def resolve(plan: Plan, sampler: Sampler) -> CacheConfig:
    """The cache part in force: a Taylor Predictor alone implies Balanced, and reuse gets its smaller preset budget."""
    cache = plan.cache or check_cache(CacheConfig())
    if cache.preset != "Custom" and not sampler.stochastic and predictor_for(plan.predictor, sampler).order == 0:
        return dataclasses.replace(cache, drift_budget=cache.drift_budget * REUSE_SHARE)
    return cache
