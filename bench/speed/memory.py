"""What the cache keeps, by formula and as counted in a run, on networks of real width with one block of each kind.

    python dev.py bench memory

Writes bench/out/memory.json and docs/memory.md. Random weights: only the sizes mean anything.
"""

from __future__ import annotations

from lab.boot import ROOT, boot
from lab.rows import save, table

OUT = ROOT / "bench" / "out" / "memory.json"
PAGE = ROOT / "docs" / "memory.md"
COLUMNS = ("model", "setting", "site", "predictor", "formula", "formula_mb", "counted_mb", "dtype")

HEAD = """# What the cache keeps

Counted by the run and shown on the node; written by `python dev.py bench memory` on networks of full width with one
block of each kind and random weights, in float32 on a CPU (half of it in bfloat16 on a card). A *snapshot* is one
stored output, n = order + 1 of them are kept, c is the number of prompts evaluated (2 with a negative, cfg above 1).

| site | bytes kept | while a step is computed |
|---|---|---|
| model output | c n latent | |
| last block | c n tokens width | |
| block stack | c n tokens width | + c tokens width (input of the stack) |
| + first-block gate | + c tokens width | + c tokens width |
| + confidence gate of order m | + c (m + 1) tokens width | |
| + per token (n = 3) | + c n tokens width | |
| U-Net depth d | c n channels height width of the features entering output block N - 1 - d | |
| U-Net encoder | c n (all skip features and the middle block's output) | |
| each block | c (blocks that the table reuses) x all tokens, text too, x width | + all tokens width |

bfloat16 on a card, one snapshot: FLUX 1024x1024 (4096 image tokens, width 3072) 25.2 MB; Wan 2.1 14B, 832x480, 81
frames (32760 tokens, width 5120) 335.5 MB, so last block, order 1 and cfg keep 1.34 GB and the model output 16.8 MB;
SDXL 1024x1024 depth 0 10.5 MB, encoder 53.8 MB; SD1.5 512x512 depth 0 2.6 MB, encoder 13.4 MB.

Over the budget (`memory_budget_mb`, automatic: a quarter of the free memory) a history goes to RAM, without a card into
8 bits, and if that is too much nothing is cached and the node says so. A history on the card is announced to the host's
memory manager before it is made.

**A calibration** samples the snapshots: S = min(65536, elements of one snapshot) float32 numbers of each step and
prompt lie in RAM, 4 c steps S bytes; while the tables are made 8 steps S more, and as much again with correction
statistics. The card holds three latents beyond the sampling itself (the slope before, this one, the disturbance) and at
an inner site what the site keeps while a step is computed. FLUX 1024x1024, 28 steps: 7.3 MB and 14.7 MB of RAM, 3.1 MB
of the card. Wan 2.1 14B, 832x480, 81 frames, 50 steps, cfg: 26.2 MB and 26.2 MB of RAM, 25.2 MB of the card. Time: a
run with recording is the plain run, one evaluation in ten more, and the sampling of the snapshots; `docs/frontier.md`
has it measured. A profile is 17 kB at 28 steps; with correction statistics 4 (2 steps + 1)^2 bytes per latent channel
more, with activation statistics 8 bytes per input channel of every linear layer.

"""


def main() -> None:
    boot()
    rows = measure()
    save(OUT, rows)
    PAGE.write_text(HEAD + table(rows, COLUMNS) + "\n")
    print(table(rows, COLUMNS))


