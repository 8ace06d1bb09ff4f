"""The promises about the code itself: layers, forbidden calls, and what saved workflows rely on."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shipped import ROOT, tree

LAYERS = {
    "kernels": set(),
    "engine": {"kernels"},
    "quant": {"kernels"},
    "host": {"engine", "quant", "kernels"},
    "nodes": {"host", "engine"},
}
HOST_ALLOWED = {"host", "nodes"}
HOST_MODULES = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes")
BANNED_CALLS = {"eval", "exec", "system", "Popen", "print"}
BANNED_IMPORTS = {"subprocess", "requests", "urllib", "pickle", "socket"}
SHIPPED = [p for folder in LAYERS for p in sorted((ROOT / folder).rglob("*.py"))] + [ROOT / "__init__.py"]


def imports(path: Path, root: Path = ROOT):
    """(dotted name, whether it is the pack's own) of every import of a file; relative ones as seen from the root."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, False
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [""] if node.module else [alias.name for alias in node.names]
            yield from ((".".join(filter(None, [*base, name])), True) for name in names)


def against_the_order(path: Path, root: Path = ROOT) -> list[str]:
    """The imports of a shipped file that point to a higher layer, or to the host from where it must not be known."""
    layer = path.relative_to(root).parts[0]
    found = []
    for name, own in imports(path, root):
        top = name.split(".")[0]
        wrong = top not in {layer, *LAYERS[layer]} if own else top in HOST_MODULES and layer not in HOST_ALLOWED
        if wrong or name.startswith("comfy.ldm"):
            found.append(f"{path.relative_to(root)} imports {name}")
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    assert not [fault for path in (ROOT / layer).rglob("*.py") for fault in against_the_order(path)]


def test_an_import_against_the_order_is_seen_in_every_room(tmp_path):
    planted = {
        "engine/forecast/a.py": "from ...host.run import Run",
        "engine/b.py": "from ..host import run",
        "kernels/deep/er/c.py": "def f():\n    from ....engine import history",
        "quant/d.py": "import comfy.utils",
        "quant/e/f.py": "from folder_paths import x",
        "host/canvas/g.py": "from ...nodes.report import Report",
        "host/h.py": "import comfy.ldm.flux",
    }
    fine = {
        "host/canvas/strip.py": "from ..run import Run\nfrom ...engine.a import b\nfrom . import events\nimport comfy",
        "engine/forecast/i.py": "from ..files import x\nfrom .history import y\nimport torch",
    }
    for name, text in {**planted, **fine}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert all(len(against_the_order(tmp_path / name, tmp_path)) == 1 for name in planted)
    assert not [fault for name in fine for fault in against_the_order(tmp_path / name, tmp_path)]


def against_the_registry(path: Path, root: Path = ROOT) -> list[str]:
    """What a shipped file calls, imports or names that the registry does not take."""
    name = path.relative_to(root).as_posix()
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    called = [(getattr(node.func, "id", getattr(node.func, "attr", "")), node.lineno) for node in calls]
    found = [f"{name}:{line} calls {what}" for what, line in called if what in BANNED_CALLS]
    # host/remote/http.py is the one file that speaks to another server
    banned = BANNED_IMPORTS - ({"urllib"} if path.name == "http.py" else set())
    found += [f"{name} imports {what}" for what, own in imports(path, root) if not own and what.split(".")[0] in banned]
    text = re.search(r"torch\.load\(|/(?:home|root|tmp|usr)/", path.read_text(encoding="utf-8"))
    return found + ([f"{name} has {text[0]}"] if text else [])


def test_the_registry_rules_hold():
    assert len(SHIPPED) > 50 and not [fault for path in SHIPPED for fault in against_the_registry(path)]


def test_what_the_registry_does_not_take_is_seen(tmp_path):
    planted = [
        "eval('1')", "import os\nos.system('x')", "def f():\n    print(1)", "import subprocess", "import requests.api",
        "from urllib.request import urlopen", "import torch\ntorch.load('x')", "# as in /home/me",
    ]  # fmt: skip
    for i, text in enumerate(planted):
        (tmp_path / f"{i}.py").write_text(text + "\n")
        assert len(against_the_registry(tmp_path / f"{i}.py", tmp_path)) == 1, text
    (tmp_path / "http.py").write_text("from urllib.request import urlopen\nfrom .subprocess import x\n")
    assert not against_the_registry(tmp_path / "http.py", tmp_path)


def test_the_requirements_pull_no_torch():
    lines = (ROOT / "requirements.txt").read_text().lower().split()
    assert lines and not any(line.startswith(("torch", "triton", "diffusers")) for line in lines)


def schemas() -> dict:
    from slipstream.nodes import SlipstreamExtension

    found = {}
    for node in asyncio.run(SlipstreamExtension().get_node_list()):
        schema = node.GET_SCHEMA()
        found[schema.node_id] = [i.id for i in schema.inputs]
    return found


def test_h67_ids_stay_and_inputs_are_only_appended():
    """Workflow files store values by position. Append to this file's lists; never change what stands there."""
    contract = json.loads((ROOT / "tests" / "unit" / "contract.json").read_text())
    current = schemas()
    for node_id, inputs in contract.items():
        assert current[node_id][: len(inputs)] == inputs
    assert set(current) == set(contract)


def test_every_node_has_a_help_page_and_chinese_texts():
    texts = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for node_id, inputs in schemas().items():
        assert (ROOT / "web" / "docs" / f"{node_id}.md").is_file()
        assert set(texts[node_id]["inputs"]) == set(inputs)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in {blocked}:
            raise ModuleNotFoundError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {root!r})
from lab.boot import boot
boot()
import importlib, torch
assert not torch.cuda.is_available()
for name in {names}:
    importlib.import_module('slipstream.nodes.' + name)
    for loaded in [m for m in sys.modules if m.startswith('slipstream.')]:
        del sys.modules[loaded]
"""


def test_h60_each_node_file_imports_alone_without_optional_packages():
    blocked = ["triton", "diffusers", "matplotlib", "comfy_kitchen_absent"]
    names = [p.stem for p in (ROOT / "nodes").glob("*.py") if p.stem != "__init__"]
    code = BLOCK.format(blocked=set(blocked), root=str(ROOT), names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
