"""What the inputs of linear layers span, read from a network's norms and time modulation without running its blocks.

A layer behind a modulated norm gets `norm(x) (1 + scale(t)) + shift(t)`: the norm makes every channel about as large as
the next, so what is large comes from scale and shift, and those are in the network's small time layers. The result is
the data-free smoothing of `quant/smooth.py`. READERS has one function per way to modulate, read in ComfyUI 0.3.75 and
0.33.0; the rows of `engine/families.py` name them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ...engine.errors import SlipstreamError
from ...quant.smooth import modulation_span

log = logging.getLogger("slipstream")

TIMES = 8
GUIDANCE = 3.5  # the host's default of FluxGuidance, for networks that have it distilled in
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Site:
    """Layers of a block that share an input. shift, scale: which part of the block's modulation, None: none; norm: name
    of the norm before it where that has weights of its own."""

    layers: tuple[str, ...]
    shift: int | None = None
    scale: int | None = None
    norm: str = ""


# A layer's largest channel over its median one, from where on smoothing by the span pays: below 2.7 it costs a little
# (the small Flux as trained), from 3 on it gains; bench quant_quality has the table.
STANDS_OUT = 3.0

# A block: its path with a dot at the end, the block, its modulation (S, parts, K) or None, and its sites.
Block = tuple[str, nn.Module, Tensor | None, tuple[Site, ...]]


# What a network of another build than its reader expects can raise while it is read.
OTHER_BUILD = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def spans(network: nn.Module, reader: str, times: int = TIMES) -> dict[str, Tensor]:
    """Layer name -> float32 (K,), on the CPU: `modulation_span` of what stands before the layer.

    reader: a name of READERS; times: how many, evenly over the schedule. Pooled prompts count as zero. Only time and
    modulation layers are called, each where its weights lie. Layers without a modulated or weighted norm before them
    are missing; a name that READERS lacks, or a network of another build than its reader's, gives {}.
    """
    if reader not in READERS:
        return {}
    try:
        with torch.inference_mode(False), torch.no_grad():
            return dict(_found(READERS[reader](network, torch.linspace(1, 1 / times, times))))
    except OTHER_BUILD as error:  # smoothing is an extra
        # a name that torch or this file lacks is a mistake here
        if isinstance(error, SlipstreamError) or isinstance(getattr(error, "obj", None), ModuleType | Site):
            raise
        log.debug("no spans read from the modulation of %s: %s: %s", reader, type(error).__name__, error)
        return {}


def outstanding(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the spans those with channels that stand out so far that smoothing pays; the other layers are better left."""
    return {name: span for name, span in found.items() if prominence(span) > STANDS_OUT}


def prominence(span: Tensor) -> float:
    """Largest over median of a span, 1 for a flat one: how far its outliers stand out."""
    return float(span.max() / span.median().clamp_min(1e-30))


def _found(blocks: Iterator[Block]) -> Iterator[tuple[str, Tensor]]:
    for prefix, block, table, sites in blocks:
        for site in sites:
            layers = [name for name in site.layers if isinstance(_part(block, name), nn.Linear)]
            gamma, beta = _affine(_part(block, site.norm))
            if not layers or (gamma is None and site.scale is None):
                continue
            if table is None:
                table = torch.zeros(1, 1, gamma.numel())
            scale = torch.zeros_like(table[:, 0]) if site.scale is None else table[:, site.scale]
            shift = torch.zeros_like(scale) if site.shift is None else table[:, site.shift]
            span = modulation_span(scale, shift if beta is None else shift + (1 + scale) * beta, gamma)
            for name in layers:
                if _part(block, name).in_features == len(span) and torch.isfinite(span).all():
                    yield prefix + name, span


def _part(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None


def _affine(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) of a norm, float32 on the CPU; None for what it lacks."""
    pair = (getattr(norm, "weight", None), getattr(norm, "bias", None))
    return tuple(None if tensor is None else tensor.detach().float().cpu() for tensor in pair)


def _like(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where to call a module and in what: its weights' own, which every kind of the host's layers takes."""
    weight = next(module.parameters())
    return weight.device, weight.dtype if weight.dtype in PLAIN else torch.float32


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.to(*_like(module))).float().cpu()


def _timed(module: nn.Module, times: Tensor) -> Tensor:
    """Of an embedder that takes the times and a dtype."""
    device, dtype = _like(module)
    return module(times.to(device), dtype).float().cpu()


def _parts(flat: Tensor, count: int) -> Tensor:
    """(S, count * K) -> (S, count, K)."""
    return flat.unflatten(-1, (count, -1))


