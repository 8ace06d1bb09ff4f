"""The models of `bench compensation`: the trained small ones, cached at a third of the steps and in 4 bit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from .fidelity import PROMPTS as HELD_OUT

STEPS, COMPUTED = 30, 10
SMALL_STEPS = 12  # T-Stitch's 40 % of the early steps
FIT_RUNS, FIT_BATCH = 3, 6  # of the runs the last one is for keeping or dropping what the others gave
SEED, FIT_SEED = 4000, 500
SHARE = 0.1  # of the weights, raised to 8 bit for the time of the anchors
QUANTISERS = {"RTN": "rtn", "ConvRot": "convrot", "SVDQuant": "svdquant", "SVDQuant + GPTQ": "svdquant_gptq"}


@dataclass
class Lab:
    """One model with the runs everything is measured on. truth: final latents of the unseen ones."""

    name: str
    base: object
    seen: object
    unseen: object
    truth: object = None
    seconds: float = 0.0
    _known: tuple | None = None

    def known(self) -> tuple:
        """The full model's trajectories and latents of the runs that terms are fitted on, sampled once."""
        from slipstream.host.calibrate import fitting

        if self._known is None:
            self._known = fitting.references(self.seen, False)
        return self._known


def lab_of(name: str, pictures: int) -> Lab:
    import comfy.samplers
    import torch
    from slipstream.demo import emoji
    from slipstream.host.calibrate.job import Job

    base = emoji.load_flux() if name == "flux" else quick_attention(emoji.load_unet())
    sampler = comfy.samplers.sampler_object("euler")
    scheduler = "simple" if name == "flux" else "normal"
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), scheduler, STEPS)

    def job(prompts, runs: int, batch: int, seed: int) -> Job:
        each = tuple(
            (emoji.conditioning([prompts[(i * batch + k) % len(prompts)] for k in range(batch)]), seed + i)
            for i in range(runs)
        )
        latent = {"samples": torch.zeros(batch, 16, 16, 16)}
        return Job(base, each, emoji.conditioning([""] * batch), 1.0, sampler, sigmas, latent)

    lab = Lab(f"tiny_{'flux' if name == 'flux' else 'sd15'}_emoji", base,
              job(emoji.PROMPTS, FIT_RUNS, FIT_BATCH, FIT_SEED), job(HELD_OUT, 1, pictures, SEED))  # fmt: skip
    began = time.process_time()
    lab.truth = lab.unseen.sample(base, 0)
    lab.seconds = time.process_time() - began
    return lab


def quick_attention(model):
    """The model with the host's attention by PyTorch; what it takes on a CPU by itself is slower, with the same result
    but for rounding."""
    from comfy.ldm.modules.attention import attention_pytorch

    clone, attention = model.clone(), attention_pytorch.__wrapped__
    options = clone.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda _, *args, **kwargs: attention(*args, **kwargs)
    return clone


def cpu_seconds() -> None:
    """Let the compensator's account be of CPU seconds, as the rows are: other programs do not count."""
    from types import SimpleNamespace

    from slipstream.host import gauge
    from slipstream.host.compensate import compensator, reference

    compensator.time = reference.time = gauge.time = SimpleNamespace(perf_counter=time.process_time)


def quick_layers() -> None:
    """Let 4-bit layers multiply all groups at once and keep their unpacked weights: the exact reference's numbers up to
    the order of float32 sums, in half its time."""
    import torch
    from slipstream.kernels import reference
    from slipstream.kernels.layer import Layer
    from slipstream.quant import formats

    kept: dict[int, tuple] = {}
    exact = formats.linear

    def linear(x, layer, kernel=None):
        if layer.per_row or layer.act_bits != 4:
            return exact(x, layer, kernel)
        key = layer.weight.data_ptr()
        if key not in kept:
            groups = reference.unpack_int4(layer.weight).view(layer.n, -1, layer.group_size).float()
            kept[key] = layer.weight, (groups * layer.weight_scale.float().T[..., None]).flatten(1).T.contiguous()
        main = reference.main_input(x.reshape(-1, layer.k), layer.smooth, layer.unsigned, layer.rotation)
        codes, scales = reference.quantise_activations(main, group_size=layer.group_size, unsigned=layer.unsigned)
        rounded = codes.view(len(main), -1, layer.group_size).float().mul_(scales[..., None]).flatten(1)
        return reference.finish(rounded @ kept[key][1], x, layer.proj_down, layer.proj_up, layer.bias)

    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(-128, 128, (64, 64), generator=generator, dtype=torch.int8)
    x = torch.randn(9, 128, generator=generator)
    layer = Layer(packed, torch.rand(2, 64, generator=generator))
    true = exact(x, layer)
    if float((linear(x, layer) - true).norm() / true.norm()) > 1e-5:
        raise SystemExit("the bench's 4-bit layer is not that of kernels/reference.py any more; compare the two")
    kept.clear()
    formats.linear = linear


