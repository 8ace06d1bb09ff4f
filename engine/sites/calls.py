"""One run of the network, as the inner sites see it, and the patched forwards through which they meet it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from ..forecast.schedules import Probe

Parts = tuple[Tensor, ...]

# What names a stream, see `engine/run/streams.py`; one call of the network has a key per conditioning in its batch.
Key = tuple
Keys = list[Key]


class Asked(Protocol):
    """What a site asks of its run. Tensors in Parts are per conditioning; what is handed out is read only.

    note: why nothing is skipped, empty where it may be; probe: what has to be looked at first; several: whether the
    sampler evaluates more than once a step.
    """

    note: str

    @property
    def probe(self) -> Probe | None: ...

    @property
    def several(self) -> bool: ...

    @property
    def blocks(self) -> AskedBlocks: ...

    def refuse(self, why: str) -> None: ...

    def fill(self, keys: Keys, probes: list[Parts] | None = None) -> list[Parts] | None: ...

    def keep(
        self,
        keys: Keys,
        chunks: list[Parts],
        probes: list[Parts] | None = None,
        base: list[Parts] | None = None,
        owned: bool = False,
    ) -> None: ...

    def grid_step(self) -> int | None: ...

    def certain_fills(self, step: int) -> list[int]: ...

    def forecast_at(self, keys: Keys, u: float) -> list[Parts] | None: ...

    def mark_filled(self, keys: Keys) -> bool: ...

    def timestep(self, step: int) -> float: ...


class AskedBlocks(Protocol):
    """What a site that skips single blocks asks."""

    def residuals(self, keys: Keys, block: int) -> list[Parts] | None: ...

    def keeps(self, block: int) -> bool: ...

    def keep(self, keys: Keys, block: int, chunks: list[Parts] | None) -> None: ...

    def count(self, ran: bool) -> None: ...


class Call(Protocol):
    """What a site keeps for one run of the network; made in APPLY_MODEL, dropped when that returns."""

    def layer(self, name: tuple, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Stand in for the patched layer `name`: run `original(*args, **kwargs)`, or do without it."""


# A context variable, because the host may run several networks in threads at once.
CURRENT: ContextVar[Call | None] = ContextVar("slipstream_call", default=None)

# Whose better weights this thread computes with, for an anchor; see `host/compensate/reference.py`.
ASKING: ContextVar[object | None] = ContextVar("slipstream_asking", default=None)


class PatchedForward:
    """An object patch on the forward of a layer: the layer itself, unless a run of ours is active in this thread.

    It holds no state, so it may stay on a patcher between runs and be shared by its clones.
    """

    def __init__(self, name: tuple, original: Callable):
        self.name = name
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = CURRENT.get()
        if call is None:
            return self.original(*args, **kwargs)
        return call.layer(self.name, self.original, args, kwargs)

    def __deepcopy__(self, memo: dict) -> PatchedForward:
        return self  # nothing in it may be copied: a copy of the bound forward would drag the model along


def own_forwards(patcher: Any, clone: Any) -> None:
    """ON_CLONE: where the clone has another network, for another card or a static load, its layers run, not ours.

    What another pack has put there stays: only that pack knows how it follows a network.
    """
    if clone.model is patcher.model:
        return
    patches, clone.object_patches = clone.object_patches, {}
    for key, patch in patches.items():
        if isinstance(patch, PatchedForward) and isinstance(getattr(patch.original, "__self__", None), torch.nn.Module):
            patch = PatchedForward(patch.name, clone.get_model_object(key))  # without patches: the network's own
        clone.object_patches[key] = patch


def split(parts: Parts, count: int, dim: int = 0) -> list[Parts]:
    """Cut a batch of `count` conds into one tuple of tensors per cond."""
    return list(zip(*(part.chunk(count, dim) for part in parts), strict=True))
