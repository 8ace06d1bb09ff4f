"""The speed-quality frontier of a profile as a picture."""

from __future__ import annotations

import io

from ...engine.calibration.profile import Profile
from ..canvas.colours import COLOURS

CHOSEN, OTHER = "#D55E00", "#999999"


def draw(profile: Profile) -> bytes:
    """PNG bytes: error of the result against what is computed, what was sampled and chosen, and the chosen schedule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes, strip = figure.subplots(2, 1, height_ratios=(8, 1 if profile.blocks is None else 2))
    about = profile.about
    if profile.blocks is None:
        _steps(axes, strip, profile)
    else:
        _blocks(axes, strip, profile)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("error of the result, %", fontsize=9)
    what = ", ".join(str(v) for v in (about.get("family"), about.get("sampler"), profile.site, profile.predictor) if v)
    axes.set_title(what, fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _steps(axes, strip, profile: Profile) -> None:
    count, about = len(profile.keys), profile.about
    points = [(len(p.keys), 100 * p.error) for p in profile.frontier if p.error > 0]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=COLOURS["computed"], label="best, expected")
        top = axes.secondary_xaxis("top")
        shown = [n for n, _ in points][::2]
        top.set_xticks(shown, [f"{profile.steps / n:.1f}x" for n in shown], fontsize=8)
    final = about.get("measured_error") or about.get("predicted_error", 0.0)
    for tried in about.get("checked", []):
        best = tried["error"] == final
        axes.plot([count], [100 * tried["error"]], "x", ms=7, color=CHOSEN if best else OTHER)
        if best or tried["schedule"] == "even":
            text = f"{tried['schedule']}, sampled: {tried['psnr_db']:.1f} dB"
            axes.annotate(
                text, (count, 100 * tried["error"]), (10, 0), textcoords="offset points", fontsize=8, va="center"
            )
    if final:
        axes.plot([count], [100 * final], "o", ms=11, mfc="none", mec=CHOSEN, mew=2, label="chosen")
    axes.set_xlabel(f"computed of {profile.steps} steps", fontsize=9)
    filled = "reused" if profile.predictor.endswith(" 0") else "forecast"
    for step in range(profile.steps):
        colour = COLOURS["computed" if step in profile.keys else filled]
        strip.axvspan(step - 0.5, step + 0.5, color=colour, lw=0.5, ec="white")
    strip.set_xlim(-0.5, profile.steps - 0.5)
    strip.set_yticks([])
    strip.set_xlabel(f"step: {count} computed ({about.get('schedule', '')})", fontsize=9)


def _blocks(axes, strip, profile: Profile) -> None:
    from matplotlib.colors import ListedColormap

    about = profile.about
    front = [[100 * value for value in point] for point in about.get("front", [])]
    if front:
        cost, seen, unseen = zip(*front, strict=True)
        axes.plot(cost, seen, marker="o", ms=4, color=COLOURS["computed"], label="found by the search")
        axes.plot(cost, unseen, "x", ms=7, color=OTHER, label="on a run it had not seen")
    axes.plot([100 * about["cost"]], [100 * about["measured_error"]], "o", ms=11, mfc="none", mec=CHOSEN, mew=2,
              label="chosen")  # fmt: skip
    axes.set_xlabel("share of the blocks that run, %", fontsize=9)
    colours = ListedColormap([COLOURS["reused"], COLOURS["computed"]])
    strip.imshow(profile.blocks.T.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    strip.set_yticks([])
    strip.set_ylabel(f"{profile.blocks.shape[1]} blocks", fontsize=9)
    strip.set_xlabel(f"step: {len(profile.keys)} in full (ECAD)", fontsize=9)
