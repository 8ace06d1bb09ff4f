"""Quantises a loaded MODEL on the canvas: its linear layers become `W4A4Linear`s by object patches of one clone.

What was tried in 0.3.75 and 0.33.0, with the same outcome, and decides how this is built; `tests/host/test_quantise.py`
shows each:

- An object patch alone loses a LoRA and breaks the next load. A clone shares `patches_uuid` with its original, so the
  host, asked for the clone while the original is loaded, exchanges the modules without unpatching or loading anything,
  and later puts the 16-bit backup of a patched weight into the quantised module, and the patched weight stays in the
  base model. With a uuid of its own, which `quantise` gives the clone, the host restores every weight before it
  exchanges the modules. That is the whole fault and the whole remedy; no injection is needed.
- Stock `patch_weight_to_device` with `W4A4Linear.set_weight` gives a LoRA's product to 6e-7 on layers that are loaded
  completely. Under partial load it does nothing: modules without `comfy_cast_weights`, which ours must not have because
  only the host's own layers may lie in its streams, are left where they are, unpatched. So LoRAs are given by an
  ON_LOAD callback, which every kind of load ends with, to every quantised layer, from the list `patches`: plain LoRAs
  as the factors of their file, other adapters as factors of what they change, or, where that is not of low rank, by
  quantising the patched original anew. LoRA nodes before and after this one are the same list, and a load with another
  list takes off what was there.
- The backups that the host makes of our unchanged weights are dropped then: modules with a backup are skipped when
  memory is to be freed.
- The dynamic loader puts its backups back after the object patches of the next clone are in place, so it would write
  codes into the network's own layers (read in 0.33.0, not run: it needs a card): a dynamic model is replaced by the
  host's non-dynamic copy of it.
- A model that is to be measured at its first run gets only a wrapper (`first_run.py`); when it is sampled, the layers
  are placed on the patcher being sampled before the host loads it, which it does as with any other patcher.
- Weight hooks write floats into the parameter and cannot work; `W4A4Linear` refuses them in a sentence.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from comfy.patcher_extension import CallbacksMP

from ...engine.errors import SlipstreamError
from ...quant.calibration import ActivationStatistics
from ...quant.formats import FORMATS
from ...quant.linear import W4A4Linear
from ..canvas.events import show
from ..parts import QUANTISED
from ..profiles import folder as profiles
from . import nvfp4
from .choose import CHOICES, FIRST_RUN, QuantWish, planned
from .first_run import Pending
from .kernels import keep_choices, tell_after_a_run
from .loras import NODE, give_loras, quantised_modules
from .make import quantised_layers, without_data
from .placed import Quantised, place
from .teller import Progress, Teller

log = logging.getLogger("slipstream")

ACTIVATION = "activation/"  # of a layer's statistics in a profile
ACT_BITS = (4, 8, 16)

DEFAULT = QuantWish()


# What was quantised already: network -> wish -> Quantised; an entry goes with the last patcher that holds it.
_MADE: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakValueDictionary[tuple[QuantWish, float], Quantised]]
_MADE = weakref.WeakKeyDictionary()


def quantised(model) -> Quantised | None:
    """What `quantise` put on this ModelPatcher or one it was cloned from; None without, or before its first run."""
    found = model.get_attachment(QUANTISED)
    return found.made if isinstance(found, Pending) else found


def settled(model):
    """The model with its quantised layers in place: itself, or a clone where one of its clones had the first run.

    Raises SlipstreamError where that run is still to come.
    """
    waiting = model.get_attachment(QUANTISED)
    if not isinstance(waiting, Pending):
        return model
    if waiting.made is None:
        raise SlipstreamError(f"{NODE}: this model is quantised when it is first sampled; run a sampler with it first.")
    clone = model.clone()
    place(clone, waiting.made)
    return clone


def quantise(model, wish: QuantWish = DEFAULT, progress: Progress | None = None, node_id: str = ""):
    """A clone of the ModelPatcher whose linear layers are quantised; the model given is left as it was.

    progress: called with (layers done, layers in all) after every layer; node_id: the node that is told the same in
    words. LoRAs on the model, or added to the clone later, go on top of the quantised original weights. With FIRST_RUN
    the clone is quantised when it, or a clone of it, is first sampled, from what is measured there. The same model and
    wish again, while the result of the first time is in use, costs nothing. Raises SlipstreamError, and the host's own
    exception when the user cancels.
    """
    check_wish(wish)
    if model.get_attachment(QUANTISED) is not None:
        raise SlipstreamError(f"{NODE}: this model already went through a {NODE}; remove one of the two.")
    model = _static(model)
    keep_choices()
    made = _MADE.setdefault(model.model, weakref.WeakValueDictionary())
    seen = {} if wish.calibration == FIRST_RUN else ranges_of(model, wish.calibration)
    key = (wish, _content(seen))  # a profile of this name may be another one by now
    found = made.get(key)
    clone, teller = model.clone(), Teller(progress, node_id)
    if node_id:
        tell_after_a_run(clone, node_id, summary)
    if found is None and wish.calibration == FIRST_RUN:
        planned(model, wish)  # what cannot be quantised is said now
        clone.add_callback_with_key(CallbacksMP.ON_LOAD, QUANTISED, give_loras)
        Pending(made, key, teller, lambda patcher: _tell(patcher, node_id)).put_on(clone)
        return clone
    if found is None:
        how = f"smoothed by the ranges of {wish.calibration}" if seen else "made without data"
        found = quantised_layers(model, wish, (seen or without_data(model)).get, how, teller)
        made[key] = found
    place(clone, found)
    return clone


def _tell(model, node_id: str) -> None:
    text = summary(model)
    log.info("%s: %s", NODE, text.replace("\n", "; "))
    show(node_id, text)


def check_wish(wish: QuantWish) -> None:
    if wish.format == nvfp4.FORMAT and wish.format not in CHOICES:
        raise SlipstreamError(f"{NODE}: this ComfyUI does not know {nvfp4.FORMAT}; update it, or choose auto.")
    if wish.format == nvfp4.FORMAT and (wish.calibration or wish.guard_db or wish.gptq):
        raise SlipstreamError(
            f"{NODE}: {nvfp4.FORMAT} is made by ComfyUI itself, without calibration, gptq and quality_guard; switch "
            "them off."
        )
    if wish.format not in CHOICES:
        raise SlipstreamError(f"{NODE}: there is no format '{wish.format}'; choose one of {', '.join(CHOICES)}.")
    if wish.act_bits not in ACT_BITS:
        raise SlipstreamError(f"{NODE}: activations of {wish.act_bits} bit are not known; choose 4, 8 or 16.")
    if not 0 <= wish.rank <= 128:
        raise SlipstreamError(f"{NODE}: rank is {wish.rank}, but it must be between 0 (no branch) and 128; try 32.")
    if not 0 <= wish.guard_db <= 100:
        raise SlipstreamError(
            f"{NODE}: quality_guard is {wish.guard_db}, but it must be between 0 (off) and 100; try 15."
        )
    if not 1 <= wish.evaluations <= 1000:
        raise SlipstreamError(f"{NODE}: evaluations is {wish.evaluations}, but it must be between 1 and 1000; try 8.")
    if wish.gptq and wish.calibration != FIRST_RUN:
        raise SlipstreamError(
            f"{NODE}: gptq needs inputs of the layers; choose '{FIRST_RUN}' as calibration, or switch gptq off."
        )


def _static(model):
    """The model itself, or the host's non-dynamic copy of it, with the patches of this one."""
    if not getattr(model, "is_dynamic", bool)():
        return model
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError:
        raise SlipstreamError(
            f"{NODE}: this model's loader gives no copy for a static load; load it with one of the host's own loaders, "
            "or start the host with --disable-dynamic-vram."
        ) from None


