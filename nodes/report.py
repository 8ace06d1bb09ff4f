"""Speed & Quality Report: one accelerated result beside a plain one of the same seed, in numbers and as a picture."""

from __future__ import annotations

import latent_preview
from comfy_api.latest import io, ui

from ..host.canvas.events import show
from ..host.report.report import FLOORS, Connected, make_report
from ..host.report.runs import Sampling
from .schema import schema, widget


class Report(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamReport",
            display_name="Speed & Quality Report",
            description=(
                "Compares an accelerated latent with the plain one of the same seed: PSNR, SSIM, drift, seconds and "
                "memory, beside fewer steps of the same cost and another seed. What is not connected it samples by "
                "itself, given the prompts, sampler, sigmas and latent."
            ),
            search_aliases=["psnr", "ssim", "benchmark", "compare", "quality", "speed", "vram"],
            is_output_node=True,
            inputs=[
                io.Latent.Input(
                    "samples", optional=True, tooltip="The accelerated result. Without it, it is sampled here."
                ),
                io.Latent.Input(
                    "reference",
                    optional=True,
                    tooltip="The plain result: same seed, steps and prompt. Without it, it is sampled here.",
                ),
                io.Model.Input("model", optional=True, tooltip="The MODEL the accelerated sampler used."),
                io.Model.Input(
                    "reference_model",
                    optional=True,
                    tooltip=(
                        "Only where plain means another MODEL than model without Slipstream's nodes. With a reference: "
                        "the MODEL of its sampler, through a Cache Loader set to Off, so that it is timed."
                    ),
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the results for the pictures, PSNR and SSIM."),
                widget(
                    io.String.Input,
                    "filename_prefix",
                    default="slipstream/report",
                    tooltip=(
                        "Picture and JSON are written to the output folder under this name, such as slipstream/report."
                    ),
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="This and the following as in your sampler, to sample here."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Not needed at cfg 1."),
                widget(
                    io.Float.Input, "cfg", optional=True, default=1.0, min=0.0, max=100.0, step=0.1,
                    tooltip="As you sample. 1 for FLUX-like models, 5 to 8 for SD1.5 and SDXL.",
                ),
                io.Sampler.Input("sampler", optional=True, tooltip="From KSamplerSelect, the one you sample with."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="From BasicScheduler: the steps you sample with."),
                io.Latent.Input("latent_image", optional=True, tooltip="The latent that your sampler starts from."),
                widget(
                    io.Int.Input, "sampler_seed", optional=True, default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                    tooltip="The seed of your sampler; the plain run has the same. Without samples any will do, try 1.",
                ),
                widget(
                    io.Combo.Input, "floors", optional=True, options=list(FLOORS), default=FLOORS[0],
                    tooltip=(
                        "What else is sampled, to compare. auto: fewer steps at the cost of the accelerated run, and "
                        "another seed in full, where the inputs above are connected. none is fastest."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="card", tooltip="The picture with everything on it, as it was written."),
                io.String.Output(display_name="json", tooltip="All numbers, as in the file beside the picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, filename_prefix, samples=None, reference=None, model=None, reference_model=None, vae=None, positive=None,
        negative=None, cfg=1.0, sampler=None, sigmas=None, latent_image=None, sampler_seed=0, floors=FLOORS[0],
    ) -> io.NodeOutput:  # fmt: skip
        node = str(cls.hidden.unique_id or "")

        def tell(sentence: str, steps: int):
            show(node, sentence)
            return latent_preview.prepare_callback(model or reference_model, steps)

        sampling = None
        if all(value is not None for value in (positive, sampler, sigmas, latent_image)):
            sampling = Sampling(positive, negative, cfg, sampler, sigmas, latent_image, sampler_seed, tell)
        given = Connected(samples, reference, model, reference_model, vae, sampling, floors)
        card, text, saved, sentence = make_report(given, filename_prefix)
        show(node, sentence)
        shown = ui.SavedImages([ui.SavedResult(saved.filename, saved.subfolder, io.FolderType.output)])
        return io.NodeOutput(card, text, ui={**shown.as_dict(), **ui.PreviewText(sentence).as_dict()})
