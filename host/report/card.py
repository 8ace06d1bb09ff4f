"""The report's picture card: pictures and their difference, what every evaluation was, and a table.

Everything is placed in inches from the top left corner, and every text is measured before it is placed, so that nothing
overlaps whatever the pictures' shape and however long a sentence is.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass

from ..canvas.colours import ANCHOR, COLOURS, OTHER

# Inches; at 100 dots per inch the card is 1200 pixels wide.
WIDTH, MARGIN, GAP, DPI = 12.0, 0.4, 0.16, 100
INNER = WIDTH - 2 * MARGIN
TALLEST, LOWEST, LINE = 4.2, 0.4, 0.24
INK, QUIET, RULE = "#1a1a1a", "#6b6b6b", "#d5d5d5"

# The difference is shown enlarged by a power of two, at most by this much.
MOST_ENLARGED = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture of the card: [H, W, 3] in [0, 1], a numpy array."""

    name: str
    picture: object


def marks(run: dict) -> dict[str, int]:
    """How often each thing became of an evaluation, in the order of the colours."""
    seen = Counter(_mark(e) for e in run["trace"])
    return {mark: seen[mark] for mark in sorted(seen, key=[*COLOURS, *seen].index)}


def _mark(evaluation: dict) -> str:
    return ANCHOR if evaluation.get("anchor") else evaluation["action"]


def draw(numbers: dict, tiles: list[Tile]) -> bytes:
    """The card as PNG bytes. numbers: of the report; tiles: accelerated, plain and the floors, or none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1), dpi=DPI, facecolor="white")
    page = _Page(figure, FigureCanvasAgg(figure))
    sections = [_Head(page, numbers)]
    if tiles:
        sections.append(_Pictures(page, numbers, tiles))
    if numbers["run"] and numbers["run"]["trace"]:
        sections.append(_Run(page, numbers["run"]))
    sections.append(_Table(page, numbers["rows"]))
    remarks = _Remarks(page, numbers)
    if remarks.said:
        sections.append(remarks)
    page.height = 2 * MARGIN + sum(s.height for s in sections) + 0.3 * (len(sections) - 1)
    figure.set_size_inches(WIDTH, page.height)
    top = MARGIN
    for section in sections:
        section.draw(top)
        top += section.height + 0.3
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


class _Page:
    """A figure on which things are placed in inches from its top left corner."""

    def __init__(self, figure, canvas):
        self.figure, self.height = figure, 1.0
        self._renderer = canvas.get_renderer()

    def text(self, x: float, y: float, words: str, size: float = 10, **style) -> None:
        style = {"color": INK, "va": "top", "parse_math": False, **style}
        self.figure.text(x / WIDTH, 1 - y / self.height, words, fontsize=size, **style)

    def axes(self, x: float, y: float, width: float, height: float):
        return self.figure.add_axes(
            (x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height)
        )  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        from matplotlib.patches import Rectangle

        place = (x / WIDTH, 1 - (y + height) / self.height)
        self.figure.add_artist(
            Rectangle(place, width / WIDTH, height / self.height, color=colour, lw=0, transform=self.figure.transFigure)
        )

    def wide(self, words: str, size: float, weight: str = "normal") -> float:
        """Inches that a text takes."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        return self._renderer.get_text_width_height_descent(words, font, False)[0] / DPI

    def wrapped(self, words: str, size: float, width: float, weight: str = "normal") -> list[str]:
        """The text in lines of at most `width` inches."""
        lines, line = [], ""
        for word in words.split():
            longer = f"{line} {word}".strip()
            if line and self.wide(longer, size, weight) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        return [*lines, line]


