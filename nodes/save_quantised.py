"""Save Quantized Model: one safetensors file in the host's own quantised layout where it has one."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io

from ..host.canvas.events import show
from ..host.quantise.save import save
from .schema import schema, widget


class SaveQuantisedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamSaveModel",
            display_name="Save Quantized Model",
            description=(
                "Writes a quantised model, LoRAs included, to models/diffusion_models. Load it with Load Quantized "
                "Model, or, in the formats the host knows, with the host's own loader."
            ),
            search_aliases=["save", "svdquant", "int4", "4bit", "export"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="After W4A4 Quantize, with the LoRAs that are to be part of the file."),
                widget(
                    io.String.Input, "name", default="my_model_w4a4",
                    tooltip=(
                        "Name of the new file in models/diffusion_models, such as flux_w4a4. An older one is replaced."
                    ),
                ),
                io.Latent.Input(
                    "after", optional=True,
                    tooltip="With calibration on the first run: connect the sampler's latent, to save after that run.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="Name of the file, for Load Quantized Model.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, name, after=None) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(1)
        written, text = save(model, name, lambda done, total: bar.update_absolute(done, total))
        show(str(cls.hidden.unique_id or ""), text)
        return io.NodeOutput(written)
