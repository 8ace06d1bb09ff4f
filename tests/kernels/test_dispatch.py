"""Dispatch: what disagrees is dropped, what is chosen is kept, and there is always a way that works."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind the host, whose module `nodes` our folder would hide
from lab.boot import import_pack  # noqa: E402

import_pack()
from slipstream.kernels import choices, derived, dispatch, implementations, plain  # noqa: E402
from slipstream.kernels.implementations import Implementation  # noqa: E402
from slipstream.kernels.layer import Layer  # noqa: E402
from slipstream.kernels.linear import linear  # noqa: E402
from slipstream.kernels.reference import convrot_linear, pack_int4, w4a4_linear  # noqa: E402


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def computed(x, *tensors, kernel=None, **options) -> torch.Tensor:
    return linear(x, Layer(*tensors, **options), kernel)


def tensors(n: int = 48, k: int = 128) -> tuple[torch.Tensor, ...]:
    codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(5))
    scale = (normal(k // 64, n, seed=4).abs() / 10).bfloat16()
    smooth = normal(k, seed=1).abs() + 0.5
    return pack_int4(codes), scale, normal(k, 16, seed=2) / 9, normal(n, 16, seed=3), smooth, normal(n, seed=6)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch.reset()
    dispatch.cache_in(tmp_path)
    yield
    dispatch.cache_in(None)
    dispatch.use(None)
    dispatch.reset()


def implementation(name: str, run, **options) -> Implementation:
    return Implementation(name, f"{name} for a test", lambda problem: True, run, **options)


def expanded(x, layer, config):
    return plain.dequantised_linear(x, layer)


@pytest.fixture
def on_a_card(monkeypatch):
    """Let dispatch choose on the CPU as it would on a card, among the implementations given."""
    true = implementations.Problem.of

    def install(*table: Implementation) -> None:
        monkeypatch.setattr(implementations, "TABLE", (*table, implementations.TABLE[-1]))

    monkeypatch.setattr(
        implementations.Problem, "of", classmethod(lambda cls, x, layer: replace(true(x, layer), device="cuda"))
    )
    return install


def test_the_cpu_computes_the_exact_reference_and_says_so():
    x, (packed, scale, down, up, smooth, bias) = normal(3, 5, 128), tensors()
    for options in ({}, {"act_bits": 8, "rotation": 64}, {"act_bits": 16}, {"unsigned": True}):
        got = computed(x, packed, scale, down, up, smooth, bias, **options)
        assert torch.equal(got, w4a4_linear(x, packed, scale, down, up, smooth, bias, **options))
    got = computed(x, packed, scale[0].float(), bias=bias, group_size=0, rotation=64)
    assert torch.equal(got, convrot_linear(x, packed, scale[0].float(), bias, rotation=64))
    assert {row.name for row in dispatch.running("cpu")} == {"reference"}
    assert dispatch.summary() == "Layer shapes: 5 on CPU by the exact reference, slow (plain torch)."
    assert computed(x[:, :0], packed, scale).shape == (3, 0, 48)
    with pytest.raises(ValueError, match="takes 128 channels, the input has 64"):
        computed(x[..., :64], packed, scale)


def test_what_disagrees_or_raises_is_dropped_with_one_line(on_a_card, caplog):
    def broken(x, layer, config):
        raise RuntimeError("no such\ninstruction")

    def wrong(x, layer, config):  # in one row of 77, which the error of the whole would hide
        out = layer.reference(x)
        out[5] *= 0.8
        return out

    on_a_card(
        implementation("broken", broken), implementation("wrong", wrong), implementation("right", expanded, like=16)
    )
    x, parts = normal(8, 128), tensors()
    with caplog.at_level(logging.INFO, "slipstream"):
        for _ in range(2):
            for bits in (4, 8):
                got = computed(x, *parts, act_bits=bits)
                assert torch.allclose(got, w4a4_linear(x, *parts, act_bits=16), rtol=1e-4, atol=1e-4)
    assert [r.getMessage().split(" is not used")[0] for r in caplog.records] == [
        "Slipstream: kernel broken", "Slipstream: kernel wrong",
    ]  # fmt: skip
    assert "RuntimeError: no such instruction" in caplog.records[0].getMessage()
    assert {row.name for row in dispatch.running()} == {"right"}


def test_what_fails_later_makes_room_for_another(on_a_card):
    calls = []

    def late(x, layer, config):
        calls.append(len(x))
        if len(x) == 9:
            raise RuntimeError("only for nine rows")
        return expanded(x, layer, config)

    on_a_card(implementation("late", late, like=16))
    x, parts = normal(9, 128), tensors()
    assert torch.equal(computed(x, *parts), w4a4_linear(x, *parts))
    assert calls and dispatch.running()[-1].name == "reference"


def test_the_fastest_is_chosen_kept_in_a_file_and_taken_from_it(on_a_card, tmp_path):
    made = []

    def slow(x, layer, config):
        made.append(config)
        for _ in range(20):
            expanded(x, layer, config)
        return expanded(x, layer, config)

    fast = implementation("fast", lambda x, layer, config: expanded(x, layer, config), like=16)
    on_a_card(implementation("slow", slow, configs=lambda p: ((1,), (2,)), like=16), fast)
    x, parts = normal(8, 128), tensors()
    before = torch.random.get_rng_state()
    computed(x, *parts)
    assert torch.equal(before, torch.random.get_rng_state())  # a user's seed stays what it was
    (row,) = dispatch.running()
    assert row.name == "fast" and set(row.milliseconds) == {"slow", "fast"} and set(made) == {(1,), (2,)}
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("kernels-") and path.suffix == ".json"
    made.clear()
    dispatch.reset()
    computed(x, *parts)
    assert not made and dispatch.running() == [row]
    computed(normal(7, 128), *parts)  # the same power of two
    assert len(dispatch.running()) == 1
    for damaged in ("{", "[]", json.dumps({**json.loads(path.read_text()), "header": {}})):
        path.write_text(damaged)
        dispatch.reset()
        made.clear()
        computed(x, *parts)
        assert made and json.loads(path.read_text())["header"]["version"] == choices.VERSION


def test_an_implementation_can_be_named(on_a_card, monkeypatch):
    on_a_card(implementation("one", expanded, like=16), implementation("two", expanded, like=16))
    x, parts = normal(8, 128), tensors()
    computed(x, *parts, kernel="two")
    assert dispatch.running()[-1].name == "two"
    monkeypatch.setenv(dispatch.VARIABLE, "one")
    computed(x, *parts)
    assert dispatch.running()[-1].name == "one"
    dispatch.use("reference")
    assert torch.equal(computed(x, *parts), w4a4_linear(x, *parts))
    for call in (lambda: dispatch.use("none"), lambda: computed(x, *parts, kernel="none")):
        with pytest.raises(ValueError, match="unknown kernel 'none', choose one of one, two, reference"):
            call()


def test_threads_choose_once(on_a_card):
    checks = []

    def counted(x, layer, config):
        checks.append(len(x) in dispatch.CHECK_ROWS.values())
        return expanded(x, layer, config)

    on_a_card(implementation("counted", counted, like=16))
    x, parts = normal(9, 128), tensors()
    threads = [threading.Thread(target=computed, args=(x, *parts)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(checks) == 1 and len(checks) == 5


def test_in_a_graph_nothing_is_chosen_for_later(on_a_card, monkeypatch):
    """While a CUDA graph is captured nothing can be compared or timed; what serves it there must not stay."""
    on_a_card(implementation("fast", expanded, like=16), implementation("dequant_torch", expanded, like=16))
    layer = Layer(*tensors())
    state = dispatch._state(torch.device("cpu"))

    class OnCard:  # all of a tensor that is looked at
        is_cuda, dtype = True, torch.float32

        def __len__(self):
            return 9

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch._choice(state, OnCard(), layer, None).running.name == "dequant_torch"
    assert not state.chosen and not dispatch.running()


class Launches:
    """A kernel in whose place the launches are noted: what Triton compiles a variant for."""

    def __init__(self, name: str, seen: set):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **constants) -> None:
        def kind(value):
            if isinstance(value, torch.Tensor):
                return value.dtype, value.data_ptr() % 16 == 0
            return ("one" if value == 1 else value % 16 == 0) if isinstance(value, int) else value

        self.seen.add((self.name, *map(kind, arguments), *sorted(constants.items(), key=str)))


VARIANTS = [  # rows, outputs, inputs, rank
    (4096, 3072, 3072, 32), (77, 3072, 3072, 32), (32760, 264, 192, 16), (1, 512, 320, 0), (16, 40, 128, 64),
    (1, 1, 64, 16),
]  # fmt: skip


@pytest.mark.parametrize("rows, outputs, inputs, rank", VARIANTS)
@pytest.mark.parametrize("name", ["int8_triton", "fold_triton", "int4_native", "dequant_triton", "rows"])
def test_the_check_compiles_what_the_call_will_run(monkeypatch, name, rows, outputs, inputs, rank):
    """Triton compiles another variant for sizes that are multiples of 16, and for 1: the check has to launch the
    call's own, or it proves nothing of it and costs a compile."""
    pytest.importorskip("triton")
    from slipstream.kernels import activations, dequant, gemm

    seen: set = set()
    kernels = [(activations, "quant_groups"), (activations, "quant_rows"), (gemm, "gemm_groups"), (gemm, "gemm_rows")]
    for module, kernel in [*kernels, (dequant, "expand_weight")]:
        monkeypatch.setattr(module, kernel, Launches(kernel, seen))
    if name == "int4_native":
        native = pytest.importorskip("slipstream.kernels.int4_native", reason="this Triton has no Gluon")
        monkeypatch.setattr(native, "gemm_int4", Launches("gemm_int4", seen))
    codes = torch.randint(-8, 8, (outputs, inputs)).to(torch.int8)
    half = {"dtype": torch.bfloat16}
    if name == "rows":
        layer = Layer(codes, normal(outputs), None, None, None, normal(outputs).to(**half), 8, 8, 0, rotation=64)
    else:
        down, up = normal(inputs, rank).to(**half), normal(outputs, rank).to(**half)
        branch = (down, up) if rank else (None, None)
        bits = 8 if name == "fold_triton" else 4
        layer = Layer(
            pack_int4(codes), normal(inputs // 64, outputs).to(**half), *branch, None, normal(outputs).to(**half), bits,
            rotation=64,
        )  # fmt: skip
    table = {way.name: way for way in implementations.TABLE}
    way = table["int8_triton" if name == "rows" else name]
    problem = implementations.Problem("cuda", (8, 6), False, torch.bfloat16, rows, layer)
    x = torch.empty(rows, inputs, **half)
    for config in way.configs(problem):
        seen.clear()
        way.run(x, layer, config)
        called = set(seen)
        seen.clear()
        dispatch._disagreement(way, config, layer, x)
        assert seen == called


@pytest.mark.parametrize(
    "version, served", [((3, 2), False), ((3, 3), False), ((3, 4), True), ((3, 9), True), (None, False)]
)
def test_old_tritons_are_not_asked_for_tensor_cores(monkeypatch, version, served):
    """3.2 aborts the whole process while it compiles K1, 3.3 compiles neither that nor K0's rotation."""
    monkeypatch.setattr(implementations, "triton_version", lambda: version)
    packed, scale, *rest = tensors()
    layers = [
        Layer(packed, scale, *rest, act_bits=bits, rotation=rotation) for bits in (4, 8) for rotation in (0, 64)
    ] + [Layer(packed, scale[0].float(), group_size=0, rotation=64)]
    tensor_cores = {"int4_native", "int8_triton", "fold_triton"}
    found = set()
    for layer in layers:
        problem = implementations.Problem("cuda", (8, 9), False, torch.bfloat16, 64, layer)
        found |= {way.name for way in implementations.TABLE if way.fits(problem)}
    assert bool(found & tensor_cores) == served
    assert ("dequant_triton" in found) == (version is not None) and "dequant_torch" in found
    # cuBLAS's way has its codes from plain torch then: K0 is not imported
    asked = []

    class Modules:
        def import_module(self, name, package):
            asked.append(name)
            return SimpleNamespace(int8_weight=None)

    monkeypatch.setattr(implementations, "importlib", Modules())
    monkeypatch.setattr(plain, "int8_linear", lambda x, layer, *ways: ways)
    monkeypatch.setattr(
        implementations.Problem, "of", classmethod(lambda cls, x, layer: cls("cuda", (8, 9), False, x.dtype, 64, layer))
    )
    implementations._int8_cublas(torch.empty(64, 128, dtype=torch.bfloat16), layers[-1], ())
    assert bool(asked) == served


def test_what_lasts_is_allocated_in_the_callers_context_and_entered_once(on_a_card, monkeypatch):
    """A host's record of a forward must not see what is derived, shared or measured; its pause does not nest."""
    from slipstream.kernels import lasting

    depth, entered = [0], []

    @contextlib.contextmanager
    def outside():
        depth[0] += 1
        entered.append(depth[0])
        yield
        depth[0] -= 1

    monkeypatch.setattr(lasting, "_outside", outside)
    derived.derived(normal(6, 5), "double", lambda t: t * depth[0])
    assert entered == [1]
    factor = normal(128, 16)

    def way(x, layer, config):
        derived.derived(factor * 1, "any", lambda t: t + depth[0])
        return expanded(x, layer, config)

    on_a_card(implementation("way", way, like=16), implementation("other", way, like=16))
    computed(normal(9, 128), *tensors())
    assert max(entered) == 1 and depth[0] == 0
    pytest.importorskip("triton")
    from slipstream.kernels import activations

    made = []
    monkeypatch.setattr(activations, "quantise", lambda *a, **k: made.append(depth[0]) or torch.zeros(1))
    for share in (None, ("alone", 1), ("q, k, v", 3)):
        implementations.quantised(normal(9, 128), Layer(*tensors(), share=share), False)
    assert made == [0, 0, 1]  # what serves this call alone is the call's own
    implementations.forget()


def test_plain_torch_serves_every_format():
    """What runs on a card without Triton: the expanded weight in slices, and the int8 product where scales allow."""
    packed, scale, down, up, smooth, bias = tensors(520)
    x = normal(40, 128)
    layers = [
        Layer(packed, scale, down, up, smooth, bias, 8, unsigned=True),
        Layer(packed, scale, down, up, smooth, bias, 8, rotation=64),
        Layer(packed, scale[0].float(), bias=bias, group_size=0, rotation=64),
        Layer(torch.randint(-127, 128, (520, 128)).to(torch.int8), scale[0].float(), None, None, None, bias, 8, 8, 0),
    ]
    for layer in layers:
        for slices in (1, 9999):
            got = plain.dequantised_linear(x, layer, bytes_per_weight=12 * slices)
            assert torch.allclose(got, layer.reference(x, 16), rtol=1e-4, atol=1e-4)
        error = (plain.int8_linear(x, layer) - layer.reference(x)).norm() / layer.reference(x).norm()
        assert error < (1e-6 if layer.per_row else 0.02)


def test_what_is_handed_to_comfy_kitchen_is_what_it_takes():
    """Its eager backend has the same contract, rounded in 16 bit on the way."""
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    packed, scale, down, up, smooth, bias = (t.bfloat16() if t.is_floating_point() else t for t in tensors(128, 256))
    x, rows = normal(40, 256).bfloat16(), normal(128, seed=9).abs() / 10
    codes = torch.randint(-127, 128, (128, 256), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    for layer in (
        Layer(packed, scale, down, up, smooth, bias),
        Layer(packed, scale, None, None, None, bias, unsigned=True),
        Layer(packed, rows, down, up, bias=bias, group_size=0, rotation=256),
        Layer(codes, rows, bias=bias, act_bits=8, weight_bits=8, group_size=0, rotation=256),
    ):
        got, want = implementations._kitchen(x, layer, ()).float(), layer.reference(x).float()
        assert (got - want).norm() / want.norm() < 0.03, layer.kind


def test_torch_compile_calls_the_operation_whole():
    if not hasattr(torch.library, "custom_op"):
        pytest.skip("this torch has no custom_op")
    x, parts = normal(4, 128), tensors()

    def layer(x):
        return computed(computed(x, *parts, rotation=64), packed, scale, group_size=0, rotation=16) + 1

    packed, scale = pack_int4(torch.randint(-8, 8, (16, 48))), normal(16).abs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), layer(x)) and torch.equal(compiled(x[:3]), layer(x[:3]))


