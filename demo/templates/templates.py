"""The workflow templates for models that an artist has: writes `workflows/*.json` and the pictures beside them.

python -m demo.templates.templates [--pictures] [NAME ...]     pictures need COMFYUI_PATH and a Chromium

Settings and file names are those of the host's own templates and blueprints, unless a note says otherwise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .graph import File, Graph, Node, folded_pixels

__all__ = ["FOLDER", "TEMPLATES", "folded_pixels", "write"]

FOLDER = Path(__file__).resolve().parents[2] / "workflows"

FLUX_REPOSITORY, FLUX_TEXT = "Comfy-Org/flux1-dev", "comfyanonymous/flux_text_encoders"
WAN_REPOSITORY = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
SDXL_REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = File.at("diffusion_models", FLUX_REPOSITORY, "flux1-dev.safetensors")
FLUX_FILL = File.at("diffusion_models", FLUX_REPOSITORY, "split_files/diffusion_models/flux1-fill-dev.safetensors")
CLIP_L = File.at("text_encoders", FLUX_TEXT, "clip_l.safetensors")
T5 = File.at("text_encoders", FLUX_TEXT, "t5xxl_fp16.safetensors")
AE = File.at("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors")
SDXL = File.at("checkpoints", SDXL_REPOSITORY, "sd_xl_base_1.0.safetensors")
OFFSET = File.at("loras", SDXL_REPOSITORY, "sd_xl_offset_example-lora_1.0.safetensors")
SSD_1B = File.at("checkpoints", "segmind/SSD-1B", "SSD-1B.safetensors")
SD15 = File.at("checkpoints", "Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors")
CANNY = File.at(
    "controlnet", "comfyanonymous/ControlNet-v1-1_fp16_safetensors", "control_v11p_sd15_canny_fp16.safetensors"
)

FOX = "A red fox asleep on a mossy stone wall, morning fog, 85 mm photograph"
HOUSE = "A timber house by a lake at dusk, warm windows, pine forest, detailed illustration"
UNWANTED = "text, watermark, blurry"

WHAT_RUNS = (
    "Some steps are computed, the others forecast. The strips show which, how far off each forecast was, and the "
    "seconds saved."
)
NOT_MEASURED = "Not measured on this model yet: judge by the strips, and against *Off*."
PRESETS = "*preset*: Safe skips less, Fast more; Off skips nothing and gives the plain picture of the same seed."


def cache(graph: Graph, model: Node, title: str = "") -> list[Node]:
    """Cache Loader and Taylor Predictor as they come."""
    loader = graph.add("SlipstreamCacheLoader", *CACHE, title=title and f"Cache Loader, {title}", model=model)
    predictor = title and f"Taylor Predictor, {title}"
    return [loader, graph.add("SlipstreamTaylorPredictor", *TAYLOR, title=predictor, model=loader)]


CACHE = ["Balanced", "auto", 0.1, 0.0, 1.0, 6, "auto", -1, 0.0, False, "auto", 0, "auto"]
TAYLOR = ["Taylor", -1, 0.5]


def prompt(graph: Graph, clip: Node | tuple, text: str, title: str = "Prompt", room: int = 60) -> Node:
    return graph.add("CLIPTextEncode", text, title=title, room=room, clip=clip)


def sampled(
    graph: Graph, model: Node, positive, negative, latent, vae, *, steps: int, cfg: float, scheduler: str
) -> list[Node]:
    """The column on the right: an euler sampler, decoder, picture."""
    sampler = graph.add(
        "KSampler", 0, "fixed", steps, cfg, "euler", scheduler, 1.0,
        model=model, positive=positive, negative=negative, latent_image=latent,
    )  # fmt: skip
    picture = graph.add("VAEDecode", samples=sampler, vae=vae)
    return [sampler, picture, graph.add("SaveImage", "slipstream/picture", room=200, images=picture)]


def flux_loaders(graph: Graph, file: File = FLUX) -> tuple[Node, Node, Node]:
    return (
        graph.add("UNETLoader", file, "default"),
        graph.add("DualCLIPLoader", CLIP_L, T5, "flux", "default"),
        graph.add("VAELoader", AE),
    )


def flux_prompt(graph: Graph, clip: Node, text: str, guidance: float) -> list[Node]:
    text_node = prompt(graph, clip, text)
    guided = graph.add("FluxGuidance", guidance, conditioning=text_node)
    return [text_node, guided, graph.add("ConditioningZeroOut", conditioning=text_node)]


def flux_dev() -> dict:
    graph = Graph("slipstream_flux_dev")
    unet, clip, vae = flux_loaders(graph)
    text, guided, none = flux_prompt(graph, clip, FOX, 3.5)
    latent = graph.add("EmptySD3LatentImage", 1024, 1024, 1)
    chain = cache(graph, unet)
    picture = sampled(graph, chain[-1], guided, none, latent, vae, steps=20, cfg=1.0, scheduler="simple")
    note = graph.note(
        "FLUX.1 dev, with fewer evaluations",
        expect=f"{WHAT_RUNS} {NOT_MEASURED} The small Flux that the presets were set on computes 11 of 28 euler steps.",
        turn=f"{PRESETS} More steps give the cache more to skip.",
    )
    return graph.lay_out(
        (330, [("Model files", [unet, clip, vae]), ("How to use it", [note])]),
        (310, [("Prompt and size", [text, guided, none, latent])]),
        (300, [("Slipstream", chain)]),
        (320, [("Picture", picture)]),
    )


def checkpoint(
    name: str, file: File, latent: tuple, text: str, steps: int, heading: str, expect: str, turn: str
) -> dict:
    """A checkpoint with text encoder and VAE, in the settings of the host's SD1.5 and SDXL templates."""
    graph = Graph(name)
    loader = graph.add("CheckpointLoaderSimple", file)
    positive, negative = (
        prompt(graph, loader[1], text),
        prompt(graph, loader[1], UNWANTED, "Negative prompt", 20),
    )
    size = graph.add("EmptyLatentImage", *latent)
    chain = cache(graph, loader)
    picture = sampled(graph, chain[-1], positive, negative, size, loader[2], steps=steps, cfg=8.0, scheduler="normal")
    note = graph.note(heading, expect=expect, turn=turn)
    return graph.lay_out(
        (330, [("Model file", [loader]), ("How to use it", [note])]),
        (310, [("Prompt and size", [positive, negative, size])]),
        (300, [("Slipstream", chain)]),
        (320, [("Picture", picture)]),
    )


