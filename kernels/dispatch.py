"""Which implementation computes a quantised layer: decided once per device, kind of layer and shape, by measurement.

On the first call of a kind every implementation that fits is compared with the reference on a small fresh input and
dropped, with one log line, if it disagrees or raises; of those left the fastest on the call's own input is taken from
then on. On the CPU that is the exact reference. Expanded weights leave the activations unrounded, so where they are
fastest the result is nearer to 16 bit than the format promises, and two cards may differ by more than rounding.

Choices are kept in a file of the folder given to `cache_in` (`choices.py`). SLIPSTREAM_KERNEL or `use` name one
implementation for all layers it fits; `running` tells what serves which layer.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import implementations
from .choices import Choices
from .implementations import Config, Implementation, Problem
from .lasting import lasting
from .layer import Layer

log = logging.getLogger("slipstream")

OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # before torch 2.5

VARIABLE = "SLIPSTREAM_KERNEL"

# Rows and outputs that a kernel is checked with: no multiple of a tile. Triton compiles a variant of its own for sizes
# that are multiples of 16, and one for a single row, so the check takes the sizes of the variant that will run.
CHECK_ROWS, CHECK_OUTPUTS = {"one": 8, "sixteens": 80, "ragged": 77}, {"one": 1, "sixteens": 272, "ragged": 264}
REPEATS = 5

# A measured time this many times the best is not measured to the end.
HOPELESS = 3.0


@dataclass(frozen=True, slots=True)
class Running:
    """What serves a layer: outputs N, inputs K, `kind` of its format, for up to `rows` tokens a call.

    milliseconds: of one call, by implementation with its best configuration; empty where nothing was measured.
    """

    device: str
    outputs: int
    inputs: int
    kind: str
    rows: int
    name: str
    words: str
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Choice:
    implementation: Implementation
    config: Config
    running: Running


@dataclass(slots=True)
class _Device:
    """What is known about one device; `lock` keeps two threads from measuring on it at the same time."""

    label: str
    lock: threading.RLock = field(default_factory=threading.RLock)
    chosen: dict[str, _Choice] = field(default_factory=dict)
    faults: dict[tuple, str] = field(default_factory=dict)
    logged: set[str] = field(default_factory=set)
    stored: Choices | None = None  # read when first asked for


_lock = threading.Lock()
_devices: dict[torch.device, _Device] = {}
_folder: Path | None = None
_use: str | None = None


def cache_in(folder: str | os.PathLike | None) -> None:
    """Keep choices in `folder`, which is made when the first is written; None: in memory only."""
    global _folder
    with _lock:
        _folder = None if folder is None else Path(folder)
        for device in _devices.values():
            device.stored = None


def use(name: str | None) -> None:
    """Compute every layer that implementation `name` fits with it; None: decide by measurement. Raises ValueError."""
    global _use
    if name is not None and name not in names():
        raise ValueError(f"unknown kernel {name!r}, choose one of {', '.join(names())}")
    _use = name


def names() -> list[str]:
    """Of all implementations, whether they can run here or not."""
    return [implementation.name for implementation in implementations.TABLE]


def reset() -> None:
    """Forget what was checked and chosen in this process, not what is in the file."""
    with _lock:
        _devices.clear()
    implementations.forget()


def running(device: torch.device | str | None = None) -> list[Running]:
    """What has served which layer since the start, of one device or of all."""
    with _lock:
        found = [d for where, d in _devices.items() if device is None or where == torch.device(device)]
    return [choice.running for d in found for choice in list(d.chosen.values())]


def summary(device: torch.device | str | None = None) -> str:
    """`running` in one line for a node: how many layer shapes each implementation serves; empty before the first."""
    counts: dict[tuple[str, str], set] = {}
    for row in running(device):
        counts.setdefault((row.device, row.words), set()).add((row.outputs, row.inputs, row.kind))
    parts = [f"{len(shapes)} on {label} by {words}" for (label, words), shapes in counts.items()]
    return "Layer shapes: " + "; ".join(parts) + "." if parts else ""


def linear(x: Tensor, layer: Layer, kernel: str | None = None) -> Tensor:
    """The layer's output (..., N) in x's dtype, x (..., K). kernel: the name of an implementation for this call.

    Raises ValueError when the channels differ or the kernel is unknown.
    """
    if x.shape[-1] != layer.k:
        raise ValueError(f"the layer takes {layer.k} channels, the input has {x.shape[-1]}")
    if kernel is not None and kernel not in names():
        raise ValueError(f"unknown kernel {kernel!r}, choose one of {', '.join(names())}")
    rows = x.reshape(-1, layer.k)
    if not len(rows) or x.is_meta:  # nothing to compute, or nothing to compute with
        return x.new_empty(*x.shape[:-1], layer.n)
    if rows.stride(1) != 1 or rows.stride(0) % 16:  # other strides would be variants that no check has seen
        rows = rows.contiguous()
    if x.device.type != "cuda":
        return _run(rows, layer, kernel).view(*x.shape[:-1], layer.n)
    with torch.cuda.device(x.device):
        return _run(rows, layer, kernel).view(*x.shape[:-1], layer.n)


def _run(x: Tensor, layer: Layer, kernel: str | None) -> Tensor:
    state = _state(x.device)
    while True:
        choice = _choice(state, x, layer, kernel or _use or os.environ.get(VARIABLE) or None)
        implementation = choice.implementation
        try:
            return implementation.run(x, layer, choice.config)
        except OutOfMemory:
            raise
        except Exception as error:
            if implementation.name == "reference" or _captured(x):
                raise  # in a graph that has failed every other way fails too
            fault = f"it failed: {_one_line(error)}"
            _tell(state, implementation, fault)
            with state.lock:
                state.faults[_mark(implementation, choice.config, layer, x)] = fault
                state.chosen = {k: c for k, c in state.chosen.items() if c is not choice}


def _key(x: Tensor, layer: Layer, name: str | None) -> str:
    """Of a choice: M and the rank count up to the next power of two, so that not every resolution is measured anew; of
    M beside it which compiled variant it is, because each has to be checked."""
    bucket, rank = f"{_up(len(x))}{_variant(len(x))[0]}", _up(layer.rank) if layer.rank else 0
    return f"{name or ''}|{layer.kind}|{str(x.dtype)[6:]}|m{bucket}|n{layer.n}|k{layer.k}|r{rank}"


def _up(count: int) -> int:
    return 1 << max(4, (count - 1).bit_length())


def _choice(state: _Device, x: Tensor, layer: Layer, name: str | None) -> _Choice:
    key = _key(x, layer, name)
    found = state.chosen.get(key)
    if found is not None:
        return found
    if _captured(x):
        # Nothing can be compared or timed in a graph, and what serves it there is no choice for what comes later.
        way = next(i for i in implementations.TABLE if i.name in ("dequant_torch", "reference"))
        return _as_chosen(state, x, layer, way, (), {})
    with state.lock:
        found = state.chosen.get(key)
        if found is None:
            with lasting():  # what is compared and timed is no part of a forward
                found = state.chosen[key] = _decide(state, key, x, layer, name)
    return found


def _captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _as_chosen(
    state: _Device, x: Tensor, layer: Layer, way: Implementation, config: Config, times: dict[str, float]
) -> _Choice:
    rows = _up(len(x))
    return _Choice(way, config, Running(state.label, layer.n, layer.k, layer.kind, rows, way.name, way.words, times))


def _decide(state: _Device, key: str, x: Tensor, layer: Layer, name: str | None) -> _Choice:
    problem = Problem.of(x, layer)
    fitting = [implementation for implementation in implementations.TABLE if implementation.fits(problem)]
    named = [implementation for implementation in fitting if implementation.name == name]
    if name is not None and not named and name not in state.logged:
        state.logged.add(name)
        log.info("Slipstream: kernel %s cannot compute %s on %s; another does.", name, layer.kind, state.label)
    # on the CPU the reference is the choice; on a card it is for who has nothing else, or asks for it
    own = [i for i in fitting if (i.name == "reference") == (problem.device == "cpu")]
    fitting = named + [i for i in own if i.name != name]

    choice = partial(_as_chosen, state, x, layer)
    stored = _stored(state)
    kept = stored.get(key)
    for implementation in fitting:
        if implementation.name == kept.get("name"):
            config = tuple(kept["config"])
            known = config in implementation.configs(problem)
            if known and not _fault(state, implementation, config, layer, x):
                return choice(implementation, config, kept["milliseconds"])
    found: list[tuple[Implementation, Config]] = []
    for implementation in fitting:
        faults = {config: _fault(state, implementation, config, layer, x) for config in implementation.configs(problem)}
        ways = [config for config, fault in faults.items() if not fault]
        found += [(implementation, config) for config in ways]
        if not ways:
            _tell(state, implementation, next(iter(faults.values())))
        if named and ways:
            break
    if not found:
        return choice(implementations.TABLE[-1], (), {})
    if len(found) == 1:
        return choice(*found[0], {})
    times: dict[str, float] = {}
    best, shortest = found[0], float("inf")
    for implementation, config in found:
        try:
            took = _time(partial(implementation.run, x, layer, config), x.device, shortest * HOPELESS)
        except OutOfMemory:
            continue
        times[implementation.name] = min(took, times.get(implementation.name, float("inf")))
        if took < shortest:
            best, shortest = (implementation, config), took
    times = {k: round(v, 4) for k, v in times.items()}
    try:
        stored.keep(key, {"name": best[0].name, "config": list(best[1]), "milliseconds": times})
    except OSError as error:
        if "file" not in state.logged:
            state.logged.add("file")
            log.info("Slipstream: the kernels chosen cannot be kept in a file: %s.", _one_line(error))
    return choice(*best, times)


def _fault(state: _Device, implementation: Implementation, config: Config, layer: Layer, x: Tensor) -> str:
    """Why it is not used for this kind of layer, looked at once; empty where it agrees with the reference."""
    key = _mark(implementation, config, layer, x)
    if key not in state.faults:
        exact = implementation.name == "reference"
        state.faults[key] = "" if exact else _disagreement(implementation, config, layer, x)
    return state.faults[key]


def _mark(implementation: Implementation, config: Config, layer: Layer, x: Tensor) -> tuple:
    """What a check is good for: one compiled variant."""
    rank = _up(layer.rank) if layer.rank else 0  # the branch's tile is the next power of two
    wide = layer.k % 128 == 0  # a tile of K
    return implementation.name, config, layer.kind, x.dtype, rank, wide, _variant(len(x)), _variant(layer.n)


def _variant(size: int) -> str:
    """Which compiled variant of a kernel Triton takes for this number."""
    return "one" if size == 1 else "sixteens" if size % 16 == 0 else "ragged"


def _tell(state: _Device, implementation: Implementation, fault: str) -> None:
    if implementation.name not in state.logged:
        state.logged.add(implementation.name)
        log.warning("Slipstream: kernel %s is not used on %s, %s.", implementation.name, state.label, fault)


def _disagreement(implementation: Implementation, config: Config, layer: Layer, x: Tensor) -> str:
    """Why an implementation is not to be used for layers like this one, in words; empty when it agrees."""
    part = layer.rows(0, min(layer.n, CHECK_OUTPUTS[_variant(layer.n)]))
    rows = _variant(len(x))
    generator = torch.Generator(x.device)  # not torch's own, which a user's seed has set
    generator.seed()
    sample = torch.randn(CHECK_ROWS[rows], layer.k, generator=generator, device=x.device)
    if layer.unsigned:
        sample = torch.nn.functional.gelu(sample)
    if layer.smooth is not None:
        sample *= layer.smooth.float()
    sample = sample.to(x.dtype)
    try:
        want = part.reference(sample, implementation.like).float()
        calls = sample.split(1 if rows == "one" else len(sample))
        got = torch.cat([implementation.run(call, part, config) for call in calls]).float()
        error = (got - want).norm(dim=1)
        size = want.norm(dim=1).clamp(min=1e-20)  # a layer of zeros has a result too
        whole, worst = float(error.norm() / size.norm()), float((error / size).max())
    except OutOfMemory:
        raise
    except Exception as error:
        return f"it failed: {_one_line(error)}"
    limit = implementation.tolerance(layer) if callable(implementation.tolerance) else implementation.tolerance
    if whole <= limit and worst <= 8 * limit:  # a single code that fell the other way shows in one row
        return ""
    return f"its result for {layer.kind} is off by {whole:.1e} where {limit:.1e} is allowed"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _time(run: Callable[[], Tensor], device: torch.device, limit: float) -> float:
    """Milliseconds of one call: the least of REPEATS, after one that is not counted; one only beyond `limit`."""
    run()
    best = float("inf")
    for _ in range(REPEATS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run().sum().item()  # waits for devices that work on their own
            best = min(best, 1000 * (time.perf_counter() - began))
        if best > limit:
            break
    return best


def _state(device: torch.device) -> _Device:
    found = _devices.get(device)
    if found is None:
        with _lock:
            label = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
            found = _devices.setdefault(device, _Device(label))
    return found


def _stored(state: _Device) -> Choices:
    if state.stored is None:
        state.stored = Choices(_folder, state.label)
    return state.stored
