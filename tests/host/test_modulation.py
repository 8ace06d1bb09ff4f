"""Spans read from a network's modulation are those its layers really get, without running its blocks."""

from __future__ import annotations

import re

import comfy.sample
import families
import pytest
import torch
from slipstream.demo import emoji
from slipstream.engine.calibration.recorder import Activations
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.families import architecture_of
from slipstream.host.quantise import modulation
from slipstream.host.quantise.choose import linears_of

# Family, the parameters that say how large a channel is, and layers that must be among those found.
ROWS = [
    ("sd15", r"norm[123]\.(weight|bias)", ("attn1.to_q", "attn1.to_v", "attn2.to_q", "ff.net.0.proj")),
    ("sdxl", r"norm[123]\.(weight|bias)", ("attn1.to_q", "attn2.to_q", "ff.net.0.proj")),
    ("sd3", r"adaLN_modulation\.1\.bias", ("context_block.attn.qkv", "x_block.attn.qkv", "x_block.mlp.fc1")),
    ("sd35_medium", r"adaLN_modulation\.1\.bias", ("x_block.attn2.qkv", "context_block.mlp.fc1")),
    ("flux", r"mod(ulation)?\.lin\.bias", ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "txt_mlp.0", "linear1")),
    ("flux2", r"stream_modulation\w*\.lin\.weight", ("img_attn.qkv", "txt_mlp.0", "linear1")),
    ("hunyuan_video", r"mod(ulation)?\.lin\.bias", ("img_attn.qkv", "txt_mlp.0", "linear1")),
    ("hunyuan3d2", r"mod(ulation)?\.lin\.bias", ("img_attn.qkv", "txt_mlp.0", "linear1")),
    ("chroma", r"guidance_layer\.out_proj\.weight", ("img_attn.qkv", "txt_mlp.0", "linear1")),
    ("qwen_image", r"(img|txt)_mod\.1\.bias", ("attn.to_k", "attn.add_v_proj", "img_mlp.net.0.proj")),
    ("wan21", r"blocks\.\d+\.(modulation|norm3\..*)", ("self_attn.q", "ffn.0", "cross_attn.q")),
    ("wan21_vace", r"blocks\.\d+\.(modulation|norm3\..*)", ("self_attn.v", "ffn.0", "cross_attn.q")),
    ("lumina2", r"adaLN_modulation\.1\.bias|norm1\.weight", ("attention.qkv", "feed_forward.w1", "feed_forward.w3")),
    ("z_image", r"adaLN_modulation\.0\.bias|norm1\.weight", ("attention.qkv", "feed_forward.w1")),
    ("ltxv", r"blocks\.\d+\.scale_shift_table", ("attn1.to_q", "ff.net.0.proj")),
    ("cosmos_predict2", r"adaln_modulation_\w+\.2\.weight", ("self_attn.q_proj", "cross_attn.q_proj", "mlp.layer1")),
    ("auraflow", r"mod(C|X|CX)\.1\.weight", ("attn.w1q", "attn.w2v", "mlpC.c_fc1", "mlpX.c_fc2", "mlp.c_fc1")),
    ("pixart", r"scale_shift_table", ("attn.qkv", "mlp.fc1")),
]  # fmt: skip


def spans(network: torch.nn.Module, **options) -> dict[str, torch.Tensor]:
    return modulation.spans(network, architecture_of(network).modulation, **options)


def louder(network: torch.nn.Module, pattern: str) -> bool:
    """Random weights hardly modulate; make these parameters say which channels are large. Whether always the same."""
    generator = torch.Generator().manual_seed(7)
    steady = []
    for name, value in network.named_parameters():
        if re.search(rf"{pattern}$", name):
            steady.append(value.ndim == 1 or not name.endswith("weight"))
            value.data = value + torch.randn(value.shape, generator=generator) * 1.5 if steady[-1] else value * 3
    return all(steady) if steady else pytest.fail(f"no parameter is called {pattern}")


