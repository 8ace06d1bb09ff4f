"""Train the demo's Flux by flow matching on emoji pictures; a time budget instead of a step count.

    python -m demo.models.train_flux --data package --minutes 75 --out trained
    python -m demo.models.train_flux --data package --minutes 13 --out trained --size small \\
        --teacher demo/models/tiny_flux_emoji.safetensors

`--data` is the unpacked npm package `emoji-datasource-google`; COMFYUI_PATH names the checkout whose `Flux` is used.
With a teacher the network learns the teacher's velocities on noised pictures, not the pictures' own.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=256,
    mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=False,
)  # fmt: skip
# What each size changes, and its file. The small one has a fifth of the large one's work per evaluation.
SIZES = {
    "large": ({}, "tiny_flux_emoji"),
    "small": (dict(depth=1, depth_single_blocks=0), "tiny_flux_emoji_small"),
}
GROUPS = {"food-fruit", "food-prepared", "food-sweet", "animal-mammal"}
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # comfy.latent_formats.Flux
LEARNING_RATE, WARM_UP, BATCH = 8e-4, 150, 20
EMPTY_PROMPTS, UNIFORM_TIMES, AVERAGE = 0.1, 0.15, 0.9985
# Distilling: new questions to the teacher per step, and how many of its answers are kept for re-use.
FRESH, KEPT = 10, 6000


def load_pictures(package: Path) -> tuple[list[str], Tensor]:
    """(names, pictures [N, 3, 64, 64] in [-1, 1] on white) of the smileys, fruit, food and mammals."""
    from PIL import Image

    names, pictures = [], []
    for entry in sorted(json.loads((package / "emoji.json").read_text()), key=lambda e: e["image"]):
        wanted = entry["category"] == "Smileys & Emotion" or entry["subcategory"] in GROUPS
        if not (wanted and entry.get("has_img_google")):
            continue
        picture = Image.open(package / "img" / "google" / "64" / entry["image"]).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        pictures.append(np.asarray(white.convert("RGB").resize((64, 64)), dtype=np.float32) / 127.5 - 1)
        names.append((entry["name"] or entry["short_name"]).lower())
    return names, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def fit_vae(pictures: Tensor, channels: int = 16) -> dict[str, Tensor]:
    """PCA of 4x4 patches, half whitened, so that latents have mean 0 and average variance 1."""
    patches = F.pixel_unshuffle(pictures, 4).permute(0, 2, 3, 1).reshape(-1, 48).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    scale = values**0.25 * values.sqrt().mean().sqrt()
    state = {"mu": mean, "enc": (vectors / scale).T, "dec": vectors * scale}
    state |= {"scale": torch.tensor(FLUX_SCALE), "shift": torch.tensor(FLUX_SHIFT)}
    return {name: value.float().contiguous() for name, value in state.items()}


def encode(pictures: Tensor, vae: dict[str, Tensor]) -> Tensor:
    """Latents as the network sees them: the linear code without the host's scale and shift."""
    return torch.einsum("kc,bchw->bkhw", vae["enc"], F.pixel_unshuffle(pictures, 4) - vae["mu"][:, None, None])


def initialise(network: torch.nn.Module) -> None:
    """The usual DiT start: modulation and output are zero, so every block begins as the identity."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        else:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("scale") else 0.0)
        if "_mod." in name or "modulation" in name or name.startswith("final_layer.linear"):
            torch.nn.init.zeros_(parameter)
    for embedder in (network.time_in, network.vector_in):
        torch.nn.init.normal_(embedder.in_layer.weight, std=0.02)
        torch.nn.init.normal_(embedder.out_layer.weight, std=0.02)


def sample_times(count: int, generator: torch.Generator) -> Tensor:
    """Logit-normal times, some of them uniform so that both ends are seen."""
    times = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator) < UNIFORM_TIMES
    return torch.where(uniform, torch.rand(count, generator=generator), times)


def learning_rate(step: int, progress: float, peak: float = LEARNING_RATE, warm_up: int = WARM_UP) -> float:
    """Warm-up, flat until 40 % of the time, then a cosine to 2 %."""
    decay = 1.0 if progress < 0.4 else 0.02 + 0.49 * (1 + math.cos(math.pi * (progress - 0.4) / 0.6))
    return peak * min(1.0, (step + 1) / warm_up) * decay


@torch.no_grad()
def follow(average: torch.nn.Module, network: torch.nn.Module, step: int, keep: float) -> None:
    """Move the average of the weights towards the weights; faster in the first steps."""
    keep = min(keep, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)


def drop_prompts(tokens: Tensor, pooled: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The texts with some of them replaced by the empty prompt."""
    told = (torch.rand(len(tokens), generator=generator) >= EMPTY_PROMPTS).float()
    return tokens * told[:, None, None], pooled * told[:, None]


