"""How far a quantised layer's output is from the 16-bit one, by method, on layers with outliers of known size.

    python dev.py bench quant_quality

Writes bench/out/quant_quality.json and docs/quant_quality.md. Each method is calibrated on some rows and scored on
others, with the exact arithmetic of `kernels/reference.py`. CPU, one thread, plain torch: the seconds are the
quantiser's, not the layer's.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from .boot import ROOT, boot
from .fidelity import PROMPTS as HELD_OUT_PROMPTS
from .rows import mean, mean_db, save, table

OUT = ROOT / "bench" / "out" / "quant_quality.json"
PAGE = ROOT / "docs" / "quant_quality.md"
WIDTH = 1024
MAGNITUDES = (1, 10, 30, 100)
CALIBRATION, HELD_OUT = 4096, 512
LARGE = (3072, 12288)
STEPS, PICTURES = 30, 6
SEEN = "seen.safetensors"

# What the whole models are quantised to.
WISHES = {
    "auto: Hadamard + low-rank branch, W4A4": {},
    "the same, 8-bit activations": {"act_bits": 8},
    "the same, 16-bit activations": {"act_bits": 16},
    "auto without branch": {"rank": 0},
    "auto, smoothed by a profile's ranges": {"profile": SEEN},
    "svdquant_w4a4, not smoothed": {"format": "svdquant_w4a4"},
    "svdquant_w4a4, smoothed by a profile's ranges": {"format": "svdquant_w4a4", "profile": SEEN},
    "RTN: svdquant_w4a4 without branch": {"format": "svdquant_w4a4", "rank": 0},
    "convrot_w4a4": {"format": "convrot_w4a4"},
    "int8_convrot": {"format": "int8_convrot"},
}

HEAD = """# What quantising a layer costs

Relative error of the layer's output, ||y_q - y|| / ||y||, on rows the quantiser has not seen. Written by
`python dev.py bench quant_quality`: one {width} x {width} layer of bfloat16 made to look like a diffusion transformer's
(channel spans lognormal, 8 massive channels times 1, 10, 30 or 100, correlated inputs; a weight with low-rank energy
and 0.1 % spikes), {calibration} rows to calibrate on, of which 512 are kept, and {held_out} others to score. Synthetic
data ranks methods; it promises nothing about a picture.

"""

LEGEND = """
data: what a method needs: *none*, *spans* (largest value of each input channel, as a profile has it), *rows* (512 of
the layer's inputs) or *rows, Hessian* (and X^T X of all {calibration} of them). Megabytes: the packed layer; the
16-bit one has {full:.2f}. CPU seconds: of quantising, one thread; the machine was shared, so the clock ran up to twice
as long.

"""

LARGE_HEAD = """
## A layer of {n} x {k}

No GPTQ, {threads} thread(s) on a shared machine. The methods are those of METHODS in `quant/layer.py`; `svdquant` tries
seven smooth factors on 128 of 512 rows. Peak: what the process held at most beyond what it held before; the weight
itself ({weight:.0f} MB in bfloat16) is not in it.

"""

MODELS_HEAD = """
## Whole models

The trained small models, quantised in the host by the policy of their family, without data or with the ranges of a
profile that was calibrated on four other prompts, {steps} euler steps, cfg 1, {pictures} held-out pictures: PSNR and
relative error of the final latent against the same model in full. Megabytes: the whole model as the host counts it.
These layers are narrow (256 to 1024 inputs, a few of 64), so that groups of 64 are few and the branch of rank 32 is
large beside them.

"""

MODEL_COLUMNS = (
    "model", "name", "psnr_db", "psnr_min_db", "error_pct", "megabytes", "full_megabytes", "cpu_seconds",
)  # fmt: skip
COLUMNS = ("method", "data", *(f"x{m}" for m in MAGNITUDES), "megabytes", "cpu_seconds")
LARGE_COLUMNS = ("method", "megabytes", "share_of_bf16", "seconds", "cpu_seconds", "peak_mb")


def synthetic_weight(n: int, k: int, seed: int = 1) -> Tensor:
    """A weight (n, k) with low-rank energy and 0.1 % spikes of eight times the size, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight += torch.randn(n, 16, generator=generator) @ torch.randn(16, k, generator=generator) / 2
    weight[torch.rand(n, k, generator=generator) < 0.001] *= 8
    return weight * 0.02


def synthetic_inputs(rows: int, k: int, magnitude: float, seed: int) -> Tensor:
    """Inputs (rows, k): lognormal channel spans, 8 channels times `magnitude`, half the variance in 64 directions.

    The channels and directions are the same for every seed and magnitude; the seed draws the rows.
    """
    fixed = torch.Generator().manual_seed(0)
    span = torch.randn(k, generator=fixed).mul(0.5).exp()
    span[torch.randperm(k, generator=fixed)[:8]] *= magnitude
    directions = torch.randn(64, k, generator=fixed) / 8
    drawn = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, 64, generator=drawn) @ directions
    return (shared + torch.randn(rows, k, generator=drawn)) * 0.5**0.5 * span


