"""The invariants that any accelerating node has to keep, ours or another pack's: each check names what it found.

A check takes a `Subject` and returns a few words; it raises `Broken` when the invariant does not hold. Any other error
is the node's own failure. The rows of `docs/peers.md` are these.
"""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from slipstream.demo import emoji
from slipstream.engine.metrics import psnr, relative_error

STEPS = 12
# Float sums in another order: cond and uncond in one call or in two.
SAME = 1e-5
# Tensors smaller than this are a sampler's scalars and tables.
SMALL = 256

# What runs in every evaluation that is not left out: a layer of a block behind the first and before the last. A layer,
# since some caches call the block and leave out what is in it.
CORE = {"flux": "single_blocks.0.linear1", "unet": "middle_block.0.in_layers.2"}


class Broken(Exception):
    """The invariant does not hold; the message says by how much."""


@dataclass
class Subject:
    """One accelerating node on one of the small models. wrap: what the node does to a MODEL."""

    name: str  # flux | unet
    base: object
    wrap: Callable[[object], object]
    plain: dict = field(default_factory=dict)

    @cached_property
    def model(self):
        return self.wrap(self.base.clone())

    def sample(self, model, steps=STEPS, cfg=1.0, seed=1, size=(16, 16), batch=1, sampler="euler", prompt="hamburger"):
        """The final latent that the host's sampler gives."""
        prompts = [prompt] * batch
        latent = torch.zeros(batch, 16, *size)
        noise = comfy.sample.prepare_noise(latent, seed)
        conds = emoji.conditioning(prompts), emoji.conditioning([""] * batch)
        kind = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        scheduler = "simple" if self.name == "flux" else "normal"
        with torch.inference_mode():
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
            return comfy.sample.sample_custom(
                model, noise, cfg, kind, sigmas, *conds, latent, disable_pbar=True, seed=seed
            )

    def alone(self, **options):
        """The plain model's latent, sampled once."""
        key = tuple(sorted(options.items()))
        if key not in self.plain:
            self.plain[key] = self.sample(self.base, **options)
        return self.plain[key]

    @contextlib.contextmanager
    def runs(self, inside: str | None = None, act: Callable[[int], None] = lambda count: None):
        """A list with the batch size of every run of a part of the network; act: called with its length each time."""
        found: list[int] = []

        def seen(module, args, kwargs):
            tensors = [a for a in (*args, *kwargs.values()) if torch.is_tensor(a)]
            found.append(tensors[0].shape[0] if tensors else 0)
            act(len(found))

        module = self.base.model.diffusion_model.get_submodule(inside or CORE[self.name])
        hook = module.register_forward_pre_hook(seen, with_kwargs=True)
        try:
            yield found
        finally:
            hook.remove()


def demand_same(one, other, what: str) -> None:
    if one.shape != other.shape:
        raise Broken(f"{what}: another shape")
    if not torch.equal(one, other):
        raise Broken(f"{what}: off by {relative_error(one, other):.2g}")


def skips(subject: Subject) -> str:
    """Something is left out at all."""
    with subject.runs() as runs:
        result = subject.sample(subject.model)
    if not torch.isfinite(result).all():
        raise Broken("the result is not finite")
    if len(runs) >= STEPS:
        raise Broken(f"{len(runs)} of {STEPS}: nothing is left out")
    return f"{len(runs)} of {STEPS}"


def again(subject: Subject) -> str:
    """H02: the same seed twice gives the same picture."""
    demand_same(subject.sample(subject.model), subject.sample(subject.model), "second run")
    return "identical"


def removed(subject: Subject) -> str:
    """H03: without the node, after a run with it, the plain picture is bit-identical."""
    plain = subject.alone()
    subject.sample(subject.model)
    demand_same(subject.sample(subject.base), plain, "plain run afterwards")
    return "identical"


def cancelled(subject: Subject) -> str:
    """H04, H05: a cancel stops at once, and the next runs are clean."""
    plain, clean = subject.alone(), subject.sample(subject.model)
    last = 2

    def interrupt(count: int) -> None:
        if count == last:
            raise comfy.model_management.InterruptProcessingException()

    with subject.runs(act=interrupt) as runs:
        try:
            subject.sample(subject.model)
        except comfy.model_management.InterruptProcessingException:
            pass
        else:
            raise Broken("swallowed")
    if len(runs) > last:
        raise Broken(f"{len(runs) - last} further evaluations")
    demand_same(subject.sample(subject.model), clean, "next run")
    demand_same(subject.sample(subject.base), plain, "plain run")
    return "identical"


