"""Quantised models as files: what is saved is what is loaded, bit for bit, by us and where it can be by the host."""

from __future__ import annotations

import gc
import json
import os
import shutil

import comfy.model_detection
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.weight_adapter
import families
import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling import relative
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.host.profiles import folder as profiles
from slipstream.host.quantise import load as quant_load
from slipstream.host.quantise import make as quant_layers
from slipstream.host.quantise import save as quant_files
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.quant import nunchaku, policy
from slipstream.quant.files import File, Writer
from slipstream.quant.formats import FORMATS
from slipstream.quant.linear import W4A4Linear

from lab.nunchaku import pack_layer, pack_modulation

MLP = "diffusion_model.double_blocks.0.img_mlp.0"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
PROJ = "diffusion_model.single_blocks.0.linear2"
PLAIN = "diffusion_model.final_layer.linear"  # never quantised


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's diffusion_models folder, empty."""
    emoji.accept_small_flux()
    place = tmp_path / "diffusion_models"
    place.mkdir()
    known = ([str(tmp_path / "unet"), str(place)], {".safetensors", ".sft"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", known)
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    yield place
    folder_paths.filename_list_cache.pop("diffusion_models", None)


@pytest.fixture(scope="module")
def flux4(lab):
    """The small Flux in 4 bit, quantised once for all tests of this file."""
    return quantise(lab.flux, QuantWish())


def with_lora(model, strength: float = 1.0, keys: tuple[str, ...] = (MLP, QKV, PROJ, PLAIN), seed: int = 5):
    """A clone with a LoRA of rank 4 on each of these layers, as the host reads one from a file."""
    model, generator = model.clone(), torch.Generator().manual_seed(seed)
    for key in keys:
        module = model.get_model_object(key)
        up = torch.randn(module.out_features, 4, generator=generator) * 0.15
        down = torch.randn(4, module.in_features, generator=generator) / module.in_features**0.5
        file = {"x.lora_up.weight": up, "x.lora_down.weight": down}
        found = comfy.weight_adapter.LoRAAdapter.load("x", file, 2.0, None, set())
        assert model.add_patches({f"{key}.weight": found}, strength)
    return model


def sampled(lab, model, **options):
    return lab.sample(model, steps=2, **options)


def packed(model) -> dict[str, W4A4Linear]:
    found = model.model.diffusion_model.named_modules()
    return {name: module for name, module in found if isinstance(module, W4A4Linear)}


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# Round trips


@pytest.mark.parametrize("format", ["auto", "w4a8", "convrot_w4a4", "int8_convrot"])
def test_load_lora_quantise_sample_save_reload_sample(lab, folder, format, caplog):
    """Equal bit for bit; but for a LoRA in a format without a branch, where layers are quantised anew with it."""
    group = format == "auto" or not FORMATS[format].per_row
    plain = quantise(lab.flux, QuantWish(format))
    model = with_lora(plain)
    result, without = sampled(lab, model), sampled(lab, plain)
    file, _ = quant_files.save(model, "mine")
    assert (file, os.listdir(folder)) == ("mine.safetensors", ["mine.safetensors"])
    assert file in quant_load.names()
    assert ("quantised again with it" in caplog.text) != group
    listed = json.loads(metadata(folder / file)["_quantization_metadata"])
    assert listed["format_version"] == "1.0" and len(listed["layers"]) == len(packed(model))
    again = quant_load.load(file)
    loaded = sampled(lab, again)
    assert torch.equal(loaded, result) if group else 0 < relative(loaded, result) < 0.2
    assert relative(result, without) > 0.02
    quant_files.save(plain, "sub folder/plain.v1")
    again = quant_load.load(os.path.join("sub folder", "plain.v1.safetensors"))
    assert torch.equal(sampled(lab, again), without)
    assert again.model_size() == plain.model_size() < 0.35 * lab.flux.model_size()


def test_saving_what_was_loaded_gives_the_same_file(lab, folder, flux4):
    quant_files.save(with_lora(flux4), "one")
    quant_files.save(quant_load.load("one.safetensors"), "two")
    one, two = (load_file(folder / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["wan21 file", "hunyuan_video file", "ltxv file", "unet"])
def test_families_survive_a_file(lab, folder, monkeypatch, tmp_path, name):
    """Names, extra keys and sizes of other families find their way back, with the host's detection as judge."""
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(values=1))
    if name == "unet":
        base, sample = lab.trained_unet, lambda model: sampled(lab, model)
    else:
        base, conds = families.load(name, tmp_path), (families.conditioning(name, 1), families.conditioning(name, 2))
        latent = families.latent(name)
        noise = comfy.sample.prepare_noise(latent, 1)

        def sample(model):
            with torch.inference_mode():
                return comfy.sample.sample(
                    model, noise, 1, 2.0, "euler", "simple", *conds, latent, seed=1, disable_pbar=True
                )

    model = quantise(base, QuantWish("w4a16", rank=16))
    result = sample(model)
    file, _ = quant_files.save(model, "mine")
    again = quant_load.load(file)
    assert packed(again).keys() == packed(model).keys() and type(again.model) is type(base.model)
    assert torch.equal(sample(again), result)


@pytest.mark.parametrize("format", ["convrot_w4a4", "int8_convrot"])
def test_the_hosts_own_loader_reads_its_formats(lab, folder, format):
    """convrot_w4a4 is a mixed file: the policy gives some layers int8."""
    quant_ops = pytest.importorskip("comfy.quant_ops")
    if "convrot_w4a4" not in getattr(quant_ops, "QUANT_ALGOS", {}):
        pytest.skip("this host has no convrot_w4a4")
    model = quantise(lab.flux, QuantWish(format))
    file, _ = quant_files.save(model, "mine")
    layers = packed(model)
    ours, full = sampled(lab, model), sampled(lab, lab.flux)
    assert {module.format for module in layers.values()} == {format, "int8_convrot"}
    with torch.inference_mode():  # as every node of the host runs
        stock = comfy.sd.load_diffusion_model(str(folder / file))
        theirs = sampled(lab, stock)
        for name, module in layers.items():
            x = torch.randn(8, module.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
            y = stock.model.diffusion_model.get_submodule(name)(x).float()
            assert relative(y, module(x).float()) < 0.06, name  # it rotates in bfloat16
    # the host computes in 16 bit between the layers, which moves a few 4-bit activations: as far off, not further
    assert relative(theirs, full) < 1.3 * relative(ours, full)
    assert relative(theirs, ours) < 1.2 * relative(ours, full)


# The loaded model


def test_loras_on_a_loaded_model(lab, folder, flux4):
    """On, off and on again, in turns with clones: what the canvas model gives, bit for bit."""
    quant_files.save(flux4, "mine")
    loaded = quant_load.load("mine.safetensors")
    plain, result = sampled(lab, flux4), sampled(lab, with_lora(flux4))
    one, two = with_lora(loaded), with_lora(loaded, seed=6)
    for model, expected in ((loaded, plain), (one, result), (loaded.clone(), plain), (two, None), (one, result)):
        found = sampled(lab, model)
        assert expected is None or torch.equal(found, expected)
    assert torch.equal(sampled(lab, with_lora(loaded, 0.0)), plain) and not torch.equal(plain, result)


@pytest.mark.parametrize("lora", [False, True])
def test_loaded_model_under_a_small_budget(lab, folder, flux4, lora, monkeypatch):
    quant_files.save(flux4, "mine")
    model = quant_load.load("mine.safetensors")
    model = with_lora(model) if lora else model
    result, total = sampled(lab, model), model.model_size()
    assert comfy.model_management.module_size(model.model) == total
    comfy.model_management.unload_all_models()
    model.partially_load(model.load_device, extra_memory=total // 3)
    assert model.model.model_lowvram and 0 < model.loaded_size() < total
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
    assert torch.equal(sampled(lab, model), result)
    model.partially_load(model.load_device, extra_memory=10 * total)
    assert torch.equal(sampled(lab, model), result)
    assert model.partially_unload(model.offload_device, total // 3) >= total // 3
    assert torch.equal(sampled(lab, model), result)
    model.detach()


def test_a_cache_runs_on_a_loaded_model(lab, folder, flux4):
    quant_files.save(flux4, "mine")
    model = quant_load.load("mine.safetensors")
    assert profiles.fingerprint(model) == profiles.fingerprint(quant_load.load("mine.safetensors"))
    assert torch.equal(lab.sample(lab.every(model), steps=8), lab.sample(lab.every(flux4), steps=8))
    with pytest.raises(SlipstreamError, match="quantised already"):
        quantise(model)


# From file to file


def source(folder, name="flux.safetensors", change=lambda tensors: tensors):
    save_file(change(load_file(emoji.FLUX)), folder / name, {"note": "kept"})
    return name


@pytest.mark.parametrize("wish", [QuantWish(), QuantWish("convrot_w4a4"), QuantWish("svdquant_w4a4", guard_db=25.0)])
def test_file_to_file_is_quantise_and_save(lab, folder, wish):
    steps = []
    name = source(folder, change=lambda tensors: {key: t.float() for key, t in tensors.items()})  # the host's on a CPU
    file, _ = quant_files.quantise_file(name, "two", wish, lambda *done: steps.append(done))
    quant_files.save(quantise(lab.flux, wish), "one")
    one, two = (load_file(folder / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    about = [metadata(folder / f"{name}.safetensors") for name in ("one", "two")]
    lists = [json.loads(found["_quantization_metadata"])["layers"] for found in about]
    assert lists[0] == lists[1] and about[1]["note"] == "kept"
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] >= len(lists[0])
    assert quant_load.load(file).model_size() < 0.4 * lab.flux.model_size()


def live_bytes() -> int:
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_file_to_file_holds_one_group_at_a_time(lab, folder, monkeypatch):
    """Tensors alive, those that only map the file among them, when each group is about to be quantised."""
    name = source(folder)
    gc.collect()
    before, most, calls = live_bytes(), [], []
    make = quant_layers.quantise_group

    def measured(*args):
        calls.append(0)
        if len(calls) % 5 == 0:  # looking takes longer than quantising
            most.append(live_bytes() - before)
        return make(*args)

    monkeypatch.setattr(quant_layers, "quantise_group", measured)
    quant_files.quantise_file(name, "two", QuantWish())
    full = (folder / name).stat().st_size
    # what is not quantised stays in memory: a fifth of this small model, a hundredth of a large one
    rest = sum(t.numel() * 4 for key, t in lab.flux.model.diffusion_model.state_dict().items() if t.ndim < 2)
    assert len(most) > 3 and max(most) < rest + 0.1 * full, (max(most), rest, full)


@pytest.mark.parametrize("marks", ["scale_weight", "weight_scale"])
def test_scaled_fp8_files_are_scaled_up(lab, folder, marks):
    def scaled(tensors):
        found = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if marks == "scale_weight" else {}
        for key, tensor in tensors.items():
            if tensor.ndim == 2 and "blocks" in key:
                layer, scale = key.removesuffix(".weight"), tensor.abs().max() / 448
                found |= {key: (tensor / scale).to(torch.float8_e4m3fn), f"{layer}.{marks}": scale}
                if marks == "weight_scale":
                    text = json.dumps({"format": "float8_e4m3fn"}).encode()
                    found[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
            else:
                found[key] = tensor
        return found

    file, _ = quant_files.quantise_file(source(folder, change=scaled), "two", QuantWish("w4a16"))
    tensors, model = load_file(folder / file), quant_load.load(file)
    assert not any("scale_weight" in key or "float8" in str(t.dtype) for key, t in tensors.items())
    full = sampled(lab, lab.flux)
    assert 0 < relative(sampled(lab, model), full) < 0.15


def test_files_in_the_prefix_of_checkpoints_are_read(lab, folder):
    name = source(folder, change=lambda tensors: {f"model.diffusion_model.{key}": t for key, t in tensors.items()})
    quant_files.quantise_file(name, "two", QuantWish())
    quant_files.quantise_file(source(folder), "one", QuantWish())
    one, two = (load_file(folder / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# Files of others


def test_a_file_with_nothing_but_metadata_or_in_a_prefix_is_read(lab, folder, flux4):
    model = quantise(lab.flux, QuantWish("svdquant_w4a4"))
    file, _ = quant_files.save(model, "mine")
    tensors = load_file(folder / file)
    result = sampled(lab, model)
    about = metadata(folder / file)
    save_file({k: t for k, t in tensors.items() if "comfy_quant" not in k}, folder / "kitchen.safetensors", about)
    prefix = "model.diffusion_model."
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, folder / "prefixed.safetensors")
    for name in ("kitchen", "prefixed"):
        assert torch.equal(sampled(lab, quant_load.load(f"{name}.safetensors")), result)


@pytest.fixture(scope="module")
def nunchaku_flux():
    """The tensors of a tiny FLUX.1 in nunchaku's layout."""
    generator, d, names = torch.Generator().manual_seed(3), 128, nunchaku
    half = torch.bfloat16

    def normal(*shape, size=1.0):
        return (torch.randn(*shape, generator=generator) * size).to(half)

    def layer(n, k, smooth=None):
        return names.NunchakuLayer(
            codes=torch.randint(-7, 8, (n, k), generator=generator).to(torch.int8),
            scales=normal(k // 64, n).abs() * 0.2 / k**0.5,
            smooth=normal(k).abs() * 0.2 + 0.9 if smooth is None else smooth,
            down=normal(k, 16, size=k**-0.5),
            up=normal(n, 16, size=0.05),
            bias=normal(n, size=0.05),
        )

    def modulation(name, splits):
        codes = torch.randint(0, 16, (splits * d, d), generator=generator)
        scales = (2.0 ** torch.randint(-8, -6, (d // 64, splits * d), generator=generator)).to(half)
        return pack_modulation(codes, scales, -7 * scales, normal(splits * d, size=0.05), name, splits)

    shapes = {"qkv_proj": (3 * d, d), "out_proj": (d, d), "mlp_fc1": (4 * d, d), "mlp_fc2": (d, 4 * d)}
    file = {}
    for i in range(2):
        block = f"transformer_blocks.{i}"
        for name in names.DOUBLE:
            file |= pack_layer(layer(*shapes[name.replace("_context", "")]), f"{block}.{name}")
        for name in names.DOUBLE_MODULATION:
            file |= modulation(f"{block}.{name}", 6)
        file |= {f"{block}.{name}.weight": torch.ones(d, dtype=half) for name in names.DOUBLE_NORMS}
        block, smooth = f"single_{block}", normal(d).abs() * 0.2 + 0.9
        for name in names.SINGLE:
            shared = smooth if shapes[name][1] == d and name != "out_proj" else None
            file |= pack_layer(layer(*shapes[name], shared), f"{block}.{name}")
        file |= modulation(f"{block}.norm.linear", 3)
        file |= {f"{block}.{name}.weight": torch.ones(d, dtype=half) for name in names.SINGLE_NORMS}
    sizes = {"img_in": (d, 64), "txt_in": (d, 64), "final_layer.linear": (64, d), "vector_in.in_layer": (d, 64)}
    sizes |= {"time_in.in_layer": (d, 256), "final_layer.adaLN_modulation.1": (2 * d, d)}
    sizes["guidance_in.in_layer"] = sizes["time_in.in_layer"]
    for theirs, ours in names.OUTSIDE.items():
        n, k = sizes.get(ours, (d, d))
        file |= {f"{theirs}.weight": normal(n, k, size=k**-0.5), f"{theirs}.bias": normal(n, size=0.05)}
    return file


def test_nunchakus_flux_is_the_same_layers_placed_by_hand(lab, folder, nunchaku_flux):
    """The whole file through the host, against a 16-bit file of the plain tensors and packed layers put into it."""
    save_file(nunchaku_flux, folder / "svdq-int4.safetensors")
    loaded = quant_load.load("svdq-int4.safetensors")
    layers = dict(nunchaku.w4a4_layers(nunchaku_flux))
    plain = dict(nunchaku.plain_weights(nunchaku_flux))
    for name, parts in layers.items():
        codes = [part.codes for part in parts]
        plain[f"{name}.weight"] = torch.zeros(len(codes[0]), sum(c.shape[1] for c in codes), dtype=torch.bfloat16)
        plain[f"{name}.bias"] = torch.zeros(len(codes[0]), dtype=torch.bfloat16)
    save_file({key: tensor.contiguous() for key, tensor in plain.items()}, folder / "hand.safetensors")
    by_hand = comfy.sd.load_diffusion_model(str(folder / "hand.safetensors"))
    for name, parts in layers.items():
        module = Sum([W4A4Linear(quant_load.natural(part)) for part in parts])
        parent, _, child = name.rpartition(".")
        setattr(by_hand.model.diffusion_model.get_submodule(parent), child, module)
    by_hand.size = 0
    result = sampled(lab, loaded)
    assert result.isfinite().all() and torch.equal(result, sampled(lab, by_hand))
    lora = with_lora(loaded)
    changed = sampled(lab, lora)
    assert relative(changed, result) > 1e-3 and torch.equal(sampled(lab, loaded), result)
    quant_files.save(lora, "again")
    assert torch.equal(sampled(lab, quant_load.load("again.safetensors")), changed)
    assert "part1.weight" in " ".join(load_file(folder / "again.safetensors"))


class Sum(torch.nn.Module):
    """Layers on the parts of their input, added up."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x):
        pieces = x.split([part.in_features for part in self.parts], -1)
        return sum(part(piece) for part, piece in zip(self.parts, pieces, strict=True))


# What goes wrong


def refused(call, *words):
    with pytest.raises(SlipstreamError) as caught:
        call()
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 400, sentence


def test_bad_files_are_one_sentence(lab, folder, flux4):
    file, _ = quant_files.save(flux4, "mine")
    good, about = (folder / file).read_bytes(), metadata(folder / file)
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / file).items()}  # the file is written over
    layer = "double_blocks.0.img_mlp.0"

    def altered(**changes):
        found = {**tensors, **{f"{layer}.{name}": value for name, value in changes.items()}}
        save_file({key: t for key, t in found.items() if t is not None}, folder / file)

    def load():
        return quant_load.load(file)

    node = "Load Quantized Model: "
    for data, words in (
        (good[:-100], "damaged"),
        (good[:50], "damaged"),
        (b"", "damaged"),
        (b"\xff" * 64, "damaged"),
        (b"GGUF" + good, "damaged"),
    ):
        (folder / file).write_bytes(data)
        refused(load, node, file, words)
    (folder / "x.gguf").write_bytes(b"GGUF")
    refused(lambda: quant_load.load("x.gguf"), node, "GGUF")
    refused(lambda: quant_load.load("none.safetensors"), node, "no file 'none.safetensors'")
    refused(lambda: quant_load.load("../../etc/passwd"), node, "no file")
    shutil.copy(emoji.FLUX, folder / file)
    refused(load, node, file, "not quantised", "Load Diffusion Model")
    altered(weight_scale=None)
    refused(load, node, file, f"{layer} has no weight_scale")
    altered(weight=tensors[f"{layer}.weight"][:, :-32].clone())
    refused(load, node, file, layer)
    text = json.dumps({"format": "nvfp5"}).encode()
    altered(comfy_quant=torch.tensor(list(text), dtype=torch.uint8))
    refused(load, node, file, "nvfp5")
    altered(comfy_quant=torch.zeros(3, dtype=torch.uint8))
    refused(load, node, file, "not JSON")
    save_file({key: t for key, t in tensors.items() if key != "img_in.weight"}, folder / file, about)
    refused(load, node, file, "not whole, or of a model")
    save_file({key: t for key, t in tensors.items() if key != "final_layer.linear.bias"}, folder / file, about)
    refused(load, node, file, "final_layer.linear.bias")
    save_file({f"{layer}.weight": torch.ones(3)}, folder / file, {"_quantization_metadata": "[1]"})
    refused(load, node, file, "_quantization_metadata")
    save_file({f"x.{key}": t for key, t in tensors.items()}, folder / file)
    refused(load, node, file, "a model that this host does not know")
    ends = [key.removeprefix(layer) for key in tensors if key.startswith(f"{layer}.")]
    save_file(tensors | {f"a{end}": tensors[layer + end].clone() for end in ends}, folder / file)
    refused(load, node, file, "no place for the layer a")


def test_what_cannot_be_saved(lab, folder, flux4, monkeypatch):
    save = quant_files.save
    node = "Save Quantized Model: "
    refused(lambda: save(lab.flux, "x"), node, "no quantised layer")
    for name in ("", "../x", "a/../../x", "/x", "C:\\x", "a//b", ".x", "x\0", "x."):
        refused(lambda name=name: save(flux4, name), node, "no file name")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(lambda: save(flux4, "x"), node, "MB left")
    refused(lambda: quant_files.quantise_file(source(folder), "x", QuantWish()), "Quantize Model File: ", "MB left")
    assert os.listdir(folder) == ["flux.safetensors"]


def test_a_failed_or_cancelled_write_leaves_the_old_file(lab, folder, flux4, monkeypatch):
    """H79, and cancel between two tensors."""
    (folder / "x.safetensors").write_bytes(b"old")
    name, add = source(folder), Writer.add

    def full(self, key, tensor):
        if self.size > 100_000:
            raise OSError(28, "No space left on device")
        add(self, key, tensor)

    def cancelled(done, total):
        comfy.model_management.interrupt_current_processing()

    ways = {
        "Save Quantized Model": lambda *progress: quant_files.save(flux4, "x", *progress),
        "Quantize Model File": lambda *progress: quant_files.quantise_file(name, "x", QuantWish(), *progress),
    }
    for node, call in ways.items():
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "add", full)
            refused(call, node, "No space left")
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            call(cancelled)
        assert sorted(os.listdir(folder)) == ["flux.safetensors", "x.safetensors"]
        assert (folder / "x.safetensors").read_bytes() == b"old"
    torch.equal(sampled(lab, flux4), sampled(lab, flux4))


def test_what_cannot_be_quantised_from_file(lab, folder, flux4):
    node = "Quantize Model File: "
    file, _ = quant_files.save(flux4, "mine")
    name = source(folder)
    refused(lambda: quant_files.quantise_file(file, "x", QuantWish()), node, "quantised already")
    refused(lambda: quant_files.quantise_file("nothing.safetensors", "x", QuantWish()), node, "no file")
    refused(lambda: quant_files.quantise_file(name, "../x", QuantWish()), node, "no file name")
    refused(lambda: quant_files.quantise_file(name, "x", QuantWish("int3")), node, "int3")
    refused(lambda: quant_files.quantise_file(name, "x", QuantWish(calibration="first run")), node, "first run")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4)}, folder / name)
    refused(lambda: quant_files.quantise_file(name, "x", QuantWish()), node, "layout")
    tensors = load_file(emoji.FLUX)
    tensors[QKV.removeprefix("diffusion_model.") + ".weight"][0, 0] = float("nan")
    save_file(tensors, folder / name)
    refused(lambda: quant_files.quantise_file(name, "x", QuantWish()), node, "qkv", "NaN")
    assert not (folder / "x.safetensors").exists() and not list(folder.glob("*.part"))


def test_the_header_keeps_readers_aligned(tmp_path):
    """Odd sizes go to the end, so that every tensor starts at a multiple of its element size."""
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(4, 2), "c": torch.ones(5, dtype=torch.bfloat16)}
    tensors |= {"d": torch.tensor(2.0), "e": torch.zeros(0), "f": torch.ones(2, 8, dtype=torch.float8_e4m3fn)}
    with Writer(tmp_path / "x.safetensors", tensors, {"k": "v"}) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"k": "v"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0
    file = File(tmp_path / "x.safetensors")
    assert file.keys() == tensors.keys() and file.outline("b") == ((4, 2), torch.float32)
    assert all(torch.equal(file[name].float(), tensors[name].float()) for name in tensors)
    file.close()
