"""Which linear layers of a network are quantised, and how: named sets of regular expressions over the host's own layer
names. Rows are data, and the rows of `engine/families.py` name them; a name that none has gives the careful DEFAULT.

Sources, named in each rule's `why`: nunchaku 3a3cc3d and deepcompressor 69f3473 (what published SVDQuant checkpoints
quantise and skip), TFMQ-DM (what carries the time stays precise), Q-Diffusion (a shortcut's two ranges), MixDQ (the
first token of a prompt is an outlier), ComfyUI's own block sources (what feeds a layer).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

TREATMENTS = {
    "w4a4": "4-bit weights and activations",
    "w4a16": "4-bit weights, 16-bit activations",
    "w8a8": "8-bit weights and activations",
    "keep": "left as it is",
}
INT8_GAIN_DB = 20 * math.log10(127 / 7)  # 25.2 dB: how much finer 127 levels are than 7 for the same largest value


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to the layers whose whole name matches.

    group: template (`\\1`) of the key of the layers that receive the same input, and so share one smooth factor and one
    down-projection. after_gelu: the input comes straight from a GELU and is never below -0.17005, so that unsigned
    activations fit after the shift of 0.171875. feeder: template of the layer before that GELU; where it has another
    number of outputs than this layer has inputs, the activation is a gated one and after_gelu is dropped (Flux.2 has
    SwiGLU under the names of Flux).
    """

    pattern: str
    treatment: str
    group: str = ""
    after_gelu: bool = False
    why: str = ""
    feeder: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """A set of rules, first match wins; a layer that none matches is kept.

    name: of the first family that has it; smallest_side: layers with fewer inputs or outputs are kept.
    """

    name: str
    rules: tuple[Rule, ...]
    smallest_side: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """What happens to one layer. group: the same for w4a4 layers that share their input, else the layer's own name."""

    treatment: str
    group: str
    after_gelu: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Layers below these are kept. values: N * K; multiple: of K, what the kernels load at once; inputs: K."""

    values: int = 2**16
    multiple: int = 16
    inputs: int = 64


LIMITS = Limits()

_SVDQ = "as in nunchaku's SVDQuant checkpoints"
_LIKE = "a block's linear layer, as SVDQuant takes in every published family"
_GELU = "its input comes from a GELU: unsigned activations, as in nunchaku"
_MOD = "modulation: W4A16 in nunchaku and deepcompressor, never 4-bit activations (TFMQ-DM)"
_KEEP_MOD = "modulation: kept (TFMQ-DM; deepcompressor skips it for PixArt and SANA)"
_TEXT = "keys and values of the prompt: few tokens, the first an outlier (MixDQ); nunchaku and deepcompressor skip them"
_REFINER = "a refiner ahead of the main blocks: nunchaku leaves it optional"
_REST = "no rule for it: embedders, time, side branches, first and last layers stay (nunchaku, deepcompressor, TFMQ-DM)"


def _w4(*patterns: str, group: str = "", why: str = _LIKE) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, "w4a4", group, why=why) for pattern in patterns)


def _gelu(pattern: str, feeder: str, why: str = _GELU) -> tuple[Rule, ...]:
    return (Rule(pattern, "w4a4", after_gelu=True, why=why, feeder=feeder),)


def _w8(*patterns: str, why: str = _TEXT) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, "w8a8", why=why) for pattern in patterns)


def _w4a16(*patterns: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, "w4a16", why=_MOD) for pattern in patterns)


def _keep(*patterns: str, why: str = _KEEP_MOD) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, "keep", why=why) for pattern in patterns)


_D = r"double_blocks\.\d+\."
_FLUX = (
    *_w4(_D + r"(?:img|txt)_attn\.(?:qkv|proj)", _D + r"(?:img|txt)_mlp\.0", why=_SVDQ),
    *_gelu(rf"({_D}(?:img|txt)_mlp)\.2", r"\1.0"),
    *_w4(rf"({_D}(?:img|txt)_mlp)\.(?:gate|up)_proj", group=r"\1.gate_up"),
    *_w4(_D + r"(?:img|txt)_mlp\.down_proj"),
    *_w4(r"single_blocks\.\d+\.linear1", why=_SVDQ),
    *_w4(r"single_blocks\.\d+\.linear2", why="attention and GELU side by side along K: signed activations"),
    *_w4a16(_D + r"(?:img|txt)_mod\.lin", r"single_blocks\.\d+\.modulation\.lin"),
    *_keep(r"(?:double|single)_stream_modulation\w*\.lin"),
)

_T = r"transformer_blocks\.\d+\."
_QWEN = (
    *_w4(rf"({_T}attn)\.to_[qkv]", group=r"\1.qkv", why=_SVDQ),
    *_w4(rf"({_T}attn)\.add_[qkv]_proj", group=r"\1.add_qkv", why=_SVDQ),
    *_w4(_T + r"attn\.(?:to_out\.0|to_add_out)", _T + r"(?:img|txt)_mlp\.net\.0\.proj", why=_SVDQ),
    *_gelu(rf"({_T}(?:img|txt)_mlp\.net)\.2", r"\1.0.proj"),
)

# SwiGLU: w1 and w3 share their input, w2 gets their product, which is signed.
_NEXTDIT = r"(?:attention\.(?:qkv|out)|feed_forward\.w[123])"
_OMNI = r"(?:attn\.to_(?:[qkv]|out\.0)|feed_forward\.linear_[123])"
_REFINERS = r"(?:noise|context|ref_image)_refiner\.\d+\."

ROWS: tuple[Policy, ...] = (
    Policy("Stable Diffusion U-Net", (
        *_w4(r"(.*transformer_blocks\.\d+\.attn1)\.to_[qkv]", group=r"\1.qkv", why=_SVDQ),
        *_w4(r".*transformer_blocks\.\d+\.attn[12]\.to_out\.0", r".*transformer_blocks\.\d+\.attn2\.to_q",
             r".*transformer_blocks\.\d+\.ff\.net\.0\.proj", why=_SVDQ),
        *_w4(r".*transformer_blocks\.\d+\.ff\.net\.2", why="its input comes from a GEGLU, which is signed (nunchaku)"),
        *_keep(r".*\.attn2\.to_[kv]", why=_TEXT),
    )),
    Policy("SD3", (
        *_w4(r"joint_blocks\.\d+\.(?:context|x)_block\.attn2?\.(?:qkv|proj)",
             r"joint_blocks\.\d+\.(?:context|x)_block\.mlp\.fc1"),
        *_gelu(r"(joint_blocks\.\d+\.(?:context|x)_block\.mlp)\.fc2", r"\1.fc1"),
        *_keep(r".*adaLN_modulation.*"),
    )),
    Policy("Flux", _FLUX),
    Policy("Qwen-Image", (
        *_QWEN,
        *_keep(r"transformer_blocks\.0\.img_mod\.1", why="the first block's modulation: grain at 4 bit (mflux-cv)"),
        *_w4a16(_T + r"(?:img|txt)_mod\.1"),
    )),
    Policy("Lumina 2 / Z-Image", (
        *_w8(_REFINERS + _NEXTDIT, why=_REFINER),
        *_w4(r"(layers\.\d+\.feed_forward)\.w[13]", group=r"\1.w13", why=_SVDQ),
        *_w4(r"layers\.\d+\." + _NEXTDIT, why=_SVDQ),
        *_keep(r".*adaLN_modulation.*", why="modulation: 16 bit in nunchaku's Z-Image"),
    )),
    Policy("Wan", (
        *_w4(r"((?:vace_)?blocks\.\d+\.self_attn)\.[qkv]", group=r"\1.qkv"),
        *_w4(r"(?:vace_)?blocks\.\d+\.(?:self_attn\.o|cross_attn\.[qo]|ffn\.0)"),
        *_gelu(r"((?:vace_)?blocks\.\d+\.ffn)\.2", r"\1.0"),
        *_w8(r"(?:vace_)?blocks\.\d+\.cross_attn\.[kv](?:_img)?"),
        *_w4(r"blocks\.\d+\.audio_cross_attn_wrapper\.audio_cross_attn\.[qo]"),
        *_w8(r"blocks\.\d+\.audio_cross_attn_wrapper\.audio_cross_attn\.[kv]"),
    )),
    Policy("LTXV", (
        *_w4(rf"({_T}(?:audio_)?attn1)\.to_[qkv]", group=r"\1.qkv"),
        *_w8(_T + r"(?:audio_)?attn2\.to_[kv]"),
        *_w4(rf"({_T}(?:audio_to_video|video_to_audio)_attn)\.to_[kv]", group=r"\1.kv"),
        *_w4(_T + r"\w*attn[12]?\.(?:to_q|to_out\.0)", _T + r"(?:audio_)?ff\.net\.0\.proj"),
        *_gelu(rf"({_T}(?:audio_)?ff\.net)\.2", r"\1.0.proj"),
    )),
    Policy("HiDream", (
        *_w4(r"((?:double|single)_stream_blocks\.\d+\.block\.attn1)\.to_[qkv]", group=r"\1.qkv"),
        *_w4(r"(double_stream_blocks\.\d+\.block\.attn1)\.to_[qkv]_t", group=r"\1.qkv_t"),
        *_w4(r"(?:double|single)_stream_blocks\.\d+\.block\.attn1\.to_out(?:_t)?"),
        *_w4(r"((?:double|single)_stream_blocks\.\d+\.block\.ff_[it](?:\.shared_experts|\.experts\.\d+)?)\.w[13]",
             group=r"\1.w13"),
        *_w4(r"(?:double|single)_stream_blocks\.\d+\.block\.ff_[it](?:\.shared_experts|\.experts\.\d+)?\.w2"),
        *_keep(r".*\.gate", why="chooses the experts: tiny, and an error changes which ones run"),
        *_keep(r".*adaLN_modulation.*"),
    )),
    # The released networks all have the blocks self-attention, cross-attention, MLP in this order ("FA-CA-MLP").
    Policy("Cosmos", (
        *_w4(r"(blocks\.block\d+\.blocks\.0\.block\.attn)\.to_[qkv]\.0", group=r"\1.qkv"),
        *_w8(r"blocks\.block\d+\.blocks\.1\.block\.attn\.to_[kv]\.0"),
        *_w4(r"blocks\.block\d+\.blocks\.[01]\.block\.attn\.to_(?:q|out)\.0",
             r"blocks\.block\d+\.blocks\.2\.block\.layer1"),
        *_gelu(r"(blocks\.block\d+\.blocks\.2\.block)\.layer2", r"\1.layer1"),
        *_keep(r".*adaLN_modulation.*"),
    )),
    Policy("Cosmos-Predict2", (
        *_w4(r"(blocks\.\d+\.self_attn)\.[qkv]_proj", group=r"\1.qkv"),
        *_w8(r"blocks\.\d+\.cross_attn\.[kv]_proj"),
        *_w4(r"blocks\.\d+\.(?:self|cross)_attn\.(?:q|output)_proj", r"blocks\.\d+\.mlp\.layer1"),
        *_gelu(r"(blocks\.\d+\.mlp)\.layer2", r"\1.layer1"),
        *_keep(r".*adaln_modulation.*"),
    )),
    Policy("AuraFlow", (
        *_w4(r"((?:double|single)_layers\.\d+\.attn\.w[12])[qkv]", group=r"\1qkv"),
        *_w4(r"(?:double|single)_layers\.\d+\.attn\.w[12]o"),
        *_w4(r"((?:double|single)_layers\.\d+\.mlp[CX]?)\.c_fc[12]", group=r"\1.c_fc12"),
        *_w4(r"(?:double|single)_layers\.\d+\.mlp[CX]?\.c_proj"),
        *_keep(r".*\.mod(?:C|X|CX)\.1"),
    )),
    Policy("PixArt", (
        *_w4(r"blocks\.\d+\.attn\.(?:qkv|proj)", r"blocks\.\d+\.cross_attn\.(?:q_linear|proj)",
             r"blocks\.\d+\.mlp\.fc1", why="as in deepcompressor's PixArt"),
        *_gelu(r"(blocks\.\d+\.mlp)\.fc2", r"\1.fc1"),
        *_keep(r"blocks\.\d+\.cross_attn\.kv_linear", why="deepcompressor skips it (attn_add)"),
    )),
    Policy("HunyuanDiT", (
        *_w4(r"blocks\.\d+\.attn1\.(?:Wqkv|out_proj)", r"blocks\.\d+\.attn2\.(?:q_proj|out_proj)",
             r"blocks\.\d+\.mlp\.fc1"),
        *_gelu(r"(blocks\.\d+\.mlp)\.fc2", r"\1.fc1"),
        *_w8(r"blocks\.\d+\.attn2\.kv_proj"),
        *_w8(r"blocks\.\d+\.skip_linear", why="a shortcut: two ranges side by side along K (Q-Diffusion)"),
        *_keep(r".*default_modulation.*"),
    )),
    Policy("Mochi", (
        *_w4(r"blocks\.\d+\.attn\.(?:qkv|proj)_[xy]", r"blocks\.\d+\.mlp_[xy]\.w[12]"),
        *_keep(r"blocks\.\d+\.mod_[xy]"),
    )),
    Policy("Stable Audio", (
        *_w4(r"transformer\.layers\.\d+\.self_attn\.to_(?:qkv|out)",
             r"transformer\.layers\.\d+\.cross_attn\.to_(?:q|out)",
             r"transformer\.layers\.\d+\.ff\.ff\.(?:0\.proj|2)", why=f"{_LIKE}; its MLP is gated by a SiLU"),
        *_w8(r"transformer\.layers\.\d+\.cross_attn\.to_kv"),
    )),
    Policy("ACE-Step", (
        *_w4(rf"({_T}attn)\.to_[qkv]", group=r"\1.qkv"),
        *_w8(_T + r"cross_attn\.to_[kv]"),
        *_w4(_T + r"(?:cross_)?attn\.to_(?:q|out\.0)"),
    )),
    Policy("ACE-Step 1.5", (
        *_w4(r"(decoder\.layers\.\d+\.self_attn)\.[qkv]_proj", group=r"\1.qkv"),
        *_w8(r"decoder\.layers\.\d+\.cross_attn\.[kv]_proj"),
        *_w4(r"decoder\.layers\.\d+\.(?:self|cross)_attn\.[qo]_proj", r"decoder\.layers\.\d+\.mlp\.down_proj"),
        *_w4(r"(decoder\.layers\.\d+\.mlp)\.(?:gate|up)_proj", group=r"\1.gate_up"),
    )),
    Policy("Kandinsky 5", (
        *_w8(r"text_transformer_blocks\.\d+\.(?:self_attention|feed_forward)\.\w+", why=_REFINER),
        *_w4(r"(visual_transformer_blocks\.\d+\.self_attention)\.to_(?:query|key|value)", group=r"\1.qkv"),
        *_w8(r"visual_transformer_blocks\.\d+\.cross_attention\.to_(?:key|value)"),
        *_w4(r"visual_transformer_blocks\.\d+\.(?:self|cross)_attention\.(?:to_query|out_layer)",
             r"visual_transformer_blocks\.\d+\.feed_forward\.in_layer"),
        *_gelu(r"(visual_transformer_blocks\.\d+\.feed_forward)\.out_layer", r"\1.in_layer"),
        *_keep(r".*modulation.*"),
    )),
    Policy("Lens", (
        *_w4(_T + r"attn\.(?:(?:img|txt)_qkv|to_out\.0|to_add_out)", _T + r"(?:img|txt)_mlp\.w2"),
        *_w4(rf"({_T}(?:img|txt)_mlp)\.w[13]", group=r"\1.w13"),
        *_keep(_T + r"(?:img|txt)_mod\.1"),
    )),
    Policy("MageFlow", (*_QWEN, *_keep(_T + r"(?:img|txt)_mod\.1"))),
    Policy("JoyImage", (
        *_w4(_D + r"attn\.(?:img|txt)_attn_(?:qkv|proj)", _D + r"(?:img|txt)_mlp\.net\.0\.proj"),
        *_gelu(rf"({_D}(?:img|txt)_mlp\.net)\.2", r"\1.0.proj"),
    )),
    Policy("MiniMax H3", (
        *_w8(r"token_refiner\.blocks\.\d+\.(?:attn|mlp)\.\w+", why=_REFINER),
        *_w4(r"blocks\.\d+\.attn\.(?:qkv|out)_proj", r"blocks\.\d+\.mlp\.fc[12]"),
        *_keep(r".*adaln_proj.*"),
    )),
    Policy("Krea 2", (
        *_w4(r"(blocks\.\d+\.attn)\.(?:w[qkv]|gate)", group=r"\1.qkvg"),
        *_w4(r"(blocks\.\d+\.mlp)\.(?:gate|up)", group=r"\1.gate_up"),
        *_w4(r"blocks\.\d+\.(?:attn\.wo|mlp\.down)"),
    )),
    Policy("Ideogram 4", (
        *_w4(r"(layers\.\d+\.feed_forward)\.w[13]", group=r"\1.w13"),
        *_w4(r"layers\.\d+\.(?:attention\.(?:qkv|o)|feed_forward\.w2)"),
        *_keep(r".*adaln_modulation"),
    )),
    Policy("Ernie Image", (
        *_w4(r"(layers\.\d+\.self_attention)\.to_[qkv]", group=r"\1.qkv"),
        *_w4(r"(layers\.\d+\.mlp)\.(?:gate|up)_proj", group=r"\1.gate_up"),
        *_w4(r"layers\.\d+\.(?:self_attention\.to_out\.0|mlp\.linear_fc2)"),
    )),
    Policy("CogVideoX", (
        *_w4(r"(blocks\.\d+)\.[qkv]", group=r"\1.qkv"),
        *_w4(r"blocks\.\d+\.(?:attn_out|ff_proj)"),
        *_gelu(r"(blocks\.\d+)\.ff_out", r"\1.ff_proj"),
        *_keep(r"blocks\.\d+\.norm[12]\.linear"),
    )),
    Policy("Boogu", (
        *_w8(_REFINERS + _OMNI, why=_REFINER),
        *_w4(r"((?:double|single)_stream_layers\.\d+\.(?:img_self_)?attn)\.to_[qkv]", group=r"\1.qkv"),
        *_w4(r"(double_stream_layers\.\d+\.img_instruct_attn\.processor\.(?:img|instruct))_to_[qkv]",
             group=r"\1_qkv"),
        *_w4(r"((?:double|single)_stream_layers\.\d+\.(?:\w+_)?feed_forward)\.linear_[13]", group=r"\1.linear_13"),
        *_w4(r"(?:double|single)_stream_layers\.\d+\.(?:\w+_)?(?:attn\.to_out\.0|feed_forward\.linear_2)",
             r"double_stream_layers\.\d+\.img_instruct_attn\.processor\.(?:img|instruct)_out"),
        *_keep(r".*norm\d\.linear"),
    )),
    Policy("PixelDiT", (
        *_w4(r"patch_blocks\.\d+\.attn\.(?:qkv|proj)_[xy]", r"patch_blocks\.\d+\.mlp_[xy]\.w2"),
        *_w4(r"(patch_blocks\.\d+\.mlp_[xy])\.w[13]", group=r"\1.w13"),
        *_keep(r".*adaLN_modulation.*"),
    )),
    Policy("Omnigen2", (
        *_w8(_REFINERS + _OMNI, why=_REFINER),
        *_w4(r"(layers\.\d+\.attn)\.to_[qkv]", group=r"\1.qkv"),
        *_w4(r"(layers\.\d+\.feed_forward)\.linear_[13]", group=r"\1.linear_13"),
        *_w4(r"layers\.\d+\." + _OMNI),
        *_keep(r".*norm1\.linear"),
    )),
)  # fmt: skip

_CAREFUL = "an unknown network, and this name sounds like embedding, time, modulation, norm, router or last layer"
DEFAULT = Policy(
    "unknown network",
    (
        *_keep(r"(?i:.*(?:embed|emb[._]|time|adaln|modul|(?:^|[._])mod[._]|norm|final|last).*)",
               r"(?:.*\.)?(?:gate|router|mapper(?:_\w+)?)", why=_CAREFUL),
        *_w8(r".*(?:cross\w*|attn2)\.(?:\w+\.)*(?:to_)?(?:k|v|kv|key|value)(?:_proj|_linear)?(?:\.\d+)?"),
        *_w4(r"(?:.*\.)?\w+\.\d+\..+", why="an unknown network: a linear layer inside of its repeated blocks"),
    ),
    smallest_side=256,
)  # fmt: skip


def policy_for(name: str) -> Policy:
    """The set of rules of that name, as a family's row has it; DEFAULT for any other."""
    return next((row for row in ROWS if row.name == name), DEFAULT)


