"""A profile outlives an update of ComfyUI: the two that the demo ships were measured on 0.3.75."""

from __future__ import annotations

import pytest
from slipstream.engine.calibration.profile import Profile
from slipstream.host.profiles import folder as profiles

from demo import emoji


@pytest.mark.parametrize(
    ("load", "name"),
    [(emoji.load_flux, "tiny_flux_emoji simple 28"), (emoji.load_unet, "tiny_sd15_emoji normal 28")],
    ids=["flux", "unet"],
)
def test_a_shipped_profile_is_of_the_same_model_on_every_host(load, name):
    """Flux's query_norm and key_norm call their parameter `scale` in one release and `weight` in later ones."""
    path = emoji.MODELS.parent / "profiles" / f"{name}.safetensors"
    assert profiles.fingerprint(load()) == Profile.load(path).model
