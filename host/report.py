"""The Speed & Quality Report: numbers, a picture card and a JSON file for one pair of results."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ..engine.files import write_whole
from ..engine.metrics import psnr, relative_error, ssim
from . import events
from .errors import SlipstreamError
from .patcher import plan_of
from .segments import segments_of

NODE = "Speed & Quality Report"


@dataclass(frozen=True, slots=True)
class Saved:
    """Where the card was written, as the host's file view wants it."""

    filename: str
    subfolder: str


def compare(value: Tensor, reference: Tensor) -> dict:
    """Error of one latent [B, ...] against the other: PSNR over the reference's range (mean of rows), relative L2."""
    rows = [psnr(v, r) for v, r in zip(value, reference, strict=True)]
    return {"latent_psnr_db": _mean(rows), "latent_relative_error": relative_error(value, reference)}


def make_report(samples: dict, reference: dict, model, reference_model, vae, prefix: str) -> tuple[Tensor, str, Saved]:
    """Return (card [1, H, W, 3] in [0, 1], JSON text, where the card lies); card and JSON are also saved.

    samples, reference: the host's LATENT dicts of one shape. Raises SlipstreamError when the shapes differ.
    """
    value, truth = samples["samples"], reference["samples"]
    if value.shape != truth.shape:
        raise SlipstreamError(
            f"{NODE}: samples are {list(value.shape)} but reference is {list(truth.shape)}; "
            "sample both at the same size, batch and length."
        )
    numbers = compare(value, truth)
    pictures = None
    if vae is not None:
        pictures = [_pictures(vae.decode(t)) for t in (truth, value)]
        numbers["picture_psnr_db"] = _mean([psnr(v, r, 1.0) for r, v in zip(*pictures, strict=True)])
        numbers["picture_ssim"] = ssim(pictures[1], pictures[0])
    for name, source in (("run", model), ("reference_run", reference_model)):
        numbers[name] = None if source is None else last_run(source)
    numbers["speed_up"] = _speed_up(numbers["run"], numbers["reference_run"])
    numbers["verdict"] = verdict(numbers)
    text = json.dumps(_finite(numbers), indent=1)
    return _save(numbers, pictures, text, prefix)


@dataclass(frozen=True, slots=True)
class _Nodes:
    node_ids: tuple[str, ...]


def last_run(model) -> dict | None:
    """The report of this MODEL's last run; of one with a switch the switch's, which knows of all its models."""
    switches = (segment.node_id for segment in segments_of(model) if segment.node_id)
    return events.last_report(_Nodes((*plan_of(model).node_ids, *switches)))


def verdict(numbers: dict) -> str:
    """One sentence an artist can act on."""
    error = numbers.get("picture_psnr_db", numbers["latent_psnr_db"])
    if math.isinf(error):
        return "Identical to the plain result."
    run = numbers["run"]
    what = "pictures" if "picture_psnr_db" in numbers else "latents"
    parts = [f"{error:.1f} dB between the two {what}"]
    if run is not None:
        elsewhere = {m: n for m, n in marks(run).items() if m in (SMALL, REMOTE)}
        if elsewhere:
            parts += [f"{n} of {run['evaluations']} evaluations {WORDS[m]}" for m, n in elsewhere.items()]
        else:
            worth = run.get("computed_share", run["computed"])
            parts.append(f"{worth:.4g} of {run['evaluations']} evaluations computed")
    if numbers["speed_up"] is not None:
        parts.append(f"{numbers['speed_up']:.2f} times as fast")
    ending = "hard to tell apart" if error >= 40 else "small differences" if error >= 30 else "visibly different"
    return f"{', '.join(parts)}: {ending}."


def _speed_up(run: dict | None, plain: dict | None) -> float | None:
    return plain["seconds"] / run["seconds"] if run and plain and run["seconds"] else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _pictures(decoded: Tensor) -> Tensor:
    """[N, H, W, 3] in [0, 1]; a video's frames become rows."""
    return decoded.reshape(-1, *decoded.shape[-3:])[..., :3].float().clamp(0, 1).cpu()