# A search may try every way to share a name out over the repeats, and every way again for a repeat of a repeat.
MOST_REPEATS, LONGEST_PATTERN = 3, 300


def _may_take_for_ever(pattern: str) -> bool:
    """Whether searching a layer's name for this could take longer than a person waits."""
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern, flags=re.DOTALL)  # without escapes and sets of characters
    repeats = re.sub(r"\(\?", "(", bare)  # what follows "(?" is no repeat
    return (
        len(pattern) > LONGEST_PATTERN
        or len(re.findall(r"[*+?{]", repeats)) > MOST_REPEATS
        or bool(re.search(r"\)[*+{]", repeats))
    )


def parse_overrides(text: str) -> tuple[Rule, ...]:
    """Rules from lines `regular expression = treatment`; empty lines and lines that start with # are skipped.

    The expression may match anywhere in a layer's name. Raises ValueError with one sentence that names the bad line.
    """
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        pattern, equals, treatment = (part.strip() for part in line.rpartition("="))
        if not equals or not pattern or treatment not in TREATMENTS:
            raise ValueError(
                f"Line {number} of the layer overrides, '{line}', is not understood: write a part of the layer names, "
                f"'=', and one of {', '.join(TREATMENTS)}, for example 'img_mlp.2 = w8a8'."
            )
        if _may_take_for_ever(pattern):
            raise ValueError(
                f"Line {number} of the layer overrides, '{line}', repeats too much before '=': use at most "
                f"{MOST_REPEATS} of * + ? {{}} and none of them after a bracket, or write a part of the layer names."
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"Line {number} of the layer overrides, '{line}', has no valid regular expression before '=' "
                f"({error}): write a part of the layer names, for example 'double_blocks.0.' or 'img_mlp'."
            ) from None
        rules.append(Rule(pattern, treatment, why=f"your line '{line}'"))
    return tuple(rules)


