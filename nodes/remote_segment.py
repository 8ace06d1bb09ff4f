"""Hybrid Remote: some steps of a sampling on another ComfyUI server, latent in and latent out."""

from __future__ import annotations

import comfy.samplers
import comfy.utils
from comfy_api.latest import io

from ..host.canvas.events import show
from ..host.remote.graph import Part, RemoteModel, parse_files, parse_loras
from ..host.remote.segment import Here, RemoteSegment, sample_latent
from .schema import schema, widget

# What the host's text encoder loaders call their models; the server says so if it does not know one.
TYPES = [
    "stable_diffusion", "sdxl", "sd3", "flux", "flux2", "wan", "qwen_image", "lumina2", "chroma", "hidream",
    "hunyuan_image", "hunyuan_video", "hunyuan_video_15", "pixart", "omnigen2", "cosmos", "ltxv", "mochi", "ovis",
    "kandinsky5", "kandinsky5_image", "longcat_image", "newbie", "stable_cascade", "stable_audio", "ace",
]  # fmt: skip
PROGRESS = 100


class RemoteSegmentNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamRemoteSegment",
            display_name="Hybrid Remote",
            description=(
                "Samples these sigmas on another ComfyUI server, which needs nothing installed, and returns the "
                "latent. Split the sigmas of the whole run (Split Sigmas): the first part there and the rest here, or "
                "the other way round, or all of it there."
            ),
            search_aliases=["cloud", "edge", "server", "network", "hybrid sd", "t-stitch", "distributed"],
            inputs=[
                io.String.Input(
                    "server", default="http://127.0.0.1:8189",
                    tooltip=(
                        "An address such as http://127.0.0.1:8189, or a name from user/__slipstream/remote.json. "
                        "Servers elsewhere must be listed there or in SLIPSTREAM_REMOTE_HOSTS; tokens stand there, "
                        "never here."
                    ),
                ),
                io.String.Input(
                    "model_name", default="",
                    tooltip="Diffusion model or checkpoint, by the name that the server shows.",
                ),
                io.String.Input(
                    "text_encoders", default="",
                    tooltip=(
                        "The server's files, separated by commas, such as clip_l.safetensors, t5xxl_fp16.safetensors. "
                        "Empty: those of the checkpoint."
                    ),
                ),
                io.Combo.Input(
                    "text_encoder_type", options=TYPES, default=TYPES[0],
                    tooltip="As in the server's CLIP loader: flux for FLUX, sdxl for SDXL.",
                ),
                io.String.Input("positive", default="", multiline=True, tooltip="Your prompt; the server encodes it."),
                io.String.Input("negative", default="", multiline=True, tooltip="What to avoid; not used at cfg 1."),
                widget(
                    io.Float.Input, "cfg", default=7.0, min=0.0, max=100.0, step=0.1,
                    tooltip="1 for FLUX-like models, 5 to 8 for SD1.5 and SDXL.",
                ),
                io.Combo.Input(
                    "sampler_name", options=list(comfy.samplers.SAMPLER_NAMES), default="euler",
                    tooltip=(
                        "Try euler: it goes on over the boundary as if there were none, like heun. Others start anew."
                    ),
                ),
                io.Sigmas.Input("sigmas", tooltip="The steps to sample there: one output of Split Sigmas, or all."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="For the first part an empty latent, which is not sent; else what the part before gave.",
                ),
                io.Boolean.Input(
                    "add_noise", default=True, tooltip="On for the first part of a run, off for one that goes on.",
                ),
                widget(
                    io.Int.Input, "noise_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Any number, such as 0: noise is made on the server from it, the same as here.",
                ),
                widget(
                    io.Float.Input, "guidance", optional=True, default=0.0, min=0.0, max=100.0, step=0.1,
                    tooltip="FLUX guidance, usually 3.5. 0 leaves it out.",
                ),
                io.String.Input(
                    "loras", optional=True, default="", multiline=True,
                    tooltip="LoRAs of the server, one per line, such as: detail.safetensors 0.8",
                ),
                widget(
                    io.Int.Input, "timeout", optional=True, default=900, min=5, max=86_400, advanced=True,
                    tooltip="Seconds for everything, the server's queue included; then it is cancelled there. Try 900.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The local model: takes over when the server fails; names the schedule to old servers.",
                ),
                io.Conditioning.Input(
                    "positive_here", optional=True, tooltip="The prompt for the local model, for when it takes over.",
                ),
                io.Conditioning.Input(
                    "negative_here", optional=True,
                    tooltip="The negative prompt for the local model, for when it takes over.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Sampled there: for a sampler or VAE Decode here."),
                io.String.Output(display_name="report", tooltip="What was asked, what it took and what went wrong."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, server, model_name, text_encoders, text_encoder_type, positive, negative, cfg, sampler_name, sigmas,
        latent_image, add_noise, noise_seed, guidance=0.0, loras="", timeout=900, model=None, positive_here=None,
        negative_here=None,
    ) -> io.NodeOutput:  # fmt: skip
        there = RemoteModel(model_name, parse_files(text_encoders), text_encoder_type, guidance, parse_loras(loras))
        part = Part(positive, negative, cfg, sampler_name, tuple(sigmas.tolist()), noise_seed, add_noise)
        node, bar = str(cls.hidden.unique_id or ""), comfy.utils.ProgressBar(PROGRESS)

        def tell(text: str, share: float) -> None:
            show(node, text)
            bar.update_absolute(round(share * PROGRESS), PROGRESS)

        def step(index, *rest) -> None:
            bar.update_absolute(index + 1, part.steps)

        segment = RemoteSegment(server, there, float(timeout))
        here = Here(model, positive_here, negative_here)
        latent, sentence = sample_latent(segment, latent_image, part, here, tell, step)
        show(node, sentence)
        return io.NodeOutput(latent, sentence)
