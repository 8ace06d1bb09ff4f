"""The rooms of the shipped code and the arrows between them, read from its imports; a picture of them for the docs.

    python -m lab.rooms docs/rooms.png

A room is a folder in `engine` or `host`, or a file that lies directly in one of them; `nodes`, `quant` and `kernels`
are one room each.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("nodes", "host", "engine", "quant", "kernels")
HALLS = ("host", "engine")
ARROW = {"arrowstyle": "->", "color": "#8899a6", "lw": 0.9, "shrinkA": 11, "shrinkB": 11}
COLOURS = {"nodes": "#E8E0F0", "host": "#D9E8F6", "engine": "#DDEFE0", "quant": "#FBE9D0", "kernels": "#F3D9D9"}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every shipped module."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for layer in LAYERS
        for path in sorted((root / layer).rglob("*.py"))
    }


def arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the pack's own modules that it imports, at the top or in a function."""
    known, found = modules(root), {}
    for name, path in known.items():
        package, wanted = path.relative_to(root).parent.parts, set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join(filter(None, [*package[: len(package) - node.level + 1], node.module or ""]))
                # `from . import x` and `from .room import x` may mean a module x
                wanted |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        found[name] = wanted & set(known) - {name}
    return found


def room(module: str) -> str:
    """The room of a module."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in HALLS else parts[0]


def is_folder(room: str) -> bool:
    """Whether a room is more than one file."""
    return (ROOT / room.replace(".", "/")).is_dir()


def of_rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Room -> the rooms that its modules import."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, targets in graph.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    return dict(rooms)


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way already tells."""

    def reached(start: str) -> set[str]:
        return graph[start].union(*(reached(t) for t in graph[start]))

    return {a: {b for b in targets if not any(b in reached(t) for t in targets - {b})} for a, targets in graph.items()}


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How many rooms the longest way down from a room has."""
    found: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[t] for t in graph.get(name, ())), default=-1)
    return found


def draw(path: Path) -> None:
    """Write the picture as PNG. Tools, single files that lean on no room, stand below without their arrows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    graph = of_rooms({a: targets for a, targets in arrows().items() if not a.endswith("__init__")})
    graph = {a: {t for t in targets if not t.endswith("__init__")} for a, targets in graph.items()}
    tools = sorted(name for name in graph if not is_folder(name) and not any(map(is_folder, graph[name])))
    graph = {a: targets - set(tools) for a, targets in graph.items() if a not in tools}
    # a layer stands above the whole of the next
    below = {layer: [n for n in graph if LAYERS.index(n.split(".")[0]) > i] for i, layer in enumerate(LAYERS)}
    height = floors({a: targets | set(below[a.split(".")[0]]) for a, targets in graph.items()})
    rows: dict[int, list[str]] = defaultdict(list)
    for name, floor in height.items():
        rows[floor].append(name)
    place = {}
    for floor in sorted(rows):
        # each room above the middle of what it leans on, as far as its neighbours let it
        leans = {n: [place[t][0] for t in graph[n]] for n in rows[floor]}
        names = sorted(rows[floor], key=lambda n: (sum(leans[n]) / len(leans[n]) if leans[n] else 0.5, n))
        for i, name in enumerate(names):
            # one above another stand a little apart, so that no arrow runs behind a room that it does not lead to
            place[name] = ((i + 0.5) / len(names) + (0.07 if floor % 2 else -0.07) / len(names), floor)
    for i, name in enumerate(tools):
        place[name] = ((i % 5 + 0.5) / 5, -1 - 0.6 * (i // 5))
    top, bottom = max(rows) + 0.5, min(y for _, y in place.values()) - 0.5
    figure = Figure(figsize=(10, 0.7 * (top - bottom)), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom, top)
    axes.axis("off")
    for a, targets in reduced(graph).items():
        for b in sorted(targets):
            bent = 0.0 if place[a][1] - place[b][1] == 1 else -0.25 if place[b][0] > 0.5 else 0.25
            axes.annotate("", place[b], place[a], arrowprops={**ARROW, "connectionstyle": f"arc3,rad={bent}"})
    for name, (x, y) in place.items():
        folder = is_folder(name)
        text = name.replace(".", "/") + ("/" if folder else ".py")
        fill = COLOURS[name.split(".")[0]]
        box = {"boxstyle": "round,pad=0.35", "fc": fill, "ec": "#55606a", "lw": 1.4 if folder else 0.5}
        axes.text(x, y, text, ha="center", va="center", fontsize=9 if folder else 8, bbox=box)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
