"""What kernels compute once from a weight (float32 scales, another layout) and keep as long as the weight's memory.

Modules hand out new tensor objects on every call (`detach`), so an entry belongs to the storage, not to the tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .lasting import lasting

_lock = threading.Lock()
_kept: dict[tuple, tuple[StorageWeakRef, Tensor]] = {}


def derived(tensor: Tensor, what: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(tensor), from memory when it was made before of the same, unchanged storage.

    Changes in place are seen by the tensor's version; tensors made in inference mode have none, and are weights here,
    which nobody changes in place. Not kept while a CUDA graph is captured: the graph owns what is allocated then.
    """
    if what == tensor.dtype and tensor.is_contiguous():
        return tensor
    storage = tensor.untyped_storage()
    version = 0 if tensor.is_inference() else tensor._version
    shape = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version)
    # the weak reference holds the storage's header, so that its address is not given to another one
    key = (storage._cdata, shape, what)
    with _lock:
        found = _kept.get(key)
        if found is not None and not found[0].expired():
            return found[1]
    with lasting():
        value = make(tensor)
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return value
    with _lock:
        for old in [k for k, (alive, _) in _kept.items() if alive.expired()]:
            del _kept[old]
        if key in _kept:  # another thread has made it meanwhile
            return _kept[key][1]
        if value.untyped_storage()._cdata != storage._cdata:  # a view would keep its own source alive for ever
            _kept[key] = (StorageWeakRef(storage), value)
    return value


def branch(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of the low-rank branch (any, R) in `dtype`, with columns of zeros up to a multiple of 16: a k-step of
    the tensor cores, and rows that are aligned to 32 bytes."""
    if tensor.dtype == dtype and tensor.shape[1] % 16 == 0 and tensor.is_contiguous():
        return tensor
    return derived(tensor, ("branch", dtype), lambda t: F.pad(t.to(dtype), (0, -t.shape[1] % 16)).contiguous())
