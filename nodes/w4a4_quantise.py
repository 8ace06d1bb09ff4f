"""W4A4 Quantize: the linear layers of any loaded model in 4 bit."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io

from ..host.canvas.events import show
from ..host.profiles import folder as profiles
from ..host.quantise.choose import CHOICES, FIRST_RUN, QuantWish, explained
from ..host.quantise.quantise import quantise, summary
from .schema import schema, widget

BITS = {"4 bit": 4, "8 bit": 8, "16 bit": 16}


def wish_widgets(calibrations: list[str], where: str) -> list:
    """The inputs that say how to quantise, of both nodes that do. where: what stands for calibration "none"."""
    return [
        widget(
            io.Combo.Input, "format", options=list(CHOICES), default=CHOICES[0],
            tooltip=(
                f"Try auto: rotated 4-bit groups with a low-rank branch, the best without data. {explained()}"
            ),
        ),
        widget(
            io.Int.Input, "rank", default=32, min=0, max=128, step=8,
            tooltip=(
                "Size of the 16-bit branch that takes what 4 bits cannot hold. 32 is usual, 16 smaller, 64 nearer, 0 "
                "none."
            ),
        ),
        widget(
            io.Combo.Input, "activations", options=list(BITS), default="4 bit",
            tooltip="Try 4 bit; 8 bit is nearer to the original with the same file. For auto and svdquant_w4a4.",
        ),
        widget(io.Combo.Input, "calibration", options=calibrations, default=calibrations[0], tooltip=where),
        widget(
            io.String.Input, "layers", default="", multiline=True, advanced=True,
            tooltip=(
                "Leave it empty: chosen for this model. Or lines such as 'img_mlp = w4a16' or 'single_blocks.0 = "
                "keep': a part of the layer names, =, and keep, w8a8, w4a16 or w4a4."
            ),
        ),
        widget(
            io.Float.Input, "quality_guard", default=0.0, min=0.0, max=100.0, step=0.5, advanced=True,
            tooltip=(
                "Signal to noise in dB that no layer may fall below; worse ones get 8 or 16 bit. Try 15. 0 leaves all "
                "in 4 bit. With calibration on the first run the whole picture is checked, too."
            ),
        ),
    ]  # fmt: skip


class W4A4Quantise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamW4A4Quantize",
            display_name="W4A4 Quantize",
            description=(
                "Turns the linear layers of any loaded model into 4 bit: about 0.28 of the memory of 16 bit. LoRA "
                "nodes may stand before or after it. Save the result with Save Quantized Model."
            ),
            search_aliases=["svdquant", "nunchaku", "int4", "4bit", "quantise", "convrot", "w4a4", "memory", "vram"],
            inputs=[
                io.Model.Input("model", tooltip="A 16-bit or fp8 model, with or without LoRAs."),
                *wish_widgets(
                    ["none", FIRST_RUN, *profiles.files()],
                    "Try none: no data needed. first run: measures your own prompt at a few steps when you first "
                    "sample, nearer to the original. Or a profile that Calibrate wrote with activation_statistics on.",
                ),
                widget(
                    io.Int.Input, "evaluations", optional=True, default=8, min=1, max=64, advanced=True,
                    tooltip="With calibration on the first run: steps that are measured, over the schedule. Try 8.",
                ),
                widget(
                    io.Boolean.Input, "gptq", optional=True, default=False, advanced=True,
                    tooltip=(
                        "With calibration on the first run: round every weight with regard to the others (GPTQ). Leave "
                        "it off first: every layer comes nearer, the picture not always; several times slower to make."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantised model.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, format: str) -> bool | str:
        if format is not None and format not in CHOICES:
            return f"W4A4 Quantize: there is no format '{format}'; choose one of {', '.join(CHOICES)}."
        return True

    @classmethod
    def execute(
        cls, model, format, rank, activations, calibration, layers, quality_guard, evaluations=8, gptq=False,
    ) -> io.NodeOutput:  # fmt: skip
        node, bar = str(cls.hidden.unique_id or ""), None

        def progress(done: int, total: int) -> None:
            nonlocal bar
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done, total)

        wish = QuantWish(
            format, rank, layers, BITS[activations], quality_guard, "" if calibration == "none" else calibration,
            gptq=gptq, evaluations=evaluations,
        )  # fmt: skip
        quantised = quantise(model, wish, progress, node_id=node)
        show(node, summary(quantised))
        return io.NodeOutput(quantised)
