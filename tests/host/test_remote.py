"""Hybrid Remote against real ComfyUI servers on loopback: the same latents, and every fault of H77.

Most tests call one server from this process. The last ones have two: the node runs in the graph of one of them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
from faulty import Faulty, answer, cut, damage, drop_answer, drop_request, once, repeat, slow, swallow
from safetensors.torch import load
from sampling import SIZE
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.host.remote import dialects as remote_api
from slipstream.host.remote import segment as remote
from slipstream.host.remote.graph import Part, RemoteModel, parse_loras, recognise
from slipstream.host.remote.http import HOSTS_VARIABLE, TOKEN_VARIABLE, Connection, RemoteUnavailable, locate
from slipstream.host.remote.segment import Here, RemoteSegment, sample_latent
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import add_switch
from slipstream.nodes.remote_segment import RemoteSegmentNode

from lab.client import Client
from lab.remote import sample_span
from lab.server import Server

FLUX = RemoteModel("tiny_flux_emoji.safetensors", ("SlipstreamDemoPrompt",))
UNET = RemoteModel("tiny_sd15_emoji.safetensors", ("SlipstreamDemoPrompt",))
STEPS, CUT, SEED = 8, 3, 5
TEXT = "hamburger"
# One step of a job that must not end by itself while a test looks at it.
LONG, LARGE = 60, 48


@pytest.fixture(scope="module")
def another_server(tmp_path_factory):
    """Gives the server that runs beside the shared one; a new one where a test has killed it."""
    with contextlib.ExitStack() as left:
        servers: list[Server] = []

        def give() -> Server:
            if not servers or servers[-1].process.poll() is not None:
                servers.append(Server(tmp_path_factory.mktemp("remote") / "log.txt"))
                left.enter_context(servers[-1])
            return servers[-1]

        yield give


@pytest.fixture
def running(another_server):
    return another_server()


@pytest.fixture(scope="module")
def near(comfy):
    """The user's own ComfyUI, in whose graph the node runs; `running` is the other one."""
    return comfy


@pytest.fixture
def proxy(running, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(HOSTS_VARIABLE, raising=False)
    with Faulty(running.url) as proxy:
        yield proxy


def schedule(model, steps=STEPS, name="simple"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps)


def part(sigmas, add_noise, cfg=1.0, sampler="euler", seed=SEED):
    return Part(TEXT, "", cfg, sampler, tuple(sigmas.tolist()), seed, add_noise)


def here(model):
    return Here(model, emoji.conditioning(TEXT), emoji.conditioning(""))


def whole(lab):
    """(model, its first part, the result that the server should give)."""
    model = lab.flux
    first = part(schedule(model)[: CUT + 1], True)
    return model, first, here(model).sample(lab.latent(model), first)


def another(model):
    """A model that gives other results than the server's."""
    model = model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, given: 0.9 * apply(given["input"], given["timestep"], **given["c"])
    )
    return model


@pytest.mark.parametrize("kind", ["flux", "trained_unet"])
def test_both_orders_equal_a_local_chain(lab, proxy, kind):
    """Bit for bit: the server's half by the server's model, the local half by the local one, in either order."""
    model = getattr(lab, kind)
    local, segment = another(model), RemoteSegment(proxy.url, FLUX if kind == "flux" else UNET)
    sigmas, blank = schedule(model), lab.latent(model)
    first, rest = part(sigmas[: CUT + 1], True), part(sigmas[CUT:], False)

    begun, report = segment.sample(blank, first, model)
    wanted = here(model).sample(blank, first)
    assert torch.equal(begun, wanted)
    assert torch.equal(here(local).sample(begun, rest), here(local).sample(wanted, rest))
    assert report.steps == CUT and report.sent < 2000  # a blank is not uploaded, only its channels

    begun = here(local).sample(blank, first)
    done, report = segment.sample(begun, rest, model)
    assert torch.equal(done, here(model).sample(begun, rest))
    assert report.received > begun.numel() * 4 and proxy.count("POST", "/upload/image") == 2


