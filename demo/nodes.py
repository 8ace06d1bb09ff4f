"""What the small emoji models need beyond stock nodes: a text encoder, a VAE, an independent counter, a repair."""

from __future__ import annotations

import sys
from pathlib import Path

import folder_paths
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io

from . import emoji

CATEGORY = "slipstream/demo"

# Sent when a sampler that ran through the counter has finished.
COUNT_EVENT = "slipstream_demo.count"


class EmojiPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamDemoPrompt",
            display_name="Emoji Prompt",
            category=CATEGORY,
            description="The demo model's text encoder: one fixed vector per word, at most eight words.",
            inputs=[io.String.Input("text", default=emoji.PROMPTS[0])],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        return io.NodeOutput(emoji.conditioning(text))


class EmojiVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamDemoVAE",
            display_name="Emoji VAE",
            category=CATEGORY,
            description="The demo model's VAE: linear, 64x64 pictures from 16x16 latents.",
            inputs=[],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(emoji.load_vae())


class CountEvaluations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamDemoCount",
            display_name="Count Evaluations",
            category=CATEGORY,
            description="Counts how often the network's first block really runs, whoever decides about it.",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        model = model.clone()
        node, counted = str(cls.hidden.unique_id), [0]

        def first_block(arguments, extra):
            counted[0] += 1
            return extra["original_block"](arguments)

        def sampling(executor, *args, **kwargs):
            counted[0] = 0
            result = executor(*args, **kwargs)
            server = sys.modules["server"].PromptServer.instance
            server.send_sync(COUNT_EVENT, {"node": node, "evaluations": counted[0]}, server.client_id)
            return result

        model.set_model_patch_replace(first_block, "dit", "double_block", 0)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "slipstream_demo", sampling)
        return io.NodeOutput(model)


class CopyInput(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamDemoCopyInput",
            display_name="Copy Network Input",
            category=CATEGORY,
            description=(
                "Hands the nodes after it a copy of the network's input. The host's EasyCache adds to its input in "
                "place, which in float32 is the sampler's own latent; with this node before it, it shows its worth."
            ),
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        model = model.clone()
        model.add_wrapper_with_key(
            WrappersMP.DIFFUSION_MODEL, "slipstream_demo", lambda executor, x, *a, **k: executor(x.clone(), *a, **k)
        )
        return io.NodeOutput(model)


class DemoExtension(ComfyExtension):
    """The demo's nodes; its model folder becomes visible to the stock loaders."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folder_paths.add_model_folder_path("diffusion_models", str(emoji.MODELS))
        # Slipstream writes into the first folder and adds its own only where there is none, so that one is added here.
        own = [str(Path(folder_paths.models_dir, "slipstream_profiles"))], {".safetensors"}
        folder_paths.folder_names_and_paths.setdefault("slipstream_profiles", own)
        folder_paths.add_model_folder_path("slipstream_profiles", str(emoji.MODELS.parent / "profiles"))
        emoji.accept_small_flux()
        emoji.accept_small_unet()
        return [EmojiPrompt, EmojiVAE, CountEvaluations, CopyInput]
