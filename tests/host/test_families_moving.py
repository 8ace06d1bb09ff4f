"""The same as `test_families.py` for video, sound and shapes."""

from __future__ import annotations

import families
import pytest
from family_checks import check


@pytest.mark.parametrize("name", [name for name in families.available() if families.moves(name)])
def test_family(lab, split, name, record_property):
    record_property("sites", check(lab, split, name, families.make(name)))
