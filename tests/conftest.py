"""Every test runs inside the real host that COMFYUI_PATH names (`python dev.py test` sets it)."""

from __future__ import annotations

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

torch.set_num_threads(1)

pytest_plugins = ["matrix"]


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
