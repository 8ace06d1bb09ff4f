"""The bench of every test against the real host: small models, one way to sample, and what a run reported."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from slipstream.demo import emoji
from slipstream.engine.run.plan import CacheConfig, PredictorConfig
from slipstream.host.canvas import events
from slipstream.host.model import add_cache, add_predictor, plan_of

# Of a latent. The small models were trained at TRAINED; what asks how good a picture is samples it at that size.
SIZE, TRAINED = (8, 8), (16, 16)
UNET = dict(
    use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False, out_channels=4, in_channels=4,
    use_temporal_resblock=False, use_temporal_attention=False, adm_in_channels=None, model_channels=32,
    num_res_blocks=[1, 1], transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], channel_mult=[1, 2],
    transformer_depth_middle=1, use_linear_in_transformer=False, context_dim=64, num_heads=4,
)  # fmt: skip
SD3 = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=2, input_size=None, adm_in_channels=64, num_patches=1024,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
    pos_embed_max_size=32, qk_norm="rms", pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
)  # fmt: skip


def random_weights(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep activations finite; the host's own layers come uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) * 0.7 / math.sqrt(value[0].numel())
        else:
            norm = name.endswith("weight")
            state[name] = torch.randn(value.shape, generator=generator) * 0.05 + (1.0 if norm else 0.0)
    return state


def build(family, config: dict) -> comfy.model_patcher.ModelPatcher:
    """A tiny random model of one of the host's families."""
    description = family(config)
    description.set_inference_dtype(torch.float32, None)
    model = description.get_model({}, "", device=None)
    model.diffusion_model.load_state_dict(random_weights(model.diffusion_model))
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model.eval(), load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


class Lab:
    """One per test session; models are loaded once and handed out as clones."""

    def __init__(self):
        self._models = {}
        self._plain: dict[tuple, torch.Tensor] = {}

    def _model(self, name: str, make) -> comfy.model_patcher.ModelPatcher:
        if name not in self._models:
            self._models[name] = make()
        return self._models[name].clone()

    @property
    def flux(self):
        """The trained small Flux: flow matching, has the DIFFUSION_MODEL wrapper."""
        return self._model("flux", emoji.load_flux)

    @property
    def unet(self):
        """A tiny random SD1.5: eps prediction, variance exploding coordinates."""
        return self._model("unet", lambda: build(comfy.supported_models.SD15, UNET))

    @property
    def lumina(self):
        """A tiny random Lumina 2: the host has no replacement patch for its blocks, so their forwards are patched."""
        import families  # which takes its random weights from here

        return self._model("lumina", lambda: families.make("lumina2"))

    @property
    def trained_unet(self):
        """The trained small SD1.5-type U-Net."""
        return self._model("trained_unet", emoji.load_unet)

    @property
    def sd3(self):
        """A tiny random SD3: its forward never calls the DIFFUSION_MODEL wrappers."""
        return self._model("sd3", lambda: build(comfy.supported_models.SD3, SD3))

    def fast(self, model, *, predictor: str | None = "Taylor", order: int = -1, node: str = "1", **cache):
        """The model through a Cache Loader and, unless predictor is None, a Taylor Predictor."""
        if cache:
            cache = {"preset": "Custom", **cache}
        model = add_cache(model, CacheConfig(node_id=node, **cache))
        if predictor is None:
            return model
        return add_predictor(model, PredictorConfig(predictor, order, node + "p"))

    def every(self, model, n: int = 3, **options):
        """Skipping that does not depend on the data: every n-th step is computed."""
        return self.fast(model, method="interval", max_skip=n - 1, drift_budget=1.0, **options)

    def report(self, model) -> dict:
        return events.last_report(plan_of(model))

    def latent(self, model, batch: int = 1, size: tuple[int, int] = SIZE) -> torch.Tensor:
        return torch.zeros(batch, model.model.latent_format.latent_channels, *size)

    def sample(
        self, model, *, steps=16, cfg=1.0, sampler="euler", scheduler="simple", seed=1, batch=1, size=SIZE,
        prompts=None, positive=None, negative=None, latent=None, **options,
    ):  # fmt: skip
        """What KSampler does; returns the final latent."""
        prompts = prompts or emoji.PROMPTS[:batch]
        positive = positive or emoji.conditioning(prompts)
        negative = negative or emoji.conditioning([""] * len(prompts))
        latent = self.latent(model, len(prompts), size) if latent is None else latent
        noise = comfy.sample.prepare_noise(latent, seed)
        if options.get("disable_noise"):
            noise = torch.zeros_like(noise)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=seed,
                disable_pbar=True, **options,
            )  # fmt: skip

    def plain(self, name: str, *, positive: Callable | None = None, **options) -> torch.Tensor:
        """What the model of this name gives without a node, sampled once per process. positive: makes the conditioning.

        A test that asks what a run has left behind samples the model again itself, and compares with this.
        """
        key = (name, positive, *sorted(options.items()))
        if key not in self._plain:
            given = {"positive": positive()} if positive else {}
            self._plain[key] = self.sample(getattr(self, name), **given, **options)
        return self._plain[key].clone()

    @contextlib.contextmanager
    def calls(self, model):
        """Counts how often the network itself runs: a list of the batch size of each run."""
        network = model.model.diffusion_model
        first = next(m for m in network.modules() if not list(m.children()) and list(m.parameters()))
        runs: list[int] = []
        hook = first.register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[0]))
        try:
            yield runs
        finally:
            hook.remove()


def runs_below(model, paths: str | Sequence[str], action) -> int:
    """How often the parameterised leaves below these modules run during `action`."""
    network, counted = model.model.diffusion_model, []
    modules = [network.get_submodule(path) for path in ([paths] if isinstance(paths, str) else paths)]
    leaves = [leaf for module in modules for leaf in module.modules() if not list(leaf.children())]
    hooks = [
        leaf.register_forward_pre_hook(lambda *_: counted.append(1))
        for leaf in leaves if list(leaf.parameters(recurse=False))
    ]  # fmt: skip
    try:
        action()
    finally:
        for hook in hooks:
            hook.remove()
    return len(counted)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 difference of two latents."""
    return ((value - reference).norm() / reference.norm()).item()
