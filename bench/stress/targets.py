"""What is fuzzed: every file that is read and every value that is accepted. Each target makes cases from one `Random`.

A case is a function. It may return, or raise one of our sentences; `fuzz.py` judges everything else as a fault. Needs a
booted host.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import comfy.samplers
import folder_paths
import torch
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from safetensors.torch import load, load_file

from demo import emoji

from . import mutate
from .mutate import NUMBERS, ODD, TEXTS, damaged_bytes, damaged_tensors, damaged_tree, dumped, every_cut, file_of

Case = Callable[[], object]
NAME = "fuzzed.safetensors"


class Target:
    """One thing that reads. share: of the cases of a long run; folder: the only place where it may write."""

    share = 1.0

    def __init__(self, folder: Path):
        self.folder = folder

    def case(self, rng: Random) -> Case:
        raise NotImplementedError


def profile_bytes(model: str = "fuzz") -> bytes:
    """A profile with everything in it that a profile can hold."""
    from slipstream.engine.profile import Profile

    whole = Profile.load(next((emoji.MODELS.parent / "profiles").glob("tiny_flux*")))
    extras = {
        "blocks": torch.ones(whole.steps, 4, dtype=torch.uint8),
        "moments": torch.rand(whole.steps, 3, 16),
        "activation/double_blocks.0.img_mlp.0/absmax": torch.rand(256),
        "activation/double_blocks.0.img_mlp.0/square": torch.rand(256),
    }
    return dataclasses.replace(whole, model=model, extras=extras).to_bytes()


class Profiles(Target):
    """Profile files: bytes, header, tensors; those that are read are used on three schedules."""

    share = 6.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.whole = profile_bytes()
        self.key = "slipstream_profile"
        length = int.from_bytes(self.whole[:8], "little")
        self.plan = json.loads(json.loads(self.whole[8 : 8 + length])["__metadata__"][self.key])
        self.tensors = load(self.whole)
        self.cuts = every_cut(self.whole)

    def data(self, rng: Random) -> bytes:
        way = rng.randrange(5)
        if way == 0:
            return rng.choice(self.cuts)
        if way == 1:
            return damaged_bytes(rng, self.whole)
        plan = self.plan if way == 2 else damaged_tree(rng, self.plan)
        tensors = self.tensors if way == 3 else damaged_tensors(rng, self.tensors)
        text = rng.choice(("[" * 10**5, "NaN", "null", "0")) if rng.random() < 0.02 else dumped(plan)
        return file_of(tensors, {self.key: text} if rng.random() < 0.97 else None)

    def case(self, rng: Random) -> Case:
        from slipstream.engine.profile import Profile

        data = self.data(rng)

        def run() -> None:
            profile = Profile.from_bytes(data, NAME)
            for sigmas in (profile.sigmas, (1.0, 0.7, 0.2, 0.0)):
                profile.keys_for(sigmas)
                profile.rows_for(sigmas)
            for factor in (0.5, 1.0, 2.0):
                profile.relaxed(factor)
            assert Profile.from_bytes(profile.to_bytes(), NAME).keys == profile.keys

        return run


class SampledProfiles(Profiles):
    """The same through the Cache Loader, the compensator and a short sampling."""

    share = 0.4

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.place = place_of(folder, "slipstream_profiles")
        self.model = emoji.load_flux()
        from slipstream.host.profiles import fingerprint

        self.plan["model"] = fingerprint(self.model)

    def case(self, rng: Random) -> Case:
        from slipstream.host.patcher import add_cache, add_compensator, add_predictor
        from slipstream.host.plan import CacheConfig, CompensatorConfig, PredictorConfig

        data, name = self.data(rng), rng.choice((NAME, "auto", NAME))

        def run() -> None:
            (self.place / NAME).write_bytes(data)
            folder_paths.filename_list_cache.pop("slipstream_profiles", None)
            model = add_cache(self.model, CacheConfig(node_id="1", profile=name))
            model = add_compensator(model, CompensatorConfig(profile=name, node_id="3"))
            sample(add_predictor(model, PredictorConfig(order=1, node_id="2")))

        return run


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
        from slipstream.host import sharing

        text = base64.b64encode(self.files.data(rng)).decode() if rng.random() < 0.7 else mutate.odd_json(rng)
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
        from slipstream.host import sharing, strip

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


class Layers(Target):
    """Files of quantised layers, read layer by layer as the loader does it, without the host's network."""

    share = 4.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path = folder / "layers.safetensors"
        torch.manual_seed(0)
        from slipstream.quant.files import quantisation
        from slipstream.quant.layer import METHODS, quantise_group, with_spec

        self.tensors, described = {"plain.weight": torch.randn(4, 4)}, {}
        for name, method, options in (("a", "svdquant", {"rank": 16}), ("b", "convrot", {}), ("c", "int8_convrot", {})):
            spec = with_spec(METHODS[method], **options)
            layer = quantise_group([torch.randn(64, 256)], [torch.randn(64)], spec).layer
            self.tensors |= layer.state_dict(name)
            described[name] = layer.description()
        self.metadata = quantisation(described)
        self.whole = file_of(self.tensors, self.metadata)
        self.cuts = every_cut(self.whole)

    def data(self, rng: Random) -> bytes:
        way = rng.randrange(4)
        if way == 0:
            return rng.choice(self.cuts)
        if way == 1:
            return damaged_bytes(rng, self.whole)
        tensors = damaged_tensors(rng, self.tensors)
        metadata = dict(self.metadata)
        for key in [k for k in tensors if k.endswith(".comfy_quant")]:
            if rng.random() < 0.3:
                tree = damaged_tree(rng, json.loads(bytes(self.tensors[key].tolist()))) if key in self.tensors else {}
                text = rng.choice(("[" * 10**5, dumped(tree), dumped(tree), dumped(tree)))
                tensors[key] = torch.tensor(list(text.encode(errors="replace")), dtype=torch.uint8)
        if rng.random() < 0.5:
            (key,) = metadata
            text = rng.choice(("[" * 10**5, dumped(damaged_tree(rng, json.loads(metadata[key])))))
            metadata = {rng.choice((key, key, "other")): text.encode(errors="replace").decode()}
        return file_of(tensors, metadata)

    def case(self, rng: Random) -> Case:
        from slipstream.quant.files import Described, File
        from slipstream.quant.formats import read_layer
        from slipstream.quant.linear import W4A4Linear

        data = self.data(rng)

        def run() -> None:
            self.path.write_bytes(data)
            file = File(self.path)
            try:
                described = Described(file, file.metadata)
                for name in described.layers:
                    own = {key: described[key].clone() for key in described if key.startswith(name)}
                    layer = W4A4Linear(read_layer(name, own))
                    if layer.in_features <= 4096:
                        layer(torch.zeros(2, layer.in_features, dtype=layer.original_dtype))
            finally:
                file.close()

        return run