class _Head:
    """What it is of, and the verdict."""

    SIZE = 15

    def __init__(self, page: _Page, numbers: dict):
        self.page = page
        self.lines = page.wrapped(numbers["verdict"], self.SIZE, INNER, "bold")
        run, first = numbers["run"] or {}, numbers["rows"][0]
        steps = f"{first['steps']} steps" if first["steps"] else None
        seed = None if numbers["seed"] is None else f"seed {numbers['seed']}"
        parts = (numbers["model"], run.get("sampler"), steps, run.get("site"), run.get("chose"), seed)
        self.about = page.wrapped("   ·   ".join(str(part) for part in parts if part), 9.5, INNER)
        self.height = 0.3 + 0.3 * len(self.lines) + 0.18 * len(self.about)

    def draw(self, top: float) -> None:
        self.page.text(MARGIN, top, "Speed & Quality Report", 10.5, color=QUIET, weight="bold")
        top += 0.3
        for line in self.lines:
            self.page.text(MARGIN, top, line, self.SIZE, weight="bold")
            top += 0.3
        for line in self.about:
            self.page.text(MARGIN, top, line, 9.5, color=QUIET)
            top += 0.18


class _Pictures:
    """Accelerated, plain, their difference; the floors smaller beside them, one above the other."""

    def __init__(self, page: _Page, numbers: dict, tiles: list[Tile]):
        import numpy as np

        self.page = page
        fast, plain = (np.nan_to_num(tile.picture) for tile in tiles[:2])
        difference = abs(plain - fast)
        times = _enlarged(float(np.quantile(difference, 0.995)))
        rows = {row["name"]: row for row in numbers["rows"]}
        one = rows["accelerated"]
        which = f"picture {one['picture_shown'] + 1} of {one['pictures']}, the farthest" if one["pictures"] > 1 else ""
        title = f"difference x {times}" if difference.any() else "no difference"
        self.main = [
            ("accelerated", fast, _nearness(one, one["picture_psnr_min_db"] if which else None)),
            ("plain", plain, which),
            (title, (difference * times).clip(0, 1), ""),
        ]
        self.floors = [(t.name, np.nan_to_num(t.picture), _nearness(rows[t.name])) for t in tiles[2:]]
        self.aspect = fast.shape[0] / fast.shape[1]
        self._arrange()

    def _arrange(self) -> None:
        """Sizes: side by side where the pictures are tall, the floors in a column of their own at half the height, or
        below the others where that would leave them too low."""
        count = 3 + len(self.floors)
        side_by_side = (INNER - (count - 1) * GAP) / count
        stacked = 2 * LINE + GAP  # what stands between two floors
        column = (INNER - 3 * GAP + stacked / 2 / self.aspect) / 3.5
        self.below = False
        if side_by_side * self.aspect >= TALLEST:
            self.wide, self.main, self.floors = TALLEST / self.aspect, [*self.main, *self.floors], []
        elif not self.floors or column * self.aspect < stacked + 2 * LOWEST:
            self.wide, self.below = (INNER - 2 * GAP) / 3, True
        else:
            self.wide = column
        self.wide = min(self.wide, TALLEST / self.aspect)
        self.tall = self.wide * self.aspect
        self.small = (self.wide, self.tall)
        if not self.below:
            self.small = ((self.tall - stacked) / 2 / self.aspect, (self.tall - stacked) / 2)
        self.height = self.tall + 2 * LINE
        if self.below and self.floors:
            self.height = 2 * self.height + GAP

    def draw(self, top: float) -> None:
        x = MARGIN
        for tile in self.main:
            self._tile(x, top, self.wide, self.tall, tile)
            x += self.wide + GAP
        if self.below:
            x, top = MARGIN, top + self.tall + 2 * LINE + GAP
        for tile in self.floors:
            self._tile(x, top, *self.small, tile)
            if self.below:
                x += self.wide + GAP
            else:
                top += self.small[1] + 2 * LINE + GAP

    def _tile(self, x: float, top: float, width: float, height: float, tile: tuple) -> None:
        name, picture, words = tile
        room = width if width >= self.wide else WIDTH - MARGIN - x
        self.page.text(x, top, name, self._fitting(name, 10.5, room, "bold"), weight="bold")
        axes = self.page.axes(x, top + LINE, width, height)
        coarse = picture.shape[1] < width * DPI
        axes.imshow(picture, interpolation="nearest" if coarse else "antialiased", aspect="auto", vmin=0, vmax=1)
        axes.set_xticks([]), axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(RULE)
        self.page.text(x, top + LINE + height + 0.05, words, self._fitting(words, 9.5, room), color=QUIET)

    def _fitting(self, words: str, size: float, room: float, weight: str = "normal") -> float:
        """The size at which the words fit."""
        return size * min(1.0, 0.98 * room / max(self.page.wide(words, size, weight), 1e-3))


