"""Several of the pack's nodes on one MODEL wire of a tiny Flux, and the situations of the hazards to put it into."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import families
import folder_paths
import node_helpers
import scenes
import torch
from sampling import Lab, random_weights, relative
from slipstream.demo import emoji
from slipstream.engine.run.plan import ORIGINAL, CompensatorConfig
from slipstream.host.canvas import events
from slipstream.host.model import add_compensator
from slipstream.host.quantise import load as quant_load
from slipstream.host.quantise import save as quant_files
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import add_switch

# Wide enough for the host's own detection, so that it can be loaded from a file; reads the demo's prompts.
TINY = families.Family(
    "FluxSchnell",
    families.FLUX
    | dict(hidden_size=128, num_heads=1, axes_dim=[16, 56, 56], mlp_ratio=4.0, depth=1, depth_single_blocks=2,
           vec_in_dim=64, guidance_embed=False),
    (1, 16, 8, 8), (20, 64),
)  # fmt: skip
# Rounded activations turn the last bit of a sum into another code, so what has to agree to 1e-5 keeps them in full.
LAYERS = "double_blocks.*img_mlp = w4a16\nsingle_blocks.*linear2 = w4a16\nblocks = keep"
SIZE = (8, 8)
STEPS = 12
LAYER = "diffusion_model.single_blocks.0.linear2"


@dataclass(frozen=True)
class Stack:
    """What is on the wire. site: of the cache, "" for none; quant: "", "canvas" or "file"; second: the model behind a
    switch, "" for none: "plain", or "same" for one that went through nodes of its own like the first."""

    name: str
    site: str = "model output"
    predictor: str | None = "Taylor"
    quant: str = ""
    compensated: bool = False
    second: str = ""
    in_matrix = True

    def __str__(self) -> str:
        return self.name

    @property
    def nodes(self) -> str:
        parts = {
            "cache": self.site, "predictor": self.site and self.predictor, "quantize": self.quant == "canvas",
            "files": self.quant == "file", "compensator": self.compensated, "switch": self.second,
        }  # fmt: skip
        return " ".join(name for name, there in parts.items() if there)

    @property
    def without_cache(self) -> Stack:
        return replace(self, site="")


CACHE = Stack("cache", predictor=None)
TAYLOR = Stack("cache + Taylor")
QUANTISED = Stack("cache + Taylor + 4 bit", quant="canvas")
COMPENSATED = Stack("cache + Taylor + 4 bit + compensator", quant="canvas", compensated=True)
LOADED = Stack("cache + Taylor + 4-bit file", quant="file")
SWITCHED = Stack("switch(cache + Taylor, the same)", second="same")
EVERYTHING = Stack(
    "switch(cache + Taylor + 4 bit + compensator, the same)", "last block", "Taylor", "canvas", True, "same"
)
STACKS = [CACHE, TAYLOR, QUANTISED, COMPENSATED, LOADED, SWITCHED, EVERYTHING]


class Bench:
    """Makes stacks; the networks and what is quantised of them are made once."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab, self.folder = lab, folder
        self._made: dict = {}

    def once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def network(self, number: int = 0):
        """A clone of the tiny Flux; number tells two sets of weights apart."""
        return self.once(number, lambda: self._network(number)).clone()

    def _network(self, number: int):
        model = families._build(TINY, {**TINY.config})
        weights = random_weights(model.diffusion_model, seed=number)
        model.diffusion_model.load_state_dict(weights)
        device = comfy.model_management.get_torch_device()
        return comfy.model_patcher.ModelPatcher(
            model.eval(), load_device=device, offload_device=comfy.model_management.unet_offload_device()
        )

    def base(self, stack: Stack, number: int = 0):
        """The model that the stack's other nodes stand on."""
        if not stack.quant:
            return self.network(number)
        made = self.once(("quantised", number), lambda: quantise(self.network(number), QuantWish(layers=LAYERS)))
        if stack.quant == "canvas":
            return made.clone()
        return self.once(("file", number), lambda: self._from_file(made, number)).clone()

    def _from_file(self, model, number: int):
        emoji.accept_small_flux()
        kept = folder_paths.folder_names_and_paths["diffusion_models"]
        folder_paths.folder_names_and_paths["diffusion_models"] = ([str(self.folder)], kept[1])
        cached, folder_paths.filename_list_cache = folder_paths.filename_list_cache, {}
        try:
            file, _ = quant_files.save(model, f"tiny{number}")
            return quant_load.load(file)
        finally:
            folder_paths.folder_names_and_paths["diffusion_models"] = kept
            folder_paths.filename_list_cache = cached

    def model(self, stack: Stack, every: int = 2, dress: Callable = lambda model: model):
        """The stack with every `every`-th step computed. dress: what another node does to each of its models."""
        model = self._side(stack, 0, every, dress)
        if stack.second:
            second = self._side(stack if stack.second == "same" else Stack("", ""), 1, every, dress)
            model = add_switch(model, second, SwitchConfig(0.5, node_id="s"))
        return model

    def _side(self, stack: Stack, number: int, every: int, dress: Callable):
        model = dress(self.base(stack, number))
        if stack.compensated:
            config = CompensatorConfig("none", 2, node_id=f"e{number}", reference=ORIGINAL)
            model = add_compensator(model, config)
        if stack.site:
            model = self.lab.every(model, every, site=stack.site, predictor=stack.predictor, node=f"c{number}")
        return model

    def sample(self, model, **options) -> torch.Tensor:
        return self.lab.sample(model, **{"steps": STEPS, "size": SIZE, **options})

    def reports(self, stack: Stack) -> list[dict]:
        """What the stack's caches did in the last run, that of the model that begins first."""
        numbers = (0, 1) if stack.second == "same" else (0,)
        return [events.last_report(_Node(f"c{number}")) for number in numbers]