def schemes() -> dict[str, tuple[str, object]]:
    """Name -> (data it needs, specification)."""
    from slipstream.quant.layer import METHODS, Spec, with_spec

    rotated = METHODS["hadamard_svd"]
    return {
        "W4A4 rounding to nearest, groups of 64": ("none", METHODS["rtn"]),
        "W4A4 + scale search": ("none", with_spec(METHODS["rtn"], scale_search=True)),
        "W4A4 ConvRot, the host's format": ("none", METHODS["convrot"]),
        "W4A4 ConvRot + scale search": ("none", with_spec(METHODS["convrot"], scale_search=True)),
        "W4A4 Hadamard, groups of 64": ("none", with_spec(rotated, rank=0)),
        "W4A4 SVD 32, no smoothing": ("none", Spec(smooth="none")),
        "**W4A4 Hadamard + SVD 32** (data-free default)": ("none", rotated),
        "W4A8 Hadamard + SVD 32": ("none", with_spec(rotated, format="w4a8")),
        "W4A4 SVDQuant 32, exponents 0.5": ("spans", Spec()),
        "W4A4 Hadamard + SVD 32, exponents 0.5": ("spans", with_spec(rotated, smooth="search")),
        "W4A4 smoothing only": ("rows", Spec(rank=0)),
        "**W4A4 SVDQuant 32**": ("rows", METHODS["svdquant"]),
        "W4A4 SVDQuant 16": ("rows", Spec(rank=16)),
        "W4A4 SVDQuant 64": ("rows", Spec(rank=64)),
        "W4A4 SVDQuant 128": ("rows", Spec(rank=128)),
        "W4A4 SVDQuant 32 + Hadamard": ("rows", METHODS["hadamard_svdquant"]),
        "W4A4 SVDQuant 32, up to 20 refinements": ("rows", METHODS["svdquant_refined"]),
        "W4A4 SVDQuant 32 + GPTQ on 512 rows": ("rows", METHODS["svdquant_gptq"]),
        "**W4A4 SVDQuant 32 + GPTQ**": ("rows, Hessian", METHODS["svdquant_gptq"]),
        "W4A4 SVDQuant 32 + Hadamard + GPTQ": ("rows, Hessian", METHODS["hadamard_svdquant_gptq"]),
        "W4A4 ConvRot + GPTQ, the host's format": ("rows, Hessian", with_spec(METHODS["convrot"], gptq=True)),
        "W4A8 SVDQuant 32": ("rows", METHODS["w4a8"]),
        "W4A16 SVDQuant 32": ("rows", METHODS["w4a16"]),
        "W4A8 SVDQuant 32 + GPTQ": ("rows, Hessian", Spec("w4a8", gptq=True)),
        "W8A8 ConvRot, the host's format": ("none", METHODS["int8_convrot"]),
    }


def known(statistics, data: str):
    """What of the statistics a method may look at."""
    import dataclasses

    hidden = {
        "spans": {"rows": None, "hessian": None, "square": None},
        "rows": {"hessian": None},
        "rows, Hessian": {},
    }
    return None if data == "none" else dataclasses.replace(statistics, **hidden[data])


def synthetic(width: int = WIDTH) -> list[dict]:
    """One row per method: relative output error at every outlier size, packed megabytes, seconds to quantise."""
    from slipstream.quant.layer import Statistics, output_error, quantise_linear

    weight = synthetic_weight(width, width).bfloat16()
    inputs = {
        m: (
            Statistics.of(synthetic_inputs(CALIBRATION, width, m, 1), hessian=True),
            synthetic_inputs(HELD_OUT, width, m, 2),
        )
        for m in MAGNITUDES
    }
    rows = []
    for name, (data, spec) in schemes().items():
        row: dict = {"method": name, "data": data, "width": width}
        began = time.process_time()
        layers = {}
        for m, (statistics, _) in inputs.items():
            layers[m] = quantise_linear(weight, None, spec, known(statistics, data)).layer
        row["cpu_seconds"] = (time.process_time() - began) / len(inputs)
        row.update({f"x{m}": output_error(weight, layer, inputs[m][1]) for m, layer in layers.items()})
        row["megabytes"] = layers[MAGNITUDES[0]].nbytes / 1e6
        rows.append(row)
    return rows


