"""Speed & Quality Report: one accelerated result beside a plain one of the same seed, in numbers and as a picture."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.report import make_report
from .schema import schema, widget


class Report(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamReport",
            display_name="Speed & Quality Report",
            description=(
                "Compares an accelerated latent with a plain one of the same seed: error, evaluations, seconds. "
                "Connect the two MODEL wires to see counts and times; give the plain one a Cache Loader set to Off."
            ),
            search_aliases=["psnr", "ssim", "benchmark", "compare"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("samples", tooltip="The accelerated result."),
                io.Latent.Input("reference", tooltip="The plain result: same seed, steps and prompt."),
                io.Model.Input("model", optional=True, tooltip="The MODEL the accelerated sampler used."),
                io.Model.Input(
                    "reference_model",
                    optional=True,
                    tooltip="The MODEL the plain sampler used, through a Cache Loader set to Off, so that it is timed.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes both for the picture, PSNR and SSIM."),
                widget(
                    io.String.Input,
                    "filename_prefix",
                    default="slipstream/report",
                    tooltip="Picture and JSON are written to the output folder under this name.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="card"),
                io.String.Output(display_name="json"),
            ],
        )

    @classmethod
    def execute(cls, samples, reference, filename_prefix, model=None, reference_model=None, vae=None) -> io.NodeOutput:
        card, text, saved = make_report(samples, reference, model, reference_model, vae, filename_prefix)
        shown = [ui.SavedResult(saved.filename, saved.subfolder, io.FolderType.output)]
        return io.NodeOutput(card, text, ui=ui.SavedImages(shown))
