"""Where a run meets the model, through the host's public wrappers.

The levels inside a network have files of their own in the engine. The whole model's output has two. NETWORK is the raw
output of the diffusion model; where a model's forward never calls the DIFFUSION_MODEL wrappers, SLOPE takes the same
quantity from the next level up, (x - denoised) / sigma around APPLY_MODEL. Which of the two a model has is seen at the
first computed evaluation, so no list of models can go stale. DENOISED is for samplers that add noise: there the
prediction of the clean latent at equal state is the only thing that stays put.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..engine.families import architecture_of
from ..engine.forecast.history import parts_of
from ..engine.forecast.schedules import Probe
from ..engine.sites.calls import CURRENT, split
from ..engine.sites.inner import INNER
from ..engine.sites.levels import DENOISED, ENCODER, LEVELS, MODEL_OUTPUT, NETWORK, SLOPE
from ..engine.sites.stack import BlockCall
from ..engine.sites.unet import EncoderCall, decode_ahead, own_control
from .parts import RUN
from .prior_noise import inject_prior_noise


def attach(run, guider, network) -> None:
    """Add the run's wrappers to the guider's own model options, which live as long as this sampling."""
    wrappers = {
        WrappersMP.PREDICT_NOISE: lambda executor, *a, **k: _evaluation(run, executor, a, k),
        WrappersMP.CALC_COND_BATCH: lambda executor, *a, **k: _conditioning(run, executor, a, k),
    }
    if run.note or run.recipe.level == MODEL_OUTPUT:
        if run.sampler.stochastic:
            run.level = DENOISED
        wrappers[WrappersMP.APPLY_MODEL] = lambda executor, *a, **k: _apply_model(run, executor, a, k)
        wrappers[WrappersMP.DIFFUSION_MODEL] = lambda executor, *a, **k: _diffusion_model(run, executor, a, k)
    else:
        level, row = run.recipe.level, architecture_of(network)
        run.inner = INNER[level].site(run, network, row, run.recipe.first, level)
        run.inner.attach(guider.model_options["transformer_options"])
        wrappers[WrappersMP.APPLY_MODEL] = lambda executor, *a, **k: _inner_call(run, executor, a, k)
        if LEVELS[level].unet:
            wrappers[WrappersMP.DIFFUSION_MODEL] = lambda executor, *a, **k: _unet(executor, a, k)
        if level == ENCODER and run.given.cache.prior_noise:
            wrappers[WrappersMP.SAMPLER_SAMPLE] = lambda executor, *a, **k: inject_prior_noise(run, executor, a, k)
    if run.compensator is not None:
        wrappers[WrappersMP.APPLY_MODEL] = run.compensator.within(wrappers[WrappersMP.APPLY_MODEL])
    for kind, wrapper in wrappers.items():
        add_wrapper_with_key(kind, RUN, wrapper, guider.model_options, is_model_options=True)


@contextmanager
def watching(run, network):
    """Read the input of block 0's first layer while the run lasts, where its gate looks at that.

    A forward pre-hook, because it can neither change what runs nor stay behind on the patcher.
    """
    path = architecture_of(network).modulated
    if run.probe is not Probe.MODULATED or run.note or path is None:
        yield
        return
    handle = network.get_submodule(path).register_forward_pre_hook(_see_modulated)
    try:
        yield
    finally:
        handle.remove()


def _see_modulated(module, args) -> None:
    call = CURRENT.get()
    if isinstance(call, BlockCall) and args:
        call.modulated = args[0].detach().clone()


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
    if run.recorder is not None and torch.is_tensor(x):
        disturbance = run.recorder.disturbance(x, float(sigma.reshape(-1)[0]), result)
        if disturbance is not None:
            # the run's evaluation is closed, so this one is nobody's snapshot
            run.recorder.grown(disturbance, executor(x + disturbance, *args[1:], **kwargs) - result)
    if run.compensator is not None and torch.is_tensor(x):
        result = run.compensator.correct(run.evaluations, executor, args, kwargs, result)
    return result


def _conditioning(run, executor, args, kwargs):
    run.conditioning(args[1], float(args[3].reshape(-1)[0]))
    return executor(*args, **kwargs)


def _inner_call(run, executor, args, kwargs):
    """One run of the network whose layers are met by an inner site."""
    options = transformer_options(args, kwargs)
    keys = None if options is None or run.note else run.keys(options, parts_of(args[0])[0])
    if keys is None:
        return executor(*args, **kwargs)
    token = CURRENT.set(run.inner.call(keys))
    try:
        return executor(*args, **kwargs)
    finally:
        CURRENT.reset(token)


def _unet(executor, args, kwargs):
    call = CURRENT.get()
    if call is None:
        return executor(*args, **kwargs)
    args, kwargs, call.control = own_control(args, kwargs)
    options = transformer_options(args, kwargs)
    if isinstance(call, EncoderCall) and options is not None:
        output = decode_ahead(call, executor, args, kwargs, options)
        if output is not None:
            return output
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
        if run.recipe.residual:
            parts = [part + _latent(x, part) for part, x in zip(parts, parts_of(args[0]), strict=False)]
        return parts[0] if run.form is None else run.form(parts)
    output = executor(*args, **kwargs)
    run.form = None if torch.is_tensor(output) else type(output)
    parts, base = parts_of(output), None
    if run.recipe.residual:
        latents = tuple(_latent(x, part) for part, x in zip(parts, parts_of(args[0]), strict=False))
        parts = tuple(part - x for part, x in zip(parts, latents, strict=True))
        base = split(latents, len(keys))
    run.keep(keys, split(parts, len(keys)), base=base)
    return output


def _latent(x: Tensor, output: Tensor) -> Tensor:
    """The channels of the network's input that its output answers to; image-to-video models are given more."""
    return x[:, : output.shape[1]]


def _apply_model(run, executor, args, kwargs):
    if run.level == NETWORK:
        return executor(*args, **kwargs)
    x, sigma, options = args[0], args[1], transformer_options(args, kwargs)
    if run.level is None:
        denoised = executor(*args, **kwargs)
        if run.level == NETWORK:
            return denoised
        run.level = SLOPE  # a call on another card, in its own thread, may have found the same
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
        run.keep(keys, split((value,), len(keys)))
    return denoised


def _per_row(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.clamp_min(1e-6).reshape(-1, *[1] * (x.ndim - 1))  # a slope at sigma 0 would be 0 / 0
