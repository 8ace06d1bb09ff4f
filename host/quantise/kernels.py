"""Which kernels compute the quantised layers: their choices are kept in the user's folder, and said on the node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...kernels import dispatch, implementations, lasting
from ..allocations import outside
from ..canvas.events import show
from ..parts import KERNELS, put_on
from ..profiles.folder import USER_FOLDER


def keep_choices() -> None:
    """Read and write what was measured on this machine in the host's user folder, and let what kernels keep lie outside
    of the host's records."""
    lasting.allocate_in(outside)
    dispatch.cache_in(Path(folder_paths.get_user_directory(), USER_FOLDER))


def tell_after_a_run(model, node_id: str, text: Callable[[object], str]) -> None:
    """After each sampling of this patcher its node shows `text` of it, and what computed its quantised layers."""

    def sample(executor, *args, **kwargs):
        patcher = executor.class_obj.model_patcher
        try:
            return executor(*args, **kwargs)
        finally:
            implementations.forget()
            found = dispatch.summary(patcher.load_device)
            show(node_id, f"{text(patcher)}\n{found}" if found else text(patcher))

    put_on(model, KERNELS, sample=sample)
