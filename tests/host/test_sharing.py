"""Profiles inside workflows, in process: what a queued prompt brings is written, what it uses is packed in."""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import hashlib
import json
import logging
import sys
import types

import folder_paths
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from slipstream.engine.calibration.profile import Profile
from slipstream.engine.calibration.statistics import TrajectoryStatistics
from slipstream.host.profiles import embedding as sharing
from slipstream.host.profiles import folder as profiles

NAME = "mine.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty profile folder of our own, a level below what a path could reach."""
    inner = tmp_path / "outer" / "profiles"
    inner.mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, profiles.FOLDER, ([str(inner)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return inner


def example(model: str = "flux", keys=(0, 2, 5, 9), **extras) -> Profile:
    path = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    statistics = TrajectoryStatistics.of(path, [float(i) for i in range(10)])
    return Profile(keys, tuple(1.0 - i / 10 for i in range(11)), statistics, model, extras=extras)


def text(profile: Profile) -> str:
    return base64.b64encode(profile.to_bytes()).decode()


def queued(*names: object, embedded: object = None, bypassed: str | None = None) -> dict:
    """What the canvas sends for a workflow with one Cache Loader per name."""
    prompt = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": NAME}}}
    nodes = [{"id": 1, "type": "UNETLoader", "widgets_values": [NAME]}]
    for i, name in enumerate(names, 2):
        prompt[str(i)] = {"class_type": sharing.LOADER, "inputs": {"model": ["1", 0], "profile": name}}
        nodes.append({"id": i, "type": sharing.LOADER, "widgets_values": ["Balanced", 0.1, name]})
    if bypassed:
        nodes.append({"id": 99, "type": sharing.LOADER, "mode": 4, "widgets_values": ["Balanced", 0.1, bypassed]})
    workflow = {"nodes": nodes} if embedded is None else {"nodes": nodes, "extra": {"ds": 1, sharing.KEY: embedded}}
    return {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}


def extra(json_data: dict) -> dict:
    return json_data["extra_data"]["extra_pnginfo"]["workflow"].get("extra", {})


def used(json_data: dict) -> list[str]:
    return [n["inputs"]["profile"] for n in json_data["prompt"].values() if n["class_type"] == sharing.LOADER]


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_used_profile_is_embedded_and_comes_back_exactly(folder):
    profiles.save(NAME, example())
    whole = (folder / NAME).read_bytes()
    sent = sharing.on_prompt(queued(NAME))
    assert extra(sent) == {sharing.KEY: {NAME: base64.b64encode(whole).decode()}}
    (folder / NAME).unlink()
    assert profiles.files() == []
    again = sharing.on_prompt(json.loads(json.dumps(sent)))
    assert again == sent and (folder / NAME).read_bytes() == whole and files(folder) == [NAME]
    assert profiles.files() == [NAME]  # so the host's list check finds it in the same request


def test_what_no_node_uses_is_removed_and_a_bypassed_node_keeps_its_own(folder):
    profiles.save(NAME, example())
    other = text(example("sd1"))
    embedded = {"old.safetensors": other, "resting.safetensors": other}
    sent = sharing.on_prompt(queued(NAME, embedded=embedded, bypassed="resting.safetensors"))
    assert extra(sent)[sharing.KEY] == {"resting.safetensors": other, NAME: text(example())} and extra(sent)["ds"] == 1
    assert extra(sharing.on_prompt(queued("none", embedded=embedded))) == {"ds": 1}
    assert files(folder) == [NAME]  # nothing is written for a node that does not run


def test_bypassed_nodes_inside_subgraphs_count(folder):
    sent = queued("none", embedded={NAME: text(example())})
    inner = {"nodes": [{"id": 4, "type": sharing.LOADER, "widgets_values": {"profile": NAME}}]}
    sent["extra_data"]["extra_pnginfo"]["workflow"]["definitions"] = {"subgraphs": [inner]}
    assert extra(sharing.on_prompt(sent))[sharing.KEY] == {NAME: text(example())}


def test_two_loaders_with_one_and_with_two_profiles(folder):
    embedded = {NAME: text(example()), "b.safetensors": text(example("sd1"))}
    sent = sharing.on_prompt(queued(NAME, "b.safetensors", NAME, embedded=embedded))
    assert used(sent) == [NAME, "b.safetensors", NAME] and files(folder) == ["b.safetensors", NAME]
    assert extra(sent)[sharing.KEY] == embedded


def test_a_newer_local_profile_of_the_same_model_wins(folder):
    newer = example(keys=(0, 9))
    profiles.save(NAME, newer)
    sent = sharing.on_prompt(queued(NAME, embedded={NAME: text(example())}))
    assert used(sent) == [NAME] and files(folder) == [NAME]
    assert (folder / NAME).read_bytes() == newer.to_bytes() and extra(sent)[sharing.KEY] == {NAME: text(newer)}


@pytest.mark.parametrize("local", ["another model", "damaged"])
def test_a_name_that_is_taken_gives_the_embedded_profile_a_name_of_its_own(folder, local):
    profiles.save(NAME, example("sd1"))
    if local == "damaged":
        (folder / NAME).write_bytes(b"nothing")
    before = (folder / NAME).read_bytes()
    digest = hashlib.sha256(example().to_bytes()).hexdigest()[:8]
    for _ in range(2):  # queued again, the file of the first time is found
        sent = sharing.on_prompt(queued(NAME, NAME, embedded={NAME: text(example())}))
        assert used(sent) == [f"mine {digest}.safetensors"] * 2
        assert files(folder) == [f"mine {digest}.safetensors", NAME]
        # The workflow's node still says "mine", so that is where it finds its profile the next time.
        assert extra(sent)[sharing.KEY] == {NAME: text(example())}
    assert (folder / NAME).read_bytes() == before
    assert profiles.load(used(sent)[0]).model == "flux"


def test_the_longest_name_still_gets_one_of_its_own(folder):
    name = "n" * 109 + ".safetensors"
    profiles.save(name, example("sd1"))
    (written,) = used(sharing.on_prompt(queued(name, embedded={name: text(example())})))
    assert written != name and profiles.load(written).model == "flux"


def hostile() -> dict[str, tuple[str, object]]:
    """(name, embedded) of what must be refused."""
    whole = example().to_bytes()
    nan = dataclasses.replace(example(), about={"x": "NUMBER"}).to_bytes().replace(b'\\"NUMBER\\"', b"     NaN  ")
    empty = example(blocks=torch.ones(10, 3, dtype=torch.uint8))
    object.__setattr__(empty, "extras", {"blocks": torch.ones(10, 0, dtype=torch.uint8)})
    return {
        "a path": ("../x.safetensors", text(example())),
        "an absolute path": ("/x.safetensors", text(example())),
        "another system's path": ("..\\x.safetensors", text(example())),
        "hidden": (".x.safetensors", text(example())),
        "9 MB": (NAME, "A" * (9 << 20)),
        "no text": (NAME, {"data": 1}),
        "no base64": (NAME, "this is not base64!"),
        "not even ascii": (NAME, "ä" * 40),
        "empty": (NAME, ""),
        "cut off": (NAME, base64.b64encode(whole[:-9]).decode()),
        "a model": (NAME, base64.b64encode(b"\x08\0\0\0\0\0\0\0{}      ").decode()),
        "infinite numbers": (NAME, base64.b64encode(nan).decode()),
        "an empty table": (NAME, text(empty)),
    }


@pytest.mark.parametrize("case", hostile())
def test_what_is_no_profile_is_one_warning_and_writes_nothing(folder, case, caplog):
    name, data = hostile()[case]
    sent = queued(name, embedded={name: data})
    with caplog.at_level(logging.WARNING, "slipstream"):
        assert sharing.on_prompt(sent) is sent
    assert used(sent) == [name] and extra(sent) == {"ds": 1}
    (warning,) = caplog.messages
    assert warning.startswith("Cache Loader: ") and warning.count("was not restored") == 1 and len(warning) < 250
    assert [p.name for p in folder.parent.parent.rglob("*")] == ["outer", "profiles"]


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"prompt": None},
        {"prompt": {"1": None, "2": {"class_type": sharing.LOADER}, "3": {"class_type": sharing.LOADER, "inputs": []}}},
        {"prompt": {}, "extra_data": {"extra_pnginfo": {"workflow": None}}},
        {"prompt": {}, "extra_data": {"extra_pnginfo": [1]}},
        queued(NAME, embedded=["a", "list"]),
        queued(["5", 0], 7, "none", "auto", embedded={}),
        {"prompt": {}, "extra_data": {"extra_pnginfo": {"workflow": {"nodes": 3, "definitions": {"subgraphs": [1]}}}}},
    ],
)
def test_prompts_of_any_shape_pass(folder, sent, caplog):
    before = copy.deepcopy(sent.get("prompt"))
    assert sharing.on_prompt(sent)["prompt"] == before if "prompt" in sent else sharing.on_prompt(sent) == {}
    assert files(folder) == [] and caplog.messages == []