class Models(Layers):
    """Whole quantised models through Load Quantized Model."""

    share = 0.15

    def __init__(self, folder: Path):
        Target.__init__(self, folder)
        from slipstream.host.quant_files import quantise_file
        from slipstream.host.quantise import QuantWish
        from slipstream.quant.files import QUANTISATION

        place = place_of(folder, "diffusion_models")
        (place / "small.safetensors").write_bytes(emoji.SMALL_FLUX.read_bytes())
        emoji.accept_small_flux()
        folder_paths.filename_list_cache.pop("diffusion_models", None)
        made, _ = quantise_file("small.safetensors", "made", QuantWish(rank=0))
        self.whole = (place / made).read_bytes()
        self.tensors = load(self.whole)
        length = int.from_bytes(self.whole[:8], "little")
        self.metadata = {QUANTISATION: json.loads(self.whole[8 : 8 + length])["__metadata__"][QUANTISATION]}
        self.cuts = every_cut(self.whole)
        self.place = place

    def case(self, rng: Random) -> Case:
        from slipstream.host import quant_load

        data, name = self.data(rng), rng.choice((NAME,) * 9 + ("../" + NAME, "x.gguf", "", "\0"))

        def run() -> None:
            (self.place / NAME).write_bytes(data)
            folder_paths.filename_list_cache.pop("diffusion_models", None)
            quant_load.load(name)

        return run


