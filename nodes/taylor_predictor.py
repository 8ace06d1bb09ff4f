"""Taylor Predictor: forecast the outputs that the cache skips instead of repeating the last one."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.forecast.predictors import KINDS
from ..engine.run.plan import PredictorConfig
from ..host.model import add_predictor
from .schema import schema, widget


class TaylorPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SlipstreamTaylorPredictor",
            display_name="Taylor Predictor",
            description=(
                "Forecasts skipped outputs from the last computed ones, so the cache can skip more at the same error. "
                "Use it with a Cache Loader, before or after it; alone it brings a Balanced cache along."
            ),
            search_aliases=["taylorseer", "forecast", "predict", "speed", "faster"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="From a Cache Loader, or before one; alone it brings a Balanced cache along."
                ),
                widget(
                    io.Combo.Input,
                    "kind",
                    options=list(KINDS),
                    default="Taylor",
                    tooltip=(
                        "Try Taylor: exact extrapolation on the real step spacing. TaylorSeer: the published "
                        "derivative ladder. Reuse: repeat the last output, to see what forecasting adds. Residual "
                        "reuse: repeat what the model added to its input. Hermite: damped, for rough outputs. "
                        "Adams-Bashforth: aims at the exact solution, with euler. Chebyshev: a smooth fit. Per token "
                        "(TAP): every patch chooses its own."
                    ),
                ),
                widget(
                    io.Int.Input,
                    "order",
                    default=-1,
                    min=-1,
                    max=3,
                    tooltip=(
                        "How many earlier changes a forecast follows. -1 chooses for you: 1, and 0 for samplers that "
                        "add noise. 2 pays only where few steps are skipped in a row. It drops by itself where a "
                        "forecast would be unstable."
                    ),
                ),
                widget(
                    io.Float.Input,
                    "scale",
                    optional=True,
                    default=0.5,
                    min=0.1,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Hermite only: how much of the slope it trusts. 0.5 halves it, as published; 0.71 is undamped."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model; nothing happens until a sampler runs.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, kind: str) -> bool | str:
        if kind is not None and kind not in list(KINDS):
            return f"Taylor Predictor: there is no kind '{kind}'; choose one of {', '.join(KINDS)}."
        return True

    @classmethod
    def execute(cls, model, kind, order, scale=0.5) -> io.NodeOutput:
        return io.NodeOutput(add_predictor(model, PredictorConfig(kind, order, str(cls.hidden.unique_id or ""), scale)))