def sdxl() -> dict:
    return checkpoint(
        "slipstream_sdxl", SDXL, (1024, 1024, 1), HOUSE, 25, "SDXL, with fewer evaluations",
        f"{WHAT_RUNS} {NOT_MEASURED}",
        f"{PRESETS} *Custom* with the site *U-Net depth* is DeepCache: a skipped step still runs the outer blocks.",
    )  # fmt: skip


def sd15() -> dict:
    return checkpoint(
        "slipstream_sd15", SD15, (512, 512, 1), HOUSE, 20, "SD1.5, with fewer evaluations",
        f"{WHAT_RUNS} {NOT_MEASURED} The small SD1.5 that the presets were set on computes 9 of 28 euler steps.",
        f"{PRESETS} *Custom* with the site *U-Net depth* is DeepCache, with *U-Net encoder* Faster Diffusion.",
    )  # fmt: skip


def flow_model(
    name: str, unet: File, clip: tuple, vae: File, shift: float, size: int, steps: int, heading: str, turn: str
) -> dict:
    """Qwen-Image or Z-Image: shifted flow, cfg 4."""
    graph = Graph(name)
    loaders = graph.add("UNETLoader", unet, "default"), graph.add("CLIPLoader", *clip), graph.add("VAELoader", vae)
    positive = prompt(graph, loaders[1], FOX)
    negative = prompt(graph, loaders[1], UNWANTED, "Negative prompt", 20)
    latent = graph.add("EmptySD3LatentImage", size, size, 1)
    shifted = graph.add("ModelSamplingAuraFlow", shift, model=loaders[0])
    chain = [shifted, *cache(graph, shifted)]
    picture = sampled(
        graph, chain[-1], positive, negative, latent, loaders[2], steps=steps, cfg=4.0, scheduler="simple"
    )
    note = graph.note(heading, expect=f"{WHAT_RUNS} {NOT_MEASURED}", turn=f"{PRESETS} {turn}")
    return graph.lay_out(
        (330, [("Model files", list(loaders)), ("How to use it", [note])]),
        (310, [("Prompt and size", [positive, negative, latent])]),
        (300, [("Slipstream", chain)]),
        (320, [("Picture", picture)]),
    )


