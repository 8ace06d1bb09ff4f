"""Faults injected where they hurt: memory gone in the middle of anything, a full disk, damaged and missing files, a
killed process. After each the next plain run is bit-identical, the next accelerated one equal to a clean one, and files
are as they were."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import comfy.model_management
import comfy.samplers
import folder_paths
import psutil
import pytest
import torch
from safetensors.torch import save_file
from slipstream.demo import emoji
from slipstream.engine.calibration import recorder as calibration
from slipstream.engine.calibration.profile import Profile
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.forecast import history
from slipstream.engine.run.plan import CacheConfig, CompensatorConfig
from slipstream.engine.run.run import Run
from slipstream.host import model as patcher
from slipstream.host.calibrate import calibrate
from slipstream.host.calibrate.job import Job, Wish
from slipstream.host.compensate import reference
from slipstream.host.profiles import folder as profiles
from slipstream.host.quantise import load as quant_load
from slipstream.host.quantise import save as quant_files
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.kernels.choices import Choices
from slipstream.kernels.files import left_over, write_whole
from slipstream.quant import linear
from slipstream.quant.files import Writer

from bench.stress.fuzz_files import profile_bytes
from bench.stress.mutate import every_cut

ROOT = Path(__file__).resolve().parents[2]
NAME = "kept.safetensors"
OutOfMemory = comfy.model_management.OOM_EXCEPTION


@pytest.fixture(scope="module")
def flux4(lab):
    return quantise(lab.flux, QuantWish(rank=16))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders of the host for profiles and models."""
    for name in (profiles.FOLDER, "diffusion_models"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


class Broken:
    """A function in whose place another raises at its call number `at`; hit: whether it came to that."""

    def __init__(self, monkeypatch, owner, name: str, at: int, error: type[BaseException]):
        self.calls, self.at = 0, at
        own = getattr(owner, name)

        @functools.wraps(own)
        def broken(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                raise error("out of memory")  # made here: a kept one would keep the frames it went through
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)

    @property
    def hit(self) -> bool:
        return self.calls >= self.at


def alive() -> int:
    gc.collect()
    return sum(type(o) in (Run, history.History) for o in gc.get_objects())


def chain(lab, flux4, name: str):
    """(the plain model, the accelerated one)."""
    if name == "4 bit, cached, compensated":
        model = lab.every(flux4, site="block stack")
        return flux4, patcher.add_compensator(model, CompensatorConfig("none", 2, node_id="e"))
    if name == "int8 cache":
        return lab.flux, lab.every(lab.flux, cache_device="int8")
    if name == "per token":
        return lab.flux, lab.fast(
            lab.flux, method="interval", max_skip=2, drift_budget=1.0, predictor="Per token", order=1
        )
    return lab.flux, lab.every(lab.flux)


# Where memory runs out: (chain, owner of the function, its name, at which call).
PLACES = {
    "storing a snapshot": ("cache", history.History, "push", 3),
    "storing one in 8 bit": ("int8 cache", history.Stored, "pack", 2),
    "forecasting": ("cache", history.History, "combine", 2),
    "choosing per token": ("per token", history.History, "column", 1),
    "deciding": ("cache", Run, "begin", 5),
    "a quantised layer": ("4 bit, cached, compensated", linear.W4A4Linear, "forward", 100),
    "an anchor's 8-bit copy": ("4 bit, cached, compensated", reference.BetterWeights, "_copy", 5),
    "storing behind the blocks": ("4 bit, cached, compensated", history.History, "push", 4),
}


CASES = [pytest.param(place, OutOfMemory, id=f"{place}-device") for place in PLACES]
CASES += [pytest.param(place, MemoryError, id=f"{place}-RAM") for place in ("storing a snapshot", "forecasting")]


@pytest.mark.parametrize(("place", "error"), CASES)
def test_h06_memory_that_runs_out_leaves_nothing(lab, flux4, monkeypatch, place, error):
    name, owner, function, at = PLACES[place]
    base, model = chain(lab, flux4, name)
    run = functools.partial(lab.sample, steps=9, size=(8, 8))
    plain, clean, before = run(base), run(model), alive()
    with monkeypatch.context() as patch:
        broken = Broken(patch, owner, function, at, error)
        with contextlib.suppress(error, SlipstreamError):
            lab.sample(model, steps=9, size=(8, 8))
        assert broken.hit, f"{function} was called {broken.calls} times"
    assert alive() <= before
    assert torch.equal(run(base), plain)
    assert torch.equal(run(model), clean)
    assert lab.report(model)["filled"] >= 2


@pytest.mark.parametrize(("owner", "function"), [(calibration.Recorder, "statistics"), (calibrate, "frontier"),
                                                 (Profile, "to_bytes")])  # fmt: skip
def test_h06_h79_a_calibration_that_fails_writes_nothing(lab, folders, monkeypatch, owner, function):
    plain, old = lab.sample(lab.flux, steps=8), folders / profiles.FOLDER / NAME
    old.write_bytes(b"old")
    sigmas = comfy.samplers.calculate_sigmas(lab.flux.get_model_object("model_sampling"), "simple", 8)
    job = Job(
        lab.flux, ((emoji.conditioning("hamburger"), 1),), emoji.conditioning(""), 1.0,
        comfy.samplers.sampler_object("euler"), sigmas, {"samples": lab.latent(lab.flux)},
    )  # fmt: skip
    Broken(monkeypatch, owner, function, 1, OutOfMemory)
    with pytest.raises(OutOfMemory), torch.inference_mode():
        profiles.save("kept", calibrate.calibrate(job, Wish(check=0)))
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == [NAME]
    assert torch.equal(lab.sample(lab.flux, steps=8), plain)


# -- disks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def room(nbytes: int):
    """Files of this process cannot grow beyond so many bytes: a real write fails in its middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_h79_a_write_that_fails_in_its_middle_leaves_every_old_file(lab, flux4, folders):
    """Profiles, quantised models both ways, measured kernels: real writes that end after 4 kB."""
    profile = Profile.from_bytes(profile_bytes(), "x")
    kept, models = folders / profiles.FOLDER / NAME, folders / "diffusion_models"
    kernels = Choices(folders, "card")
    kernels.keep("k", {"name": "plain", "config": [], "milliseconds": {}})
    (models / "source.safetensors").write_bytes(emoji.SMALL_FLUX.read_bytes())
    for file in (kept, models / NAME):
        file.write_bytes(b"old")
    measured = kernels.path.read_bytes()
    ways = {
        "Calibrate": lambda: profiles.save("kept", profile),
        "Save Quantized Model": lambda: quant_files.save(flux4, "kept"),
        "Quantize Model File": lambda: quant_files.quantise_file("source.safetensors", "kept", QuantWish(rank=0)),
    }
    for node, way in ways.items():
        with room(4096), pytest.raises(SlipstreamError, match=rf"^{node}: kept\.safetensors could not be written \("):
            way()
    with room(16), pytest.raises(OSError):
        kernels.keep("l", {"name": "x" * 4096, "config": [], "milliseconds": {}})
    assert kept.read_bytes() == (models / NAME).read_bytes() == b"old" and kernels.path.read_bytes() == measured
    assert not [p for p in folders.rglob("*") if p.suffix in (".part", ".tmp")]
    ways["Calibrate"]()
    assert Profile.load(kept).keys == profile.keys


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from lab.boot import import_pack
import_pack()
from pathlib import Path
import torch
from slipstream.kernels.files import write_whole
from slipstream.quant.files import Writer
folder = Path({folder!r})
with Writer(folder / 'model.safetensors', ['a', 'b'], {{}}) as out:
    out.add('a', torch.ones(1 << 16))
    print('half', flush=True)
    while True:
        write_whole(folder / 'profile.safetensors', b'new' * (1 << 16))
"""


def test_h79_a_killed_process_leaves_every_old_file(folders):
    """SIGKILL in the middle of a model file while a small file is being replaced again and again."""
    place = folders / "diffusion_models"
    small, model = place / "profile.safetensors", place / "model.safetensors"
    small.write_bytes(b"old")
    model.write_bytes(b"old")
    code = KILLED.format(root=str(ROOT), folder=str(place))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert model.read_bytes() == b"old" and small.read_bytes() in (b"old", b"new" * (1 << 16))
    # what is left over is in no list, and in nobody's way; the next writer of a model takes it off
    assert [old.name.split(".")[2] for old in left_over(model, psutil.pid_exists)] == [str(process.pid)]
    assert not left_over(model, lambda number: True) and not left_over(place / "other.safetensors", psutil.pid_exists)
    assert sorted(folder_paths.get_filename_list("diffusion_models")) == sorted([model.name, small.name])
    with Writer(model, ["a"], {}) as out:
        out.add("a", torch.ones(2))
    write_whole(small, b"newer")
    assert small.read_bytes() == b"newer" and model.stat().st_size > 3


# -- files that change under a run -----------------------------------------------------------------------------------


def test_h78_a_profile_that_is_damaged_or_gone_between_queue_and_run(lab, folders):
    """Cut at every class of length, with flipped bits, replaced, deleted: one sentence when the sampler starts."""
    base, file = lab.flux, folders / profiles.FOLDER / NAME
    whole = profile_bytes(profiles.fingerprint(base))
    file.write_bytes(whole)
    plain = lab.sample(base, steps=9, size=(8, 8))
    model = patcher.add_cache(base, CacheConfig(node_id="1", profile=NAME))
    clean = lab.sample(model, steps=9, size=(8, 8))
    flipped = [whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :] for i in (0, 7, 12, 60)]
    for data in (*every_cut(whole), *flipped, b"", None):
        file.unlink(missing_ok=True)
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(SlipstreamError, match=r"^Cache Loader: [^\n]*kept\.safetensors"):
            lab.sample(model, steps=9, size=(8, 8))
        assert profiles.fitting("", "", "", "", (1.0, 0.0)) == (None, None)  # what nobody named is passed over
    assert torch.equal(lab.sample(base, steps=9, size=(8, 8)), plain)
    file.write_bytes(whole)
    assert torch.equal(lab.sample(model, steps=9, size=(8, 8)), clean)


