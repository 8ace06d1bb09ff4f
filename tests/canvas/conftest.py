"""The browser of a test file and the server that it looks at."""

from __future__ import annotations

import pytest
from canvas.page import ask, chromium


@pytest.fixture(scope="module")
def browser():
    with chromium() as program:
        yield program


@pytest.fixture(scope="module")
def server(browser, comfy):
    """The server's address; its canvas' settings are afterwards what they were."""
    before = ask(f"{comfy.url}/settings")
    yield comfy.url
    ask(f"{comfy.url}/settings", {"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en", **before})
