"""Quantised layers in memory and on disk: packing, names, agreement with comfy-kitchen, a sentence for bad files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.kernels.reference import (
    GELU_SHIFT,
    convrot_linear,
    integer_dot,
    pack_int4,
    quantise_activations,
    unpack_int4,
    w4a4_linear,
)
from slipstream.quant.calibration import ActivationStatistics
from slipstream.quant.formats import FORMATS, GROUPS, LONGEST
from slipstream.quant.layer import Spec, quantise_linear, quantise_split, spec_for
from slipstream.quant.linear import W4A4Linear
from slipstream.quant.packed import QuantisedLinear, QuantisedSplit, description_of, json_tensor, read_layer

from lab.methods import METHODS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(spec: Spec, n: int = 48, k: int = 256, dtype: torch.dtype = torch.float32) -> QuantisedLinear:
    statistics = ActivationStatistics.of(normal(64, k, seed=3).exp()) if spec.smooth == "search" else None
    return quantise_linear(normal(n, k).to(dtype) * 0.05, normal(n, seed=1).to(dtype), spec, statistics).layer


@given(st.lists(st.lists(st.integers(0, 15), min_size=6, max_size=6), min_size=1, max_size=5), st.booleans())
def test_packing_and_unpacking_is_the_identity(rows, unsigned):
    codes = torch.tensor(rows) - (0 if unsigned else 8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int8 and packed.shape == (len(rows), 3)
    assert torch.equal(unpack_int4(packed, unsigned), codes.to(torch.int8))


def test_the_low_nibble_is_the_even_column():
    assert pack_int4(torch.tensor([[1, 2], [-1, 7], [-8, 0]])).tolist() == [[0x21], [0x7F], [0x08]]
    with pytest.raises(ValueError, match="even in number"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([(4, False), (4, True), (8, False)]), st.integers(0, 99))
def test_activations_are_rounded_within_half_a_step(m, kind, seed):
    bits, unsigned = kind
    x = normal(m, 128, seed=seed) * 10 ** (seed % 5 - 2)
    x = x.abs() if unsigned else x
    codes, scales = quantise_activations(x, bits=bits, unsigned=unsigned)
    back = (codes.float().view(m, 2, 64) * scales[..., None]).view(m, 128)
    assert codes.dtype == torch.int8 and scales.shape == (m, 2)
    assert ((back - x).view(m, 2, 64).abs() <= scales[..., None] * 0.5001).all()
    top = 15 if unsigned else 2 ** (bits - 1) - 1
    assert codes.abs().max() == top and codes.min() >= (0 if unsigned else -top)


def test_activations_of_zeros_and_what_is_refused():
    codes, scales = quantise_activations(torch.zeros(2, 64))
    assert not codes.any() and (scales > 0).all()
    for bits, unsigned in ((3, False), (8, True)):
        with pytest.raises(ValueError, match="quantised to 4 bit"):
            quantise_activations(torch.zeros(1, 64), bits=bits, unsigned=unsigned)
    with pytest.raises(ValueError, match="do not divide"):
        quantise_activations(torch.zeros(1, 65))


def test_integer_dots_are_exact_beyond_float32():
    a, b = (torch.full((2, 4096), v, dtype=torch.int8) for v in (127, 127))
    b[:, 0] = 126
    assert integer_dot(a, b).long().tolist() == [[127 * 127 * 4095 + 127 * 126] * 2] * 2


def test_w4a4_linear_is_the_formula():
    """Against the sum written out with integers, for signed and unsigned, smoothed and rotated inputs."""
    x, smooth, bias = normal(5, 128), normal(128, seed=1).abs() + 0.5, normal(6, seed=2)
    weight = torch.randint(-7, 8, (6, 128), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    scale, down, up = normal(2, 6, seed=4).abs(), normal(128, 4, seed=5), normal(6, 4, seed=6)
    for unsigned in (False, True):
        codes, scales = quantise_activations(x, smooth, GELU_SHIFT if unsigned else 0.0, unsigned=unsigned)
        dots = torch.einsum("mgk,ngk->mng", codes.view(5, 2, 64).long(), weight.view(6, 2, 64).long())
        expected = (dots * scales[:, None].double() * scale.T.double()).sum(-1) + (x @ down @ up.T + bias)
        found = w4a4_linear(x, pack_int4(weight), scale, down, up, smooth, bias, unsigned=unsigned)
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="takes 128 channels"):
        w4a4_linear(x[:, :64], pack_int4(weight), scale)


@pytest.mark.parametrize("spec", [*METHODS.values(), Spec(act_unsigned=True), Spec(rank=0)], ids=lambda s: str(s)[5:60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_survives_its_state_dict(spec, dtype):
    spec = dataclasses.replace(spec, rank=min(spec.rank, 16), refine=min(spec.refine, 1))
    layer = layer_of(spec, dtype=dtype)
    tensors = layer.state_dict("a.b")
    again = QuantisedLinear.from_state_dict("a.b", tensors)
    x = normal(3, 256, seed=9)
    assert torch.equal(layer(x), again(x)) and again.description() == layer.description()
    assert again.shape == layer.shape and again.dtype == layer.dtype and again.format == layer.format
    assert layer.nbytes == sum(t.numel() * t.element_size() for n, t in tensors.items() if "comfy_quant" not in n)


def test_the_names_on_disk_are_the_documented_ones():
    found = layer_of(Spec(rank=16), dtype=torch.bfloat16).state_dict("P")
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in found.items()}
    half = torch.bfloat16
    assert shapes == {
        "P.weight": ((48, 128), torch.int8),
        "P.weight_scale": ((4, 48), half),
        "P.weight_proj_down": ((256, 16), half),
        "P.weight_proj_up": ((48, 16), half),
        "P.weight_smooth_factor": ((256,), half),
        "P.bias": ((48,), half),
        "P.comfy_quant": ((len(bytes(found["P.comfy_quant"].tolist())),), torch.uint8),
    }
    assert json.loads(bytes(found["P.comfy_quant"].tolist())) == {
        "format": "svdquant_w4a4",
        "group_size": 64,
        "rank": 16,
        "act_unsigned": False,
        "act_bits": 4,
        "orig_dtype": "torch.bfloat16",
        "orig_shape": [48, 256],
    }
    found = layer_of(METHODS["convrot"]).state_dict("P")
    assert set(found) == {"P.weight", "P.weight_scale", "P.bias", "P.comfy_quant"}
    assert found["P.weight_scale"].shape == (48,) and found["P.weight_scale"].dtype == torch.float32
    assert json.loads(bytes(found["P.comfy_quant"].tolist())) == {
        "format": "convrot_w4a4",
        "convrot_groupsize": 256,
        "orig_dtype": "torch.float32",
    }


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_as_it_is_used_says_all_that_a_reader_needs_in_the_room_that_is_kept(name):
    """`spec_for` is what shipped code takes, with a branch and rotation where the format has a place for them."""
    row = FORMATS[name]
    assert row.fits(256) and (row.careful or name) in FORMATS and row.words
    for after_gelu, rotated in ((False, True), (True, False)):
        spec = spec_for(name, (48, 256), 16, after_gelu=after_gelu, rotated=rotated)
        layer = layer_of(spec, dtype=torch.bfloat16)
        assert layer.format == name and (layer.rank == 16) == row.branch
        assert layer.nbytes <= row.nbytes(48, 256, 16)
        assert len(json.dumps(layer.description())) <= len(json.dumps(LONGEST))
        again = read_layer("P", layer.state_dict("P"))
        assert again.description() == layer.description() and torch.equal(again.codes(), layer.codes())
        assert torch.equal(row.unpack(row.pack(layer.codes())), layer.codes())


def test_no_two_formats_read_one_description():
    for name, row in FORMATS.items():
        stored = layer_of(spec_for(name, (48, 256), 16)).state_dict("P")
        found = description_of("P", stored)
        fields = [other.read("P", found, stored) for other in FORMATS.values() if other.disk != row.disk]
        assert not any(fields)


def test_rotated_groups_are_not_sold_as_svdquant():
    """A reader that knows no rotation must refuse the file instead of computing nonsense."""
    layer = layer_of(dataclasses.replace(METHODS["hadamard_svd"], rank=16))
    assert layer.rotation == 256 and layer.description()["format"] != "svdquant_w4a4"


def test_a_flux_layer_is_a_quarter():
    """3072 x 12288, rank 32: the tensors, none of them filled, and the formula."""
    n, k = 3072, 12288

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    packed, scale = empty(n, k // 2, dtype=torch.int8), empty(k // 64, n)
    layer = QuantisedLinear(
        "svdquant_w4a4", (n, k), torch.bfloat16, packed, scale, empty(k, 32), empty(n, 32), empty(k), empty(n)
    )
    assert layer.nbytes == GROUPS.nbytes(n, k, 32) <= 0.29 * n * k * 2
    small = layer_of(Spec(rank=16), dtype=torch.bfloat16)
    assert small.nbytes == GROUPS.nbytes(48, 256, 16)


def test_bad_files_get_one_sentence():
    good = layer_of(Spec(rank=16)).state_dict("P")

    def described(**changes):
        text = json.dumps({**json.loads(bytes(good["P.comfy_quant"].tolist())), **changes}).encode()
        return {**good, "P.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}

    without = {name: t for name, t in good.items()}
    cases = [
        ({}, "has no comfy_quant"),
        ({"P.comfy_quant": good["P.comfy_quant"]}, "has no weight"),
        ({**good, "P.comfy_quant": torch.tensor([1, 2, 255], dtype=torch.uint8)}, "is not JSON"),
        ({**good, "P.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "not a JSON object"),
        (described(format="nvfp4"), "stored as 'nvfp4'"),
        (described(act_bits=3), "3-bit activations"),
        (described(group_size="64"), "group_size '64'"),
        (described(group_size=48), "groups of 48 do not divide"),
        (described(orig_shape=[1, 2]), "says it is"),
        (described(layout="kitchen_tile_packed_w4a4"), "tiled layout"),
        ({n: t for n, t in without.items() if "proj_up" not in n}, "needs proj_up"),
        ({**good, "P.weight_scale": good["P.weight_scale"][:2]}, "needs weight_scale of shape"),
        ({**good, "P.weight": good["P.weight"].float()}, "stores its weight in int8"),
    ]
    for tensors, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            QuantisedLinear.from_state_dict("P", tensors)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unsigned", [False, True])
def test_svdquant_agrees_with_comfy_kitchen(unsigned):
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends.eager import svdquant as kitchen

    spec = Spec(rank=16, storage=torch.float32, act_unsigned=unsigned)
    layer = layer_of(spec, n=128, k=512)
    x = torch.nn.functional.gelu(normal(256, 512, seed=7)) if unsigned else normal(256, 512, seed=7)
    main = x + GELU_SHIFT if unsigned else x
    codes, scales, low = kitchen.quantize_svdquant_w4a4(
        main, layer.smooth, layer.proj_down, act_unsigned=unsigned, lora_x=x
    )
    theirs = kitchen.scaled_mm_svdquant_w4a4(
        codes, layer.weight, scales, layer.weight_scale, low, layer.proj_up, layer.bias, act_unsigned=unsigned
    )
    assert torch.allclose(layer(x), theirs, rtol=1e-4, atol=1e-5)
    own, own_scales = quantise_activations(x, layer.smooth, GELU_SHIFT if unsigned else 0.0, unsigned=unsigned)
    assert torch.equal(pack_int4(own), codes) and torch.allclose(own_scales.T, scales)


def test_convrot_agrees_with_comfy_kitchen():
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends.eager import convrot_w4a4 as kitchen

    weight, bias, x = normal(128, 512) * 0.05, normal(128, seed=1), normal(40, 512, seed=2)
    layer = quantise_linear(weight, bias, METHODS["convrot"]).layer
    codes, scales = kitchen.quantize_convrot_w4a4_weight(weight, 256)
    # the rotations add in another order, so a number on the edge between two codes may fall to either side
    assert (codes == layer.weight).float().mean() > 0.9995 and torch.allclose(scales, layer.weight_scale)
    assert torch.allclose(
        kitchen.dequantize_convrot_w4a4_weight(layer.weight, layer.weight_scale, 256), layer.dequantise(), atol=1e-6
    )
    theirs = kitchen.convrot_w4a4_linear(x, layer.weight, layer.weight_scale, bias, 256)
    assert (layer(x) - theirs).norm() < 2e-3 * theirs.norm()


def test_int8_convrot_agrees_with_comfy_kitchen():
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends.eager import quantization as kitchen

    weight, bias, x = normal(128, 512) * 0.05, normal(128, seed=1), normal(40, 512, seed=2)
    layer = quantise_linear(weight, bias, METHODS["int8_convrot"]).layer
    codes, scales = kitchen.quantize_int8_convrot_weight(weight, 256)
    assert (codes == layer.weight).float().mean() > 0.999 and torch.allclose(scales, layer.weight_scale)
    theirs = kitchen.int8_linear(x, layer.weight, layer.weight_scale, bias, torch.float32, True, 256)
    assert (layer(x) - theirs).norm() < 1e-3 * theirs.norm()


def test_the_hosts_own_linear_loads_our_convrot_layer():
    pytest.importorskip("comfy_kitchen")
    import comfy.ops
    import comfy.quant_ops

    if "convrot_w4a4" not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        pytest.skip("this host has no convrot_w4a4")
    for method in ("convrot", "int8_convrot"):
        layer = layer_of(METHODS[method], dtype=torch.bfloat16)
        linear = comfy.ops.mixed_precision_ops({}, compute_dtype=torch.bfloat16).Linear(256, 48, bias=True)
        linear.load_state_dict({name[2:]: t for name, t in layer.state_dict("P").items()})
        x = normal(8, 256, seed=4).bfloat16()
        with torch.inference_mode():
            assert (linear(x).float() - layer(x).float()).norm() < 0.03 * layer(x).float().norm()


def test_convrot_rejects_another_width():
    layer = layer_of(METHODS["convrot"])
    with pytest.raises(ValueError, match="takes 256 channels"):
        convrot_linear(normal(2, 128), layer.weight, layer.weight_scale)


def split_of(method: str = "svdquant") -> tuple[torch.Tensor, QuantisedSplit]:
    weight, spec = normal(48, 320) * 0.05, dataclasses.replace(METHODS[method], rank=8, smooth="none")
    specs = [spec, dataclasses.replace(spec, act_unsigned=True)]
    return weight, QuantisedSplit(quantise_split(weight, normal(48, seed=1), specs, [128]))


def test_a_layer_in_parts_is_the_sum_of_its_parts():
    """As a layer, as a module, and as what a LoRA changes in it; `part1` on disk is a layer of its own."""
    weight, split = split_of()
    x = normal(2, 5, 320, seed=2)
    parts = [part(piece) for part, piece in zip(split.parts, x.split([128, 192], -1), strict=True)]
    assert torch.equal(split(x), parts[0] + parts[1]) and split.shape == (48, 320)
    assert (split.dequantise() - weight).norm() < 0.15 * weight.norm()
    module = W4A4Linear(split)
    assert torch.equal(module(x), split(x)) and (module.out_features, module.in_features) == (48, 320)
    assert sum(t.numel() * t.element_size() for t in module.state_dict().values()) == split.nbytes
    assert "weight" in module.state_dict() and not list(module.children())
    assert torch.equal(module.convert_weight(module.weight), split.dequantise())
    down, up = normal(320, 3, seed=4), normal(48, 3, seed=5)
    module.set_lora(down, up, torch.ones(48))
    expected = split(x) + x @ down @ up.T + 1
    assert (module(x) - expected).norm() < 1e-5 * expected.norm() and module.layer(lora=False).rank == 8
    stored = module.layer()
    again = read_layer("a", stored.state_dict("a"))
    assert again.description() == stored.description() and torch.equal(again(x), module(x))
    module.set_lora(None, None)
    assert torch.equal(module(x), split(x))
    with pytest.raises(ValueError, match="takes 320 channels"):
        split(x[..., :64])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"a.part1.weight": None}, "a.part1 has no weight"),
        ({"a.part1.comfy_quant": None}, "a.part1 has no comfy_quant"),
        ({"a.comfy_quant": {"format": "slipstream_split", "parts": 0}}, "a has parts 0"),
        ({"a.comfy_quant": {"format": "slipstream_split", "parts": 1}}, "a says it is None"),
    ],
)
def test_a_damaged_layer_in_parts_is_one_sentence(damage, words):
    tensors = split_of()[1].state_dict("a")
    for name, value in damage.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = json_tensor(value)
    with pytest.raises(ValueError, match=words):
        read_layer("a", tensors)


def test_parts_of_other_heights_are_refused():
    one, other = layer_of(METHODS["convrot"]), layer_of(METHODS["convrot"], n=32)
    with pytest.raises(ValueError, match="one number of outputs"):
        QuantisedSplit((one, other))
