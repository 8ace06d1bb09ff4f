"""Ready for the registry: what would be published is complete and small, loads alone, and says what it is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from urllib.parse import urlsplit

import pytest
from shipped import ROOT, shipped

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = SETTINGS["project"], SETTINGS["tool"]["comfy"]

# Folders that a published pack needs, and what is for its developers alone.
NEEDED = ("engine", "host", "kernels", "locales", "nodes", "quant", "web", "workflows")
OURS = ("tests", "bench", "demo", "lab", "docs", ".ci", ".dev", "dev.py")

LARGEST = 10 << 20


def test_what_is_shipped_is_the_pack_and_nothing_of_the_workshop():
    files = shipped()
    sizes = Counter()
    for name in files:
        sizes[name.split("/")[0]] += (ROOT / name).stat().st_size
    print(*(f"{size:>10,} {name}" for name, size in sizes.most_common()), f"{sizes.total():>10,} in all", sep="\n")
    assert set(NEEDED) <= set(sizes) and not set(OURS) & set(sizes)
    assert {"__init__.py", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "requirements.txt"} <= set(files)
    assert sizes.total() < LARGEST
    everything = {
        p.relative_to(ROOT).as_posix() for folder in NEEDED for p in (ROOT / folder).rglob("*") if p.is_file()
    }
    left_out = {name for name in everything - set(files) if "__pycache__" not in name}
    assert all(re.fullmatch(r"workflows/slipstream_\w*demo\.\w+", name) for name in left_out), left_out


def test_only_kinds_of_files_that_can_be_read_are_shipped():
    """A scanner flags what it cannot look into; pictures belong to the templates and the pages."""
    kinds = {".py", ".js", ".json", ".md", ".jpg", ".png", ".webp", ".svg", ".txt", ".toml", ""}
    assert {os.path.splitext(name)[1] for name in shipped()} <= kinds
    for name in shipped():
        if not name.endswith((".jpg", ".png", ".webp")):
            assert "\0" not in (ROOT / name).read_text(encoding="utf-8"), name
        assert not os.path.islink(ROOT / name) and not os.access(ROOT / name, os.X_OK), name


def test_shipped_templates_use_no_node_of_the_demo():
    demo = set(re.findall(r'node_id="(\w+)"', (ROOT / "demo" / "nodes.py").read_text(encoding="utf-8")))
    assert demo
    for name in shipped():
        if name.startswith("workflows/") and name.endswith(".json"):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not [node for node in demo if f'"{node}"' in text], name


def test_the_metadata_is_what_the_registry_asks_for():
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", PROJECT["name"]) and "comfyui" not in PROJECT["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"]) and 20 < len(PROJECT["description"]) < 200
    assert set(PROJECT["license"]) == {"file"} and (ROOT / PROJECT["license"]["file"]).is_file()
    assert re.fullmatch(r">=\d\.\d+", PROJECT["requires-python"])
    assert re.fullmatch(r"[a-z0-9-]+", COMFY["PublisherId"]) and COMFY["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])
    for folder in COMFY.get("includes", []):
        assert (ROOT / folder).is_dir()
    # the host serves WEB_DIRECTORY; a second entry makes it load every script twice
    assert "web" not in COMFY and 'WEB_DIRECTORY = "./web"' in (ROOT / "__init__.py").read_text(encoding="utf-8")


def test_addresses_are_of_one_public_repository():
    """Where they are filled in: the icon's picture is a file that is shipped."""
    urls = [
        urlsplit(url) for url in (*PROJECT.get("urls", {}).values(), *filter(None, map(COMFY.get, ("Icon", "Banner"))))
    ]
    assert all(url.scheme == "https" and "OWNER" not in url.path for url in urls)
    assert len({tuple(url.path.split("/")[1:3]) for url in urls}) <= 1
    if "Icon" in COMFY:
        assert COMFY["Icon"].endswith("/web/icon.svg")


