"""One row per model family: where its block stack is, how its tokens run, the settings its methods were published with,
and the names of the rules by which its layers are quantised. Rows are data: to add a family, add a row. A network
without a row is served at the whole-model output.

The row is chosen by the class names of the network and its bases, nearest first, so that variants (VACE, Camera, ...)
share the row of the network they extend unless they have their own. Nothing else matches networks: what else differs by
family is looked up by the names in its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Stack:
    """One run of blocks.

    path: the ModuleList or ModuleDict on the network; key: its name in `patches_replace["dit"]`, None where the host
    has no such patch, or one that changes what runs, and the forward of every block is patched instead. For those,
    stream names the argument with the image tokens (or they come first), second that of another stream which is
    returned too (or it comes second), image_at the place of the image tokens in the returned tuple. joint: the blocks
    see text and image tokens in one sequence.
    """

    path: str
    key: str | None = None
    stream: str = "x"
    second: str | None = None
    image_at: int = 0
    joint: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """Settings from the methods' authors.

    first_block: First-block cache threshold; confidence: CG-Taylor's threshold and first-block order; taylor: interval
    N and first full steps of TaylorSeer; teacache: threshold, probe ("modulated" or "embedding") and polynomial;
    magcache: threshold, retention, most fills in a row, ratios.
    """

    first_block: float = 0.08
    confidence: tuple[float, int] = (0.13, 1)
    taylor: tuple[int, int] = (5, 3)
    teacache: tuple[float, str, tuple[float, ...]] | None = None
    magcache: tuple[float, float, int, tuple[float, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model family.

    networks: class names of the host's networks, with as much of the module path as tells them apart; stacks: empty
    for U-Nets and for unknown networks; batch_dim: where the batch is in the token stream; modulated: path of the
    first layer that is given the modulated input of block 0; site, method: what `auto` means, and so the presets;
    budgets: drift budgets of Safe, Balanced and Fast there, where the family has its own. policy: the set of rules in
    `quant/policy.py`, "" for the careful one; modulation: the reader of `host/quantise/modulation.py`, "" for none;
    text_widths: where the host's configuration has the width of the text it reads, the first that is there, with dots
    between the levels; empty where none tells.
    """

    name: str
    networks: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    unet: bool = False
    batch_dim: int = 0
    modulated: str | None = None
    published: Published = Published()
    site: str = "model output"
    method: str = "drift budget"
    budgets: tuple[float, float, float] | None = None
    policy: str = ""
    modulation: str = ""
    text_widths: tuple[str, ...] = ()


def _two(double: str = "double_blocks", single: str = "single_blocks") -> tuple[Stack, ...]:
    return Stack(double, "double_block"), Stack(single, "single_block", joint=True)


def _one(path: str, key: str | None = "double_block", **facts: Any) -> tuple[Stack, ...]:
    return (Stack(path, key, **facts),)


# Ratios of the residual's magnitude from step to step, ComfyUI-MagCache `nodes.py` (47bdd2a); of tables that interleave
# cond and uncond the cond entries.
_MAG_FLUX = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062,
)  # fmt: skip
_MAG_HUNYUAN = (
    1.0, 1.0754, 1.27807, 1.11596, 1.09504, 1.05188, 1.00844, 1.05779, 1.00657, 1.04142, 1.03101, 1.00679, 1.02556,
    1.00908, 1.06949, 1.05438, 1.02214, 1.02321, 1.03019, 1.00779, 1.03381, 1.01886, 1.01161, 1.02968, 1.00544,
    1.02822, 1.00689, 1.02119, 1.0105, 1.01044, 1.01572, 1.02972, 1.0094, 1.02368, 1.0226, 0.98965, 1.01588, 1.02146,
    1.0018, 1.01687, 0.99436, 1.00283, 1.01139, 0.97122, 0.98251, 0.94513, 0.97656, 0.90943, 0.85703, 0.75456,
)  # fmt: skip
_MAG_WAN_14B = (
    1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468, 0.99438,
    0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313, 0.99215, 0.99218,
    0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037,
    0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111,
)  # fmt: skip

# TeaCache polynomials, highest power first, and the thresholds ComfyUI-TeaCache (91dff8e) recommends.
_TEA_FLUX = (0.4, "modulated", (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861))
_TEA_LTXV = (0.06, "modulated", (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326))
_TEA_LUMINA = (0.38, "modulated", (-874.643948, 466.059906, -75.1559762, 5.32836175, -0.0327258296))
_TEA_HUNYUAN = (0.15, "modulated", (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896))
_TEA_HIDREAM = (0.35, "modulated", (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901))
_TEA_WAN_14B = (0.2, "embedding", (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525))
_TEA_COSMOS = (0.2, "modulated", (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633))
_TEA_MOCHI = (0.1, "modulated", (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719))

