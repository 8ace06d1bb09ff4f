"""Every row of the table of families against a tiny network of its class: what the row names is there, and fits.

A row whose class the running host does not have is skipped by name: 0.3.75 checks 20 of the rows, 0.33.0 all.
"""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import families
import pytest
import torch
from comfyui_version import __version__ as host_version
from sampling import runs_below
from scenes import twice
from slipstream.engine.families import ROWS, Architecture, architecture_of
from slipstream.host.quantise import modulation
from slipstream.host.switch.bridge import text_width
from slipstream.quant.policy import DEFAULT, plan, policy_for

STEPS = 6  # one fill: in so few steps at most one evaluation is skipped

# Rows of families that came to the host after 0.3.75.
NEWER = {
    "ACE-Step 1.5", "Boogu", "CogVideoX", "Ernie Image", "Ideogram 4", "JoyImage", "Kandinsky 5", "Krea 2", "Lens",
    "MageFlow", "MiniMax H3", "PixelDiT",
}  # fmt: skip

# Where an exact fill differs in the last bit: the tokens of the blocks have another layout in memory than a forecast's,
# and the layer after them sums in another order.
ANOTHER_LAYOUT = {"ACE-Step 1.5"}


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def built(request):
    """(row, the name of its tiny model, that model)."""
    name = families.OF_ROW[request.param.name]
    if name not in families.available():
        pytest.skip(f"this host has no {families.FAMILIES[name].supported}, the class of {request.param.name}")
    return request.param, name, families.make(name)


def linears(network) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape) for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }  # fmt: skip


def paths_of(row: Architecture) -> list[str]:
    """Of every block stack; of a U-Net those parts that hold its transformers."""
    return ["input_blocks", "middle_block", "output_blocks"] if row.unet else [stack.path for stack in row.stacks]


def test_what_a_row_names_is_in_the_network(built):
    row, name, model = built
    network = model.model.diffusion_model
    assert architecture_of(network) is row
    for path in paths_of(row):
        assert list(network.get_submodule(path).children()), path
    if row.modulated is not None:
        assert isinstance(network.get_submodule(row.modulated), torch.nn.Linear)
        first = f"{row.stacks[0].path}.{next(iter(network.get_submodule(row.stacks[0].path)._modules))}."
        assert row.modulated.startswith(first)
    width = families.FAMILIES[name].context[1] if row.text_widths else None
    assert text_width(model) == width


def test_the_rules_of_a_row_take_layers_of_every_stack(built):
    row, _, model = built
    network, rules = model.model.diffusion_model, policy_for(row.policy)
    assert rules is not DEFAULT
    chosen = plan(linears(network), rules, limits=None)
    for path in paths_of(row):
        treatments = {choice.treatment for name, choice in chosen.items() if name.startswith(f"{path}.")}
        assert "w4a4" in treatments, path


def test_the_reader_of_a_row_reads_its_network(built):
    row, _, model = built
    network = model.model.diffusion_model
    found = modulation.spans(network, row.modulation)
    assert bool(found) == bool(row.modulation)
    shapes = linears(network)
    assert all(shapes[name][1] == len(span) for name, span in found.items())
    for path in paths_of(row) if found else ():
        assert any(name.startswith(f"{path}.") for name in found), path


def repeated(model, name: str) -> list[float]:
    """Relative differences of the second evaluation at the same latent and time from the first, step by step."""
    differences: list[float] = []
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(families.conditioning(name, 11), families.conditioning(name, 12))
    guider.set_cfg(1.0)
    latent = families.latent(name)
    sampler = comfy.samplers.KSAMPLER(twice, {"differences": differences})
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    with torch.inference_mode():
        guider.sample(comfy.sample.prepare_noise(latent, 1), latent, sampler, sigmas, disable_pbar=True, seed=1)
    return differences


def test_an_exact_forecast_in_the_place_of_the_blocks_changes_nothing(lab, built):
    """Filled with what the blocks returned a moment ago at the same input, the output is the same to the last bit, and
    no block runs."""
    row, name, base = built
    model = lab.every(base, 2, site="U-Net depth" if row.unet else "last block")
    blocks = ["middle_block"] if row.unet else paths_of(row)
    full = runs_below(base, blocks, lambda: repeated(base, name))
    differences: list[float] = []
    some = runs_below(model, blocks, lambda: differences.extend(repeated(model, name)))
    report = lab.report(model)
    assert report["filled"] == 1, report["note"]
    assert some * 2 * STEPS == full * (2 * STEPS - 1)
    fills = [d for d, e in zip(differences, report["trace"][1::2], strict=True) if e["action"] != "computed"]
    assert len(fills) == 1 and fills[0] <= (5e-7 if row.name in ANOTHER_LAYOUT else 0.0), differences


def test_only_rows_that_are_newer_than_the_host_are_skipped():
    absent = {row for row, name in families.OF_ROW.items() if name not in families.available()}
    newest = tuple(map(int, host_version.split("."))) >= (0, 33, 0)
    assert absent <= (set() if newest else NEWER)
