"""How far a quantised layer's output is from the 16-bit one, by method, on layers with outliers of known size.

    python dev.py bench quant_quality

Writes bench/out/quant_quality.json and docs/quant_quality.md. Each method is calibrated on some rows and scored on
others, with the exact arithmetic of `kernels/reference.py`. CPU, one thread, plain torch: the seconds are the
quantiser's, not the layer's.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from lab.boot import ROOT, boot
from lab.rows import save, table

from . import quant_models

OUT = ROOT / "bench" / "out" / "quant_quality.json"
PAGE = ROOT / "docs" / "quant_quality.md"
WIDTH = 1024
MAGNITUDES = (1, 10, 30, 100)
CALIBRATION, HELD_OUT = 4096, 512
LARGE = (3072, 12288)
TIMED = (2048, 2048)

# What the host's node is asked for.
WISHES = {
    "auto": {},
    "auto, 8-bit activations": {"act_bits": 8},
    "svdquant_w4a4": {"format": "svdquant_w4a4"},
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
## Time and memory

Layers of {n} x {k} and of {m} x {m}, {threads} thread(s) on a shared machine. The methods are those of METHODS in
`lab/methods.py`; the calibrated ones try seven smooth factors on 128 of 512 rows, GPTQ has the Hessian of 1024. Peak:
what the process held at most beyond what it held before, so without the weight itself ({weight:.0f} MB of the larger
one in bfloat16) and the statistics; 0 where memory left over from the method before was enough.

"""

MODELS_HEAD = """
## Whole models

The trained small models, {steps} euler steps, cfg 1, a batch of {pictures} held-out prompts and another seed;
calibrated on {calibrated} other prompts at every third step. Every layer that the family's policy gives 4 bit
(attention and MLP of the blocks) is quantised by the method, all others stay in full. *Outliers*: {share:.0%} of the
channels behind every modulated norm (Flux) or weighted norm (SD1.5) made that many times as large through the
modulation or the norm, and the weights that take them as much smaller: the same function (final latents changed by at
most {changed:.0e}), as harsh to a quantiser as the massive channels of large transformers. All in the modulation or a
norm is the easiest case for smoothing, and the only one that data-free smoothing can see.

- psnr_db, psnr_min_db: final latent against the same model in full, mean and worst of the pictures.
- equal: relative error in percent of the network's output on the inputs of the full run, mean of {replayed} steps, then
  of the first, the middle and the last; at the last step the output is small, so its relative error is the largest.
- own: the same along the quantised model's own way, mean of all steps, middle and last: it has drifted by then.
- cpu_seconds: of quantising the whole model, without the calibration run.

These layers are narrow (256 to 1280 inputs in the Flux, 64 to 512 in the U-Net): a branch of rank 32 is large beside
them and groups of 64 are few, so read the order, not the decibels.

"""

CROSSING_HEAD = """
## When to smooth by the modulation

{plain}, with and without the smooth factor read from the modulation (`host/quantise/modulation.py`), on the small Flux
with outliers of rising size: `equal` as above. least, median, most: of its layers' largest channel over their median
one, as the modulation has it. `STANDS_OUT` is set from these rows.

"""

HOST_HEAD = """
## The node

The same pictures through `host/quantise/quantise.py`, without data, by the policy with all its treatments (modulation
in W4A16 where the policy says so). Megabytes: the whole model as the host counts it.

"""

