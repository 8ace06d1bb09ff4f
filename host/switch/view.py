"""A guider's stand-in for another model: the same guidance, with that model's weights, options and conditioning."""

from __future__ import annotations

import copy

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.hooks import EnumHookMode
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ...engine.coordinates import Coordinates, factor, level_in

# Of the options a sampler passes on these belong to the model it was given.
_ITS_OWN = ("transformer_options", "multigpu_clones", "multigpu_thread_pool")


class View:
    """One segment's model within a run. Made before the first step, loaded when its turn comes, closed with the run.

    guider: a shallow copy, so that every kind of guider keeps its own way of guiding; own: its conditioning or cfg
    differ from the sampler's.
    """

    def __init__(self, guider, patcher, segment, source: Coordinates, target: Coordinates):
        self.source, self.target = source, target
        self.entered = self.active = False
        conds = {key: [c.copy() for c in group] for key, group in guider.original_conds.items()}
        for key in ("positive", "negative"):
            given = getattr(segment, key)
            if given is not None:
                conds[key] = comfy.sampler_helpers.convert_cond(given)
        _own_controls(conds)
        if getattr(patcher, "is_dynamic", bool)() and any("hooks" in c for group in conds.values() for c in group):
            patcher = patcher.get_non_dynamic_delegate()
        self.patcher = patcher
        self.guider = copy.copy(guider)
        self.guider.model_patcher = patcher
        self.guider.conds = conds
        self.guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        if segment.cfg > 0:
            self.guider.cfg = segment.cfg
        self._hook_mode = patcher.hook_mode

    def around(self, run_on, args: list, kwargs: dict):
        """Run `run_on()` within the model's own OUTER_SAMPLE wrappers, which see the schedule in its own numbers."""
        guider = self.guider
        comfy.samplers.preprocess_conds_hooks(guider.conds)
        if comfy.samplers.get_total_hook_groups_in_conds(guider.conds) <= 1:
            self.patcher.hook_mode = EnumHookMode.MinVram
        comfy.sampler_helpers.prepare_model_patcher(self.patcher, guider.conds, guider.model_options)
        comfy.samplers.filter_registered_hooks_on_conds(guider.conds, guider.model_options)
        args, kwargs = list(args), dict(kwargs)
        sigmas = self._schedule(kwargs["sigmas"] if "sigmas" in kwargs else args[3])
        if "sigmas" in kwargs:
            kwargs["sigmas"] = sigmas
        else:
            args[3] = sigmas
        self._given = _arguments(args, kwargs)
        wrappers = comfy.patcher_extension.get_all_wrappers(WrappersMP.OUTER_SAMPLE, guider.model_options, True)
        executor = WrapperExecutor.new_class_executor(lambda *_, **__: run_on(), guider, wrappers)
        return executor.execute(*args, **kwargs)

    def _schedule(self, sigmas: Tensor) -> Tensor:
        # A flow's first level has no finite name elsewhere, and this model never gets to see it.
        return level_in(sigmas.float(), self.source, self.target).clamp(max=1e4)

    def enter(self) -> None:
        """Load the model, by the host's memory manager; at the first time read its conditioning."""
        guider, given = self.guider, self._given
        guider.inner_model, guider.conds, guider.loaded_models = comfy.sampler_helpers.prepare_sampling(
            self.patcher, given["noise"].shape, guider.conds, guider.model_options
        )
        self.active = True
        self.patcher.pre_run()
        if self.entered:
            return
        self.entered = True
        device = self.patcher.load_device
        comfy.samplers.cast_to_load_options(guider.model_options, device=device, dtype=self.patcher.model_dtype())
        noise, latent, mask = given["noise"].to(device), given["latent_image"], given["denoise_mask"]
        if latent is not None:
            latent = latent.to(device)
            if torch.count_nonzero(latent) > 0:  # the host leaves an empty latent as it is
                latent = guider.inner_model.process_latent_in(latent)
        if mask is not None:  # newer hosts have prepared it by now
            prepared = mask.shape == noise.shape
            mask = mask.to(device) if prepared else comfy.sampler_helpers.prepare_mask(mask, noise.shape, device)
        if hasattr(guider.inner_model, "latent_shapes"):
            guider.inner_model.latent_shapes = given["latent_shapes"]
        guider.conds = comfy.samplers.process_conds(
            guider.inner_model, noise, guider.conds, device, latent, mask, given["seed"],
            latent_shapes=given["latent_shapes"],
        )  # fmt: skip
        self._options = comfy.model_patcher.create_model_options_clone(guider.model_options)
        self._options.setdefault("transformer_options", {})["sample_sigmas"] = given["sigmas"].to(device)

    def leave(self) -> None:
        """Take hooks and the like off the weights; the model stays where it is."""
        if self.active:
            self.active = False
            self.patcher.cleanup()

    def predict(self, x: Tensor, sigma: Tensor, passed: dict, given: dict, seed) -> Tensor:
        """The guided prediction of the clean latent for x [B, ...] at sigma [B], both as the sampler counts noise.

        passed: the sampler's options; given: those of the model it runs on, to tell what the sampler itself added.
        """
        device = self.patcher.load_device
        level = level_in(sigma, self.source, self.target).to(device)
        scale = factor(sigma, self.source, self.target)
        if isinstance(scale, Tensor):
            x = x * scale.reshape(-1, *[1] * (x.ndim - 1))
        result = self.guider.outer_predict_noise(x.to(device), level, self._merged(passed, given), seed)
        return result.to(x.device)

    def _merged(self, passed: dict, given: dict) -> dict:
        """The model's own options and what the sampler has added to its model's, such as the hook of CFG++ samplers."""
        options = comfy.model_patcher.create_model_options_clone(self._options)
        for key, value in passed.items():
            before = given.get(key)
            if key in _ITS_OWN or value is before:
                continue
            if isinstance(value, list):
                added = [item for item in value if not any(item is old for old in before or ())]
                if added:
                    options[key] = [*options.get(key, ()), *added]
            elif before is None or not isinstance(value, dict):
                options[key] = value
        return options

    def close(self) -> None:
        """Undo what the run has done to the model; it may have failed anywhere."""
        guider = self.guider
        try:
            self.leave()
        finally:
            if self.entered:
                comfy.sampler_helpers.cleanup_models(guider.conds, guider.loaded_models)
            comfy.samplers.cast_to_load_options(guider.model_options, device=self.patcher.offload_device)
            self.patcher.hook_mode = self._hook_mode
            self.patcher.restore_hook_patches()
            self._options = self._given = None
            vars(guider).clear()


def _arguments(args: list, kwargs: dict) -> dict:
    """The arguments of `outer_sample` by name; hosts differ in how they pass the last ones."""
    order = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed")
    return {"denoise_mask": None, "seed": None, "latent_shapes": None, **dict(zip(order, args, strict=False)), **kwargs}


def _own_controls(conds: dict[str, list[dict]]) -> None:
    """Give these conds ControlNets of their own: one holds the range and hint of the model it was prepared with."""
    copies: dict[int, object] = {}

    def copied(control):
        if control is None:
            return None
        if id(control) not in copies:
            own = copies[id(control)] = control.copy()
            own.set_previous_controlnet(copied(control.previous_controlnet))
        return copies[id(control)]

    for group in conds.values():
        for cond in group:
            if "control" in cond:
                cond["control"] = copied(cond["control"])