def _enlarged(largest: float) -> int:
    if largest <= 0:
        return 1
    return 2 ** max(0, min(int(math.log2(MOST_ENLARGED)), math.floor(math.log2(0.8 / largest))))


def _nearness(row: dict, db: float | None = None) -> str:
    """PSNR and SSIM in words."""
    db = row["picture_psnr_db"] if db is None else db
    if math.isinf(db) and db > 0:
        return "identical"
    return "" if math.isnan(db) else f"{db:.1f} dB, SSIM {row['picture_ssim']:.3f}"


class _Run:
    """One cell per evaluation in the colour of what became of it, and the drift above."""

    def __init__(self, page: _Page, run: dict):
        self.page, self.run = page, run
        self.drifts = [(e["index"], 100 * e["drift"]) for e in run["trace"] if e["drift"] is not None]
        self.curve = 1.1 if self.drifts else 0.0
        self.height = 0.3 + self.curve + 0.28 + 0.24

    def draw(self, top: float) -> None:
        self._legend(top)
        top += 0.3
        trace, left = self.run["trace"], MARGIN + (0.45 if self.drifts else 0)
        width = WIDTH - MARGIN - left
        ends = (-0.5, len(trace) - 0.5)
        if self.drifts:
            axes = self.page.axes(left, top, width, self.curve)
            axes.plot(*zip(*self.drifts, strict=True), color="#444444", lw=1.2, marker="o", ms=3.5, clip_on=False)
            axes.set_xlim(*ends)
            axes.set_ylim(0, max(1e-3, 1.1 * max((d for _, d in self.drifts if math.isfinite(d)), default=0.0)))
            axes.set_ylabel("drift, %", fontsize=9, color=QUIET)
            axes.tick_params(labelsize=8, colors=QUIET, labelbottom=False, length=0)
            axes.locator_params(axis="y", nbins=4)
            axes.set_xticks([])
            axes.grid(axis="y", color=RULE, lw=0.6)
            for side in ("top", "right", "left", "bottom"):
                axes.spines[side].set_visible(False)
        strip = self.page.axes(left, top + self.curve, width, 0.28)
        for e in trace:
            colour, line = COLOURS.get(_mark(e), OTHER), min(1.0, 60 / len(trace))
            strip.axvspan(e["index"] - 0.5, e["index"] + 0.5, fc=colour, ec="white", lw=line)
        strip.set_xlim(*ends)
        strip.set_yticks([])
        strip.xaxis.get_major_locator().set_params(integer=True)
        strip.tick_params(labelsize=8, colors=QUIET, length=0)
        for spine in strip.spines.values():
            spine.set_visible(False)

    def _legend(self, top: float) -> None:
        self.page.text(MARGIN, top, "Evaluations", 10.5, weight="bold")
        x = MARGIN + self.page.wide("Evaluations", 10.5, "bold") + 0.3
        for mark, count in marks(self.run).items():
            words = f"{count} {mark}"
            self.page.box(x, top + 0.02, 0.14, 0.14, COLOURS.get(mark, OTHER))
            self.page.text(x + 0.2, top, words, 9.5)
            x += 0.2 + self.page.wide(words, 9.5) + 0.28
        run = self.run
        if run["drift_mean"] is not None:
            words = f"the filled ones off by {100 * run['drift_mean']:.1f} %, at most {100 * run['drift_max']:.1f} %"
            if x + self.page.wide(words, 9.5) < WIDTH - MARGIN:
                self.page.text(WIDTH - MARGIN, top, words, 9.5, color=QUIET, ha="right")