def qwen_image() -> dict:
    repository = "Comfy-Org/Qwen-Image_ComfyUI"
    text = File.at("text_encoders", repository, "split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors")
    return flow_model(
        "slipstream_qwen_image",
        File.at("diffusion_models", repository, "split_files/diffusion_models/qwen_image_fp8_e4m3fn.safetensors"),
        (text, "qwen_image", "default"), File.at("vae", repository, "split_files/vae/qwen_image_vae.safetensors"),
        3.1, 1328, 20, "Qwen-Image, with fewer evaluations",
        "*steps*: its authors use 50, which gives the cache more to skip. With a 4- or 8-step Lightning LoRA there is "
        "next to nothing to skip.",
    )  # fmt: skip


def z_image() -> dict:
    turbo = "Comfy-Org/z_image_turbo"
    text = File.at("text_encoders", turbo, "split_files/text_encoders/qwen_3_4b.safetensors")
    unet = File.at("diffusion_models", "Comfy-Org/z_image", "split_files/diffusion_models/z_image_bf16.safetensors")
    return flow_model(
        "slipstream_z_image", unet, (text, "lumina2", "default"),
        File.at("vae", turbo, "split_files/vae/ae.safetensors"), 3.0, 1024, 30, "Z-Image, with fewer evaluations",
        "*sampler*: the host's template has res_multistep, with which fewer steps do nearly what a cache does; euler "
        "gains more. Z-Image **Turbo** needs 8 steps only: at 5 to 8 steps at most one is skipped.",
    )  # fmt: skip


def wan22_t2v() -> dict:
    graph = Graph("slipstream_wan22_t2v")
    part = "split_files/diffusion_models/wan2.2_t2v_{}_noise_14B_fp8_scaled.safetensors"
    text_file = "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    high, low = (
        graph.add("UNETLoader", File.at("diffusion_models", WAN_REPOSITORY, part.format(n)), "default", title=title)
        for n, title in (("high", "High noise expert"), ("low", "Low noise expert"))
    )
    encoder = File.at("text_encoders", "Comfy-Org/Wan_2.1_ComfyUI_repackaged", text_file)
    clip = graph.add("CLIPLoader", encoder, "wan", "default")
    vae = graph.add("VAELoader", File.at("vae", WAN_REPOSITORY, "split_files/vae/wan_2.1_vae.safetensors"))
    positive = prompt(graph, clip, "A red fox trots along a mossy wall in morning fog, the camera follows it")
    negative = prompt(graph, clip, "static, blurry, subtitles, worst quality", "Negative prompt", 20)
    latent = graph.add("EmptyHunyuanLatentVideo", 640, 640, 81, 1)
    chains, samplers = [], []
    for name, model, (noise, start, end, rest) in (
        ("high noise", high, ("enable", 0, 10, "enable")),
        ("low noise", low, ("disable", 10, 10000, "disable")),
    ):
        shifted = graph.add("ModelSamplingSD3", 8.0, model=model)
        chains.append([shifted, *cache(graph, shifted, name)])
        samplers.append(
            graph.add(
                "KSamplerAdvanced", noise, 0, "fixed", 20, 3.5, "euler", "simple", start, end, rest,
                title=f"KSampler, {name}", model=chains[-1][-1], positive=positive, negative=negative,
                latent_image=samplers[0] if samplers else latent,
            )
        )  # fmt: skip
    frames = graph.add("VAEDecode", samples=samplers[1], vae=vae)
    saved = graph.add("SaveAnimatedWEBP", "slipstream/video", 16.0, False, 90, "default", images=frames)
    note = graph.note(
        "Wan 2.2, both experts with a cache",
        expect=(
            "Each expert has its own Cache Loader and its own history, and a strip of its own. Its first steps and its "
            "last are computed, so of ten steps each only a few are skipped. " + NOT_MEASURED
        ),
        turn=(
            "*steps*: the authors use 40, split at 20 here. " + PRESETS + " *Hybrid Model Switch* with the unit *Wan "
            "2.2 T2V (0.875)* takes both experts through one KSampler instead. With 4-step LoRAs nothing is skipped."
        ),
    )
    return graph.lay_out(
        (340, [("Model files", [high, low, clip, vae]), ("How to use it", [note])]),
        (300, [("Prompt and size", [positive, negative, latent])]),
        (300, [("Slipstream, first expert", chains[0])]),
        (300, [("Slipstream, second expert", chains[1])]),
        (300, [("Steps 1 to 10", samplers[:1]), ("Steps 11 to 20", samplers[1:]), ("Video", [frames, saved])]),
    )


