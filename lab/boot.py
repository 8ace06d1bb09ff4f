"""Bring the real host and the pack into this Python process: `boot()` once, before anything imports comfy."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK = "slipstream"
# Folders of the pack that workshop code also names without `slipstream.`; not `nodes`, which is the host's own module.
ROOMS = ("engine", "quant", "kernels", "host", "demo")


def boot(host: str | None = None) -> None:
    """Make `comfy` (from COMFYUI_PATH) and `slipstream` (this checkout) importable; on the CPU without a card."""
    if PACK in sys.modules and "comfy" in sys.modules:
        return
    import torch

    path = Path(host or os.environ.get("COMFYUI_PATH", ""))
    if not (path / "comfy" / "samplers.py").is_file():
        raise SystemExit("COMFYUI_PATH does not point at a ComfyUI checkout; `python dev.py test` sets one up.")
    register_torchvision_schemas()
    # Before this checkout: its folder `nodes` would hide the host's module of that name.
    sys.path[:] = [str(path), *(entry for entry in sys.path if entry != str(path))]
    import comfy.options

    argv, sys.argv = sys.argv, ["main.py"] + ([] if torch.cuda.is_available() else ["--cpu"])
    comfy.options.enable_args_parsing()
    import comfy.cli_args  # reads sys.argv while it is imported

    sys.argv = argv
    import_pack()


def register_torchvision_schemas() -> None:
    """Where torchvision's compiled part cannot load (built for a card, beside a CPU torch), declare its operators.

    The host imports torchvision, which refuses to be imported without them; none of what we run calls them.
    """
    import torch

    found = importlib.util.find_spec("torchvision")
    for compiled in Path(found.submodule_search_locations[0]).glob("_C.*") if found else ():
        try:
            torch.ops.load_library(str(compiled))
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    register_torchvision_schemas.library = library  # the schema lives as long as the library object


def import_pack():
    """Import this checkout under the name `slipstream`, whatever its folder is called."""
    if PACK in sys.modules:
        return sys.modules[PACK]
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    sys.meta_path.insert(0, OneName())
    spec.loader.exec_module(module)
    return module


class OneName(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `engine.files` another name of the module `slipstream.engine.files` and not a second copy of it.

    The classes of two copies are not equal to each other, and what one copy remembers the other does not know.
    """

    def __init__(self):
        self.specs = {}

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.partition(".")[0] in ROOMS else None

    def create_module(self, spec):
        module = importlib.import_module(f"{PACK}.{spec.name}")
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module):
        # The import system has just put the other name's spec on the module.
        module.__spec__ = self.specs.pop(module.__spec__.name)
