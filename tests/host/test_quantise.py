"""Quantised models inside the host: near the plain one, and nothing of the host's own is changed for good."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math

import comfy.lora
import comfy.model_management
import comfy.quant_ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import families
import folder_paths
import pytest
import torch
from comfy.patcher_extension import CallbacksMP
from sampling import TRAINED, relative
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.metrics import psnr
from slipstream.host.calibrate.calibrate import calibrate
from slipstream.host.calibrate.job import Job, Wish
from slipstream.host.parts import QUANTISED
from slipstream.host.profiles import folder as profiles
from slipstream.host.quantise import nvfp4
from slipstream.host.quantise import quantise as quantising
from slipstream.host.quantise.choose import CHOICES, FIRST_RUN, QuantWish
from slipstream.host.quantise.loras import give_loras, original
from slipstream.host.quantise.quantise import quantise, quantised, summary
from slipstream.quant import policy
from slipstream.quant.formats import FORMATS
from slipstream.quant.layer import quantise_linear
from slipstream.quant.linear import TOLERANCE, W4A4Linear, factors_of
from slipstream.quant.packed import QuantisedLinear

from bench.quality.quant_models import put_outliers
from lab.methods import METHODS, with_spec

MLP = "diffusion_model.double_blocks.0.img_mlp.0"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
PROJ = "diffusion_model.single_blocks.0.linear2"


def plain_sample(lab, model, **options):
    return lab.sample(model, steps=6, **options)


def linear_of(n=96, k=128, seed=0, bias=True, dtype=torch.float32, **changes) -> tuple[torch.Tensor, W4A4Linear]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    spec = with_spec(METHODS["hadamard_svd"], rank=16, **changes)
    return weight, W4A4Linear(quantise_linear(weight, offset, spec).layer)


def adapter(model, key: str, rank: int = 4, seed: int = 5, size: float = 0.3, part: slice | None = None):
    """A LoRA for one layer as the host reads it from a file: ({key: adapter}, up @ down)."""
    n, k = (model.get_model_object(key).out_features, model.get_model_object(key).in_features)
    rows = n if part is None else part.stop - part.start
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, rank, generator=generator) * size / math.sqrt(rank)
    down = torch.randn(rank, k, generator=generator) / math.sqrt(k)
    file = {"x.lora_up.weight": up, "x.lora_down.weight": down}
    found = comfy.weight_adapter.LoRAAdapter.load("x", file, float(rank) / 2, None, set())
    name = f"{key}.weight"
    return {name if part is None else (name, (0, part.start, rows)): found}, 0.5 * up @ down


def with_lora(model, strength: float = 1.0, keys: tuple[str, ...] = (MLP, QKV, PROJ), **options):
    model = model.clone()
    for key in keys:
        patches, _ = adapter(model, key, **options)
        assert model.add_patches(patches, strength)
    return model


@pytest.fixture(scope="module")
def flux4(lab):
    """The small Flux in 4 bit, quantised once for all tests of this file."""
    return quantise(lab.flux, QuantWish())


# The module


@pytest.mark.parametrize("name", ["hadamard_svd", "svdquant", "w4a8", "w4a16", "convrot", "int8_convrot"])
def test_module_is_the_reference(name):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    layer = quantise_linear(weight, torch.ones(96), METHODS[name]).layer
    module = W4A4Linear(layer)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    assert torch.equal(module(x), layer(x))
    assert torch.equal(module(x[:, :1]), layer(x[:, :1]))
    assert module(x[:0]).shape == (0, 5, 96)
    strided = torch.randn(128, 7).T
    assert torch.equal(module(strided), layer(strided.contiguous()))
    half = module(x.half() * 1000)
    assert half.dtype == torch.float16 and half.isfinite().all()
    module.set_lora(torch.ones(128, 2), torch.ones(96, 2))
    assert torch.equal(copy.deepcopy(module)(x), module(x)) and not torch.equal(module(x), layer(x))
    module.set_lora(None, None)
    assert torch.equal(copy.deepcopy(module)(x), layer(x))
    assert set(module.state_dict()) == set(layer.tensors)
    assert comfy.model_management.module_size(module) == layer.nbytes
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_no_conversion_touches_the_tensors(convert):
    _, module = linear_of()
    module.set_lora(torch.ones(128, 2), torch.ones(96, 2))
    before, x = {name: t.clone() for name, t in module.state_dict().items()}, torch.ones(3, 128)
    y = module(x)
    convert(module)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("name", ["hadamard_svd", "svdquant", "convrot", "int8_convrot"])
def test_stock_patching_of_the_module_is_exact_and_restores(name):
    """What `patch_weight_to_device` does with a module, without any of our callbacks."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    module = W4A4Linear(quantise_linear(weight, None, METHODS[name]).layer)
    x = torch.randn(9, 128)
    plain, backup = module(x), module.weight
    change = torch.randn(96, 5) @ torch.randn(5, 128) * 0.02
    module.set_weight(module.convert_weight(module.weight.float(), inplace=True) + change, inplace_update=False, seed=1)
    assert module.lora[0].shape[1] <= 16 and module.lora_error < TOLERANCE
    assert relative(module(x) - plain, x @ change.T) < 1e-3
    module.weight = torch.nn.Parameter(backup, requires_grad=False)  # the host's `set_attr_param`
    assert module.lora is None and torch.equal(module(x), plain)
    with pytest.raises(ValueError, match="hook"):
        module.set_weight(weight, inplace_update=True)
    assert torch.equal(module.set_weight(weight, return_weight=True), weight)