def agreement(model, positive: list, latent: torch.Tensor) -> dict[str, float]:
    """Correlation of log span and log root mean square of what a run of four steps gave each layer."""
    network = model.model.diffusion_model
    seen = Activations(linears_of(model))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    with seen, torch.inference_mode():
        comfy.sample.sample(
            model, noise, 4, 1.0, "euler", "normal", positive, positive, latent, seed=0, disable_pbar=True
        )
    tables = seen.tables()
    found = {}
    for name, span in spans(network).items():
        size = tables[f"activation/{name}/square"].sqrt().clamp_min(1e-9)
        found[name] = float(torch.corrcoef(torch.stack((size.log(), span.log())))[0, 1])
    return found


@pytest.mark.parametrize("name, pattern, layers", ROWS, ids=[row[0] for row in ROWS])
def test_spans_are_what_the_layers_of_a_family_get(name, pattern, layers):
    if name not in families.available():
        pytest.skip("this host does not know the family")
    model = families.make(name)
    network = model.model.diffusion_model
    steady = louder(network, pattern)
    found = spans(network)
    for layer in layers:
        assert any(key.endswith(f".{layer}") for key in found), layer
    for key, span in found.items():
        layer = network.get_submodule(key)
        assert span.shape == (layer.in_features,) and span.dtype == torch.float32 and not span.requires_grad
    agreed = agreement(model, families.conditioning(name, 1), families.latent(name))
    least, on_average = (0.5, 0.75) if steady else (0.15, 0.4)  # of another part of the modulation it would be 0
    assert min(agreed.values()) > least and sum(agreed.values()) / len(agreed) > on_average, agreed


def test_the_trained_flux_has_its_spans_in_its_modulation(lab):
    model = lab.flux
    agreed = agreement(model, emoji.conditioning("fox face"), lab.latent(model))
    assert sum(agreed.values()) / len(agreed) > 0.35 and min(agreed.values()) > 0, agreed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "wan21", "lumina2"])
def test_weights_of_other_dtypes_give_the_same_spans(name, dtype):
    network = families.make(name).model.diffusion_model
    for module in network.modules():  # what the host sets on layers whose weights are cast when they are used
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    true = spans(network)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    found = spans(network)
    assert found.keys() == true.keys()
    for key, span in found.items():
        torch.testing.assert_close(span, true[key], rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 0.4)


def test_unknown_networks_and_networks_of_another_build_give_none():
    network = families.make("flux").model.diffusion_model
    assert modulation.spans(network, "") == modulation.spans(network, "somewhere else") == {}
    assert modulation.spans(torch.nn.Linear(4, 4), "Flux") == {}
    network.single_blocks[0].modulation.lin = torch.nn.Linear(64, 65)  # not in three parts
    assert spans(network) == {}
    network.time_in = None
    assert spans(network) == {}


def test_a_mistake_in_a_reader_is_not_taken_for_another_build(monkeypatch):
    def misspelt(network, times):
        yield torch.linspaces(times)

    def unnamed(network, times):
        yield tims  # noqa: F821

    def refusing(network, times):
        raise SlipstreamError("a layer's sentence")
        yield

    network = families.make("flux").model.diffusion_model
    for reader, error in ((misspelt, AttributeError), (unnamed, NameError), (refusing, SlipstreamError)):
        monkeypatch.setitem(modulation.READERS, "Flux", reader)
        with pytest.raises(error):
            spans(network)


def test_only_spans_with_outliers_are_worth_smoothing():
    found = {"flat": torch.ones(64), "outlier": torch.cat((torch.ones(63), torch.full((1,), 10.0)))}
    assert list(modulation.outstanding(found)) == ["outlier"]


def test_prominence_is_one_for_a_flat_span():
    assert modulation.prominence(torch.full((64,), 3.0)) == 1.0
    assert modulation.prominence(torch.cat((torch.ones(63), torch.full((1,), 30.0)))) == 30.0
