"""A real server in a folder of its own, and a client that can have several prompts in its queue."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import torch
from safetensors.torch import load, save_file

from lab.client import Client
from lab.server import Server, prepare_base

NODES = Path(__file__).parent / "nodes.py"
LORAS = ("one.safetensors", "two.safetensors")
PATIENCE = 240.0  # seconds for one prompt; the longest takes some ten


class StressServer(Server):
    """`with StressServer(base) as url`: custom nodes are linked, two LoRAs of the small Flux are made."""

    def __init__(self, base: Path):
        super().__init__(base / "server.log", base=base)

    def __enter__(self) -> str:
        link = prepare_base(self.base) / "custom_nodes" / "slipstream_stress.py"
        if not link.exists():
            link.symlink_to(NODES)
        make_loras(self.base / "models" / "loras")
        return super().__enter__()


def make_loras(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(LORAS):
        generator = torch.Generator().manual_seed(i)
        layer = f"diffusion_model.double_blocks.{i}.img_mlp.0"
        down = torch.randn(4, 256, generator=generator) * 0.1
        up = torch.randn(1024, 4, generator=generator) * 0.1
        save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, folder / name)


@dataclass(slots=True)
class Outcome:
    """What became of a prompt. kind: done, refused (before it ran), failed or interrupted; message: the host's."""

    kind: str = ""
    message: str = ""
    type: str = ""
    outputs: dict = field(default_factory=dict)
    events: list[tuple[str, dict]] = field(default_factory=list)
    ended: bool = False

    def named(self, name: str) -> list[dict]:
        return [data for kind, data in self.events if kind == name]


class Session(Client):
    """`post` queues, `finish` waits; `run` is both. Every message of the server goes to its prompt's Outcome."""

    def __init__(self, url: str):
        super().__init__(url)
        self.open: dict[str, Outcome] = {}

    async def send(self, path: str, data: dict) -> int:
        async with self.session.post(self.url + path, json=data) as response:
            return response.status

    async def post(self, graph: dict) -> tuple[str, Outcome]:
        """(prompt id, its Outcome, which fills while `finish` waits); a refused prompt has the id ''."""
        async with self.session.post(f"{self.url}/prompt", json={"prompt": graph, "client_id": self.id}) as response:
            answer = await response.json()
            if response.status != 200:
                return "", Outcome("refused", json.dumps(answer), ended=True)
        outcome = self.open[answer["prompt_id"]] = Outcome()
        return answer["prompt_id"], outcome

    async def finish(self, outcome: Outcome, until=None) -> Outcome:
        """Read messages until the prompt has ended, or until(outcome) holds. Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while not outcome.ended and not (until is not None and until(outcome)):
            try:
                message = await self.socket.receive(timeout=max(0.1, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise TimeoutError(f"no end within {PATIENCE:.0f} s") from None
            if message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                self._take(event["type"], event["data"])
            elif message.type != aiohttp.WSMsgType.BINARY:
                raise ConnectionError("the server closed the connection")
        return outcome

    def _take(self, kind: str, data: dict) -> None:
        outcome = self.open.get(data.get("prompt_id"))
        if outcome is None:
            return
        outcome.events.append((kind, data))
        if kind == "executed" and data.get("output"):
            outcome.outputs[data["node"]] = data["output"]
        elif kind == "execution_error":
            outcome.kind, outcome.type = "failed", data["exception_type"]
            outcome.message = data["exception_message"].strip()
        elif kind == "execution_interrupted":
            outcome.kind = "interrupted"
        elif kind == "executing" and data["node"] is None:
            outcome.kind, outcome.ended = outcome.kind or "done", True
            del self.open[data["prompt_id"]]

    async def run(self, graph: dict) -> Outcome:
        _, outcome = await self.post(graph)
        return await self.finish(outcome)

    async def latent(self, outcome: Outcome) -> torch.Tensor:
        """The latent that a prompt saved."""
        (file,) = (f for output in outcome.outputs.values() for f in output.get("latents", []))
        return load(await self.file(file))["latent_tensor"]

    async def census(self) -> dict:
        return json.loads(await self.get("/stress/census"))