def test_factors_hold_what_they_can():
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(600, 40, generator=generator) @ torch.randn(40, 400, generator=generator)
    down, up, error = factors_of(exact)
    assert error < 1e-5 and down.shape == (400, 40) and up.shape == (600, 40)
    down, up, error = factors_of(torch.randn(600, 400, generator=generator))
    assert 0.5 < error < 1 and 2 * (down.numel() + up.numel()) <= 600 * 400 / 2
    assert factors_of(torch.zeros(8, 8)) == (None, None, 0.0)


# Quality


@pytest.mark.card
@pytest.mark.parametrize(("name", "floor"), [("flux", 25), ("trained_unet", 40)])
def test_quantised_sampling_is_near_the_plain_one(lab, name, floor, record_property):
    base = getattr(lab, name)
    plain = plain_sample(lab, base, batch=4, size=TRAINED)
    found = {}
    wishes = {format: QuantWish(format) for format in CHOICES} | {"auto, 8 bit": QuantWish(act_bits=8)}
    for label, wish in wishes.items():
        found[label] = psnr(plain_sample(lab, quantise(base, wish), batch=4, size=TRAINED), plain)
        record_property(label, f"{found[label]:.2f} dB")
    assert min(found.values()) > floor, found
    assert found["w4a8"] > found["svdquant_w4a4"] and found["int8_convrot"] > found["w4a8"] + 10, found
    assert torch.equal(plain_sample(lab, base, batch=4, size=TRAINED), plain)


@pytest.mark.parametrize("name", families.available())
def test_every_family_runs_quantised(monkeypatch, name):
    """Tiny random networks: every layer that the policy names, whatever its size."""
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(values=1))
    base = families.make(name)
    try:
        model = quantise(base, QuantWish())
    except SlipstreamError as error:
        assert "has no linear layer" in str(error)
        pytest.skip("its tiny network has no layer wide enough")
    latent = families.latent(name)
    noise = comfy.sample.prepare_noise(latent, 1)
    conds = families.conditioning(name, 11), families.conditioning(name, 12)

    def sample(patcher):
        with torch.inference_mode():
            return comfy.sample.sample(
                patcher, noise, 1, 3.0, "euler", "simple", *conds, latent, seed=1, disable_pbar=True
            )

    plain, result = sample(base), sample(model)
    assert not getattr(plain, "is_nested", False) or result.is_nested
    parts = zip(*(x.unbind() if getattr(x, "is_nested", False) else (x,) for x in (plain, result)), strict=True)
    for one, other in parts:
        assert 0 < relative(other, one) < 0.25  # measured: 0.18 at most, of 64 families
    again = sample(base)
    assert getattr(plain, "is_nested", False) or torch.equal(again, plain)


# The base model, clones, memory


@pytest.mark.card
def test_base_and_clones_in_turns(lab, flux4):
    base = lab.flux
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    plain, result = plain_sample(lab, base), plain_sample(lab, flux4)
    assert not torch.equal(plain, result)
    for model, expected in ((flux4.clone(), result), (base, plain), (flux4, result), (base.clone(), plain)):
        assert torch.equal(plain_sample(lab, model), expected)
    second = plain_sample(lab, flux4, sampler="heun")  # a second sampler in the same prompt
    assert relative(second, plain_sample(lab, base, sampler="heun")) < 0.1
    comfy.model_management.unload_all_models()
    assert torch.equal(plain_sample(lab, flux4), result)
    comfy.model_management.unload_all_models()
    assert torch.equal(plain_sample(lab, base), plain)
    comfy.model_management.unload_all_models()
    after = base.model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


