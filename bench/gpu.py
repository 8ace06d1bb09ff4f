"""The kernels on the card of this machine: right to float64, how near to what the card can do, and whole models.

    python dev.py bench gpu [--sections rates correctness k0 gemm layers models] [--m 1024 4096 8192] [--merge]

Writes bench/out/gpu.json and docs/gpu.md. Without a card every section runs on the CPU in tiny shapes, which shows
that the script works; nothing is written then, because nothing was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .boot import ROOT, boot
from .gpu_models import models
from .rows import save, table

OUT = ROOT / "bench" / "out" / "gpu.json"
PAGE = ROOT / "docs" / "gpu.md"
SECTIONS = ("rates", "correctness", "k0", "gemm", "layers", "models")
RANK = 32

# (K, N) of the large linear layers.
SHAPES = {
    "SDXL": ((640, 640), (640, 5120), (1280, 1280), (1280, 10240), (5120, 1280)),
    "FLUX, Qwen-Image": ((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072)),
    "FLUX single block": ((3072, 21504), (15360, 3072)),
    "Wan 1.3B": ((1536, 1536), (1536, 8960), (8960, 1536)),
    "Wan 14B": ((5120, 5120), (5120, 13824), (13824, 5120)),
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

HEAD = """# On a card

Written by `python dev.py bench gpu` on {device}, {date}, torch {torch}, Triton {triton}. Milliseconds are the median of
repeated calls on warm data. Shares are of the rates measured in the same run: {rates}.

`roofline_ms` is the larger of the multiplications at the measured int8 rate and the bytes at the measured bandwidth;
what beats it does not multiply in int8. `layers` contains everything a layer does: K0, the product, branch and bias.
{note}
"""
HOPPER = """
On Hopper the 4-bit instruction is emulated and int8 is no more than twice as fast as bfloat16, so nothing here shows
what a GeForce card gains, whose int8 rate is four times its bfloat16 rate; K2 is shown for its numbers only.
"""


@dataclass(frozen=True)
class Card:
    """What the figures are measured against: operations and bytes per second; zero where there is no card."""

    device: object
    bf16: float = 0.0
    int8: float = 0.0
    bandwidth: float = 0.0

    @property
    def there(self) -> bool:
        return self.device.type == "cuda"

    def roofline(self, operations: float, moved: float) -> float:
        """Milliseconds; zero without a card."""
        return 1000 * max(operations / self.int8, moved / self.bandwidth) if self.int8 else 0.0


def timed(run: Callable, card: Card, repeats: int = 15) -> float:
    """Median milliseconds of a call, after two that are not counted."""
    import torch

    run(), run()
    times = []
    for _ in range(repeats if card.there else 1):
        if card.there:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def rates(device) -> tuple[Card, list[dict]]:
    """What the card does at best: cuBLAS bfloat16 and int8 products of size 8192, a copy of 1 GB."""
    import torch

    n = 8192 if device.type == "cuda" else 64
    card = Card(device)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    bf16 = 2 * n**3 / timed(lambda: a @ a, card) * 1000
    b = torch.randint(-127, 128, (n, n), device=device).to(torch.int8)
    int8 = 2 * n**3 / timed(lambda: torch._int_mm(b, b.T), card) * 1000
    source = torch.empty((1 << 30) if device.type == "cuda" else 1 << 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() / timed(lambda: target.copy_(source), card) * 1000
    found = [("bf16", bf16 / 1e12, "TFLOP/s"), ("int8", int8 / 1e12, "TOP/s"), ("bandwidth", moved / 1e9, "GB/s")]
    rows = [{"section": "rates", "name": name, "rate": rate, "unit": unit} for name, rate, unit in found]
    return Card(device, bf16, int8, moved), rows


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
    if options.pop("per_row", False):
        bits = options["act_bits"]
        codes = (
            torch.randint(-8, 8, (n, k), device=device)
            if bits == 4
            else torch.randint(-127, 128, (n, k), device=device)
        )
        weight = pack_int4(codes) if bits == 4 else codes.to(torch.int8)
        scale = torch.rand(n, device=device) / 100
        return Layer(weight, scale, bias=bias, weight_bits=bits, group_size=0, **options)
    smooth = torch.rand(k, **half) + 0.5 if options.pop("smooth", False) else torch.ones(k, **half)
    codes = torch.randint(-8, 8, (n, k), device=device)
    scale = (torch.rand(k // 64, n, device=device) / 100).bfloat16()
    down, up = torch.randn(k, rank, **half) / k**0.5, torch.randn(n, rank, **half)
    return Layer(pack_int4(codes), scale, down, up, smooth, bias, **options)


def exactly(x, layer, act_bits: int):
    """The layer in float64: the codes by the contract's float32 arithmetic, everything after them without rounding."""
    from slipstream.kernels.reference import GELU_SHIFT, hadamard, quantize_activations, unpack_int4

    main = x.float() + GELU_SHIFT if layer.unsigned else x.float()
    if layer.smooth is not None:
        main = main / layer.smooth.float()
    size = layer.k if layer.per_row else layer.group_size
    unsigned = layer.unsigned and layer.act_bits == 4
    main = hadamard(main if act_bits < 16 else main.double(), layer.rotation)
    codes, scales = quantize_activations(main, bits=layer.act_bits, group_size=size, unsigned=unsigned)
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


