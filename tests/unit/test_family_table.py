"""The table of families by itself: who gets which row, and that what a row names is there."""

from __future__ import annotations

from types import SimpleNamespace

import families
import pytest
from slipstream.engine.families import ROWS, UNKNOWN, architecture_of, row_of
from slipstream.host.quantise.modulation import READERS
from slipstream.quant import policy


def network_class(*names: str) -> type:
    """A class of the first of these names, which derives from one of the second, and so on."""
    kind = object
    for name in reversed(names):
        module, _, short = name.rpartition(".")
        kind = type(short, (kind,), {"__module__": module})
    return kind


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (["comfy.ldm.flux.model.Flux"], "Flux"),
        (["comfy.ldm.chroma_radiance.model.ChromaRadiance", "comfy.ldm.chroma.model.Chroma"], "Chroma"),
        (["comfy.ldm.modules.diffusionmodules.mmdit.MMDiT"], "SD3"),
        (["comfy.ldm.modules.diffusionmodules.mmdit.Wrapped", "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT"], "SD3"),
        (["comfy.ldm.aura.mmdit.MMDiT"], "AuraFlow"),
        (["comfy.ldm.wan.model.VaceWanModel", "comfy.ldm.wan.model.WanModel", "torch.nn.Module"], "Wan"),
        (["a.pack.Flux", "comfy.ldm.wan.model.WanModel"], "Flux"),
        (["comfy.ldm.flux.model.NotFlux"], "unknown model"),
        (["comfy.ldm.another.mmdit.MMDiT"], "unknown model"),
    ],
)  # fmt: skip
def test_a_row_is_found_by_class_names_nearest_first(names, row):
    kind = network_class(*names)
    assert row_of(kind).name == row
    assert architecture_of(kind()) is row_of(kind)
    assert architecture_of(SimpleNamespace(_orig_mod=kind())) is row_of(kind)


def test_no_two_rows_share_a_name_or_a_network():
    names, networks = [row.name for row in ROWS], [network for row in ROWS for network in row.networks]
    assert len(set(names)) == len(names) and len(set(networks)) == len(networks)
    for row in ROWS:
        assert all(row_of(network_class(f"comfy.ldm.{network}")) is row for network in row.networks)


def test_what_a_row_names_is_there_and_nothing_is_left_unnamed():
    assert {row.policy for row in ROWS} == {rules.name for rules in policy.ROWS}
    assert {row.modulation for row in ROWS} - {""} == set(READERS)
    assert policy.policy_for(UNKNOWN.policy) is policy.DEFAULT and UNKNOWN.modulation not in READERS
    assert all(bool(row.stacks) != row.unet for row in ROWS)
    assert {path for row in ROWS for path in row.text_widths} <= set(UNKNOWN.text_widths)


def test_every_row_has_a_tiny_model():
    assert set(families.OF_ROW) == {row.name for row in ROWS}
    assert set(families.OF_ROW.values()) <= set(families.FAMILIES)
