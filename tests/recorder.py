"""A stand-in for the host's record of a forward's allocations (its compiler, from 0.34 on), on the CPU.

What it does is what `comfy/model_prefetch.py` of those hosts and its users report: the first forward of a thread is
recorded; each later one has to allocate the same sizes in the same order, and nothing that was allocated in a forward
may be alive when it is over, because the next one is given its address. Where that host crashes or paints over a
tensor, this one raises. It reads the same switch at every forward, and `pause_malloc_graph` takes an allocation out.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from types import ModuleType

import comfy
import torch
from comfy.cli_args import args
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class CompileError(RuntimeError):
    """What the host's recorder says where a forward is not the recorded one."""


class Record(TorchDispatchMode):
    """Of one thread: the sizes that its first forward allocated, and how far the present one has come."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] | None = None
        self.now: list[int] = []
        self.born: list[tuple[str, StorageWeakRef]] = []
        self.paused = False
        self.forwards = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
            for tensor in tree_flatten(out)[0]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                    self._allocated(str(func), tensor.untyped_storage())
        return out

    def _allocated(self, name: str, storage) -> None:
        size, place = storage.nbytes(), len(self.now)
        if self.sizes is not None and self.sizes[place : place + 1] != [size]:
            raise CompileError(f"aimdo memory compile error: {name} takes {size} bytes where the record has others")
        self.now.append(size)
        self.born.append((name, StorageWeakRef(storage)))

    def begin(self) -> None:
        self.now, self.born = [], []
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        self.forwards += 1
        alive = [name for name, storage in self.born if not storage.expired()]
        if alive:
            raise CompileError(f"aimdo memory compile error: kept beyond the forward: {', '.join(alive)}")
        if self.sizes is not None and len(self.now) < len(self.sizes):
            raise CompileError("aimdo memory compile error: a shorter forward than the recorded one")
        self.sizes = self.now


class Recorder:
    """Put in the host's place by `install`; one record a thread, until `prompt_ends`."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}
        self.active: dict[int, Record] = {}

    @property
    def forwards(self) -> int:
        """How many were recorded or replayed since the prompt began."""
        return sum(record.forwards for record in self.records.values())

    def prompt_ends(self) -> None:
        self.records.clear()

    @contextlib.contextmanager
    def pause(self, sync: bool = False):
        record = self.active.get(threading.get_ident())
        if record is not None:
            record.paused = True
        try:
            yield
        finally:
            if record is not None:
                record.paused = False  # as the host's: an inner pause ends the outer one

    def wrap(self, forward):
        """A network's forward as those hosts have it, for outputs of the latent's shape."""

        @functools.wraps(forward)
        def recorded(network, x, *rest, **options):
            if args.disable_comfy_compiler:
                return forward(network, x, *rest, **options)
            thread = threading.get_ident()
            record = self.active[thread] = self.records.setdefault(thread, Record())
            out = torch.empty_like(x)
            record.begin()
            try:
                got = forward(network, x, *rest, **options)
                out.copy_(got)
                del got
            except BaseException:
                record.__exit__(None, None, None)
                raise
            finally:
                del self.active[thread]
            record.end()
            return out

        return recorded


def install(monkeypatch, *models) -> Recorder:
    """The recorder in the host's place for the networks of these models; on until the test ends."""
    recorder = Recorder()
    module = sys.modules.get("comfy.model_prefetch")
    if module is None:
        module = ModuleType("comfy.model_prefetch")
        monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
        monkeypatch.setattr(comfy, "model_prefetch", module, raising=False)
    monkeypatch.setattr(module, "pause_malloc_graph", recorder.pause, raising=False)
    monkeypatch.setattr(args, "disable_comfy_compiler", False, raising=False)
    for kind in {type(model.model.diffusion_model) for model in models}:
        monkeypatch.setattr(kind, "forward", recorder.wrap(kind.forward))
    return recorder
