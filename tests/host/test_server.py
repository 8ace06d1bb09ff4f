"""The real server over HTTP: nodes registered, workflows from files, events, text on nodes, the report, refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file
from slipstream.engine.calibration.profile import Profile
from slipstream.engine.metrics import psnr

from lab import workflow
from lab.client import Client, PromptRefused
from lab.server import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DEMOS = [path for path in WORKFLOWS if path.stem.endswith("_demo")]


@pytest.fixture(scope="module")
def server(comfy):
    return comfy.url


def talk(url, conversation):
    async def run():
        async with Client(url) as client:
            return await conversation(client, await client.object_info())

    return asyncio.run(run())


@pytest.fixture(scope="module")
def prompt(server):
    async def conversation(client, info):
        return workflow.load(ROOT / "workflows" / "slipstream_demo.json", info)

    return workflow.change(talk(server, conversation), "KSampler", steps=16)


def run(url, graph):
    return talk(url, lambda client, info: client.run(graph))


def latent(url, graph):
    async def conversation(client, info):
        result = await client.run(graph)
        files = [f for out in result.outputs.values() for f in out.get("latents", [])]
        return load(await client.file(files[0]))["latent_tensor"]

    return talk(url, conversation)


def test_the_nodes_are_really_registered(server):
    """A failing entrypoint only logs a warning, so the list is what counts."""

    async def conversation(client, info):
        return info

    info = talk(server, conversation)
    contract = json.loads((ROOT / "tests" / "unit" / "contract.json").read_text())
    assert set(contract) <= set(info)
    assert all(info[name]["category"] == "slipstream" for name in contract)
    # H67: what 0.1.0 did not have is optional, so prompts that were saved then still run
    assert len(info["SlipstreamCacheLoader"]["input"]["required"]) == 7
    assert len(info["SlipstreamTaylorPredictor"]["input"]["required"]) == 3


def calibration(name):
    """A graph that calibrates the small Flux for 16 euler steps."""
    return {
        "1": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "tiny_flux_emoji.safetensors", "weight_dtype": "default"},
        },
        "2": {"class_type": "SlipstreamDemoPrompt", "inputs": {"text": "hamburger"}},
        "3": {"class_type": "SlipstreamTaylorPredictor", "inputs": {"model": ["1", 0], "kind": "Taylor", "order": 1}},
        "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "5": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 16, "denoise": 1.0},
        },
        "6": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "7": {
            "class_type": "SlipstreamCalibrate",
            "inputs": {
                "model": ["3", 0], "positive": ["2", 0], "negative": ["2", 0], "cfg": 1.0, "sampler": ["4", 0],
                "sigmas": ["5", 0], "latent_image": ["6", 0], "speed_up": 2.0, "calibration_seed": 3,
                "name": name,
            },
        },
    }  # fmt: skip


def test_calibrate_and_its_profile_on_the_real_server(server):
    """From the full run to a picture that follows the profile, as two queued prompts."""
    graph = calibration("server test")
    written = run(server, graph)
    assert "server test.safetensors\ncomputes 8 of 16 steps of euler" in written.texts["7"]
    assert "3" not in written.texts  # the calibration run leaves no text on the nodes before it

    async def listed(client, info):
        return info["SlipstreamCacheLoader"]["input"]["optional"]["profile"]

    assert "server test.safetensors" in str(talk(server, listed))
    cache = {
        "preset": "Balanced", "method": "auto", "drift_budget": 0.1, "start_percent": 0.0, "end_percent": 1.0,
        "max_skip": 6, "profile": "server test.safetensors",
    }  # fmt: skip
    graph["7"] = {"class_type": "SlipstreamCacheLoader", "inputs": {"model": ["3", 0], **cache}}
    graph["8"] = {
        "class_type": "SamplerCustom",
        "inputs": {
            "model": ["7", 0], "add_noise": True, "noise_seed": 4, "cfg": 1.0, "positive": ["2", 0],
            "negative": ["2", 0], "sampler": ["4", 0], "sigmas": ["5", 0], "latent_image": ["6", 0],
        },
    }  # fmt: skip
    graph["9"] = {"class_type": "SaveLatent", "inputs": {"samples": ["8", 0], "filename_prefix": "profile"}}
    assert "computed 8 of 16" in run(server, graph).texts["7"]


def test_h67_a_prompt_saved_by_an_older_version_still_runs(server, prompt):
    old = json.loads(json.dumps(prompt))
    for node in old.values():
        for name in list(node["inputs"]):
            if name in ("site", "depth", "threshold", "prior_noise", "cache_device", "memory_budget_mb", "scale"):
                del node["inputs"][name]
    assert old != prompt
    changed = workflow.change(old, "KSampler", seed=102)
    assert any("computed" in text for text in run(server, changed).texts.values())


@pytest.mark.parametrize("path", DEMOS, ids=lambda p: p.stem)
def test_workflow_files_run_as_they_are(server, path):
    async def conversation(client, info):
        return await client.run(workflow.load(path, info))

    assert talk(server, conversation).outputs


def test_events_text_and_counts_agree(server, prompt):
    result = run(server, workflow.change(prompt, "KSampler", seed=101))
    messages = [data for kind, data in result.events if kind == "slipstream.evaluation"]
    # A message holds what is new or changed, so a later cell replaces the earlier one of its index.
    evaluations = {cell["index"]: cell for message in messages for cell in message["cells"]}
    finished = [data for kind, data in result.events if kind == "slipstream.finished"]
    counted = [data["evaluations"] for kind, data in result.events if kind == "slipstream_demo.count"]
    computed = sum(e["action"] == "computed" for e in evaluations.values())
    assert len(evaluations) == 16 and computed == counted[0] == finished[0]["computed"] < 16
    nodes = [workflow.first(prompt, n) for n in ("SlipstreamCacheLoader", "SlipstreamTaylorPredictor")]
    assert list(evaluations) == list(range(16)) and all(message["nodes"] == nodes for message in messages)
    assert all(f"computed {computed} of 16" in result.texts[node] for node in nodes)


def test_the_report_node_compares_and_saves(server):
    async def conversation(client, info):
        graph = workflow.load(ROOT / "workflows" / "slipstream_compare_demo.json", info)
        key = workflow.first(graph, "SlipstreamReport")
        result = await client.run(graph)
        card = result.outputs[key]["images"][0]
        numbers = await client.file({**card, "filename": card["filename"].replace(".png", ".json")})
        return Image.open(io.BytesIO(await client.file(card))), json.loads(numbers)

    card, numbers = talk(server, conversation)
    assert card.size[0] > 500
    assert numbers["run"]["computed"] < numbers["reference_run"]["computed"] == 28
    assert numbers["latent_psnr_db"] > 40 and numbers["picture_ssim"] > 0.95
    assert "evaluations computed" in numbers["verdict"]


def advanced(graph, **values):
    """KSampler replaced by KSamplerAdvanced with the same wires."""
    key = workflow.first(graph, "KSampler")
    old = graph[key]["inputs"]
    inputs = {
        k: old[k] for k in ("model", "positive", "negative", "latent_image", "sampler_name", "scheduler", "steps")
    }
    inputs |= {"cfg": 1.0, "noise_seed": 7, "add_noise": "enable", "start_at_step": 0, "end_at_step": 10000}
    inputs |= {"return_with_leftover_noise": "disable", **values}
    return {**graph, key: {"class_type": "KSamplerAdvanced", "inputs": inputs}}


def custom(graph):
    """KSampler replaced by SamplerCustomAdvanced and its helpers."""
    key = workflow.first(graph, "KSampler")
    old = graph[key]["inputs"]
    wires = {k: old[k] for k in ("model", "positive", "negative")}
    return {
        **graph,
        key: {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["91", 0], "guider": ["92", 0], "sampler": ["93", 0], "sigmas": ["94", 0],
                       "latent_image": old["latent_image"]},
        },
        "91": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}},
        "92": {"class_type": "CFGGuider", "inputs": {"cfg": 2.0, **wires}},
        "93": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "94": {"class_type": "BasicScheduler",
               "inputs": {"model": old["model"], "scheduler": "simple", "steps": 16, "denoise": 1.0}},
    }  # fmt: skip


@pytest.mark.parametrize("change", [advanced, custom], ids=["KSamplerAdvanced", "SamplerCustomAdvanced"])
def test_other_sampler_nodes(server, prompt, change):
    result = run(server, change(prompt))
    finished = [data for kind, data in result.events if kind == "slipstream.finished"]
    assert finished[0]["filled"] >= 4 and finished[0]["evaluations"] == 16


def test_ksampler_advanced_in_two_stages(server, prompt):
    result = run(server, advanced(prompt, end_at_step=9, return_with_leftover_noise="enable"))
    finished = [data for kind, data in result.events if kind == "slipstream.finished"]
    assert finished[0]["evaluations"] == 9 and finished[0]["filled"] >= 1


def test_two_samplers_in_one_prompt(server, prompt):
    key, second = workflow.first(prompt, "KSampler"), "95"
    first = prompt[key]
    again = {"class_type": "KSampler", "inputs": {**first["inputs"], "latent_image": ["96", 0], "denoise": 0.6}}
    larger = {
        "class_type": "LatentUpscaleBy",
        "inputs": {"samples": [key, 0], "upscale_method": "bilinear", "scale_by": 1.5},
    }
    graph = {**prompt, second: again, "96": larger}
    graph[workflow.first(graph, "SaveLatent")] = {
        "class_type": "SaveLatent", "inputs": {"samples": [second, 0], "filename_prefix": "slipstream_demo/latent"},
    }  # fmt: skip
    finished = [data for kind, data in run(server, graph).events if kind == "slipstream.finished"]
    assert len(finished) == 2 and all(f["filled"] >= 2 for f in finished)


def test_lora_loader_before_and_after(comfy, server, prompt, tmp_path):
    folder = comfy.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(2)
    layer = "diffusion_model.double_blocks.0.img_mlp.0"
    save_file(
        {
            f"{layer}.lora_A.weight": torch.randn(4, 256, generator=generator) * 0.1,
            f"{layer}.lora_B.weight": torch.randn(1024, 4, generator=generator) * 0.1,
        },
        folder / "slipstream_test.safetensors",
    )
    values = {"lora_name": "slipstream_test.safetensors", "strength_model": 1.0}
    before = workflow.insert(prompt, "SlipstreamCacheLoader", "LoraLoaderModelOnly", **values)
    after = workflow.insert(prompt, "KSampler", "LoraLoaderModelOnly", **values)
    plain = latent(server, workflow.change(prompt, "KSampler", seed=31))
    results = [latent(server, workflow.change(g, "KSampler", seed=31)) for g in (before, after)]
    assert torch.equal(*results)
    assert not torch.allclose(results[0], plain, atol=1e-3)
    assert torch.equal(latent(server, workflow.change(prompt, "KSampler", seed=31, steps=16, cfg=1.0)), plain)


WISH = {
    "format": "auto", "rank": 32, "activations": "4 bit", "calibration": "none", "layers": "", "quality_guard": 0.0,
}  # fmt: skip


def test_a_file_is_quantised_and_loaded(server, prompt):
    """Quantize Model File and Load Quantized Model as nodes: the file is in the list at once, the picture is near."""
    values = {"model_name": "tiny_flux_emoji.safetensors", "name": "slipstream_test_w4a4", **WISH}
    written = run(server, {"1": {"class_type": "SlipstreamQuantizeFile", "inputs": values}})
    assert "slipstream_test_w4a4.safetensors: 29 quantised layers" in written.texts["1"]
    key = workflow.first(prompt, "UNETLoader")
    loader = {"class_type": "SlipstreamLoadModel", "inputs": {"model_name": "slipstream_test_w4a4.safetensors"}}
    plain = workflow.bypass(workflow.bypass(prompt, "SlipstreamCacheLoader"), "SlipstreamTaylorPredictor")
    result = run(server, {**plain, key: loader})
    assert "29 layers in 4 bit" in result.texts[key]
    assert 25 < psnr(latent(server, {**plain, key: loader}), latent(server, plain)) < 70


def test_the_whole_chain_on_one_wire(server, prompt):
    """Quantised at its first run, compensated, cached and forecast: every node says its part."""
    key, at = workflow.first(prompt, "UNETLoader"), workflow.first(prompt, "SlipstreamCacheLoader")
    graph = workflow.change(prompt, "SlipstreamCacheLoader", model=["91", 0], profile="none")
    how = {**WISH, "calibration": "first run", "activations": "8 bit"}
    graph["90"] = {"class_type": "SlipstreamW4A4Quantize", "inputs": {"model": [key, 0], **how}}
    graph["91"] = {
        "class_type": "SlipstreamErrorCompensator",
        "inputs": {"model": ["90", 0], "profile": "none", "anchors": 2, "strength": 1.0, "terms": "auto"},
    }
    result = run(server, graph)
    finished = [data for kind, data in result.events if kind == "slipstream.finished"][-1]
    assert finished["filled"] >= 2 and len(finished["compensation"]["anchors"]) >= 1
    assert "layers in 4 bit" in result.texts["90"] and "measured at 8 evaluations" in result.texts["90"]
    assert at in finished["nodes"] and "91" in finished["nodes"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"preset": "Ludicrous"}, "Cache Loader: there is no preset 'Ludicrous'; choose one of Balanced"),
        ({"drift_budget": 4.0}, "drift_budget"),
        ({"preset": "Custom", "start_percent": 0.9, "end_percent": 0.1}, "start_percent 0.9 is not before"),
    ],
)
def test_bad_values_are_refused_before_any_step(server, prompt, values, sentence):
    graph = workflow.change(workflow.change(prompt, "SlipstreamCacheLoader", **values), "KSampler", seed=77)
    with pytest.raises(PromptRefused) as refused:
        run(server, graph)
    assert sentence in str(refused.value)
    assert str(refused.value).count(sentence) == 1 or sentence == "drift_budget"


def test_a_second_cache_is_refused_on_the_node(server, prompt):
    values = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    graph = workflow.insert(prompt, "SlipstreamCacheLoader", "EasyCache", **values)
    with pytest.raises(PromptRefused, match="Cache Loader: EasyCache is already on this model"):
        run(server, workflow.change(graph, "KSampler", seed=78))


def test_help_pages_and_templates_are_served(server):
    async def conversation(client, info):
        page = await client.get("/extensions/ComfyUI-Slipstream/docs/SlipstreamCacheLoader.md")
        return page.decode(), json.loads(await client.get("/workflow_templates"))

    page, templates = talk(server, conversation)
    assert page.startswith("# Cache Loader")
    assert set(templates["ComfyUI-Slipstream"]) == {Path(p).stem for p in WORKFLOWS}


def test_a_picture_brings_the_profile_it_was_made_with(comfy, server, tmp_path):
    """Calibrate, sample, save the picture, delete the profile, and queue the workflow from the picture's metadata."""
    name = f"picture test {tmp_path.name}.safetensors"
    file = comfy.base / "models" / "slipstream_profiles" / name
    graph = json.loads((ROOT / "workflows" / "slipstream_demo.json").read_text())
    next(n for n in graph["nodes"] if n["type"] == "SlipstreamCacheLoader")["widgets_values"][12] = name
    next(n for n in graph["nodes"] if n["type"] == "SlipstreamTaylorPredictor")["widgets_values"][1] = 1

    async def queue(client, info, graph, **sampler):
        (tmp_path / "workflow.json").write_text(json.dumps(graph))
        prompt = workflow.change(workflow.load(tmp_path / "workflow.json", info), "KSampler", **sampler)
        result = await client.run(prompt, extra_pnginfo={"workflow": graph})
        messages = [data["cells"] for kind, data in result.events if kind == "slipstream.evaluation"]
        cells = {cell["index"]: cell for cell in itertools.chain(*messages)}
        steps = [cell["step"] for cell in cells.values() if cell["action"] == "computed"]
        (image,) = (item for output in result.outputs.values() for item in output.get("images", []))
        metadata = Image.open(io.BytesIO(await client.file(image))).text
        return steps, json.loads(metadata["workflow"]), json.loads(metadata["prompt"])

    async def conversation(client, info):
        await client.run(calibration(name))
        whole = file.read_bytes()
        steps, saved, _ = await queue(client, info, graph, steps=16, seed=41)
        assert steps == list(Profile.load(file).keys) and list(saved["extra"]["slipstream_profiles"]) == [name]
        listed = json.loads(await client.get(f"/api/slipstream/profiles/{name}"))
        assert listed == {"name": name, "data": saved["extra"]["slipstream_profiles"][name]}
        file.unlink()
        again, brought, _ = await queue(client, info, saved, steps=16, seed=42)
        assert again == steps and brought == saved and file.read_bytes() == whole
        # the name now stands for another model's profile
        other = dataclasses.replace(Profile.load(file), model="other", keys=(0, 15))
        other.save(file)
        renamed, brought, prompt = await queue(client, info, saved, steps=16, seed=43)
        own = prompt[workflow.first(prompt, "SlipstreamCacheLoader")]["inputs"]["profile"]
        assert renamed == steps and brought == saved and own != name and file.read_bytes() == other.to_bytes()
        assert file.with_name(own).read_bytes() == whole
        for written in (file, file.with_name(own)):
            written.unlink()
        saved["extra"] = {"slipstream_profiles": {name: "damaged"}}
        with pytest.raises(PromptRefused) as refused:
            await queue(client, info, saved, steps=16, seed=44)
        assert name in str(refused.value) and not file.exists()

    try:
        talk(server, conversation)
    finally:
        for left in file.parent.glob(f"picture test {tmp_path.name}*"):
            left.unlink()