@dataclass(frozen=True)
class _Node:
    node: str

    @property
    def node_ids(self) -> tuple[str, ...]:
        return (self.node,)


# Situations: (bench, model) -> what was sampled


@dataclass(frozen=True)
class Situation:
    """rows: the hazards; run: samples; fills: what every cache fills in its last run, at least; near: the largest
    relative difference from the same without a cache; split: whether every cond in a call of its own must give the
    same."""

    name: str
    rows: str
    run: Callable[[Bench, object], torch.Tensor]
    fills: int = 2
    near: float = 0.3
    split: bool = True

    def __str__(self) -> str:
        return self.name


def _with(**options) -> Callable:
    return lambda bench, model: bench.sample(model, **{"cfg": 3.0, **options})


def _cfg(bench: Bench, model) -> torch.Tensor:
    return torch.cat([bench.sample(model, cfg=cfg) for cfg in (1.0, 3.0, 1.0)])


def _guided(bench: Bench, model) -> torch.Tensor:
    return scenes.guided(bench.lab, model, STEPS)


def _areas(bench: Bench, model) -> torch.Tensor:
    corner = {"area": (4, 4, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
    corner = node_helpers.conditioning_set_values(emoji.conditioning("red heart"), corner)
    return bench.sample(model, cfg=3.0, positive=emoji.conditioning("cat face") + corner)


def _masks(bench: Bench, model) -> torch.Tensor:
    left = torch.zeros(1, *SIZE)
    left[..., :4] = 1.0
    positive = []
    for text, mask in (("cat face", left), ("red heart", 1.0 - left)):
        values = {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False}
        positive += node_helpers.conditioning_set_values(emoji.conditioning(text), values)
    return bench.sample(model, cfg=3.0, positive=positive)


def _packed(bench: Bench, model) -> torch.Tensor:
    """Three conds in a call until memory gets short, then two and one."""
    positive = emoji.conditioning("cat face") + emoji.conditioning("red heart")
    together = bench.sample(model, cfg=3.0, positive=positive)
    true_free, calls = comfy.model_management.get_free_memory, []
    bases = [bench.network(number).model for number in (0, 1)]
    if model.model not in bases:
        bases = [model.model]

    def required(shape, *args, **kwargs):
        calls.append(shape[0])
        return 1.0 if shape[0] < 3 else 1e30

    def pack(step, *_):
        if step == 3:
            comfy.model_management.get_free_memory = lambda device=None, torch_free_too=False: (
                true_free(device, True) if torch_free_too else 1e20
            )
            for base in bases:
                base.memory_required = required

    try:
        apart = bench.sample(model, cfg=3.0, positive=positive, callback=pack)
    finally:
        comfy.model_management.get_free_memory = true_free
        for base in bases:
            vars(base).pop("memory_required", None)
    assert 3 in calls and 2 in calls
    assert relative(apart, together) < 1e-5
    return apart


def _batch(bench: Bench, model) -> torch.Tensor:
    both = bench.sample(model, prompts=["cat face", "red heart"])
    assert relative(both[:1], bench.sample(model, prompts=["cat face"])) < 1e-5
    return both


def _long_negative(bench: Bench, model) -> torch.Tensor:
    tokens, values = emoji.conditioning("hamburger")[0]
    return bench.sample(model, cfg=3.0, negative=[[torch.cat([tokens] * 5 + [tokens[:, :1]], 1), values]])


def _controlnet(bench: Bench, model) -> torch.Tensor:
    control = scenes.Residuals({"input": [(16, 128)], "output": [(16, 128)] * 2})
    control.set_cond_hint(torch.zeros(1, 3, 32, 32), 1.0, (0.2, 0.7))
    values = {"control": control, "control_apply_to_uncond": True}
    positive = node_helpers.conditioning_set_values(emoji.conditioning("hamburger"), values)
    result = bench.sample(model, cfg=3.0, positive=positive, steps=20)
    assert control.calls
    return result


def _lora_hooks(bench: Bench, model) -> torch.Tensor:
    """On a layer in 16 bit: what is quantised refuses a hook in a sentence."""
    weight = bench.network().model.diffusion_model.txt_in.weight
    patch = 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    hooks = comfy.hooks.create_hook_lora({"diffusion_model.txt_in.diff": patch}, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    positive = comfy.hooks.set_hooks_for_conditioning(emoji.conditioning("hamburger"), hooks)
    return bench.sample(model, positive=positive, steps=20)


def _skipped_layer(bench: Bench, model) -> torch.Tensor:
    return bench.sample(scenes.skip_layer_guided(model, 0), cfg=3.0)


def _reference(bench: Bench, model) -> torch.Tensor:
    reference = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(9))
    values = {"reference_latents": [reference]}
    return bench.sample(
        model, cfg=3.0, positive=node_helpers.conditioning_set_values(emoji.conditioning("hamburger"), values)
    )


def _picture(seed: int = 2) -> torch.Tensor:
    return torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(seed))


def _inpainted(bench: Bench, model) -> torch.Tensor:
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 2:6, 2:6] = 1.0
    options = {"latent": _picture(), "noise_mask": mask, "cfg": 3.0}
    result = bench.sample(model, **options)
    kept = mask.expand_as(result) == 0
    assert torch.equal(result[kept], bench.sample(bench.network(), **options)[kept])
    return bench.sample(model, **options)


