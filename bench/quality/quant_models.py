"""What quantising by one method after the other costs the trained small models, also with outliers put into them.

The part of `bench quant_quality` that runs whole models in the host; there is no other caller.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lab.rows import mean, mean_db

from .fidelity import PROMPTS as HELD_OUT_PROMPTS

STEPS, PICTURES, CALIBRATED = 30, 6, 4
SEED, CALIBRATION_SEED = 4000, 500
REPLAYED = (0, 5, 10, 15, 20, 25, STEPS - 1)  # steps whose inputs every method gets from the full run
CROSSING = (1, 2, 3, 5, 10)  # sizes of the outliers between which smoothing begins to pay
SHARE = 0.03  # of the input channels get an outlier, as in the research's prototype
MODULATION, ROWS, HESSIAN = "modulation", "rows", "rows, Hessian"
RTN, CONVROT, KITCHEN = "RTN, groups of 64", "ConvRot", "ConvRot, comfy-kitchen's eager code"
PLAIN, SMOOTHED, BEST_KNOWN = "Hadamard + SVD", "Hadamard + SVD, modulation", "SVDQuant + GPTQ"


@dataclass(frozen=True)
class Method:
    """What is done to every layer that the policy gives 4 bit. data: what of the calibration it may look at; spec: None
    for comfy-kitchen's own quantiser; brief: also on models where only the main methods are shown."""

    name: str
    data: str
    spec: object
    brief: bool = False


def methods() -> list[Method]:
    """In the order of the tables."""
    from lab.methods import METHODS, with_spec

    rotated = METHODS["hadamard_svd"]
    kitchen = []
    try:
        import comfy_kitchen  # noqa: F401

        kitchen = [Method(KITCHEN, "none", None)]
    except ImportError:
        pass
    return [
        Method(RTN, "none", METHODS["rtn"], True),
        Method(CONVROT, "none", METHODS["convrot"], True),
        *kitchen,
        Method("Hadamard", "none", with_spec(rotated, rank=0)),
        Method(PLAIN, "none", rotated, True),
        Method(SMOOTHED, MODULATION, with_spec(rotated, smooth="modulation"), True),
        Method("SVDQuant", ROWS, METHODS["svdquant"], True),
        Method(BEST_KNOWN, HESSIAN, METHODS["svdquant_gptq"], True),
        Method("SVDQuant + Hadamard", ROWS, METHODS["hadamard_svdquant"]),
        Method("SVDQuant + Hadamard + GPTQ", HESSIAN, METHODS["hadamard_svdquant_gptq"], True),
        Method("SVDQuant, W4A8", ROWS, METHODS["w4a8"]),
        Method("SVDQuant, W4A16", ROWS, METHODS["w4a16"]),
        Method("int8 ConvRot (W8A8)", "none", METHODS["int8_convrot"]),
    ]


@dataclass
class Full:
    """The run in full that the methods are held against."""

    sample: Callable
    final: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[tuple[tuple, dict]] = field(default_factory=list)


def sampler(model, scheduler: str) -> Callable:
    """sample(model, prompts, seed) -> final latents of a batch, `STEPS` euler steps, cfg 1."""
    import comfy.sample
    import comfy.samplers
    from slipstream.demo import emoji

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, STEPS)
    euler = comfy.samplers.sampler_object("euler")

    def sample(model, prompts: tuple[str, ...], seed: int) -> Tensor:
        latent = torch.zeros(len(prompts), 16, 16, 16)
        noise, prompt = comfy.sample.prepare_noise(latent, seed), emoji.conditioning(prompts)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, 1.0, euler, sigmas, prompt, prompt, latent, disable_pbar=True, seed=seed
            )

    return sample


@contextmanager
def hooked(network: torch.nn.Module, hook: Callable) -> Iterator[None]:
    handle = network.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def held_out() -> tuple[str, ...]:
    return HELD_OUT_PROMPTS[:PICTURES]


