"""Hybrid Model Switch: several models share the steps of one sampling run."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.switch.segments import A_FIRST, AUTO, MEMORY, ORDERS, STEPS, UNITS, SwitchConfig
from ..host.switch.switch import add_switch
from .schema import schema, widget


class HybridSwitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamHybridSwitch",
            display_name="Hybrid Model Switch",
            description=(
                "Two models share the steps of one sampling: a small one first for speed (T-Stitch), or a large one "
                "first for the prompt (Hybrid SD). Connect any sampler; chain the node for a third model."
            ),
            search_aliases=["t-stitch", "hybrid sd", "wan moe", "high noise", "low noise", "two models", "refiner"],
            inputs=[
                io.Model.Input(
                    "model_a", tooltip="The model that begins with the order a then b: the small one for speed.",
                ),
                io.Model.Input("model_b", tooltip="Any model of the same latent space, with its own LoRAs and caches."),
                widget(
                    io.Float.Input, "switch_at", default=0.4, min=0.0, max=1000.0, step=0.01,
                    tooltip=(
                        "Where the second model takes over. Try 0.4: after 40 % of the sampler's steps. With the unit "
                        "sigma, the noise level below which it does, such as 0.9."
                    ),
                ),
                widget(
                    io.Combo.Input, "unit", options=list(UNITS), default=STEPS,
                    tooltip=(
                        "What switch_at counts. Try fraction of steps; the named boundaries are Wan 2.2's and ignore "
                        "switch_at."
                    ),
                ),
                widget(
                    io.Combo.Input, "order", options=list(ORDERS), default=A_FIRST,
                    tooltip=(
                        "Which model begins. Try a then b; the sampler's schedule, prompt and cfg are for that one."
                    ),
                ),
                widget(
                    io.Combo.Input, "memory", options=list(MEMORY), default=AUTO, advanced=True,
                    tooltip=(
                        "Leave it at auto: a model stays on the GPU while there is room. swap: each leaves it when its "
                        "steps are done. keep both: both are loaded before the first step. Clones of one file are "
                        "always swapped."
                    ),
                ),
                widget(
                    io.Float.Input, "cfg_b", optional=True, default=0.0, min=-1.0, max=100.0, step=0.1,
                    tooltip="cfg while model_b works. 0 takes the sampler's; set 1 for a distilled model.",
                ),
                io.Conditioning.Input(
                    "positive_b", optional=True,
                    tooltip="A prompt for model_b, only where it needs another text encoder than model_a.",
                ),
                io.Conditioning.Input(
                    "negative_b", optional=True,
                    tooltip="The negative prompt for model_b, where positive_b is connected.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model that begins; the other takes over while it samples.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model_a, model_b, switch_at, unit, order, memory, cfg_b=0.0, positive_b=None, negative_b=None,
    ) -> io.NodeOutput:  # fmt: skip
        config = SwitchConfig(switch_at, unit, order, cfg_b, memory, str(cls.hidden.unique_id or ""))
        return io.NodeOutput(add_switch(model_a, model_b, config, positive_b, negative_b))
