"""NVFP4: a layer as the host's own quantised Linear, where the host has the format (FP4 tensor cores: sm_100, sm_120).

The host quantises, computes, patches LoRAs (by quantising the patched weight anew) and saves; nothing of it is ours.
Where the device has no FP4 the host's layer multiplies the dequantised weight: memory is saved, time is not.
"""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ...quant.formats import FORMATS
from ...quant.packed import json_tensor

FORMAT, LAYOUT = "nvfp4", "TensorCoreNVFP4Layout"
TENSORS = ("weight", "weight_scale", "weight_scale_2", "bias", "comfy_quant")
WORDS = "the host's own, for RTX 50"

# What layers get that it does not serve: of the host's formats the finer ones.
BESIDE = FORMATS["convrot_w4a4"]


def available() -> bool:
    """Whether this host has the format: 0.3.75 has not, hosts with comfy-kitchen have."""
    try:
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
    except ImportError:
        return False
    return (
        FORMAT in QUANT_ALGOS and hasattr(QuantizedTensor, "from_float") and hasattr(comfy.ops, "mixed_precision_ops")
    )


def most_bytes(n: int, k: int) -> int:
    """Most bytes that a layer takes; its scales are in tiles of 128 x 64."""
    return n * k // 2 + (n + 128) * (k + 64) // 16 + 8 * n


def layer(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The host's Linear holding `weight` (N, K) in NVFP4, to be computed with in `dtype` on `device`.

    Raises ValueError for a width that blocks of 16 do not divide, or a weight that is not finite.
    """
    from comfy.quant_ops import QuantizedTensor

    if weight.shape[1] % 16:
        raise ValueError(f"{weight.shape[1]} input channels are not a multiple of 16, the layer stays in 16 bit")
    if not all(map(torch.isfinite, torch.aminmax(weight))):
        raise ValueError("the weight holds infinite numbers or NaN and cannot be quantised")
    # as in the host's loaders: tensors made outside of it cannot be moved inside of it
    with torch.inference_mode():
        fast = getattr(comfy.model_management, "supports_nvfp4_compute", bool)(device)
        operations = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=not fast)
        n, k = weight.shape
        made = operations.Linear(k, n, bias=bias is not None, device="meta", dtype=dtype)
        packed = QuantizedTensor.from_float(weight.to(dtype), LAYOUT).cpu()
        state = {"comfy_quant": json_tensor({"format": FORMAT})}
        state |= packed.state_dict("weight")
        if bias is not None:
            made.bias = torch.nn.Parameter(bias.to("cpu", dtype), requires_grad=False)
            state["bias"] = made.bias.data
        made.factory_kwargs["device"] = torch.device("cpu")  # where `load_state_dict` puts what it reads
        made.load_state_dict(state)
        return made.requires_grad_(False)