def run_in_full(model, sample: Callable) -> Full:
    """The held-out pictures by the model as it is, with the network's input and output at every step."""
    full = Full(sample, torch.empty(0))

    def keep(network, args, kwargs, output):
        full.calls.append(((args[0].clone(), *args[1:]), dict(kwargs)))
        full.outputs.append(output.clone())

    with hooked(model.model.diffusion_model, keep):
        full.final = sample(model, held_out(), SEED)
    return full


def score(model, full: Full) -> dict:
    """PSNR of the final latents, and relative error of the network's output in percent, on its own way and where the
    full run was."""
    from slipstream.engine.metrics import psnr, relative_error

    own, equal = [], {}

    def compare(network, args, kwargs, output):
        step = len(own)
        if step in equal:  # this is the call below
            return
        if step in REPLAYED:
            equal[step] = 0.0
            inputs, options = full.calls[step]
            equal[step] = 100 * relative_error(network(*inputs, **options), full.outputs[step])
        own.append(100 * relative_error(output, full.outputs[step]))

    with hooked(model.model.diffusion_model, compare):
        final = full.sample(model, held_out(), SEED)
    scores = [psnr(value, true) for value, true in zip(final, full.final, strict=True)]
    middle = STEPS // 2
    return {
        "psnr_db": mean_db(scores), "psnr_min_db": min(scores),
        "equal": mean(equal.values()), "equal_first": equal[0], "equal_middle": equal[middle],
        "equal_last": equal[STEPS - 1],
        "own": mean(own), "own_middle": own[middle], "own_last": own[-1],
    }  # fmt: skip


def calibration(model, sample: Callable) -> dict:
    """Layer -> statistics of its input in a full run of other prompts and another seed, at every third step."""
    from slipstream.demo import emoji
    from slipstream.quant.calibration import Collector

    prompts = tuple(p for p in emoji.PROMPTS if p not in HELD_OUT_PROMPTS)[:CALIBRATED]
    network, calls = model.model.diffusion_model, [0]
    layers = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    collectors = {name: Collector(layer.in_features, hessian=True) for name, layer in layers.items()}

    def see(name: str) -> Callable:
        def hook(module, args):
            if calls[0] % 3 == 0:
                collectors[name].add(args[0])

        return hook

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    try:
        with hooked(network, lambda *_: calls.__setitem__(0, calls[0] + 1)):
            sample(model, prompts, CALIBRATION_SEED)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: collector.statistics() for name, collector in collectors.items()}


@dataclass(frozen=True)
class Chosen:
    """A layer that the family's policy gives 4 bit, as it is in the file."""

    layer: torch.nn.Linear
    group: str
    after_gelu: bool


def chosen(network: torch.nn.Module) -> dict[str, Chosen]:
    """By name; to be asked before anything is quantised, for the host exchanges the network's modules."""
    from slipstream.engine.families import architecture_of
    from slipstream.quant import policy

    layers = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    shapes = {name: tuple(m.weight.shape) for name, m in layers.items()}
    plan = policy.plan(shapes, policy.policy_for(architecture_of(network).policy), "", policy.LIMITS)
    return {n: Chosen(layers[n], c.group, c.after_gelu) for n, c in plan.items() if c.treatment == "w4a4"}


def spans_of(network: torch.nn.Module) -> dict[str, Tensor]:
    """What the network's modulation tells of the inputs of its layers, by name."""
    from slipstream.engine.families import architecture_of
    from slipstream.host.quantise import modulation

    return modulation.spans(network, architecture_of(network).modulation)


