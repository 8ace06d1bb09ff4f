"""Fewer plain steps of equal cost: what anybody has without this pack."""

from __future__ import annotations

import contextlib
import math

import comfy.samplers
import torch
from torch import Tensor

from .runs import SAME, Taken


def equal_cost(fast: Taken, plain: Taken, by_time: bool, steps: int) -> int | None:
    """How many plain steps cost what the accelerated run did; None where that is not known.

    by_time: evaluations of other weights do not count alike, so the seconds decide. Rounded in favour of the floor.
    """
    if by_time:
        if not fast.steady or not plain.steady:
            return None
        share = fast.steady / plain.steady
    else:
        whole = plain.evaluations or (fast.run["evaluations"] if fast.run else None)
        if not whole or fast.evaluations is None:
            return None
        share = fast.evaluations / whole
    return max(1, math.ceil(share * steps - 0.25))


def fewer_sigmas(model, sigmas: Tensor, count: int) -> tuple[Tensor, str]:
    """(the schedule with `count` steps, what it is in words).

    The host's scheduler that made the sigmas is known again by them and asked for fewer steps; sigmas of other makers
    are interpolated, which is what fewer steps of a scheduler are but for rounding.
    """
    sampling, steps = model.get_model_object("model_sampling"), len(sigmas) - 1

    def made(name: str, total: int) -> Tensor | None:
        with contextlib.suppress(AttributeError, IndexError, TypeError, ValueError, AssertionError):
            return comfy.samplers.calculate_sigmas(sampling, name, total).float().cpu()
        return None

    wanted = sigmas.float().cpu()
    whole = float(wanted[0]) >= (1 - SAME) * float(sampling.sigma_max)
    # with denoise below 1 the sigmas are the end of a longer schedule
    for total in (steps,) if whole else range(steps + 1, 5 * steps + 1):
        for name in comfy.samplers.SCHEDULER_NAMES:
            found = made(name, total)
            if found is None or len(found) <= steps:
                continue
            if whole and len(found) != steps + 1:
                continue
            if torch.allclose(found[-(steps + 1) :], wanted, rtol=1e-4, atol=1e-6):
                shorter = made(name, max(count, round(total * count / steps)))
                if shorter is not None and len(shorter) > count:
                    return shorter[-(count + 1) :].to(sigmas), name
    places = torch.linspace(0, steps, count + 1)
    low = places.floor().long().clamp(max=steps - 1)
    return torch.lerp(wanted[low], wanted[low + 1], places - low).to(sigmas), "interpolated"
