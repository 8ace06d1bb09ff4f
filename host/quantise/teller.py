"""How far the making of quantised layers is, and what went wrong there, in words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import comfy.model_management
import torch

from ...engine.errors import SlipstreamError
from ..canvas.events import show
from .loras import NODE

Progress = Callable[[int, int], None]


class Teller:
    """Says how far the work is: numbers for a bar, and words for a node."""

    def __init__(self, progress: Progress | None, node_id: str) -> None:
        self._progress, self._node_id = progress, node_id
        self.begin(0, 0)

    def begin(self, layers: int, weights: int) -> None:
        """The work is so many layers, of so many weights together."""
        self._layers, self._weights, self._done, self._share, self._groups = layers, weights, 0, 0, 0
        self._started = time.monotonic()

    def done(self, layers: int, weights: int) -> None:
        """So many more layers are quantised."""
        self._done, self._share, self._groups = self._done + layers, self._share + weights, self._groups + 1
        self.say(f"quantising layer {self._done} of {self._layers}{self._left()}")
        if self._progress is not None:
            self._progress(self._done, self._layers)

    def _left(self) -> str:
        spent = time.monotonic() - self._started
        if self._groups < 3 or spent < 1:  # too early to tell
            return ""
        left = spent * (self._weights - self._share) / self._share
        return f", {left:.0f} s left" if left < 90 else f", {left / 60:.0f} min left"

    def say(self, sentence: str) -> None:
        """Show it on the node."""
        show(self._node_id, sentence)


@contextlib.contextmanager
def in_words(model, where: str) -> Iterator[None]:
    """Memory and disk errors as one sentence; the model is left as it was in any case."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said, by_type = str(error).lower(), isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        if not by_type and "out of memory" not in said and "can't allocate memory" not in said:
            raise
        comfy.model_management.soft_empty_cache()
        raise SlipstreamError(
            f"{NODE}: the memory of {model.load_device} or the computer ran out {where}; close other programs, or "
            "choose a smaller rank or fewer evaluations, and queue again."
        ) from None
    except OSError as error:
        raise SlipstreamError(
            f"{NODE}: the model's file could not be read {where} ({error}); see whether its disk is there, "
            "and load the model again."
        ) from None