def ranges_of(model, name: str) -> dict[str, ActivationStatistics]:
    """Activation statistics by layer from a profile; empty without one. Raises SlipstreamError."""
    if not name:
        return {}
    profile = profiles.load(name, NODE)
    layers = {key.split("/")[1] for key in profile.extras if key.startswith(ACTIVATION)}
    if not layers:
        raise SlipstreamError(
            f"{NODE}: the profile {name} holds no activation statistics; calibrate again with activation_statistics on."
        )
    if profile.model and profile.model != profiles.fingerprint(model):
        log.warning("%s: the profile %s was measured on another model; calibrate again for the best result", NODE, name)
    tables = profile.extras
    return {
        layer: ActivationStatistics(tables[f"{ACTIVATION}{layer}/absmax"], tables[f"{ACTIVATION}{layer}/square"])
        for layer in sorted(layers)
    }


def _content(seen: Mapping[str, ActivationStatistics]) -> float:
    """A number that two sets of statistics hardly share."""
    return float(sum(s.square.double().sum() + s.absmax.double().sum() for s in seen.values()))


def summary(model) -> str:
    """What became of the model's layers, in a few short lines for its node."""
    waiting, found, size = model.get_attachment(QUANTISED), quantised(model), model.model_size()
    if found is not None:
        before = size if waiting is not found else size + found.saved
        return _words(found, before - found.saved, before)
    if isinstance(waiting, Pending):
        steps = waiting.wish.evaluations
        return f"waits for the first run: {steps} of its steps are measured, then it is quantised"
    layers = [layer for _, layer in quantised_modules(model)]
    return f"{_counted(layers)}; {_bytes(size)}" if layers else "not quantised"


