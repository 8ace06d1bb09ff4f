"""The Speed & Quality Report: an accelerated result beside the plain one of the same seed, and beside two floors.

The floors say what the numbers are worth. Fewer plain steps of the same cost are what anybody has without this pack;
another seed is a picture that is as good but not the same one.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...engine.metrics import psnr, relative_error, ssim
from ...kernels.files import write_whole
from ..calibrate.job import starting_latent
from ..canvas.colours import REMOTE, SMALL, WORDS, as_image
from ..switch.segments import segments_of
from .card import Tile, draw, marks
from .fewer import equal_cost, fewer_sigmas
from .plain import Plain, plain_of, weights
from .runs import NODE, Sampling, Taken, check_same, last_run, of_run

AUTO, NONE, FEWER, BOTH = FLOORS = ("auto", "none", "fewer steps", "fewer steps and another seed")

SEED = "another seed"

# The four below are chosen for what is worth a sentence, not measured.
# Two PSNRs nearer than this say the same.
EQUAL_DB = 0.5
# A result this near to another seed's distance is not the picture that was asked for.
FOREIGN_DB = 3.0
# Two times of the same work that differ by more than this are told.
NOISE = 0.15
# A model of other weights than the plain one, from this relative difference in bytes on.
OTHER_WEIGHTS = 0.01


@dataclass(frozen=True, slots=True)
class Saved:
    """Where the card was written, as the host's file view wants it."""

    filename: str
    subfolder: str


@dataclass(frozen=True, slots=True)
class Connected:
    """What is connected to the node. Each may be None; `sampling` is what it needs to sample by itself."""

    samples: dict | None = None
    reference: dict | None = None
    model: object | None = None
    reference_model: object | None = None
    vae: object | None = None
    sampling: Sampling | None = None
    floors: str = AUTO


def make_report(given: Connected, prefix: str) -> tuple[Tensor, str, Saved, str]:
    """Return (card [1, H, W, 3] in [0, 1], JSON text, where the card lies, the verdict); card and JSON are also saved.

    What is not connected is sampled. Raises SlipstreamError, and the host's own exception when the user cancels;
    nothing is written then.
    """
    check(given)
    sampling = given.sampling
    remarks: list[str] = []
    run = None if given.model is None else last_run(given.model)
    if given.samples is None:
        fast = sampling.accelerated(given.model)
    else:
        fast = of_run("accelerated", given.samples, run)
        if sampling is not None:
            check_same(run, sampling)
    off = plain_of(given.reference_model or given.model) if sampling is not None else None
    if given.reference is None:
        _check_size(fast, sampling, off)
        plain = sampling.plain(off)
        remarks += [off.what] if off.what else []
    else:
        source = given.reference_model
        plain = of_run("plain", given.reference, None if source is None else last_run(source))
    _check_shapes(fast, plain, given)
    others = [] if sampling is None else _floors(given, fast, plain, off, remarks)
    rows, tiles = _compared([fast, plain, *others], given.vae)
    numbers = _numbers(given, fast, plain, rows, remarks)
    text = json.dumps(_finite(numbers), indent=1)
    return *_save(numbers, tiles, text, prefix), numbers["verdict"]


def check(given: Connected) -> None:
    """Raise SlipstreamError where something is missing."""
    if given.floors not in FLOORS:
        raise SlipstreamError(f"{NODE}: there is no floor '{given.floors}'; choose one of {', '.join(FLOORS)}.")
    need = "positive, sampler, sigmas and latent_image"
    for name, value in (("samples", given.samples), ("reference", given.reference)):
        if value is not None and getattr(value["samples"], "is_nested", False):
            raise SlipstreamError(
                f"{NODE}: {name} is a latent of several tensors (picture with sound); connect one of its parts."
            )
        if value is None and given.sampling is None:
            raise SlipstreamError(f"{NODE}: {name} is not connected; connect it, or {need}, and it is sampled here.")
    if given.sampling is None:
        if given.floors in (FEWER, BOTH):
            raise SlipstreamError(f"{NODE}: for '{given.floors}' connect {need}, or set floors to none.")
        return
    if given.sampling.steps < 1:
        raise SlipstreamError(f"{NODE}: the sigmas have no step; connect a scheduler with 1 step or more.")
    if given.model is None and (given.samples is None or given.reference_model is None):
        raise SlipstreamError(
            f"{NODE}: connect model, the MODEL of the accelerated sampler, so that it is sampled here."
        )
    if getattr(given.sampling.latent["samples"], "is_nested", False):
        raise SlipstreamError(f"{NODE}: a latent_image of several tensors (picture with sound) cannot be compared.")


def _check_size(fast: Taken, sampling: Sampling, off: Plain) -> None:
    """Before minutes are spent: the plain run would give another shape than the samples have."""
    would, have = list(starting_latent(off.model, sampling.latent).shape), list(fast.latent["samples"].shape)
    if would != have:
        raise SlipstreamError(
            f"{NODE}: samples are {have} but latent_image gives {would}; connect the latent_image of the sampler that "
            "made the samples."
        )


