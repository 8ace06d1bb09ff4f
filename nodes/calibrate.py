"""Calibrate: full runs of the user's own sampling give the schedule for it, as a small profile file."""

from __future__ import annotations

import latent_preview
import torch
from comfy_api.latest import io, ui

from ..host.calibrate.calibrate import calibrate, summary
from ..host.calibrate.job import CHOICES, GOALS, Job, Wish
from ..host.canvas.colours import as_image
from ..host.canvas.events import show
from ..host.profiles.folder import save
from ..host.report.frontier import draw
from .schema import schema, widget


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamCalibrate",
            display_name="Calibrate",
            description=(
                "Samples in full and solves which steps to compute for this model, sampler, steps and cfg. "
                "Writes a small profile; choose it in a Cache Loader and sample as usual. Connect the MODEL after a "
                "Taylor Predictor, so that the schedule is solved for it."
            ),
            search_aliases=["profile", "schedule", "cachequant", "ertacache", "magcache", "ecad", "tune", "cache"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="As you sample it, with LoRAs and a Taylor Predictor if you use one."),
                io.Conditioning.Input(
                    "positive", tooltip="A prompt like those you will sample; up to 3 more go into positive_2 to 4.",
                ),
                io.Conditioning.Input("negative", tooltip="As you sample; it counts only where cfg is not 1."),
                widget(
                    io.Float.Input, "cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                    tooltip="As you sample: 1 for FLUX-like models, 5 to 8 for SD1.5 and SDXL.",
                ),
                io.Sampler.Input("sampler", tooltip="As you sample. Try euler; samplers that add noise gain little."),
                io.Sigmas.Input(
                    "sigmas", tooltip="As you sample, 20 to 50 steps; another step count later is met by its sigmas.",
                ),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent of your size. Half of it each way calibrates faster.",
                ),
                widget(
                    io.Float.Input, "speed_up", default=2.5, min=1.0, max=10.0, step=0.1,
                    tooltip="One step in so many is computed. Try 2.5; 2 is careful, 3.5 fast.",
                ),
                widget(
                    io.Int.Input, "calibration_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                    tooltip=(
                        "Of the first full run's noise; each further run takes the next. Any number does, such as 0."
                    ),
                ),
                widget(
                    io.String.Input, "name", default="my_profile",
                    tooltip=(
                        "File name in models/slipstream_profiles, such as my_flux_28. An older profile of this name is "
                        "replaced."
                    ),
                ),
                widget(
                    io.Combo.Input, "goal", optional=True, options=list(GOALS), default=GOALS[0],
                    tooltip="Try speed-up: as many steps as speed_up says. max drift: as few as keep within max_drift.",
                ),
                widget(
                    io.Float.Input, "max_drift", optional=True, default=0.05, min=0.001, max=1.0, step=0.005,
                    tooltip=(
                        "With the goal max drift: how far a skipped output may be off on average. 0.05 is careful, 0.1 "
                        "fast."
                    ),
                ),
                widget(
                    io.Int.Input, "runs", optional=True, default=1, min=1, max=16,
                    tooltip="Full runs, each with its own seed, over the prompts in turn. 1 is quick, 4 is safer.",
                ),
                widget(
                    io.Int.Input, "check", optional=True, default=4, min=0, max=8, advanced=True,
                    tooltip=(
                        "So many of the best schedules are really sampled, and the nearest to the full run wins. Each "
                        "costs one accelerated run. Try 4; 0 trusts the expected error."
                    ),
                ),
                widget(
                    io.Combo.Input, "schedule", optional=True, options=list(CHOICES), default=CHOICES[0], advanced=True,
                    tooltip=(
                        "Leave it at best: all are solved and the best is taken. The others are single methods, for "
                        "comparison. ECAD searches which blocks to compute, by many samplings; it needs pymoo and two "
                        "runs. With the step coefficient, sample with the sigmas that this node gives."
                    ),
                ),
                io.Conditioning.Input("positive_2", optional=True, tooltip="A second prompt; set runs to 2 or more."),
                io.Conditioning.Input("positive_3", optional=True, tooltip="A third prompt; set runs to 3 or more."),
                io.Conditioning.Input("positive_4", optional=True, tooltip="A fourth prompt; set runs to 4 or more."),
                widget(
                    io.Boolean.Input, "correction_statistics", optional=True, default=False, advanced=True,
                    tooltip=(
                        "Turn it on to fit an Error Compensator too: accelerated runs are led through again and what "
                        "helps is kept. About six more runs for each of runs, which should be 3 or more."
                    ),
                ),
                widget(
                    io.Boolean.Input, "activation_statistics", optional=True, default=False, advanced=True,
                    tooltip=(
                        "Turn it on to keep the ranges of every layer's input too, for W4A4 Quantize. A few MB more."
                    ),
                ),
                widget(
                    io.Int.Input, "ecad_runs", optional=True, default=200, min=20, max=20_000, advanced=True,
                    tooltip="With the schedule ECAD: samplings that its search may make. 60 is a try, 400 thorough.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="profile", tooltip="The file that was written, for Cache Loader."),
                io.String.Output(display_name="summary", tooltip="What the node shows, as text."),
                io.Image.Output(display_name="frontier", tooltip="Expected error for every number of computed steps."),
                io.Sigmas.Output(display_name="sigmas", tooltip="As given, but for ERTACache's step coefficient."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, cfg, sampler, sigmas, latent_image, speed_up, calibration_seed, name,
        goal=GOALS[0], max_drift=0.05, runs=1, check=4, schedule=CHOICES[0], positive_2=None, positive_3=None,
        positive_4=None, correction_statistics=False, activation_statistics=False, ecad_runs=200,
    ) -> io.NodeOutput:  # fmt: skip
        prompts = [p for p in (positive, positive_2, positive_3, positive_4) if p is not None]
        each = tuple((prompts[i % len(prompts)], calibration_seed + i) for i in range(runs))
        job = Job(model, each, negative, cfg, sampler, sigmas, latent_image)
        wish = Wish(goal, speed_up, max_drift, schedule, check, correction_statistics, activation_statistics, ecad_runs)
        node = str(cls.hidden.unique_id or "")

        def tell(sentence: str, steps: int):
            show(node, sentence)
            return latent_preview.prepare_callback(model, steps)

        profile = calibrate(job, wish, tell)
        text, picture = summary(profile), as_image(draw(profile))
        written = save(name, profile)
        show(node, f"{written}\n{text}")
        shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(written, text, picture, torch.tensor(profile.sigmas), ui=shown)