def measure() -> list[dict]:
    """One short run per setting; the formula beside what the run counted."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sample
    import comfy.supported_models
    import torch
    from slipstream.engine.run.plan import CacheConfig, PredictorConfig
    from slipstream.host.canvas import events
    from slipstream.host.model import add_cache, add_predictor, plan_of

    torch.set_num_threads(1)

    def build(family, config: dict, generator: torch.Generator):
        description = family(config)
        description.set_inference_dtype(torch.float32, None)
        model = description.get_model({}, "", device=None)
        for parameter in model.diffusion_model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1.0
            values = torch.randn(parameter.shape, generator=generator) * (
                0.5 / fan**0.5 if parameter.ndim > 1 else 0.02
            )
            parameter.data = values
        cpu = comfy.model_management.get_torch_device()
        return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)

    def counted(base, cache: dict, predictor: dict, latent, positive, negative, cfg: float) -> float:
        model = add_cache(base, CacheConfig("Custom", method=cache.pop("method", "interval"), **cache, node_id="m"))
        model = add_predictor(model, PredictorConfig(**predictor))
        noise = comfy.sample.prepare_noise(latent, 1)
        with torch.inference_mode():
            comfy.sample.sample(
                model, noise, 5, cfg, "euler", "simple", positive, negative, latent, seed=1, disable_pbar=True
            )
        return events.last_report(plan_of(model))["cache_bytes"] / 1e6

    flux = dict(
        image_model="flux", axes_dim=[16, 56, 56], num_heads=24, mlp_ratio=0.25, theta=10000, out_channels=16,
        qkv_bias=True, in_channels=16, hidden_size=3072, context_in_dim=64, patch_size=2, vec_in_dim=64, depth=1,
        depth_single_blocks=1, guidance_embed=False,
    )  # fmt: skip
    wan = dict(
        image_model="wan2.1", dim=5120, out_dim=16, num_heads=40, ffn_dim=256, num_layers=2, patch_size=(1, 2, 2),
        freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16, model_type="t2v",
        text_dim=64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 32, 64, generator=generator)
    conds = (
        [[text, {"pooled_output": torch.randn(1, 64, generator=generator)}]],
        [[0 * text, {"pooled_output": 0 * text[:, 0]}]],
    )
    cases = []
    latent = torch.zeros(1, 16, 128, 128)
    tokens, width = 4096, 3072
    one = tokens * width * 4 / 1e6
    base = build(comfy.supported_models.Flux, flux, generator)
    taylor, per_token = {"kind": "Taylor", "order": 1}, {"kind": "Per token"}
    for site, predictor, formula, size, cache in (
        ("model output", taylor, "2 x 16 x 128 x 128", 2 * latent.numel() * 4 / 1e6, {}),
        ("last block", taylor, "2 x 4096 x 3072", 2 * one, {}),
        ("block stack, first-block gate", taylor, "3 x 4096 x 3072", 3 * one, {"method": "first-block gate"}),
        ("last block", per_token, "6 x 4096 x 3072", 6 * one, {}),
        (
            "last block, int8",
            taylor,
            "2 x 4096 x (3072 / 4 + 1)",
            2 * tokens * (width + 4) / 1e6,
            {"cache_device": "int8"},
        ),
    ):
        cache = {"site": site.split(",")[0], **cache}
        cases.append(("Flux", "1024x1024, cfg 1", site, predictor, formula, size,
                      counted(base, cache, dict(predictor), latent, *conds, 1.0)))  # fmt: skip
    del base
    latent = torch.zeros(1, 16, 2, 60, 104)
    tokens, width = 2 * 30 * 52, 5120
    one = tokens * width * 4 / 1e6
    base = build(comfy.supported_models.WAN21_T2V, wan, generator)
    for site, formula, size in (
        ("model output", "2 x 2 x 16 x 2 x 60 x 104", 4 * latent.numel() * 4 / 1e6),
        ("last block", "2 x 2 x 3120 x 5120", 4 * one),
    ):
        cases.append(("Wan 14B", "832x480, 5 frames, cfg 5", site, taylor, formula, size,
                      counted(base, {"site": site}, dict(taylor), latent, *conds, 5.0)))  # fmt: skip
    return [
        {
            "name": f"{model}, {site}",
            "model": model,
            "setting": setting,
            "site": site,
            "predictor": f"{predictor['kind']}",
            "formula": formula,
            "formula_mb": size,
            "counted_mb": count,
            "dtype": "float32",
        }
        for model, setting, site, predictor, formula, size, count in cases
    ]


if __name__ == "__main__":
    main()