def test_guided_and_batched_and_larger(lab, proxy):
    """Two prompts' worth of work: cfg with a negative, a batch, another size."""
    model = lab.flux
    blank = lab.latent(model, 2, (24, 16))
    first = part(schedule(model)[: CUT + 1], True, cfg=3.0, sampler="heun")
    done, _ = RemoteSegment(proxy.url, FLUX).sample(blank, first, model)
    assert torch.allclose(done, here(model).sample(blank, first), atol=1e-4)  # the host may batch cond and uncond


@pytest.mark.parametrize("kind", ["flux", "trained_unet"])
def test_in_the_coordinates_of_the_sampler(lab, proxy, kind):
    """What a switch hands over: x at a sigma -> x at a sigma, from noise and to the end, equal to the plain run."""
    model = getattr(lab, kind)
    segment = RemoteSegment(proxy.url, FLUX if kind == "flux" else UNET)
    sigmas, blank = schedule(model), lab.latent(model)
    values = dict(local=model, positive=TEXT, negative="", cfg=1.0, sampler="euler", seed=SEED)
    x, _ = sample_span(segment, None, sigmas[: CUT + 1], latent_image=blank, **values)
    x, _ = sample_span(segment, x, sigmas[CUT:], **values)
    plain = here(model).sample(blank, part(sigmas, True))
    assert torch.allclose(model.model.process_latent_out(x), plain, atol=2e-5)
    if kind == "flux":
        with pytest.raises(SlipstreamError, match="nothing but noise"):
            sample_span(segment, torch.randn(blank.shape), sigmas[:2], **values)


def test_an_old_server_gets_the_schedule_by_name_or_refuses(lab, proxy):
    """Without ManualSigmas: the same sigmas through stock nodes, checked before a step is made."""
    missing = lambda seen, forward: answer(200, {}) if "ManualSigmas" in seen.path else None  # noqa: E731
    proxy.fault = missing
    model, first, wanted = whole(lab)
    segment = RemoteSegment(proxy.url, FLUX)
    assert torch.equal(segment.sample(lab.latent(model), first, model)[0], wanted)
    assert proxy.count("POST", "/prompt") == 2
    with pytest.raises(SlipstreamError, match=r"before December 2025 .* connect the local model"):
        segment.sample(lab.latent(model), first)
    odd = part(schedule(model) * 0.99, True)
    with pytest.raises(SlipstreamError, match="of no scheduler"):
        segment.sample(lab.latent(model), odd, model)
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    shifted = ModelSamplingFlux().patch(model, 2.0, 0.5, 512, 512)[0]
    with pytest.raises(SlipstreamError, match="another schedule than the connected model"):
        segment.sample(lab.latent(model), part(schedule(shifted), True), shifted)
    assert proxy.count("POST", "/prompt") == 3  # the last one is the probe


def test_schedules_are_recognised(lab):
    space = lab.flux.get_model_object("model_sampling")
    for name in ("simple", "beta", "normal"):
        sigmas = schedule(lab.flux, 20, name)
        found, steps, first = recognise(space, sigmas[6:15].tolist())
        assert torch.equal(schedule(lab.flux, steps, found)[first : first + 9], sigmas[6:15])


