"""nunchaku's FLUX.1 files: bit layouts in both directions, names, and what happens to damaged files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.kernels.reference import GELU_SHIFT
from slipstream.quant.nunchaku import (
    DOUBLE,
    DOUBLE_MODULATION,
    DOUBLE_NORMS,
    OUTSIDE,
    SINGLE,
    SINGLE_NORMS,
    NunchakuLayer,
    blocks_of,
    plain_weights,
    unpack_layer,
    unpack_modulation,
    w4a4_layers,
)

from lab.nunchaku import pack_layer, pack_modulation

D = 128  # width of the made-up checkpoint; its MLP is 256 wide
RANK = 16


def layer(n: int, k: int, rank: int = RANK, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> NunchakuLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return NunchakuLayer(
        codes=torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8),
        scales=normal(k // 64, n),
        smooth=normal(k).abs() + 0.5,
        down=normal(k, rank),
        up=normal(n, rank),
        bias=normal(n),
    )


def same(a: NunchakuLayer, b: NunchakuLayer) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("codes", "scales", "smooth", "down", "up", "bias"))


sizes = st.integers(1, 3).map(lambda tiles: tiles * 128)
dtypes = st.sampled_from([torch.float16, torch.bfloat16])


@settings(max_examples=15, deadline=None)
@given(sizes, sizes, st.sampled_from([0, 16, 32, 48]), st.integers(0, 99), dtypes)
def test_unpacking_undoes_packing(n, k, rank, seed, dtype):
    natural = layer(n, k, rank, seed, dtype)
    packed = pack_layer(natural, "block.fc")
    assert packed["block.fc.qweight"].shape == (n, k // 2) and packed["block.fc.wscales"].shape == (k // 64, n)
    assert same(unpack_layer(packed, "block.fc"), natural)


@settings(max_examples=10, deadline=None)
@given(sizes, sizes, st.integers(0, 99))
def test_packing_undoes_unpacking(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    packed = pack_layer(layer(n, k), "a")
    packed["a.qweight"] = torch.randint(-128, 128, (n, k // 2), generator=generator).to(torch.int8)
    again = pack_layer(unpack_layer(packed, "a"), "a")
    assert again.keys() == packed.keys() and all(torch.equal(again[key], packed[key]) for key in packed)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 40))
def test_padding_is_cut_off_again(n, groups, rank):
    natural = layer(n, groups * 64, rank)
    read = unpack_layer(pack_layer(natural, "a"), "a", shape=(n, groups * 64))
    assert not read.down[:, rank:].any() and not read.up[:, rank:].any()
    cut = {"down": read.down[:, :rank], "up": read.up[:, :rank]}
    assert same(NunchakuLayer(read.codes, read.scales, read.smooth, bias=read.bias, **cut), natural)


def test_codes_and_scales_lie_where_the_tensor_cores_load_them():
    """Positions written down from deepcompressor's packer: m16n8k64 fragments, and the scale order of its comments."""
    natural = layer(256, 128)
    packed = pack_layer(natural, "a")
    words = packed["a.qweight"].view(torch.int32).reshape(-1).tolist()
    for n, k in ((0, 0), (5, 63), (13, 40), (127, 127), (200, 70), (255, 1)):
        tile, inside = (n // 128) * 2 + k // 64, n % 128
        lane = inside % 8 * 4 + k % 32 // 8
        word = ((tile * 8 + inside // 16) * 32 + lane) * 4 + inside % 16 // 8 * 2 + k % 64 // 32
        assert (words[word] >> k % 8 * 4) & 15 == int(natural.codes[n, k]) & 15, (n, k)
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 16, 17, 24, 25]
    assert torch.equal(packed["a.wscales"].reshape(2, 2, 128)[0, 1, :20], natural.scales[1, order])
    assert torch.equal(packed["a.bias"][128:148], natural.bias[[128 + n for n in order]])


def modulation(splits: int, width: int = 64, k: int = 128, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    n = splits * width
    codes = torch.randint(0, 16, (n, k), generator=generator)
    scales = (2.0 ** torch.randint(-6, 0, (k // 64, n), generator=generator)).bfloat16()
    return codes, scales, -7 * scales, torch.randint(-9, 9, (n,), generator=generator).bfloat16()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([3, 6]), st.sampled_from([4, 64, 100]), st.integers(1, 4), st.integers(0, 99))
def test_modulation_is_dequantised_in_the_original_order(splits, width, groups, seed):
    codes, scales, zeros, bias = modulation(splits, width, groups * 64, seed)
    packed = pack_modulation(codes, scales, zeros, bias, "norm.linear", splits)
    assert packed["norm.linear.qweight"].shape == (splits * width // 4, groups * 32)
    weight, read = unpack_modulation(packed, "norm.linear", splits)
    wanted = (codes - 7) * scales.repeat_interleave(64, 0).t()
    assert torch.equal(weight, wanted.bfloat16()) and torch.equal(read, bias)


def test_modulation_lies_as_tinychat_reads_it():
    codes, scales, zeros, bias = modulation(6)
    packed = pack_modulation(codes, scales, zeros, bias, "a", 6)
    for position in (0, 1, 4, 5, 7, 383):
        channel, split = divmod(position, 6)
        assert packed["a.bias"][position] == bias[split * 64 + channel] + (split in (1, 4))
    words = packed["a.qweight"].view(torch.int16).reshape(-1).tolist()
    for row, k in ((0, 0), (7, 63), (101, 100), (383, 127)):  # rows of the file: channel * 6 + split
        word = (row // 4 * 2 + k // 64) * 64 + row % 4 * 16 + k % 64 // 32 * 8 + k % 8
        natural = row % 6 * 64 + row // 6
        assert (words[word] >> k % 32 // 8 * 4) & 15 == int(codes[natural, k]), (row, k)


def test_groups_that_tinychat_padded_are_read():
    packed = pack_modulation(*modulation(3), "a", 3)
    wanted = unpack_modulation(packed, "a", 3)
    for key in ("a.wscales", "a.wzeros"):
        packed[key] = torch.nn.functional.pad(packed[key], (0, 0, 0, 14))
    assert all(map(torch.equal, unpack_modulation(packed, "a", 3), wanted))


def checkpoint(doubles: int = 2, singles: int = 2) -> dict[str, torch.Tensor]:
    """Every name of a FLUX.1 file, tiny."""
    tensors: dict[str, torch.Tensor] = {}
    shapes = {"qkv_proj": (3 * D, D), "out_proj": (D, D), "mlp_fc1": (2 * D, D), "mlp_fc2": (D, 2 * D)}
    for i in range(doubles):
        for number, name in enumerate(DOUBLE):
            n, k = shapes[name.replace("_context", "")]
            tensors |= pack_layer(layer(n, k, seed=100 * i + number), f"transformer_blocks.{i}.{name}")
        for name in DOUBLE_MODULATION:
            tensors |= pack_modulation(*modulation(6, D, D, i), f"transformer_blocks.{i}.{name}", 6)
        tensors |= {f"transformer_blocks.{i}.{name}.weight": torch.rand(16) for name in DOUBLE_NORMS}
    for i in range(singles):
        smooth = layer(D, D, seed=i).smooth
        for number, name in enumerate(SINGLE):
            part = layer(*shapes[name], seed=1000 + 100 * i + number)
            shared = {f: getattr(part, f) for f in ("codes", "scales", "down", "up", "bias")}
            part = NunchakuLayer(smooth=smooth if shapes[name][1] == D else part.smooth, **shared)
            tensors |= pack_layer(part, f"single_transformer_blocks.{i}.{name}")
        tensors |= pack_modulation(*modulation(3, D, D, i), f"single_transformer_blocks.{i}.norm.linear", 3)
        tensors |= {f"single_transformer_blocks.{i}.{name}.weight": torch.rand(16) for name in SINGLE_NORMS}
    for key in [key for key in tensors if key.endswith(".smooth")]:
        tensors[f"{key}_orig"] = tensors[key]
    for number, name in enumerate(OUTSIDE):
        tensors[f"{name}.weight"] = torch.full((2 * D, 64), float(number)).bfloat16()
        tensors[f"{name}.bias"] = torch.arange(2.0 * D).bfloat16()
    return tensors


def test_every_name_of_a_checkpoint_finds_its_place():
    tensors = checkpoint()
    assert blocks_of(tensors) == (2, 2)
    layers, weights = dict(w4a4_layers(tensors)), dict(plain_weights(tensors))
    block = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    wanted = {f"double_blocks.{i}.{stream}_{name}" for i in range(2) for stream in ("img", "txt") for name in block}
    wanted |= {f"single_blocks.{i}.linear{part}" for i in range(2) for part in (1, 2)}
    assert layers.keys() == wanted
    names = {key.rpartition(".")[0] for key in weights}
    streams = [(f"double_blocks.{i}.{s}", "attn.norm") for i in range(2) for s in ("img", "txt")]
    norms = {f"{path}_{norm}.{which}_norm" for path, norm in streams for which in ("query", "key")}
    norms |= {f"single_blocks.{i}.norm.{which}_norm" for i in range(2) for which in ("query", "key")}
    mods = {f"{path}_mod.lin" for path, _ in streams} | {f"single_blocks.{i}.modulation.lin" for i in range(2)}
    assert names == norms | mods | set(OUTSIDE.values())
    assert {key for key in weights if key.endswith(".scale")} == {f"{norm}.scale" for norm in norms}
    assert weights["double_blocks.1.img_mod.lin.weight"].shape == (6 * D, D)
    assert weights["single_blocks.1.modulation.lin.bias"].shape == (3 * D,)


def test_layers_of_double_blocks_are_the_files_own():
    layers = dict(w4a4_layers(checkpoint()))
    for number, (ours, unsigned) in enumerate(DOUBLE.values()):
        (part,) = layers[f"double_blocks.1.{ours}"]
        assert same(part, layer(*part.codes.shape, seed=100 + number)) and part.unsigned == unsigned
    assert sum(part.unsigned for parts in layers.values() for part in parts) == 2 * 2 + 2


def run(part: NunchakuLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer with exact activations: what it would compute if they were not rounded."""
    weight = part.codes.double() * part.scales.double().t().repeat_interleave(64, 1)
    shifted = x + GELU_SHIFT if part.unsigned else x
    low_rank = x @ part.down.double() @ part.up.double().t()
    return (shifted / part.smooth.double()) @ weight.t() + low_rank + part.bias.double()


def test_the_halves_of_linear1_compute_what_they_did_alone():
    tensors = checkpoint()
    (both,) = dict(w4a4_layers(tensors))["single_blocks.1.linear1"]
    x = torch.randn(3, D, dtype=torch.float64)
    alone = [run(unpack_layer(tensors, f"single_transformer_blocks.1.{name}"), x) for name in ("qkv_proj", "mlp_fc1")]
    assert both.down.shape == (D, 2 * RANK) and both.up.shape == (5 * D, 2 * RANK) and not both.unsigned
    assert torch.allclose(run(both, x), torch.cat(alone, 1))


def test_linear2_is_two_parts_with_activations_of_their_own_kind():
    attention, mlp = dict(w4a4_layers(checkpoint()))["single_blocks.0.linear2"]
    assert (attention.codes.shape, mlp.codes.shape) == ((D, D), (D, 2 * D))
    assert (attention.unsigned, mlp.unsigned) == (False, True)


def test_the_last_modulation_has_its_halves_in_the_hosts_order():
    weights = dict(plain_weights(checkpoint()))
    assert weights["final_layer.adaLN_modulation.1.bias"].tolist() == [*range(D, 2 * D), *range(D)]
    assert weights["final_layer.linear.bias"].tolist() == list(range(2 * D))


def test_a_model_without_guidance_is_read():
    tensors = {key: value for key, value in checkpoint(1, 0).items() if "guidance" not in key}
    assert not any("guidance" in key for key, _ in plain_weights(tensors))


def without(key: str):
    return lambda tensors: tensors.pop(key)


def put(key: str, change):
    return lambda tensors: tensors.update({key: change(tensors.get(key))})


FIRST = "transformer_blocks.0.qkv_proj"
MOD = "transformer_blocks.0.norm1.linear"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without(f"{FIRST}.wscales"), f"'{FIRST}.wscales' is missing"),
        (without(f"{FIRST}.lora_up"), "lora_up' is missing"),
        (without(f"{MOD}.wzeros"), "wzeros' is missing"),
        (without("x_embedder.weight"), "'x_embedder.weight' is missing"),
        (without("transformer_blocks.0.norm_q.weight"), "norm_q.weight' is missing"),
        (put(f"{FIRST}.qweight", lambda q: q[:100]), "100 rows, which is not a multiple of 128"),
        (put(f"{FIRST}.qweight", lambda q: q.to(torch.int32)), "torch.int32"),
        (put(f"{FIRST}.qweight", lambda q: q[None]), "shape (1, 384, 64)"),
        (put(f"{FIRST}.wscales", lambda s: s.float()), "torch.float32"),
        (put(f"{FIRST}.wscales", lambda s: s * float("nan")), "not finite"),
        (put(f"{FIRST}.smooth", lambda s: s * 0), "not above 0"),
        (put(f"{FIRST}.smooth", lambda s: s.half()), "torch.float16"),
        (put(f"{FIRST}.lora_down", lambda d: d[:, :9]), "9 ranks"),
        (put(f"{FIRST}.bias", lambda b: b[1:]), "shape (383,)"),
        (put(f"{FIRST}.wcscales", lambda _: torch.ones(1)), "FP4"),
        (put(f"{MOD}.qweight", lambda q: q[:-1]), "not a multiple of 24"),
        (put(f"{MOD}.wscales", lambda s: torch.cat((s, s))), "where"),
        (put("single_transformer_blocks.0.mlp_fc1.smooth", lambda s: s * 2), "other smooth factors"),
        (put("transformer_blocks.3.norm_q.weight", lambda _: torch.ones(16)), "Double block 1 is missing"),
        (put("transformer_blocks.0.attn.to_q.weight", lambda _: torch.ones(16, 16)), "is not a name of"),
        (lambda tensors: tensors.clear(), "no transformer block"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_sentence(damage, words):
    tensors = checkpoint(1, 1)
    damage(tensors)
    with pytest.raises(ValueError) as caught:
        dict(w4a4_layers(tensors)), dict(plain_weights(tensors))
    sentence = str(caught.value)
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence


def test_a_layer_cannot_be_cut_to_more_than_it_is():
    with pytest.raises(ValueError, match="cannot be cut"):
        unpack_layer(pack_layer(layer(128, 128), "a"), "a", shape=(256, 128))
