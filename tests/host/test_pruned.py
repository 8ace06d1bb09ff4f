"""Load Pruned UNet: BK-SDM's three structures under diffusers' names, and one sentence for everything else."""

from __future__ import annotations

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from sampling import random_weights, relative
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.host.switch import pruned
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import add_switch

# num_res_blocks, transformer_depth, transformer_depth_output, channel_mult, transformer_depth_middle
STRUCTURES = {
    "base": ([1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0], [1, 2, 4, 4], 1),
    "small": ([1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0], [1, 2, 4, 4], -2),
    "tiny": ([1, 1, 1], [1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 2, 4], -2),
}
NAMES = ("num_res_blocks", "transformer_depth", "transformer_depth_output", "channel_mult", "transformer_depth_middle")


def config_of(structure: str, channels=64, latents=16, width=64) -> dict:
    own = {name: value[:] if isinstance(value, list) else value
           for name, value in zip(NAMES, STRUCTURES[structure], strict=True)}  # fmt: skip
    return dict(
        use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False, in_channels=latents,
        out_channels=latents, use_temporal_resblock=False, use_temporal_attention=False, adm_in_channels=None,
        model_channels=channels, use_linear_in_transformer=width == 1024, context_dim=width, num_heads=8, **own,
    )  # fmt: skip


def network(config: dict, device=None):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {k: v[:] if isinstance(v, list) else v for k, v in config.items()}  # the host empties its lists
    return UNetModel(**config, device=device, dtype=torch.float32, operations=comfy.ops.disable_weight_init)


def diffusers_state(config: dict, state: dict) -> dict:
    names = {ours: theirs for theirs, ours in comfy.utils.unet_to_diffusers(config).items()
             if "add_embedding" not in theirs and "class_embedding" not in theirs}  # fmt: skip
    return {names[key]: value for key, value in state.items()}


@pytest.fixture
def file(tmp_path):
    emoji.accept_small_unet()

    def written(structure="tiny", change=None):
        config = config_of(structure)
        own = random_weights(network(config), seed=4)
        state = diffusers_state(config, own)
        if change is not None:
            change(state)
        path = tmp_path / f"bk_{structure}.safetensors"
        save_file(state, path)
        return path, own

    return written


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_tensor_arrives_where_it_belongs_and_the_host_alone_cannot(lab, file, structure):
    path, own = file(structure)
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        comfy.sd.load_diffusion_model(str(path))
    model = pruned.load_file(path)
    loaded = model.model.diffusion_model.state_dict()
    assert set(loaded) == set(own) and all(torch.equal(loaded[key], own[key]) for key in own)
    assert lab.sample(model, steps=2).isfinite().all()
    assert "million parameters" in pruned.summary(model)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_at_their_real_widths_they_are_sd15(structure):
    """Shapes only, so nothing is computed or allocated."""
    config = config_of(structure, channels=320, latents=4, width=768)
    state = diffusers_state(config, network(config, "meta").state_dict())
    assert not any(key.startswith("mid_block.") for key in state) or structure == "base"
    assert comfy.model_detection.model_config_from_diffusers_unet(state) is None
    found = comfy.model_detection.model_config_from_unet(pruned.renamed(state, "bk.safetensors"), "")
    assert type(found) is comfy.supported_models.SD15
    assert found.unet_config["transformer_depth_middle"] == STRUCTURES[structure][-1]


def test_v2_is_not_taken_for_the_host_s_other_model_of_its_depth():
    """BK-SDM v2 tiny has the depths of SDXS 0.9, which attends to text twice; the host by itself mistakes it."""
    config = config_of("tiny", channels=320, latents=4, width=1024)
    state = diffusers_state(config, network(config, "meta").state_dict())
    assert comfy.model_detection.unet_config_from_diffusers_unet(state)["disable_self_attentions"]
    found = comfy.model_detection.model_config_from_unet(pruned.renamed(state, "bk.safetensors"), "")
    assert type(found) is comfy.supported_models.SD20 and "disable_self_attentions" not in found.unet_config


def test_it_is_the_small_partner_of_a_switch(lab, file):
    small, large = pruned.load_file(file()[0]), lab.trained_unet
    result = lab.sample(add_switch(small, large, SwitchConfig(0.4)), steps=6)
    assert relative(result, lab.sample(large, steps=6)) > 1e-3 and result.isfinite().all()


def test_files_that_the_host_knows_are_loaded_by_it(tmp_path):
    emoji.accept_small_unet()
    model = pruned.load_file(emoji.UNET)
    assert type(model.model.model_config) is emoji.TinySD15


def widen(state):
    state["up_blocks.0.resnets.0.conv2.weight"] = torch.zeros(100, 256, 3, 3)


@pytest.mark.parametrize("change,sentence", [
    (lambda s: s.update({"down_blocks.0.motion.0.weight": torch.zeros(4)}), "layers that the host's U-Net has not"),
    (lambda s: s.pop("down_blocks.1.resnets.0.conv1.bias"), "is incomplete, it lacks input_blocks"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("up_blocks.2")], "residual blocks on the way down"),
    (lambda s: s.pop("conv_in.weight"), "is no U-Net in diffusers' layout"),
    (widen, "its layer output_blocks.0.0.out_layers.3.weight has a shape"),
    (lambda s: [s.pop(k) for k in list(s)[5:]], "is no U-Net in diffusers' layout|is of no kind"),
])  # fmt: skip
def test_a_file_that_does_not_match_is_refused_in_one_sentence(file, change, sentence):
    with pytest.raises(SlipstreamError, match=sentence) as raised:
        pruned.load_file(file(change=change)[0])
    assert "bk_tiny.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_damaged_files_and_other_kinds_are_refused(file, tmp_path):
    path, _ = file()
    data = path.read_bytes()
    for name, content in {"cut": data[:-100], "empty": b"", "text": b"{}" * 50, "huge": b"\xff" * 64}.items():
        damaged = tmp_path / f"{name}.safetensors"
        damaged.write_bytes(content)
        with pytest.raises(SlipstreamError, match=f"{name}.safetensors is damaged"):
            pruned.load_file(damaged)
    pickled = tmp_path / "bk.bin"
    pickled.write_bytes(b"")
    with pytest.raises(SlipstreamError, match="no safetensors file"):
        pruned.load_file(pickled)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(SlipstreamError, match=r"other\.safetensors"):
        pruned.load_file(other)


def test_the_node_offers_safetensors_only(monkeypatch, file):
    path, _ = file()
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda kind: ["a.ckpt", "b.safetensors", "c.bin"])
    assert pruned.files() == ["b.safetensors"]
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: str(path) if name == "bk" else None)
    assert pruned.load("bk") is not None
    with pytest.raises(SlipstreamError, match="there is no file 'gone'"):
        pruned.load("gone")
