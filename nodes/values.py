"""What a widget may hold, checked when a node runs: a linked node or a client can hand over anything."""

from __future__ import annotations

import functools
import math
import numbers

from comfy_api.latest import io

from ..engine.errors import SlipstreamError

# Lists of files: they grow after the host has asked for the node's schema, and each node says itself what is missing.
FILES = ("profile", "calibration", "model_name", "unet_name")


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node itself, whose `execute` refuses in one sentence what none of its widgets could give."""
    schema = node.GET_SCHEMA()
    run, inputs = node.execute.__func__, {item.id: item for item in schema.inputs}
    if hasattr(run, "__wrapped__"):
        return node  # the host has asked for the list before

    @functools.wraps(run)
    def execute(cls, *args, **values):
        for name, value in values.items():
            if name in inputs and not isinstance(inputs[name], io.Model.Input):
                values[name] = checked(schema.display_name, inputs[name], value)
        return run(cls, *args, **values)

    node.execute = classmethod(execute)
    return node


def checked(node: str, item: io.Input, value: object) -> object:
    """The value as the widget would give it; wired inputs pass. Raises SlipstreamError."""
    if isinstance(item, io.Boolean.Input):
        good, what = isinstance(value, bool), "on or off"
    elif isinstance(item, io.String.Input):
        good, what = isinstance(value, str), "text"
    elif isinstance(item, io.Combo.Input):
        good = isinstance(value, str) and (item.id in FILES or not item.options or value in list(item.options))
        what = f"one of {', '.join(map(str, item.options or ()))}"
    elif isinstance(item, io.Int.Input | io.Float.Input):
        whole = isinstance(item, io.Int.Input)
        good = isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value)
        if good and whole and value == int(value):
            value = int(value)
        good = good and (not whole or isinstance(value, int))
        low, high = (-math.inf if item.min is None else item.min), (math.inf if item.max is None else item.max)
        good = good and low <= value <= high
        what = f"a {'whole ' if whole else ''}number from {low} to {high}"
    else:
        return value
    if not good:
        raise SlipstreamError(f"{node}: {item.id} is {_shown(value)}, but it must be {what}.")
    return value


def _finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return isinstance(value, int)


def _shown(value: object) -> str:
    """A value as a sentence can hold it; a number of thousands of digits has no text in Python."""
    try:
        text = f"'{value}'" if isinstance(value, str) else repr(value)
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
