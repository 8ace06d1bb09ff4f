"""The first sampling of a model that waits to be quantised: a few plain steps of the user's own are watched, the layers
are quantised with what was seen, and checked by the same few steps."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ...quant.calibration import ActivationStatistics, Collector, uniform_steps
from ...quant.formats import FORMATS
from ..allocations import unrecorded
from ..conflicts import MARKS
from ..parts import QUANTISED, RUN, put_on
from .choose import Choices, QuantWish, planned
from .loras import NODE
from .make import in_8_bit, module_of, quantised_layers, saved_bytes, weight_and_bias, without_data
from .placed import Check, Quantised, place
from .teller import Teller, in_words

log = logging.getLogger("slipstream")

# A layer's input gives at most this many tokens per call, evenly chosen: 50 MB of float32 at a width of 12288.
TOKENS = 1024

# Wrappers that the short run does without: our own and other step caches, and compiled networks, which skip hooks.
LEFT_OUT = (RUN, "torch.compile", *MARKS)

# The check of a whole first run: this share of the 4-bit layers is raised each time, at most so often.
RAISED_SHARE, TRIES = 0.1, 3

# Where the host's `outer_sample` has the arguments that the short run gives it anew.
PLACES = {"noise": 0, "latent_image": 1, "sampler": 2, "sigmas": 3, "callback": 5, "disable_pbar": 6}


class ShortRun:
    """A few euler steps of the sampling that is about to start, with its guider, noise, conditioning and cfg.

    Opened inside an OUTER_SAMPLE wrapper, from what that was given. It may be sampled as often as wanted: the user's
    guider, the model and the random numbers are left as they were. Of the wrappers only those further in take part.
    """

    def __init__(self, executor, args, kwargs, evaluations: int) -> None:
        self._guider, self._args, self._kwargs = executor.class_obj, list(args), dict(kwargs)
        self._inner = executor.wrappers[executor.idx + 1 :]
        self._given = {name: self._argument(name) for name in ("noise", "latent_image", "sigmas")}
        self.sigmas = shortened(tuple(float(s) for s in self._given["sigmas"]), evaluations)
        self.steps = max(0, len(self.sigmas) - 1)

    def _argument(self, name: str):
        return self._kwargs[name] if name in self._kwargs else self._args[PLACES[name]]

    @property
    def why_not(self) -> str:
        """Why this sampling cannot be measured; empty where it can."""
        if self._guider.model_patcher.get_additional_models_with_key("multigpu"):
            return "the model is shared out over several GPUs"
        falls = [a > b for a, b in pairwise(self.sigmas)]
        if not all(map(math.isfinite, self.sigmas)) or self.sigmas[0] <= 0 or len(set(falls)) > 1:
            return "its steps go up and down, so that they cannot be cut short"
        return ""

    def sample(self, patcher) -> Tensor:
        """The last step's denoised latent with this clone of the model, on the CPU, float32, in the model's units."""
        guider = copy.copy(self._guider)
        guider.model_patcher = patcher
        guider.model_options = comfy.model_patcher.create_model_options_clone(self._guider.model_options)
        guider.conds = {name: [cond.copy() for cond in conds] for name, conds in self._guider.conds.items()}
        left_out = _without_caches(guider.model_options)
        last: list[Tensor] = []

        def see(step, denoised, *others) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            last[:] = [denoised]

        args, kwargs = list(self._args), dict(self._kwargs)
        sigmas = torch.tensor(self.sigmas).to(self._given["sigmas"])
        sampler = comfy.samplers.sampler_object("euler")
        anew = {"noise": self._given["noise"].clone(), "latent_image": self._given["latent_image"].clone(),
                "sampler": sampler, "sigmas": sigmas, "callback": see, "disable_pbar": True}  # fmt: skip
        for name, value in anew.items():
            if name not in kwargs and PLACES[name] < len(args):
                args[PLACES[name]] = value
            else:
                kwargs[name] = value
        inner = [wrapper for wrapper in self._inner if wrapper not in left_out]
        with _own_random_numbers(patcher.load_device):
            result = WrapperExecutor.new_class_executor(guider.outer_sample, guider, inner).execute(*args, **kwargs)
        return (last[0] if last else result).detach().float().cpu().clone()


def shortened(sigmas: tuple[float, ...], evaluations: int) -> tuple[float, ...]:
    """At most `evaluations` steps over a schedule, by Q-Diffusion's rule, down to its last sigma; () if it has none."""
    steps = len(sigmas) - 1
    if steps < 1:
        return ()
    chosen = [*(sigmas[i] for i in uniform_steps(steps, evaluations)), sigmas[-1]]
    return tuple(chosen[:1]) + tuple(b for a, b in pairwise(chosen) if a != b)


