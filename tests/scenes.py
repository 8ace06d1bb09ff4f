"""Situations that several test files share: the inner sites, guiders and prompts of the hazards."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import comfy.controlnet
import comfy.model_patcher
import comfy.samplers
import node_helpers
import pytest
import torch
from sampling import SIZE
from slipstream.demo import emoji
from slipstream.host import model as patcher


@dataclass(frozen=True)
class Site:
    """One inner site on one tiny model; `inside` names modules that a filled evaluation must not run."""

    model: str
    site: str
    inside: str
    depth: int = -1

    def every(self, lab, n: int = 3, **options):
        """The model with every n-th step computed at this site."""
        return lab.every(getattr(lab, self.model), n, site=self.site, depth=self.depth, **options)

    def __str__(self) -> str:
        depth = f"-{self.depth}" if self.depth > 0 else ""
        return f"{self.model}-{self.site.replace(' ', '_')}{depth}"


SITES = [
    Site("flux", "block stack", "single_blocks"),
    Site("flux", "last block", "double_blocks"),
    Site("lumina", "block stack", "layers.1"),
    Site("sd3", "last block", "joint_blocks"),
    Site("unet", "U-Net depth", "middle_block"),
    Site("unet", "U-Net encoder", "input_blocks.1"),
]
DEEPER = Site("unet", "U-Net depth", "middle_block", depth=2)
every_site = pytest.mark.parametrize("site", SITES, ids=str)
# With the other depth in the place of the first: the two differ in one number, so a hazard is met at one of them.
every_site_deeper = pytest.mark.parametrize("site", [DEEPER if s.site == DEEPER.site else s for s in SITES], ids=str)

# The whole model's output too.
EVERYWHERE = [
    Site("flux", "model output", "double_blocks"),
    Site("unet", "model output", "middle_block"),
    *[s for s in SITES if s.depth < 0 and s.model != "sd3"],
]
everywhere = pytest.mark.parametrize("site", EVERYWHERE, ids=str)

# One sampler of each way of stepping; the host's others are the `long` version of the same test.
WAYS = ("euler", "heun", "dpmpp_2m", "dpmpp_2s_ancestral", "uni_pc", "res_multistep", "euler_cfg_pp")


def every_sampler(names):
    """A test for each of the samplers; of each way of stepping one by default, all with `--all`."""
    assert set(WAYS) <= set(names)
    marked = [pytest.param(name, marks=() if name in WAYS else pytest.mark.long) for name in names]
    return pytest.mark.parametrize("sampler", marked)


class GuiderThatTurnsCfgOn(comfy.samplers.CFGGuider):
    """cfg 1 at first, 3 below sigma 0.5: the negative appears in the middle of the run."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  the host's signature
        self.cfg = 1.0 if float(timestep[0]) > 0.5 else 3.0
        return super().predict_noise(x, timestep, model_options, seed)


def guided(lab, model, steps=16):
    guider = GuiderThatTurnsCfgOn(model)
    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    latent = lab.latent(model)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)


def scheduled():
    """One prompt until the middle, another from there on, with no gap."""
    first = node_helpers.conditioning_set_values(emoji.conditioning("cat face"), {"end_percent": 0.5})
    second = node_helpers.conditioning_set_values(
        emoji.conditioning("red heart"), {"start_percent": 0.5, "end_percent": 1.0}
    )
    return first + second


