"""What comes over the network and in workflows: embedded profiles, routes, servers and their answers, plans, names."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import folder_paths
import torch
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from .fuzz_files import Profiles
from .mutate import ODD, TEXTS, damaged_bytes, damaged_tree, dumped, odd_json
from .target import NAME, Case, Target, place_of


class Embedded(Target):
    """Workflows with profiles in them, as /prompt and the route for profiles get them."""

    share = 3.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.place = place_of(folder, "slipstream_profiles")
        self.files = Profiles(folder)
        loader = {"type": "SlipstreamCacheLoader", "widgets_values": ["Balanced", NAME]}
        self.sent = {
            "prompt": {"6": {"class_type": "SlipstreamCacheLoader", "inputs": {"profile": NAME}}},
            "extra_data": {"extra_pnginfo": {"workflow": {
                "nodes": [loader], "extra": {"slipstream_profiles": {NAME: ""}},
                "definitions": {"subgraphs": [{"nodes": [loader]}]},
            }}},
        }  # fmt: skip

    def case(self, rng: Random) -> Case:
        from slipstream.host.profiles import embedding as sharing

        text = base64.b64encode(self.files.data(rng)).decode() if rng.random() < 0.7 else odd_json(rng)
        name = NAME if rng.random() < 0.5 else rng.choice((*TEXTS, *ODD))
        sent = copy.deepcopy(self.sent)
        table = sent["extra_data"]["extra_pnginfo"]["workflow"]["extra"]["slipstream_profiles"]
        sent["prompt"]["6"]["inputs"]["profile"] = name
        if name.__hash__ is not None:
            table[name] = text
        if rng.random() < 0.6:
            sent = damaged_tree(rng, sent)
        way, body = rng.randrange(3), {"name": name, "data": text}

        def run() -> None:
            for left in self.place.glob("*"):
                left.unlink()
            if way == 0:
                sharing.on_prompt(sent)
            elif way == 1:
                sharing.restore(name, text)
            else:
                answered(sharing.post_profile, dumped(body).encode(errors="surrogatepass"))
            for written in self.place.glob("*"):
                sharing.packed(written.name)

        return run


class Routes(Target):
    """POST bodies of the two routes: JSON of any shape, and what is no JSON."""

    share = 2.0

    def case(self, rng: Random) -> Case:
        from slipstream.host.canvas import strip
        from slipstream.host.profiles import embedding as sharing

        found = {}
        routes = SimpleNamespace(post=lambda path: lambda handler: found.setdefault("strips", handler))
        item = (0, "p", {}, {"extra_pnginfo": {"workflow": {"id": "w"}}}, [])
        queue = SimpleNamespace(get_current_queue=lambda: ([item], []))
        strip.register(SimpleNamespace(routes=routes, prompt_queue=queue, last_prompt_id="p"))
        body = damaged_tree(rng, {"client": "c", "workflow": "w", "name": NAME, "data": "AAAA"})
        data = rng.choice((dumped(body).encode(errors="surrogatepass"), b"[" * 10**5, b"", b"\xff" * 9, b"null", b'"'))
        if rng.random() < 0.3:
            data = damaged_bytes(rng, data)
        headers = {"Content-Type": rng.choice(("application/json", "application/json; charset=nonsense", "text/x"))}
        handler = rng.choice((found["strips"], sharing.post_profile))
        return lambda: answered(handler, data, headers)


def answered(handler, data: bytes, headers: dict | None = None) -> None:
    """The route's answer, which has to be JSON with the status 200 or 400."""
    request = make_mocked_request("POST", "/", headers or {"Content-Type": "application/json"})
    request._read_bytes = data
    response = asyncio.run(handler(request))
    assert isinstance(response, web.Response) and response.status in (200, 400), response
    json.loads(response.text)


class Servers(Target):
    """The settings file of remote servers, and addresses as they are typed."""

    share = 1.0

    ADDRESSES = (
        "far", "far", "http://127.0.0.1:8188", "http://127.0.0.1:99999", "http://a@b", "::1", "http://[::1",
        "https://x.y/z?q#f", "file:///etc/passwd", "http://\u2100", "ftp://x", "http://x:y",
    )  # fmt: skip

    def case(self, rng: Random) -> Case:
        from slipstream.host.remote.graph import parse_files, parse_loras
        from slipstream.host.remote.http import SETTINGS, locate

        tree = {"servers": {"far": {"address": "https://far.example:8188", "token": "abc"}}}
        text = dumped(damaged_tree(rng, tree)) if rng.random() < 0.5 else dumped(tree)
        if rng.random() < 0.05:
            text = "[" * 10**5
        server = rng.choice((*TEXTS, *self.ADDRESSES))
        line = rng.choice(TEXTS)

        def run() -> None:
            path = self.folder.joinpath(*SETTINGS)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(errors="surrogatepass"))
            parse_files(line), parse_loras(line)
            locate(server)

        return run