def layers_of(choices: dict[str, Chosen], method: Method, seen: dict, spans: dict[str, Tensor]) -> dict:
    """The chosen layers by this method, as modules by name."""
    from slipstream.quant.layer import quantise_group
    from slipstream.quant.linear import W4A4Linear

    groups: dict[str, list[str]] = {}
    for name, choice in choices.items():
        groups.setdefault(choice.group, []).append(name)
    found = {}
    with torch.inference_mode(False), torch.no_grad():
        for names in groups.values():
            layers = [choices[name].layer for name in names]
            weights = [layer.weight.detach().clone() for layer in layers]
            biases = [None if layer.bias is None else layer.bias.detach().clone() for layer in layers]
            if method.spec is None:
                made = [KitchenConvRot(w, b) for w, b in zip(weights, biases, strict=True)]
            else:
                spec, statistics = fitted(method, choices[names[0]], sum(map(len, weights)), seen, spans, names[0])
                made = [W4A4Linear(one) for one in quantise_group(weights, biases, spec, statistics).layers]
            found.update(zip(names, made, strict=True))
    return found


def fitted(method: Method, choice: Chosen, outputs: int, seen: dict, spans: dict[str, Tensor], name: str) -> tuple:
    """(the method's specification for a group that begins with this layer, what it may know of its input)."""
    from slipstream.quant.calibration import ActivationStatistics

    from lab.methods import with_spec

    spec = with_spec(method.spec, rank=min(method.spec.rank, outputs, choice.layer.in_features))
    if method.data == MODULATION:
        return spec, ActivationStatistics(spans[name]) if name in spans else None
    if method.data == "none":
        return spec, None
    if choice.after_gelu and not spec.rotation:
        spec = with_spec(spec, act_unsigned=True)
    return spec, seen[name] if method.data == HESSIAN else replace(seen[name], hessian=None)


def patched(model, layers: dict[str, torch.nn.Module]):
    """A clone with these layers in their places; all others are left in full."""
    clone = model.clone()
    for name, layer in layers.items():
        clone.add_object_patch(f"diffusion_model.{name}", layer)
    clone.patches_uuid = uuid.uuid4()  # else the host takes what is loaded for this clone's weights
    return clone


