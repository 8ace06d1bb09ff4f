"""Schemas for every host: arguments that an older host does not know are left out."""

from __future__ import annotations

import dataclasses
import inspect

from comfy_api.latest import io

CATEGORY = "slipstream"


def schema(**arguments) -> io.Schema:
    """`io.Schema` in our category, without the fields this host has not."""
    if arguments.get("hidden"):
        # else the host gives an equal node its twin's result, which speaks to the twin's place on the canvas
        arguments.setdefault("not_idempotent", True)
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(category=CATEGORY, **{k: v for k, v in arguments.items() if k in known})


def widget(kind: type, name: str, **arguments):
    """An input such as `io.Float.Input`, without the arguments this host has not (`advanced` came with 0.10)."""
    known = inspect.signature(kind.__init__).parameters
    return kind(name, **{k: v for k, v in arguments.items() if k in known})
