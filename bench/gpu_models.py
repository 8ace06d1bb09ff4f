"""Whole models of real size with random weights in the host: the part of `bench gpu` that is about them."""

from __future__ import annotations

import time

STEPS = 20

# Whole models: their formats as `W4A4 Quantize` has them.
WISHES = {
    "bf16": None,
    "auto: W4A4, rotated": {},
    "auto with 8-bit activations": {"act_bits": 8},
    "svdquant_w4a4": {"format": "svdquant_w4a4"},
    "convrot_w4a4": {"format": "convrot_w4a4"},
    "int8_convrot": {"format": "int8_convrot"},
}
CACHES = {"alone": None, "Balanced cache": {"preset": "Balanced"}}


def build(name: str, device):
    """A ModelPatcher of FLUX or Wan 1.3B with random weights in bfloat16, its conditioning and latent; tiny without a
    card."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    real = device.type == "cuda"
    if name == "FLUX":
        config = dict(
            image_model="flux", axes_dim=[16, 56, 56], num_heads=24, hidden_size=3072, mlp_ratio=4.0, theta=10000,
            out_channels=16, qkv_bias=True, in_channels=16, context_in_dim=4096, patch_size=2, vec_in_dim=768,
            depth=19, depth_single_blocks=38, guidance_embed=True,
        )  # fmt: skip
        tiny = dict(axes_dim=[16, 24, 24], num_heads=4, hidden_size=256, depth=1, depth_single_blocks=1)
        family, latent = comfy.supported_models.Flux, (1, 16, 128, 128)
    else:
        config = dict(
            image_model="wan2.1", dim=1536, out_dim=16, num_heads=12, ffn_dim=8960, num_layers=30,
            patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
            in_dim=16, model_type="t2v", text_dim=4096,
        )  # fmt: skip
        tiny = dict(dim=256, num_heads=2, ffn_dim=512, num_layers=1)
        family, latent = comfy.supported_models.WAN21_T2V, (1, 16, 9, 60, 104)
    if not real:
        config, latent = {**config, **tiny}, (1, 16, 8, 8) if name == "FLUX" else (1, 16, 1, 8, 8)
    description = family(config)
    description.set_inference_dtype(torch.bfloat16, None)
    model = description.get_model({}, "", device=device)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 2500
            parameter.data = torch.randn(parameter.shape, device=device, dtype=parameter.dtype) * (fan**-0.5 / 2)
    offload = torch.device("cpu") if not real else comfy.model_management.unet_offload_device()
    load = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(model.eval(), load_device=load, offload_device=offload)
    text = torch.randn(1, 512 if real else 16, 4096)
    positive = [[text, {"pooled_output": torch.randn(1, 768), "guidance": 3.5}]]
    return patcher, positive, torch.zeros(latent)


def models(card) -> list[dict]:
    """Seconds a step and peak memory of whole models in the host, bf16 against each format, alone and with a cache."""
    import comfy.model_management
    import torch
    from slipstream.host.patcher import add_cache, add_predictor
    from slipstream.host.plan import CacheConfig, PredictorConfig
    from slipstream.host.quantise import QuantWish, quantise
    from slipstream.kernels import dispatch

    rows, device = [], card.device
    there = card.there
    steps = STEPS if there else 4
    for name in ("FLUX", "Wan 1.3B"):
        try:
            base, positive, latent = build(name, device)
        except torch.OutOfMemoryError:
            rows.append({"section": "models", "model": name, "name": "bf16", "failed": "too large for this card"})
            continue
        for label, wish in WISHES.items():
            dispatch.reset()
            began = time.perf_counter()
            model = base if wish is None else quantise(base, QuantWish(**wish))
            preparing = time.perf_counter() - began
            for cache, config in CACHES.items():
                used = model if config is None else add_cache(model, CacheConfig(node_id="bench", **config))
                used = used if config is None else add_predictor(used, PredictorConfig())
                row = {"section": "models", "model": name, "name": label, "cache": cache, "steps": steps,
                       "quantise_seconds": preparing if wish is not None else None}  # fmt: skip
                try:
                    run(used, positive, latent, 2)  # loads, compiles, measures which kernel is fastest
                    if there:
                        torch.cuda.reset_peak_memory_stats()
                    began = time.perf_counter()
                    run(used, positive, latent, steps)
                    row["seconds_per_step"] = (time.perf_counter() - began) / steps
                    if there:
                        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                    row["weights_gb"], row["kernels"] = model.model_size() / 1e9, dispatch.summary()
                except torch.OutOfMemoryError:
                    row["failed"] = "out of memory"
                rows.append(row)
            comfy.model_management.unload_all_models()
            del model, used
            comfy.model_management.soft_empty_cache()
        del base
    return rows


def run(model, positive, latent, steps: int):
    import comfy.sample
    import torch

    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", positive, positive, latent, seed=1, disable_pbar=True
        )
