"""From a plan to what one run does: every `auto` is decided here, for one model family and one sampler."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..calibration.profile import Profile, ProfileError
from ..families import Architecture
from ..forecast.predictors import HERMITE_SCALE, KINDS, RULES, Predictor
from ..forecast.schedules import (
    AccumulatedChange,
    BlockMask,
    ConfidenceGate,
    DriftBudget,
    FirstBlockGate,
    Interval,
    KeySteps,
    Magnitude,
    ModulatedChange,
    Probe,
    Schedule,
    fitted_ratios,
    power_grid,
    scaled_keys,
)
from ..sites.levels import DEPTH, EACH, FEATURES, LEVELS, MODEL_OUTPUT, OFFERED, STACK
from .plan import CacheConfig, Plan, PredictorConfig, check_cache
from .samplers import Sampler

# Plain reuse errs the same way at every step it fills, so its errors add up: presets give it this share of the budget.
# With it a Cache Loader alone is about as good as fewer steps at equal evaluations; with the whole budget it was worse.
REUSE_SHARE = 0.5

# Authors' numbers where a family has none of its own: DeepCache's interval (SDXL), its power grid (SD1.5, of 50 steps),
# Faster Diffusion's key steps (of 50). Steps filled in a row: the most that MagCache publishes.
DEEPCACHE_INTERVAL = 3
POWER_GRID_EVERY, POWER_GRID_POWER, POWER_GRID_CENTRE = 5, 1.4, 0.3
FASTER_DIFFUSION_KEYS, FASTER_DIFFUSION_STEPS = (0, 1, 2, 3, 5, 10, 15, 25, 35), 50
MAX_SKIP = 6

REUSED_BLOCKS = "blocks are reused, not forecast, so the Taylor Predictor does nothing here"

# In the order of a row's `budgets`.
PRESET_NAMES = ("Safe", "Balanced", "Fast")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run does.

    refusal: why it skips nothing, empty where it may; chose: one line for the node; batch_dim: where the pictures of a
    batch are in what is stored.
    """

    level: str
    first: int
    schedule: Schedule | None
    predictor: Predictor
    cache: CacheConfig
    residual: bool = False
    refusal: str = ""
    remark: str = ""
    family: str = ""
    method: str = ""
    kind: str = ""
    batch_dim: int = 0

    @property
    def chose(self) -> str:
        """Site, schedule and predictor in a few words."""
        what = self.kind if not self.predictor.order else f"{self.kind} {self.predictor.order}"
        if self.schedule is None:
            return ""
        numbers = (getattr(self.schedule, name, None) for name in ("budget", "every", "threshold"))
        number = next((f" {value:g}" for value in numbers if value is not None), "")
        return f"{self.level}{LEVELS[self.level].place.format(self.first)}, {self.method}{number}, {what}"


def level_of(
    cache: CacheConfig, predictor: PredictorConfig | None, row: Architecture, profile: Profile | None = None
) -> str:
    """The site that a plan and its profile mean on this family; a method's inner site only where the family has it."""
    if cache.site != "auto":
        return OFFERED[cache.site]
    if profile is not None and (profile.blocks is not None or profile.site == EACH):
        return EACH
    if profile is not None and profile.site in OFFERED.values():
        return profile.site
    per_token = predictor is not None and KINDS[predictor.kind].per_token
    if row.unet and cache.method in ("power grid", "first-block gate", "confidence gate"):
        return DEPTH
    if row.stacks and (per_token or cache.method == "confidence gate"):
        return FEATURES
    if row.stacks and cache.method in ("first-block gate", "modulated change", "magnitude"):
        return STACK
    return OFFERED[row.site]


def lacks(level: str, row: Architecture) -> str:
    """Why this family has no such site; empty where it has."""
    if LEVELS[level].blocks and not row.stacks:
        return f"the site '{level}' needs a transformer that Slipstream knows, and this is a {row.name}"
    if LEVELS[level].unet and not row.unet:
        return f"the site '{level}' needs a U-Net, and this is a {row.name}"
    return ""


