"""A quantised linear layer as a torch module: what a network holds in the place of its own Linear.

The parameters carry the names of `QuantisedLinear.tensors`, so the module's state dict is exactly what is stored and a
host that measures state dicts counts the packed size. `weight` is the packed int8 tensor under the original's name,
which is the name that LoRA files are matched by.

A LoRA is a further part of the low-rank branch, in no state dict. It is given as factors by `set_lora`, or as a whole
patched weight by `set_weight`, after `convert_weight` has given the weight to be patched: the two calls that ComfyUI's
`get_key_weight` looks for on a module. A LoRA belongs to the parameter object `weight` it was set on: who puts another
parameter with the same data in its place, as ComfyUI's backups do, has the layer of before, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .packed import QuantisedLinear, QuantisedSplit
from .svd import truncated_svd

# Ranks tried in turn for a change of the weight that is known only as a matrix; more bytes than the packed weight has
# are never spent.
RANKS = (16, 64, 256)

# How much of such a change may be lost before the next rank is tried, relative: below the rounding of 16-bit factors.
TOLERANCE = 5e-4


# What a part may have, by name on disk.
TENSORS = ("weight", "weight_scale", "weight_proj_down", "weight_proj_up", "weight_smooth_factor", "bias")


@dataclass(frozen=True, slots=True)
class _Part:
    """What a layer is beside its tensors; see `QuantisedLinear`."""

    format: str
    shape: tuple[int, int]
    group_size: int
    act_unsigned: bool
    rotation: int


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """What is added to a layer as long as `on` is its weight: down (K, r), up (N, r), float32 bias (N,); or what takes
    its place, `whole`. mark: whose it is."""

    on: Tensor
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    whole: QuantisedLinear | QuantisedSplit | None = None
    mark: object = None


class W4A4Linear(torch.nn.Linear):
    """`QuantisedLinear` as a module: forward (..., K) -> (..., N), in x's dtype, no gradients.

    A `QuantisedSplit` is one module too, a leaf that a host moves and measures as one: the tensors of its first part
    under their own names, those of part 1 as `part1_weight` and so on. A LoRA's down matrix is cut along K.
    Parameters may lie on another device than x and are then copied for the call. No conversion of the module (`half()`,
    `to(dtype)`) changes a parameter's dtype: codes and scales mean something only as they were stored.
    managed: set by a host that gives every LoRA with `set_lora` when its loading is over; `set_weight` and `set_bias`
    then do nothing. lora_error: part of the last change, relative, that the branch could not hold. share: (key, count)
    of layers that are given the same input, q, k and v; without a LoRA they quantise it once.
    """

    def __init__(self, layer: QuantisedLinear | QuantisedSplit) -> None:
        torch.nn.Module.__init__(self)  # Linear's own would allocate the whole weight
        self.out_features, self.in_features = layer.shape
        self.register_parameter("bias", None)
        parts = layer.parts if isinstance(layer, QuantisedSplit) else (layer,)
        for i, part in enumerate(parts):
            for name, tensor in part.tensors.items():
                self.register_parameter(_part_name(i, name), Parameter(tensor.detach(), requires_grad=False))
        self._parts = tuple(_Part(p.format, p.shape, p.group_size, p.act_unsigned, p.rotation) for p in parts)
        self.format, self.original_dtype = layer.format, layer.dtype
        self.rotation = parts[0].rotation
        self.managed, self.lora_error = False, 0.0
        self.share: tuple[Hashable, int] | None = None
        self._change = _Change(self.weight)

    @property
    def lora(self) -> tuple[Tensor, Tensor] | None:
        """The LoRA's down (K, r) and up (N, r), strength included, or None."""
        change = self._current()
        return None if change is None or change.down is None or change.up is None else (change.down, change.up)

    @property
    def lora_of(self) -> object:
        """The mark that `set_lora` or `set_change` was given with what the layer has on now."""
        change = self._current()
        return None if change is None else change.mark

    def _current(self) -> _Change | None:
        return self._change if self._change.on is self.weight else None

    def layer(self, device: torch.device | None = None, lora: bool = True) -> QuantisedLinear | QuantisedSplit:
        """The layer as it computes now, its tensors on `device` (None: where they are), with or without its LoRA."""

        def there(tensor: Tensor) -> Tensor:
            target = device or tensor.device
            # a copy to the CPU that is not waited for would be read before it is there
            return tensor.detach().to(target, non_blocking=target.type != "cpu")

        current = self._current() if lora else None
        if current is not None and current.whole is not None:
            return _each_tensor(current.whole, there)
        parts, start = [], 0
        for i, part in enumerate(self._parts):
            stop = start + part.shape[1]
            held = {name: self._parameters.get(_part_name(i, name)) for name in TENSORS}
            found = {name: there(tensor) for name, tensor in held.items() if tensor is not None}
            down, up, bias = found.get("weight_proj_down"), found.get("weight_proj_up"), found.get("bias")
            if current is not None and current.down is not None and current.up is not None:
                down, up = _beside(down, there(current.down[start:stop])), _beside(up, there(current.up))
            if current is not None and current.bias is not None and not i:
                bias = there(current.bias) if bias is None else bias.float() + there(current.bias)
            parts.append(
                QuantisedLinear(
                    part.format,
                    part.shape,
                    self.original_dtype,
                    found["weight"],
                    found["weight_scale"],
                    down,
                    up,
                    found.get("weight_smooth_factor"),
                    bias,
                    part.group_size,
                    part.act_unsigned,
                    part.rotation,
                )
            )
            start = stop
        return parts[0] if len(parts) == 1 else QuantisedSplit(tuple(parts))

    def forward(self, input: Tensor) -> Tensor:
        """input: float (..., K), contiguous or not, empty or not. Raises ValueError when the channels differ."""
        change = self._current()
        as_made = change is None or (change.down is None and change.whole is None)
        return self.layer(input.device)(input, self.share if as_made else None)

    def set_lora(self, down: Tensor | None, up: Tensor | None, bias: Tensor | None = None, mark: object = None) -> None:
        """Add up @ down^T, down (K, r) and up (N, r), to the weight and `bias` (N,) to the bias; None takes it off.

        Replaces what was set before. The factors are kept in the wider dtype of original weight and stored branch.
        mark: given back by `lora_of`. Raises ValueError when the shapes do not fit.
        """
        n, k = self.out_features, self.in_features
        if down is None or up is None or not down.shape[1]:
            down = up = None
        else:
            rank = down.shape[1]
            if tuple(down.shape) != (k, rank) or tuple(up.shape) != (n, rank):
                raise ValueError(f"a LoRA of shapes {tuple(up.shape)} and {tuple(down.shape)} does not fit {n} x {k}")
            device, dtype = self.weight.device, self.lora_dtype
            down, up = down.detach().to(device, dtype), up.detach().to(device, dtype)
        bias = None if bias is None else bias.detach().float().to(self.weight.device)
        self._change, self.lora_error = _Change(self.weight, down, up, bias, mark=mark), 0.0

    def set_whole(self, layer: QuantisedLinear | QuantisedSplit, mark: object = None) -> None:
        """Compute with `layer`, quantised anew from a patched weight, as long as it is not replaced or taken off.

        For changes that no branch can hold. Raises ValueError when the shape is another one.
        """
        if layer.shape != (self.out_features, self.in_features):
            raise ValueError(f"a layer of {layer.shape} cannot take the place of {self.out_features, self.in_features}")
        self._change, self.lora_error = _Change(self.weight, whole=layer, mark=mark), 0.0

    @property
    def lora_dtype(self) -> torch.dtype:
        """What LoRA factors are kept in: no coarser than the original weight, which a merge would be rounded to."""
        branch = self._parameters.get("weight_proj_down")
        dtype = self.original_dtype if self.original_dtype.itemsize > 1 else torch.bfloat16
        return dtype if branch is None else torch.promote_types(dtype, branch.dtype)

    def set_change(self, change: Tensor, bias: Tensor | None = None, mark: object = None) -> None:
        """Like `set_lora` for a change of the weight that is known as a matrix (N, K): the smallest of RANKS whose
        truncated SVD loses no more than TOLERANCE, else the largest. `lora_error` tells what was lost."""
        down, up, error = factors_of(change)
        self.set_lora(down, up, bias, mark)
        self.lora_error = error

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: object) -> Tensor:
        """The host's question for the weight to be patched: dequantised without LoRA, float32 (N, K).

        weight: the parameter's data in any dtype, which is read for its device only.
        """
        return self.layer(weight.device, lora=False).dequantise()

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: object,
    ) -> Tensor | None:
        """The host's answer, a patched weight (N, K): its difference to the layer becomes the layer's LoRA.

        return_weight: give it back instead, for a host that saves. The seed is not needed: nothing is rounded by
        chance. Raises ValueError for inplace_update, which only the host's weight hooks ask for: they restore by
        copying floats into the parameter, and it holds codes.
        """
        if return_weight:
            return weight
        _refuse_hooks(inplace_update)
        if not self.managed:
            change = weight.float() - self.convert_weight(weight)
            # a new object, so that the host's backup of the old one takes the LoRA off
            self.weight = Parameter(self.weight.detach(), requires_grad=False)
            self.set_change(change)
        return None

    def set_bias(
        self,
        bias: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: object,
    ) -> Tensor | None:
        """The same for a patched bias (N,), which takes the place of the stored one, in its dtype."""
        if return_weight:
            return bias
        _refuse_hooks(inplace_update)
        if not self.managed:
            self.bias = Parameter(bias.to(self.bias), requires_grad=False)
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W4A4Linear:
        """torch's way to move a module: all devices are taken over, no dtype is."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        current = self._current()
        super()._apply(moved, recurse)
        if current is not None:
            down, up, bias = (None if t is None else moved(t) for t in (current.down, current.up, current.bias))
            whole = None if current.whole is None else _each_tensor(current.whole, moved)
            # torch may have replaced the parameter object
            self._change = _Change(self.weight, down, up, bias, whole, current.mark)
        return self

    def extra_repr(self) -> str:
        """What torch prints between the parentheses."""
        rank = 0 if self.lora is None else self.lora[0].shape[1]
        lora = f", lora={rank}" if rank else ""
        return f"{self.in_features}, {self.out_features}, {self.format}, rotation={self.rotation}{lora}"


def _refuse_hooks(inplace_update: bool) -> None:
    if inplace_update:
        raise ValueError(
            "W4A4 Quantize: a hook cannot change the weights of a quantised layer; load the LoRA with a LoRA loader "
            "instead of a hook, or take W4A4 Quantize off this model."
        )


def _part_name(part: int, name: str) -> str:
    return name if not part else f"part{part}_{name}"


def _each_tensor(
    layer: QuantisedLinear | QuantisedSplit, fn: Callable[[Tensor], Tensor]
) -> QuantisedLinear | QuantisedSplit:
    if isinstance(layer, QuantisedSplit):
        return QuantisedSplit(tuple(_each_of_part(part, fn) for part in layer.parts))
    return _each_of_part(layer, fn)


def _each_of_part(part: QuantisedLinear, fn: Callable[[Tensor], Tensor]) -> QuantisedLinear:
    names = ("weight", "weight_scale", "proj_down", "proj_up", "smooth", "bias")
    tensors = {name: getattr(part, name) for name in names}
    changed: dict[str, Any] = {name: fn(tensor) for name, tensor in tensors.items() if tensor is not None}
    return dataclasses.replace(part, **changed)


def _beside(stored: Tensor | None, added: Tensor) -> Tensor:
    if stored is None:
        return added
    dtype = torch.promote_types(stored.dtype, added.dtype)
    return torch.cat((stored.to(dtype), added.to(dtype)), 1)


def factors_of(change: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """down (K, r), up (N, r) and the relative error of up @ down^T against `change` (N, K); (None, None, 0) for zeros.

    Columns that carry less than a millionth of the largest are dropped: what float32 left of a difference.
    """
    size = float(change.norm())
    if not size:
        return None, None, 0.0
    n, k = change.shape
    most = min(n, k, max(RANKS[0], n * k // (4 * (n + k))))  # 2 r (n + k) bytes against n k / 2
    for rank in RANKS:
        up, down = truncated_svd(change, min(rank, most))
        error = float(torch.addmm(change.float(), up, down.T, alpha=-1).norm()) / size
        if error <= TOLERANCE or rank >= most:
            break
    weight = up.norm(dim=0) * down.norm(dim=0)
    kept = weight > weight.max() * 1e-6
    return down[:, kept].contiguous(), up[:, kept].contiguous(), error