def test_without_a_workflow_nothing_is_embedded(folder):
    profiles.save(NAME, example())
    sent = {"prompt": queued(NAME)["prompt"], "extra_data": {}}
    assert sharing.on_prompt(copy.deepcopy(sent)) == sent


def test_large_statistics_stay_at_home(folder, caplog):
    mask = torch.ones(10, 3, dtype=torch.uint8)
    profiles.save(NAME, example(blocks=mask, moments=torch.rand(600, 1000)))
    assert (folder / NAME).stat().st_size > sharing.LARGEST_WHOLE
    data = base64.b64decode(extra(sharing.on_prompt(queued(NAME)))[sharing.KEY][NAME])
    assert data == example(blocks=mask).to_bytes() and len(data) < 8000
    sent = sharing.on_prompt(queued(NAME, embedded={NAME: base64.b64encode(data).decode()}))
    assert used(sent) == [NAME] and (folder / NAME).stat().st_size > sharing.LARGEST_WHOLE
    steps = 700
    statistics = TrajectoryStatistics.of(
        [torch.tensor([float(i)]) for i in range(steps)], [float(i) for i in range(steps)]
    )
    profiles.save("huge", Profile((0, 1), tuple(1.0 - i / steps for i in range(steps + 1)), statistics, "flux"))
    assert extra(sharing.on_prompt(queued("huge.safetensors"))) == {}
    assert [m for m in caplog.messages if "too large" in m and "huge.safetensors" in m]


