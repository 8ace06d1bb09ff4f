"""Cache Loader: skip model evaluations that barely change the picture, within a drift budget."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.run.plan import DEVICES, METHODS, PRESETS, SITES, CacheConfig
from ..host.model import add_cache
from ..host.profiles import folder as profiles
from .schema import schema, widget


class CacheLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = PRESETS["Balanced"]
        return schema(
            node_id="SlipstreamCacheLoader",
            display_name="Cache Loader",
            description=(
                "Skips the model at steps where its output can be reused, and shows how far that was off. "
                "Place it after the model loader and LoRAs. Add a Taylor Predictor to skip more at the same error."
            ),
            search_aliases=["teacache", "easycache", "magcache", "deepcache", "speed", "faster", "cache"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="From the model loader, after LoRAs and W4A4 Quantize if you use them."
                ),
                widget(
                    io.Combo.Input,
                    "preset",
                    options=list(PRESETS),
                    default="Balanced",
                    tooltip=(
                        "Try Balanced. Safe skips less and stays nearer, Fast skips more. Custom uses the values "
                        "below; the other presets set them for you. Off skips nothing, but counts and times the run."
                    ),
                ),
                widget(
                    io.Combo.Input,
                    "method",
                    options=list(METHODS),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "How the steps to skip are chosen (Custom only). Leave it at auto: a budget for the error that "
                        "is measured while sampling. interval: every (max_skip + 1)-th step is computed. accumulated "
                        "change: from how far the latent has moved. power grid: DeepCache's. key steps: Faster "
                        "Diffusion's. first-block gate: first-block cache. confidence gate: CG-Taylor. modulated "
                        "change: TeaCache. magnitude: MagCache."
                    ),
                ),
                widget(
                    io.Float.Input,
                    "drift_budget",
                    default=default["drift_budget"],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "How far one skipped output may be off, relative to its size (Custom only). "
                        "0.05 is careful, 0.10 balanced, 0.20 fast, 0 skips nothing."
                    ),
                ),
                widget(
                    io.Float.Input,
                    "start_percent",
                    default=default["start_percent"],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Skipping starts here, as a part of the sampling (Custom only). 0 is from the start, 0.15 for "
                        "video."
                    ),
                ),
                widget(
                    io.Float.Input,
                    "end_percent",
                    default=default["end_percent"],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Skipping ends here (Custom only). 1 is the end, 0.9 keeps detail; the last step is always "
                        "computed."
                    ),
                ),
                widget(
                    io.Int.Input,
                    "max_skip",
                    default=default["max_skip"],
                    min=0,
                    max=20,
                    advanced=True,
                    tooltip=(
                        "At most so many steps are skipped in a row (Custom only). 3 is careful, 6 is fast; 0 takes "
                        "the number of the method's authors."
                    ),
                ),
                widget(
                    io.Combo.Input,
                    "site",
                    optional=True,
                    options=list(SITES),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "What is cached (Custom only). Leave it at auto: what the method needs, else the model output. "
                        "block stack and last block: transformers; the first blocks still run. U-Net depth (DeepCache) "
                        "and U-Net encoder (Faster Diffusion): SD1.5, SD2, SDXL."
                    ),
                ),
                widget(
                    io.Int.Input,
                    "depth",
                    optional=True,
                    default=-1,
                    min=-1,
                    max=99,
                    advanced=True,
                    tooltip=(
                        "How much of the network still runs at a skipped step (Custom only): first blocks of a "
                        "transformer, or levels of a U-Net. -1 chooses; 0 is fastest, 3 keeps more detail."
                    ),
                ),
                widget(
                    io.Float.Input,
                    "threshold",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "For the gates, accumulated change and magnitude (Custom only); lower skips less. 0 takes the "
                        "authors' value for this model; try 0.08 with first-block gate."
                    ),
                ),
                widget(
                    io.Boolean.Input,
                    "prior_noise",
                    optional=True,
                    default=False,
                    advanced=True,
                    tooltip=(
                        "With U-Net encoder (Custom only). Leave it off to stay nearest to the full run; on adds 0.3 % "
                        "of the first noise in the later half of the steps, as Faster Diffusion does to keep texture."
                    ),
                ),
                widget(
                    io.Combo.Input,
                    "cache_device",
                    optional=True,
                    options=list(DEVICES),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Where cached tensors lie. Leave it at auto: on the GPU while they fit the budget, then in "
                        "RAM. int8 halves them at a small error. Only the block sites need more than a few megabytes."
                    ),
                ),
                widget(
                    io.Int.Input,
                    "memory_budget_mb",
                    optional=True,
                    default=0,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip=(
                        "Megabytes the cache may take on the GPU. 0: a quarter of what is free. Try 1000 for video "
                        "with the block stack."
                    ),
                ),
                widget(
                    io.Combo.Input,
                    "profile",
                    optional=True,
                    options=profiles.names(),
                    default=profiles.AUTO,
                    tooltip=(
                        "A file that Calibrate wrote: its steps are computed, in the place of preset and method "
                        "(preset Off still computes all). Leave it at auto: one that fits this model, if there is one; "
                        "Safe and Fast take the points of its frontier with half and twice the error. none: the preset "
                        "decides."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model; nothing happens until a sampler runs.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, preset: str) -> bool | str:
        # One argument only: the host repeats the sentence once for every argument named here.
        if preset is not None and preset not in list(PRESETS):
            return f"Cache Loader: there is no preset '{preset}'; choose one of {', '.join(PRESETS)}."
        return True

    @classmethod
    def execute(
        cls, model, preset, method, drift_budget, start_percent, end_percent, max_skip, site="auto", depth=-1,
        threshold=0.0, prior_noise=False, cache_device="auto", memory_budget_mb=0, profile=profiles.NONE,
    ) -> io.NodeOutput:  # fmt: skip
        config = CacheConfig(
            preset, method, drift_budget, start_percent, end_percent, max_skip, str(cls.hidden.unique_id or ""), site,
            depth, threshold, prior_noise, cache_device, memory_budget_mb,
            "" if profile == profiles.NONE else profile,
        )  # fmt: skip
        return io.NodeOutput(add_cache(model, config))