def _finite(value):
    """JSON has no infinity: such numbers become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save(numbers: dict, pictures, text: str, prefix: str) -> tuple[Tensor, str, Saved]:
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    stem = f"{name}_{counter:05}_"
    card = draw(numbers, pictures)
    write_whole(Path(folder, stem + ".png"), card)
    write_whole(Path(folder, stem + ".json"), text.encode())
    return as_image(card), text, Saved(stem + ".png", subfolder)


def as_image(png: bytes) -> Tensor:
    """A PNG file's content as the host's IMAGE, [1, H, W, 3] in [0, 1]."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels)[None]


def draw(numbers: dict, pictures: list[Tensor] | None) -> bytes:
    """The card as PNG bytes: both pictures and their difference where a VAE was given, the strip of evaluations, the
    drift curve, and the verdict."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = numbers["run"]
    figure = Figure(figsize=(9, (3.4 if pictures else 0) + (2.4 if run else 0) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(numbers["verdict"], fontsize=11)
    parts = figure.subfigures(2 if pictures and run else 1, 1, squeeze=False)[:, 0]
    if pictures:
        _draw_pictures(parts[0], pictures)
    if run:
        _draw_run(parts[-1], run)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw_pictures(figure, pictures: list[Tensor]) -> None:
    plain, fast = (p[0].numpy() for p in pictures)
    shown = (("plain", plain), ("accelerated", fast), ("difference x 4", (abs(plain - fast) * 4).clip(0, 1)))
    for axes, (title, picture) in zip(figure.subplots(1, 3), shown, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")


SMALL, REMOTE, ANCHOR = "small model", "remote", "anchor"
WORDS = {SMALL: "by a small model", REMOTE: "on another server"}

# Colours that colour-blind readers tell apart (Okabe and Ito; Tableau), one per thing that can become of an evaluation.
COLOURS = {
    "computed": "#0072B2", "forecast": "#E69F00", "reused": "#56B4E9", ANCHOR: "#009E73", REMOTE: "#D55E00",
    SMALL: "#B07AA1",
}  # fmt: skip
OTHER = "#999999"


def marks(run: dict) -> dict[str, int]:
    """How often each thing became of an evaluation, in the order of the colours."""
    seen = Counter(_mark(e) for e in run["trace"])
    return {mark: seen[mark] for mark in sorted(seen, key=[*COLOURS, *seen].index)}


def _mark(evaluation: dict) -> str:
    return ANCHOR if evaluation.get("anchor") else evaluation["action"]


def _draw_run(figure, run: dict) -> None:
    axes = figure.subplots()
    seen = [(e["index"], 100 * e["drift"]) for e in run["trace"] if e["drift"] is not None]
    for e in run["trace"]:
        colour = COLOURS.get(_mark(e), OTHER)
        axes.axvspan(e["index"] - 0.5, e["index"] + 0.5, ymax=0.12 if seen else 0.5, color=colour, lw=0)
    axes.set_xlim(-0.5, max(0.5, len(run["trace"]) - 0.5))
    counts = marks(run)
    said = f"computed {run['computed']}, filled {run['filled']}"
    if SMALL in counts or REMOTE in counts:
        said = ", ".join(f"{mark} {n}" for mark, n in counts.items())
    axes.set_xlabel(f"evaluation: {said} ({run['seconds']:.2f} s)", fontsize=9)
    if seen:
        axes.plot(*zip(*seen, strict=True), marker="o", ms=3, color="#333333", lw=1)
        axes.set_ylabel("drift measured, %", fontsize=9)
        axes.set_ylim(bottom=0)
    else:
        axes.set_yticks([])
    for mark in counts:
        axes.plot([], [], lw=6, color=COLOURS.get(mark, OTHER), label=mark)
    axes.legend(fontsize=8, ncols=max(1, len(counts)), loc="upper center")