def test_what_is_derived_lives_as_long_as_the_weight():
    weight = normal(6, 5)
    made = []

    def make(tensor):
        made.append(1)
        return tensor * 2

    def kept_bytes() -> int:
        return sum(value.nbytes for alive, value in derived._kept.values() if not alive.expired())

    assert derived.derived(weight.detach(), "double", make) is derived.derived(weight[:], "double", make)
    weight += 1
    assert torch.equal(derived.derived(weight, "double", make), weight * 2) and len(made) == 2
    held = kept_bytes()
    del weight
    assert kept_bytes() <= held - 240
    factor = normal(4, 3)
    assert derived.branch(factor, torch.float32).shape == (4, 16)


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('triton', 'comfy_kitchen'):
            raise ModuleNotFoundError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {root!r})
from lab.boot import import_pack
import_pack()
import torch
from slipstream.kernels import dispatch
from slipstream.kernels.layer import Layer
from slipstream.kernels.linear import linear
weight, scale = torch.zeros(16, 64, dtype=torch.int8), torch.ones(2, 16)
for kernel in (None, 'int8_triton', 'dequant_torch'):
    assert linear(torch.ones(3, 128), Layer(weight, scale), kernel).shape == (3, 16)
assert [row.name for row in dispatch.running()] == ['reference', 'reference', 'dequant_torch']
assert not [name for name in sys.modules if name.startswith('triton')]
"""


def test_without_triton_and_kitchen_there_is_a_way():
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(root=str(ROOT))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
