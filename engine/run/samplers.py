"""The sigma grid of a run, its step coordinate, and what is known about the host's samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """Maps sigma to the continuous step coordinate u: u = i at sigmas[i], linear between.

    sigmas: the schedule the sampler was given, strictly decreasing but for repeats, N + 1 values for N steps.
    """

    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def decreasing(self) -> bool:
        """Whether u is defined: at least one step, and sigma never rises (a restart schedule does)."""
        pairs = list(zip(self.sigmas, self.sigmas[1:], strict=False))
        return bool(pairs) and all(a >= b for a, b in pairs) and self.sigmas[0] > self.sigmas[-1]

    def weights(self) -> tuple[float, ...]:
        """What an error in a noise prediction does at each step, relative to the mean step; sigma variance exploding.

        The sampler multiplies it by the step in sigma; at noise level sigma the latent is of size sqrt(1 + sigma^2).
        """
        pairs = zip(self.sigmas, self.sigmas[1:], strict=False)
        effects = [(a - b) / (1.0 + a * a) ** 0.5 for a, b in pairs]
        mean = sum(effects) / max(len(effects), 1)
        return tuple(e / mean for e in effects) if mean > 0 else ()

    def u(self, sigma: float) -> float:
        """Step coordinate of sigma; beyond both ends the first or last interval is continued.

        No value is looked up by equality: samplers round, add churn and evaluate between the grid points.
        """
        last = self.steps - 1
        for i in range(self.steps):
            high, low = self.sigmas[i], self.sigmas[i + 1]
            if high > low and (sigma > low or i == last):
                return i + (high - sigma) / (high - low)
        high, low = next((a, b) for a, b in reversed(list(zip(self.sigmas, self.sigmas[1:], strict=False))) if a > b)
        return last + (high - sigma) / (high - low)


@dataclass(frozen=True, slots=True)
class Sampler:
    """What matters about a sampler: does it add noise between steps, and can a forecast serve it at all?

    evaluations: of the model in one step, at most; first_order: a step uses the newest output only, once.
    """

    name: str
    stochastic: bool = False
    unserved: str = ""
    evaluations: int = 1
    first_order: bool = False


# Part of the name -> adds fresh noise at every step (unless eta or s_noise is 0).
NOISY = ("ancestral", "sde", "lcm", "ddpm", "seeds_", "sa_solver")

# These choose their steps from the outputs or do not follow the schedule, so no step coordinate fits them.
UNSERVED = {
    "dpm_adaptive": "it chooses its own steps from the outputs, and a forecast would mislead that choice",
    "dpm_fast": "it spends its evaluations on a few large steps of its own, and none of them is spare",
}

# Evaluations per step, where it is not 1 (read in the host's k-diffusion and extra samplers).
MANY = {
    "heun": 2, "heunpp2": 3, "dpm_2": 2, "dpm_2_ancestral": 2, "dpmpp_2s_ancestral": 2, "dpmpp_sde": 2, "seeds_2": 2,
    "seeds_3": 3, "sa_solver_pece": 2, "res_2s": 2, "exp_heun_2_x0": 2, "exp_heun_2_x0_sde": 2,
}  # fmt: skip
FIRST_ORDER = ("euler", "ddim")


def sampler_traits(sampler: object) -> Sampler:
    """Describe the host's sampler object by the name of its function and its options."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    name = name.removeprefix("sample_").removesuffix("_function")
    options = getattr(sampler, "extra_options", None) or {}
    noisy = any(part in name for part in NOISY) and 0.0 not in (options.get("eta"), options.get("s_noise"))
    churned = float(options.get("s_churn") or 0.0) > 0.0
    evaluations = MANY.get(name.removesuffix("_gpu").removesuffix("_cfg_pp"), 1)
    return Sampler(name, noisy or churned, UNSERVED.get(name, ""), evaluations, name in FIRST_ORDER)


def active_conditioning(conds: Sequence[Sequence[dict] | None], sigma: float) -> tuple:
    """What is switched on at this sigma: (cond index, uuid, controls in range, hooks) of every conditioning in range.

    conds: the lists the host evaluates together (positive, negative, ...). When this changes between two evaluations
    (prompt schedules, ControlNet ranges, LoRA hooks, a negative that appears) a forecast from before it is void.
    """
    active = []
    for index, group in enumerate(conds):
        for cond in group or ():
            start, end = cond.get("timestep_start"), cond.get("timestep_end")
            if (start is not None and sigma > float(start)) or (end is not None and sigma < float(end)):
                continue
            controls = []
            control = cond.get("control")
            while control is not None:
                reach = getattr(control, "timestep_range", None)
                controls.append(reach is None or reach[0] >= sigma >= reach[1])
                control = getattr(control, "previous_controlnet", None)
            active.append((index, cond.get("uuid"), tuple(controls), _hooked(cond.get("hooks"), sigma)))
    return tuple(active)


def _hooked(hooks, sigma: float) -> tuple:
    """What the hooks of a conditioning do at sigma: (keyframes reached, strength in force) of each."""
    found = []
    for hook in getattr(hooks, "hooks", ()):
        group = getattr(hook, "hook_keyframe", None)
        reached = sum(frame.start_t >= sigma for frame in getattr(group, "keyframes", ()))
        found.append((reached, getattr(group, "strength", 1.0)))
    return tuple(found)