class _Table:
    """A line per result."""

    TALL = 0.27

    def __init__(self, page: _Page, rows: list[dict]):
        self.page, self.rows = page, rows
        plain = rows[1]["seconds"] and rows[1]["seconds"] - rows[1]["seconds_only_once"]
        columns = [
            ("steps", lambda r: r["steps"], "{}"),
            ("evaluations", lambda r: r["evaluations"], "{:.4g}"),
            ("seconds", lambda r: r["seconds"], "{:.2f}"),
            ("times as fast", lambda r: plain and r["seconds"] and _faster(plain, r), "{:.2f}"),
            ("latent PSNR, dB", lambda r: r["latent_psnr_db"], "{:.1f}"),
            ("picture PSNR, dB", lambda r: r.get("picture_psnr_db"), "{:.1f}"),
            ("SSIM", lambda r: r.get("picture_ssim"), "{:.4f}"),
            ("peak memory, MB", lambda r: r["peak_memory_bytes"] and r["peak_memory_bytes"] / 1e6, "{:.0f}"),
        ]
        cells = [(name, [_cell(read(row), form) for row in rows]) for name, read, form in columns]
        self.columns = [(name, column) for name, column in cells if any(column)]
        self.first = 0.3 + max(page.wide(row["name"], 10.5, "bold") for row in rows)
        needed = [
            max(page.wide(name, 9), *(page.wide(cell, 10.5, "bold") for cell in column))
            for name, column in self.columns
        ]
        # what the columns leave of the width is shared out evenly, but a short table is not pulled apart
        spare = (INNER - self.first - sum(needed)) / max(1, len(needed))
        self.widths = [width + max(0.1, min(spare, 0.6)) for width in needed]
        self.height = 0.3 + self.TALL * len(rows)

    def draw(self, top: float) -> None:
        page, right = self.page, MARGIN + self.first
        edges = [right := right + width for width in self.widths]
        for edge, (name, _) in zip(edges, self.columns, strict=True):
            page.text(edge, top + 0.16, name, 9, color=QUIET, ha="right", va="baseline")
        for k, row in enumerate(self.rows):
            y = top + 0.27 + k * self.TALL
            page.box(MARGIN, y, right - MARGIN, 0.008, RULE)
            style = {"weight": "bold" if k == 0 else "normal", "va": "baseline"}
            page.text(MARGIN, y + 0.19, row["name"], 10.5, **style)
            for edge, (_, cells) in zip(edges, self.columns, strict=True):
                page.text(edge, y + 0.19, cells[k] or "-", 10.5, ha="right", **style)


def _faster(plain: float, row: dict) -> float | None:
    steady = row["seconds"] - row["seconds_only_once"]
    return plain / steady if steady > 0 else None


def _cell(value, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "identical" if value > 0 else ""
    return form.format(value)


class _Remarks:
    """What one should know about the numbers."""

    def __init__(self, page: _Page, numbers: dict):
        size, said = numbers["weights_bytes"], []
        if size:
            said.append(f"weights {size['accelerated'] / 1e6:.1f} MB, plain {size['plain'] / 1e6:.1f} MB")
        of = next((row["peak_memory_of"] for row in numbers["rows"] if row["peak_memory_of"]), None)
        if of:
            said.append(f"peak memory: {of}")
        said += numbers["remarks"]
        self.page, self.said = page, said
        self.lines = page.wrapped("   ·   ".join(said), 9, INNER)
        self.height = 0.18 * len(self.lines)

    def draw(self, top: float) -> None:
        for i, line in enumerate(self.lines):
            self.page.text(MARGIN, top + 0.18 * i, line, 9, color=QUIET)