def correctness(card: Card) -> list[dict]:
    """Relative error of each implementation against float64, on fresh random inputs of a ragged shape."""
    import torch

    rows = []
    m, n, k = (1000, 3000, 3072) if card.there else (20, 40, 256)
    for kind in KINDS:
        layer = layer_of(kind, n, k, card.device)
        x = torch.randn(m, k, device=card.device).bfloat16()
        rounded, full = exactly(x, layer, layer.act_bits), exactly(x, layer, 16)
        for way, config in ways(x, layer):
            row = {"section": "correctness", "name": way.name, "format": kind, "m": m, "n": n, "k": k,
                   "config": "x".join(map(str, config))}  # fmt: skip
            try:
                got = way.run(x, layer, config).double()
                true = full if way.like == 16 else rounded
                row["activations"] = "as they are" if way.like == 16 else "rounded"
                row["error"] = float((got - true).norm() / true.norm())
                row["worst_row"] = float(((got - true).norm(dim=1) / true.norm(dim=1)).max())
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:160]
            rows.append(row)
    return [*rows, fp4_row(card, m, n, k)]


def fp4_row(card: Card, m: int, n: int, k: int, correct: bool = True) -> dict:
    """K3 with its branch: its error against the reference's arithmetic in float64, or its milliseconds."""
    import torch
    from slipstream.kernels.implementations import triton_version
    from slipstream.kernels.reference import nvfp4_quantize, nvfp4_values

    row = {"section": "correctness", "name": "K3", "format": "NVFP4", "m": m, "n": n, "k": k}
    if (triton_version() or (0, 0)) < (3, 6) or not card.there:
        return {**row, "failed": "needs a card and Triton 3.6"}
    half = {"device": card.device, "dtype": torch.bfloat16}
    x, down, up, bias = torch.randn(m, k, **half), torch.randn(k, 32, **half), torch.randn(n, 32, **half), None
    packed, scales = nvfp4_quantize(torch.randn(n, k, **half))
    channel = torch.rand(n, device=card.device) / 10 + 0.1
    try:
        from slipstream.kernels.nvfp4 import linear

        def layer():
            return linear(x, packed, scales, channel, down / k**0.5, up, None, bias)

        if not correct:
            return {**row, "ms": timed(layer, card)}
        true = nvfp4_values(*nvfp4_quantize(x)).double() @ nvfp4_values(packed, scales).double().T * channel.double()
        true += x.double() @ (down / k**0.5).double() @ up.double().T
        return {**row, "error": float((layer().double() - true).norm() / true.norm())}
    except Exception as error:
        return {**row, "failed": f"{type(error).__name__}: {error}"[:160]}