def _check_shapes(fast: Taken, plain: Taken, given: Connected) -> None:
    value, truth = fast.latent["samples"], plain.latent["samples"]
    if value.shape != truth.shape:
        raise SlipstreamError(
            f"{NODE}: samples are {list(value.shape)} but reference is {list(truth.shape)}; "
            "sample both at the same size, batch and length."
        )


# -- the floors ------------------------------------------------------------------------------------------------------


def _floors(given: Connected, fast: Taken, plain: Taken, off: Plain, remarks: list[str]) -> list[Taken]:
    """The floors that were asked for and can be had; why one cannot goes into the remarks."""
    found, sampling = [], given.sampling
    if given.floors == NONE or not _is_finite(fast.latent) or not _is_finite(plain.latent):
        return found
    count = equal_cost(fast, plain, _by_time(given, off), sampling.steps)
    if count is None:
        remarks.append("what the accelerated run cost is not known, so there are no fewer steps of the same cost")
    elif count >= sampling.steps:
        remarks.append("the accelerated run cost as much as the plain one, so fewer steps are not compared")
    else:
        sigmas, scheduler = fewer_sigmas(off.model, sampling.sigmas, count)
        name = f"{count} plain {'step' if count == 1 else 'steps'}"
        found.append(sampling.plain(off, name, sigmas=sigmas))
        if scheduler == "interpolated":
            remarks.append("the sigmas of the fewer steps are interpolated from those given")
    if given.floors != FEWER:
        found.append(sampling.plain(off, SEED, seed=(sampling.seed + 1) % 2**64))
    return found


def _by_time(given: Connected, off: Plain) -> bool:
    """Whether an evaluation of the accelerated run is another thing than one of the plain run."""
    if given.model is None:
        return False
    if len(segments_of(given.model)) > 1:
        return True
    sizes = weights(given.model) or {"accelerated": given.model.model_size(), "plain": off.model.model_size()}
    return abs(sizes["accelerated"] - sizes["plain"]) > OTHER_WEIGHTS * sizes["plain"]


def _is_finite(latent: dict) -> bool:
    return bool(torch.isfinite(latent["samples"]).all())


# -- numbers ---------------------------------------------------------------------------------------------------------


def compare(value: Tensor, reference: Tensor) -> dict:
    """Error of one latent [B, ...] against the other: PSNR over the reference's range (mean of rows), relative L2."""
    rows = [psnr(v, r) for v, r in zip(value, reference, strict=True)]
    return {"latent_psnr_db": _mean(rows), "latent_relative_error": relative_error(value, reference)}


def _compared(results: list[Taken], vae) -> tuple[list[dict], list[Tile]]:
    """A row of numbers for each result against the second, the plain one, and the pictures for the card.

    Of a batch or a video the card shows the picture in which the first result is farthest from the plain one.
    """
    truth = results[1].latent["samples"]
    plain = None if vae is None else _pictures(vae.decode(truth))
    rows, tiles, shown = [], [], 0
    for result in results:
        value = result.latent["samples"].to(truth)
        row = _row(result) | compare(value, truth)
        if plain is not None:
            pictures = plain if result is results[1] else _pictures(vae.decode(value))
            each = [psnr(p, t, 1.0) for p, t in zip(pictures, plain, strict=True)]
            row |= {"picture_psnr_db": _mean(each), "picture_ssim": ssim(pictures, plain)}
            if result is results[0]:
                shown = min(range(len(each)), key=lambda i: (not math.isnan(each[i]), each[i]))
                row |= {"picture_psnr_min_db": each[shown], "picture_shown": shown, "pictures": len(each)}
            tiles.append(Tile(result.name, pictures[shown].numpy()))
        rows.append(row)
    return rows, tiles


def _row(result: Taken) -> dict:
    return {
        "name": result.name,
        "steps": result.steps,
        "evaluations": result.evaluations,
        "seconds": result.seconds,
        "seconds_only_once": None if result.seconds is None else result.once,
        "peak_memory_bytes": result.peak_memory_bytes,
        "peak_memory_of": result.peak_memory_of,
    }


def _numbers(given: Connected, fast: Taken, plain: Taken, rows: list[dict], remarks: list[str]) -> dict:
    first = rows[0]
    speed_up = fast.steady and plain.steady and plain.steady / fast.steady
    for row, result in zip(rows[:2], (fast, plain), strict=True):
        if result.once > 0.2 * (result.steady or math.inf):
            remarks.append(
                f"{row['name']}: {result.once:.2f} s of its first evaluation are not counted (done only once)"
            )
    remarks += _noise(plain, rows)
    what = None if given.model is None else type(given.model.model).__name__
    run = fast.run
    return {
        **{key: first[key] for key in ("latent_psnr_db", "latent_relative_error")},
        **{key: first[key] for key in first if key.startswith("picture")},
        "run": run,
        "reference_run": plain.run,
        "speed_up": speed_up or None,
        "drift_mean": run and run["drift_mean"],
        "drift_max": run and run["drift_max"],
        "model": what,
        "seed": None if given.sampling is None else given.sampling.seed,
        "weights_bytes": None if given.model is None else weights(given.model),
        "rows": rows,
        "remarks": remarks,
        "verdict": verdict(rows, run, speed_up or None),
    }


