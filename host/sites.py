"""Where a run meets the model: the whole model's output, through the host's public wrappers.

Two levels. NETWORK is the raw output of the diffusion model; where a model's forward never calls the DIFFUSION_MODEL
wrappers, SLOPE takes the same quantity from the next level up, (x - denoised) / sigma around APPLY_MODEL. Which of the
two a model has is seen at the first computed evaluation, so no list of models can go stale. DENOISED is for samplers
that add noise: there the prediction of the clean latent at equal state is the only thing that stays put.
"""

from __future__ import annotations

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..engine.history import parts_of

KEY = "slipstream"

NETWORK = "network output"
SLOPE = "slope at the model boundary"
DENOISED = "denoised prediction"


def attach(run, guider) -> None:
    """Add the run's wrappers to the guider's own model options, which live as long as this sampling."""
    wrappers = {
        WrappersMP.PREDICT_NOISE: lambda executor, *a, **k: _evaluation(run, executor, a, k),
        WrappersMP.CALC_COND_BATCH: lambda executor, *a, **k: _conditioning(run, executor, a, k),
        WrappersMP.APPLY_MODEL: lambda executor, *a, **k: _apply_model(run, executor, a, k),
        WrappersMP.DIFFUSION_MODEL: lambda executor, *a, **k: _diffusion_model(run, executor, a, k),
    }
    for kind, wrapper in wrappers.items():
        add_wrapper_with_key(kind, KEY, wrapper, guider.model_options, is_model_options=True)


def transformer_options(args: tuple, kwargs: dict) -> dict | None:
    """The options dict among a forward's arguments: its position differs by model, its `sigmas` entry does not."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, dict) and "sigmas" in value:
            return value
    return None


def _evaluation(run, executor, args, kwargs):
    x, sigma = args[0], args[1]
    sampling = executor.class_obj.inner_model.model_sampling
    run.begin(float(sigma.reshape(-1)[0]), sampling.calculate_input(sigma, x) if run.needs_input else None)
    try:
        result = executor(*args, **kwargs)
    except BaseException:
        run.abandon()
        raise
    run.end()
    return result


def _conditioning(run, executor, args, kwargs):
    run.conditioning(args[1], float(args[3].reshape(-1)[0]))
    return executor(*args, **kwargs)


def _diffusion_model(run, executor, args, kwargs):
    if run.level not in (None, NETWORK):
        return executor(*args, **kwargs)
    options = transformer_options(args, kwargs)
    first = parts_of(args[0])[0]
    keys = None if options is None else run.keys(options, first)
    if keys is None:
        return executor(*args, **kwargs)
    run.level = NETWORK
    filled = run.fill(keys)
    if filled is not None:
        parts = [torch.cat(column) for column in zip(*filled, strict=True)]
        return parts[0] if run.form is None else run.form(parts)
    output = executor(*args, **kwargs)
    run.form = None if torch.is_tensor(output) else type(output)
    run.keep(keys, _split(parts_of(output), len(keys)))
    return output


def _apply_model(run, executor, args, kwargs):
    if run.level == NETWORK:
        return executor(*args, **kwargs)
    x, sigma, options = args[0], args[1], transformer_options(args, kwargs)
    if run.level is None:
        denoised = executor(*args, **kwargs)
        if run.level is not None:
            return denoised
        run.level = SLOPE
        keys = None if options is None else run.keys(options, x)
    else:
        keys = None if options is None else run.keys(options, x)
        filled = None if keys is None else run.fill(keys)
        if filled is not None:
            value = torch.cat([parts[0] for parts in filled])
            return value if run.level == DENOISED else x - _per_row(sigma, x) * value
        denoised = executor(*args, **kwargs)
    if keys is not None:
        value = denoised if run.level == DENOISED else (x - denoised) / _per_row(sigma, x)
        run.keep(keys, _split((value,), len(keys)))
    return denoised


def _per_row(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.clamp_min(1e-6).reshape(-1, *[1] * (x.ndim - 1))  # a slope at sigma 0 would be 0 / 0


def _split(parts: tuple[Tensor, ...], count: int) -> list[tuple[Tensor, ...]]:
    """Cut a batch of `count` conds into one tuple of tensors per cond."""
    return list(zip(*(part.chunk(count) for part in parts), strict=True))