def lora() -> dict:
    graph = Graph("slipstream_lora")
    loader = graph.add("CheckpointLoaderSimple", SDXL)
    adapted = graph.add("LoraLoader", OFFSET, 0.7, 0.7, model=loader, clip=loader[1])
    positive = prompt(graph, adapted[1], "A lighthouse in a thunderstorm at night, deep blacks, dramatic light")
    negative = prompt(graph, adapted[1], UNWANTED, "Negative prompt", 20)
    latent = graph.add("EmptyLatentImage", 1024, 1024, 1)
    chain = cache(graph, adapted)
    picture = sampled(graph, chain[-1], positive, negative, latent, loader[2], steps=25, cfg=8.0, scheduler="normal")
    note = graph.note(
        "A LoRA and the cache",
        expect=f"{WHAT_RUNS} LoRA nodes may stand before or after the Cache Loader, and there may be several. "
        + NOT_MEASURED,
        turn="*strength_model* as you would without a cache. A LoRA made for 4 or 8 steps leaves nothing to skip. "
        + PRESETS,
    )
    return graph.lay_out(
        (330, [("Model and LoRA", [loader, adapted]), ("How to use it", [note])]),
        (310, [("Prompt and size", [positive, negative, latent])]),
        (300, [("Slipstream", chain)]),
        (320, [("Picture", picture)]),
    )


def controlnet() -> dict:
    graph = Graph("slipstream_controlnet")
    loader = graph.add("CheckpointLoaderSimple", SD15)
    net = graph.add("ControlNetLoader", CANNY)
    edges = graph.add("LoadImage", "example.png", "image", title="Edges, white on black", room=140)
    positive = prompt(graph, loader[1], HOUSE)
    negative = prompt(graph, loader[1], UNWANTED, "Negative prompt", 20)
    guided = graph.add(
        "ControlNetApplyAdvanced", 1.0, 0.0, 0.8,
        positive=positive, negative=negative, control_net=net, image=edges,
    )  # fmt: skip
    latent = graph.add("EmptyLatentImage", 512, 512, 1)
    chain = cache(graph, loader)
    picture = sampled(graph, chain[-1], guided[0], guided[1], latent, loader[2], steps=20, cfg=8.0, scheduler="normal")
    note = graph.note(
        "A ControlNet and the cache",
        expect=f"{WHAT_RUNS} The ControlNet itself runs at every step, and the step at which it switches off "
        f"(*end_percent*) is computed. {NOT_MEASURED}",
        turn="Load a picture of edges; the host's *Canny* node makes one from a photograph. " + PRESETS,
    )
    return graph.lay_out(
        (330, [("Model files and edges", [loader, net, edges]), ("How to use it", [note])]),
        (310, [("Prompt, ControlNet, size", [positive, negative, guided, latent])]),
        (300, [("Slipstream", chain)]),
        (320, [("Picture", picture)]),
    )