def twice(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
    """Euler that asks for every output twice, at the same latent and sigma."""
    differences = options["differences"]
    for i in range(len(sigmas) - 1):
        sigma = sigmas[i] * x.new_ones(x.shape[0])
        denoised, again = (model(x, sigma, **extra_args) for _ in range(2))
        differences.append(((denoised - again).abs().max() / denoised.abs().max()).item())
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def repeated(lab, model, **conds):
    """The relative differences of repeated evaluations, and the run's report."""
    differences: list[float] = []
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conds.get("positive", emoji.conditioning("hamburger")), emoji.conditioning(""))
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 12)
    latent = lab.latent(model)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.KSAMPLER(twice, {"differences": differences})
    with torch.inference_mode():
        guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=1)
    return differences, lab.report(model)


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet whose residuals are fixed random tensors of the shapes a recorded network asks for."""

    def __init__(self, shapes: dict[str, list[tuple[int, ...]]]):
        super().__init__()
        self.shapes = shapes
        self.calls = 0

    def get_control(self, x_noisy, t, cond, batched_number, *args):
        start, end = self.timestep_range
        if not start >= t[0] >= end:
            return None
        self.calls += 1
        generator = torch.Generator().manual_seed(7)
        rows = x_noisy.shape[0]
        return {
            part: [0.05 * torch.randn(1, *shape, generator=generator).expand(rows, *shape).clone() for shape in shapes]
            for part, shapes in self.shapes.items()
        }

    def copy(self):
        copied = Residuals(self.shapes)
        self.copy_to(copied)
        return copied

    def get_models(self):
        return []


def controlled(model, start=0.0, end=1.0):
    """Conditioning with a ControlNet for the tiny Flux (tokens) or the tiny U-Net (feature maps of its skips)."""
    height, width = SIZE
    if model == "flux":
        tokens = height * width // 4
        shapes = {"input": [(tokens, 256)] * 2, "output": [(tokens, 256)] * 3}
    else:
        full, half = (height, width), (height // 2, width // 2)
        maps = [(32, *full), (32, *full), (32, *half), (64, *half)]  # popped from the end, one per output block
        shapes = {"output": maps, "middle": [(64, *half)]}
    control = Residuals(shapes)
    control.set_cond_hint(torch.zeros(1, 3, 64, 64), 1.0, (start, end))
    return node_helpers.conditioning_set_values(
        emoji.conditioning("hamburger"), {"control": control, "control_apply_to_uncond": True}
    )


def predicting(model, prediction: str):
    """The model as one of another kind of prediction ("eps", "v_prediction", "x0", "edm"), by the host's own nodes."""
    from comfy_extras import nodes_model_advanced

    if prediction == "edm":
        node, values = nodes_model_advanced.ModelSamplingContinuousEDM, ("edm", 80.0, 0.002)
    else:
        node, values = nodes_model_advanced.ModelSamplingDiscrete, (prediction, False)
    patch = getattr(node, "execute", None) or node().patch
    out = patch(model, *values)
    return (out.result if hasattr(out, "result") else out)[0]


def skip_layer_guided(model, block: int):
    """A clone with what skip-layer guidance does: one more call per step, in which a block hands its input through."""

    def guidance(args):
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"], lambda a, extra: a, "dit", "double_block", block
        )
        (skipped,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return args["denoised"] + 0.5 * (args["cond_denoised"] - skipped)

    model = model.clone()
    model.set_model_sampler_post_cfg_function(guidance)
    return model


class Counted:
    """Counts how often each parameterised leaf below a module runs."""

    def __init__(self, model, path: str):
        module = model.model.diffusion_model.get_submodule(path)
        leaves = [m for m in module.modules() if not list(m.children()) and list(m.parameters(recurse=False))]
        self.runs = 0
        self._hooks = [leaf.register_forward_pre_hook(self._count) for leaf in leaves]

    def _count(self, module, args):
        self.runs += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def outliving(lab, model, monkeypatch) -> list:
    """The runs of one sampling that are still there after it, with the garbage collector off."""
    runs, opened = [], patcher.Run

    def kept(*args, **kwargs):
        run = opened(*args, **kwargs)
        runs.append(weakref.ref(run))
        return run

    with monkeypatch.context() as patch:
        patch.setattr(patcher, "Run", kept)
        gc.collect()
        gc.disable()
        try:
            lab.sample(model)
            assert len(runs) == 1
            return [run() for run in runs if run() is not None]
        finally:
            gc.enable()
