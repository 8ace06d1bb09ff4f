"""Load Pruned UNet: small partners of SD1.5 and SDXL that the host's own loader does not recognise."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.canvas.events import show
from ..host.switch.pruned import files, load, summary
from .schema import schema, widget


class LoadPrunedUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamLoadPrunedUNet",
            display_name="Load Pruned UNet",
            description=(
                "Loads BK-SDM (base, small, tiny) and other pruned U-Nets in diffusers' layout. Use it as the small "
                "model of a Hybrid Model Switch, with the text encoder and VAE of the model it was pruned from."
            ),
            search_aliases=["bk-sdm", "small sd", "tiny sd", "diffusers", "unet loader", "distilled"],
            inputs=[
                widget(
                    io.Combo.Input, "unet_name", options=files(),
                    tooltip="A safetensors file in models/diffusion_models; rename it from diffusion_pytorch_model.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The pruned model, for a Hybrid Model Switch or a sampler.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, unet_name) -> io.NodeOutput:
        model = load(unet_name)
        show(str(cls.hidden.unique_id or ""), summary(model))
        return io.NodeOutput(model)
