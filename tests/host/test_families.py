"""Every family of pictures that the host has, at every site: identical when off, split as batched, really skipped."""

from __future__ import annotations

import families
import pytest
from family_checks import check


@pytest.mark.parametrize("name", [name for name in families.available() if not families.moves(name)])
def test_family(lab, split, name, record_property):
    record_property("sites", check(lab, split, name, families.make(name)))
