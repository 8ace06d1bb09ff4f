"""The streams of one block: image and text among what it is given and what it returns, by the facts of its stack."""

from __future__ import annotations

from typing import Any

import torch

from ..families import Stack
from .calls import Parts


def read(stack: Stack, args: tuple, kwargs: dict) -> Any:
    """The image stream among a block's arguments."""
    if stack.key is not None:
        return args[0]["img"]
    return kwargs[stack.stream] if stack.stream in kwargs else args[0]


def result(stack: Stack, output: Any) -> Any:
    """The image stream in what a block returns."""
    if stack.key is not None:
        return output["img"]
    return output[stack.image_at] if stack.second is not None and not torch.is_tensor(output) else output


def read_second(stack: Stack, args: tuple, kwargs: dict) -> Any:
    """The other stream among a block's arguments, the text; None where it is given none."""
    if stack.key is not None:
        return args[0].get("txt")
    if stack.second is None:
        return None
    return kwargs[stack.second] if stack.second in kwargs else args[1]


def result_second(stack: Stack, output: Any) -> Any:
    """The other stream in what a block returns; None where it returns none."""
    if stack.key is not None:
        return output.get("txt")
    return None if stack.second is None or torch.is_tensor(output) else output[1 - stack.image_at]


def stand_in(stack: Stack, args: tuple, kwargs: dict, stream: Parts, texts: Parts = ()) -> Any:
    """What a block that did not run returns: `stream` for the image, `texts` for the text, or that as it came."""
    value = _like(read(stack, args, kwargs), stream)
    second = read_second(stack, args, kwargs)
    if texts:
        second = _like(second, texts)
    if stack.key is not None:
        return {"img": value, **({"txt": second} if "txt" in args[0] else {})}
    if stack.second is None:
        return value
    return (value, second) if stack.image_at == 0 else (second, value)


def _like(given: Any, parts: Parts) -> Any:
    """Tensors in the form in which a stream was given: alone, or in a tuple or list."""
    return parts[0] if torch.is_tensor(given) else type(given)(parts)