def _without_caches(options: dict) -> list[Callable]:
    """Take the wrappers of LEFT_OUT off these model options; returns those functions."""
    gone: list[Callable] = []
    for keyed in options.get("transformer_options", {}).get("wrappers", {}).values():
        for key in [key for key in keyed if str(key).lower().startswith(LEFT_OUT)]:
            gone += keyed.pop(key)
    return gone


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """What follows is to draw the same numbers as if nothing had been measured."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        yield


@contextlib.contextmanager
def watching(modules: Mapping[str, torch.nn.Module], collectors: Mapping[str, Collector]) -> Iterator[set[str]]:
    """Let each collector see what the module of its name is given, while this lasts; yields the names of those seen."""
    seen: set[str] = set()

    def hook(name: str) -> Callable:
        def see(module, args) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if args:
                collectors[name].add(args[0], TOKENS)
                seen.add(name)

        return see

    handles = []
    try:
        handles += [modules[name].register_forward_pre_hook(hook(name)) for name in collectors]
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def taken(collectors: dict[str, Collector], name: str) -> ActivationStatistics | None:
    """The statistics of a collector, which is dropped; None where nothing usable came by."""
    collector = collectors.pop(name, None)
    try:
        found = None if collector is None else collector.statistics()
    except ValueError:  # a layer that this prompt does not use
        return None
    return found if found is not None and bool(torch.isfinite(found.square).all()) else None


def signal_db(value: Tensor, true: Tensor) -> float:
    """Signal to noise of one latent against another, in dB: -20 log10 of the relative error."""
    noise, size = float((value - true).norm()), float(true.norm())
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if not noise else 20 * math.log10(size / noise) if size else -math.inf


class Pending:
    """What a patcher and its clones carry until one of them is first sampled; then, for all of them, what that gave.

    made: where the network's results are kept, for `key`, the wish and what belongs to it; told: called with the
    patcher when a first run is over.
    """

    def __init__(
        self, made: MutableMapping, key: tuple[QuantWish, float], teller: Teller, told: Callable[[object], None]
    ) -> None:
        self.wish, self.made = key[0], None
        self._shared, self._key, self._teller, self._told = made, key, teller, told
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Pending:
        return self  # clones share it

    def put_on(self, patcher) -> None:
        """Let this patcher wait; ahead of any cache, so that no run of one is open when we measure."""
        put_on(patcher, QUANTISED, self, self.sample)

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: measures and quantises first, unless that is done; a run without steps does not count.

        If it fails or is cancelled nothing is left, and the next run starts over.
        """
        patcher = executor.class_obj.model_patcher
        if patcher.get_attachment(QUANTISED) is self:
            with self._lock:
                fresh = self.made is None
                if fresh:
                    self.made = self._shared.get(self._key) or self._make(patcher, executor, args, kwargs)
            if self.made is not None:
                place(patcher, self.made)
                if fresh:
                    self._told(patcher)
        return executor(*args, **kwargs)

    def _make(self, patcher, executor, args: tuple, kwargs: dict) -> Quantised | None:
        run = ShortRun(executor, args, kwargs, self.wish.evaluations)
        if not run.steps:
            return None
        found = self._shared[self._key] = first_run(patcher, self.wish, run, self._teller)
        return found


def first_run(patcher, wish: QuantWish, run: ShortRun, teller: Teller) -> Quantised:
    """Measure the sampling that is about to start and quantise with what was seen; without data where that fails."""
    why_not, plan = run.why_not, planned(patcher, wish)
    collectors = {names[0]: Collector(plan.shapes[names[0]][1]) for names in plan.groups.values()}
    count = f"{run.steps} evaluation{'s' * (run.steps > 1)}"
    if not why_not:
        teller.say(f"measuring {count}")
        measured = in_words(patcher, "while the first run was measured")
        with measured, unrecorded(), watching(plan.linears, collectors) as seen:
            true = run.sample(patcher.clone())
        why_not = "" if seen else "none of its layers was seen at work"
    if why_not:
        log.warning("%s: the first run could not be measured (%s), so it is quantised without data", NODE, why_not)
        return quantised_layers(
            patcher, wish, without_data(patcher).get, f"made without data, because {why_not}", teller
        )
    how = f"measured at {count} of the first run" + ", GPTQ" * wish.gptq
    found = quantised_layers(patcher, wish, partial(taken, collectors), how, teller)
    if wish.guard_db:
        with in_words(patcher, "while the first run was checked"):
            found = checked(patcher, wish.guard_db, run, true, found, plan, teller)
    return found


def checked(
    patcher, floor_db: float, run: ShortRun, true: Tensor, found: Quantised, plan: Choices, teller: Teller
) -> Quantised:
    """The same short run with the quantised layers; while it is below the floor, the worst of them get 8 bit."""

    def signal() -> float:
        trial = patcher.clone()
        place(trial, found)
        return signal_db(run.sample(trial), true)

    teller.say("checking the quantised model")
    before = after = signal()
    raised: list[str] = []
    for _ in range(TRIES):
        four = [name for name, layer in found.layers.items() if FORMATS[layer.format].weight_bits == 4]
        if after >= floor_db or not four:
            break
        four.sort(key=lambda name: (found.sqnr.get(name, math.inf), name))
        layers, choices = dict(found.layers), dict(found.choices)
        for name in four[: math.ceil(RAISED_SHARE * len(four))]:
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = weight_and_bias(patcher, name, plan.linears[name])
                layers[name] = module_of(in_8_bit(weight, bias), patcher.offload_device)
            why = f"{found.sqnr[name]:.1f} dB at 4 bit, among the worst while the short run had {after:.1f} dB"
            choices[name] = replace(choices[name], treatment="w8a8", why=why)
            raised.append(name)
        found = Quantised(layers, choices, saved_bytes(plan, layers), found.sqnr, found.how)
        teller.say(f"{len(raised)} layers raised to 8 bit, checking again")
        after = signal()
    found.check = Check(before, after, tuple(raised))
    return found