class Pruned(Target):
    """U-Net files through Load Pruned UNet."""

    share = 0.1

    def __init__(self, folder: Path):
        super().__init__(folder)
        emoji.accept_small_unet()
        self.tensors = load_file(emoji.UNET)
        self.whole = emoji.UNET.read_bytes()
        self.path = folder / NAME

    def case(self, rng: Random) -> Case:
        from slipstream.host import pruned

        way = rng.randrange(3)
        if way == 0:
            data = rng.choice(every_cut(self.whole))
        else:
            data = damaged_bytes(rng, self.whole) if way == 1 else file_of(damaged_tensors(rng, self.tensors), None)

        def run() -> None:
            self.path.write_bytes(data)
            pruned.load_file(self.path)

        return run


class Nunchaku(Target):
    """nunchaku's FLUX.1 checkpoints, as the mapping that their reader gets."""

    share = 1.5

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.tensors = nunchaku_checkpoint()
        self.path = folder / "nunchaku.safetensors"

    def case(self, rng: Random) -> Case:
        from slipstream.quant.files import File
        from slipstream.quant.nunchaku import plain_weights, w4a4_layers

        tensors = damaged_tensors(rng, self.tensors)
        data = file_of(tensors, None)
        if rng.random() < 0.3:
            data = damaged_bytes(rng, data)

        def run() -> None:
            self.path.write_bytes(data)
            file = File(self.path)
            try:
                dict(w4a4_layers(file)), dict(plain_weights(file))
            finally:
                file.close()

        return run


