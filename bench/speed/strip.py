"""What the strip on the canvas costs: sampling with its events and without, in turns, beside the real server.

    python dev.py bench strip [--pairs 40] [--steps 50]

Writes bench/out/strip.json. A page is connected, so messages are made, queued and sent. Off is the same model with
nodes that have no id, which send nothing. Every evaluation is computed (a cheap one would hide what a message costs
beside it), and the two settings change places from pair to pair.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time

from lab.boot import ROOT, boot
from lab.rows import save, table

OUT = ROOT / "bench" / "out" / "strip.json"
COLUMNS = (
    "name",
    "steps",
    "seconds",
    "events_off_seconds",
    "ratio",
    "event_microseconds",
    "percent_of_run",
    "messages",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench strip")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(argv)
    boot()
    rows = [measure(options.pairs, options.steps)]
    save(OUT, rows)
    print(table(rows, COLUMNS))


def start_server():
    """The host's server on a free port with one page connected, its loop in a thread; returns it and the page's count
    of messages."""
    import utils.install_util  # noqa: F401, I001  before anything of comfy, which has a `utils` of its own
    import aiohttp
    import server
    from aiohttp import web

    loop, ready, received = asyncio.new_event_loop(), threading.Event(), []

    async def page(port: int) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{port}/ws?clientId=bench") as socket,
        ):
            ready.set()
            async for message in socket:
                received.append(message.data)

    async def serve() -> None:
        host = server.PromptServer(loop)
        host.client_id = host.last_prompt_id = "bench"
        host.app.add_routes(host.routes)
        runner = web.AppRunner(host.app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        await asyncio.gather(host.publish_loop(), page(site._server.sockets[0].getsockname()[1]))

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())

    threading.Thread(target=run, daemon=True).start()
    if not ready.wait(60):
        raise SystemExit("the host's server did not start within a minute")
    return received


def measure(pairs: int, steps: int) -> dict:
    """Medians of `pairs` runs each way, and what the calls themselves took on the sampler's thread."""
    received = start_server()
    import comfy.sample
    import torch
    from slipstream.engine.run.plan import CacheConfig, PredictorConfig
    from slipstream.host.canvas import events
    from slipstream.host.model import add_cache, add_predictor

    from demo import emoji

    torch.set_num_threads(1)
    base, spent = emoji.load_flux(), []
    evaluation, finished = events.evaluation, events.finished

    def timed(call):
        def wrapper(*args):
            started = time.perf_counter()
            call(*args)
            spent.append(time.perf_counter() - started)

        return wrapper

    def with_nodes(*ids: str):
        model = add_cache(base, CacheConfig("Off", node_id=ids[0]))
        return add_predictor(model, PredictorConfig(node_id=ids[1]))

    models = {"on": with_nodes("1", "2"), "off": with_nodes("", "")}
    latent = torch.zeros(1, 16, 16, 16)
    positive = emoji.conditioning("hamburger")

    def sample(which: str) -> float:
        noise = comfy.sample.prepare_noise(latent, 1)
        started = time.perf_counter()
        with torch.inference_mode():
            comfy.sample.sample(
                models[which],
                noise,
                steps,
                1.0,
                "euler",
                "simple",
                positive,
                positive,
                latent,
                disable_pbar=True,
                seed=1,
            )
        return time.perf_counter() - started

    for which in models:
        sample(which)
    times: dict[str, list[float]] = {"on": [], "off": []}
    before = len(received)
    for pair in range(pairs):
        for which in ("on", "off") if pair % 2 else ("off", "on"):
            times[which].append(sample(which))
    messages = len(received) - before
    # Timed in runs of their own: the clock around each call would count into the comparison above.
    events.evaluation, events.finished = timed(evaluation), timed(finished)
    try:
        whole = [sample("on") for _ in range(max(3, pairs // 8))]
    finally:
        events.evaluation, events.finished = evaluation, finished
    on, off = statistics.median(times["on"]), statistics.median(times["off"])
    low, ratio, high = statistics.quantiles(a / b for a, b in zip(times["on"], times["off"], strict=True))
    return {
        "name": "small Flux, every evaluation computed",
        "model": "Flux",
        "sampler": "euler",
        "steps": steps,
        "evaluations": steps,
        "seconds": on,
        "events_off_seconds": off,
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "event_microseconds": 1e6 * statistics.median(spent),
        "percent_of_run": 100 * sum(spent) / sum(whole),
        "messages": messages / pairs,
        "pairs": pairs,
    }


if __name__ == "__main__":
    main()
