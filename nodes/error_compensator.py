"""Error Compensator: take back part of what caching and quantisation leave."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.run.plan import MOST_ANCHORS, REFERENCES, TERMS, CompensatorConfig
from ..host.model import add_compensator
from ..host.profiles import folder as profiles
from .schema import schema, widget


class ErrorCompensator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamErrorCompensator",
            display_name="Error Compensator",
            description=(
                "Takes back part of the error of a quantised, cached or small model. A few evaluations are made with "
                "better weights too, and the difference corrects the steps after them; a profile adds what Calibrate "
                "found."
            ),
            search_aliases=["correction", "quality", "anchors", "ptqd", "tcec", "ertacache", "cachequant", "w4a4"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "After W4A4 Quantize or a Cache Loader, or behind the small model of a Hybrid Model Switch."
                    ),
                ),
                widget(
                    io.Combo.Input,
                    "profile",
                    options=profiles.names(),
                    default=profiles.AUTO,
                    tooltip=(
                        "A calibration made with correction_statistics on. Leave it at auto: the Cache Loader's, where "
                        "it has a correction. none: anchors alone, which need no file."
                    ),
                ),
                widget(
                    io.Int.Input,
                    "anchors",
                    default=-1,
                    min=-1,
                    max=MOST_ANCHORS,
                    tooltip=(
                        "Evaluations that are made twice, the second time by the reference. -1: one in ten steps where "
                        "the model is quantised, or the small one of a switch. More is nearer to the full model and "
                        "slower. 0: none."
                    ),
                ),
                widget(
                    io.Float.Input,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "How much of the correction is applied. Try 1, all of it; 0 does nothing at all, to compare."
                    ),
                ),
                widget(
                    io.Combo.Input,
                    "terms",
                    options=list(TERMS),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Leave it at auto: what Calibrate found to help, and nothing where nothing did. off: anchors "
                        "alone. The others demand that the profile was fitted with that method."
                    ),
                ),
                widget(
                    io.Combo.Input,
                    "reference",
                    optional=True,
                    options=list(REFERENCES),
                    default=REFERENCES[0],
                    advanced=True,
                    tooltip=(
                        "What is asked at anchors. Leave it at auto: the copy, or the large model. 8-bit copy: made at "
                        "the first one, kept in RAM, as good as the original weights. large model: of the Hybrid Model "
                        "Switch behind this small one. uncached: at steps a cache fills."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model; nothing happens until a sampler runs.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, terms: str) -> bool | str:
        if terms is not None and terms not in TERMS:
            return f"Error Compensator: there are no terms '{terms}'; choose one of {', '.join(TERMS)}."
        return True

    @classmethod
    def execute(cls, model, profile, anchors, strength, terms, reference=REFERENCES[0]) -> io.NodeOutput:
        node = str(cls.hidden.unique_id or "")
        config = CompensatorConfig(profile, anchors, strength, terms, node, reference)
        return io.NodeOutput(add_compensator(model, config))