def inpaint() -> dict:
    graph = Graph("slipstream_inpaint")
    unet, clip, vae = flux_loaders(graph, FLUX_FILL)
    source = graph.add("LoadImage", "example.png", "image", title="Picture with a mask", room=180)
    text, guided, none = flux_prompt(graph, clip, "A glass jar with a small forest in it", 30.0)
    masked = graph.add(
        "InpaintModelConditioning", True, positive=guided, negative=none, vae=vae, pixels=source, mask=source[1]
    )
    soft = graph.add("DifferentialDiffusion", 1.0, model=unet)
    chain = [soft, *cache(graph, soft)]
    picture = sampled(graph, chain[-1], masked[0], masked[1], masked[2], vae, steps=20, cfg=1.0, scheduler="normal")
    note = graph.note(
        "Inpainting with FLUX.1 Fill",
        expect=f"{WHAT_RUNS} {NOT_MEASURED}",
        turn="Load a picture, right click, *Open in MaskEditor*, paint what is to be new. " + PRESETS,
    )
    return graph.lay_out(
        (330, [("Model files", [unet, clip, vae]), ("How to use it", [note])]),
        (310, [("Picture and mask", [source]), ("Prompt", [text, guided, none, masked])]),
        (300, [("Slipstream", chain)]),
        (320, [("Picture", picture)]),
    )


def hybrid_sdxl() -> dict:
    graph = Graph("slipstream_hybrid_sdxl")
    large = graph.add("CheckpointLoaderSimple", SDXL, title="Large: SDXL")
    small = graph.add("CheckpointLoaderSimple", SSD_1B, title="Small: SSD-1B")
    positive = prompt(graph, large[1], HOUSE)
    negative = prompt(graph, large[1], UNWANTED, "Negative prompt", 20)
    latent = graph.add("EmptyLatentImage", 1024, 1024, 1)
    switch = graph.add(
        "SlipstreamHybridSwitch", 0.4, "fraction of steps", "a then b", "auto", 0.0, model_a=large, model_b=small
    )
    picture = sampled(graph, switch, positive, negative, latent, large[2], steps=25, cfg=8.0, scheduler="normal")
    note = graph.note(
        "SDXL begins, SSD-1B finishes, in one run",
        expect="Another picture in less time, not the same one: the first 40 % of the steps are SDXL's. "
        "The node shows steps and seconds of each model. On the small models measured, fewer steps of the "
        "large model stayed nearer to its picture: try that first. " + NOT_MEASURED.replace(", and against *Off*", ""),
        turn="*switch_at*: later is nearer to SDXL. *order*: b then a lets the small one begin (T-Stitch). A Cache "
        "Loader may stand before the switch on either model.",
    )
    return graph.lay_out(
        (330, [("Two models of one latent space", [large, small]), ("How to use it", [note])]),
        (310, [("Prompt and size", [positive, negative, latent])]),
        (300, [("Slipstream", [switch])]),
        (320, [("Picture", picture)]),
    )


