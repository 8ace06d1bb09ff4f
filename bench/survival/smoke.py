"""The smoke set: what a user of one ComfyUI release does first, in a few seconds, through the host's own loader.

    python dev.py bench smoke [--out FILE]          with the host of this checkout
    python dev.py hosts --repo PATH                 with every release

Every check raises when its promise is broken and returns a few words otherwise. The nodes are those that the host's
loader registered from this folder; samplers, LoRA loading and files are the host's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from lab.boot import ROOT, boot

STEPS, FEW = 12, 4
PROMPT, SEED = "hamburger", 7
# What must be left out of 12 euler steps, and how near the result must stay.
MOST_COMPUTED, LEAST_DB, LEAST_DB_4BIT = 9, 40.0, 28.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench smoke")
    parser.add_argument("--out", type=Path, help="write {check: {passed, seconds, says}} there")
    options = parser.parse_args()
    smoke = Smoke()
    results = {"start": outcome("start", smoke.start)}
    if results["start"]["passed"]:
        with tempfile.TemporaryDirectory() as folder:
            smoke.use(Path(folder))
            for name, check in CHECKS.items():
                results[name] = outcome(name, lambda check=check: check(smoke))
    if options.out:
        options.out.write_text(json.dumps(results), encoding="utf-8")
    sys.exit(0 if all(result["passed"] for result in results.values()) else 1)


def outcome(name: str, check: Callable[[], str]) -> dict:
    """What one check came to, printed as it ends. Seconds are the processor's: a busy machine does not count."""
    started = time.process_time()
    try:
        says, passed = check(), True
    except Exception as error:
        traceback.print_exc()
        says, passed = sentence(error), False
    seconds = time.process_time() - started
    print(f"{'ok  ' if passed else 'FAIL'} {name:10} {seconds:5.1f} s  {says}", flush=True)
    return {"passed": passed, "seconds": round(seconds, 2), "says": says}


