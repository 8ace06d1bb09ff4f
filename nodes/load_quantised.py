"""Load Quantized Model: what Save Quantized Model and others wrote, on every host."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.canvas.events import show
from ..host.quantise.load import load, names
from ..host.quantise.quantise import summary
from .schema import schema, widget


class LoadQuantisedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamLoadModel",
            display_name="Load Quantized Model",
            description=(
                "Loads a 4-bit model: a file of Save Quantized Model, of comfy-kitchen's svdquant_w4a4, or nunchaku's "
                "svdq-int4 FLUX.1. LoRA nodes may follow it."
            ),
            search_aliases=["svdquant", "nunchaku", "int4", "4bit", "unet loader", "load diffusion model"],
            inputs=[
                widget(
                    io.Combo.Input, "model_name", options=names(),
                    tooltip="A 4-bit file in models/diffusion_models. Files in 16 bit belong to Load Diffusion Model.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The 4-bit model. LoRAs, caches and samplers follow as usual.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_name) -> io.NodeOutput:
        model = load(model_name)
        show(str(cls.hidden.unique_id or ""), summary(model))
        return io.NodeOutput(model)
