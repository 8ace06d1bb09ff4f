"""A span of a run on another server as a sampler sees it: from its own state at one noise level to that at another."""

from __future__ import annotations

from collections.abc import Callable

import comfy.sample
import torch
from slipstream.engine.errors import SlipstreamError
from slipstream.host.remote.graph import Part
from slipstream.host.remote.http import NODE
from torch import Tensor


def sample_span(
    segment, x: Tensor | None, sigmas: Tensor, *, local, positive: str, negative: str, cfg: float, sampler: str,
    seed: int, latent_image: Tensor | None = None, tell: Callable | None = None,
) -> tuple[Tensor, object]:  # fmt: skip
    """`RemoteSegment.sample` in the sampler's own coordinates of `local`: x at sigmas[0] -> x at sigmas[-1].

    x None starts from the noise of `seed` over latent_image, as the host's samplers do at their first step; both
    ends make that noise themselves. latent_image: LATENT samples. At sigma 0 x is the denoised latent.
    """
    base, space = local.model, local.get_model_object("model_sampling")
    part = Part(positive, negative, cfg, sampler, tuple(sigmas.tolist()), seed, x is None)
    if x is None:
        given = comfy.sample.fix_empty_latent_channels(local, latent_image)
    else:
        given = base.process_latent_out(space.inverse_noise_scaling(sigmas[0], x.float()))
    if not torch.isfinite(given).all():
        raise SlipstreamError(
            f"{NODE}: at sigma {float(sigmas[0]):.4g} this model's latent is nothing but noise and cannot be "
            "handed over; begin the segment a step later, or at the first step."
        )
    done, report = segment.sample(given, part, local, tell)
    done = base.process_latent_in(done.to(given.device))
    last = sigmas[-1].to(done)
    return (space.noise_scaling(last, torch.zeros_like(done), done) if last > 0 else done), report
