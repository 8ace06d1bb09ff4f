"""Every file of `workflows/` is an honest template: known nodes, values the host takes, nothing missing but files."""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import execution
import folder_paths
import pytest
import slipstream
from slipstream.demo import nodes as demo_nodes
from slipstream.demo.templates import templates

import nodes
from lab import workflow

FOLDER = Path(templates.FOLDER)
FILES = sorted(FOLDER.glob("*.json"))
SHIPPED = [path for path in FILES if not path.stem.endswith("demo")]
# The host's nodes outside its `nodes.py` that the templates use.
CORE = ("custom_sampler", "differential_diffusion", "flux", "hunyuan", "images", "model_advanced", "sd3")
CANVAS = ("MarkdownNote",)
named = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    """The inputs of the host's nodes and ours, as /object_info has them; the registry knows them meanwhile."""
    known = dict(nodes.NODE_CLASS_MAPPINGS)

    async def register():
        extras = Path(nodes.__file__).parent / "comfy_extras"
        for name in CORE:
            assert await nodes.load_custom_node(str(extras / f"nodes_{name}.py"), module_parent="comfy_extras")
        for extension in (await slipstream.comfy_entrypoint(), demo_nodes.DemoExtension()):
            for kind in await extension.get_node_list():
                nodes.NODE_CLASS_MAPPINGS[kind.define_schema().node_id] = kind

    with pytest.MonkeyPatch.context() as patch:
        # One of the modules imports the server for what it does while it runs.
        patch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=None))
        asyncio.run(register())
    pictures = tmp_path_factory.mktemp("input")
    (pictures / "example.png").touch()  # the host brings one of this name
    before = folder_paths.get_input_directory()
    folder_paths.set_input_directory(str(pictures))
    yield {name: {"input": kind.INPUT_TYPES()} for name, kind in nodes.NODE_CLASS_MAPPINGS.items()}
    folder_paths.set_input_directory(before)
    nodes.NODE_CLASS_MAPPINGS.clear()
    nodes.NODE_CLASS_MAPPINGS.update(known)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def refused(prompt: dict) -> set[tuple[str, str, str]]:
    """(node, kind of error, value) of all that the host objects to."""
    _, general, _, errors = asyncio.run(execution.validate_prompt("templates", prompt, None))
    found = {
        (node, error["type"], str(error["extra_info"].get("received_value")))
        for node, of_node in errors.items()
        for error in of_node["errors"]
    }
    return found if found or general is None else {("", general["type"], general["message"])}


def wanted(graph: dict) -> set[tuple[str, str, str]]:
    """The refusals that the absent model files of a template bring."""
    return {
        (str(node["id"]), "value_not_in_list", file["name"])
        for node in graph["nodes"]
        for file in node["properties"].get("models", ())
    }


@named
def test_only_a_model_file_is_missing(path, info):
    """The real validation refuses nothing but the files that the template names, and the demo's nothing at all."""
    graph = read(path)
    assert refused(workflow.load(path, info)) == wanted(graph)
    assert bool(wanted(graph)) == (path in SHIPPED)


@named
def test_values_are_those_of_the_widgets(path, info):
    """Every widget that must have a value has one, in its place, and none is left over: files hold them by position."""
    for node in read(path)["nodes"]:
        if node["type"] in CANVAS:
            continue
        inputs = info[node["type"]]["input"]
        specs = [(group, spec) for group in ("required", "optional") for spec in inputs.get(group, {}).values()]
        options = [(group, spec[1] if len(spec) > 1 else {}) for group, spec in specs if _is_widget(spec)]
        of_canvas = sum(bool(o.get("control_after_generate")) + bool(o.get("image_upload")) for _, o in options)
        least = sum(group == "required" for group, _ in options)
        values = node["widgets_values"]
        assert least + of_canvas <= len(values) <= len(options) + of_canvas, node["type"]
        names = list(workflow.widgets(node, info[node["type"]]))
        assert len(names) == len(values) - of_canvas
        sockets = [name for group in ("required", "optional") for name, s in inputs.get(group, {}).items()]
        assert [i["name"] for i in node["inputs"] if i["name"] not in sockets] == []


def _is_widget(spec) -> bool:
    return isinstance(spec[0], list) or spec[0] in workflow.WIDGET_TYPES


def test_pictures_and_names():
    """At least ten for an artist's own models, each with its own id, a picture beside it and a note on it."""
    assert len(SHIPPED) >= 10
    assert len({read(path)["id"] for path in FILES}) == len(FILES)
    for path in FILES:
        picture = path.with_suffix(".jpg").read_bytes()
        assert picture[:3] == b"\xff\xd8\xff" and len(picture) <= 60_000, path.stem
    for path in SHIPPED:
        graph = read(path)
        note = next(node["widgets_values"][0] for node in graph["nodes"] if node["type"] in CANVAS)
        assert all(name in note for _, _, name in wanted(graph))
        types = {node["type"] for node in graph["nodes"]}
        assert any(kind.startswith("Slipstream") for kind in types)
        assert not any(kind.startswith("SlipstreamDemo") for kind in types), "the demo's nodes are not shipped"


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_nothing_covers_anything(path):
    """Nodes stand apart, with all their widgets open, and inside their groups."""
    graph = read(path)
    boxes = {}
    for node in graph["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        folded = templates.folded_pixels(node["type"])
        boxes[node["id"]] = (x, y - 30, x + width, y + height + folded)
    for (a, one), (b, two) in combinations(boxes.items(), 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        assert apart, f"nodes {a} and {b}"
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in graph["groups"])]
    for number, box in boxes.items():
        inside = [g for g in groups if g[0] <= box[0] and g[1] <= box[1] and g[2] >= box[2] and g[3] >= box[3]]
        assert len(inside) == 1, f"node {number}"


def test_files_are_those_of_the_generator():
    """`python -m demo.templates.templates` has nothing to change."""
    for make in templates.TEMPLATES:
        assert read(FOLDER / f"slipstream_{make.__name__}.json") == make()
    assert len(templates.TEMPLATES) == len(SHIPPED)