def nunchaku_checkpoint(width: int = 128) -> dict[str, torch.Tensor]:
    """One double and one single block as nunchaku's files have them, with random numbers."""
    from slipstream.quant import nunchaku as n

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    def layer(name: str, rows: int, columns: int, smooth: torch.Tensor) -> dict:
        codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
        down, up = normal(columns, 16), normal(rows, 16)
        return n.pack_layer(n.Layer(codes, normal(columns // 64, rows), smooth, down, up, normal(rows)), name)

    def modulation(name: str, splits: int) -> dict:
        codes = torch.randint(0, 16, (splits * width, width), generator=generator)
        pair = normal(width // 64, splits * width), normal(width // 64, splits * width)
        return n.pack_modulation(codes, *pair, normal(splits * width), name, splits)

    def smooth(k: int) -> torch.Tensor:
        return normal(k).abs() + 0.5

    found: dict[str, torch.Tensor] = {}
    block, shared = "transformer_blocks.0", smooth(width)
    for name in n.DOUBLE:
        rows = 3 * width if "qkv" in name else 2 * width if "fc1" in name else width
        columns = 2 * width if "fc2" in name else width
        found |= layer(f"{block}.{name}", rows, columns, smooth(columns))
    for name in n.DOUBLE_MODULATION:
        found |= modulation(f"{block}.{name}", 6)
    found |= {f"{block}.{name}.weight": normal(16) for name in n.DOUBLE_NORMS}
    block = f"single_{block}"
    for name, rows, columns in (("qkv_proj", 3, 1), ("mlp_fc1", 2, 1), ("out_proj", 1, 1), ("mlp_fc2", 1, 2)):
        factors = shared if columns == 1 and name != "out_proj" else smooth(columns * width)
        found |= layer(f"{block}.{name}", rows * width, columns * width, factors)
    found |= modulation(f"{block}.norm.linear", 3)
    found |= {f"{block}.{name}.weight": normal(16) for name in n.SINGLE_NORMS}
    for name in n.OUTSIDE:
        found |= {f"{name}.weight": normal(width, width), f"{name}.bias": normal(width)}
    return found


class KernelChoices(Target):
    """The file of measured kernels in the user's folder."""

    def case(self, rng: Random) -> Case:
        from slipstream.kernels.choices import Choices, header

        entry = {"name": "plain", "config": [1, 2], "milliseconds": {"plain": 1.0}}
        tree = {"header": header("fuzz"), "choices": {"k": entry, "l": entry}}
        text = dumped(damaged_tree(rng, tree)) if rng.random() < 0.9 else rng.choice(("[" * 10**5, "", "{", "1" * 5000))
        data = text.encode(errors="surrogatepass")

        def run() -> None:
            for left in self.folder.glob("*"):
                left.unlink()
            Choices(self.folder, "fuzz").path.write_bytes(data)
            choices = Choices(self.folder, "fuzz")
            choices.get("k").get("name")
            choices.keep("m", entry)
            assert Choices(self.folder, "fuzz").get("m") == entry

        return run


class Servers(Target):
    """The settings file of remote servers, and addresses as they are typed."""

    share = 2.0

    def case(self, rng: Random) -> Case:
        from slipstream.host.remote_http import SETTINGS, locate
        from slipstream.host.remote_job import parse_files, parse_loras

        tree = {"servers": {"far": {"address": "https://far.example:8188", "token": "abc"}}}
        text = dumped(damaged_tree(rng, tree)) if rng.random() < 0.5 else dumped(tree)
        if rng.random() < 0.05:
            text = "[" * 10**5
        server = rng.choice((*TEXTS, "far", "far", "http://127.0.0.1:8188", "http://127.0.0.1:99999", "http://a@b", "::1",
                             "http://[::1", "https://x.y/z?q#f", "file:///etc/passwd", "http://\u2100", "ftp://x",
                             "http://x:y"))  # fmt: skip
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
        from slipstream.host.remote_job import packed

        self.latent = packed(torch.zeros(1, 16, 4, 4))

    def case(self, rng: Random) -> Case:
        from slipstream.host import remote_job
        from slipstream.host.remote_api import Gateway, Native, connect, understood
        from slipstream.host.remote_http import Address, Answer

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
                    outputs = {}
                    for ask in (
                        lambda: api.choices("UNETLoader", "unet_name"),
                        lambda: api.upload("up", b"x"),
                        lambda: api.submit({}, "job"),
                        lambda: outputs.update(api.state("job").outputs),
                        lambda: api.download(outputs, "save", "folder/prefix", 1 << 20),
                        lambda: api.cancel("job"),
                        lambda: remote_job.loaders(api, remote_job.RemoteModel("a.safetensors", ("x",)), "place"),
                    ):
                        first = first or told(lambda ask=ask: understood(ask, "place"))
                except Exception as error:
                    first = first or _ours(error)
            remote_job.unpacked(latent)
            if first is not None:
                raise first

        return run


def told(ask: Callable) -> Exception | None:
    """The sentence that a call ended with, None without; every other exception goes on."""
    try:
        ask()
    except Exception as error:
        return _ours(error)
    return None


def _ours(error: Exception) -> Exception:
    from slipstream.host.errors import SlipstreamError
    from slipstream.host.remote_http import NoAnswer

    if isinstance(error, SlipstreamError | NoAnswer):
        return error
    raise error


class Plans(Target):
    """Plans as JSON, and names of files to be written."""

    def case(self, rng: Random) -> Case:
        from slipstream.host import profiles, quant_files
        from slipstream.host.plan import CacheConfig, CompensatorConfig, Plan, PredictorConfig
        from slipstream.quant.policy import Policy, parse_overrides, plan

        tree = Plan(CacheConfig(), PredictorConfig(), CompensatorConfig()).as_json()
        tree, name = damaged_tree(rng, tree), rng.choice((*TEXTS, *(v for v in ODD if isinstance(v, str))))
        names = {f"double_blocks.{i}.img_attn.some_layer_with_a_long_name.{i}": (256, 256) for i in range(4)}
        way = rng.randrange(4)

        def run() -> None:
            if way == 0 and isinstance(tree, dict):
                Plan.from_json(tree)
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
                plan(names, Policy("none", (), ()), name)

        return run


class Widgets(Target):
    """Every input of every node with every kind of value, by the node itself; cheap ones are sampled where taken."""

    share = 4.0
    CHEAP = ("CacheLoader", "TaylorPredictor", "ErrorCompensator", "HybridSwitch")

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.flux, self.small = emoji.load_flux(), emoji.load_small_flux()
        for name in ("slipstream_profiles", "diffusion_models"):
            place_of(folder, name)
        self.nodes = node_classes()
        sigmas = comfy.samplers.calculate_sigmas(self.flux.get_model_object("model_sampling"), "simple", 5)
        latent = {"samples": torch.zeros(1, 16, 4, 4)}
        text = emoji.conditioning("hamburger")
        self.wires = {
            "model": self.flux, "model_a": self.flux, "model_b": self.small, "positive": text, "negative": text,
            "sampler": comfy.samplers.sampler_object("euler"), "sigmas": sigmas, "latent_image": latent,
            "samples": latent, "reference": {"samples": latent["samples"] + 0.1},
        }  # fmt: skip

    def values(self, node) -> dict:
        """Every input at its default; what is wired is wired."""
        found = {}
        for item in node.GET_SCHEMA().inputs:
            default = getattr(item, "default", None)
            options = getattr(item, "options", None)
            if item.id in self.wires:
                found[item.id] = self.wires[item.id]
            elif default is not None or options is not None:
                found[item.id] = default if default is not None else next(iter(options), "nothing.safetensors")
        return found

    def case(self, rng: Random) -> Case:
        name = rng.choice(list(self.nodes))
        node = self.nodes[name]
        values = self.values(node)
        if name == "Calibrate":
            values |= {"check": 0, "name": "fuzz"}
        widgets = [key for key in values if key not in self.wires]
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            if widgets:
                key = rng.choice(widgets)
                values[key] = odd_for(rng, values[key])
        sampled = name in self.CHEAP and rng.random() < 0.15

        def run() -> None:
            result = execute(node, values)
            if sampled:
                sample(result.args[0])

        return run


def odd_for(rng: Random, value: object) -> object:
    """Mostly an odd value of the kind that belongs there, at times of any other kind."""
    if rng.random() < 0.25:
        return rng.choice(ODD)
    if isinstance(value, bool):
        return rng.choice((True, False, None, 0, "x"))
    if isinstance(value, str):
        return rng.choice(TEXTS)
    return rng.choice(NUMBERS)


class Prompts(Widgets):
    """The same through the host's validation of a prompt, as JSON that a client sends."""

    share = 1.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        import nodes

        nodes.NODE_CLASS_MAPPINGS.update({node.GET_SCHEMA().node_id: node for node in self.nodes.values()})

    def case(self, rng: Random) -> Case:
        import execution

        node = self.nodes[rng.choice(list(self.nodes))]
        inputs = {key: ["9", 0] if key in self.wires else value for key, value in self.values(node).items()}
        for _ in range(rng.choice((1, 2, 4))):
            widgets = [key for key, value in inputs.items() if value != ["9", 0]]
            if widgets:
                key = rng.choice(widgets)
                value = odd_for(rng, inputs[key])
                inputs[key] = (
                    json.loads(json.dumps(value, default=str)) if len(str(value)[:2000]) < 2000 else "x" * LONGEST
                )
        graph = {"1": {"class_type": node.GET_SCHEMA().node_id, "inputs": inputs}}

        def run() -> None:
            inputs = graph["1"]["inputs"]
            graph["1"]["inputs"] = {key: value for key, value in inputs.items() if value != ["9", 0]}
            _, _, found = asyncio.run(_validated(execution, graph))
            for told_node in found.values():
                for error in told_node["errors"]:
                    assert error["type"] != "exception_during_validation", error["details"]

        return run


LONGEST = 10**6


async def _validated(execution, graph: dict):
    validated = {}
    valid, errors, _ = await execution.validate_inputs("p", graph, "1", validated)
    return valid, None, {"1": {"errors": errors}}


def execute(node, values: dict):
    """What the host calls, with an id for the node."""
    prepared = node.PREPARE_CLASS_CLONE({"hidden": {}}) if hasattr(node, "PREPARE_CLASS_CLONE") else node
    hidden = getattr(prepared, "hidden", None)
    if hidden is None or not hasattr(hidden, "unique_id"):
        prepared.hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None, dynprompt=None)
    with torch.inference_mode():
        return prepared.execute(**values)


def node_classes() -> dict[str, type]:
    """The nodes as the host gets them."""
    from slipstream.nodes import SlipstreamExtension

    return {node.__name__: node for node in asyncio.run(SlipstreamExtension().get_node_list())}


def place_of(folder: Path, name: str) -> Path:
    """The host's folder of this name becomes one below `folder`."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    folder_paths.folder_names_and_paths[name] = ([str(place)], {".safetensors", ".sft", ".gguf"})
    folder_paths.filename_list_cache.pop(name, None)
    return place


def sample(model, steps: int = 5) -> torch.Tensor:
    """A short sampling at the smallest size; the result has to be finite."""
    import comfy.sample

    latent = torch.zeros(1, 16, 4, 4)
    text = emoji.conditioning("hamburger")
    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        found = comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=1
        )
    assert math.isfinite(float(found.abs().max())), "a sampling that is not finite"
    return found


TARGETS = (
    Profiles, SampledProfiles, Embedded, Routes, Layers, Models, Pruned, Nunchaku, KernelChoices, Servers, Answers, Plans,
    Widgets, Prompts,
)  # fmt: skip
