"""The kernels on a card: right to float64, how near to what the card can do, and which serves a layer best."""

from __future__ import annotations

import concurrent.futures
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from lab.boot import ROOT

from .plan import NotThere, one_line
from .worker import Bench

RANK = 32
TOKENS = 4096

# Of a card's memory, for each process that compiles and compares: its context and a layer in float64.
PROCESS_BYTES = 2e9

# (K, N) of the large linear layers.
SHAPES = {
    "FLUX, Qwen-Image": ((3072, 3072), (3072, 12288), (12288, 3072)),
    "FLUX single block": ((3072, 21504), (15360, 3072)),
    "SDXL": ((640, 5120), (1280, 10240), (5120, 1280)),
    "Wan 14B": ((5120, 13824), (13824, 5120)),
}

# name -> the options of `Layer`
KINDS = {
    "W4A4, rotated": {"act_bits": 4, "rotation": 256},
    "W4A4, smoothed": {"act_bits": 4, "smooth": True},
    "W4A4, unsigned": {"act_bits": 4, "smooth": True, "unsigned": True},
    "W4A8, rotated": {"act_bits": 8, "rotation": 256},
    "W4A8, smoothed": {"act_bits": 8, "smooth": True},
    "convrot_w4a4": {"act_bits": 4, "rotation": 256, "per_row": True},
    "int8_convrot": {"act_bits": 8, "rotation": 256, "per_row": True},
}
TIMED = ("W4A4, rotated", "W4A8, rotated", "int8_convrot")

# Rows and outputs: multiples of 16 and others are two compiled variants, and neither divides into tiles.
SIZES = {"aligned": (1008, 3024), "ragged": (1001, 3003)}
DRY_SIZES = {"aligned": (32, 48), "ragged": (21, 41)}


