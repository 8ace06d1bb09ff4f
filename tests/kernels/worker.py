"""What needs a process of its own, because Triton decides at its import whether it interprets.

`worker.py interpret` runs every kernel on the CPU against the exact reference; `worker.py compile` compiles for cards
that are not there and reads the machine code. Each prints one JSON object, case -> result.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from lab.boot import import_pack  # noqa: E402

torch.set_num_threads(1)
import_pack()

M, N, K = 37, 72, 192  # no multiple of any tile


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    drawn = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(5))
    return drawn.to(torch.int8)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def a_layer(act_bits=4, rank=16, k=K, dtype=torch.float32, **options):
    from slipstream.kernels.layer import Layer
    from slipstream.kernels.reference import pack_int4

    down, up = normal(k, rank, seed=2) / k**0.5, normal(N, rank, seed=3)
    return Layer(
        pack_int4(integers(-8, 8, N, k)), (normal(k // 64, N, seed=4).abs() / 10).to(torch.bfloat16), down.to(dtype),
        up.to(dtype), (normal(k, seed=1).abs() + 0.5).to(dtype), normal(N, seed=6).to(dtype), act_bits, **options
    )  # fmt: skip


def a_row_layer(bits=4, rank=16, k=K, dtype=torch.float32, rotation=64):
    from slipstream.kernels.layer import Layer
    from slipstream.kernels.reference import pack_int4

    weight = pack_int4(integers(-8, 8, N, k)) if bits == 4 else integers(-127, 128, N, k)
    branch = (normal(k, rank, seed=2).to(dtype) / k**0.5, normal(N, rank, seed=3).to(dtype)) if rank else (None, None)
    scale = normal(N, seed=4).abs() / 10
    return Layer(weight, scale, *branch, None, normal(N, seed=6).to(dtype), bits, bits, 0, False, rotation)


def interpret() -> dict[str, float]:
    from slipstream.kernels import dispatch, nvfp4, plain
    from slipstream.kernels.activations import ACTIVATIONS, quantise
    from slipstream.kernels.dequant import expand
    from slipstream.kernels.gemm import Tile
    from slipstream.kernels.implementations import TABLE
    from slipstream.kernels.reference import (
        GELU_SHIFT,
        hadamard,
        nvfp4_linear,
        nvfp4_quantise,
        quantise_activations,
        unpack_int4,
    )  # fmt: skip

    run = {implementation.name: implementation.run for implementation in TABLE}
    found: dict[str, float] = {}

    # K0: part of the codes that differ, and the scales
    for bits, unsigned, rotation, per_row in (
        (4, False, 0, False), (4, True, 0, False), (8, False, 16, False), (4, False, 256, False), (8, True, 0, False),
        (4, False, 64, True), (8, False, 256, True), (8, False, 0, True),
    ):  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            k = 512 if rotation == 256 else 320
            x, smooth = normal(M, k).to(dtype), (normal(k, seed=1).abs() + 0.5).to(dtype)
            q = quantise(x, smooth, None, bits=bits, unsigned=unsigned, rotation=rotation, per_row=per_row)
            main = hadamard((x.float() + (GELU_SHIFT if unsigned else 0)) / smooth.float(), rotation)
            codes, scales = quantise_activations(
                main, bits=bits, unsigned=unsigned and bits == 4, group_size=k if per_row else 64
            )
            if bits == 4:
                got = unpack_int4(q.codes, unsigned)
            else:
                got = q.codes if per_row else q.codes.view(M, -1, 2, 32).transpose(2, 3).reshape(M, k)
            name = f"K0 {bits} bit{' unsigned' * unsigned}, rotation {rotation}, {'rows' if per_row else 'groups'}"
            found[f"{name}, {str(dtype)[6:]}: codes"] = float((got != codes).float().mean())
            found[f"{name}, {str(dtype)[6:]}: scales"] = relative(q.scales if per_row else q.scales.T, scales.squeeze())
    for activation in ACTIVATIONS[1:]:
        x = normal(M, 128)
        act = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}.get(
            activation, lambda t: torch.nn.functional.gelu(t, approximate="tanh")
        )
        q = quantise(x, None, torch.eye(128)[:, :48].contiguous(), activation=activation)
        found[f"K0 input activation {activation}: float32"] = relative(q.low, act(x[:, :48]))

    # K1 and the rest, end to end
    small = (32, 64, 4, 2)
    kinds = ({"act_bits": 4}, {"act_bits": 4, "unsigned": True}, {"act_bits": 8, "rotation": 64})
    for options, rank in itertools.product(kinds, (0, 16, 48)):
        layer, x = a_layer(rank=rank, **options), normal(M, K)
        found[f"K1 {layer.kind} rank {rank}: float32"] = relative(
            run["int8_triton"](x, layer, small), layer.reference(x)
        )
    for bits, rank in itertools.product((4, 8), (0, 16, 48)):
        layer, x = a_row_layer(bits, rank, 320), normal(M, 320)
        found[f"K1 {layer.kind} rank {rank}: float32"] = relative(
            run["int8_triton"](x, layer, small), layer.reference(x)
        )
    for dtype in (torch.bfloat16, torch.float16):
        layer, x = a_layer(rank=48, dtype=dtype), normal(M, K).to(dtype)
        found[f"K1 {layer.kind}: {str(dtype)[6:]}"] = relative(run["int8_triton"](x, layer, small), layer.reference(x))
    layer, x = a_layer(8, rotation=64), normal(M, K)
    found["W4A8 folded against plain torch: float32"] = relative(
        run["fold_triton"](x, layer, small), plain.int8_linear(x, layer)
    )
    for layer, k in ((a_layer(), K), (a_layer(8, k=512, rotation=256), 512), (a_row_layer(8), K), (a_row_layer(4), K)):
        got = plain.dequantised_linear(normal(M, k), layer, expand)
        found[f"dequantised {layer.kind}: float32"] = relative(got, layer.reference(normal(M, k), 16))
    layer, x = a_layer(), normal(2, M, K).transpose(0, 1)[:, :, :K]
    found["through dispatch, strided: float32"] = relative(dispatch.linear(x, layer, "int8_triton"), layer.reference(x))
    assert dispatch.running()[-1].name == "int8_triton"
    for rotation, rank in ((0, 0), (0, 48), (256, 16)):
        layer, k = a_layer(rank=rank, k=256 if rotation else K), 256 if rotation else K
        x, parts = normal(M, k), (*nvfp4_quantise(normal(N, k, seed=7)), normal(N, seed=8).abs())
        parts += (layer.proj_down, layer.proj_up, layer.smooth, layer.bias)
        got = nvfp4.linear(x, *parts, rotation=rotation, tile=Tile(32, 64, 4, 2))
        want = nvfp4_linear(x, *parts, rotation=rotation)
        found[f"K3 rotation {rotation} rank {rank}: float32"] = relative(got, want)
    return {**found, **shared()}


def shared() -> dict[str, float]:
    """Three layers of one input: how often K0 ran, and whether another input was given the first one's codes."""
    from dataclasses import replace

    from slipstream.kernels import activations, implementations

    ran = []
    true = activations.quantise
    activations.quantise = lambda *a, **o: ran.append(1) or true(*a, **o)
    layers = [replace(a_layer(), weight=a_layer().weight.roll(i, 0), share=("qkv", 3)) for i in range(3)]
    run = {implementation.name: implementation.run for implementation in implementations.TABLE}["int8_triton"]
    worst = 0.0
    for x in (normal(M, K), normal(M, K, seed=9)):
        for layer in layers:
            worst = max(worst, relative(run(x, layer, (32, 64, 4, 2)), layer.reference(x)))
    activations.quantise = true
    return {"q, k, v of one input: float32": worst, "q, k, v: K0 runs beyond one for each input": len(ran) - 2}


