"""Quantize Model File: file to file, without ever holding the whole model in memory."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io

from ..host.canvas.events import show
from ..host.profiles import folder as profiles
from ..host.quantise.choose import QuantWish
from ..host.quantise.load import names
from ..host.quantise.save import quantise_file
from .schema import schema, widget
from .w4a4_quantise import BITS, wish_widgets


class QuantiseFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamQuantizeFile",
            display_name="Quantize Model File",
            description=(
                "Quantises a file of models/diffusion_models layer by layer: for models that do not fit in memory in "
                "16 bit. Load the result with Load Quantized Model."
            ),
            search_aliases=["svdquant", "int4", "4bit", "convert", "w4a4"],
            is_output_node=True,
            inputs=[
                widget(
                    io.Combo.Input, "model_name", options=names(),
                    tooltip="A 16-bit or fp8 file in models/diffusion_models.",
                ),
                widget(
                    io.String.Input, "name", default="my_model_w4a4",
                    tooltip=(
                        "Name of the new file in models/diffusion_models, such as flux_w4a4. An older one is replaced."
                    ),
                ),
                *wish_widgets(
                    ["none", *profiles.files()],
                    "Try none: no data needed. Or a profile that Calibrate wrote with activation_statistics on.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="Name of the file, for Load Quantized Model.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_name, name, format, rank, activations, calibration, layers, quality_guard) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(1)
        wish = QuantWish(
            format, rank, layers, BITS[activations], quality_guard, "" if calibration == "none" else calibration
        )
        written, text = quantise_file(model_name, name, wish, lambda done, total: bar.update_absolute(done, total))
        show(str(cls.hidden.unique_id or ""), text)
        return io.NodeOutput(written)