def _waves(values: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first: (S,) -> (S, width)."""
    rates = torch.exp(-math.log(period) * torch.arange(width // 2) / (width // 2))
    angles = values[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), -1)


def _sites(attention: Sequence[str], mlp: Sequence[str]) -> tuple[Site, ...]:
    """adaLN-Zero of six: shift, scale and gate of the attention, then of the MLP."""
    return Site(tuple(attention), 0, 1), Site(tuple(mlp), 3, 4)


_STREAMS = {
    s: _sites([f"{s}_attn.qkv"], [f"{s}_mlp.0", f"{s}_mlp.gate_proj", f"{s}_mlp.up_proj"]) for s in ("img", "txt")
}
_SINGLE = (Site(("linear1",), 0, 1),)


def _flux(network: nn.Module, times: Tensor) -> Iterator[Block]:
    """Flux, Flux.2 (one modulation for all blocks), HunyuanVideo and Hunyuan3D 2, which are built from its blocks."""
    period = getattr(network, "max_period", 10000)
    vec = _call(network.time_in, _waves(1000 * times, 256, period))
    guidance, pooled = getattr(network, "guidance_in", None), getattr(network, "vector_in", None)
    if guidance is not None and any(True for _ in guidance.parameters()):
        vec = vec + _call(guidance, _waves(torch.tensor([1000 * GUIDANCE]), 256, period))
    if pooled is not None:
        vec = vec + _call(pooled, torch.zeros(1, pooled.in_layer.in_features))
    vec = nn.functional.silu(vec)
    shared: dict[str, Tensor] = {}

    def table(block: nn.Module, own: str, common: str, parts: int) -> Tensor:
        lin = _part(block, f"{own}.lin")
        if lin is not None:
            return _parts(_call(lin, vec), parts)
        if common not in shared:
            shared[common] = _parts(_call(getattr(network, common).lin, vec), parts)
        return shared[common]

    for i, block in enumerate(network.double_blocks):
        for stream, sites in _STREAMS.items():
            own = table(block, f"{stream}_mod", f"double_stream_modulation_{stream}", 6)
            yield f"double_blocks.{i}.", block, own, sites
    for i, block in enumerate(network.single_blocks):
        yield f"single_blocks.{i}.", block, table(block, "modulation", "single_stream_modulation", 3), _SINGLE


def _chroma(network: nn.Module, times: Tensor) -> Iterator[Block]:
    """One network makes the modulation of all blocks: three rows per single block, then six per stream and block."""
    singles, doubles = len(network.single_blocks), len(network.double_blocks)
    rows = 3 * singles + 12 * doubles
    width = network.distilled_guidance_layer.in_proj.in_features // 4
    # the host's guidance is 0 here unless a node sets it
    fixed = torch.cat((_waves(1000 * times, width), _waves(torch.zeros(len(times)), width)), -1)
    index = _waves(1000.0 * torch.arange(rows), 2 * width)
    both = torch.cat((fixed[:, None].expand(-1, rows, -1), index.expand(len(times), -1, -1)), -1)
    table = _call(network.distilled_guidance_layer, both)
    for i, block in enumerate(network.single_blocks):
        yield f"single_blocks.{i}.", block, table[:, 3 * i : 3 * i + 3], _SINGLE
    for i, block in enumerate(network.double_blocks):
        for number, sites in enumerate(_STREAMS.values()):
            first = 3 * singles + 6 * (number * doubles + i)
            yield f"double_blocks.{i}.", block, table[:, first : first + 6], sites


def _sd3(network: nn.Module, times: Tensor) -> Iterator[Block]:
    vec = _timed(network.t_embedder, 1000 * times)
    pooled = getattr(network, "y_embedder", None)
    if pooled is not None:
        vec = vec + _call(pooled, torch.zeros(1, pooled.mlp[0].in_features))
    sites = (*_sites(["attn.qkv"], ["mlp.fc1"]), Site(("attn2.qkv",), 6, 7))
    for i, joint in enumerate(network.joint_blocks):
        for name in ("context_block", "x_block"):
            block = getattr(joint, name)
            flat = _call(block.adaLN_modulation, vec)
            parts = flat.shape[-1] // vec.shape[-1]
            if parts not in (2, 6, 9):
                raise ValueError(f"a modulation of {parts} parts")
            yield f"joint_blocks.{i}.{name}.", block, _parts(flat, parts), sites


def _qwen(network: nn.Module, times: Tensor) -> Iterator[Block]:
    embed = network.time_text_embed
    device, dtype = _like(embed)
    vec = embed(times.to(device), torch.empty(0, dtype=dtype, device=device)).float().cpu()
    joint = {"img": [f"attn.to_{x}" for x in "qkv"], "txt": [f"attn.add_{x}_proj" for x in "qkv"]}
    for i, block in enumerate(network.transformer_blocks):
        for stream, names in joint.items():
            table = _parts(_call(getattr(block, f"{stream}_mod"), vec), 6)
            yield f"transformer_blocks.{i}.", block, table, _sites(names, [f"{stream}_mlp.net.0.proj"])


def _nextdit(network: nn.Module, times: Tensor) -> Iterator[Block]:
    """Lumina 2 and Z-Image: a scale and a gate, no shift, behind norms with weights; the refiner of the prompt has no
    modulation."""
    vec = _timed(network.t_embedder, times * getattr(network, "time_scale", 1.0))
    if getattr(network, "clip_text_pooled_proj", None) is not None:
        vec = _call(network.time_text_embed, torch.cat((vec, vec.new_zeros(len(vec), network.clip_text_dim)), -1))
    names = (["attention.qkv"], ["feed_forward.w1", "feed_forward.w3"])
    for list_name in ("noise_refiner", "context_refiner", "layers"):
        for i, block in enumerate(getattr(network, list_name)):
            modulation = _part(block, "adaLN_modulation")
            table = None if modulation is None else _parts(_call(modulation, vec), 4)
            scales = (None, None) if table is None else (0, 2)
            sites = tuple(
                Site(tuple(layers), None, scale, norm)
                for layers, scale, norm in zip(names, scales, ("attention_norm1", "ffn_norm1"), strict=True)
            )
            yield f"{list_name}.{i}.", block, table, sites


def _wan(network: nn.Module, times: Tensor) -> Iterator[Block]:
    vec = _call(network.time_embedding, _waves(1000 * times, network.freq_dim))
    table = _parts(_call(network.time_projection, vec), 6)
    sites = (*_sites([f"self_attn.{x}" for x in "qkv"], ["ffn.0"]), Site(("cross_attn.q",), norm="norm3"))
    for list_name in ("blocks", "vace_blocks"):
        for i, block in enumerate(getattr(network, list_name, ())):
            yield f"{list_name}.{i}.", block, table + block.modulation.detach().float().cpu(), sites


def _aura(network: nn.Module, times: Tensor) -> Iterator[Block]:
    vec = _timed(network.t_embedder, times)
    for i, block in enumerate(network.double_layers):
        for stream, number in (("C", 1), ("X", 2)):
            flat = _call(getattr(block, f"mod{stream}"), vec)
            inputs = getattr(block.attn, f"w{number}q").in_features
            sites = _sites([f"attn.w{number}{x}" for x in "qkv"], [f"mlp{stream}.c_fc{n}" for n in (1, 2)])
            yield f"double_layers.{i}.", block, _parts(flat, flat.shape[-1] // inputs), sites
    sites = _sites([f"attn.w1{x}" for x in "qkv"], [f"mlp.c_fc{n}" for n in (1, 2)])
    for i, block in enumerate(network.single_layers):
        yield f"single_layers.{i}.", block, _parts(_call(block.modCX, vec), 6), sites


def _pixart(network: nn.Module, times: Tensor) -> Iterator[Block]:
    """PixArt alpha's picture size and shape count as not given."""
    table = _parts(_call(network.t_block, _timed(network.t_embedder, 1000 * times)), 6)
    for i, block in enumerate(network.blocks):
        own = table + block.scale_shift_table.detach().float().cpu()
        yield f"blocks.{i}.", block, own, _sites(["attn.qkv"], ["mlp.fc1"])


def _ltxv(network: nn.Module, times: Tensor) -> Iterator[Block]:
    device, dtype = _like(network.adaln_single)
    flat = network.adaln_single((1000 * times).to(device), batch_size=len(times), hidden_dtype=dtype)[0].float().cpu()
    sites = _sites([f"attn1.to_{x}" for x in "qkv"], ["ff.net.0.proj"])
    for i, block in enumerate(network.transformer_blocks):
        own = block.scale_shift_table.detach().float().cpu()
        yield f"transformer_blocks.{i}.", block, _parts(flat, len(own)) + own, sites


def _predict2(network: nn.Module, times: Tensor) -> Iterator[Block]:
    """Cosmos-Predict2: every sublayer has a modulation of its own, to which one of low rank of all blocks is added."""
    device, dtype = _like(network.t_embedder)
    waves, embed = network.t_embedder
    vec, common = embed(waves(times[:, None].to(device)).to(dtype))
    vec = _call(network.t_embedding_norm, vec)
    common = torch.zeros(1) if common is None else common.float().cpu()
    kinds = {
        "self_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "cross_attn": ("cross_attn.q_proj",),
        "mlp": ("mlp.layer1",),
    }
    for i, block in enumerate(network.blocks):
        for kind, layers in kinds.items():
            flat = _call(getattr(block, f"adaln_modulation_{kind}"), vec) + common
            yield f"blocks.{i}.", block, _parts(flat[:, 0], 3), (Site(layers, 0, 1),)


_TRANSFORMER = (
    Site(("attn1.to_q", "attn1.to_k", "attn1.to_v"), norm="norm1"),
    Site(("attn2.to_q",), norm="norm2"),
    Site(("ff.net.0.proj",), norm="norm3"),
)


def _unet(network: nn.Module, times: Tensor) -> Iterator[Block]:
    """No modulation before the linear layers, but norms with weights: the same at every time."""
    for name, block in network.named_modules():
        if type(block).__name__ == "BasicTransformerBlock" and not block.disable_self_attn:
            yield f"{name}.", block, None, _TRANSFORMER


READERS: dict[str, Callable[[nn.Module, Tensor], Iterator[Block]]] = {
    "Stable Diffusion U-Net": _unet,
    "SD3": _sd3,
    "Flux": _flux,
    "Chroma": _chroma,
    "Qwen-Image": _qwen,
    "Lumina 2 / Z-Image": _nextdit,
    "Wan": _wan,
    "LTXV": _ltxv,
    "Cosmos-Predict2": _predict2,
    "AuraFlow": _aura,
    "PixArt": _pixart,
}
