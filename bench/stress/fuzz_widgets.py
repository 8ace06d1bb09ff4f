"""Every value that a widget accepts, by the nodes themselves and by the host's validation of a prompt."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import comfy.samplers
import torch

from demo import emoji

from .mutate import LONG, NUMBERS, ODD, TEXTS
from .target import Case, Target, place_of, sample


class Widgets(Target):
    """Every input of every node with every kind of value, by the node itself; cheap ones are sampled where taken."""

    share = 2.0
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
                    json.loads(json.dumps(value, default=str)) if len(str(value)[:2000]) < 2000 else "x" * LONG
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


async def _validated(execution, graph: dict):
    validated = {}
    valid, errors, _ = await execution.validate_inputs("p", graph, "1", validated)
    return valid, None, {"1": {"errors": errors}}


def execute(node, values: dict):
    """What the host calls, with an id for the node."""
    hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None, dynprompt=None)
    prepared = type(node.__name__, (node,), {"hidden": hidden})
    with torch.inference_mode():
        return prepared.execute(**values)


def node_classes() -> dict[str, type]:
    """The nodes as the host gets them."""
    from slipstream.nodes import SlipstreamExtension

    return {node.__name__: node for node in asyncio.run(SlipstreamExtension().get_node_list())}