def k0(card: Card, sizes) -> list[dict]:
    """K0 against the time its bytes take."""
    import torch
    from slipstream.kernels.implementations import triton_version

    if not card.there or triton_version() is None:
        return []
    from slipstream.kernels.activations import quantise

    rows = []
    for m in sizes:
        for k in (1280, 3072, 5120, 12288):
            x, down = (torch.randn(a, b, device=card.device).bfloat16() for a, b in ((m, k), (k, RANK)))
            smooth = torch.rand(k, device=card.device).bfloat16() + 0.5
            for bits, rotation in ((4, 0), (4, 256), (8, 256)):
                moved = 2 * m * k + m * k * bits / 8 + m * k / 16 + 2 * RANK * (m + k)
                for tall in (16, 32):
                    options = {"bits": bits, "rotation": rotation, "rows": tall}
                    took = timed(lambda a=(x, smooth, down), o=options: quantise(*a, **o), card)
                    rows.append(
                        {"section": "k0", "name": f"K0, {bits} bit, rotation {rotation}", "m": m, "k": k,
                         "config": tall, "ms": took, "floor_ms": 1000 * moved / card.bandwidth,
                         "times_floor": took * card.bandwidth / moved / 1000}
                    )  # fmt: skip
    return rows


def gemm(card: Card, sizes) -> list[dict]:
    """The products alone, codes ready: int8 by cuBLAS and by K1, grouped W4A4 and W4A8 by K1."""
    import torch
    from slipstream.kernels.implementations import triton_version

    if not card.there or triton_version() is None:
        return []
    from slipstream.kernels.gemm import linear, tiles

    rows = []
    capability = torch.cuda.get_device_capability(card.device)
    for m in sizes:
        for k, n in ((3072, 3072), (3072, 12288), (12288, 3072)):
            a = torch.randint(-127, 128, (m, k), device=card.device).to(torch.int8)
            w = torch.randint(-127, 128, (n, k), device=card.device).to(torch.int8)
            row_scales = torch.rand(m, device=card.device), torch.rand(n, device=card.device)
            group_scales = torch.rand(k // 64, m, device=card.device), torch.rand(k // 64, n, device=card.device)
            half = w[:, : k // 2].contiguous()
            ways = [("torch._int_mm", "", lambda a=a, w=w: torch._int_mm(a, w.T))]
            for tile in tiles(m, capability, rows=True):
                ways.append(("K1 int8 rows (folded W4A8)", tile, lambda a=a, w=w, s=row_scales, t=tile: linear(
                    a, s[0], w, s[1], torch.bfloat16, act_bits=8, tile=t)))  # fmt: skip
            for tile in tiles(m, capability):
                for bits in (4, 8):
                    codes = a if bits == 8 else a[:, : k // 2].contiguous()
                    ways.append((f"K1 W4A{bits} groups", tile, lambda c=codes, h=half, s=group_scales, b=bits, t=tile:
                                 linear(c, s[0], h, s[1], torch.bfloat16, act_bits=b, tile=t)))  # fmt: skip
            for name, tile, run in ways:
                took = timed(run, card)
                rate = 2 * m * n * k / took * 1000
                config = "x".join(map(str, (tile.m, tile.n, tile.warps, tile.stages))) if tile else ""
                rows.append(
                    {"section": "gemm", "name": name, "config": config, "m": m, "n": n, "k": k, "ms": took,
                     "of_int8_pct": 100 * rate / card.int8, "of_bf16_pct": 100 * rate / card.bf16}
                )  # fmt: skip
    return rows


def layers(card: Card, sizes) -> list[dict]:
    """Whole layers: each implementation with its best configuration, beside 16-bit cuBLAS, with the roofline."""
    import torch
    import torch.nn.functional as F

    shapes = SHAPES if card.there else {"tiny": ((256, 64),)}
    rows = []
    for model, m in ((model, m) for model in shapes for m in (sizes if card.there else (16,))):
        for k, n in shapes[model]:
            x = torch.randn(m, k, device=card.device).bfloat16()
            full = torch.randn(n, k, device=card.device).bfloat16()
            base = timed(lambda x=x, w=full: F.linear(x, w), card)
            shape = {"section": "layers", "model": model, "m": m, "n": n, "k": k}
            rate = 2 * m * n * k / base * 1000
            rows.append(
                {**shape, "name": "F.linear", "format": "bf16", "ms": base, "speedup": 1.0, **shares(card, rate)}
            )
            if card.there and torch.cuda.get_device_capability(card.device)[0] == 12:
                row = {**fp4_row(card, m, n, k, correct=False), **shape}
                rows.append({**row, "speedup": base / row["ms"]} if "ms" in row else row)
            for kind in KINDS:
                layer = layer_of(kind, n, k, card.device)
                best: dict[str, dict] = {}
                for way, config in ways(x, layer):
                    if way.name == "reference" and card.there:
                        continue
                    try:
                        took = timed(lambda w=way, x=x, y=layer, c=config: w.run(x, y, c), card, 7)
                    except Exception as error:
                        best.setdefault(
                            way.name, {**shape, "name": way.name, "format": kind, "failed": str(error)[:160]}
                        )
                        continue
                    if took < best.get(way.name, {}).get("ms", float("inf")):
                        moved = 2 * m * k + n * k * layer.weight_bits / 8 + 2 * m * n
                        best[way.name] = {
                            **shape, "name": way.name, "format": kind, "config": "x".join(map(str, config)), "ms": took,
                            "speedup": base / took, "roofline_ms": card.roofline(2 * m * n * k, moved),
                            **shares(card, 2 * m * n * k / took * 1000),
                        }  # fmt: skip
                rows += best.values()
    return rows


def shares(card: Card, rate: float) -> dict[str, float]:
    return {"of_int8_pct": 100 * rate / card.int8, "of_bf16_pct": 100 * rate / card.bf16} if card.int8 else {}


def columns(rows: list[dict]) -> list[str]:
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key != "section"]


def shown(rows: list[dict]) -> list[dict]:
    """Small numbers with four digits, which `table` would round to two decimals."""
    return [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def page(rows: list[dict]) -> str:
    about = next(row for row in rows if row["section"] == "about")
    rate = "; ".join(f"{r['name']} {r['rate']:.0f} {r['unit']}" for r in rows if r["section"] == "rates")
    note = HOPPER if about["capability"][0] == 9 else ""
    text = HEAD.format(rates=rate, note=note, **{k: about[k] for k in ("device", "date", "torch", "triton")})
    for section in SECTIONS[1:]:
        part = [row for row in rows if row["section"] == section]
        if part:
            text += f"\n## {section}\n\n" + table(shown(part), columns(part)) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench gpu")
    parser.add_argument("--sections", nargs="*", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--m", nargs="*", type=int, default=(1024, 4096, 8192))
    parser.add_argument("--merge", action="store_true", help="keep the sections that are not measured now")
    options = parser.parse_args()
    boot()
    import torch
    from slipstream.kernels.implementations import triton_version

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(time.time_ns() % (1 << 31))
    card, rows = rates(device)
    if not card.there:
        card = Card(device)  # no figure of a card
        rows = []
        print("There is no card on this machine: tiny shapes on the CPU, to run the script; nothing is written.")
    else:
        about = {"section": "about", "device": torch.cuda.get_device_name(0), "date": str(datetime.date.today()),
                 "capability": torch.cuda.get_device_capability(0), "torch": torch.__version__,
                 "triton": ".".join(map(str, triton_version() or ("none",)))}  # fmt: skip
        rows = [about, *rows]
    measure = {"correctness": correctness, "k0": lambda c: k0(c, options.m), "gemm": lambda c: gemm(c, options.m),
               "layers": lambda c: layers(c, options.m), "models": models}  # fmt: skip
    for section in options.sections:
        if section == "rates":
            continue
        part = measure[section](card)
        print(f"\n{section}: {'a card is needed' if not part else ''}")
        print(table(shown(part), columns(part)) if part else "", flush=True)
        rows += part
        if card.there:  # a lent card may be taken back before the end
            kept = json.loads(OUT.read_text()) if options.merge and OUT.exists() else []
            measured = {row["section"] for row in rows}
            whole = rows + [row for row in kept if row["section"] not in measured]
            save(OUT, whole)
            PAGE.write_text(page(whole))


if __name__ == "__main__":
    main()
