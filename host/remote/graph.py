"""One segment as a graph of stock nodes, so that the server needs nothing installed.

The sigmas are the run's own numbers. A server that takes a list (`ManualSigmas`, December 2025) gets the list. An older
one gets the scheduler, step count and cut that give exactly this list with the local model, after a probe job has shown
that its model's sampling agrees; where neither is possible the segment is refused.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import comfy.samplers
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...engine.errors import SlipstreamError
from .http import NODE, NoAnswer

SAVE = "save"
MARKER = "latent_format_version_0"  # without it the host scales what it loads by 1 / 0.18215

# Loader node, its input for the file name, its other inputs. The first that lists the name loads it.
MODEL_LOADERS = (
    ("UNETLoader", "unet_name", {"weight_dtype": "default"}),
    ("CheckpointLoaderSimple", "ckpt_name", {}),
    ("UnetLoaderGGUF", "unet_name", {}),
)
TEXT_LOADERS = {
    1: ("CLIPLoader", ("clip_name",)),
    2: ("DualCLIPLoader", ("clip_name1", "clip_name2")),
    3: ("TripleCLIPLoader", ("clip_name1", "clip_name2", "clip_name3")),
    4: ("QuadrupleCLIPLoader", ("clip_name1", "clip_name2", "clip_name3", "clip_name4")),
}
TYPED = ("CLIPLoader", "DualCLIPLoader")

# Between a LoRA's name and its strength, and how many digits that may have.
SEPARATORS, LONGEST_NUMBER = string.whitespace + ":=", 40

# Longest whole schedule that is tried to find a list of sigmas in; below half a second if none fits.
SEARCH_STEPS = 100
# Where the two model samplings are compared, as parts of the run: any three that are not at its ends.
PROBED = (0.2, 0.5, 0.8)
PRINTED = 6e-5  # the host prints sigmas with four decimals

# Latents are made larger from one value by LatentUpscale, which takes at most this many pixels and makes at least 64.
PIXELS, LEAST, MOST = 8, 64, 16384


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """What the server loads, by the names that its own loader nodes show.

    encoders: text encoder files, or one node of the server that turns `text` into CONDITIONING; empty for a
    checkpoint's own. guidance: of FLUX-like models, 0 leaves it out. loras: (file, strength).
    """

    name: str
    encoders: tuple[str, ...] = ()
    encoder_type: str = "stable_diffusion"
    guidance: float = 0.0
    loras: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """What is sampled: as the host's SamplerCustom has it, with prompts as text."""

    positive: str
    negative: str
    cfg: float
    sampler: str
    sigmas: tuple[float, ...]
    seed: int
    add_noise: bool

    @property
    def steps(self) -> int:
        return max(0, len(self.sigmas) - 1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Nodes whose output `source` are the sigmas. probed: a probe must show that the server's model agrees."""

    nodes: dict
    source: list
    probed: bool = False


def parse_files(text: str) -> tuple[str, ...]:
    """Names separated by commas or line ends."""
    return tuple(name.strip() for name in re.split(r"[,\n]", text) if name.strip())


def parse_loras(text: str) -> tuple[tuple[str, float], ...]:
    """One `file strength` per line or between commas; without a number the strength is 1."""
    found = []
    for line in parse_files(text):
        # by hand: one expression for all of it takes hours for a hostile line
        number = re.split(r"[\s:=]", line)[-1]
        if number != line and len(number) <= LONGEST_NUMBER and re.fullmatch(r"[-+]?\d*\.?\d+", number):
            found.append((line[: -len(number)].rstrip(SEPARATORS), float(number)))
        else:
            found.append((line, 1.0))
    return tuple(found)


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def loaders(api, model: RemoteModel, place: str) -> tuple[dict, list, list | None]:
    """(nodes, source of MODEL, source of CLIP or None). Raises SlipstreamError with what the server has instead."""
    kind, field, rest = _model_loader(api, model, place)
    nodes = {"model": node(kind, **{field: model.name}, **rest)}
    source, clip = ["model", 0], ["model", 1] if kind == "CheckpointLoaderSimple" else None
    files = [name for name in model.encoders if "." in name]
    if len(files) > len(TEXT_LOADERS):
        raise SlipstreamError(f"{NODE}: text_encoders names {len(files)} files; ComfyUI loads four at most.")
    if files:
        kind, fields = TEXT_LOADERS[len(files)]
        kinds = {"type": model.encoder_type} if kind in TYPED else {}
        nodes["clip"] = node(kind, **dict(zip(fields, files, strict=True)), **kinds)
        clip = ["clip", 0]
    for i, (name, strength) in enumerate(model.loras):
        values = {"model": source, "lora_name": name, "strength_model": strength}
        if clip is None:
            nodes[f"lora {i}"] = node("LoraLoaderModelOnly", **values)
        else:
            nodes[f"lora {i}"] = node("LoraLoader", **values, clip=clip, strength_clip=strength)
            clip = [f"lora {i}", 1]
        source = [f"lora {i}", 0]
    return nodes, source, clip


def _model_loader(api, model: RemoteModel, place: str) -> tuple[str, str, dict]:
    known = []
    for kind, field, rest in MODEL_LOADERS:
        names = api.choices(kind, field)
        # A dialect that tells no names: text encoders of one's own go with a file that holds none.
        if model.name in (names or ()):
            return kind, field, rest
        known += names or ()
    if not known:
        return MODEL_LOADERS[0 if model.encoders else 1]
    near = difflib.get_close_matches(model.name, known, 3, 0.3) or known[:3]
    raise SlipstreamError(
        f"{NODE}: {place} has no model '{model.name}' in diffusion_models or checkpoints; it has {', '.join(near)}"
        f"{' and others' if len(known) > len(near) else ''}."
    )


def prompts(model: RemoteModel, part: Part, clip: list | None) -> tuple[dict, list, list]:
    """(nodes, source of positive, source of negative); at cfg 1 the host asks for no negative, so none is encoded."""
    custom = next((name for name in model.encoders if "." not in name), None)
    if custom is None and clip is None:
        raise SlipstreamError(
            f"{NODE}: '{model.name}' brings no text encoder; name the server's files in text_encoders, separated by "
            "commas."
        )

    def encode(text: str) -> dict:
        return node(custom, text=text) if custom else node("CLIPTextEncode", text=text, clip=clip)

    nodes = {"positive": encode(part.positive)}
    positive = ["positive", 0]
    if model.guidance > 0:
        nodes["guidance"] = node("FluxGuidance", conditioning=positive, guidance=model.guidance)
        positive = ["guidance", 0]
    if part.cfg == 1.0:
        return nodes, positive, positive
    nodes["negative"] = encode(part.negative)
    return nodes, positive, ["negative", 0]


def schedule(api, sigmas: Sequence[float], source: list, local, place: str) -> Schedule:
    """How the server comes to exactly these sigmas. local: the model whose schedule they are of, or None.

    Raises SlipstreamError where it cannot.
    """
    if api.choices("ManualSigmas", "sigmas") is not None or not hasattr(api, "prefix"):
        text = ", ".join(format(Decimal(s), "f") for s in sigmas)  # in full: the host reads neither exponents nor repr
        return Schedule({"sigmas": node("ManualSigmas", sigmas=text)}, ["sigmas", 0])
    if local is None:
        raise SlipstreamError(
            f"{NODE}: the ComfyUI at {place} is of before December 2025 and takes no list of sigmas; update it, or "
            "connect the local model so that its schedule can be asked for by name."
        )
    found = recognise(local.get_model_object("model_sampling"), sigmas)
    if found is None:
        raise SlipstreamError(
            f"{NODE}: the ComfyUI at {place} is of before December 2025, and these sigmas are of no scheduler it could "
            f"run for {SEARCH_STEPS} steps or fewer; update it, or use Basic Scheduler with the connected model."
        )
    name, steps, first = found
    nodes = {"all sigmas": node("BasicScheduler", model=source, scheduler=name, steps=steps, denoise=1.0)}
    nodes["from"] = node("SplitSigmas", sigmas=["all sigmas", 0], step=first)
    nodes["sigmas"] = node("SplitSigmas", sigmas=["from", 1], step=len(sigmas) - 1)
    return Schedule(nodes, ["sigmas", 0], probed=True)


def recognise(model_sampling, sigmas: Sequence[float]) -> tuple[str, int, int] | None:
    """(scheduler, steps, first step) of a whole schedule of this model with exactly these sigmas in it."""
    sigmas = list(sigmas)
    for steps in range(len(sigmas) - 1, SEARCH_STEPS + 1):
        for name in comfy.samplers.SCHEDULER_NAMES:
            whole = comfy.samplers.calculate_sigmas(model_sampling, name, steps).tolist()
            for first in range(len(whole) - len(sigmas) + 1):
                if whole[first : first + len(sigmas)] == sigmas:
                    return name, steps, first
    return None


def probe(nodes: dict, source: list, plan: Schedule, mark: str) -> dict:
    """A graph that prints the sigmas and the model's sampling. mark: makes its cached output another one's."""
    graph = {**nodes, **plan.nodes, "shown": node("PreviewAny", source=plan.source, slipstream=mark)}
    for i, percent in enumerate(PROBED):
        values = {"sampling_percent": percent, "return_actual_sigma": False}
        graph[f"at {i}"] = node("SamplingPercentToSigma", model=source, **values)
        graph[f"shown {i}"] = node("PreviewAny", source=[f"at {i}", 0], slipstream=mark)
    return graph


def agrees(outputs: dict, sigmas: Sequence[float], local) -> bool:
    """Whether a probe's outputs are of the same schedule and of a model with the same sampling."""

    def text(name: str) -> str:
        return "".join(outputs.get(name, {}).get("text") or [])

    printed = [float(n) for n in re.findall(r"\d+\.\d*(?:e[-+]?\d+)?", text("shown"))]
    near = [abs(a - b) <= PRINTED * max(1.0, abs(b)) for a, b in zip(printed, sigmas, strict=False)]
    sampling = local.get_model_object("model_sampling")
    exact = [text(f"shown {i}") == str(sampling.percent_to_sigma(p)) for i, p in enumerate(PROBED)]
    return len(printed) == len(sigmas) and all(near) and all(exact)


def packed(samples: Tensor) -> bytes:
    """A latent as the host's LoadLatent reads it, in float32."""
    return save({"latent_tensor": samples.detach().float().cpu().contiguous(), MARKER: torch.tensor([])})


def unpacked(data: bytes) -> Tensor:
    """The latent of a SaveLatent file. Raises NoAnswer where the file is cut short or is none, so it is asked again."""
    try:
        tensors = load(data)
    except SafetensorError:
        raise NoAnswer("sent a damaged file") from None
    if MARKER not in tensors or "latent_tensor" not in tensors:
        raise NoAnswer("sent a file that is no latent")
    return tensors["latent_tensor"].float()


def start(samples: Tensor) -> tuple[bytes, dict, list]:
    """(file to upload, nodes without its name, source of LATENT); an empty latent travels as one value per channel."""
    high, wide = samples.shape[-2] * PIXELS, samples.shape[-1] * PIXELS
    blown_up = samples.ndim in (4, 5) and min(high, wide) >= LEAST and max(high, wide) <= MOST
    if not (blown_up and empty(samples)):
        return packed(samples), {"latent": node("LoadLatent")}, ["latent", 0]
    size = {"upscale_method": "nearest-exact", "width": wide, "height": high, "crop": "disabled"}
    nodes = {"latent": node("LoadLatent"), "size": node("LatentUpscale", samples=["latent", 0], **size)}
    return packed(samples[..., :1, :1]), nodes, ["size", 0]


def empty(samples: Tensor) -> bool:
    """Whether the host takes it for a blank, whose channels it fits to the model."""
    return not torch.count_nonzero(samples)


def file_name(data: bytes) -> str:
    return f"slipstream_{hashlib.sha256(data).hexdigest()}.latent"


def sampling(source: list, text: tuple, part: Part, plan: Schedule, latent: list, name: str) -> dict:
    """The nodes that sample and save. text: what `prompts` gave; name: folder/prefix of the saved file."""
    nodes, positive, negative = text
    run = node(
        "SamplerCustom", model=source, add_noise=part.add_noise, noise_seed=part.seed, cfg=part.cfg, positive=positive,
        negative=negative, sampler=["sampler", 0], sigmas=plan.source, latent_image=latent,
    )  # fmt: skip
    return {
        **nodes,
        **plan.nodes,
        "sampler": node("KSamplerSelect", sampler_name=part.sampler),
        "run": run,
        SAVE: node("SaveLatent", samples=["run", 0], filename_prefix=name),
    }