def test_memory_is_the_packed_size(lab, flux4):
    base = lab.flux
    comfy.model_management.unload_all_models()
    sizes = {name: comfy.model_management.module_size(layer) for name, layer in quantised(flux4).layers.items()}
    rest = base.model_size() - sum(
        comfy.model_management.module_size(base.get_model_object("diffusion_model." + name)) for name in sizes
    )
    assert flux4.model_size() == rest + sum(sizes.values()) == flux4.clone().model_size()
    assert flux4.model_size() < 0.3 * base.model_size()
    plain_sample(lab, flux4)
    assert comfy.model_management.module_size(flux4.model) == flux4.model_size() == flux4.loaded_size()
    plain_sample(lab, base)
    assert comfy.model_management.module_size(base.model) == base.model_size()


@pytest.mark.parametrize("lora", [False, True])
def test_partial_load_and_unload(lab, flux4, lora):
    model = with_lora(flux4) if lora else flux4.clone()
    result = plain_sample(lab, model)
    comfy.model_management.unload_all_models()
    total, device = model.model_size(), model.load_device
    model.partially_load(device, extra_memory=total // 3)
    assert model.model.model_lowvram and 0 < model.loaded_size() < total
    assert torch.equal(_network(model), _network(model))
    part = plain_sample_loaded(lab, model)
    assert torch.equal(part, result)
    model.partially_load(device, extra_memory=10 * total)
    assert torch.equal(plain_sample_loaded(lab, model), result)
    freed = model.partially_unload(model.offload_device, total // 3)
    assert freed >= total // 3  # LoRA or not, our layers move
    assert torch.equal(plain_sample_loaded(lab, model), result)
    model.detach()
    assert torch.equal(plain_sample(lab, model), result)


def _network(model) -> torch.Tensor:
    return model.get_model_object(MLP)(torch.ones(1, model.get_model_object(MLP).in_features))


def plain_sample_loaded(lab, model):
    """Sampling with the model as it lies now: the host asks for nothing to be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
        return plain_sample(lab, model)


def test_weights_on_another_device_are_copied_for_the_call():
    _, module = linear_of()
    module.to("meta")
    assert module(torch.ones(2, 128, device="meta")).device.type == "meta"


# LoRA


@pytest.mark.card
def test_lora_before_and_after_and_removed(lab, flux4):
    base = lab.flux
    plain, full = plain_sample(lab, base), plain_sample(lab, with_lora(base))
    quantised_plain = plain_sample(lab, flux4)
    before, after = quantise(with_lora(base), QuantWish()), with_lora(flux4)
    result = plain_sample(lab, after)
    assert torch.equal(plain_sample(lab, before), result)
    assert torch.equal(plain_sample(lab, with_lora(flux4, 0.0)), quantised_plain)
    assert torch.equal(plain_sample(lab, flux4), quantised_plain)
    assert torch.equal(plain_sample(lab, base), plain)
    assert torch.equal(plain_sample(lab, with_lora(base)), full)
    assert torch.equal(plain_sample(lab, before), result)
    assert relative(full, plain) > 0.02
    # against full precision a LoRA costs no more than quantising did
    assert relative(result, full) < 2 * relative(quantised_plain, plain) + 0.01


def test_loras_of_clones_in_turns(lab, flux4):
    one, two = with_lora(flux4, seed=5), with_lora(flux4, seed=6)
    both, weak = with_lora(one, seed=6), with_lora(flux4, 0.25)
    models = {"one": one, "two": two, "both": both, "weak": weak, "none": flux4, "base": lab.flux}
    first = {name: plain_sample(lab, model) for name, model in models.items()}
    assert len({tuple(result.flatten()[:8].tolist()) for result in first.values()}) == len(models)
    for name in ("both", "one", "base", "two", "none", "weak", "one"):
        assert torch.equal(plain_sample(lab, models[name]), first[name]), name
    assert both.get_model_object(MLP) is one.get_model_object(MLP)


@pytest.mark.parametrize("kind", ["lora", "fused rows", "diff", "bias", "set strength", "lokr"])
def test_what_an_adapter_changes_in_a_layer(lab, flux4, kind):
    """The layer with the adapter minus the layer without is the input times the change, to the storage's rounding."""
    base, model = lab.flux, flux4.clone()
    module = model.get_model_object(MLP)
    n, k = module.out_features, module.in_features
    generator = torch.Generator().manual_seed(8)
    bias = torch.zeros(n)
    change, strength, strength_model = torch.zeros(n, k), 0.8, 1.0
    if kind == "lora":
        patches, change = adapter(base, MLP)
    elif kind == "fused rows":
        patches, part = adapter(base, MLP, part=slice(32, 96))
        change[32:96] = part
    elif kind == "bias":
        bias = torch.randn(n, generator=generator)
        patches = {f"{MLP}.bias": ("diff", (bias,))}
    elif kind == "lokr":
        one, two = torch.randn(4, 4, generator=generator) * 0.1, torch.randn(n // 4, 2, generator=generator)
        three = torch.randn(2, k // 4, generator=generator) * 0.1
        file = {"x.lokr_w1": one, "x.lokr_w2_a": two, "x.lokr_w2_b": three}
        patches = {f"{MLP}.weight": comfy.weight_adapter.LoKrAdapter.load("x", file, None, None, set())}
        change = torch.kron(one, two @ three)
    else:
        change = torch.randn(n, 7, generator=generator) @ torch.randn(7, k, generator=generator) * 0.01
        patches = {f"{MLP}.weight": ("diff", (change,))}
        strength_model = 0.5 if kind == "set strength" else 1.0
    assert model.add_patches(patches, strength, strength_model)
    x = torch.randn(20, k, generator=generator)
    comfy.model_management.load_models_gpu([flux4])
    without, stored = module(x), module.layer(lora=False).dequantise()
    comfy.model_management.load_models_gpu([model])
    found = module(x) - without
    expected = strength * (x @ change.T + bias) + (strength_model - 1) * x @ stored.T
    # half of a full-rank weight is no low-rank change: the layer was quantised anew, with an error of its own
    assert relative(found, expected) < (0.2 if kind == "set strength" else 2e-3)
    assert (module._change.whole is not None) == (kind == "set strength")
    assert f"{MLP}.weight" not in model.backup
    comfy.model_management.load_models_gpu([flux4])
    assert torch.equal(module(x), without)


def test_a_shared_patches_uuid_is_what_broke_object_patches(lab):
    """Why `quantise` gives its clone a uuid: without it the host puts modules in and out and restores into the wrong
    ones. Should this fail, the host has changed, and the reason in `host/quantise/quantise.py` with it."""
    base = emoji.load_flux()
    lora = with_lora(base)
    plain, full = plain_sample(lab, base), plain_sample(lab, lora)
    good, bad = quantise(lora, QuantWish()), quantise(lora, QuantWish(layers="# modules of its own"))
    bad.patches_uuid = lora.patches_uuid
    expected = plain_sample(lab, good)
    assert torch.equal(plain_sample(lab, lora), full)
    assert not torch.equal(plain_sample(lab, bad), expected)  # the LoRA is lost
    assert not torch.equal(plain_sample(lab, base), plain)  # and the base model damaged


def test_the_hosts_lora_loader_finds_the_layers(lab, flux4):
    """LoRA files are matched by the names in the network's state dict, whichever patcher is loaded at that time."""
    base = lab.flux
    file = {}
    for key in (MLP, QKV, PROJ):
        found = adapter(base, key)[0][f"{key}.weight"]
        file |= {f"{key}.lora_up.weight": found.weights[0], f"{key}.lora_down.weight": found.weights[1]}
        file[f"{key}.alpha"] = torch.tensor(2.0)
    expected = plain_sample(lab, with_lora(flux4))
    for loaded in (base, flux4):
        plain_sample(lab, loaded)
        model, _ = comfy.sd.load_lora_for_models(flux4, None, file, 1.0, 0.0)
        assert len(model.patches) == 3
        assert torch.equal(plain_sample(lab, model), expected)


def test_a_whole_new_layer_survives_moving_and_unloading(lab, flux4):
    """ModelMerge and the like scale the weight itself, which no branch can hold."""
    model = flux4.clone()
    module = model.get_model_object(MLP)
    change = torch.randn(module.out_features, module.in_features, generator=torch.Generator().manual_seed(4)) * 0.01
    model.add_patches({f"{MLP}.weight": ("diff", (change,)), f"{MLP}.bias": ("diff", (change[:, 0],))}, 1.0, 0.7)
    result = plain_sample(lab, model)
    assert module._change.whole is not None and relative(result, plain_sample(lab, flux4)) > 1e-3
    full = lab.flux
    full.add_patches({f"{MLP}.weight": ("diff", (change,)), f"{MLP}.bias": ("diff", (change[:, 0],))}, 1.0, 0.7)
    plain, changed = plain_sample(lab, lab.flux), plain_sample(lab, full)
    assert relative(result, changed) < 2 * relative(plain_sample(lab, flux4), plain) + 0.01
    comfy.model_management.unload_all_models()
    assert torch.equal(plain_sample(lab, model), result)


def test_a_hook_is_refused_in_a_sentence(lab, flux4):
    with pytest.raises(ValueError, match="LoRA loader"):
        flux4.get_model_object(MLP).set_weight(torch.zeros(1), inplace_update=True)


# Together with the other nodes


@pytest.mark.card
def test_cache_and_predictor_on_top(lab, flux4):
    reference = lab.sample(flux4)
    fast = lab.every(flux4, 2)
    result = lab.sample(fast)
    assert lab.report(fast)["filled"] >= 4 and relative(result, reference) < 0.2
    under = quantise(lab.every(lab.flux, 2), QuantWish())
    assert torch.equal(lab.sample(under), result)
    assert torch.equal(lab.sample(flux4), reference)
    stack = lab.every(flux4, 2, site="block stack")
    assert relative(lab.sample(stack), reference) < 0.2


# Quantising itself


def test_same_wish_again_costs_nothing_and_is_kept_only_as_long_as_it_is_used(lab):
    base, calls = lab.flux, []
    wish = QuantWish("convrot_w4a4")
    one = quantise(base, wish, lambda done, total: calls.append((done, total)))
    count = len(quantised(one).layers)
    assert calls[-1] == (count, count) and [done for done, _ in calls] == sorted(done for done, _ in calls)
    two = quantise(with_lora(base), wish, lambda done, total: calls.append(None))
    assert None not in calls and quantised(two) is quantised(one) and one.patches_uuid != two.patches_uuid
    assert (
        quantise(base, QuantWish("convrot_w4a4", layers="img_mlp = w8a8")).get_model_object(MLP).weight.shape
        == base.get_model_object(MLP).weight.shape
    )
    plain_sample(lab, base)
    del one, two
    gc.collect()
    assert wish not in quantising._MADE[base.model]


def test_original_weights_are_read_whatever_is_loaded(lab, flux4):
    base = lab.flux
    expected = flux4.get_model_object(MLP).weight.clone()
    for loaded in (with_lora(base), with_lora(flux4), base):
        plain_sample(lab, loaded)
        fresh = quantise(base, QuantWish(rank=32, layers=f"# {loaded.patches_uuid}"))
        assert torch.equal(fresh.get_model_object(MLP).weight, expected)


def test_in_the_inference_mode_that_nodes_run_in(lab, flux4):
    with torch.inference_mode():
        base = emoji.load_flux()
        model = with_lora(quantise(base, QuantWish()))
        result = plain_sample(lab, model)
    assert not any(p.is_inference() for layer in quantised(model).layers.values() for p in layer.parameters())
    assert torch.equal(plain_sample(lab, model), result)
    assert torch.equal(plain_sample(lab, with_lora(flux4)), result)


def test_cancel_leaves_nothing(lab):
    base, done = lab.flux, []
    gc.collect()
    plain, made = plain_sample(lab, base), len(quantising._MADE.get(base.model, {}))

    def progress(count, total):
        done.append(count)
        if len(done) == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        quantise(base, QuantWish(rank=16), progress)
    gc.collect()
    assert len(done) == 2 and len(quantising._MADE.get(base.model, {})) == made
    assert not base.object_patches and quantised(base) is None
    assert torch.equal(plain_sample(lab, base), plain)


def test_guard_raises_bad_layers(lab):
    base = lab.flux
    model = quantise(base, QuantWish(guard_db=24))
    raised = {n: c for n, c in quantised(model).choices.items() if "dB" in c.why}
    assert raised and all(c.treatment in ("w8a8", "keep") for c in raised.values())
    formats = {layer.format for layer in quantised(model).layers.values()}
    assert "int8_convrot" in formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_storage_dtypes_of_the_model(lab, dtype):
    base = families.make("flux")
    generator = torch.Generator().manual_seed(0)
    linear = next(m for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m.in_features % 64 == 0)
    name = next(n for n, m in base.model.named_modules() if m is linear)
    linear.weight.data = (torch.randn(linear.weight.shape, generator=generator) / 8).to(dtype)
    found = original(base, name.removeprefix("diffusion_model."), linear)
    assert torch.equal(found.float(), linear.weight.detach().float())
    assert found.dtype == (torch.float32 if dtype.itemsize == 1 else dtype)


# Bad input


def test_bad_wishes(lab, flux4):
    base = lab.flux
    for wish, said in (
        (QuantWish("q4_k"), "no format 'q4_k'"),
        (QuantWish(rank=500), "rank is 500"),
        (QuantWish(act_bits=5), "5 bit"),
        (QuantWish(guard_db=-1), "quality_guard is -1"),
        (QuantWish(evaluations=0, calibration=FIRST_RUN), "evaluations is 0"),
        (QuantWish(gptq=True), "gptq needs inputs"),
        (QuantWish(calibration=FIRST_RUN, layers="img_mlp"), "img_mlp"),
        (QuantWish(layers="nothing_like_it = w8a8"), "nothing_like_it"),
        (QuantWish(layers="img_mlp"), "img_mlp"),
        (QuantWish(layers=". = keep"), "no linear layer"),
    ):
        with pytest.raises(SlipstreamError, match=r"^W4A4 Quantize: ") as caught:
            quantise(base, wish)
        assert said in str(caught.value)
    with pytest.raises(SlipstreamError, match="already went through"):
        quantise(flux4, QuantWish())


class GGMLTensor(torch.Tensor):
    """As ComfyUI-GGUF holds its weights: the bytes, and the shape that they stand for."""

    tensor_type, tensor_shape = "Q4_K", torch.Size((1024, 256))

    @property
    def shape(self):
        return self.tensor_shape


def test_quantised_and_damaged_files_are_refused(lab):
    base = families.make("flux")
    wish = QuantWish(layers="double_blocks = w4a4")
    linear = base.get_model_object(MLP)
    weight = linear.weight.detach()
    packed = [weight.to(torch.int8), torch.zeros(1024, 144, dtype=torch.uint8).as_subclass(GGMLTensor)]
    for layout in ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout"):  # of 0.3.75, of newer hosts
        with contextlib.suppress(KeyError):
            packed.append(comfy.quant_ops.QuantizedTensor.from_float(weight, layout))
    assert len(packed) >= 3
    for weight in packed:
        changed = base.clone()
        other = copy.deepcopy(linear)
        other.weight = torch.nn.Parameter(weight, requires_grad=False)
        changed.add_object_patch(MLP, other)
        for asked in (wish, dataclasses.replace(wish, calibration=FIRST_RUN)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(policy, "LIMITS", policy.Limits(values=1))
                with pytest.raises(SlipstreamError, match=r"^W4A4 .*quantised already"):
                    quantise(changed, asked)

    class Own(torch.nn.Module):
        """As the newest host's Linear of mixed precision, which is none of torch's."""

        in_features, out_features = linear.in_features, linear.out_features

    whole = families.make("flux")
    own = Own()
    own.weight = torch.nn.Parameter(packed[-1], requires_grad=False)
    comfy.utils.set_attr(whole.model, MLP, own)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SlipstreamError, match=r"^W4A4 .*quantised already"):
        patch.setattr(policy, "LIMITS", policy.Limits(values=1))
        quantise(whole, wish)
    broken = lab.flux
    other = copy.deepcopy(broken.get_model_object(MLP))
    other.weight = torch.nn.Parameter(torch.full_like(other.weight, float("nan")), requires_grad=False)
    broken.add_object_patch(MLP, other)
    with pytest.raises(SlipstreamError, match=r"^W4A4 .*img_mlp\.0.*NaN"):
        quantise(broken, QuantWish(rank=24))


def from_file(model):
    """The model as a loader of quantised files gives it: its network holds the layers, nothing is patched."""
    loaded = emoji.load_flux()
    for name, layer in quantised(model).layers.items():
        own = W4A4Linear(layer.layer(lora=False))
        own.managed = True
        comfy.utils.set_attr(loaded.model, "diffusion_model." + name, own)
    loaded.size = 0
    loaded.add_callback_with_key(CallbacksMP.ON_LOAD, QUANTISED, give_loras)
    return loaded


def test_a_network_of_a_quantised_file(lab, flux4):
    """LoRAs follow whichever patcher of the network is loaded; it is not quantised twice; changes of another kind than
    LoRA are held as well as the branch can."""
    loaded = from_file(flux4)
    models = {"none": loaded, "one": with_lora(loaded, seed=5), "two": with_lora(loaded, seed=6)}
    expected = {name: plain_sample(lab, with_lora(flux4, seed=seed)) for name, seed in (("one", 5), ("two", 6))}
    expected["none"] = plain_sample(lab, flux4)
    for name in ("none", "one", "two", "none", "two", "one"):
        assert torch.equal(plain_sample(lab, models[name]), expected[name]), name
        assert not any(key.startswith(MLP) for key in models[name].backup)
    with pytest.raises(SlipstreamError, match=r"^W4A4 .*quantised already \(int8\)"):
        quantise(loaded, QuantWish())
    assert quantised(loaded) is None and summary(loaded).startswith("29 layers in 4 bit")
    changed = loaded.clone()
    weight = changed.get_model_object(MLP).weight
    change = torch.randn(changed.get_model_object(MLP).out_features, changed.get_model_object(MLP).in_features) * 0.01
    changed.add_patches({f"{MLP}.weight": ("diff", (change,))}, 1.0, 0.7)
    assert relative(plain_sample(lab, changed), expected["none"]) > 1e-3
    assert torch.equal(changed.get_model_object(MLP).weight, weight)
    assert torch.equal(plain_sample(lab, loaded), expected["none"])


def test_the_summary_in_words(lab, flux4):
    text = summary(flux4)
    assert text.startswith(f"{len(quantised(flux4).layers)} layers in 4 bit (")
    assert f"{flux4.model_size() / 1e6:.1f} MB instead of {lab.flux.model_size() / 1e6:.1f} MB" in text
    assert "Inputs rotated, a 16-bit branch of rank 32, made without data" in text and "guard" not in text
    guarded = quantise(lab.flux, QuantWish(guard_db=24))
    assert "in 8 bit" in summary(guarded) and "guard: " in summary(guarded) and "is below 24 dB" in summary(guarded)
    assert summary(lab.flux) == "not quantised"


def test_dynamic_models_are_quantised_as_their_static_copy(lab):
    """The dynamic loader restores its backups into the wrong modules; here a clone stands for the host's copy."""
    base, copied, wish = lab.flux, [], QuantWish(layers="# static")
    base.is_dynamic = lambda: True
    base.clone = lambda disable_dynamic=False: copied.append(disable_dynamic) or lab.flux
    assert quantised(quantise(base, wish)) is not None and copied == [True]

    def refuse(disable_dynamic=False):
        raise RuntimeError("cached_patcher_init is not initialized")

    base.clone = refuse
    with pytest.raises(SlipstreamError, match=r"^W4A4 Quantize: .*disable-dynamic-vram"):
        quantise(base, wish)


def test_formats_offered_are_those_there_are():
    assert set(CHOICES) - {"nvfp4"} == {"auto", *FORMATS}
    assert ("nvfp4" in CHOICES) == nvfp4.available()


def test_a_profile_gives_the_ranges_that_smooth_the_layers(lab, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, profiles.FOLDER, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    sigmas = comfy.samplers.calculate_sigmas(lab.flux.get_model_object("model_sampling"), "simple", 8)
    runs = tuple((emoji.conditioning(prompt), 70 + i) for i, prompt in enumerate(emoji.PROMPTS[:2]))
    job = Job(lab.flux, runs, emoji.conditioning(""), 1.0, comfy.samplers.sampler_object("euler"), sigmas,
              {"samples": lab.latent(lab.flux)})  # fmt: skip
    plain_sample(lab, lab.flux)  # a calibration watches the modules that are in place when it begins
    with torch.inference_mode():
        profiles.save("seen", calibrate(job, Wish(speed_up=2.0, check=0, activations=True)))
        profiles.save("bare", calibrate(job, Wish(speed_up=2.0, check=0)))
    free, seen = quantise(lab.flux, QuantWish()), quantise(lab.flux, QuantWish(calibration="seen.safetensors"))
    layer = seen.get_model_object(QKV)
    assert not torch.equal(layer.weight_smooth_factor, torch.ones_like(layer.weight_smooth_factor))
    assert torch.equal(free.get_model_object(QKV).weight_smooth_factor, torch.ones_like(layer.weight_smooth_factor))
    plain = plain_sample(lab, lab.flux, batch=4, seed=9)
    assert psnr(plain_sample(lab, seen, batch=4, seed=9), plain) > 30
    with pytest.raises(SlipstreamError, match=r"W4A4 Quantize: the profile bare.* .*activation_statistics on"):
        quantise(lab.flux, QuantWish(calibration="bare.safetensors"))
    with pytest.raises(SlipstreamError, match=r"W4A4 Quantize: there is no profile 'gone'"):
        quantise(lab.flux, QuantWish(calibration="gone"))


def test_a_fingerprint_does_not_depend_on_what_is_loaded(lab):
    base, clone = lab.flux, quantise(lab.flux, QuantWish())
    before = profiles.fingerprint(base), profiles.fingerprint(clone)
    assert before[0] != before[1]
    for model in (clone, base, clone):
        plain_sample(lab, model)
        assert (profiles.fingerprint(base), profiles.fingerprint(clone)) == before


def test_nvfp4_is_the_hosts_own_layer_and_its_file_the_hosts_own_loader_reads(lab, tmp_path, monkeypatch):
    """Where the host has NVFP4: sampled, LoRA on and off, saved, and read by the stock loader with the same result."""
    if not nvfp4.available():
        with pytest.raises(SlipstreamError, match="does not know nvfp4"):
            quantise(lab.flux, QuantWish("nvfp4"))
        return
    from slipstream.host.quantise.save import save

    model = quantise(lab.flux, QuantWish("nvfp4"))
    assert "layers in nvfp4" in quantising.summary(model)
    plain, packed = plain_sample(lab, lab.flux), plain_sample(lab, model)
    assert 20 < psnr(packed, plain) < 60
    adapted = model.clone()
    patches, _ = adapter(adapted, MLP)
    assert adapted.add_patches(patches)
    assert relative(plain_sample(lab, adapted), packed) > 1e-3
    assert torch.equal(plain_sample(lab, model), packed)
    assert torch.equal(plain_sample(lab, lab.flux), plain)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    with torch.inference_mode():  # as a node runs: the host cannot move its quantised tensors otherwise
        file, _ = save(model, "four")
        again = comfy.sd.load_diffusion_model(str(tmp_path / file))
    assert relative(plain_sample(lab, again), packed) < 0.05
    assert torch.equal(plain_sample(lab, lab.flux), plain)
    with pytest.raises(SlipstreamError, match="switch them off"):
        quantise(lab.flux, QuantWish("nvfp4", guard_db=10))


def test_outliers_that_come_through_the_modulation_are_smoothed_without_data(lab, monkeypatch):
    """A network made to have channels thirty times as large, the same function: only the spans save it."""
    model = emoji.load_flux()
    put_outliers(model.model.diffusion_model, 30.0)
    plain = plain_sample(lab, model)
    smoothed = psnr(plain_sample(lab, quantise(model, QuantWish())), plain)
    monkeypatch.setattr(quantising, "without_data", lambda model: {})
    assert smoothed > psnr(plain_sample(lab, quantise(model, QuantWish(rank=33))), plain) + 6


@pytest.mark.skipif(not nvfp4.available(), reason="this host has no quantised Linear that is loaded layer by layer")
def test_scaled_fp8_of_the_host_is_scaled_up_and_quantised(lab):
    """The newest host keeps fp8 files as quantised tensors; those are no reason to refuse a model."""
    model = lab.flux
    own = model.get_model_object(MLP)
    with torch.inference_mode():
        packed = comfy.quant_ops.QuantizedTensor.from_float(own.weight.detach().clone(), "TensorCoreFP8E4M3Layout")
        linear = comfy.ops.mixed_precision_ops({}, torch.float32).Linear(
            own.in_features, own.out_features, device="cpu"
        )
        state = {"comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
        linear.load_state_dict({**state, **packed.state_dict("weight"), "bias": own.bias.detach().clone()})
    eight = model.clone()
    eight.add_object_patch(MLP, linear)
    layer = quantised(quantise(eight)).layers[MLP.removeprefix("diffusion_model.")]
    with torch.inference_mode():
        assert relative(layer.layer().dequantise(), packed.dequantize()) < 0.15


def test_layers_with_one_input_quantise_it_once(lab, monkeypatch):
    """q, k and v of self-attention share what is made of their input, but not while a LoRA widens their branch."""
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(inputs=64, values=1))
    found = quantised(quantise(lab.trained_unet, QuantWish()))
    shares = {name: layer.share for name, layer in found.layers.items() if layer.share is not None}
    q = next(name for name in shares if name.endswith("attn1.to_q"))
    assert shares[q][1] == 3 and len({shares[q[:-1] + part] for part in "qkv"}) == 1
    assert not any("attn2" in name for name in shares)
    passed = []
    monkeypatch.setattr(QuantisedLinear, "__call__", lambda self, x, share=None: passed.append(share))
    layer = found.layers[q]
    layer(torch.zeros(1, layer.in_features))
    layer.set_lora(torch.zeros(layer.in_features, 2), torch.zeros(layer.out_features, 2))
    layer(torch.zeros(1, layer.in_features))
    layer.set_lora(None, None)
    assert passed == [layer.share, None]
