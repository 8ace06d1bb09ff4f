"""Every test runs inside the real host that COMFYUI_PATH names (`python dev.py test` sets it)."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from lab.boot import boot

boot()

import pytest  # noqa: E402
import torch  # noqa: E402
from sampling import Lab  # noqa: E402

from lab.server import Server  # noqa: E402

torch.set_num_threads(1)

pytest_plugins = ["matrix"]


def pytest_collection_finish():
    """Many tests collect garbage to see what a run has left: what the imports made is not looked through each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or nanobind, at the end of the process, takes all of that for leaks


@pytest.fixture(scope="session")
def comfy(tmp_path_factory) -> Server:
    """A real ComfyUI server with the pack, one for all files of this process; a test that kills one starts its own."""
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    with server:
        yield server


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture
def split(monkeypatch):
    """Make the host believe memory is short, so that it evaluates every cond in a call of its own."""
    import comfy.model_management

    true_free = comfy.model_management.get_free_memory

    def free(device=None, torch_free_too=False):
        return true_free(device, True) if torch_free_too else 1  # attention asks with True, and needs the truth

    def on():
        monkeypatch.setattr(comfy.model_management, "get_free_memory", free)

    return on