def large(n: int = LARGE[0], k: int = LARGE[1]) -> list[dict]:
    """Seconds and peak memory of quantising one FLUX-sized layer, without GPTQ."""
    from slipstream.quant.layer import METHODS, Statistics, quantise_linear

    weight = synthetic_weight(n, k).bfloat16()
    statistics = Statistics.of(synthetic_inputs(512, k, 30, 1))
    rows = []
    for name in ("convrot", "hadamard_svd", "svdquant"):
        before, busy = reset_peak(), time.process_time()
        began = time.perf_counter()
        layer = quantise_linear(weight, None, METHODS[name], statistics).layer
        seconds = time.perf_counter() - began
        busy = time.process_time() - busy
        rows.append(
            {
                "method": name,
                "n": n,
                "k": k,
                "megabytes": layer.nbytes / 1e6,
                "share_of_bf16": layer.nbytes / (2 * n * k),
                "seconds": seconds,
                "cpu_seconds": busy,
                "peak_mb": peak() - before,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def reset_peak() -> float:
    """Make the kernel forget the process's highest memory; megabytes it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Megabytes this process held at most since `reset_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    boot()
    torch.set_num_threads(1)
    small, big, whole = synthetic(), large(), models()
    save(OUT, [*small, *big, *whole])
    n, k = LARGE
    page = HEAD.format(width=WIDTH, calibration=CALIBRATION, held_out=HELD_OUT) + errors_table(small)
    page += "\n" + LEGEND.format(calibration=CALIBRATION, full=2 * WIDTH * WIDTH / 1e6)
    page += LARGE_HEAD.format(n=n, k=k, threads=torch.get_num_threads(), weight=2 * n * k / 1e6)
    page += table(big, LARGE_COLUMNS) + "\n"
    page += MODELS_HEAD.format(steps=STEPS, pictures=PICTURES) + table(whole, MODEL_COLUMNS) + "\n"
    PAGE.write_text(page)
    print(page)


def models(pictures: int = PICTURES) -> list[dict]:
    """The trained small models quantised layer by layer in the host, against themselves in full."""
    import comfy.samplers
    import folder_paths
    from slipstream.demo import emoji
    from slipstream.engine.metrics import psnr, relative_error
    from slipstream.host import profiles
    from slipstream.host.calibrate import calibrate
    from slipstream.host.quantise import QuantWish, quantise
    from slipstream.host.recording import Job, Wish

    rows = []
    folder = tempfile.TemporaryDirectory()
    folder_paths.folder_names_and_paths[profiles.FOLDER] = ([folder.name], {".safetensors"})
    for name, load, scheduler in (("tiny_flux_emoji", emoji.load_flux, "simple"),
                                  ("tiny_sd15_emoji", emoji.load_unet, "normal")):  # fmt: skip
        base = load()
        job = Job(
            base,
            tuple((emoji.conditioning(HELD_OUT_PROMPTS[i % len(HELD_OUT_PROMPTS)]), 4000 + i) for i in range(pictures)),
            emoji.conditioning(""),
            1.0,
            comfy.samplers.sampler_object("euler"),
            comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), scheduler, STEPS),
            {"samples": torch.zeros(1, 16, 16, 16)},
        )
        with torch.inference_mode():
            truth = [job.sample(base, i) for i in range(pictures)]
            each = tuple((emoji.conditioning(p), 500 + i) for i, p in enumerate(emoji.PROMPTS[:4]))
            profiles.save(SEEN, calibrate(dataclasses.replace(job, runs=each), Wish(check=0, activations=True)))
        for setting, wish in WISHES.items():
            started = time.process_time()
            model = quantise(base, QuantWish(**wish))
            spent = time.process_time() - started
            with torch.inference_mode():
                results = [job.sample(model, i) for i in range(pictures)]
            scores = [psnr(value, true) for value, true in zip(results, truth, strict=True)]
            errors = [relative_error(value, true) for value, true in zip(results, truth, strict=True)]
            rows.append(
                {"name": setting, "model": name, "sampler": "euler", "steps": STEPS, "psnr_db": mean_db(scores),
                 "psnr_min_db": min(scores), "error_pct": 100 * mean(errors), "megabytes": model.model_size() / 1e6,
                 "full_megabytes": base.model_size() / 1e6, "cpu_seconds": spent, "runs": pictures}
            )  # fmt: skip
    return rows


def errors_table(rows: list[dict]) -> str:
    """The rows with errors to four decimals, which `table` would round to two."""
    shown = [{c: f"{r[c]:.4f}" if c.startswith("x") else r[c] for c in COLUMNS} for r in rows]
    return table(shown, COLUMNS)


if __name__ == "__main__":
    main()