def test_h78_a_model_file_that_changes_after_it_was_loaded(lab, folders):
    """What is loaded does not depend on the file any more: it may be replaced, cut short and deleted."""
    emoji.accept_small_flux()
    place = folders / "diffusion_models"
    (place / "source.safetensors").write_bytes(emoji.SMALL_FLUX.read_bytes())
    name, _ = quant_files.quantise_file("source.safetensors", "made", QuantWish(rank=0))
    model = quant_load.load(name)
    clean = lab.sample(model, steps=3)
    whole = (place / name).read_bytes()
    for data in (whole[: len(whole) // 2], b""):
        (place / name).write_bytes(data)
        assert torch.equal(lab.sample(model, steps=3), clean)
        with pytest.raises(SlipstreamError, match=rf"^Load Quantized Model: {name} cannot be loaded, it is damaged"):
            quant_load.load(name)
    save_file({"a": torch.ones(2)}, place / name)
    with pytest.raises(SlipstreamError, match=r"^Load Quantized Model: "):
        quant_load.load(name)
    (place / name).unlink()
    with pytest.raises(SlipstreamError, match="there is no file"):
        quant_load.load(name)
    comfy.model_management.unload_all_models()
    assert torch.equal(lab.sample(model, steps=3), clean)
    (place / name).write_bytes(whole)
    assert torch.equal(lab.sample(quant_load.load(name), steps=3), clean)


@pytest.mark.long
def test_h79_a_server_killed_while_it_saves(tmp_path):
    """SIGKILL of the real server in the middle of Quantize Model File; started again it works, and the file is old."""
    import asyncio

    from bench.stress.server import Session, StressServer

    models = tmp_path / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (models / NAME).write_bytes(b"old")
    inputs = {"model_name": "tiny_flux_emoji.safetensors", "name": "kept", "format": "auto", "rank": 32}
    inputs |= {"activations": "4 bit", "calibration": "none", "layers": "", "quality_guard": 0.0}
    graph = {"1": {"class_type": "SlipstreamQuantizeFile", "inputs": inputs}}

    async def kill_in_the_middle(url, server):
        async with Session(url) as session:
            await session.post(graph)
            deadline = time.monotonic() + 60
            while not list(models.glob("*.part")) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            server.process.kill()

    async def again(url):
        async with Session(url) as session:
            info = await session.object_info()
            outcome = await session.run(graph)
            return str(info["SlipstreamLoadModel"]), outcome.kind

    server = StressServer(tmp_path)
    with server as url:
        asyncio.run(kill_in_the_middle(url, server))
        server.process.wait()
    assert (models / NAME).read_bytes() == b"old"
    with StressServer(tmp_path) as url:
        offered, kind = asyncio.run(again(url))
    assert NAME in offered and ".part" not in offered and kind == "done"
    assert (models / NAME).stat().st_size > 10**6 and not list(models.glob("*.part"))