def test_the_icon_is_a_small_square_picture_without_script():
    icon = ROOT / "web" / "icon.svg"
    assert icon.stat().st_size <= 20_000 and "web/icon.svg" in shipped()
    root = ElementTree.fromstring(icon.read_text(encoding="utf-8"))
    assert (root.get("width"), root.get("height"), root.get("viewBox")) == ("400", "400", "0 0 400 400")
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "path", "rect"}
    assert not [
        key for element in root.iter() for key in dict(element.items()) if "href" in key or key.startswith("on")
    ]


def test_the_version_is_the_newest_one_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest.group(1) == PROJECT["version"]


def named(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")


def test_no_requirement_pulls_torch():
    """Of what is asked for and of all that those packages ask for in turn."""
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert lines == PROJECT["dependencies"]
    seen: set[str] = set()
    waiting = [named(line) for line in lines]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        waiting += [named(line) for line in asked if "extra ==" not in line]
    assert "matplotlib" in seen and len(seen) > 3
    assert not [name for name in seen if re.match(r"torch|triton|nvidia|cuda|diffusers|transformers|accelerate", name)]


ALONE = r"""
import json, os, sys, types
root, folder = sys.argv[1:3]
sys.path.insert(0, root)
from lab.boot import register_torchvision_schemas
sys.path.remove(root)
register_torchvision_schemas()
host = os.environ["COMFYUI_PATH"]
sys.path.insert(0, host)
os.chdir(host)
import comfy.options
parts, sys.argv = sys.argv[3:], ["main.py", "--cpu"]
comfy.options.enable_args_parsing()
import comfy.cli_args, asyncio, torch, aiohttp.web, nodes
for module in [m for m in sys.modules if m.startswith(("bench", "lab"))]:
    del sys.modules[module]

# What may not happen while a pack is loaded. Reading is allowed, and so is Python's own cache of compiled files.
SPEAKING = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request",
            "http.client.connect")
STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "pty.spawn",
            "os.putenv")
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate",
            "shutil.rmtree", "shutil.move", "shutil.copyfile")
seen, on = [], False

def audit(event, arguments):
    if not on:
        return
    wrong = event in SPEAKING + STARTING + CHANGING
    if event == "open":
        name, mode, flags = arguments
        wrong = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
        event = f"open {name}"
    if wrong and "__pycache__" not in str(arguments):
        seen.append(event)
        raise PermissionError(f"blocked while a pack is loaded: {event}")

sys.addaudithook(audit)
before = set(nodes.NODE_CLASS_MAPPINGS)
environment = dict(os.environ)
sys.dont_write_bytecode = True
on = True
loaded = asyncio.run(nodes.load_custom_node(folder))
on = False
own = sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)
outside = sorted(
    name for name, module in sys.modules.items()
    if (getattr(module, "__file__", None) or "").startswith(tuple(os.path.join(root, part, "") for part in parts))
)
print("RESULT", json.dumps({"loaded": loaded, "own": own, "seen": seen, "outside": outside,
      "environment": environment == dict(os.environ), "web": sorted(nodes.EXTENSION_WEB_DIRS)}))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What happens when the host's own loader loads the shipped files, in a process of its own that may only read."""
    folder = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-Slipstream"
    for name in shipped():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    command = [sys.executable, "-c", ALONE, str(ROOT), str(folder), *NEEDED, *OURS[:4]]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[-1].removeprefix("RESULT "))
    found["new"] = sorted({p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(shipped()))
    found["log"] = done.stderr
    return found


def test_the_shipped_files_load_alone_in_the_host(alone):
    """Every node is there, and nothing comes from the checkout."""
    contract = json.loads((ROOT / "tests" / "unit" / "contract.json").read_text(encoding="utf-8"))
    assert alone["loaded"] and alone["own"] == sorted(contract)
    assert not alone["outside"]
    assert any("lipstream" in name for name in alone["web"])


def test_loading_the_pack_speaks_to_nobody_starts_nothing_and_writes_nothing(alone):
    assert not alone["seen"], alone["seen"]
    assert alone["environment"] and not alone["new"]
    assert "Traceback" not in alone["log"]
