"""The promises about the house: rooms that hang on each other one way, few files in the halls, files that fit a screen
or two, and one register of what our nodes put on a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest
from hazards.rows import NODES
from slipstream.host import parts
from slipstream.host.parts import PARTS
from unit.test_structure import schemas

from lab.rooms import ROOT, arrows, modules, of_rooms

# Files directly in a folder, and lines of one file; tables of data may be longer.
HALLS = {"host": 12, "engine": 8}
LONGEST = 400
TABLES = {"engine/families.py", "quant/policy.py"}

# Rooms of the engine, each of which may know those behind it and what lies in the engine's own folder.
ENGINE = ("run", "correction", "calibration", "sites", "forecast")


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_file_and_no_room_imports_in_a_circle():
    graph = arrows(ROOT)
    assert sum(map(len, graph.values())) > 300  # else nothing was read
    assert not circle(graph) and not circle(of_rooms(graph))


@pytest.mark.parametrize(
    "planted",
    [
        {"host/report/a.py": "from ..switch import b", "host/switch/b.py": "def f():\n    from ..report.a import x"},
        {"engine/run/a.py": "from . import b", "engine/run/b.py": "from .a import x"},
        # two rooms, four files, no circle of files
        {
            "engine/run/a.py": "from ..sites.b import x", "engine/sites/b.py": "",
            "engine/sites/c.py": "from ..run.d import x", "engine/run/d.py": "",
        },
    ],
)  # fmt: skip
def test_a_planted_circle_is_seen(tmp_path, planted):
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = arrows(tmp_path)
    assert circle(graph) or circle(of_rooms(graph))


def test_the_rooms_of_the_engine_know_only_those_behind_them():
    rooms = of_rooms(arrows())
    for i, name in enumerate(ENGINE):
        assert not rooms[f"engine.{name}"] & {f"engine.{before}" for before in ENGINE[:i]}


def test_halls_are_small_and_files_are_short():
    for layer, most in HALLS.items():
        assert len(list((ROOT / layer).glob("*.py"))) <= most
    lines = {name: len((path).read_text(encoding="utf-8").splitlines()) for name, path in modules(ROOT).items()}
    tables = {name.removesuffix(".py").replace("/", ".") for name in TABLES}
    assert tables <= set(lines)
    assert not {name: count for name, count in lines.items() if count > LONGEST and name not in tables}


def test_every_part_is_of_a_node_with_inputs_under_contract_and_rows_of_hazards():
    contract = json.loads((ROOT / "tests" / "unit" / "contract.json").read_text())
    assert {part.node for part in PARTS} <= set(contract) == set(schemas())


# Who puts what on a patcher. What stands here beside the register is taken off by an attachment's own `take_off`, or
# is nothing without a run: patched forwards, callbacks that look for what is attached, the report's watch on a clone.
PUTTERS = {
    "set_attachments(": {"parts.py"},
    "add_wrapper_with_key(": {"parts.py", "attach.py", "report/runs.py"},
    "add_object_patch(": {"model.py", "quantise/placed.py"},
    "add_callback_with_key(": {"model.py", "quantise/placed.py", "quantise/quantise.py", "quantise/load.py"},
    "set_model_": set(),
}


@pytest.mark.parametrize("call", PUTTERS)
def test_only_the_register_and_who_is_named_here_puts_something_on_a_model(call):
    host = ROOT / "host"
    found = {str(p.relative_to(host)) for p in host.rglob("*.py") if call in p.read_text(encoding="utf-8")}
    assert found == PUTTERS[call]


def test_the_hazards_have_a_column_for_every_node_that_puts_a_part_on():
    columns = " ".join(NODES.values())
    names = {node.GET_SCHEMA().node_id: node.GET_SCHEMA().display_name.split(" (")[0] for node in listed()}
    assert not {names[part.node] for part in PARTS if names[part.node] not in columns}


def test_parts_of_one_key_are_sampled_at_one_place():
    orders = {(part.key, part.order) for part in PARTS}
    assert len(orders) == len({key for key, _ in orders})


def listed() -> list:
    import asyncio

    from slipstream.nodes import SlipstreamExtension

    return asyncio.run(SlipstreamExtension().get_node_list())


def test_the_order_of_sampling_is_the_registers_whatever_was_wired_first():
    class Patcher:
        """What of a ModelPatcher the register uses."""

        def __init__(self):
            self.wrappers, self.attachments = {}, {}

        def set_attachments(self, key, value):
            self.attachments[key] = value

        def get_attachment(self, key):
            return self.attachments.get(key)

        def remove_attachments(self, key):
            self.attachments.pop(key, None)

        def remove_wrappers_with_key(self, kind, key):
            self.wrappers.get(kind, {}).pop(key, None)

        def add_wrapper_with_key(self, kind, key, wrapper):
            self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    keys = [parts.RUN, parts.QUANTISED, parts.SWITCH, parts.KERNELS]
    orders = []
    for wired in (keys, keys[::-1], [keys[2], keys[0], keys[3], keys[1]]):
        patcher = Patcher()
        patcher.add_wrapper_with_key("outer_sample", "another pack", len)
        for key in wired:
            parts.put_on(patcher, key, object(), print)
        found = list(patcher.wrappers["outer_sample"])
        assert found[:2] == [parts.SWITCH, parts.QUANTISED]
        orders.append(found)
        parts.take_off(patcher)
        assert list(patcher.wrappers["outer_sample"]) == ["another pack"] and not patcher.attachments
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