def plan(
    names_and_shapes: Mapping[str, tuple[int, ...]],
    policy: Policy,
    overrides: str = "",
    limits: Limits | None = LIMITS,
) -> dict[str, Choice]:
    """What happens to every linear layer, in the order given.

    names_and_shapes: layer name (without ".weight") to the shape of its weight, (N, K); those of another number of
    dimensions (convolutions) are left out. overrides: see `parse_overrides`; they go before the policy's rules.
    limits: None ignores sizes. Raises ValueError for an override that is not understood or that no layer matches.
    """
    sizes = {name: shape for name, shape in names_and_shapes.items() if len(shape) == 2}
    typed = parse_overrides(overrides)
    for rule in typed:
        if not any(re.search(rule.pattern, name) for name in sizes):
            raise ValueError(
                f"No linear layer of this model has a name that '{rule.pattern}' from the layer overrides matches: "
                f"write a part of a name such as '{next(iter(sizes), '')}'."
            )
    choices = {name: _choose(name, sizes, policy, typed, limits) for name in sizes}
    return _without_mixed_groups(choices, sizes)


def _choose(
    name: str, sizes: Mapping[str, tuple[int, ...]], policy: Policy, typed: Sequence[Rule], limits: Limits | None
) -> Choice:
    rule, match = None, None
    for candidate in policy.rules:
        if match := re.fullmatch(candidate.pattern, name):
            rule = candidate
            break
    chosen = next((r for r in typed if re.search(r.pattern, name)), rule)
    if chosen is None:
        return Choice("keep", name, why=_REST)
    if chosen.treatment == "keep":
        return Choice("keep", name, why=chosen.why)
    outputs, inputs = sizes[name]
    if limits and (small := _too_small(outputs, inputs, limits, 0 if chosen in typed else policy.smallest_side)):
        return Choice("keep", name, why=small)
    if chosen.treatment != "w4a4" or rule is None or match is None:
        return Choice(chosen.treatment, name, why=chosen.why)
    # What feeds a layer is a fact of the network: it also holds where the user chose the treatment.
    group = match.expand(rule.group) if rule.group else name
    feeder = match.expand(rule.feeder) if rule.feeder else ""
    gelu = rule.after_gelu and feeder in sizes and sizes[feeder][0] == inputs
    gated = chosen is rule and rule.after_gelu and not gelu
    return Choice(
        "w4a4", group, gelu, "its input comes from a gated activation, which is signed" if gated else chosen.why
    )


