"""Whole FLUX steps of real size with random weights in the host: seconds, memory, the first run's wait, idle gaps."""

from __future__ import annotations

import time
from collections.abc import Iterator

from lab.boot import boot

from .plan import NotThere
from .worker import Bench

# The least memory on which it is measured, and that on which all formats stay loaded: unloading 24 GB takes long.
LEAST_BYTES, ROOMY_BYTES = 60e9, 70e9

STEPS, DRY_STEPS = 12, 9  # at 8 and fewer one step is skipped at most

# name -> the Cache Loader's settings; None: no cache. Random weights drift too far to skip, so one row fills by count.
CACHES = {
    "alone": None,
    "Balanced": {"preset": "Balanced"},
    "every third": {"preset": "Custom", "method": "interval", "max_skip": 2, "drift_budget": 1.0},
}

REAL = dict(
    image_model="flux", axes_dim=[16, 56, 56], num_heads=24, hidden_size=3072, mlp_ratio=4.0, theta=10000,
    out_channels=16, qkv_bias=True, in_channels=16, context_in_dim=4096, patch_size=2, vec_in_dim=768, depth=19,
    depth_single_blocks=38, guidance_embed=True,
)  # fmt: skip
TINY = {**REAL, "axes_dim": [16, 24, 24], "num_heads": 4, "hidden_size": 256, "depth": 1, "depth_single_blocks": 1}

_model = None  # of this process: the lines after the first one measure on it


def model_of(bench: Bench):
    """(ModelPatcher in bfloat16, conditioning, latent of 1024 x 1024); tiny in a dry run."""
    global _model
    if not bench.dry and memory(bench) < LEAST_BYTES:
        raise NotThere(f"a card with {LEAST_BYTES / 1e9:.0f} GB: all formats are made from 24 GB of 16-bit weights")
    if _model is None:
        boot()
        _model = build(bench)
    return _model


def memory(bench: Bench) -> float:
    """Bytes of the card."""
    import torch

    return torch.cuda.get_device_properties(bench.device).total_memory


def build(bench: Bench):
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch
    from comfy.ldm.flux.model import FluxParams

    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    description = comfy.supported_models.Flux({**(TINY if bench.dry else REAL), **newer})
    description.set_inference_dtype(torch.bfloat16, None)
    model = description.get_model({}, "", device=bench.device)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 2500
            values = torch.randn(parameter.shape, device=bench.device, dtype=parameter.dtype)
            parameter.data = values.mul_(fan**-0.5 / 2)
    load = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    patcher = comfy.model_patcher.ModelPatcher(model.eval(), load_device=load, offload_device=offload)
    text = torch.randn(1, 16 if bench.dry else 512, 4096)
    positive = [[text, {"pooled_output": torch.randn(1, 768), "guidance": 3.5}]]
    return patcher, positive, torch.zeros(1, 16, *((8, 8) if bench.dry else (128, 128)))


def plain(bench: Bench) -> Iterator[dict]:
    """In 16 bit."""
    base, _, _ = model_of(bench)
    yield from steps(bench, base, "16 bit")


def w4a4(bench: Bench) -> Iterator[dict]:
    """As W4A4 Quantize makes it by default, and with 8-bit activations."""
    yield from quantised(bench, "W4A4", {})
    yield from quantised(bench, "W4A8", {"act_bits": 8}, ("alone",))


def int8(bench: Bench) -> Iterator[dict]:
    """In the 8-bit format that most files of 2026 have, made of the same weights and computed by our kernels."""
    yield from quantised(bench, "int8_convrot", {"format": "int8_convrot"})


def quantised(bench: Bench, name: str, wish: dict, caches: tuple[str, ...] = tuple(CACHES)) -> Iterator[dict]:
    import comfy.model_management

    base, _, _ = model_of(bench)
    from slipstream.host.quantise.choose import QuantWish
    from slipstream.host.quantise.quantise import quantise
    from slipstream.kernels import dispatch

    dispatch.reset()
    began = time.perf_counter()
    model = quantise(base, QuantWish(**wish))
    bench.sync()
    yield {"name": name, "quantise_s": time.perf_counter() - began}
    yield from steps(bench, model, name, caches)
    yield {"name": name, "kernels": dispatch.summary()}
    if bench.dry or memory(bench) < ROOMY_BYTES:
        comfy.model_management.unload_all_models()


def steps(bench: Bench, model, name: str, caches: tuple[str, ...] = tuple(CACHES)) -> Iterator[dict]:
    """Rows of one model: the first run, then each cache, then where the card idles."""
    import torch
    from slipstream.engine.run.plan import CacheConfig, PredictorConfig
    from slipstream.host.model import add_cache, add_predictor, plan_of

    began = time.perf_counter()
    sample(bench, model, 1)
    yield {"name": name, "first_step_s": time.perf_counter() - began}
    count = DRY_STEPS if bench.dry else STEPS
    for cache in caches:
        used = model
        if CACHES[cache] is not None:
            used = add_predictor(add_cache(model, CacheConfig(node_id="card", **CACHES[cache])), PredictorConfig())
        if not bench.dry:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = sample(bench, used, count)
        row = {"name": name, "cache": cache, "s_per_step": (time.perf_counter() - began) / count,
               "finite": bool(torch.isfinite(result).all()), "weights_gb": model.model_size() / 1e9}  # fmt: skip
        if not bench.dry:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if CACHES[cache] is not None:
            row["filled"] = told(plan_of(used))["filled"]
        yield row
    yield {"name": name, "cache": "alone", **idle(bench, lambda: sample(bench, model, 4), 4)}


def told(plan) -> dict:
    from slipstream.host.canvas import events

    return events.last_report(plan)


def sample(bench: Bench, model, count: int):
    """The final latent of so many euler steps, and the device idle."""
    import comfy.sample
    import torch

    _, positive, latent = model_of(bench)
    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        result = comfy.sample.sample(
            model, noise, count, 1.0, "euler", "simple", positive, positive, latent, seed=1, disable_pbar=True
        )
    bench.sync()
    return result


def idle(bench: Bench, run, evaluations: int) -> dict:
    """Milliseconds of an evaluation in which nothing ran on the device, between its first and last piece of work."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CPU if bench.dry else ProfilerActivity.CUDA
    with profile(activities=[kind]) as seen:
        run()
    work = sorted(
        (e.time_range.start, e.time_range.end)
        for e in seen.events()
        if bench.dry or "cuda" in str(e.device_type).lower()
    )
    if not work:
        return {"idle_ms": None}
    busy, until = 0.0, work[0][0]
    for start, end in work:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - work[0][0]
    return {"idle_ms": (whole - busy) / 1000 / evaluations, "device_ms": whole / 1000 / evaluations,
            "pieces": len(work) // evaluations}  # fmt: skip
