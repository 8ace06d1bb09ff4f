"""Train the demo's small SD1.5-type U-Net (eps prediction) on the pictures and latents of the small Flux.

    python -m demo.models.train_unet --data package --minutes 70 --out trained --resume tiny_sd15_emoji.safetensors

`--data` is the unpacked npm package `emoji-datasource-google`; COMFYUI_PATH names the checkout with the `UNetModel`.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .train_flux import encode, follow, learning_rate, load_pictures

CONFIG = dict(
    use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False, adm_in_channels=None,
    in_channels=16, out_channels=16, model_channels=64, num_res_blocks=[1, 1, 1], channel_mult=[1, 2, 2],
    transformer_depth=[1, 1, 0], transformer_depth_output=[1, 1, 1, 1, 0, 0], transformer_depth_middle=1,
    use_linear_in_transformer=False, context_dim=64, use_temporal_resblock=False, use_temporal_attention=False,
    num_heads=8, num_head_channels=-1,
)  # fmt: skip
LEARNING_RATE, WARM_UP, BATCH = 6e-4, 100, 16
EMPTY_PROMPTS, AVERAGE, HEAVIEST = 0.1, 0.998, 30.0
VAE = Path(__file__).parent / "tiny_emoji_vae_linear4x16.safetensors"


def signal_power() -> torch.Tensor:
    """alpha-bar of Stable Diffusion's 1000 training steps (square root of beta linear from .00085 to .012)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()


def initialise(network: torch.nn.Module) -> None:
    """Uniform fan-in; the last layer of every residual branch is zero, so each begins as the identity."""
    for name, module in network.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            torch.nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
                torch.nn.init.zeros_(module.weight)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)


def train(data: Path, out: Path, minutes: float, resume: Path | None) -> None:
    from lab.boot import boot

    boot()
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from slipstream.demo.emoji import encode_text

    torch.manual_seed(0)
    names, pictures = load_pictures(data)
    latents = encode(pictures, load_file(VAE))
    tokens = torch.stack([encode_text(name)[0] for name in names])
    alphas = signal_power()

    network = UNetModel(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **CONFIG)
    initialise(network)
    if resume is not None:
        network.load_state_dict({name: value.float() for name, value in load_file(resume).items()})
    network = network.to(memory_format=torch.channels_last)
    average = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    started, said, step, running = time.monotonic(), 0.0, 0, 0.0
    out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in average.state_dict().items()}
        save_file(weights, out / "tiny_sd15_emoji.safetensors", metadata={"modelspec.title": "tiny SD1.5, Noto emoji"})

    while (elapsed := time.monotonic() - started) < minutes * 60:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, elapsed / (minutes * 60), LEARNING_RATE, WARM_UP)
        chosen = torch.randint(len(names), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        told = (torch.rand(BATCH, generator=generator) >= EMPTY_PROMPTS).float()
        times = torch.randint(0, 1000, (BATCH,), generator=generator)
        power = alphas[times][:, None, None, None]
        mixed = power.sqrt() * latents[chosen] + (1 - power).sqrt() * noise
        predicted = network(
            mixed.contiguous(memory_format=torch.channels_last), times, tokens[chosen] * told[:, None, None]
        )
        # the error in v is the error in eps / sqrt(alpha-bar): unweighted, the colours (decided at high noise) drift
        weight = (1 / power).clamp(max=HEAVIEST).flatten()
        loss = (weight * (predicted - noise).square().mean((1, 2, 3))).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        follow(average, network, step, AVERAGE)
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if elapsed - said > 60:
            said = elapsed
            print(f"step {step}, {elapsed / 60:.1f} min, loss {running:.4f}", flush=True)
            save()
    save()
    print(f"{step} steps, loss {running:.4f}; written to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args()
    train(options.data, options.out, options.minutes, options.resume)