def _words(found: Quantised, size: int, before: int) -> str:
    layers, kept = found.layers, len(found.choices) - len(found.layers)
    rest = f", {kept} left as they were" if kept else ""
    ours = [layer for layer in layers.values() if isinstance(layer, W4A4Linear)]
    made = [layer.layer(lora=False) for layer in ours]
    ranks = {layer.rank for layer in made if layer.rank}
    branch = f"a 16-bit branch of rank {max(ranks)}" if ranks else "no branch"
    branch = f"inputs rotated, {branch}" if any(layer.rotation for layer in made) else branch
    branch = branch[0].upper() + branch[1:]
    lines = [
        f"{_counted(list(layers.values()))}{rest}; {_bytes(size)} instead of {_bytes(before)}",
        f"{branch}, {found.how}" if found.how else branch,
    ]
    raised = [
        name for name in found.sqnr if name not in layers or FORMATS[layers[name].format].weight_bits > 4
    ]  # fmt: skip
    for name in sorted(raised, key=found.sqnr.get)[:3]:
        lines.append(f"guard: {name}: {found.choices[name].why}")
    if len(raised) > 3:
        lines.append(f"guard: and {len(raised) - 3} layers more")
    if found.check is not None:
        check = found.check
        was = f", {check.before:.1f} dB before {len(check.raised)} layers got 8 bit" if check.raised else ""
        lines.append(f"check of a short run: {check.after:.1f} dB{was}")
    return "\n".join(f"{line}." for line in lines)


def _counted(layers: Sequence[torch.nn.Module]) -> str:
    ours = [FORMATS[layer.format] for layer in layers if isinstance(layer, W4A4Linear)]
    bits = Counter(row.weight_bits for row in ours)
    wide = sum(row.act_bits == 16 for row in ours)
    if len(ours) < len(layers):
        eight = f", {bits[8]} in 8 bit" if bits[8] else ""
        return f"{len(layers) - len(ours)} layers in {nvfp4.FORMAT}{eight}"
    four = f"{bits[4]} layers in 4 bit" + (f" ({wide} with 16-bit activations)" if wide else "")
    return four + (f", {bits[8]} in 8 bit" if bits[8] else "")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