FAULTS = {
    "slow": (slow(0.3), 1),
    "answer lost": (once("POST", "/prompt", drop_answer), 1),
    "request lost": (once("POST", "/prompt", drop_request), 2),
    "restarted": (once("POST", "/prompt", swallow), 2),
    "sent twice": (once("POST", "/prompt", repeat), 1),
    "gateway": (once("GET", "/history", lambda forward: answer(502)), 1),
    "upload lost": (once("POST", "/upload", drop_answer), 1),
    "result cut short": (once("GET", "/view", cut), 1),
    "result damaged": (once("GET", "/view", damage), 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_h77_a_fault_changes_neither_the_result_nor_how_often_it_is_sampled(lab, proxy, running, monkeypatch, name):
    monkeypatch.setattr(remote, "GRACE", 0.5)
    monkeypatch.setattr(remote_api, "QUEUE_EVERY", 0.0)
    model, first, _ = whole(lab)
    first = part(schedule(model)[: CUT + 1], True, seed=1000 + list(FAULTS).index(name))  # not in the server's cache
    fault, posts = FAULTS[name]
    probes = "ManualSigmas" not in info(running)
    if probes:  # the probe job of an old server is not what is tested
        posts += 1
        plain = fault
        fault = lambda seen, forward: plain(seen, forward) if proxy.count("POST", "/upload") else None  # noqa: E731
    proxy.fault = fault
    done, report = RemoteSegment(proxy.url, FLUX).sample(lab.latent(model), first, model)
    assert torch.equal(done, here(model).sample(lab.latent(model), first))
    assert proxy.count("POST", "/prompt") == posts
    assert report.submissions == posts - probes
    assert sampled(running, first.seed) == (name != "sent twice")  # there the second job's entry replaced the first's


def info(running) -> dict:
    return Connection(locate(running.url)).request("GET", "/object_info").json()


def entries(running, seed) -> list[dict]:
    """The server's history of sampling jobs with this seed."""
    history = Connection(locate(running.url)).request("GET", "/history").json().values()
    runs = [(entry, entry["prompt"][2].get("run")) for entry in history]
    return [entry for entry, run in runs if run is not None and run["inputs"]["noise_seed"] == seed]


def sampled(running, seed) -> int:
    """How many of them have really run the sampler."""
    messages = [dict(entry["status"]["messages"]) for entry in entries(running, seed)]
    return sum("run" not in m.get("execution_cached", {}).get("nodes", ()) for m in messages)


def long_part(lab, seed):
    return lab.latent(lab.flux, 1, (LARGE, LARGE)), part(schedule(lab.flux, LONG), True, seed=seed)


def idle(running) -> bool:
    """Whether the server is done with everything, within a second."""
    for _ in range(20):
        queue = Connection(locate(running.url)).request("GET", "/queue").json()
        if not queue["queue_running"] and not queue["queue_pending"]:
            return True
        time.sleep(0.1)
    return False


def test_a_cancel_here_cancels_there(lab, proxy, running):
    """Running and queued: the host's interruption is raised here, and the server is free again at once."""
    blank, first = long_part(lab, 11)

    def cancel(text, share):
        if "steps on" in text:
            comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        RemoteSegment(proxy.url, FLUX).sample(blank, first, lab.flux, cancel)
    assert not comfy.model_management.processing_interrupted() and idle(running)
    (entry,) = entries(running, 11)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])

    api, other = remote_api.connect(Connection(locate(running.url))), str(uuid.uuid4())
    graph = entry["prompt"][2]
    graph["run"]["inputs"]["noise_seed"] = 21
    api.submit(graph, other)  # somebody else's, before ours

    def cancel_queued(text, share):
        if "queued on" in text:
            comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        RemoteSegment(proxy.url, FLUX).sample(blank, dataclasses.replace(first, seed=22), lab.flux, cancel_queued)
    assert api.state(other).kind == "running" and not entries(running, 22)
    api.cancel(other)
    assert idle(running) and not entries(running, 22)


def test_a_timeout_cancels_there_and_the_local_model_takes_over(lab, proxy, running, caplog):
    blank, first = long_part(lab, 12)
    segment = RemoteSegment(proxy.url, FLUX, timeout=1.5)
    with pytest.raises(RemoteUnavailable, match=r"was not ready within 1.5 s.*Connect model"):
        sample_latent(segment, {"samples": blank}, first, Here(lab.flux), lambda *_: None)
    assert idle(running)
    model, quick, wanted = whole(lab)
    gone = RemoteSegment("http://127.0.0.1:9", FLUX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "ABSENT", 0.2)
        given = {"samples": lab.latent(model)}
        latent, sentence = sample_latent(gone, given, quick, here(model), lambda *_: None)
    assert torch.equal(latent["samples"], wanted)
    assert "sampled here" in sentence and "127.0.0.1:9 does not answer" in sentence