class Pictures:
    """Batches of flow matching: noised pictures and the velocity that leads from picture to noise."""

    def __init__(self, latents: Tensor, tokens: Tensor, pooled: Tensor, generator: torch.Generator):
        self.latents, self.tokens, self.pooled, self.generator = latents, tokens, pooled, generator

    def batch(self, count: int = BATCH, times=sample_times) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(mixed, t, tokens, pooled, velocity)"""
        chosen = torch.randint(len(self.latents), (count,), generator=self.generator)
        clean = self.latents[chosen]
        noise = torch.randn(clean.shape, generator=self.generator)
        texts = drop_prompts(self.tokens[chosen], self.pooled[chosen], self.generator)
        t = times(count, self.generator)
        return torch.lerp(clean, noise, t[:, None, None, None]), t, *texts, noise - clean


class Taught:
    """Batches of noised pictures with a teacher's velocities, at times as even as the host's schedule for this model.

    Every batch asks the teacher FRESH questions, each of another picture, noise and time, and draws from its last
    answers: an answer costs more than learning from it.
    """

    def __init__(self, teacher: torch.nn.Module, pictures: Pictures):
        self.teacher, self.pictures = teacher, pictures
        self.answers: deque[tuple[Tensor, ...]] = deque(maxlen=KEPT)
        for _ in range(4 * BATCH // FRESH):
            self._ask()

    def batch(self) -> tuple[Tensor, ...]:
        """(mixed, t, tokens, pooled, velocity)"""
        self._ask()
        chosen = torch.randint(len(self.answers), (BATCH,), generator=self.pictures.generator).tolist()
        return tuple(torch.stack(column) for column in zip(*(self.answers[i] for i in chosen), strict=True))

    @torch.no_grad()
    def _ask(self) -> None:
        *given, _ = self.pictures.batch(FRESH, lambda count, generator: torch.rand(count, generator=generator))
        # the host's blocks work in place
        self.answers.extend(zip(*given, self.teacher(*(g.clone() for g in given)), strict=True))


def inherit(network: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Begin with the teacher's weights of the same name and shape: its embeddings, first blocks and last layer."""
    own = network.state_dict()
    fitting = {n: v.float() for n, v in weights.items() if n in own and own[n].shape == v.shape}
    network.load_state_dict(fitting, strict=False)


def train(
    data: Path, out: Path, minutes: float, resume: Path | None, size: str = "large", teacher: Path | None = None
) -> None:
    from lab.boot import boot

    boot()
    import comfy.ldm.flux.model
    from slipstream.demo.emoji import encode_text

    torch.manual_seed(0)
    names, pictures = load_pictures(data)
    vae = fit_vae(pictures)
    latents = encode(pictures, vae)
    texts = [encode_text(name) for name in names]
    tokens, pooled = (torch.stack(column) for column in zip(*texts, strict=True))

    changes, name = SIZES[size]
    make = functools.partial(comfy.ldm.flux.model.Flux, operations=torch.nn, dtype=torch.float32)
    network = make(**{**CONFIG, **changes})
    initialise(network)
    generator = torch.Generator().manual_seed(1)
    source = Pictures(latents, tokens, pooled, generator)
    if teacher is not None:
        weights, large = load_file(teacher), make(**CONFIG).eval()
        large.load_state_dict({k: v.float() for k, v in weights.items()})
        inherit(network, weights)
        source = Taught(large, source)
    if resume is not None:
        network.load_state_dict({k: v.float() for k, v in load_file(resume).items()})
    average = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started, said, step, running = time.monotonic(), 0.0, 0, 0.0
    while (elapsed := time.monotonic() - started) < minutes * 60:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, elapsed / (minutes * 60))
        mixed, t, text, vector, wanted = source.batch()
        optimiser.zero_grad(set_to_none=True)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the host's blocks add residuals in place
            loss = F.mse_loss(network(mixed, t, text, vector), wanted)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        follow(average, network, step, AVERAGE)
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if elapsed - said > 30:
            said = elapsed
            print(f"step {step}, {elapsed / 60:.1f} min, loss {running:.4f}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in average.state_dict().items()}
    title = f"tiny flux{'' if size == 'large' else ', ' + size}, Noto emoji"
    save_file(weights, out / f"{name}.safetensors", metadata={"modelspec.title": title})
    if teacher is None:
        save_file(vae, out / "tiny_emoji_vae_linear4x16.safetensors")
    print(f"{step} steps, loss {running:.4f}; written to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--teacher", type=Path, help="a trained large one: distil it instead of training on pictures")
    options = parser.parse_args()
    train(options.data, options.out, options.minutes, options.resume, options.size, options.teacher)