TYPES = {
    "a": "*i8", "w": "*i8", "a_scale": "*fp32", "w_scale": "*fp32", "low": "*bf16", "up": "*bf16", "bias": "*bf16",
    "out": "*bf16", "x": "*bf16", "smooth": "*fp32", "inverse": "*fp32", "down": "*bf16", "codes": "*i8",
    "scales": "*fp32", "weight": "*i8", "scale": "*bf16", "folded": "*fp32",
}  # fmt: skip


def compile_all() -> dict[str, dict]:
    from slipstream.kernels.activations import quant_groups, quant_rows, warps_for
    from slipstream.kernels.dequant import expand_weight
    from slipstream.kernels.gemm import gemm_groups, gemm_rows
    from slipstream.kernels.implementations import triton_version

    gemm = {"LOW": True, "BIAS": True, "BR": 32, "ASM": True, "INTERP": False}
    k0 = {"ACT": 0, "SHIFT": 0.0, "SMOOTH": True, "UNSIGNED": False, "BR": 32, "BM": 16, "INTERP": False}
    found = {}
    for arch in (80, 86, 89, 90, 120):
        plain = {**k0, "ROT": 0, "BITS": 4, "BK": 128}
        found[f"K0 sm_{arch}"] = built(quant_groups, plain, arch, 4)
        n = 64 if arch == 90 else 128
        tile = {**gemm, "A_BITS": 4, "UNSIGNED": False, "BM": n, "BN": 128, "STAGES": 3}
        found[f"K1 W4A4 {n}x128 sm_{arch}"] = built(gemm_groups, tile, arch, n // 16)
        rows = {**gemm, "BITS": 8, "BM": 128, "BN": 128, "BK": 128, "STAGES": 3}
        found[f"K1 int8 rows 128x128 sm_{arch}"] = built(gemm_rows, rows, arch, 8)
    for arch in (86, 90):
        warps = warps_for(256, divmod(arch, 10))
        found[f"K0 rotated sm_{arch}"] = built(quant_groups, {**k0, "ROT": 256, "BITS": 4, "BK": 256}, arch, warps)
    rows = {key: value for key, value in k0.items() if key != "UNSIGNED"}
    found["K0 rows rotated sm_86"] = built(
        quant_rows, {**rows, "ROT": 256, "BITS": 8, "BK": 256, "PACKED": False}, 86, 8
    )
    for bits, unsigned in ((8, False), (4, True)):
        tile = {**gemm, "A_BITS": bits, "UNSIGNED": unsigned, "BM": 128, "BN": 128, "STAGES": 3}
        found[f"K1 W4A{bits}{' unsigned' * unsigned} 128x128 sm_86"] = built(gemm_groups, tile, 86, 8)
    expanded = {"BITS": 4, "GROUPS": 4, "SMOOTH": True, "ROT": 256, "FOLD": False, "BN": 16, "BK": 256}
    found["expand sm_75"] = built(expand_weight, expanded, 75, 4)
    if triton_version() >= (3, 6):
        from slipstream.kernels.nvfp4 import gemm_nvfp4, quant_blocks

        blocks = {"SMOOTH": True, "ROT": 256, "BR": 32, "BM": 16, "BK": 256, "INTERP": False}
        found["K3 blocks sm_120"] = built(quant_blocks, blocks, 120, 8, scales="*fp8e4nv")
        tile = {"LOW": True, "BIAS": True, "BM": 128, "BN": 128, "BK": 128, "BR": 32, "STAGES": 3, "INTERP": False}
        fp4 = {"a": "*u8", "w": "*u8", "a_scale": "*fp8e4nv", "w_scale": "*fp8e4nv", "channel": "*fp32"}
        found["K3 128x128 sm_120"] = built(gemm_nvfp4, tile, 120, 8, **fp4)
    try:
        from slipstream.kernels.int4_native import gemm_int4
    except ImportError:
        return found
    for arch, rows, unsigned in ((80, 128, False), (86, 128, False), (89, 128, False), (86, 64, True)):
        options = {"UNSIGNED": unsigned, "LOW": True, "BIAS": True, "BM": rows, "BN": 128}
        found[f"K2{' unsigned' * unsigned} {rows}x128 sm_{arch}"] = built(gemm_int4, options, arch, 8, gluon=True)
    return found


def built(kernel, constants: dict, arch: int, warps: int, gluon: bool = False, **pointers: str) -> dict:
    """Registers, spilled bytes, instructions of the loop with the tensor cores, shared stores in it, the MMA's name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource
    types = TYPES | pointers
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as source

        types |= dict.fromkeys(("a", "w", "low", "up"), "*i32")
    place = {name: i for i, name in enumerate(kernel.arg_names)}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in place}
    aligned = {(i,): [["tt.divisibility", 16]] for name, i in place.items() if name not in constants and name != "M"}
    ast = source(kernel, signature, {(place[name],): value for name, value in constants.items()}, aligned)
    done = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(done.asm["cubin"])
        text = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    loop = [m[1] for line in busiest_loop(text) if (m := re.search(r"\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9.]+)", line))]
    return {
        "registers": int(registers),
        "spilled": int(stack),
        "loop": len(loop),
        "stores": sum(op.split(".")[0] == "STS" for op in loop),
        "mma": sorted({m for m in re.findall(r"[A-Z]*MMA[.0-9A-Z]*", text)}),
    }


def busiest_loop(text: str) -> list[str]:
    """The lines of the loop with the most tensor-core instructions."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    best: list[str] = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i) < i:
            body = lines[labels[jump[1]] : i + 1]
            if sum("MMA" in row for row in body) > sum("MMA" in row for row in best):
                best = body
    return best


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compile_all()))