def quantize_save() -> dict:
    graph = Graph("slipstream_quantize_save")
    unet, clip, vae = flux_loaders(graph)
    text, guided, none = flux_prompt(graph, clip, FOX, 3.5)
    latent = graph.add("EmptySD3LatentImage", 1024, 1024, 1)
    quantised = graph.add("SlipstreamW4A4Quantize", "auto", 32, "4 bit", "first run", "", 0.0, 8, False, model=unet)
    picture = sampled(graph, quantised, guided, none, latent, vae, steps=20, cfg=1.0, scheduler="simple")
    saved = graph.add("SlipstreamSaveModel", "flux1-dev_w4a4", model=quantised, after=picture[0])
    note = graph.note(
        "FLUX.1 dev in 4 bit, made once",
        expect="The first run measures 8 of its steps, quantises, and writes models/diffusion_models/flux1-dev_w4a4."
        "safetensors. A quantised layer takes 0.28 of its 16-bit memory; some layers stay 16 bit. Then put *Load "
        "Quantized Model* in the place of Load Diffusion Model and take W4A4 Quantize and Save out. Neither quality "
        "nor speed is measured on this model yet.",
        turn="*activations*: 8 bit is nearer to 16 bit, in a file of the same size. *calibration*: none needs no run. "
        "Too large for your memory in 16 bit? *Quantize Model File* goes file to file.",
    )
    return graph.lay_out(
        (330, [("Model files", [unet, clip, vae]), ("How to use it", [note])]),
        (310, [("Prompt and size", [text, guided, none, latent])]),
        (320, [("Slipstream: quantise", [quantised]), ("Slipstream: save", [saved])]),
        (320, [("Picture", picture)]),
    )


def calibrate_reuse() -> dict:
    graph = Graph("slipstream_calibrate_reuse")
    unet, clip, vae = flux_loaders(graph)
    text, guided, none = flux_prompt(graph, clip, FOX, 3.5)
    latent = graph.add("EmptySD3LatentImage", 1024, 1024, 1)
    predictor = graph.add("SlipstreamTaylorPredictor", *TAYLOR, model=unet)
    loader = graph.add("SlipstreamCacheLoader", *CACHE, model=predictor)
    method = graph.add("KSamplerSelect", "euler")
    sigmas = graph.add("BasicScheduler", "simple", 20, 1.0, model=unet)
    calibration = graph.add(
        "SlipstreamCalibrate", 1.0, 2.5, 0, "flux1-dev euler simple 20", "speed-up", 0.05, 1, 4, "best", False, False,
        200, room=200, model=predictor, positive=guided, negative=none, sampler=method, sigmas=sigmas,
        latent_image=latent,
    )  # fmt: skip
    picture = sampled(graph, loader, guided, none, latent, vae, steps=20, cfg=1.0, scheduler="simple")
    note = graph.note(
        "Calibrate once, then sample with it",
        expect="The first queue samples once in full and four times with the best schedules, and writes a profile. The "
        "picture then uses it: *profile* auto finds it, and the strip says so. Afterwards mute *Calibrate* (select "
        "it, Ctrl+M). A new prompt, seed or size takes the same profile; another model, predictor or range of sigmas "
        "needs its own. Not measured on this model yet.",
        turn="*speed_up*: 2 is careful, 3.5 fast. *runs* 4 with more prompts is safer. *preset*: Safe and Fast are two "
        "other points of the same frontier.",
    )
    return graph.lay_out(
        (330, [("Model files", [unet, clip, vae]), ("How to use it", [note])]),
        (310, [("Prompt and size", [text, guided, none, latent])]),
        (320, [("Slipstream: calibrate", [method, sigmas, calibration])]),
        (300, [("Slipstream", [predictor, loader])]),
        (320, [("Picture", picture)]),
    )


TEMPLATES = (
    flux_dev, sdxl, sd15, qwen_image, z_image, wan22_t2v, lora, controlnet, inpaint, hybrid_sdxl, quantize_save,
    calibrate_reuse,
)  # fmt: skip


def write() -> list[Path]:
    """Every template's file, written anew; returns their paths."""
    paths = []
    for make in TEMPLATES:
        paths.append(FOLDER / f"slipstream_{make.__name__}.json")
        paths[-1].write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


if __name__ == "__main__":
    written = write()
    if "--pictures" in sys.argv:
        from .pictures import draw

        wanted = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        draw([path for path in written if not wanted or path.stem in wanted])
