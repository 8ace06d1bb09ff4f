"""Hazards of the host for several nodes on one wire, and those of Calibrate's own sampling."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import families
import folder_paths
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from sampling import relative
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.run.plan import CacheConfig
from slipstream.host import model as patcher
from slipstream.host.calibrate.calibrate import calibrate
from slipstream.host.calibrate.job import Job, Wish
from slipstream.host.profiles import folder as profiles
from slipstream.host.report import report
from stacks import CACHE, EVERYTHING, LAYER, LOADED, QUANTISED, SITUATIONS, SWITCHED, TAYLOR, Bench, Stack, apart


@pytest.fixture(scope="module")
def bench(lab, tmp_path_factory):
    return Bench(lab, tmp_path_factory.mktemp("files"))


def fills(bench, stack) -> bool:
    return all(report["filled"] for report in bench.reports(stack))


# Memory, compilers, LoRAs, packed weights

WIRE = "cache predictor quantize files compensator switch"


@pytest.mark.guards("H63", nodes=WIRE)
@pytest.mark.parametrize("stack", [LOADED, EVERYTHING], ids=str)
def test_unloaded_between_prompts_and_half_loaded(bench, stack, monkeypatch):
    model = bench.model(stack)
    result = bench.sample(model, cfg=3.0)
    comfy.model_management.unload_all_models()
    assert torch.equal(bench.sample(model, cfg=3.0), result)
    comfy.model_management.unload_all_models()
    model.partially_load(model.load_device, extra_memory=model.model_size() // 3)
    assert 0 < model.loaded_size() < model.model_size()
    load = comfy.model_management.load_models_gpu

    def others(models, *args, **kwargs):  # the half-loaded one is left as it lies
        return load([m for m in models if m.model is not model.model], *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", others)
        assert torch.equal(bench.sample(model, cfg=3.0), result)
    assert fills(bench, stack)
    model.detach()
    assert torch.equal(bench.sample(model, cfg=3.0), result)


@pytest.mark.long
@pytest.mark.guards("H64", nodes="cache predictor quantize compensator switch")
@pytest.mark.parametrize("first", ["compiled first", "compiled last"])
@pytest.mark.parametrize("stack", [TAYLOR, Stack("last block", "last block"), EVERYTHING], ids=str)
def test_a_compiled_stack_still_skips(bench, stack, first):
    """The host's TorchCompileModel, without a compiler behind it."""

    def compiled(model):
        set_torch_compile_wrapper(model, backend="eager")
        return model

    plain = bench.sample(bench.model(stack), cfg=3.0)
    torch._dynamo.reset()
    model = bench.model(stack, dress=compiled) if first == "compiled first" else compiled(bench.model(stack))
    result = bench.sample(model, cfg=3.0)
    assert fills(bench, stack) and relative(result, plain) < 1e-5


def full_rank(bench) -> torch.Tensor:
    """A change of one layer, in the shape that its 4-bit stand-in, if that is in its place now, does not have."""
    layer = bench.network().get_model_object(LAYER)
    size = layer.out_features, layer.in_features
    return 0.05 * torch.randn(size, generator=torch.Generator().manual_seed(3))


@pytest.mark.guards("H65 H70", nodes=WIRE)
@pytest.mark.parametrize("stack", [LOADED, EVERYTHING], ids=str)
def test_a_lora_before_or_after_the_nodes(bench, stack):
    change = full_rank(bench)

    def adapted(model, strength=1.0):
        model = model.clone()
        assert model.add_patches({f"{LAYER}.weight": ("diff", (change,))}, strength)
        return model

    plain = bench.sample(bench.model(stack), cfg=3.0)
    # the model that begins is the one a node behind the switch changes
    before = bench.model(stack, dress=lambda m: adapted(m) if m.model is bench.base(stack).model else m)
    result = bench.sample(before, cfg=3.0)
    assert relative(result, plain) > 1e-3 and fills(bench, stack)
    assert torch.equal(bench.sample(adapted(bench.model(stack)), cfg=3.0), result)
    assert torch.equal(bench.sample(adapted(bench.model(stack), 0.0), cfg=3.0), plain)
    assert torch.equal(bench.sample(bench.model(stack), cfg=3.0), plain)


