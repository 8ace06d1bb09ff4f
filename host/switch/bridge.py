"""What two of the host's models must share to work in one run, and the sentence where they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import comfy.model_sampling as sampling
from comfy.model_patcher import ModelPatcher

from ...engine.coordinates import FLOW, VARIANCE_EXPLODING, Coordinates, level_in
from ...engine.errors import SlipstreamError
from ...engine.families import architecture_of
from .segments import NODE

# Kinds of prediction that go from one picture to another, or are scaled in a way of their own; hosts know some of them.
_OTHERS = tuple(
    getattr(sampling, name)
    for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM")
    if hasattr(sampling, name)
)

# A noise level may be above a model's largest by rounding, and by as much as nobody sees.
RANGE = 1.01


def name_of(patcher) -> str:
    """What messages call a model: its family in the host."""
    return type(patcher.model.model_config).__name__


def names(first, second) -> tuple[str, str]:
    """Both names, told apart where they are one."""
    a, b = name_of(first), name_of(second)
    return (a, b) if a != b else (f"{a} (first)", f"{b} (second)")


def check_latents(first, second) -> None:
    """Raise SlipstreamError where one model's latents are not the other's."""
    a, b = (type(p.get_model_object("latent_format")) for p in (first, second))
    if a is not b:
        one, two = names(first, second)
        raise SlipstreamError(
            f"{NODE}: {one} and {two} have different latents ({a.__name__}, {b.__name__}), so neither can continue the "
            "other's picture; choose two models of one latent space."
        )


def coordinates_of(patcher) -> Coordinates | str:
    """The noise coordinates of a model; for one that has others, the name of its kind of prediction."""
    kind = patcher.get_model_object("model_sampling")
    other = next((c.__name__ for c in type(kind).__mro__ if c in _OTHERS), None)
    if other is not None:
        return other
    if float(getattr(kind, "audio_scale", 1.0)) != 1.0:
        return f"{type(kind).__name__} with audio at {kind.audio_scale:g}"
    if isinstance(kind, sampling.CONST):
        scale = float(getattr(kind, "noise_scale", 1.0))
        return Coordinates(True, scale) if scale != 1.0 else FLOW
    if isinstance(kind, sampling.EPS | sampling.COSMOS_RFLOW):
        return VARIANCE_EXPLODING
    return next((c.__name__ for c in type(kind).__mro__[1:] if not hasattr(c, "parameters")), type(kind).__name__)


def bridge(first, second) -> tuple[Coordinates, Coordinates]:
    """The coordinates of both models, or SlipstreamError where there is no way from one to the other.

    Two models with one and the same unknown kind need none: they get equal coordinates.
    """
    a, b = coordinates_of(first), coordinates_of(second)
    if isinstance(a, Coordinates) and isinstance(b, Coordinates):
        if a != b and first.model is second.model:
            raise SlipstreamError(
                f"{NODE}: {name_of(first)} and its own clone count noise in different ways; load the checkpoint a "
                "second time, or take the sampling node off one of the two."
            )
        return a, b
    if a == b:
        return VARIANCE_EXPLODING, VARIANCE_EXPLODING
    one, two = names(first, second)
    told = [x if isinstance(x, str) else "flow" if x.flow else "variance exploding" for x in (a, b)]
    raise SlipstreamError(
        f"{NODE}: {one} and {two} count noise in ways that cannot be exchanged ({told[0]}, {told[1]}); choose two "
        "models of one kind, or two that predict noise, velocity or a flow."
    )


def check_range(first, second, sigmas: Sequence[float], begin: int, end: int) -> None:
    """Raise SlipstreamError where a step of `second`, those in [begin, end), is above its largest noise level."""
    a, b = bridge(first, second)
    largest = float(second.get_model_object("model_sampling").sigma_max)
    levels = [level_in(sigma, a, b) for sigma in sigmas]
    step = max(range(begin, end), key=levels.__getitem__)
    if levels[step] <= largest * RANGE:
        return
    one, two = names(first, second)
    later = next((i for i in range(step, end) if levels[i] <= largest * RANGE), None)
    if later is None:
        advice = "choose another pair of models"
    else:
        advice = f"switch at {later / (len(sigmas) - 1):.2f} of the steps or later"
    own = f", which is {levels[step]:.4g} to {two}" if a != b else ""
    own = ", pure noise" if math.isinf(levels[step]) else own
    raise SlipstreamError(
        f"{NODE}: {two} would work for {one} at sigma {sigmas[step]:.4g}{own}, but it knows noise only up to "
        f"{largest:.4g}; {advice}."
    )


def text_width(patcher) -> int | None:
    """The width of the text that a model reads; None where its configuration does not tell."""
    for path in architecture_of(patcher.get_model_object("diffusion_model")).text_widths:
        found = patcher.model.model_config.unet_config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, int):
            return found
    return None


def check_width(first, second, conds: Mapping[str, list[dict]], own: bool) -> None:
    """Raise SlipstreamError where the conditioning is of another width than `second` reads.

    own: it was made for `second`. Else what is known of `first`, which is meant to read it, has to fit it: where a
    family widens its text on the way, that shows there.
    """
    width, known = text_width(second), text_width(first)
    given = [c["cross_attn"].shape[-1] for group in conds.values() for c in group if c.get("cross_attn") is not None]
    wrong = next((w for w in given if width is not None and w != width), None)
    if wrong is None or (not own and known != wrong):
        return
    one, two = names(first, second)
    what = "positive_b and negative_b are" if own else f"the conditioning of {one} is"
    advice = "encode them" if own else "connect positive_b and negative_b, encoded"
    raise SlipstreamError(
        f"{NODE}: {what} {wrong} wide, but {two} reads {width}; {advice} with the text encoder of {two}."
    )


def check_cfg(cfg: float, conds: Mapping[str, list[dict]]) -> None:
    """Raise SlipstreamError where a cfg of its own has nothing to guide away from; the host would take zeros for it."""
    if cfg > 0 and cfg != 1 and not conds.get("negative"):
        raise SlipstreamError(
            f"{NODE}: cfg_b is {cfg:g}, but this guider has no negative prompt; connect negative_b or set cfg_b to 0."
        )


def check_guider(guider) -> None:
    """Raise SlipstreamError where the guider brings a model of its own: it would meet latents it was not made for."""
    for key, value in vars(guider).items():
        if key != "model_patcher" and isinstance(value, ModelPatcher):
            raise SlipstreamError(
                f"{NODE}: the guider {type(guider).__name__} brings a second model of its own; use one that guides a "
                "single model."
            )