def freed(subject: Subject) -> str:
    """H07: no tensor of the run is left when it has ended."""

    def alive() -> list[torch.Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.numel() >= SMALL]

    # twice: loading, and whatever is made once, is not the run's
    subject.alone(), subject.sample(subject.wrap(subject.base.clone()))
    fresh = subject.wrap(subject.base.clone())
    before = {id(tensor): weakref.ref(tensor) for tensor in alive()}
    subject.sample(fresh)
    left = [tensor for tensor in alive() if before.get(id(tensor), lambda: None)() is not tensor]
    if left:
        raise Broken(f"{len(left)} tensors, {sum(t.numel() * t.element_size() for t in left) / 1e3:.0f} kB left")
    return "none left"


def split(subject: Subject) -> str:
    """H08: cond and uncond in one call or in two give the same picture."""
    free = comfy.model_management.get_free_memory
    results = []
    for short in (False, True):
        model = subject.wrap(subject.base.clone())
        try:
            if short:  # attention asks with True, and needs the truth
                comfy.model_management.get_free_memory = lambda device=None, torch_free_too=False: (
                    free(device, True) if torch_free_too else 1
                )
            with subject.runs() as runs:
                results.append(subject.sample(model, cfg=3.0))
        finally:
            comfy.model_management.get_free_memory = free
        if set(runs) != {1 if short else 2}:
            raise Broken(f"batches of {sorted(set(runs))}")
    difference = relative_error(*results)
    if not difference <= SAME:
        raise Broken(f"{difference:.2g}")
    return f"{difference:.0e}"


def inputs(subject: Subject) -> str:
    """H10: what the network is given is never written to: the host computes the picture from the same tensor."""
    worst = 0.0

    def around(executor, *args, **kwargs):
        nonlocal worst
        tensors = [a for a in (*args, *kwargs.values()) if torch.is_tensor(a)]
        before = [tensor.clone() for tensor in tensors]
        result = executor(*args, **kwargs)
        worst = max(worst, *(relative_error(t.float(), b.float()) for t, b in zip(tensors, before, strict=True)))
        return result

    model = subject.wrap(subject.base.clone())
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "peer_checks", around)
    subject.sample(model)
    if worst:
        raise Broken(f"changed by {worst:.2g}")
    return "untouched"


def sizes(subject: Subject) -> str:
    """H12: after another size, batch and step count a run equals that of a fresh node."""
    used = subject.wrap(subject.base.clone())
    for options in ({"size": (8, 24)}, {"batch": 2}, {"steps": 9}, {}):
        expected = subject.sample(subject.wrap(subject.base.clone()), **options)
        said = ", ".join(f"{name} {value}" for name, value in options.items()) or "the first size"
        demand_same(subject.sample(used, **options), expected, f"{said}, after another run")
    return "identical"


def clones(subject: Subject) -> str:
    """H14: two MODELs of one checkpoint with the node on each, in turns, equal each alone."""
    first = subject.wrap(subject.base.clone())
    alone = subject.sample(first, seed=3)
    second = subject.wrap(subject.base.clone())
    other = subject.sample(second, seed=4)
    for _ in range(2):
        demand_same(subject.sample(first, seed=3), alone, "first")
        demand_same(subject.sample(second, seed=4), other, "second")
    return "identical"


def heun(subject: Subject) -> str:
    """H40: a sampler with two evaluations a step is counted right and stays near."""
    plain = subject.alone(sampler="heun")
    with subject.runs() as runs:
        near = psnr(subject.sample(subject.model, sampler="heun"), plain)
    if len(runs) > 2 * STEPS - 1:
        raise Broken(f"{len(runs)} evaluations of {2 * STEPS - 1}")
    if not near >= 20:
        raise Broken(f"{near:.0f} dB")
    return f"{len(runs)} of {2 * STEPS - 1}, {'identical' if math.isinf(near) else f'{near:.0f} dB'}"


CHECKS = {
    "skips": skips,
    "again": again,
    "removed": removed,
    "cancelled": cancelled,
    "freed": freed,
    "split": split,
    "inputs": inputs,
    "sizes": sizes,
    "clones": clones,
    "heun": heun,
}


def examine(subject: Subject, names=tuple(CHECKS)) -> dict[str, dict]:
    """{check: {held, says}}; held is None where the node failed in another way than the check looks for."""
    found = {}
    subject.alone(), subject.alone(sampler="heun")  # before the node can have changed anything for good
    for name in names:
        try:
            found[name] = {"held": True, "says": CHECKS[name](subject)}
        except Broken as broken:
            found[name] = {"held": False, "says": str(broken)}
        except Exception as error:
            text = " ".join(str(error).split())
            found[name] = {"held": None, "says": f"{type(error).__name__}: {text}"[:160]}
    return found
