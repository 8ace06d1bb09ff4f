"""What is known about the host's samplers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampler:
    """What matters about a sampler: does it add noise between steps, and can a forecast serve it at all?

    evaluations: of the model in one step, at most; first_order: a step uses the newest output only, once; remembers: a
    step uses the outputs of steps before.
    """

    name: str
    stochastic: bool = False
    unserved: str = ""
    evaluations: int = 1
    first_order: bool = False
    remembers: bool = False


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
# Parts of the names of samplers that use the steps before.
REMEMBERING = ("2m", "3m", "lms", "ipndm", "deis", "unipc", "res_multistep", "gradient", "er_sde", "sa_solver")
FIRST_ORDER = ("euler",)  # the host builds euler for ddim


def sampler_traits(sampler: object) -> Sampler:
    """Describe the host's sampler object by the name of its function and its options."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    name = name.removeprefix("sample_").removesuffix("_function")
    options = getattr(sampler, "extra_options", None) or {}
    noisy = any(part in name for part in NOISY) and 0.0 not in (options.get("eta"), options.get("s_noise"))
    churned = float(options.get("s_churn") or 0.0) > 0.0
    evaluations = MANY.get(name.removesuffix("_gpu").removesuffix("_cfg_pp"), 1)
    remembers = any(part in name for part in REMEMBERING)
    return Sampler(name, noisy or churned, UNSERVED.get(name, ""), evaluations, name in FIRST_ORDER, remembers)
