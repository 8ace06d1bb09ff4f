"""The small trained emoji models as the host sees them: text encoder, VAE and model loading (`models/README.md`)."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .prompts import PROMPTS

__all__ = [
    "FLUX",
    "MODELS",
    "PROMPTS",
    "SMALL_FLUX",
    "UNET",
    "VAE",
    "conditioning",
    "encode_text",
    "load_flux",
    "load_small_flux",
    "load_unet",
    "load_vae",
]

MODELS = Path(__file__).parent / "models"
FLUX = MODELS / "tiny_flux_emoji.safetensors"
SMALL_FLUX = MODELS / "tiny_flux_emoji_small.safetensors"
UNET = MODELS / "tiny_sd15_emoji.safetensors"
VAE = MODELS / "tiny_emoji_vae_linear4x16.safetensors"

STOP_WORDS = frozenset(["with", "of", "the", "and", "a", "in", "on", "s", "an", "to"])
MAX_WORDS, WIDTH = 8, 64


def encode_text(prompt: str) -> tuple[Tensor, Tensor]:
    """Return (tokens [8, 64], pooled [64]): one fixed random vector per word; the empty prompt is zeros, as trained."""
    words = [w for w in re.split(r"[^a-z0-9]+", prompt.lower()) if w and w not in STOP_WORDS][:MAX_WORDS]
    tokens = np.zeros((MAX_WORDS, WIDTH), np.float32)
    for i, word in enumerate(words):
        tokens[i] = np.random.RandomState(zlib.crc32(word.encode())).randn(WIDTH)
    pooled = tokens.sum(0) / max(1, len(words)) ** 0.5
    return torch.from_numpy(tokens), torch.from_numpy(pooled)


def conditioning(prompts: str | tuple[str, ...] | list[str]) -> list:
    """The host's CONDITIONING for one prompt, or for a batch with one prompt per picture."""
    encoded = [encode_text(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
    return [[torch.stack([t for t, _ in encoded]), {"pooled_output": torch.stack([p for _, p in encoded])}]]


def accept_small_flux() -> None:
    """Let hosts that hard-code Flux's 24 heads (0.3.75) read the head count from the widths, as newer hosts do."""
    original = comfy.model_detection.detect_unet_config
    if getattr(original, "slipstream_demo", False):
        return

    def detect(state_dict, key_prefix, metadata=None):
        config = original(state_dict, key_prefix, metadata=metadata)
        if config is not None and config.get("image_model") == "flux" and "hidden_size" in config:
            config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
        return config

    detect.slipstream_demo = True
    comfy.model_detection.detect_unet_config = detect


class LinearPatchVAE(torch.nn.Module):
    """4x4-patch PCA: pictures [B, 3, H, W] in [-1, 1] <-> latents [B, 16, H/4, W/4], exactly linear both ways."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for name, value in state.items():
            self.register_parameter(name, torch.nn.Parameter(value.float(), requires_grad=False))

    def encode(self, x: Tensor, *args, **kwargs) -> Tensor:
        patches = torch.nn.functional.pixel_unshuffle(x, 4) - self.mu[:, None, None]
        return torch.einsum("kc,bchw->bkhw", self.enc, patches) / self.scale + self.shift

    def decode(self, z: Tensor, *args, **kwargs) -> Tensor:
        patches = torch.einsum("ck,bkhw->bchw", self.dec, (z - self.shift) * self.scale)
        return torch.nn.functional.pixel_shuffle(patches + self.mu[:, None, None], 4)


def load_vae(path: Path = VAE) -> comfy.sd.VAE:
    """The host's VAE object around the linear VAE; decoding, encoding and memory management are the host's."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = LinearPatchVAE(load_file(path)).eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    vae.downscale_ratio = vae.upscale_ratio = 4
    vae.latent_channels = 16
    return vae


def load_flux(path: Path = FLUX) -> comfy.model_patcher.ModelPatcher:
    """The trained Flux through the host's own loader."""
    accept_small_flux()
    return comfy.sd.load_diffusion_model(str(path))


def load_small_flux(path: Path = SMALL_FLUX) -> comfy.model_patcher.ModelPatcher:
    """The small Flux that was distilled from the trained one: the same latents, schedule and conditioning."""
    return load_flux(path)


class TinySD15(comfy.supported_models.SD15):
    """SD1.5 in every respect but its size and its latents, which are those of the Flux demo model."""

    latent_format = comfy.latent_formats.Flux

    def inpaint_model(self) -> bool:
        return False  # the host takes more than four input channels for an inpaint model


def accept_small_unet() -> None:
    """Let the host's detection, which knows SD1.5 by its width of 320, take our narrow U-Net for one."""
    original = comfy.model_detection.model_config_from_unet_config
    if getattr(original, "slipstream_demo", False):
        return

    def configure(unet_config, *args, **kwargs):
        if unet_config.get("model_channels") == 64 and unet_config.get("in_channels") == 16:
            return TinySD15(unet_config)
        return original(unet_config, *args, **kwargs)

    configure.slipstream_demo = True
    comfy.model_detection.model_config_from_unet_config = configure


def load_unet(path: Path = UNET) -> comfy.model_patcher.ModelPatcher:
    """The trained SD1.5-type U-Net through the host's own loader."""
    accept_small_unet()
    return comfy.sd.load_diffusion_model(str(path))
