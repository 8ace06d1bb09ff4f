"""Queue a prompt on a running ComfyUI server and wait for it: outputs, the sampler's seconds, and custom events."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field

import aiohttp


class PromptRefused(RuntimeError):
    """The host did not accept or could not finish a prompt; the message is the host's, per node."""


@dataclass(slots=True)
class Result:
    """outputs: {node id: the host's output dict}; seconds: {node id: time it was executing}; events: (type, data)."""

    outputs: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[tuple[str, dict]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)


class Client:
    """`async with Client(url) as client: await client.run(prompt)`."""

    def __init__(self, url: str):
        self.url = url
        self.id = uuid.uuid4().hex

    async def __aenter__(self) -> Client:
        self.session = aiohttp.ClientSession()
        self.socket = await self.session.ws_connect(f"{self.url}/ws?clientId={self.id}", max_msg_size=0)
        return self

    async def __aexit__(self, *exception) -> None:
        await self.socket.close()
        await self.session.close()

    async def get(self, path: str, **parameters) -> bytes:
        async with self.session.get(self.url + path, params=parameters) as response:
            response.raise_for_status()
            return await response.read()

    async def object_info(self) -> dict:
        return json.loads(await self.get("/object_info"))

    async def run(self, prompt: dict, timeout: float = 300.0, extra_pnginfo: dict | None = None) -> Result:
        """Queue the prompt and return when it has finished. Raises PromptRefused with the host's words.

        extra_pnginfo: what the host's save nodes write into metadata; the canvas sends {"workflow": its graph}.
        """
        body = {"prompt": prompt, "client_id": self.id}
        if extra_pnginfo is not None:
            body["extra_data"] = {"extra_pnginfo": extra_pnginfo}
        async with self.session.post(f"{self.url}/prompt", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                raise PromptRefused(json.dumps(answer))
        result, node, since = Result(), None, 0.0
        deadline = time.monotonic() + timeout
        while True:
            message = await self.socket.receive(timeout=max(0.1, deadline - time.monotonic()))
            if message.type == aiohttp.WSMsgType.BINARY:
                self._text(message.data, result)
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise PromptRefused("the server closed the connection")
            kind, data = (event := json.loads(message.data))["type"], event["data"]
            if data.get("prompt_id", answer["prompt_id"]) != answer["prompt_id"]:
                continue
            result.events.append((kind, data))
            if kind == "executing":
                now = time.perf_counter()
                if node is not None:
                    result.seconds[node] = now - since
                node, since = data["node"], now
                if node is None:
                    return result
            elif kind == "executed" and data.get("output"):
                result.outputs[data["node"]] = data["output"]
            elif kind == "execution_error":
                raise PromptRefused(f"{data['node_type']}: {data['exception_message'].strip()}")

    @staticmethod
    def _text(data: bytes, result: Result) -> None:
        """A binary frame of type 3 is text for a node: type, id length, id, text."""
        if int.from_bytes(data[:4], "big") == 3:
            length = int.from_bytes(data[4:8], "big")
            result.texts[data[8 : 8 + length].decode()] = data[8 + length :].decode()

    async def file(self, item: dict) -> bytes:
        """The bytes of one file named in an output."""
        return await self.get("/view", filename=item["filename"], subfolder=item["subfolder"], type=item["type"])
