"""Any part of the suite runs alone and in any order: no file hides a module of the host or makes a second copy of ours.

Every test file of this run has been imported when these look, so what one of them did to the paths shows here.
"""

from __future__ import annotations

import os
import sys
import types
from importlib.machinery import PathFinder
from pathlib import Path

from shipped import ROOT

HOST = Path(os.environ["COMFYUI_PATH"]).resolve()


def hidden(path: list[str]) -> list[str]:
    """Modules of the host that `import` finds elsewhere on this path. Our folder `nodes` has the name of one."""
    names = [entry.stem for entry in HOST.glob("*.py")]
    found = {name: PathFinder.find_spec(name, path) for name in names}
    return [name for name, spec in found.items() if Path(spec.origin or "").resolve() != HOST / f"{name}.py"]


def twice(modules: dict[str, types.ModuleType]) -> set[str]:
    """Files of this checkout that are loaded as two modules.

    pytest itself runs the root's `__init__.py` once more, and a test file that another one takes a helper from.
    """
    copies: dict[str, set[int]] = {}
    for module in list(modules.values()):
        file = getattr(module, "__file__", None) or ""
        known = file == str(ROOT / "__init__.py") or os.path.basename(file).startswith("test_")
        ours = file.startswith(str(ROOT) + os.sep) and not file.startswith(str(ROOT / ".dev"))
        if ours and not known:
            copies.setdefault(file, set()).add(id(module))
    return {file for file, ids in copies.items() if len(ids) > 1}


def test_the_hosts_modules_are_found_before_ours():
    assert "nodes" in hidden([str(ROOT), *sys.path])
    assert not hidden(sys.path)
    assert Path(getattr(sys.modules.get("nodes"), "__file__", HOST / "x")).resolve().parent == HOST


def test_a_file_of_ours_is_one_module():
    import slipstream.engine.files
    from slipstream.demo import emoji as same

    import engine.files
    from demo import emoji

    assert engine.files is slipstream.engine.files and emoji is same
    assert engine.files.__name__ == engine.files.__spec__.name == "slipstream.engine.files"
    assert not twice(sys.modules)
    copy = types.ModuleType("engine.files")
    copy.__file__ = engine.files.__file__
    assert twice({**sys.modules, "a second copy": copy}) == {engine.files.__file__}
