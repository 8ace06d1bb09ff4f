"""Hostile inputs from honest ones: damaged bytes, damaged safetensors, odd JSON, odd values. All from one `Random`."""

from __future__ import annotations

import copy
import json
import math
import struct
from random import Random

import torch
from safetensors.torch import save
from torch import Tensor

LONG = 10**6

# Values of every kind, where anything may come.
ODD = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 0.5, 1e308, 1e-320, math.nan,
    math.inf, -math.inf, "", " ", "0", "NaN", "auto", "none", "../../etc/passwd", "/etc/passwd", "C:\\x", "..\\..\\x",
    "a/b", "\0", "a\nb", "\u202e\u0000\ud800", "é" * 7, "💥", "x" * 300, "%s%n{}", "${jndi:x}", "__import__('os')",
    [], [[]], ["1", 0], {}, {"a": {}}, (), b"\xff", object, 1 + 2j,
)  # fmt: skip
NUMBERS = tuple(v for v in ODD if isinstance(v, int | float) and not isinstance(v, bool))
TEXTS = (
    *(v for v in ODD if isinstance(v, str)), "x" * LONG, " " * LONG, "(" * 2000, "a=" * 3000, "\n" * LONG, ".." * 5000,
    "[" * LONG, "é" * LONG, "1" * 5000, "(a+)+$ = keep", "([a-z0-9_.]+)+! = keep", "(x|x)*y = w4a16", "* = keep",
    "(?P<a>.)(?P=a) = keep", "a{99999999999} = keep", "img_mlp = ", "= keep", "model.safetensors " + "9" * 400,
    "a" + " " * 10**5 + "b", "a" + "1" * 10**5 + "b", "(.*)*(.*)*(.*)*! = keep", ".*.*.*.*.*.*.*! = keep",
)  # fmt: skip


def odd_json(rng: Random) -> object:
    """A value that JSON can carry (with Python's NaN and Infinity)."""
    return copy.deepcopy(rng.choice([v for v in ODD if not isinstance(v, bytes | complex | type)]))


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """Bits flipped, cut off, doubled, a length rewritten, a part overwritten."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        way = rng.randrange(8)
        at = rng.randrange(len(found)) if found else 0
        # most of a file is numbers, in which every bit pattern is one; what is read as structure stands in front
        if rng.random() < 0.6:
            at = min(at, rng.randrange(1, 4096))
        if way == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif way == 1:
            del found[at:]
        elif way == 2:
            found[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        elif way == 3:
            del found[at : at + rng.choice((1, 8, 100))]
        elif way == 4:
            length = rng.choice((0, 1, 7, 8, len(found), 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1, rng.getrandbits(16)))
            found[:8] = struct.pack("<Q", length)
        elif way == 5:
            size = rng.choice((4, 64))
            found[at : at + size] = rng.choice((b"\xff", b"\0", b"{", b'"', b"9"))[:1] * size
        elif way == 6:
            found += found[: rng.randrange(len(found) + 1)]
        else:
            found[at : at + 8] = struct.pack("<d", rng.choice((math.nan, math.inf, -1e308, 1e-320)))
    return bytes(found)


def every_cut(data: bytes) -> list[bytes]:
    """The file cut off at every class of length: in the length, the header, its end, the tensors, one byte short."""
    header = 8 + struct.unpack("<Q", data[:8])[0]
    places = (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, (header + len(data)) // 2, len(data) - 1)
    return [data[:n] for n in places]


def damaged_tree(rng: Random, tree: object, times: int | None = None) -> object:
    """A copy of plain data with some of its leaves, keys or branches replaced, removed, repeated or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        tree = _damage(rng, tree)
    return tree


def _damage(rng: Random, tree: object) -> object:
    if not isinstance(tree, dict | list) or not tree:
        return odd_json(rng)
    node, depth = tree, rng.randrange(6)
    for _ in range(depth):
        children = [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, dict | list) and v]
        if not children:
            break
        node = rng.choice(children)
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    way = rng.randrange(6)
    if way <= 2:
        node[key] = odd_json(rng)
    elif way == 3:
        del node[key]
    elif way == 4 and isinstance(node, dict):
        node[str(odd_json(rng))] = node.pop(key)
    elif isinstance(node, dict):
        node[key] = [node[key]]
    else:
        node.append(copy.deepcopy(node[key]))
    return tree


def damaged_tensor(rng: Random, tensor: Tensor) -> Tensor:
    """Another dtype, shape, or numbers."""
    way = rng.randrange(7)
    if way == 0:
        return tensor.to(
            rng.choice((torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64))
        )
    if way == 1:
        return tensor[:0].clone() if tensor.ndim else tensor[None]
    if way == 2:
        return tensor.flatten().clone()
    if way == 3:
        return torch.cat((tensor, tensor)) if tensor.ndim else torch.zeros(3)
    if way == 4:
        return tensor[None].clone()
    if way == 5 and tensor.is_floating_point():
        found = tensor.clone().flatten()
        if found.numel():
            found[rng.randrange(found.numel())] = rng.choice((math.nan, math.inf, -1.0, 1e30, 0.0))
        return found.reshape(tensor.shape)
    return torch.zeros(rng.choice(((), (0,), (1,), (3, 0), (2, 3))))


def damaged_tensors(rng: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some tensors damaged, missing, renamed or added."""
    found = dict(tensors)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        name = rng.choice(list(found) or ["x"])
        way = rng.randrange(5)
        if way <= 2 and name in found:
            found[name] = damaged_tensor(rng, found[name])
        elif way == 3:
            found.pop(name, None)
        elif name in found:
            new = rng.choice(
                (name + ".x", "", name[: len(name) // 2], name.replace("0", "9"), "../" + name, "a" * 3000)
            )
            found[new] = found[name].clone()
    return found


def file_of(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    """A safetensors file of these; b"" where the library itself refuses to write it."""
    try:
        return save({name: t.contiguous().clone() for name, t in tensors.items()}, metadata)
    except (ValueError, RuntimeError, UnicodeEncodeError):
        return b""


def dumped(value: object) -> str:
    """JSON as Python writes it, which may hold NaN and lone surrogates."""
    return json.dumps(value, default=str)
