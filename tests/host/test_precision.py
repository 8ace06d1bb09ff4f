"""What a strip says that the model computes with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from slipstream.engine.run.plan import CacheConfig
from slipstream.host.canvas import events
from slipstream.host.model import add_cache, plan_of
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.precision import precision_of
from slipstream.host.quantise.quantise import quantise

NETWORK = torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("stored", "cast", "words"),
    [
        (torch.bfloat16, None, "bf16"),
        (torch.float16, torch.float16, "fp16"),
        (torch.float8_e4m3fn, torch.bfloat16, "fp8 weights in bf16"),
    ],
)
def test_stored_and_computed_dtype_are_told_apart(stored, cast, words):
    model = SimpleNamespace(get_dtype=lambda: stored, manual_cast_dtype=cast)
    patcher = SimpleNamespace(model=model, object_patches={}, get_model_object=lambda name: NETWORK)
    assert precision_of(patcher) == words


def test_a_run_counts_the_layers_it_has_in_4_bit(lab):
    model = add_cache(quantise(lab.flux, QuantWish()), CacheConfig(node_id="1"))
    lab.sample(model, steps=4)
    assert events.last_report(plan_of(model))["precision"] == "29 layers in 4 bit, fp32"
