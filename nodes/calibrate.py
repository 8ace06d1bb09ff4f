"""Calibrate: one full run of the user's own sampling gives the schedule for it, as a small profile file."""

from __future__ import annotations

import latent_preview
from comfy_api.latest import io, ui

from ..host.calibrate import calibrate, summary
from ..host.events import show
from ..host.profiles import save
from .schema import schema, widget


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamCalibrate",
            display_name="Calibrate",
            description=(
                "Samples once in full and solves which steps to compute for this model, sampler, steps and cfg. "
                "Writes a small profile; choose it in a Cache Loader and sample as usual. Connect the MODEL after a "
                "Taylor Predictor, so that the schedule is solved for it."
            ),
            search_aliases=["profile", "schedule", "cachequant", "tune", "cache"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="As you sample it, with LoRAs and a Taylor Predictor if you use one."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                widget(
                    io.Float.Input, "cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                    tooltip="As you sample. 1 for FLUX-like models, 5 to 8 for SD1.5 and SDXL.",
                ),
                io.Sampler.Input("sampler"),
                io.Sigmas.Input("sigmas", tooltip="As you sample; another step count later is met by its sigmas."),
                io.Latent.Input("latent_image", tooltip="An empty latent of your size; smaller ones calibrate faster."),
                widget(
                    io.Float.Input, "speed_up", default=2.5, min=1.0, max=10.0, step=0.1,
                    tooltip="One step in so many is computed. 2 is careful, 2.5 balanced, 3.5 fast.",
                ),
                widget(
                    io.Int.Input, "calibration_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Of the calibration run's noise. Any number does; try another if a result looks off.",
                ),
                widget(
                    io.String.Input, "name", default="my_profile",
                    tooltip="File name in models/slipstream_profiles. An older profile of this name is replaced.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="profile"),
                io.String.Output(display_name="summary"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, cfg, sampler, sigmas, latent_image, speed_up, calibration_seed, name
    ) -> io.NodeOutput:
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        profile = calibrate(
            model, positive, negative, cfg, sampler, sigmas, latent_image, calibration_seed, speed_up, callback
        )
        text = summary(profile)
        written = save(name, profile)
        show(str(cls.hidden.unique_id or ""), f"{written}\n{text}")
        return io.NodeOutput(written, text, ui=ui.PreviewText(text))
