"""What a quantised layer costs the host's side, and whether compilers and graphs take it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .kernels import with_pack
from .plan import NotThere, one_line
from .worker import Bench

CALLS = 300

# Few tokens, so that the card is done before the next call comes and what is measured is the calling.
SMALL, WIDE = 64, 4096


def module(bench: Bench, k: int, n: int, act_bits: int = 4):
    """A W4A4Linear (K, N) of random weights in bfloat16."""
    import torch

    with_pack()
    from slipstream.quant.layer import quantise_linear
    from slipstream.quant.linear import W4A4Linear

    from lab.methods import METHODS, with_spec

    weight = torch.randn(n, k, device=bench.device, dtype=torch.bfloat16) / k**0.5
    method = with_spec(METHODS["hadamard_svd"], format={4: "svdquant_w4a4", 8: "w4a8"}[act_bits])
    return W4A4Linear(quantise_linear(weight, torch.randn(n, device=bench.device).bfloat16(), method).layer)


def per_layer(bench: Bench) -> Iterator[dict]:
    """Microseconds until a call returns, nothing waited for, beside the host's own linear layer."""
    import torch

    k = n = 256 if bench.dry else 3072
    x = torch.randn(8 if bench.dry else SMALL, k, device=bench.device, dtype=torch.bfloat16)
    dense = torch.nn.Linear(k, n, device=bench.device, dtype=torch.bfloat16)
    layers = {"F.linear": dense, "W4A4Linear": module(bench, k, n), "W4A4Linear, W4A8": module(bench, k, n, 8)}
    with torch.inference_mode():
        for name, layer in layers.items():
            yield {"name": name, "python_us": microseconds(bench, lambda run=layer: run(x))}


def microseconds(bench: Bench, run: Callable, repeats: int = 5) -> float:
    """Of one call, the least of some rounds."""
    count = 3 if bench.dry else CALLS
    best = float("inf")
    for _ in range(1 if bench.dry else repeats):
        run()
        bench.sync()
        began = time.perf_counter()
        for _ in range(count):
            run()
        best = min(best, (time.perf_counter() - began) / count)
        bench.sync()
    return 1e6 * best


def compiled(bench: Bench) -> Iterator[dict]:
    """An MLP of two quantised layers, compiled whole and captured in a CUDA graph: its output and its milliseconds."""
    import torch

    from .kernels import timed

    width = 256 if bench.dry else 3072
    with torch.inference_mode():
        block = torch.nn.Sequential(module(bench, width, 4 * width), torch.nn.GELU(), module(bench, 4 * width, width))
        x = torch.randn(8 if bench.dry else WIDE, width, device=bench.device, dtype=torch.bfloat16)
        true = block(x).float()
        yield {"name": "as it is", "ms": timed(lambda: block(x), bench)}
        for name, make in (("torch.compile", whole), ("CUDA graph", graph)):
            try:
                began = time.perf_counter()
                run = make(bench, block, x)
                error = float((run().float() - true).norm() / true.norm())
                yield {"name": name, "made_s": time.perf_counter() - began, "error": error, "ms": timed(run, bench)}
            except NotThere as missing:
                yield {"name": name, "not there": str(missing)}
            except Exception as error:
                yield {"name": name, "failed": one_line(error)}


def whole(bench: Bench, block, x) -> Callable:
    import torch

    found = torch.compile(block, fullgraph=True, backend="aot_eager" if bench.dry else "inductor")
    return lambda: found(x)


def graph(bench: Bench, block, x) -> Callable:
    import torch

    if bench.dry:
        raise NotThere("a card")
    block(x)
    bench.sync()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = block(x)

    def run():
        captured.replay()
        return out

    return run