def _off_grid(bench: Bench, model) -> torch.Tensor:
    """Sigmas a little beside those of the schedule, and a schedule entry that is nonsense."""

    def sampler(wrapped, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        extra_args["model_options"]["transformer_options"]["sample_sigmas"] = torch.tensor([0.0, 0.0])
        for now, after in itertools.pairwise(sigmas):
            sigma = now * (1 - 1e-4)
            denoised = wrapped(x, sigma * x.new_ones(x.shape[0]), **extra_args)
            x = x + (x - denoised) / sigma * (after - now)
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    with torch.inference_mode():
        return guider.sample(
            _picture(1), bench.lab.latent(model, 1, SIZE), comfy.samplers.KSAMPLER(sampler), sigmas,
            disable_pbar=True, seed=1,
        )  # fmt: skip


def _halves(bench: Bench, model) -> torch.Tensor:
    first = bench.sample(model, steps=20, last_step=10, force_full_denoise=False)
    return bench.sample(model, steps=20, start_step=10, latent=first, disable_noise=True)


def _sizes(bench: Bench, model) -> torch.Tensor:
    """Two sizes, a batch, another number of steps, a second sampler on the first one's result; the last as asked."""
    results = [bench.sample(model, size=(4, 12)), bench.sample(model, batch=3), bench.sample(model, steps=9)]
    small = bench.sample(model)
    results.append(bench.sample(model, latent=torch.nn.functional.interpolate(small, scale_factor=1.5), denoise=0.8))
    results.append(bench.sample(model))
    return torch.cat([result.flatten() for result in results])


SITUATIONS = [
    Situation("a negative", "H08", _with(batch=2)),
    Situation("sizes, batches and steps", "H12 H13", _sizes),
    Situation("cfg on and off", "H20", _cfg),
    Situation("guidance that appears", "H21", _guided, 1),
    Situation("prompt schedule", "H22", lambda bench, model: bench.sample(model, positive=scenes.scheduled(), cfg=3.0)),
    Situation("areas", "H23", _areas),
    Situation("masks", "H24", _masks),
    Situation("packed two and one", "H25", _packed),
    Situation("batch", "H26", _batch),
    Situation("long negative", "H27", _long_negative),
    Situation("ControlNet", "H28", _controlnet, 1),
    Situation("LoRA schedule", "H29", _lora_hooks, 1),
    Situation("skipped layer", "H30", _skipped_layer),
    Situation("reference latents", "H31", _reference),
    Situation("heun", "H40", _with(sampler="heun")),
    Situation("dpm_2", "H40", _with(sampler="dpm_2")),
    Situation("karras", "H41", _with(scheduler="karras"), 1),
    Situation("beta", "H41", _with(scheduler="beta")),
    Situation("euler_ancestral", "H42", _with(sampler="euler_ancestral"), 1, 0.5),
    Situation("dpmpp_2m", "H43", _with(sampler="dpmpp_2m")),
    Situation("uni_pc", "H43", _with(sampler="uni_pc")),
    Situation("res_multistep", "H43", _with(sampler="res_multistep")),
    Situation("late start", "H44", lambda bench, model: bench.sample(model, latent=_picture(), denoise=0.6, steps=20)),
    Situation("off the grid", "H46", _off_grid),
    Situation("inpainting", "H47", _inpainted),
    Situation("two halves", "H48", _halves, 0),
]


def in_order(order: str):
    """A model_function_wrapper that evaluates the conds of a call one by one, "forward" or "backward"."""

    def wrapper(apply_model, arguments):
        count = len(arguments["cond_or_uncond"])
        rows = arguments["input"].shape[0] // count
        out = [None] * count
        for i in sorted(range(count), reverse=order == "backward"):
            part = slice(i * rows, (i + 1) * rows)
            c = {k: v[part] if torch.is_tensor(v) else v for k, v in arguments["c"].items()}
            options = dict(c["transformer_options"])
            options["cond_or_uncond"] = [options["cond_or_uncond"][i]]
            options["uuids"] = [options["uuids"][i]]
            c["transformer_options"] = options
            out[i] = apply_model(arguments["input"][part], arguments["timestep"][part], **c)
        return torch.cat(out)

    return wrapper


@contextlib.contextmanager
def apart():
    """Every cond in a call of its own, as when memory is short."""
    true_free = comfy.model_management.get_free_memory
    comfy.model_management.get_free_memory = lambda device=None, torch_free_too=False: (
        true_free(device, True) if torch_free_too else 1
    )
    try:
        yield
    finally:
        comfy.model_management.get_free_memory = true_free