def resolve(
    plan: Plan,
    sampler: Sampler,
    row: Architecture,
    sigmas: tuple[float, ...],
    weights: tuple[float, ...] = (),
    profile: Profile | None = None,
    model: str = "",
    blocks: int = 0,
) -> Recipe:
    """The recipe of one run. Never raises for a plan that was checked: what cannot be served is refused in words.

    sigmas: of the run; weights: of its steps, for the drift budget (`Clock.weights`); profile: the plan's, read; model:
    the fingerprint of the run's model, where there is a profile to compare it with; blocks: how many it has.
    """
    steps = len(sigmas) - 1
    cache = plan.cache or check_cache(CacheConfig())
    level = level_of(cache, plan.predictor, row, profile)
    refusal = lacks(level, row)
    predictor, kind, trouble = _predictor(plan.predictor, sampler, level, steps)
    refusal = refusal or trouble
    cache = _budget(cache, row, predictor, sampler)
    method = cache.method
    remark = ""
    if method == "auto":
        method = LEVELS[level].method or row.method
    schedule, trouble = _schedule(method, cache, level, row, steps, weights)
    if profile is not None:
        method = f"profile {cache.profile.removesuffix('.safetensors')}"
        schedule, trouble, remark = _profiled(profile, sigmas, level, predictor, cache, model, blocks)
        if level == EACH and schedule is not None and plan.predictor is not None and plan.predictor.kind != "Reuse":
            remark = "; ".join(filter(None, (REUSED_BLOCKS, remark)))
    elif trouble and cache.site == "auto":
        remark = f"{trouble}, so the drift budget decides"
        method = "drift budget"
        schedule, trouble = _schedule(method, cache, level, row, steps, weights)
    refusal = refusal or trouble
    if predictor.per_token and schedule is not None and schedule.probe in (Probe.MODULATED, Probe.EMBEDDING):
        refusal = refusal or "the per-token predictor needs another gate than TeaCache's; choose the first-block gate"
    if level == MODEL_OUTPUT and row.name == "unknown model" and not remark:
        remark = "this model is not in Slipstream's table, so its whole output is cached"
    needs_block = predictor.per_token or (schedule is not None and schedule.probe is not None)
    first = cache.depth if cache.depth >= 0 else LEVELS[level].first
    if needs_block and LEVELS[level].tokens:
        first = max(first, 1)
    residual = plan.predictor is not None and KINDS[plan.predictor.kind].residual and not sampler.stochastic
    return Recipe(
        level, first, schedule, predictor, cache, residual and level == MODEL_OUTPUT, refusal, remark, row.name,
        method, kind, row.batch_dim if LEVELS[level].blocks else 0,
    )  # fmt: skip


def described(predictor: Predictor) -> str:
    """A predictor as a profile names it: two of one name make the same forecasts."""
    scale = f" scale {predictor.scale:g}" if RULES[predictor.rule].scaled else ""
    return f"{predictor.rule} {predictor.order}{scale}{' per token' * predictor.per_token}"


def _profiled(
    profile: Profile,
    sigmas: tuple[float, ...],
    level: str,
    predictor: Predictor,
    cache: CacheConfig,
    model: str,
    blocks: int,
) -> tuple[Schedule | None, str, str]:
    """(the profile's schedule for this run, why it does not fit, what to know about it)."""
    try:
        keys = profile.keys_for(sigmas)
        mask = _mask(profile, sigmas, level, blocks)
    except ProfileError as error:
        return None, f"the profile {cache.profile} does not fit, {error}", ""
    if cache.drift_budget <= 0.0:
        return None, "", ""
    known = []
    if profile.model and model and profile.model != model:
        known.append("it was measured on another model")
    if profile.site and profile.site != level:
        known.append(f"it was measured at the {profile.site}")
    if profile.predictor and profile.predictor != described(predictor):
        known.append(f"it was solved for another predictor ({profile.predictor})")
    remark = f"profile {cache.profile}: {' and '.join(known)}; calibrate again for the best result" if known else ""
    return mask or KeySteps(keys, trusted=not known), "", remark


def _mask(profile: Profile, sigmas: tuple[float, ...], level: str, blocks: int) -> BlockMask | None:
    """The profile's table of blocks, a row for every step of this run; None at other sites. Raises ProfileError."""
    table = profile.blocks
    if level != EACH:
        if table is not None:
            raise ProfileError(f"it skips single blocks, not the {level}; set site to auto")
        return None
    if table is None:
        raise ProfileError("it has no table of blocks; calibrate again")
    if table.shape[1] != blocks:
        raise ProfileError(f"its table is for {table.shape[1]} blocks, and this model has {blocks}")
    rows = table.tolist()
    return BlockMask(tuple(tuple(rows[i]) for i in profile.rows_for(sigmas)))