def timed(run: Callable, bench: Bench, repeats: int = 15) -> float:
    """Median milliseconds of a call, after two that are not counted."""
    import torch

    run(), run()
    times = []
    for _ in range(1 if bench.dry else repeats):
        if bench.dry:
            began = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - began))
        else:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def card(bench: Bench) -> Iterator[dict]:
    """What the card is, and its rates: cuBLAS bfloat16 and int8 products of size 8192, a copy of 1 GB."""
    import torch

    with_pack()
    from slipstream.kernels.implementations import kitchen, triton_version

    yield {
        "name": "about", "device": "CPU, dry" if bench.dry else torch.cuda.get_device_name(bench.device),
        "capability": "" if bench.dry else torch.cuda.get_device_capability(bench.device),
        "date": str(datetime.date.today()), "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": ".".join(map(str, triton_version() or ("none",))), "kitchen": kitchen() is not None,
        "python": sys.version.split()[0], "processors": os.cpu_count(), "host": host_version(),
        "memory_gb": 0 if bench.dry else torch.cuda.get_device_properties(bench.device).total_memory / 1e9,
    }  # fmt: skip
    n = 64 if bench.dry else 8192
    a = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    b = torch.randint(-127, 128, (n, n), device=bench.device).to(torch.int8)
    source = torch.empty(1 << 16 if bench.dry else 1 << 30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    moved = 2 * source.numel()
    for name, work, run, unit in (
        ("bf16", 2 * n**3, lambda: a @ a, "TFLOP/s"),
        ("int8", 2 * n**3, lambda: torch._int_mm(b, b.T), "TOP/s"),
        ("bandwidth", moved, lambda: target.copy_(source), "GB/s"),
    ):
        try:
            rate = work / timed(run, bench) * 1000
        except Exception as error:
            yield {"name": name, "failed": one_line(error)}
            continue
        yield {"name": name, "rate": rate / (1e9 if name == "bandwidth" else 1e12), "unit": unit, "rate_si": rate}


def host_version() -> str:
    """Of the ComfyUI that COMFYUI_PATH names; read, not imported: the kernels need no host."""
    try:
        with open(os.path.join(os.environ["COMFYUI_PATH"], "comfyui_version.py"), encoding="utf-8") as file:
            return next(line.split('"')[1] for line in file if line.startswith("__version__"))
    except (KeyError, OSError, StopIteration, IndexError):
        return "none"


def with_pack() -> None:
    """Make `slipstream.kernels` and `slipstream.quant` importable, with or without a host."""
    from lab.boot import import_pack

    import_pack()


def layer_of(kind: str, n: int, k: int, device, rank: int = RANK):
    """A random layer of a kind of KINDS; its rotation as large as K allows."""
    import torch
    from slipstream.kernels.layer import Layer
    from slipstream.kernels.reference import pack_int4
    from slipstream.quant.rotate import rotation_size

    options = dict(KINDS[kind])
    half = {"device": device, "dtype": torch.bfloat16}
    if options.get("rotation"):
        options["rotation"] = rotation_size(k)
    bias = torch.randn(n, **half)
    four = options["act_bits"] == 4 or not options.get("per_row")
    codes = torch.randint(*((-8, 8) if four else (-127, 128)), (n, k), device=device).to(torch.int8)
    if options.pop("per_row", False):
        scale = torch.rand(n, device=device) / 100
        weight = pack_int4(codes) if four else codes
        return Layer(weight, scale, bias=bias, weight_bits=4 if four else 8, group_size=0, **options)
    smooth = torch.rand(k, **half) + 0.5 if options.pop("smooth", False) else torch.ones(k, **half)
    scale = (torch.rand(k // 64, n, device=device) / 100).bfloat16()
    down, up = torch.randn(k, rank, **half) / k**0.5, torch.randn(n, rank, **half)
    return Layer(pack_int4(codes), scale, down, up, smooth, bias, **options)


def exactly(x, layer, act_bits: int):
    """The layer in float64: the codes by the contract's float32 arithmetic, everything after them without rounding."""
    from slipstream.kernels.reference import GELU_SHIFT, hadamard, quantise_activations, unpack_int4

    main = x.float() + GELU_SHIFT if layer.unsigned else x.float()
    if layer.smooth is not None:
        main = main / layer.smooth.float()
    size = layer.k if layer.per_row else layer.group_size
    unsigned = layer.unsigned and layer.act_bits == 4
    main = hadamard(main if act_bits < 16 else main.double(), layer.rotation)
    codes, scales = quantise_activations(main, bits=layer.act_bits, group_size=size, unsigned=unsigned)
    weight = (unpack_int4(layer.weight) if layer.weight_bits == 4 else layer.weight).double()
    if layer.per_row:
        weight = weight * layer.weight_scale.double().view(-1, 1)
    else:
        weight = (weight.view(layer.n, -1, 64) * layer.weight_scale.double().T[..., None]).view(layer.n, -1)
    values = (codes.double().view(len(x), -1, size) * scales.double()[..., None]).view(len(x), -1)
    values = values if act_bits < 16 else main
    out = values @ weight.T + layer.bias.double()
    return out if not layer.rank else out + x.double() @ layer.proj_down.double() @ layer.proj_up.double().T


def ways(x, layer) -> Iterator[tuple[object, tuple]]:
    """Every implementation that fits, with every configuration; K2 also where dispatch would not take it."""
    from slipstream.kernels import implementations as found

    problem = found.Problem.of(x, layer)
    for way in found.TABLE:
        emulated = (
            way.name == "int4_native" and problem.capability >= (9, 0) and problem.triton((3, 5)) and problem.tiled
        )
        if way.fits(problem) or (emulated and layer.act_bits == layer.weight_bits == 4):
            for config in way.configs(problem):
                yield way, config


def agree(bench: Bench) -> Iterator[dict]:
    """Relative error of each implementation against float64 on fresh random inputs, and the seconds of its first call.

    A process for each kind of layer and size, so that Triton compiles in parallel and one that crashes costs its own
    rows; what they compile is kept on disk, and the lines after this one find it.
    """
    import torch

    with_pack()
    from slipstream.kernels.implementations import kitchen, triton_version

    for name, package in (("Triton", triton_version()), ("comfy-kitchen", kitchen())):
        if package is None:
            yield {"name": name, "not there": "the package is not installed"}
    tasks = [(kind, size) for kind in KINDS for size in SIZES] + [("K3", "aligned")]
    tasks = tasks[2::4] if bench.dry else tasks  # a process takes seconds to start
    room = 2 if bench.dry else int(torch.cuda.mem_get_info(bench.device)[0] / PROCESS_BYTES)
    count = max(1, min(12, (os.cpu_count() or 2) - 1, room))
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        found = [pool.submit(in_a_process, str(bench.device), *task) for task in tasks]
        for future in concurrent.futures.as_completed(found):
            yield from future.result()


def in_a_process(device: str, kind: str, size: str) -> list[dict]:
    """`agreement` in a process of its own: the rows it came to, and one that says so if it did not end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if device == "cpu" else {})}
    command = [sys.executable, "-m", "bench.speed.card.kernels", device, kind, size]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [""])[-1][:200]
        rows.append({"name": "", "format": kind, "sizes": size, "failed": f"ended with {done.returncode}: {why}"})
    return rows


def agreement(device: str, kind: str, size: str) -> Iterator[dict]:
    """The rows of one kind and size."""
    import torch

    with_pack()
    torch.set_num_threads(1)
    dry = device == "cpu"
    (m, n), k = (DRY_SIZES if dry else SIZES)[size], 256 if dry else 3072
    if kind == "K3":
        yield fp4(torch.device(device), m, n, k)
        return
    layer = layer_of(kind, n, k, device)
    x = torch.randn(m, k, device=device).bfloat16()
    rounded, full = exactly(x, layer, layer.act_bits), exactly(x, layer, 16)
    seen = set()
    for way, config in ways(x, layer):
        if dry and way.name in seen:
            continue  # the interpreter takes as long for every tile
        seen.add(way.name)
        row = {"name": way.name, "format": kind, "sizes": size, "config": "x".join(map(str, config))}
        try:
            began = time.perf_counter()
            got = way.run(x, layer, config).double()
            float(got[0, 0])
            row["first_call_s"] = time.perf_counter() - began
            true = full if way.like == 16 else rounded
            row["activations"] = "as they are" if way.like == 16 else "rounded"
            row["error"] = float((got - true).norm() / true.norm())
            row["worst_row"] = float(((got - true).norm(dim=1) / true.norm(dim=1)).max())
        except Exception as error:
            row["failed"] = one_line(error)
        yield row


def fp4(device, m: int, n: int, k: int) -> dict:
    """K3 with its branch against the reference's arithmetic in float64; by the numbers of the codes where the card has
    no instruction for them."""
    import torch
    from slipstream.kernels.implementations import triton_version
    from slipstream.kernels.reference import nvfp4_quantise, nvfp4_values

    native = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (10, 12)
    row = {"name": "K3" if native else "K3, by its codes' numbers", "format": "NVFP4", "sizes": "aligned"}
    if (triton_version() or (0, 0)) < (3, 6):
        return {**row, "not there": "Triton 3.6"}
    half = {"device": device, "dtype": torch.bfloat16}
    x, down, up = torch.randn(m, k, **half), torch.randn(k, 32, **half) / k**0.5, torch.randn(n, 32, **half)
    packed, scales = nvfp4_quantise(torch.randn(n, k, **half))
    channel = torch.rand(n, device=device) / 10 + 0.1
    try:
        from slipstream.kernels.gemm import Tile
        from slipstream.kernels.nvfp4 import TILE, linear

        tile = TILE if native else Tile(32, 64, 4, 2)
        got = linear(x, packed, scales, channel, down, up, tile=tile, by_numbers=not native).double()
        true = nvfp4_values(*nvfp4_quantise(x)).double() @ nvfp4_values(packed, scales).double().T * channel.double()
        true += x.double() @ down.double() @ up.double().T
        return {**row, "error": float((got - true).norm() / true.norm())}
    except Exception as error:
        return {**row, "failed": one_line(error)}


def needs_triton() -> None:
    with_pack()
    from slipstream.kernels.implementations import TENSOR_CORES, triton_version

    if (triton_version() or (0, 0)) < TENSOR_CORES:
        raise NotThere(f"Triton {'.'.join(map(str, TENSOR_CORES))} or newer")


def on_card(bench: Bench, run: Callable[[], float], row: dict) -> dict:
    """The row with what `run` measures, or why it failed; a dry run has no compiler for the CPU and times no kernel."""
    if bench.dry:
        return {**row, "dry": True}
    try:
        return {**row, "ms": run()}
    except Exception as error:
        bench.sync()  # raises where the card is unusable, so that another process goes on
        return {**row, "failed": one_line(error)}


def k0(bench: Bench) -> Iterator[dict]:
    """K0 against the time its bytes take."""
    import torch

    needs_triton()
    from slipstream.kernels.activations import quantise

    m = 32 if bench.dry else TOKENS
    for k in (256,) if bench.dry else (3072, 12288):
        x, down = (torch.randn(a, b, device=bench.device).bfloat16() for a, b in ((m, k), (k, RANK)))
        smooth = torch.rand(k, device=bench.device).bfloat16() + 0.5
        for bits, rotation in ((4, 0), (4, 256), (8, 256)):
            moved = 2 * m * k + m * k * bits / 8 + m * k / 16 + 2 * RANK * (m + k)
            for tall in (16, 32):
                options = {"bits": bits, "rotation": rotation, "rows": tall}
                run = lambda a=(x, smooth, down), o=options: timed(lambda: quantise(*a, **o), bench)  # noqa: E731
                row = on_card(bench, run, {"name": f"{bits} bit, rotation {rotation}", "k": k, "rows": tall})
                if "ms" in row and "bandwidth" in bench.rates:
                    row["floor_ms"] = 1000 * moved / bench.rates["bandwidth"]
                    row["times_floor"] = row["ms"] / row["floor_ms"]
                yield row


def products(bench: Bench) -> Iterator[dict]:
    """The products alone, codes ready: int8 by cuBLAS and by K1, grouped W4A4 and W4A8 by K1."""
    import torch

    needs_triton()
    from slipstream.kernels.gemm import linear, tiles

    capability = (8, 6) if bench.dry else torch.cuda.get_device_capability(bench.device)
    m, device = 32 if bench.dry else TOKENS, bench.device
    for k, n in ((256, 64),) if bench.dry else ((3072, 3072), (3072, 12288), (12288, 3072)):
        a = torch.randint(-127, 128, (m, k), device=device).to(torch.int8)
        w = torch.randint(-127, 128, (n, k), device=device).to(torch.int8)
        row_scales = torch.rand(m, device=device), torch.rand(n, device=device)
        group_scales = torch.rand(k // 64, m, device=device), torch.rand(k // 64, n, device=device)
        half = w[:, : k // 2].contiguous()
        found = [("torch._int_mm", None, lambda a=a, w=w: torch._int_mm(a, w.T))]
        for tile in tiles(m, capability, rows=True):
            found.append(("K1 int8 rows (folded W4A8)", tile, lambda a=a, w=w, s=row_scales, t=tile: linear(
                a, s[0], w, s[1], torch.bfloat16, act_bits=8, tile=t)))  # fmt: skip
        for tile in tiles(m, capability):
            for bits in (4, 8):
                codes = a if bits == 8 else a[:, : k // 2].contiguous()
                found.append((f"K1 W4A{bits} groups", tile, lambda c=codes, h=half, s=group_scales, b=bits, t=tile:
                              linear(c, s[0], h, s[1], torch.bfloat16, act_bits=b, tile=t)))  # fmt: skip
        for name, tile, run in found:
            config = "x".join(map(str, (tile.m, tile.n, tile.warps, tile.stages))) if tile else ""
            row = {"name": name, "config": config, "k": k, "n": n}
            row = on_card(bench, lambda r=run: timed(r, bench), row)
            yield {**row, **(shares(bench, 2 * m * n * k, row["ms"]) if "ms" in row else {})}


def layers(bench: Bench) -> Iterator[dict]:
    """Whole layers: each implementation with its best configuration, beside 16-bit cuBLAS, with the roofline."""
    import torch
    import torch.nn.functional as F

    with_pack()
    m, device = 16 if bench.dry else TOKENS, bench.device
    for model, shapes in ({"tiny": ((256, 64),)} if bench.dry else SHAPES).items():
        for k, n in shapes:
            x, full = torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
            base = timed(lambda x=x, w=full: F.linear(x, w), bench)
            shape, work = {"model": model, "n": n, "k": k}, 2 * m * n * k
            yield {
                **shape,
                "name": "F.linear",
                "format": "bf16",
                "ms": base,
                "speedup": 1.0,
                **shares(bench, work, base),
            }
            for kind in TIMED:
                layer = layer_of(kind, n, k, device)
                moved = 2 * m * k + n * k * layer.weight_bits / 8 + 2 * m * n
                yield from fastest(bench, x, layer, {**shape, "format": kind}, base, work, moved)


def fastest(bench: Bench, x, layer, shape: dict, base: float, work: float, moved: float) -> list[dict]:
    """A row for each implementation that fits a layer: its best configuration, or why it failed."""
    best: dict[str, dict] = {}
    for way, config in ways(x, layer):
        emulated = way.name == "int4_native" and not bench.dry and not way.fits(problem_of(x, layer))
        if (way.name == "reference" and not bench.dry) or emulated:
            continue
        row = {**shape, "name": way.name, "config": "x".join(map(str, config))}
        try:
            took = timed(lambda w=way, c=config: w.run(x, layer, c), bench, 7)
        except Exception as error:
            bench.sync()
            best.setdefault(way.name, {**row, "failed": one_line(error)})
            continue
        if took < best.get(way.name, {}).get("ms", float("inf")):
            best[way.name] = {**row, "ms": took, "speedup": base / took, **shares(bench, work, took)}
            if {"int8", "bandwidth"} <= bench.rates.keys() and not bench.dry:
                floor = max(work / bench.rates["int8"], moved / bench.rates["bandwidth"])
                best[way.name]["roofline_ms"] = 1000 * floor
    return list(best.values())


def problem_of(x, layer):
    from slipstream.kernels.implementations import Problem

    return Problem.of(x, layer)


def shares(bench: Bench, work: float, ms: float) -> dict[str, float]:
    """Of the rates measured on this card, in per cent."""
    known = () if bench.dry else [name for name in ("int8", "bf16") if name in bench.rates]
    return {f"of_{name}_pct": 100 * work / ms * 1000 / bench.rates[name] for name in known}


if __name__ == "__main__":
    for found in agreement(*sys.argv[1:]):
        print(json.dumps(found), flush=True)