class Answers(Target):
    """What a remote server may answer, in both dialects."""

    share = 3.0
    BODIES = (
        {"system": {"comfyui_version": "0.3.75"}},
        {"status": "ok"},
        {"queue_running": [[0, "job", {}, {}, []]], "queue_pending": [[1, "other", {}, {}, []]]},
        {"job": {"status": {"status_str": "success", "messages": [["execution_start", {}]]}, "outputs": {"save": {
            "latents": [{"filename": "a", "subfolder": "b", "type": "output"}]}}}},
        {"UNETLoader": {"input": {"required": {"unet_name": [["a.safetensors"], {}]}}}},
        {"UNETLoader": {"input": {"required": {"unet_name": ["COMBO", {"options": ["a.safetensors"]}]}}}},
        {"name": "up", "type": "temp", "subfolder": ""},
        {"prompt_id": "job", "number": 1, "node_errors": {"1": {"class_type": "x", "errors": [{"message": "m"}]}}},
        {"id": "7", "jobs": [{"metadata": "job", "id": "7"}], "status": "succeeded", "queue_position": 1, "outputs": [
            {"node_id": "save", "url": "/x"}], "error": {"code": "c", "message": "m", "details": {"node_errors": {}}}},
    )  # fmt: skip

    def __init__(self, folder: Path):
        super().__init__(folder)
        from slipstream.host.remote.graph import packed

        self.latent = packed(torch.zeros(1, 16, 4, 4))

    def case(self, rng: Random) -> Case:
        from slipstream.host.remote import graph as remote_job
        from slipstream.host.remote.dialects import Gateway, Native, connect, understood
        from slipstream.host.remote.http import Address, Answer

        bodies = []
        for _ in range(8):
            body = rng.choice(self.BODIES)
            text = dumped(damaged_tree(rng, body) if rng.random() < 0.7 else body)
            data = rng.choice((b"", b"[" * 10**5, b"\xff")) if rng.random() < 0.05 else text.encode(errors="replace")
            bodies.append(Answer(rng.choice((200, 200, 200, 201, 400, 404, 413)), data))
        latent = damaged_bytes(rng, self.latent)

        def run() -> None:
            given = iter(bodies * 40)

            class Connection:
                address = Address("http", "127.0.0.1", 1)
                clean = staticmethod(lambda text: " ".join(text.split())[:400])
                request = staticmethod(lambda *args, **options: next(given))
                post = request

            first = None
            for make in (connect, lambda c: Native(c, ""), Gateway):
                try:
                    api = understood(lambda make=make: make(Connection()), "place")
                    for ask in questions(api):
                        first = first or told(lambda ask=ask: understood(ask, "place"))
                except Exception as error:
                    first = first or _ours(error)
            remote_job.unpacked(latent)
            if first is not None:
                raise first

        return run


def questions(api) -> list[Callable]:
    """Everything that a segment asks of a server."""
    from slipstream.host.remote import graph as remote_job

    outputs: dict = {}
    return [
        lambda: api.choices("UNETLoader", "unet_name"),
        lambda: api.upload("up", b"x"),
        lambda: api.submit({}, "job"),
        lambda: outputs.update(api.state("job").outputs),
        lambda: api.download(outputs, "save", "folder/prefix", 1 << 20),
        lambda: api.cancel("job"),
        lambda: remote_job.loaders(api, remote_job.RemoteModel("a.safetensors", ("x",)), "place"),
    ]


def told(ask: Callable) -> Exception | None:
    """The sentence that a call ended with, None without; every other exception goes on."""
    try:
        ask()
    except Exception as error:
        return _ours(error)
    return None


def _ours(error: Exception) -> Exception:
    from slipstream.engine.errors import SlipstreamError
    from slipstream.host.remote.http import NoAnswer

    if isinstance(error, SlipstreamError | NoAnswer):
        return error
    raise error


class Plans(Target):
    """Plans as JSON, and names of files to be written."""

    def case(self, rng: Random) -> Case:
        from slipstream.engine.run.plan import CacheConfig, CompensatorConfig, Plan, PredictorConfig
        from slipstream.host.parts import ENTRIES
        from slipstream.host.profiles import folder as profiles
        from slipstream.host.quantise import save as quant_files
        from slipstream.quant.policy import Policy, parse_overrides, plan

        tree = Plan(CacheConfig(), PredictorConfig(), CompensatorConfig()).as_json()
        tree, name = damaged_tree(rng, tree), rng.choice((*TEXTS, *(v for v in ODD if isinstance(v, str))))
        names = {f"double_blocks.{i}.img_attn.some_layer_with_a_long_name.{i}": (256, 256) for i in range(4)}
        way = rng.randrange(4)

        def run() -> None:
            if way == 0 and isinstance(tree, dict):
                Plan.from_json(tree, ENTRIES)
            elif way == 1:
                _, path = quant_files.target(name, "Save Quantized Model")
                assert path.resolve().is_relative_to(Path(folder_paths.models_dir).resolve()) or any(
                    path.resolve().is_relative_to(Path(p).resolve())
                    for p in folder_paths.get_folder_paths("diffusion_models")
                ), path
            elif way == 2:
                file = profiles.file_name(name)
                assert file is None or ("/" not in file and "\\" not in file and not file.startswith(".")), file
            else:
                parse_overrides(name)
                plan(names, Policy("none", ()), name)

        return run