def _budget(cache: CacheConfig, row: Architecture, predictor: Predictor, sampler: Sampler) -> CacheConfig:
    """A preset's budget for this family; reuse gets its smaller share of it."""
    if cache.preset == "Custom" or not cache.drift_budget:
        return cache
    budget = cache.drift_budget
    if row.budgets is not None and cache.preset in PRESET_NAMES:
        budget = row.budgets[PRESET_NAMES.index(cache.preset)]
    if predictor.order == 0 and not sampler.stochastic:
        budget *= REUSE_SHARE
    return dataclasses.replace(cache, drift_budget=budget)


def _predictor(config: PredictorConfig | None, sampler: Sampler, level: str, steps: int) -> tuple[Predictor, str, str]:
    """(predictor, its kind in words, why it cannot be served).

    Without a Taylor Predictor, and for samplers that add noise, plain reuse: with fresh noise between steps reuse beat
    every extrapolation tried (research on analytic flows, 8.7).
    """
    reuse = Predictor("reuse", 0)
    if config is None or sampler.stochastic or not LEVELS[level].forecast or config.order == 0:
        return reuse, "reuse", ""
    kind = KINDS[config.kind]
    order = min(kind.order if config.order < 0 else config.order, RULES[kind.rule].most)
    if not order:
        return reuse, config.kind.lower(), ""
    trouble = ""
    if kind.first_order and (not sampler.first_order or level != MODEL_OUTPUT):
        trouble = (
            f"{config.kind} serves first-order samplers such as euler at the model output, not {sampler.name} at the "
            f"{level}; choose Taylor"
        )
    if kind.per_token and not LEVELS[level].tokens:
        trouble = "the per-token predictor needs the blocks of a transformer; choose Taylor"
    scale = config.scale if RULES[kind.rule].scaled else HERMITE_SCALE
    return Predictor(kind.rule, order, scale, steps, kind.per_token), config.kind, trouble


def _schedule(
    method: str, cache: CacheConfig, level: str, row: Architecture, steps: int, weights: tuple[float, ...]
) -> tuple[Schedule | None, str]:
    """(schedule, why the family cannot be served by this method). None skips nothing."""
    if cache.drift_budget <= 0.0:
        return None, ""
    published, inner, gated = row.published, LEVELS[level].tokens, LEVELS[level].gated
    every = cache.max_skip + 1 if cache.max_skip else 0
    if method == "drift budget":
        return DriftBudget(cache.drift_budget, weights), ""
    if method == "accumulated change":
        return AccumulatedChange(cache.threshold or cache.drift_budget), ""
    if method == "interval":
        return Interval(every or (DEEPCACHE_INTERVAL if row.unet else published.taylor[0])), ""
    if method == "power grid":
        return KeySteps(_power_grid(steps, every or POWER_GRID_EVERY)), ""
    if method == "key steps":
        return KeySteps(scaled_keys(FASTER_DIFFUSION_KEYS, FASTER_DIFFUSION_STEPS, steps)), ""
    if method == "first-block gate" and gated:
        return FirstBlockGate(cache.threshold or published.first_block), ""
    if method == "confidence gate" and gated:
        threshold, order = published.confidence
        return ConfidenceGate(cache.threshold or threshold, order=order), ""
    if method == "modulated change" and inner and published.teacache is not None:
        threshold, probe, polynomial = published.teacache
        what = Probe.MODULATED if probe == "modulated" else Probe.EMBEDDING
        if what == Probe.EMBEDDING or row.modulated is not None:
            return ModulatedChange(cache.threshold or threshold, polynomial, what), ""
    if method == "magnitude" and inner and published.magcache is not None:
        threshold, retention, most, ratios = published.magcache
        table = fitted_ratios(ratios, steps)
        return Magnitude(cache.threshold or threshold, table, retention, min(cache.max_skip or most, most)), ""
    return None, f"the method '{method}' has no settings for this {row.name} at the {level}"


def _power_grid(steps: int, every: int) -> tuple[int, ...]:
    try:
        return power_grid(steps, every, POWER_GRID_POWER, round(POWER_GRID_CENTRE * steps))
    except ValueError:
        return tuple(range(0, steps, every))