def cached(model, lab: Lab, order: int, computed: int = COMPUTED, more: Sequence[float] = ()):
    """The model with even key steps and `more`, and reuse (order 0) or Taylor, as a profile and Cache Loader do it."""
    import torch
    from slipstream.engine.calibration.profile import Profile
    from slipstream.engine.calibration.search import uniform
    from slipstream.engine.calibration.statistics import TrajectoryStatistics
    from slipstream.engine.run.plan import CacheConfig, PredictorConfig
    from slipstream.host.model import add_cache, add_predictor
    from slipstream.host.parts import PROFILE

    if order:
        model = add_predictor(model, PredictorConfig("Taylor", order))
    model = add_cache(model, CacheConfig(node_id="b"))
    square = torch.eye(STEPS, dtype=torch.float64)
    nothing = TrajectoryStatistics(tuple(map(float, range(STEPS))), square, square, square[0])
    keys = tuple(sorted({*uniform(STEPS, computed), *map(round, more)}))
    rule = f"{'newton' if order else 'reuse'} {order}"
    profile = Profile(keys, lab.seen.values, nothing, "", "", rule)
    model.set_attachments(PROFILE, profile)
    return model


def seen_inputs(lab: Lab, names) -> dict:
    """Statistics of the inputs of these layers, from the first calibration run."""
    from slipstream.host.quantise.loras import PREFIX
    from slipstream.quant.calibration import Collector

    layers = {name: lab.base.get_model_object(PREFIX + name) for name in names}
    collectors = {name: Collector(layer.weight.shape[1], hessian=True) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: collectors[name].add(args[0], rows=512))
        for name, layer in layers.items()
    ]
    try:
        lab.seen.sample(lab.base, 0)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: collector.statistics() for name, collector in collectors.items()}


def quantised_models(lab: Lab) -> dict[str, object]:
    """Every quantiser's model, and the last one's with a tenth of its weights in 8 bit, the worst layers first."""
    from slipstream.host.quantise.choose import QuantWish
    from slipstream.host.quantise.loras import PREFIX, original
    from slipstream.host.quantise.placed import Quantised, place
    from slipstream.host.quantise.quantise import quantise, quantised
    from slipstream.quant.layer import output_error, quantise_linear
    from slipstream.quant.linear import W4A4Linear
    from slipstream.quant.rotate import rotation_size

    from lab.methods import METHODS, with_spec

    data_free = quantised(quantise(lab.base, QuantWish(format="convrot_w4a4"))).layers
    names = [name for name, layer in data_free.items() if layer.format == "convrot_w4a4"]
    seen = seen_inputs(lab, names)
    models, layers = {}, {}

    def weights(name: str):
        own = lab.base.get_model_object(PREFIX + name)
        return original(lab.base, name, own), original(lab.base, name, own, "bias")

    def model_of(found: dict):
        clone = lab.base.clone()
        place(clone, Quantised(found, {}))
        return clone

    for title, method in QUANTISERS.items():
        layers = dict(data_free)
        for name in names:
            weight, bias = weights(name)
            spec = METHODS[method]
            if spec.format == "convrot_w4a4":
                spec = with_spec(spec, group_size=rotation_size(weight.shape[1]))
            spec = with_spec(spec, rank=min(spec.rank, *weight.shape))
            data = seen[name] if spec.gptq or spec.smooth == "search" else None
            layers[name] = W4A4Linear(quantise_linear(weight, bias, spec, data).layer)
            layers[name].managed = True
        models[title] = model_of(layers)
    size = {name: weights(name)[0].numel() for name in names}
    worst = sorted(names, key=lambda n: -output_error(weights(n)[0], layers[n].layer(), seen[n].rows, weights(n)[1]))
    left, raised = SHARE * sum(size.values()), dict(layers)
    for name in worst:
        if size[name] <= left:
            left -= size[name]
            weight, bias = weights(name)
            spec = with_spec(METHODS["int8_convrot"], group_size=rotation_size(weight.shape[1]))
            raised[name] = W4A4Linear(quantise_linear(weight, bias, spec).layer)
            raised[name].managed = True
    models["raised"] = model_of(raised)
    return models