def test_the_token_is_sent_only_where_it_belongs_and_shown_nowhere(lab, proxy, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    secret = "sesame-4711"
    model, first, wanted = whole(lab)
    proxy.fault = lambda seen, forward: None if seen.token == f"Bearer {secret}" else answer(401)
    segment, said = RemoteSegment(proxy.url, FLUX), []
    monkeypatch.setenv(TOKEN_VARIABLE, secret)  # a port of this machine that nobody listed gets none
    with pytest.raises(SlipstreamError, match="it wants a token"):
        segment.sample(lab.latent(model), first, model)
    assert all(not seen.token for seen in proxy.seen)
    monkeypatch.delenv(TOKEN_VARIABLE)
    monkeypatch.setenv(HOSTS_VARIABLE, "127.0.0.1")
    for wrong, words in ((None, "it wants a token"), ("wrong" + secret, "the token was refused")):
        if wrong:
            monkeypatch.setenv(TOKEN_VARIABLE, wrong)
        with pytest.raises(SlipstreamError, match=words) as refused:
            segment.sample(lab.latent(model), first, model)
        said.append(str(refused.value))
    monkeypatch.setenv(TOKEN_VARIABLE, secret)
    assert torch.equal(segment.sample(lab.latent(model), first, model)[0], wanted)
    monkeypatch.setenv(TOKEN_VARIABLE, "another")  # the settings file comes first
    write_settings(tmp_path, {"studio": {"address": proxy.url, "token": secret}})
    assert torch.equal(RemoteSegment("studio", FLUX).sample(lab.latent(model), first, model)[0], wanted)
    proxy.fault = lambda seen, forward: answer(400, {"error": seen.token}) if "/prompt" in seen.path else None
    with pytest.raises(SlipstreamError, match=r"\*\*\*") as refused:  # a server that repeats what it was sent
        segment.sample(lab.latent(model), first, model)
    monkeypatch.setenv(TOKEN_VARIABLE, secret + "\n\x01")
    write_settings(tmp_path, {})
    with pytest.raises(SlipstreamError, match="no header can carry") as odd:
        locate(proxy.url)
    said += [str(refused.value), str(odd.value), caplog.text, repr(segment)]
    write_settings(tmp_path, {"studio": {"address": proxy.url, "token": secret}})
    said.append(repr(locate("studio")))
    assert not any(secret in text for text in said)


def write_settings(folder, servers) -> None:
    path = folder / "__slipstream" / "remote.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"servers": servers}))


def test_only_allowed_servers_are_called(proxy, monkeypatch, tmp_path):
    for address in ("https://gpu.example.com", "http://10.0.0.7:8188", "localhost.example.com", "2130706433:8188"):
        with pytest.raises(SlipstreamError, match=r"not among the allowed servers.*remote\.json"):
            locate(address)
    for address in ("ftp://127.0.0.1", "http://127.0.0.1:port", "http://a b", "", "http://127.0.0.1?x=1"):
        with pytest.raises(SlipstreamError, match="neither a server in"):
            locate(address)
    for address in (
        "http://me:hush@127.0.0.1:1",
        "http://127.0.0.1:1@gpu.example.com",
        "http://127.0.0.1\\@evil.example",
    ):
        with pytest.raises(SlipstreamError, match="must not hold a user name") as refused:
            locate(address)
        assert "hush" not in str(refused.value)
    monkeypatch.setenv(HOSTS_VARIABLE, "gpu.example.com, 10.0.0.7:8188")
    assert locate("gpu.example.com/comfy/").url == "https://gpu.example.com:443/comfy"
    assert locate("http://10.0.0.7:8188").host == "10.0.0.7" and locate("[::1]:8188").url == "http://[::1]:8188"
    with pytest.raises(SlipstreamError, match="not among"):
        locate("http://10.0.0.7:8189")
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with pytest.raises(SlipstreamError, match="unencrypted over http"):
        locate("http://10.0.0.7:8188")
    write_settings(tmp_path, {"a": {"address": 3}})
    with pytest.raises(SlipstreamError, match=r"remote\.json is not as expected"):
        locate(proxy.url)


def test_a_redirect_to_another_host_is_not_followed(lab, proxy, running, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    monkeypatch.setenv(HOSTS_VARIABLE, "127.0.0.1")
    model, first, _ = whole(lab)
    with Faulty(running.url) as other:
        for code in (301, 302, 303, 307, 308):
            proxy.fault = lambda seen, forward, code=code: answer(code, Location=other.url + seen.path)
            with pytest.raises(SlipstreamError, match=r"redirects to 127.0.0.1:.* not followed"):
                RemoteSegment(proxy.url, FLUX).sample(lab.latent(model), first, model)
        assert not other.seen


def test_a_certificate_that_nobody_vouches_for_is_refused(proxy, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 -subj /CN=localhost"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    proxy.server.socket = context.wrap_socket(proxy.server.socket, server_side=True)
    with pytest.raises(SlipstreamError, match=r"certificate of localhost:.* not trusted"):
        remote_api.connect(Connection(locate(proxy.url.replace("http://127.0.0.1", "https://localhost"))))
    assert not proxy.seen


def test_what_does_not_fit_is_refused_in_words(lab, proxy):
    model, first, _ = whole(lab)
    blank = {"samples": lab.latent(model)}

    def refused(words, latent=blank, there=FLUX, part=first, url=proxy.url):
        with pytest.raises(SlipstreamError, match=words) as error:
            sample_latent(RemoteSegment(url, there), latent, part, Here(model), lambda *_: None)
        assert str(error.value).startswith("Hybrid Remote: ")

    refused("has no model 'tiny_flux' .* it has tiny_flux_emoji", there=RemoteModel("tiny_flux"))
    refused("brings no text encoder", there=RemoteModel(FLUX.name))
    refused("does not take the job: CLIPLoader: .*clip_name", there=RemoteModel(FLUX.name, ("none.safetensors",)))
    refused("the latent carries a mask", latent={**blank, "noise_mask": torch.ones(1, 1, 16, 16)})
    proxy.fault = lambda seen, forward: answer(200, {"hello": 1})
    refused("is not a ComfyUI server")
    begun = {"samples": torch.randn(1, 4, 16, 16)}
    proxy.fault = None
    refused("failed: SamplerCustom", latent=begun)
    with pytest.MonkeyPatch.context() as patch:
        server = type("S", (), {"last_prompt_id": "me"})()
        patch.setattr(remote_api, "server_of_host", lambda: server)
        proxy.fault = lambda seen, forward: (
            answer(200, {"queue_running": [[0, "me"]], "queue_pending": []}) if "/queue" in seen.path else None
        )
        refused("this very ComfyUI")
    latent, sentence = sample_latent(
        RemoteSegment(proxy.url, FLUX), begun, part(schedule(model)[-1:], False), Here(), lambda *_: None
    )
    assert latent is begun and sentence == "no step in this part"
    assert parse_loras("a b.safetensors 0.5\nc.safetensors, d: -1") == (
        ("a b.safetensors", 0.5), ("c.safetensors", 1.0), ("d", -1.0),
    )  # fmt: skip


def test_the_node_on_a_canvas(lab, proxy):
    """The node as the host calls it; what it tells goes on about the boundary of a multistep sampler."""
    model = lab.flux
    sigmas = schedule(model)[: CUT + 1]
    values = dict(
        server=proxy.url, model_name=FLUX.name, text_encoders=FLUX.encoders[0], text_encoder_type="flux", positive=TEXT,
        negative="", cfg=1.0, sampler_name="dpmpp_2m", sigmas=sigmas, latent_image={"samples": lab.latent(model)},
        add_noise=True, noise_seed=SEED, model=model,
    )  # fmt: skip
    node = type("Placed", (RemoteSegmentNode,), {"hidden": SimpleNamespace(unique_id="7")})
    latent, sentence = node.execute(**values).result
    assert torch.equal(latent["samples"], here(model).sample(lab.latent(model), part(sigmas, True, sampler="dpmpp_2m")))
    assert f"{CUT} steps of tiny_flux_emoji.safetensors on 127.0.0.1" in sentence and "starts anew" in sentence


def test_through_comfy_api_proxy(lab, proxy, running, monkeypatch, tmp_path):
    """The other dialect, in front of the same server: token, result, a lost answer, a cancel."""
    if importlib.util.find_spec("comfy_api_proxy") is None or "ManualSigmas" not in info(running):
        pytest.skip("needs comfy-api-proxy, and a host of 2026")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "comfy_api_proxy.cli", "run", "--comfyui", running.url, "--port", port]
    with (tmp_path / "log").open("wb") as log:
        gateway = subprocess.Popen([*command, "--token", "sesame"], stdout=log, stderr=log)
    proxy.target = f"http://127.0.0.1:{port}"
    model, first, wanted = whole(lab)
    segment = RemoteSegment(proxy.url, FLUX)
    try:
        monkeypatch.setattr(remote, "ABSENT", 20.0)
        with pytest.raises(SlipstreamError, match="it wants a token"):
            segment.sample(lab.latent(model), first)
        monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
        monkeypatch.setenv(HOSTS_VARIABLE, "127.0.0.1")
        proxy.fault = once("POST", "/v2/jobs", drop_answer)
        done, report = segment.sample(lab.latent(model), first)
        assert torch.equal(done, wanted) and report.submissions == proxy.count("POST", "/v2/jobs") == 1
        blank, long = long_part(lab, 14)
        with pytest.raises(RemoteUnavailable, match="was not ready"):
            RemoteSegment(proxy.url, FLUX, timeout=1.0).sample(blank, long)
        assert idle(running)
    finally:
        gateway.terminate()
        gateway.wait()


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def hybrid(url, order, steps=STEPS, cut=CUT, seed=SEED, latent=SIZE[0], **values):
    """A graph of `near`: the large model on the other server, the small one here, the parts in either order."""
    first = order == "large first"
    common = dict(cfg=1.0, noise_seed=seed)
    there = dict(
        server=url, model_name=FLUX.name, text_encoders=FLUX.encoders[0], text_encoder_type="flux", positive=TEXT,
        negative="", sampler_name="euler", sigmas=["split", 0 if first else 1], add_noise=first,
        latent_image=["blank" if first else "here", 0], model=["large", 0], **common, **values,
    )  # fmt: skip
    here = dict(
        model=["small", 0], positive=["text", 0], negative=["text", 0], sampler=["euler", 0],
        sigmas=["split", 1 if first else 0], add_noise=not first, latent_image=["there" if first else "blank", 0],
        **common,
    )  # fmt: skip
    return {
        "large": node("UNETLoader", unet_name=FLUX.name, weight_dtype="default"),
        "small": node("UNETLoader", unet_name=emoji.SMALL_FLUX.name, weight_dtype="default"),
        "text": node("SlipstreamDemoPrompt", text=TEXT),
        "blank": node("EmptySD3LatentImage", width=8 * latent, height=8 * latent, batch_size=1),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "all": node("BasicScheduler", model=["large", 0], scheduler="simple", steps=steps, denoise=1.0),
        "split": node("SplitSigmas", sigmas=["all", 0], step=cut),
        "there": node("SlipstreamRemoteSegment", **there),
        "here": node("SamplerCustom", **here),
        "save": node("SaveLatent", samples=["here" if first else "there", 0], filename_prefix="slipstream/two"),
    }


def queue(server, graph):
    """(final latent, texts on the nodes) of a prompt on a server, as the canvas would get them."""

    async def conversation():
        async with Client(server.url) as client:
            result = await client.run(graph)
            return load(await client.file(result.outputs["save"]["latents"][0]))["latent_tensor"], result.texts

    return asyncio.run(conversation())


@pytest.fixture(scope="module")
def small():
    return emoji.load_small_flux()


@pytest.mark.parametrize("order", ["large first", "small first"])
def test_two_servers_equal_the_local_hybrid_run(lab, running, near, small, order):
    """The node in one ComfyUI's graph, the large model in the other's: bit for bit the same two parts sampled here,
    and, to rounding at the hand-over, the same steps in one run of the Hybrid Model Switch."""
    large, sigmas = lab.flux, schedule(lab.flux)
    done, texts = queue(near, hybrid(running.url, order))
    models = (large, small) if order == "large first" else (small, large)
    begun = here(models[0]).sample(lab.latent(large), part(sigmas[: CUT + 1], True))
    assert torch.equal(done, here(models[1]).sample(begun, part(sigmas[CUT:], False)))
    switched = add_switch(*models, SwitchConfig(CUT / STEPS))
    assert torch.allclose(done, here(switched).sample(lab.latent(large), part(sigmas, True)), atol=2e-5)
    steps = CUT if order == "large first" else STEPS - CUT
    assert f"{steps} steps of {FLUX.name} on {running.url.split('//')[1]}" in texts["there"]
    assert sampled(running, SEED) and not entries(near, SEED)  # the large model's job was over there alone


def test_two_servers_and_one_is_killed_while_it_works(lab, running, near, small):
    """The other ComfyUI dies in the middle of its part: this one samples the part itself, with the same result."""
    steps, cut, size, seed = 40, 30, 32, 15
    blank, sigmas = lab.latent(lab.flux, 1, (size, size)), schedule(lab.flux, steps)
    graph = hybrid(running.url, "large first", steps, cut, seed, size, timeout=8, positive_here=["text", 0])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue, near, graph)
        while not at_work(running, seed):
            assert not waiting.done()
            time.sleep(0.02)
        running.process.kill()
        running.process.wait()
        done, texts = waiting.result()
    begun = here(lab.flux).sample(blank, part(sigmas[: cut + 1], True, seed=seed))
    assert torch.equal(done, here(small).sample(begun, part(sigmas[cut:], False, seed=seed)))
    assert f"{cut} steps sampled here" in texts["there"] and running.url.split("//")[1] in texts["there"]


def at_work(running, seed) -> bool:
    """Whether the server is executing the job with this seed."""
    jobs = Connection(locate(running.url)).request("GET", "/queue").json()["queue_running"]
    return any(job[2].get("run", {"inputs": {}})["inputs"].get("noise_seed") == seed for job in jobs)


def test_h77_the_server_is_gone_in_the_middle(lab, near, monkeypatch):
    """From one request to the next nobody listens there any more: a sentence in time."""
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    blank, first = long_part(lab, 13)
    gone = threading.Event()
    with Faulty(near.url) as proxy:

        def close(text, share):
            if "steps on" in text and not gone.is_set():
                gone.set()
                proxy.close()

        with pytest.raises(RemoteUnavailable, match="does not answer"):
            RemoteSegment(proxy.url, FLUX).sample(blank, first, lab.flux, close)
    assert gone.is_set() and os.environ.get(TOKEN_VARIABLE) is None
    Connection(locate(near.url)).post("/interrupt", {})
    assert idle(near)
