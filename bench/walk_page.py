"""docs/first_walk.md, from what the walks of `bench/walk.py` found."""

from __future__ import annotations


def write_page(rows: list[dict]) -> None:
    pass