def test_a_profile_that_was_calibrated_again_is_embedded_anew(folder):
    for keys in ((0, 9), (0, 1, 9), (0, 1, 2, 9)):
        profiles.save(NAME, example(keys=keys))
        assert extra(sharing.on_prompt(queued(NAME)))[sharing.KEY][NAME] == text(example(keys=keys))


def test_registered_once_with_a_server_and_not_at_all_without(monkeypatch):
    from slipstream.nodes import SlipstreamExtension

    monkeypatch.setitem(sys.modules, "server", None)
    asyncio.run(SlipstreamExtension().get_node_list())
    handlers: list = []
    server = types.SimpleNamespace(
        routes=web.RouteTableDef(), on_prompt_handlers=handlers, add_on_prompt_handler=handlers.append
    )
    prompt_server = types.SimpleNamespace(instance=server)
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace(PromptServer=prompt_server))
    for _ in range(2):
        asyncio.run(SlipstreamExtension().get_node_list())
    routes = [(route.method, route.path) for route in server.routes]
    assert handlers == [sharing.on_prompt] and len(routes) == len(set(routes)) == 3


def test_the_routes(folder):
    async def conversation() -> None:
        app = web.Application(client_max_size=100 << 20)
        app.router.add_get(sharing.ROUTE + "/{name}", sharing.get_profile)
        app.router.add_post(sharing.ROUTE, sharing.post_profile)
        async with TestClient(TestServer(app)) as client:

            async def post(body: object, status: int) -> dict:
                response = await client.post(sharing.ROUTE, json=body)
                assert response.status == status
                return await response.json()

            assert await post({"name": NAME, "data": text(example())}, 200) == {"name": NAME}
            response = await client.get(f"{sharing.ROUTE}/{NAME}")
            assert response.status == 200 and await response.json() == {"name": NAME, "data": text(example())}
            taken = await post({"name": NAME, "data": text(example("sd1"))}, 200)
            assert taken["name"].startswith("mine ") and profiles.load(taken["name"]).model == "sd1"
            assert (folder / NAME).read_bytes() == example().to_bytes()
            (folder.parent / "outside.safetensors").write_bytes(example().to_bytes())
            (folder / "broken.safetensors").write_bytes(b"nothing")
            for name in ("other.safetensors", "..%2Foutside.safetensors", "mine", "broken.safetensors", "none"):
                assert (await client.get(f"{sharing.ROUTE}/{name}")).status == 404
            for body in ([], {}, {"name": NAME}, {"name": "../x", "data": text(example())}, {"name": 1, "data": ""}):
                assert (await post(body, 400))["error"].startswith("Cache Loader: ")
            assert (await client.post(sharing.ROUTE, data=b"\xff{")).status == 400

    asyncio.run(conversation())
    assert len(files(folder)) == 3 and files(folder.parent) == ["outside.safetensors", "profiles"]
