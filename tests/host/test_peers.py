"""The peers' harness: what it says of the host's caches, of ours, and of packs that are wrong in a known way."""

from __future__ import annotations

import json
import sys

import pytest
from slipstream.engine.errors import SlipstreamError

from bench.survival import peer_checks, peers
from bench.survival.peer_checks import Subject, examine

# A node that leaves out every second evaluation, and breaks one promise after the other.
BAD = """
import comfy.patcher_extension as extension

kept = {}

class Bad:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "every": ("INT", {"default": 2}), "mode": (["a", "b"],)}}
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    def patch(self, model, every, mode):
        assert mode == "a"
        model = model.clone()
        def around(executor, x, *args, **kwargs):
            kept["calls"] = kept.get("calls", 0) + 1
            if kept["calls"] % every == 0 and kept["out"].shape == x.shape:
                x.add_(0.01)
                return kept["out"]
            kept["out"] = executor(x, *args, **kwargs)
            return kept["out"]
        model.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "bad", around)
        return (model,)

NODE_CLASS_MAPPINGS = {"Bad": Bad}
"""


@pytest.fixture
def pack(tmp_path):
    def write(text):
        folder = tmp_path / "pack-of-others"
        folder.mkdir()
        (folder / "__init__.py").write_text(text)
        return folder

    yield write
    for name in [name for name in sys.modules if name.startswith(str(tmp_path).replace(".", "_x_"))]:
        del sys.modules[name]


def subject(lab, peer, **options):
    return Subject("flux", lab.flux, peers.wrapper(peer), **options)


def all_hold(lab, peer, names, **options):
    found = examine(subject(lab, peers.Peer(peer), **options), names)
    assert {name: check["says"] for name, check in found.items() if not check["held"]} == {}


def test_ours_keeps_the_invariants(lab):
    """The harness and the nodes at once; the first of them says that something was left out at all."""
    all_hold(lab, "Cache Loader + Taylor Predictor", ["skips", "freed", "split", "inputs"])
    assert list(peers.INVARIANTS) == list(peer_checks.CHECKS)


@pytest.mark.long
@pytest.mark.parametrize("peer", peers.OURS)
def test_ours_keeps_every_invariant(lab, peer):
    all_hold(lab, peer, list(peer_checks.CHECKS))


def test_the_host_s_easycache_is_seen_to_write_into_the_latent(lab):
    """H10 with the fault that EasyCache has in float32, and LazyCache as the control."""
    bare, lazy = (peers.Peer(name) for name in ("EasyCache 0.2 (host)", "LazyCache 0.2 (host)"))
    assert examine(subject(lab, bare), ["inputs"])["inputs"]["held"] is False
    assert examine(subject(lab, lazy), ["inputs"])["inputs"]["held"] is True


def test_every_fault_of_a_bad_pack_is_found(lab, pack):
    """Without this a harness that finds nothing would look like a table of good packs."""
    peer = peers.Peer("bad", str(pack(BAD)), "Bad", {"every": 2})
    found = examine(subject(lab, peer), ["skips", "freed", "split", "inputs"])
    assert {name: check["held"] for name, check in found.items()} == {
        "skips": True, "freed": False, "split": False, "inputs": False,
    }  # fmt: skip


@pytest.mark.parametrize("maker", ["ApplyFBCacheOnModel", "TaylorSeerLite"])
def test_h16_caches_that_leave_no_mark_are_refused_by_the_name_of_their_maker(lab, maker):
    """WaveSpeed and TaylorSeer only set the function around the network."""

    def around(model_function, arguments):
        return model_function(arguments["input"], arguments["timestep"], **arguments["c"])

    around.__qualname__ = f"{maker}.patch.<locals>.wrapper"
    name = {"A": r"First Block Cache \(WaveSpeed\)", "T": "TaylorSeer"}[maker[0]]
    theirs = lab.flux
    theirs.set_model_unet_function_wrapper(around)
    with pytest.raises(SlipstreamError, match=f"Cache Loader: {name} is already on this model"):
        lab.fast(theirs)
    later = lab.fast(lab.flux)
    later.set_model_unet_function_wrapper(around)
    with lab.calls(later) as runs, pytest.raises(SlipstreamError, match=name):
        lab.sample(later)
    assert not runs


def test_packs_that_do_not_load_say_why(pack):
    folder = pack("from comfy.samplers import no_such_name\n")
    with pytest.raises(peers.NotLoaded, match="cannot import name 'no_such_name'"):
        peers.loaded(folder, "Any")
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    with pytest.raises(peers.NotLoaded, match="it has no node Any"):
        peers.loaded(folder, "Any")


def test_the_command_line_and_the_page(tmp_path):
    def wrong(sentence):
        raise SlipstreamError(sentence)

    (peer,) = peers.packs_of([str(tmp_path)], ["Node"], ['{"threshold": 0.1, "device": "cpu"}'], wrong)
    assert peer.name == f"Node threshold 0.1 ({tmp_path.name})" and peer.inputs["device"] == "cpu"
    for arguments in (
        ([str(tmp_path)], [], []),
        ([str(tmp_path / "none")], ["a"], []),
        ([str(tmp_path)], ["a"], ["{"]),
    ):
        with pytest.raises(SlipstreamError):
            peers.packs_of(*arguments, wrong)
    checks = {name: {"held": name != "split", "says": "a | b"} for name in peers.INVARIANTS}
    ran = {"host": "0.10.0", "name": "one", "model": "flux", "loads": "", "checks": checks, "evaluations": 9.0,
           "psnr_db": 40.0, "psnr_min_db": 39.0, "fewer_steps_db": 38.0, "against_fewer_steps_db": 2.0,
           "together": {"ours after it": "refused: x", "it after ours": "refused: y"}}  # fmt: skip
    rows = [ran, {"host": "0.9.1", "name": "two", "model": "unet", "loads": "ImportError: gone"}]
    page = peers.page(json.loads(json.dumps(rows)), 4)
    assert page.index("ComfyUI 0.10.0") < page.index("ComfyUI 0.9.1") and "does not load: ImportError: gone" in page
    assert "**no**: a / b" in page and "| one | refused: x | refused: y |" in page and "| one | 9.00 | 40.00 |" in page