# CG-Taylor publishes 0.13 for FLUX, 0.36 with a third-order first block for Wan; TaylorSeer N = 6 and 5.
_FLUX = Published(0.12, (0.13, 1), (6, 3), _TEA_FLUX, (0.24, 0.1, 5, _MAG_FLUX))
_WAN = Published(0.08, (0.36, 3), (5, 1), _TEA_WAN_14B, (0.24, 0.2, 6, _MAG_WAN_14B))
_HUNYUAN = Published(0.08, (0.13, 1), (5, 1), _TEA_HUNYUAN, (0.24, 0.2, 6, _MAG_HUNYUAN))

_SD3_TEXT = "context_embedder_config.params.in_features"

UNKNOWN = Architecture("unknown model", text_widths=(  # every name that a host's configuration has for it
    "context_dim", "context_in_dim", "text_dim", "cap_feat_dim", "joint_attention_dim", "crossattn_emb_channels",
    _SD3_TEXT,
))  # fmt: skip

ROWS: tuple[Architecture, ...] = (
    # A noise prediction changes less from step to step than a flow model's output (`bench fidelity`, tiny SD1.5).
    Architecture("Stable Diffusion U-Net", ("UNetModel",), unet=True, budgets=(0.02, 0.04, 0.07),
                 policy="Stable Diffusion U-Net", modulation="Stable Diffusion U-Net", text_widths=("context_dim",)),
    Architecture("SD3", ("diffusionmodules.mmdit.MMDiT",), _one("joint_blocks"),
                 modulated="joint_blocks.0.x_block.attn.qkv", policy="SD3", modulation="SD3", text_widths=(_SD3_TEXT,)),
    Architecture("Flux", ("Flux",), _two(), modulated="double_blocks.0.img_attn.qkv", published=_FLUX,
                 policy="Flux", modulation="Flux", text_widths=("context_in_dim",)),
    Architecture("Chroma", ("Chroma",), _two(), modulated="double_blocks.0.img_attn.qkv",
                 published=Published(0.12, (0.13, 1), (6, 3), _TEA_FLUX, (0.10, 0.25, 2, _MAG_FLUX)),
                 policy="Flux", modulation="Chroma", text_widths=("context_in_dim",)),
    Architecture("Qwen-Image", ("QwenImageTransformer2DModel",), _one("transformer_blocks"),
                 modulated="transformer_blocks.0.attn.to_q", published=Published(0.12),
                 policy="Qwen-Image", modulation="Qwen-Image", text_widths=("joint_attention_dim",)),
    Architecture("Lumina 2 / Z-Image", ("NextDiT",), _one("layers", None, stream="x"),
                 modulated="layers.0.attention.qkv", published=Published(teacache=_TEA_LUMINA),
                 policy="Lumina 2 / Z-Image", modulation="Lumina 2 / Z-Image", text_widths=("cap_feat_dim",)),
    Architecture("Wan", ("WanModel",), _one("blocks"), modulated="blocks.0.self_attn.q", published=_WAN,
                 policy="Wan", modulation="Wan", text_widths=("text_dim",)),
    Architecture("HunyuanVideo", ("HunyuanVideo",), _two(), modulated="double_blocks.0.img_attn.qkv",
                 published=_HUNYUAN, policy="Flux", modulation="Flux", text_widths=("context_in_dim",)),
    Architecture("LTXV", ("LTXVModel", "LTXBaseModel"), _one("transformer_blocks"),
                 modulated="transformer_blocks.0.attn1.to_q", published=Published(teacache=_TEA_LTXV),
                 policy="LTXV", modulation="LTXV"),
    Architecture("HiDream", ("HiDreamImageTransformer2DModel",),
                 (Stack("double_stream_blocks", None, "image_tokens", "text_tokens"),
                  Stack("single_stream_blocks", None, "image_tokens", joint=True)),
                 modulated="double_stream_blocks.0.block.attn1.to_q", published=Published(teacache=_TEA_HIDREAM),
                 policy="HiDream"),
    Architecture("Cosmos", ("GeneralDIT",), _one("blocks", None, stream="x"), batch_dim=3,
                 published=Published(teacache=_TEA_COSMOS), policy="Cosmos", text_widths=("crossattn_emb_channels",)),
    Architecture("Cosmos-Predict2", ("MiniTrainDIT",), _one("blocks", None, stream="x_B_T_H_W_D"),
                 modulated="blocks.0.self_attn.q_proj",
                 policy="Cosmos-Predict2", modulation="Cosmos-Predict2", text_widths=("crossattn_emb_channels",)),
    Architecture("AuraFlow", ("aura.mmdit.MMDiT",), _two("double_layers", "single_layers"),
                 policy="AuraFlow", modulation="AuraFlow"),
    Architecture("PixArt", ("PixArtMS",), _one("blocks", None, stream="x"), modulated="blocks.0.attn.qkv",
                 policy="PixArt", modulation="PixArt"),
    Architecture("HunyuanDiT", ("HunYuanDiT",), _one("blocks"), modulated="blocks.0.attn1.Wqkv", policy="HunyuanDiT"),
    Architecture("Mochi", ("AsymmDiTJoint",), _one("blocks"), modulated="blocks.0.attn.qkv_x",
                 published=Published(teacache=_TEA_MOCHI), policy="Mochi"),
    Architecture("Hunyuan3D 2", ("hunyuan3d.model.Hunyuan3Dv2",), _two(),
                 policy="Flux", modulation="Flux", text_widths=("context_in_dim",)),
    Architecture("Stable Audio", ("AudioDiffusionTransformer",), _one("transformer.layers", None),
                 policy="Stable Audio"),
    Architecture("ACE-Step", ("ACEStepTransformer2DModel",), _one("transformer_blocks", None, stream="hidden_states"),
                 policy="ACE-Step"),
    Architecture("ACE-Step 1.5", ("AceStepConditionGenerationModel",),
                 _one("decoder.layers", None, stream="hidden_states"), policy="ACE-Step 1.5"),
    Architecture("Kandinsky 5", ("Kandinsky5",), _one("visual_transformer_blocks", None), policy="Kandinsky 5"),
    Architecture("Lens", ("LensTransformer2DModel",), _one("transformer_blocks"), policy="Lens"),
    Architecture("MageFlow", ("MageFlowTransformer2DModel",), _one("transformer_blocks"),
                 policy="MageFlow", text_widths=("joint_attention_dim",)),
    Architecture("JoyImage", ("JoyImageTransformer3DModel",), _one("double_blocks"),
                 policy="JoyImage", text_widths=("text_dim",)),
    Architecture("MiniMax H3", ("MiniMaxH3Model",), _one("blocks"), policy="MiniMax H3", text_widths=("text_dim",)),
    Architecture("Krea 2", ("SingleStreamDiT",), _one("blocks", None), policy="Krea 2"),
    Architecture("Ideogram 4", ("Ideogram4Transformer",), _one("layers", None), policy="Ideogram 4"),
    Architecture("Ernie Image", ("ErnieImageModel",), _one("layers", None), policy="Ernie Image"),
    Architecture("CogVideoX", ("CogVideoXTransformer3DModel",),
                 _one("blocks", None, stream="hidden_states", second="encoder_hidden_states"), policy="CogVideoX"),
    Architecture("Boogu", ("BooguTransformer2DModel",),
                 (Stack("double_stream_layers", None, "img_hidden_states", "instruct_hidden_states"),
                  Stack("single_stream_layers", None, "hidden_states", joint=True)), policy="Boogu"),
    Architecture("PixelDiT", ("PixDiT_T2I",), _one("patch_blocks", None, second="y"), policy="PixelDiT"),
    Architecture("Omnigen2", ("OmniGen2Transformer2DModel",), _one("layers", None, stream="hidden_states"),
                 modulated="layers.0.attn.to_q", policy="Omnigen2"),
)  # fmt: skip


def architecture_of(network: object) -> Architecture:
    """The row for a network; UNKNOWN where there is none.

    Wrappers the host puts around a network (SD3's signature wrapper, a compiled module) derive from it or hold it as
    `_orig_mod`.
    """
    return row_of(type(getattr(network, "_orig_mod", network)))


def row_of(kind: type) -> Architecture:
    """The row for a network's class: by its name, then by its bases'; UNKNOWN where there is none."""
    for base in kind.__mro__:
        name = f".{base.__module__}.{base.__qualname__}"
        for row in ROWS:
            if any(name.endswith(f".{network}") for network in row.networks):
                return row
    return UNKNOWN
