"""The policy table against the real blocks of every family: shares, groups and GELU inputs are measured."""

from __future__ import annotations

import re
from collections import defaultdict

import comfy.sample
import families
import pytest
import torch
from slipstream.engine.families import architecture_of
from slipstream.quant.policy import DEFAULT, Choice, Policy, Rule, plan, policy_for

# Names that carry the time, the modulation, the embedding or the last layer, whatever the table says of them.
PRECISE = re.compile(
    r"embed|(^|[._])(emb|time|t_block|vector_in|guidance_in|img_in|txt_in|patchify|mod|modulation|first|last|head)"
    r"([._\d]|$)|adaln|modulat|mod[CXF]+\b|_mod\b|norm|final|^proj_(in|out)|tproj|tmlp|distilled_guidance",
    re.IGNORECASE,
)
# Parts that no tiny configuration makes small, next to blocks that are: their share says nothing of the real model.
FIXED_SIZE = re.compile(
    r"^(lyric_|speaker_|img_emb|audio_proj|music_encoder|pooler|mlp_t5|extra_embedder)"
    r"|^(encoder|tokenizer|detokenizer)\."
)
# Where tiny widths distort the share: the least that is asked, and why.
SMALLER_SHARE = {
    "pixeldit": (0.2, "modulation of every pixel of a patch, 3072 wide beside blocks of 64"),
    "pid": (0.2, "as pixeldit"),
    "cogvideox": (0.4, "modulation from a time embedding as wide as the blocks, which is 512 of 3072 in the files"),
    "ace_step": (0.35, "layers that the host builds and never runs, and projectors of training, beside three blocks"),
}
LOWEST_GELU = -0.1721  # the shift of unsigned activations is 0.171875; GELU's minimum is -0.17004


def linears(network) -> dict[str, torch.nn.Module]:
    return {
        name: module for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.ndim == 2
    }  # fmt: skip


def policy_of(network) -> Policy:
    return policy_for(architecture_of(network).policy)


def inputs_of(base, name: str, layers: dict[str, torch.nn.Module]) -> dict[str, list[torch.Tensor]]:
    """What every layer was given in one sampling step, call by call (copies: some blocks add in place)."""
    seen = defaultdict(list)
    hooks = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: seen[layer].append(args[0].detach().clone()))
        for layer, module in layers.items()
    ]
    latent = families.latent(name)
    noise = comfy.sample.prepare_noise(latent, 1)
    conds = families.conditioning(name, 11), families.conditioning(name, 12)
    try:
        with torch.inference_mode():
            comfy.sample.sample(base, noise, 1, 3.0, "euler", "simple", *conds, latent, seed=1, disable_pbar=True)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def share_of(chosen: dict[str, Choice], shapes: dict[str, tuple[int, ...]]) -> float:
    """How much of the linear parameters is quantised, sizes and FIXED_SIZE left aside."""
    counted = {layer: n * k for layer, (n, k) in shapes.items() if not FIXED_SIZE.search(layer)}
    return sum(n for layer, n in counted.items() if chosen[layer].treatment != "keep") / sum(counted.values())


def examine(name: str, policy: Policy | None = None) -> tuple[Policy, float, list[str]]:
    """The policy of the family, the share it quantises, and everything that the family's real run says against it."""
    base = families.make(name)
    layers = linears(base.model.diffusion_model)
    policy = policy or policy_of(base.model.diffusion_model)
    shapes = {layer: tuple(module.weight.shape) for layer, module in layers.items()}
    chosen = plan(shapes, policy, limits=None)
    w4a4 = {layer: choice for layer, choice in chosen.items() if choice.treatment == "w4a4"}
    faults = [f"{layer} has 4-bit activations" for layer in w4a4 if PRECISE.search(layer)]
    groups = defaultdict(list)
    for layer, choice in w4a4.items():
        groups[choice.group].append(layer)
    seen = inputs_of(base, name, {layer: layers[layer] for layer in w4a4})
    for first, *others in groups.values():
        for other in others:
            same = len(seen[first]) == len(seen[other]) and all(map(torch.equal, seen[first], seen[other]))
            if shapes[first][1] != shapes[other][1] or not same:
                faults.append(f"{first} and {other} have different inputs")
    for layer, choice in w4a4.items():
        values = torch.cat([value.flatten() for value in seen[layer]]) if seen[layer] else torch.zeros(0)
        lowest = float(values.min()) if len(values) else 0.0
        if choice.after_gelu and lowest < LOWEST_GELU:
            faults.append(f"{layer} receives {lowest:.4f}, which no GELU gives")
        # of many values some reach the minimum itself, and none is below
        if policy is not DEFAULT and not choice.after_gelu and len(values) > 2000 and -0.1701 < lowest < -0.1699:
            faults.append(f"{layer} receives {lowest:.4f} at least, which looks like a GELU")
    return policy, share_of(chosen, shapes), faults


@pytest.mark.parametrize("name", families.available())
def test_the_table_fits_the_family(name, record_property):
    policy, share, faults = examine(name)
    record_property("quantised", f"{policy.name}: {share:.2f}")
    assert not faults, "\n".join(faults)
    if policy is not DEFAULT:
        assert share >= SMALLER_SHARE.get(name, (0.5,))[0], f"{policy.name}: only {share:.2f} is quantised"


@pytest.mark.parametrize(
    ("name", "rule", "fault"),
    [
        ("lumina2", Rule(r"(layers\..*)\.w2", "w4a4", after_gelu=True, feeder=r"\1.w1"), "no GELU gives"),
        ("wan21", Rule(r"(blocks\.\d+\.cross_attn)\.[qkv]", "w4a4", r"\1.qkv"), "different inputs"),
        ("ltxv", Rule(r"(transformer_blocks\.\d+)\.attn\d\.to_[qkv]", "w4a4", r"\1.qkv"), "different inputs"),
        ("cosmos", Rule(r"(blocks\.block\d+\.blocks\.\d)\..*to_[qkv]\.0", "w4a4", r"\1"), "different inputs"),
        ("qwen_image", Rule(r".*img_mod\.1", "w4a4"), "4-bit activations"),
        ("flux", Rule(r".*mlp\.2", "w4a4"), "looks like a GELU"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_noticed(name, rule, fault):
    faults = examine(name, Policy("wrong", (rule,)))[2]
    assert any(fault in line for line in faults), faults