SCORE_COLUMNS = (
    "method", "data", "psnr_db", "psnr_min_db", "equal", "equal_first", "equal_middle", "equal_last", "own",
    "own_middle", "own_last", "cpu_seconds",
)  # fmt: skip
CROSSING_COLUMNS = ("outliers", "least", "median", "most", "not smoothed", "smoothed")
HOST_COLUMNS = (
    "model", "name", "psnr_db", "psnr_min_db", "equal", "own", "megabytes", "full_megabytes", "cpu_seconds",
)  # fmt: skip
COLUMNS = ("method", "data", *(f"x{m}" for m in MAGNITUDES), "megabytes", "cpu_seconds")
LARGE_COLUMNS = ("method", "layer", "megabytes", "share_of_bf16", "seconds", "cpu_seconds", "peak_mb")


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
    from slipstream.quant.layer import Spec

    from lab.methods import METHODS, with_spec

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
    from slipstream.quant.calibration import ActivationStatistics
    from slipstream.quant.layer import output_error, quantise_linear

    weight = synthetic_weight(width, width).bfloat16()
    inputs = {
        m: (
            ActivationStatistics.of(synthetic_inputs(CALIBRATION, width, m, 1), hessian=True),
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


def large() -> list[dict]:
    """Seconds and peak memory of quantising one layer: FLUX's largest without GPTQ, a square one by every method."""
    from slipstream.quant.calibration import ActivationStatistics
    from slipstream.quant.layer import quantise_linear

    from lab.methods import METHODS

    rows = []
    for (n, k), names in ((LARGE, ("convrot", "hadamard_svd", "svdquant")), (TIMED, METHODS)):
        weight = synthetic_weight(n, k).bfloat16()
        inputs = synthetic_inputs(1024, k, 30, 1)
        statistics = ActivationStatistics.of(inputs, hessian=(n, k) == TIMED)
        del inputs
        for name in names:
            if name == "svdquant_refined":  # minutes
                continue
            before, busy = reset_peak(), time.process_time()
            began = time.perf_counter()
            layer = quantise_linear(weight, None, METHODS[name], statistics).layer
            rows.append(
                {"method": name, "layer": f"{n} x {k}", "megabytes": layer.nbytes / 1e6,
                 "share_of_bf16": layer.nbytes / (2 * n * k), "seconds": time.perf_counter() - began,
                 "cpu_seconds": time.process_time() - busy, "peak_mb": max(0.0, peak() - before),
                 "threads": torch.get_num_threads()}
            )  # fmt: skip
    return rows


def reset_peak() -> float:
    """Make the kernel forget the process's highest memory; megabytes it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Megabytes this process held at most since `reset_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def host_rows() -> list[dict]:
    """The trained small models quantised by the host's node, scored like the methods."""
    from slipstream.demo import emoji
    from slipstream.host.quantise.choose import QuantWish
    from slipstream.host.quantise.quantise import quantise

    rows = []
    for name, load, scheduler in (("Flux", emoji.load_flux, "simple"), ("SD1.5", emoji.load_unet, "normal")):
        base = load()
        full = quant_models.run_in_full(base, quant_models.sampler(base, scheduler))
        for setting, wish in WISHES.items():
            started = time.process_time()
            model = quantise(base, QuantWish(**wish))
            row = {"name": setting, "model": name, "sampler": "euler", "steps": quant_models.STEPS,
                   "megabytes": model.model_size() / 1e6, "full_megabytes": base.model_size() / 1e6,
                   "cpu_seconds": time.process_time() - started, "runs": quant_models.PICTURES}  # fmt: skip
            rows.append(row | quant_models.score(model, full))
    return rows


def explanation(rows: list[dict]) -> str:
    """Why the methods come in this order, with the rows' own numbers, and whether the two goals are met."""
    db = {(row["model"], row["method"]): row["psnr_db"] for row in rows}
    equal = {(row["model"], row["method"]): row["equal"] for row in rows}
    easy, hard, worst = "Flux", "Flux, outliers x30", "Flux, outliers x100"
    best, int8 = quant_models.BEST_KNOWN, "int8 ConvRot (W8A8)"
    rtn, convrot, plain, smoothed = (
        quant_models.RTN, quant_models.CONVROT, quant_models.PLAIN, quant_models.SMOOTHED
    )  # fmt: skip

    def over(model: str, first: str, second: str) -> str:
        return f"{db[model, first] - db[model, second]:+.1f} dB"

    def error(model: str, *names: str) -> str:
        return " to ".join(f"{equal[model, name]:.1f}" for name in names) + " %"

    text = f"""
### Why in this order

Rounding to nearest gives every group of 64 channels one scale, so one massive channel takes the resolution of the 63
others: with outliers of x30 the error is as large as the output ({error(hard, rtn)}). A rotation spreads a massive
channel over its block of up to 256 and leaves a block of even but larger numbers; ConvRot rounds that with one scale
per row, Hadamard with groups. The low-rank branch takes the largest directions of the weight out of the rounding; with
the rotation it is the best method that needs no data as long as nothing stands out ({over(easy, plain, convrot)} over
ConvRot on the Flux, {over(hard, plain, convrot)} with outliers of x30, but {over(worst, plain, convrot)} with x100,
where all three are lost). What none of them does is make an outlier smaller. That takes a smooth factor per channel,
which moves it into the weight, where the branch holds it in 16 bit. Calibrated, this is SVDQuant, which outliers do not
touch; read from the modulation it needs no data ({over(hard, smoothed, plain)} with outliers of x30), but where there
are no outliers its guess costs a little (`equal` from {error(easy, plain, smoothed)}). GPTQ lets the columns still to
be rounded make up for the error on inputs that occur: `equal` on the Flux from {error(easy, "SVDQuant", best)}, on top
of the rotation from {error(easy, "SVDQuant + Hadamard", "SVDQuant + Hadamard + GPTQ")}; in the U-Net, with layers of
64 and 128 inputs of which the branch holds 32 directions, it finds nothing to gain. With 8-bit activations the weights'
error is left ({error(easy, "SVDQuant, W4A8")}), with 16-bit ones the same ({error(easy, "SVDQuant, W4A16")}). int8
ConvRot has finer steps in both and is nearly lossless until outliers of x30 reach it ({error(easy, int8)}, then
{error(hard, int8)}): it does not smooth. PSNR is of {quant_models.PICTURES} pictures that drift either way; differences
below about 2 dB are better read from `equal`, which has no drift.

| goal | model | gain | met |
| --- | --- | --- | --- |
"""
    models = dict.fromkeys(row["model"] for row in rows)
    goals = [(best, rtn, model, 6) for model in models if "outliers" in model]
    for first, second, model, least in goals + [(plain, convrot, model, 3) for model in models]:
        gain = db[model, first] - db[model, second]
        met = "yes" if gain >= least else "no"
        text += f"| {first} at least {least} dB over {second} | {model} | {gain:.2f} dB | {met} |\n"
    return text


def main() -> None:
    boot()
    torch.set_num_threads(1)
    parts = []
    for part in (host_rows, quant_models.crossing, quant_models.whole_models, large, synthetic):
        began = time.process_time()
        parts.append(part())
        print(f"{part.__name__}: {time.process_time() - began:.0f} CPU seconds", flush=True)
        save(OUT, [row for rows in parts for row in rows])  # so that a run that is cut short is not lost
    page = written(*parts)
    PAGE.write_text(page)
    print(page)


def written(host: list[dict], crossed: list[dict], whole: list[dict], big: list[dict], small: list[dict]) -> str:
    """The page, all of whose figures are these rows'."""
    n, k = LARGE
    page = HEAD.format(width=WIDTH, calibration=CALIBRATION, held_out=HELD_OUT) + errors_table(small)
    page += "\n" + LEGEND.format(calibration=CALIBRATION, full=2 * WIDTH * WIDTH / 1e6)
    page += LARGE_HEAD.format(n=n, k=k, m=TIMED[0], threads=big[0]["threads"], weight=2 * n * k / 1e6)
    page += table(big, LARGE_COLUMNS) + "\n"
    page += MODELS_HEAD.format(
        steps=quant_models.STEPS, pictures=quant_models.PICTURES, calibrated=quant_models.CALIBRATED,
        share=quant_models.SHARE, replayed=len(quant_models.REPLAYED), changed=max(r["changed"] for r in whole),
    )  # fmt: skip
    for model in dict.fromkeys(row["model"] for row in whole):
        rows = [row for row in whole if row["model"] == model]
        page += f"### {model}\n\n{table(rows, SCORE_COLUMNS)}\n\n"
    page = page.rstrip() + "\n" + explanation(whole)
    page += CROSSING_HEAD.format(plain=quant_models.PLAIN) + table(crossed, CROSSING_COLUMNS) + "\n"
    return page + HOST_HEAD + table(host, HOST_COLUMNS) + "\n"


def errors_table(rows: list[dict]) -> str:
    """The rows with errors to four decimals, which `table` would round to two."""
    shown = [{c: f"{r[c]:.4f}" if c.startswith("x") else r[c] for c in COLUMNS} for r in rows]
    return table(shown, COLUMNS)


if __name__ == "__main__":
    main()