def _noise(plain: Taken, rows: list[dict]) -> list[str]:
    """Another seed does the same work as the plain run, so the two times show how far times can be trusted."""
    again = next((row for row in rows[2:] if row["name"] == SEED), None)
    if again is None or not plain.steady:
        return []
    seconds = again["seconds"] - again["seconds_only_once"]
    if abs(seconds / plain.steady - 1) <= NOISE:
        return []
    return [f"times are rough: the plain run took {plain.steady:.2f} s, and {seconds:.2f} s with another seed"]


def verdict(rows: list[dict], run: dict | None, speed_up: float | None) -> str:
    """One sentence an artist can act on. rows: accelerated, plain, and the floors."""
    what = "picture" if "picture_psnr_db" in rows[0] else "latent"
    key = f"{what}_psnr_db"
    error = rows[0][key]
    if math.isnan(rows[0]["latent_psnr_db"]):
        return (
            "There is nothing to compare: one of the results holds values that are no numbers (NaN), which a model in "
            "16 bit gives when it overflows; try the preset Off or another precision."
        )
    nothing = f" ({run['note']})" if run and not run["filled"] and run["note"] and not run.get("segments") else ""
    if math.isinf(error) and error > 0:
        return f"Identical to the plain result{nothing}."
    seed = next((row for row in rows[2:] if row["name"] == SEED), None)
    fewer = next((row for row in rows[2:] if row["name"] != SEED), None)
    parts = [_speed(run, speed_up, fewer is not None) + nothing]
    if seed is not None and error < seed[key] + FOREIGN_DB:
        far = f"no nearer to the plain {what} ({error:.1f} dB) than another seed ({seed[key]:.1f} dB)"
        parts.append(f"{far}: see that seed, prompts and latent are those of the samples, or skip less")
    elif fewer is not None:
        parts.append(_beside(error, fewer, key, what))
    else:
        ending = "hard to tell apart" if error >= 40 else "small differences" if error >= 30 else "visibly different"
        parts.append(f"{error:.1f} dB between the two {what}s, {ending}")
    if seed is not None and error >= seed[key] + FOREIGN_DB:
        parts.append(f"another seed would be {seed[key]:.0f} dB away")
    sentence = "; ".join(part for part in parts if part)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _beside(error: float, fewer: dict, key: str, what: str) -> str:
    same = f"{fewer['name']} of the same cost ({fewer[key]:.1f} dB)"
    if abs(error - fewer[key]) <= EQUAL_DB:
        return f"as near to the plain {what} ({error:.1f} dB) as {same}, so fewer steps do as well"
    if error > fewer[key]:
        return f"nearer to the plain {what} ({error:.1f} dB) than {same}"
    return f"farther from the plain {what} ({error:.1f} dB) than {same}, so fewer steps do better"


def _speed(run: dict | None, speed_up: float | None, beside: bool) -> str:
    """How fast it was, and who did what; empty where nothing is known. beside: fewer steps tell what was computed."""
    parts = []
    if speed_up is not None:
        if 0.95 <= speed_up <= 1.05:
            parts.append("as fast as the plain run")
        else:
            parts.append(
                f"{speed_up:.2g} times as fast" if speed_up > 1 else f"slower, {1 / speed_up:.2g} times the time"
            )
    if run is not None:
        elsewhere = {m: n for m, n in marks(run).items() if m in (SMALL, REMOTE)}
        if elsewhere:
            parts += [f"{n} of {run['evaluations']} evaluations {WORDS[m]}" for m, n in elsewhere.items()]
        elif not beside and (speed_up is None or run["filled"]):
            worth = run.get("computed_share", run["computed"])
            parts.append(f"{worth:.4g} of {run['evaluations']} evaluations computed")
    return ", ".join(parts)


def _mean(values: list[float]) -> float:
    """The mean of PSNRs; of a batch in which some pictures are identical that of the others."""
    finite = [v for v in values if v != math.inf]
    return sum(finite) / len(finite) if finite else math.inf


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


def _save(numbers: dict, tiles: list[Tile], text: str, prefix: str) -> tuple[Tensor, str, Saved]:
    card = draw(numbers, tiles)
    output, written = folder_paths.get_output_directory(), None
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
        stem = f"{name}_{counter:05}_"
        written = Path(folder, stem + ".json")
        write_whole(written, text.encode())
        write_whole(Path(folder, stem + ".png"), card)
    except Exception as error:  # the host refuses a path out of its folder with the bare class
        if written is not None:
            with contextlib.suppress(OSError, ValueError):
                written.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or "it is no name below the output folder"
        raise SlipstreamError(
            f"{NODE}: the report cannot be written as '{prefix[:60]}' ({why}); choose another filename_prefix."
        ) from error
    return as_image(card), text, Saved(stem + ".png", subfolder)