def sentence(error: BaseException) -> str:
    """One line: the kind of error and the end of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


class Smoke:
    """The host with this pack loaded, the small models, and one way to sample."""

    def start(self) -> str:
        """Bring host and pack into this process; returns the host's version."""
        boot()
        import comfy.utils
        import comfyui_version
        import torch

        torch.set_num_threads(1)
        import nodes

        self.version = comfyui_version.__version__
        self.nodes = nodes.NODE_CLASS_MAPPINGS
        before = set(self.nodes)
        demand(asyncio.run(nodes.load_custom_node(str(ROOT))), "the host's loader did not take the pack; see the log")
        self.ours = sorted(set(self.nodes) - before)
        demand(bool(self.ours), "the host's loader registered no node")
        self.package = self.nodes[self.ours[0]].__module__.rsplit(".nodes.", 1)[0]
        self.hidden = [field.name for field in importlib.import_module("comfy_api.latest").io.Hidden]
        self.web = nodes.EXTENSION_WEB_DIRS
        comfy.utils.set_progress_bar_enabled(False)
        self.emoji = self.module("demo.emoji")
        self.psnr = self.module("engine.metrics").psnr
        self.places, self.plain_results = 0, {}
        return self.version

    def module(self, name: str):
        """A module of the copy of the pack that the host loaded."""
        return importlib.import_module(f"{self.package}.{name}")

    def use(self, folder: Path) -> None:
        """Write models, profiles and reports below this folder, and read no profile that lies elsewhere."""
        import folder_paths

        for kind in ("diffusion_models", "slipstream_profiles"):
            (folder / kind).mkdir()
            folder_paths.folder_names_and_paths[kind] = ([str(folder / kind)], {".safetensors"})
        folder_paths.set_output_directory(str(folder))

    @cached_property
    def flux(self):
        return self.emoji.load_flux()

    @cached_property
    def unet(self):
        return self.emoji.load_unet()

    @cached_property
    def flux4(self):
        """The small Flux in 4 bit, without data."""
        return self.node("W4A4Quantize", model=self.flux)

    def node(self, node: str, /, **inputs):
        """What a node of ours gives with its defaults and these inputs, as the host's executor would call it."""
        cls = self.nodes[f"Slipstream{node}"]
        self.places += 1
        hidden = SimpleNamespace(**{**dict.fromkeys(self.hidden), "unique_id": str(self.places)})
        placed = type(cls.__name__, (cls,), {"hidden": hidden})
        defaults = {i.id: i.default for i in cls.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        unknown = inputs.keys() - {i.id for i in cls.GET_SCHEMA().inputs}
        demand(not unknown, f"{node} has no inputs {sorted(unknown)}")
        result = placed.execute(**{**defaults, **inputs}).result
        return result[0] if len(result) == 1 else result

    def fast(self, model, **options):
        return self.node("TaylorPredictor", model=self.node("CacheLoader", model=model, **options))

    def every(self, model, n: int = 3, **options):
        """Every n-th step computed, whatever the data say."""
        return self.fast(model, preset="Custom", method="interval", max_skip=n - 1, **options)

    def sample(self, model, steps: int = STEPS, cfg: float = 1.0, sampler: str = "euler", seed: int = SEED):
        """The latent that the host's KSampler gives."""
        import torch

        import nodes

        scheduler = "normal" if model.model.diffusion_model.__class__.__name__ == "UNetModel" else "simple"
        conds = (self.emoji.conditioning(text) for text in (PROMPT, ""))
        with torch.inference_mode():
            latent = {"samples": torch.zeros(1, 16, 16, 16)}
            return nodes.common_ksampler(model, seed, steps, cfg, sampler, scheduler, *conds, latent)[0]["samples"]

    def plain(self, name: str, steps: int = STEPS, cfg: float = 1.0):
        """The latent of a model without any of our nodes, sampled once."""
        key = name, steps, cfg
        if key not in self.plain_results:
            self.plain_results[key] = self.sample(getattr(self, name), steps, cfg)
        return self.plain_results[key]

    @contextlib.contextmanager
    def runs(self, model, inside: str):
        """A list that gets one entry whenever the named module of the network runs."""
        found: list[int] = []
        module = model.model.diffusion_model.get_submodule(inside)
        hook = module.register_forward_pre_hook(lambda *_: found.append(1))
        try:
            yield found
        finally:
            hook.remove()

    def same(self, one, other, what: str) -> None:
        import torch

        demand(torch.equal(one, other), f"{what}: not bit-identical, {self.psnr(one, other):.1f} dB")

    def report(self, model) -> dict:
        return self.module("host.report.report").last_run(model)


def registered(smoke: Smoke) -> str:
    """All nodes, their help and the canvas extension, through the host's loader."""
    contract = json.loads((ROOT / "tests" / "unit" / "contract.json").read_text(encoding="utf-8"))
    demand(smoke.ours == sorted(contract), f"missing {sorted(set(contract) - set(smoke.ours))}")
    for node_id, inputs in contract.items():
        info = smoke.nodes[node_id].GET_NODE_INFO_V1()  # what the canvas asks for
        known = {name for group in info["input"].values() for name in group}
        demand(known >= set(inputs), f"{node_id} shows {sorted(known)}")
    demand(any(Path(path) == ROOT / "web" for path in smoke.web.values()), "the host serves no web folder of ours")
    return f"{len(smoke.ours)} nodes"


def off(smoke: Smoke) -> str:
    """Off, and the plain model after an accelerated run, are bit-identical to the host alone."""
    for name in ("flux", "unet"):
        base, plain = getattr(smoke, name), smoke.plain(name, FEW, 3.0)
        smoke.same(smoke.sample(smoke.fast(base, preset="Off"), FEW, 3.0), plain, f"{name}, off")
        smoke.sample(smoke.every(base))
        smoke.same(smoke.sample(base, FEW, 3.0), plain, f"{name}, bypassed")
    return "identical"


def cached(smoke: Smoke) -> str:
    """Cache Loader and Taylor Predictor as dropped in: evaluations really not made, result near."""
    words = []
    for name, inside in (("flux", "img_in"), ("unet", "time_embed")):
        base = getattr(smoke, name)
        model = smoke.fast(base)
        plain = smoke.plain(name)
        with smoke.runs(base, inside) as runs:
            result = smoke.sample(model)
        near = smoke.psnr(result, plain)
        demand(len(runs) <= MOST_COMPUTED, f"{name}: {len(runs)} of {STEPS} evaluations were made")
        demand(smoke.report(model)["computed"] == len(runs), f"{name}: the report miscounts {len(runs)} runs")
        demand(near >= LEAST_DB, f"{name}: {near:.1f} dB")
        smoke.same(smoke.sample(model), result, f"{name}, again")
        words.append(f"{name} {len(runs)} of {STEPS}, {near:.1f} dB")
    return "; ".join(words)


def blocks(smoke: Smoke) -> str:
    """The inner sites: the host's block patches and a U-Net's own forward."""
    words = []
    rows = (
        ("flux", "last block", "double_blocks.1"),
        ("flux", "block stack", "single_blocks.0"),
        ("unet", "U-Net depth", "middle_block.0.in_layers.2"),
        ("unet", "U-Net encoder", "input_blocks.1.0.in_layers.2"),
    )
    for name, site, inside in rows:
        base = getattr(smoke, name)
        model = smoke.every(base, site=site)
        plain = smoke.plain(name)
        with smoke.runs(base, inside) as runs:
            near = smoke.psnr(smoke.sample(model), plain)
        demand(0 < len(runs) <= MOST_COMPUTED, f"{site}: {inside} ran {len(runs)} times in {STEPS} steps")
        demand(near >= LEAST_DB - 10, f"{site}: {near:.1f} dB")
        words.append(f"{site} {len(runs)}")
    return ", ".join(words)


def split(smoke: Smoke) -> str:
    """cond and uncond in one call and in two: the same picture, with steps left out."""
    import comfy.model_management as management

    results, free = [], management.get_free_memory
    model = smoke.every(smoke.flux)
    try:
        for short in (False, True):
            if short:  # attention asks with True, and needs the truth
                management.get_free_memory = lambda device=None, torch_free_too=False: (
                    free(device, True) if torch_free_too else 1
                )
            with smoke.runs(smoke.flux, "img_in") as runs:
                results.append((smoke.sample(model, cfg=3.0), len(runs)))
    finally:
        management.get_free_memory = free
    (together, calls), (apart, twice) = results
    demand(twice == 2 * calls <= 2 * MOST_COMPUTED, f"{calls} calls together, {twice} apart")
    difference = ((apart - together).norm() / together.norm()).item()
    demand(difference < 1e-5, f"relative difference {difference:.1e}")
    return f"{difference:.0e}"


def cancel(smoke: Smoke) -> str:
    """A cancelled run stops at once and leaves nothing behind."""
    import comfy.model_management as management

    model, plain = smoke.every(smoke.flux), smoke.plain("flux")
    clean = smoke.sample(model)
    module, calls = smoke.flux.model.diffusion_model.img_in, []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3:
            raise management.InterruptProcessingException()

    hook = module.register_forward_pre_hook(interrupt)
    try:
        smoke.sample(model)
        raise AssertionError("the interruption was swallowed")
    except management.InterruptProcessingException:
        demand(len(calls) == 3, f"{len(calls) - 3} further calls of the network")
    finally:
        hook.remove()
    smoke.same(smoke.sample(model), clean, "the next run")
    smoke.same(smoke.sample(smoke.flux), plain, "the plain run")
    return "identical"


def quantised(smoke: Smoke) -> str:
    """4 bit without data, near the 16-bit picture; the base model stays as it was."""
    plain = smoke.plain("flux")
    near = smoke.psnr(smoke.plain("flux4"), plain)
    demand(LEAST_DB_4BIT <= near < 70, f"{near:.1f} dB")
    smoke.same(smoke.sample(smoke.flux, FEW, 3.0), smoke.plain("flux", FEW, 3.0), "the base model")
    model = smoke.every(smoke.flux4)
    smoke.sample(model)
    demand(smoke.report(model)["filled"] >= STEPS - MOST_COMPUTED, "no cache on the quantised model")
    return f"{near:.1f} dB"


def lora(smoke: Smoke) -> str:
    """A LoRA through the host's own loader on the quantised model: it acts, strength 0 and removal change nothing."""
    import comfy.sd
    import torch

    layer = smoke.flux.model.diffusion_model.double_blocks[0].img_mlp[0]
    draw = torch.Generator().manual_seed(5)
    key = "diffusion_model.double_blocks.0.img_mlp.0"
    file = {
        f"{key}.lora_up.weight": 0.6 * torch.randn(layer.out_features, 4, generator=draw),
        f"{key}.lora_down.weight": torch.randn(4, layer.in_features, generator=draw) / layer.in_features**0.5,
    }

    def loaded(model, strength):
        return comfy.sd.load_lora_for_models(model, None, file, strength, 0.0)[0]

    plain4, plain = smoke.plain("flux4", FEW), smoke.plain("flux", FEW)
    with4, without4 = (smoke.sample(loaded(smoke.flux4, strength), FEW) for strength in (1.0, 0.0))
    with16 = smoke.sample(loaded(smoke.flux, 1.0), FEW)
    acts, near = smoke.psnr(with16, plain), smoke.psnr(with4, with16)
    demand(near > acts + 3, f"the LoRA moves the picture to {acts:.1f} dB, in 4 bit it is at {near:.1f} dB")
    smoke.same(without4, plain4, "strength 0")
    smoke.same(smoke.sample(smoke.flux4, FEW), plain4, "removed")
    return f"{near:.1f} dB"


def saved(smoke: Smoke) -> str:
    """Save, load and sample again: the same picture bit for bit."""
    name = smoke.node("SaveModel", model=smoke.flux4, name="smoke")
    again = smoke.node("LoadModel", model_name=name)
    smoke.same(smoke.sample(again, FEW), smoke.plain("flux4", FEW), "the loaded file")
    return "identical"


def switch(smoke: Smoke) -> str:
    """A model switched to its twin in the middle: bit-identical, both really used."""
    twin = smoke.emoji.load_flux()
    for sampler in ("euler", "dpmpp_2m"):
        model = smoke.node("HybridSwitch", model_a=smoke.flux, model_b=twin)
        with smoke.runs(smoke.flux, "img_in") as first, smoke.runs(twin, "img_in") as second:
            result = smoke.sample(model, 6, sampler=sampler)
        demand(first and second and len(first) + len(second) == 6, f"{len(first)} and {len(second)} evaluations")
        smoke.same(result, smoke.sample(smoke.flux, 6, sampler=sampler), sampler)
    return "identical"


def compensated(smoke: Smoke) -> str:
    """Anchors on the 8-bit copy bring the quantised picture nearer."""
    plain = smoke.plain("flux")
    model = smoke.node("ErrorCompensator", model=smoke.flux4, anchors=3)
    bare, near = (smoke.psnr(result, plain) for result in (smoke.plain("flux4"), smoke.sample(model)))
    told = smoke.report(model)["compensation"]
    demand(len(told["anchors"]) == 3, f"{len(told['anchors'])} anchors")
    demand(near > bare, f"{bare:.1f} dB without, {near:.1f} dB with anchors")
    return f"{bare:.1f} to {near:.1f} dB"


def calibrated(smoke: Smoke) -> str:
    """Calibrate writes a profile, and Cache Loader follows it."""
    import comfy.samplers
    import torch

    sigmas = comfy.samplers.calculate_sigmas(smoke.flux.get_model_object("model_sampling"), "simple", STEPS)
    conds = [smoke.emoji.conditioning(text) for text in (PROMPT, "")]
    with torch.inference_mode():
        written, *_ = smoke.node(
            "Calibrate", model=smoke.flux, positive=conds[0], negative=conds[1], name="smoke", calibration_seed=SEED,
            check=1,
            sampler=comfy.samplers.sampler_object("euler"), sigmas=sigmas,
            latent_image={"samples": torch.zeros(1, 16, 16, 16)},
        )  # fmt: skip
    model = smoke.fast(smoke.flux, profile=written)
    near = smoke.psnr(smoke.sample(model), smoke.plain("flux"))
    computed = smoke.report(model)["computed"]
    demand(computed <= MOST_COMPUTED and near >= LEAST_DB, f"{computed} of {STEPS} computed, {near:.1f} dB")
    return f"{computed} of {STEPS}, {near:.1f} dB"


def reported(smoke: Smoke) -> str:
    """The report's numbers and its picture."""
    models = smoke.fast(smoke.flux), smoke.node("CacheLoader", model=smoke.flux, preset="Off")
    samples, reference = ({"samples": smoke.sample(model)} for model in models)
    card, text = smoke.node(
        "Report", samples=samples, reference=reference, model=models[0], reference_model=models[1],
        vae=smoke.emoji.load_vae(), filename_prefix="smoke/report",
    )  # fmt: skip
    numbers = json.loads(text)
    demand(numbers["latent_psnr_db"] >= LEAST_DB and card.ndim == 4, text[:200])
    return numbers["verdict"]


CHECKS = {
    "nodes": registered,
    "off": off,
    "cache": cached,
    "sites": blocks,
    "split": split,
    "cancel": cancel,
    "4 bit": quantised,
    "LoRA": lora,
    "files": saved,
    "switch": switch,
    "anchors": compensated,
    "calibrate": calibrated,
    "report": reported,
}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