@pytest.mark.guards("H66", nodes="cache predictor compensator switch")
@pytest.mark.parametrize("stack", [CACHE, Stack("compensated", "last block", "Taylor", "", True, "same")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_weights_in_8_or_16_bit(bench, stack, dtype):
    """As an fp8 file is loaded: stored small, computed in full by the host's own casting layers."""
    own = Bench(bench.lab, bench.folder)
    for number in range(2 if stack.second else 1):
        network = own.network(number).model
        network.manual_cast_dtype = torch.float32
        for module in network.diffusion_model.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True
        network.diffusion_model.to(dtype)
        network.diffusion_model.dtype = dtype
    model = own.model(stack)
    result = own.sample(model, cfg=3.0)
    assert fills(own, stack) and result.isfinite().all()
    assert relative(result, own.sample(own.model(stack.without_cache), cfg=3.0)) < 0.3
    with apart():
        assert relative(own.sample(model, cfg=3.0), result) < (1e-5 if dtype.itemsize == 1 else 1e-2)


# Calibrate


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty profile folder of our own."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, profiles.FOLDER, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


class Asked(Exception):
    """Raised with what a situation would sample."""


class Listening(Bench):
    """Takes the arguments of a situation's sampling instead of sampling."""

    def sample(self, model, **options):
        raise Asked(model, options)


def job_of(bench, model, situation) -> Job:
    listening = Listening(bench.lab, bench.folder)
    listening._made = bench._made
    with pytest.raises(Asked) as asked:
        situation.run(listening, model)
    model, options = asked.value.args
    steps, sampling = options.get("steps", 12), model.get_model_object("model_sampling")
    return Job(
        model, ((options.get("positive", emoji.conditioning("hamburger")), 7),),
        options.get("negative", emoji.conditioning("")), options.get("cfg", 1.0),
        comfy.samplers.sampler_object(options.get("sampler", "euler")),
        comfy.samplers.calculate_sigmas(sampling, options.get("scheduler", "simple"), steps),
        {"samples": bench.lab.latent(model, 1, (8, 8))},
    )  # fmt: skip


def measured(job: Job):
    with torch.inference_mode():
        return calibrate(job, Wish(speed_up=1.7, check=0))


MEASURED = [s for s in SITUATIONS if s.name in (
    "prompt schedule", "areas", "masks", "long negative", "LoRA schedule", "skipped layer", "reference latents",
    "euler_ancestral", "dpmpp_2m", "karras",
)]  # fmt: skip


@pytest.mark.guards("H02-H03 H08 H10-H11 H25", nodes="calibrate", always=True)
@pytest.mark.guards("H22-H24 H27 H29-H31 H41-H43", nodes="calibrate")
@pytest.mark.parametrize("situation", MEASURED, ids=str)
def test_what_is_measured_does_not_depend_on_the_split_and_the_profile_serves(bench, folder, situation):
    base = bench.network()
    plain = bench.sample(base)
    job = job_of(bench, base, situation)
    given = [tokens.clone() for tokens, _ in job.runs[0][0]]
    together = measured(job)
    with apart():
        separate = measured(job)
    assert torch.allclose(together.statistics.gram, separate.statistics.gram, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, (b, _) in zip(given, job.runs[0][0], strict=True))
    profiles.save("mine", together)
    model = patcher.add_cache(job.model, CacheConfig(node_id="c0", profile="mine.safetensors"))
    with torch.inference_mode():
        result = job.sample(model, 0)
    assert result.isfinite().all() and bench.reports(CACHE)[0]["filled"] >= 1
    assert torch.equal(bench.sample(base), plain)


@pytest.mark.guards("H06-H07 H53 H65", nodes="calibrate")
def test_calibrating_in_half_precision_with_a_lora_after_an_error(bench, folder):
    base = bench.network()
    change = full_rank(bench)
    adapted = base.clone()
    adapted.add_patches({f"{LAYER}.weight": ("diff", (change,))}, 1.0)
    situation = next(s for s in SITUATIONS if s.name == "a negative")
    first = measured(job_of(bench, base, situation))
    other = measured(job_of(bench, adapted, situation))
    assert not torch.equal(first.statistics.gram, other.statistics.gram)
    assert torch.equal(measured(job_of(bench, base, situation)).statistics.gram, first.statistics.gram)
    half = base.clone()
    half.set_model_compute_dtype(torch.float16)
    assert measured(job_of(bench, half, situation)).statistics.gram.isfinite().all()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")

    hook = base.model.diffusion_model.double_blocks[0].img_attn.qkv.register_forward_pre_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            measured(job_of(bench, base, situation))
    finally:
        hook.remove()
    assert list(folder.iterdir()) == []
    assert torch.equal(measured(job_of(bench, base, situation)).statistics.gram, first.statistics.gram)


@pytest.mark.guards("H31", nodes="calibrate")
def test_calibrating_an_image_to_video_model(bench, folder):
    name = "wan21_i2v"
    base = families.make(name)
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "simple", 9)
    euler = comfy.samplers.sampler_object("euler")
    job = Job(base, ((families.conditioning(name, 11), 1),), families.conditioning(name, 12), 3.0, euler, sigmas,
              {"samples": families.latent(name)})  # fmt: skip
    profile = measured(job)
    assert profile.steps == 9 and profile.statistics.gram.isfinite().all()


@pytest.mark.guards("H16", nodes="calibrate")
def test_a_model_with_another_cache_is_not_measured(bench, folder):
    from comfy_extras.nodes_easycache import EasyCacheNode

    cached = EasyCacheNode.execute(bench.network(), 0.2, 0.15, 0.95, False).result[0]
    job = job_of(bench, cached, next(s for s in SITUATIONS if s.name == "a negative"))
    with bench.lab.calls(cached) as runs, pytest.raises(SlipstreamError, match="EasyCache is already on this model"):
        measured(job)
    assert not runs and list(folder.iterdir()) == []


# The report


@pytest.mark.guards("H79", nodes="report")
def test_a_full_disk_leaves_no_half_of_a_report(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    write = report.write_whole

    def full(path, data):
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(report, "write_whole", full)
    samples = [{"samples": bench.sample(bench.network(), seed=seed)} for seed in (1, 2)]
    with pytest.raises(SlipstreamError, match=r"cannot be written as 'card' \(No space left on device\)"):
        report.make_report(report.Connected(*samples), "card")
    assert list(tmp_path.iterdir()) == []


def test_stacks_that_are_named_here_have_the_nodes_they_guard():
    assert set(QUANTISED.nodes.split()) == {"cache", "predictor", "quantize"}
    assert set(SWITCHED.nodes.split()) == {"cache", "predictor", "switch"}