def _too_small(outputs: int, inputs: int, limits: Limits, smallest_side: int) -> str:
    if inputs % limits.multiple:
        return f"{inputs} inputs are not a multiple of {limits.multiple}"
    if inputs < limits.inputs or outputs * inputs < limits.values:
        return f"small ({outputs} x {inputs}): nothing to gain"
    if min(outputs, inputs) < smallest_side:
        return f"small ({outputs} x {inputs}) for a layer of an unknown network"
    return ""


def _without_mixed_groups(choices: dict[str, Choice], sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Choice]:
    """A group whose members have different K cannot share an input (attention given a context): each stands alone."""
    widths: dict[str, set[int]] = {}
    for name, choice in choices.items():
        widths.setdefault(choice.group, set()).add(sizes[name][1])
    return {
        name: choice if len(widths[choice.group]) == 1 else replace(choice, group=name)
        for name, choice in choices.items()
    }


def _raised(sqnr_db: Mapping[str, float], share: float | None, floor_db: float | None) -> list[tuple[str, str, str]]:
    """(layer, treatment, reason), worst first."""
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"The share of layers to protect is {share}: give a number from 0 to 1, for example 0.05.")
    value = {name: -math.inf if math.isnan(db) else db for name, db in sqnr_db.items()}
    order = sorted(value, key=lambda name: (value[name], name))
    worst = math.ceil((share or 0) * len(order) - 1e-9)
    floor = -math.inf if floor_db is None else floor_db
    raised = []
    for rank, name in enumerate(order):
        if value[name] + INT8_GAIN_DB < floor:
            raised.append((name, "keep", f"{value[name]:.1f} dB at 4 bit: 8 bit would miss {floor:g} dB too"))
        elif value[name] < floor:
            raised.append((name, "w8a8", f"{value[name]:.1f} dB at 4 bit is below {floor:g} dB"))
        elif rank < worst:
            raised.append((name, "w8a8", f"{value[name]:.1f} dB at 4 bit, number {rank + 1} of the worst {worst}"))
    return raised


def protect(sqnr_db: Mapping[str, float], share: float | None, floor_db: float | None) -> dict[str, str]:
    """New treatments for the layers that 4 bit hurts most, worst first, ties by name.

    sqnr_db: per layer 10 log10(|y|^2 / |y_q - y|^2) of its own output at W4A4, NaN counts as worst. Raised to w8a8 are
    the worst `share` of the layers (0 to 1, rounded up) and every layer below floor_db; to keep (16 bit) those that
    INT8_GAIN_DB would not lift to floor_db. None switches a rule off. `protection_reasons` says why.
    """
    return {name: treatment for name, treatment, _ in _raised(sqnr_db, share, floor_db)}


def protection_reasons(sqnr_db: Mapping[str, float], share: float | None, floor_db: float | None) -> dict[str, str]:
    """One reason for every layer that `protect` raises, in the same order."""
    return {name: reason for name, _, reason in _raised(sqnr_db, share, floor_db)}