class KitchenConvRot(torch.nn.Module):
    """comfy-kitchen's own quantiser and layer, its eager code."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from comfy_kitchen.backends.eager import convrot_w4a4
        from slipstream.quant.rotate import rotation_size

        super().__init__()
        self.code, self.group = convrot_w4a4, rotation_size(weight.shape[1])
        self.codes, self.scales = convrot_w4a4.quantize_convrot_w4a4_weight(weight, self.group)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = self.code.convrot_w4a4_linear(x.flatten(0, -2), self.codes, self.scales, self.bias, self.group)
        return rows.unflatten(0, x.shape[:-1])


def put_outliers(network: torch.nn.Module, magnitude: float, seed: int = 0) -> None:
    """Some channels behind every modulated or weighted norm become `magnitude` times as large, and the weights that
    take them as much smaller: the same function up to rounding."""
    generator = torch.Generator().manual_seed(seed)

    def factor(k: int) -> Tensor:
        found = torch.ones(k)
        found[torch.randperm(k, generator=generator)[: max(1, round(SHARE * k))]] = magnitude
        return found

    def modulated(lin: torch.nn.Linear, first: int, *readers: torch.nn.Linear) -> None:
        """Parts `first` and `first + 1` of the modulation are shift and scale: s -> f s, 1 + c -> f (1 + c)."""
        k = readers[0].in_features
        f = factor(k)
        for part, extra in ((first, 0.0), (first + 1, f - 1)):
            rows = slice(part * k, (part + 1) * k)
            lin.weight.data[rows] *= f[:, None]
            lin.bias.data[rows] = lin.bias.data[rows] * f + extra
        for reader in readers:
            reader.weight.data /= f

    for block in getattr(network, "double_blocks", ()):
        for stream in ("img", "txt"):
            lin = getattr(block, f"{stream}_mod").lin
            modulated(lin, 0, getattr(block, f"{stream}_attn").qkv)
            modulated(lin, 3, getattr(block, f"{stream}_mlp")[0])
    for block in getattr(network, "single_blocks", ()):
        modulated(block.modulation.lin, 0, block.linear1)
    for block in network.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            one = block.attn1
            for norm, readers in (
                (block.norm1, (one.to_q, one.to_k, one.to_v)),
                (block.norm2, (block.attn2.to_q,)),
                (block.norm3, (block.ff.net[0].proj,)),
            ):
                f = factor(norm.weight.numel())
                norm.weight.data *= f
                norm.bias.data *= f
                for reader in readers:
                    reader.weight.data /= f


def scenes() -> list[tuple[str, Callable, str, int, bool]]:
    """(name, loader, scheduler, magnitude of the outliers, only the main methods)."""
    from slipstream.demo import emoji

    flux, unet = (emoji.load_flux, "simple"), (emoji.load_unet, "normal")
    return [
        ("Flux", *flux, 1, False),
        ("Flux, outliers x30", *flux, 30, False),
        ("Flux, outliers x100", *flux, 100, True),
        ("SD1.5", *unet, 1, False),
        ("SD1.5, outliers x30", *unet, 30, True),
    ]


def whole_models(only: Callable[[str], bool] = lambda name: True) -> list[dict]:
    """One row per model and method."""
    from slipstream.engine.metrics import relative_error

    rows = []
    plain: dict[str, Tensor] = {}
    for name, load, scheduler, magnitude, brief in scenes():
        if not only(name):
            continue
        model = load()
        sample = sampler(model, scheduler)
        kind = name.split(",")[0]
        if magnitude > 1:
            if kind not in plain:
                plain[kind] = sample(model, held_out(), SEED)
            put_outliers(model.model.diffusion_model, magnitude)
        full = run_in_full(model, sample)
        plain.setdefault(kind, full.final)
        changed = relative_error(full.final, plain[kind])
        if changed > 1e-3:
            raise SystemExit(f"The outliers of {name} changed the model's pictures by {changed:.1e}.")
        network = model.model.diffusion_model
        choices = chosen(network)
        seen, spans = calibration(model, sample), spans_of(network)
        for method in methods():
            if brief and not method.brief:
                continue
            busy = time.process_time()
            layers = layers_of(choices, method, seen, spans)
            row = {"model": name, "method": method.name, "data": method.data, "changed": changed, "steps": STEPS,
                   "sampler": "euler", "runs": PICTURES, "cpu_seconds": time.process_time() - busy}  # fmt: skip
            rows.append(row | score(patched(model, layers), full))
    return rows


def crossing(magnitudes: tuple[int, ...] = CROSSING) -> list[dict]:
    """Where smoothing by the modulation begins to pay: one row per size of the outliers put into the small Flux."""
    from slipstream.demo import emoji
    from slipstream.host.quantise import modulation

    pair = [m for m in methods() if m.name in (PLAIN, SMOOTHED)]
    rows = []
    for magnitude in magnitudes:
        model = emoji.load_flux()
        network = model.model.diffusion_model
        put_outliers(network, magnitude)
        full = run_in_full(model, sampler(model, "simple"))
        choices, spans = chosen(network), spans_of(network)
        stand_out = sorted(modulation.prominence(spans[name]) for name in choices if name in spans)
        plain, smoothed = (replayed(network, layers_of(choices, method, {}, spans), full) for method in pair)
        rows.append({
            "outliers": f"x{magnitude}", "least": stand_out[0], "median": stand_out[len(stand_out) // 2],
            "most": stand_out[-1], "not smoothed": plain, "smoothed": smoothed,
        })  # fmt: skip
    return rows


def replayed(network: torch.nn.Module, layers: dict[str, torch.nn.Module], full: Full) -> float:
    """Mean relative error in percent of the network with these layers in place, on the full run's inputs."""
    from slipstream.engine.metrics import relative_error

    before = {name: network.get_submodule(name) for name in layers}

    def place(modules: dict[str, torch.nn.Module]) -> None:
        for name, module in modules.items():
            path, _, last = name.rpartition(".")
            setattr(network.get_submodule(path), last, module)

    place(layers)
    try:
        with torch.inference_mode():
            found = {step: network(*full.calls[step][0], **full.calls[step][1]) for step in REPLAYED}
    finally:
        place(before)
    return 100 * mean(relative_error(output, full.outputs[step]) for step, output in found.items())
