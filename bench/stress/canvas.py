"""A made-up canvas: a model wire with nodes on it, sampler settings, and the prompts that both stand for."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from .server import LORAS

WORDS = "stress: failed on purpose"

# What every widget is drawn from; the first value is what a new node has.
NODES: dict[str, dict[str, Sequence]] = {
    "SlipstreamCacheLoader": {
        "preset": ("Balanced", "Safe", "Fast", "Custom", "Custom", "Custom", "Off"),
        "method": ("auto", "drift budget", "interval", "accumulated change", "power grid", "key steps",
                   "first-block gate", "confidence gate", "modulated change", "magnitude"),
        "drift_budget": (0.1, 0.0, 0.05, 0.2, 1.0),
        "start_percent": (0.0, 0.2),
        "end_percent": (1.0, 0.8),
        "max_skip": (6, 0, 1, 3, 20),
        "site": ("auto", "model output", "block stack", "last block", "U-Net depth", "U-Net encoder"),
        "depth": (-1, 0, 1, 5),
        "threshold": (0.0, 0.1, 2.0),
        "prior_noise": (False, True),
        "cache_device": ("auto", "GPU", "RAM", "int8"),
        "memory_budget_mb": (0, 1, 1000),
        "profile": ("none", "auto"),
    },
    "SlipstreamTaylorPredictor": {
        "kind": ("Taylor", "TaylorSeer", "Reuse", "Residual reuse", "Hermite", "Adams-Bashforth", "Chebyshev",
                 "Per token"),
        "order": (-1, 0, 1, 2, 3),
        "scale": (0.5, 0.1, 1.0),
    },
    "SlipstreamW4A4Quantize": {
        "format": ("auto", "svdquant_w4a4", "convrot_w4a4", "int8_convrot", "w4a8", "w4a16"),
        "rank": (16, 0, 32),
        "activations": ("4 bit", "8 bit"),
        "calibration": ("none", "none", "first run"),
        "layers": ("", "proj = keep", "img_mlp = w4a16"),
        "quality_guard": (0.0, 15.0),
        "evaluations": (2, 8),
        "gptq": (False,),
    },
    "SlipstreamErrorCompensator": {
        "profile": ("none", "auto"),
        "anchors": (-1, 0, 2),
        "strength": (1.0, 0.0, 0.5),
        "terms": ("auto", "off"),
        "reference": ("8-bit copy", "original weights"),
    },
    "SlipstreamHybridSwitch": {
        "switch_at": (0.4, 0.0, 0.7, 1.0),
        "unit": ("fraction of steps",),
        "order": ("a then b", "b then a"),
        "memory": ("auto", "swap", "keep both"),
        "cfg_b": (0.0, 1.0),
    },
    "LoraLoaderModelOnly": {"lora_name": LORAS, "strength_model": (1.0, 0.0, -0.5)},
    "EasyCache": {"reuse_threshold": (0.2,), "start_percent": (0.15,), "end_percent": (0.95,), "verbose": (False,)},
    "StressFail": {"kind": ("error", "memory", "cancel"), "at": (0, 1, 3), "words": (WORDS,)},
}  # fmt: skip
ALWAYS = ("LoraLoaderModelOnly",)  # what a plain run has, too

# Values that nobody's widget offers, as a hand-written prompt or a linked node may bring them.
BAD = (
    ("SlipstreamCacheLoader", "preset", "Ludicrous"),
    ("SlipstreamCacheLoader", "method", "guess"),
    ("SlipstreamCacheLoader", "drift_budget", 4.0),
    ("SlipstreamCacheLoader", "drift_budget", "much"),
    ("SlipstreamCacheLoader", "max_skip", -3),
    ("SlipstreamCacheLoader", "profile", "../../secret.safetensors"),
    ("SlipstreamCacheLoader", "start_percent", 1.0),
    ("SlipstreamTaylorPredictor", "kind", "Magic"),
    ("SlipstreamTaylorPredictor", "order", 7),
    ("SlipstreamTaylorPredictor", "scale", None),
    ("SlipstreamW4A4Quantize", "format", "w1a1"),
    ("SlipstreamW4A4Quantize", "layers", "img_mlp = w3a3"),
    ("SlipstreamW4A4Quantize", "rank", 10**9),
    ("SlipstreamErrorCompensator", "anchors", 10**6),
    ("SlipstreamErrorCompensator", "strength", "NaN"),
    ("SlipstreamHybridSwitch", "switch_at", 7.0),
    ("SlipstreamHybridSwitch", "order", "both"),
)


@dataclass(frozen=True)
class Space:
    """What the sampler's widgets are drawn from."""

    model: Sequence[str] = ("tiny_flux_emoji.safetensors", "tiny_flux_emoji.safetensors", "tiny_sd15_emoji.safetensors")
    size: Sequence[tuple[int, int]] = ((64, 64), (64, 64), (96, 64))
    batch: Sequence[int] = (1, 1, 2)
    steps: Sequence[int] = (12, 1, 3, 6, 10, 12, 16)
    sampler: Sequence[str] = ("euler", "heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "res_multistep", "dpm_2")
    scheduler: Sequence[str] = ("simple", "normal", "beta")
    cfg: Sequence[float] = (1.0, 1.0, 3.0)
    seed: Sequence[int] = (1, 2)
    denoise: Sequence[float] = (1.0, 1.0, 0.6)
    text: Sequence[str] = ("hamburger", "red heart")


@dataclass
class Part:
    """One node on the wire."""

    kind: str
    values: dict
    on: bool = True


@dataclass
class Canvas:
    """The user's canvas. wire: the nodes between the loader and the sampler, in order."""

    space: Space = field(default_factory=Space)
    settings: dict = field(default_factory=dict)
    wire: list[Part] = field(default_factory=list)
    bad: tuple | None = None

    def __post_init__(self) -> None:
        self.settings = self.settings or {name: getattr(self.space, name)[0] for name in vars(self.space)}

    def on(self, kind: str) -> Part | None:
        return next((part for part in self.wire if part.kind == kind and part.on), None)

    # -- what a user does: each says what it did, or nothing where there was nothing to do it to ---------------------

    def connect(self, rng: Random, kind: str | None = None) -> str:
        there = [part.kind for part in self.wire]
        free = [k for k in NODES if there.count(k) < (2 if k in ALWAYS else 1)]
        kind = kind or rng.choice([k for k in free if k not in ("EasyCache", "StressFail")] or [*ALWAYS])
        values = {name: choices[0] for name, choices in NODES[kind].items()}
        self.wire.insert(rng.randint(0, len(self.wire)), Part(kind, values))
        return f"connect {kind}"

    def remove(self, rng: Random) -> str:
        return f"remove {self.wire.pop(rng.randrange(len(self.wire))).kind}" if self.wire else ""

    def bypass(self, rng: Random) -> str:
        if not self.wire:
            return ""
        part = rng.choice(self.wire)
        part.on = not part.on
        return f"{'use' if part.on else 'bypass'} {part.kind}"

    def move(self, rng: Random) -> str:
        rng.shuffle(self.wire)
        return "rewire: " + ", ".join(part.kind for part in self.wire)

    def widget(self, rng: Random) -> str:
        if not self.wire:
            return ""
        part = rng.choice(self.wire)
        name = rng.choice(list(NODES[part.kind]))
        part.values[name] = rng.choice(NODES[part.kind][name])
        return f"{part.kind} {name} = {part.values[name]}"

    def setting(self, rng: Random) -> str:
        name = rng.choice(list(self.settings))
        self.settings[name] = rng.choice(getattr(self.space, name))
        return f"{name} = {self.settings[name]}"

    # -- what is queued ------------------------------------------------------------------------------------------

    def graph(self, number: int) -> dict:
        """The prompt; another number is sampled anew by the host."""
        return _graph(self.settings, [part for part in self.wire if part.on], number, self.bad)

    def plain(self, number: int) -> dict:
        """The same without any node of ours."""
        parts = [part for part in self.wire if part.on and part.kind in ALWAYS]
        return _graph(self.settings, parts, number, None)


def key(graph: dict) -> str:
    """What a prompt is, without its number and file name."""
    graph = copy.deepcopy(graph)
    graph["4"]["inputs"]["number"] = 0
    return json.dumps(graph, sort_keys=True)


def _graph(settings: dict, parts: list[Part], number: int, bad: tuple | None) -> dict:
    width, height = settings["size"]
    graph = {
        "1": _node("UNETLoader", unet_name=settings["model"], weight_dtype="default"),
        "2": _node("SlipstreamDemoPrompt", text=settings["text"]),
        "3": _node("EmptySD3LatentImage", width=width, height=height, batch_size=settings["batch"]),
        "4": _node("StressFresh", samples=["3", 0], number=number),
        "9": _node("SlipstreamDemoPrompt", text=""),
    }
    model, taken = ["1", 0], {}
    for part in parts:
        taken[part.kind] = taken.get(part.kind, 0) + 1
        name = str(20 + 10 * list(NODES).index(part.kind) + taken[part.kind])
        values = dict(part.values)
        if bad is not None and bad[0] == part.kind:
            values[bad[1]] = bad[2]
        if part.kind == "SlipstreamHybridSwitch":
            graph["8"] = _node("UNETLoader", unet_name="tiny_flux_emoji_small.safetensors", weight_dtype="default")
            graph[name] = _node(part.kind, model_a=model, model_b=["8", 0], **values)
        else:
            graph[name] = _node(part.kind, model=model, **values)
        model = [name, 0]
    graph["5"] = _node(
        "KSampler", model=model, positive=["2", 0], negative=["9", 0], latent_image=["4", 0], seed=settings["seed"],
        steps=settings["steps"], cfg=settings["cfg"], sampler_name=settings["sampler"],
        scheduler=settings["scheduler"], denoise=settings["denoise"],
    )  # fmt: skip
    graph["6"] = _node("SaveLatent", samples=["5", 0], filename_prefix="stress/latent")
    return graph


def _node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}
