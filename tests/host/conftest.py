"""What several files of the host's tests start from."""

from __future__ import annotations

import folder_paths
import pytest
from slipstream.host.profiles import folder as profiles


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty profile folder of our own."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, profiles.FOLDER, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path
