"""Hostile files and values: a short run of `python dev.py bench fuzz`, and what that found."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import pytest
import torch
from slipstream.engine.errors import HEAD, TAIL, SlipstreamError
from slipstream.engine.run.account import _unexpected
from slipstream.host.remote.graph import parse_loras
from slipstream.kernels.choices import Choices
from slipstream.nodes import SlipstreamExtension
from slipstream.quant.packed import description_of
from slipstream.quant.policy import parse_overrides

from bench.stress import fuzz, judge
from bench.stress.fuzz_files import profile_bytes
from bench.stress.fuzz_requests import answered
from bench.stress.fuzz_widgets import execute
from bench.stress.targets import TARGETS

DEEP = "[" * 10**5


def test_h78_hostile_input_works_or_is_one_sentence(tmp_path):
    rows = fuzz.run(tmp_path, 420, seed=3)
    assert [row["name"] for row in rows] == [target.__name__ for target in TARGETS]
    assert not {what: n for row in rows for what, n in row["faults"].items()}
    assert sum(row["works"] for row in rows) > 60 and sum(row["told"] for row in rows) > 150


def test_json_as_deep_as_a_well_is_no_json(tmp_path):
    """RecursionError came through where only ValueError was expected."""
    choices = Choices(tmp_path, "card")
    choices.path.write_text(DEEP)
    assert Choices(tmp_path, "card").entries == {}
    with pytest.raises(ValueError, match="not JSON"):
        description_of("a", {"a.comfy_quant": torch.tensor(list(DEEP.encode()), dtype=torch.uint8)})


def test_a_request_in_an_encoding_that_nobody_knows_is_answered():
    from slipstream.host.profiles import embedding as sharing

    answered(sharing.post_profile, b"{}", {"Content-Type": "application/json; charset=nonsense"})


def test_numbers_in_a_profile_that_are_none_are_refused_or_passed_over():
    """NaN in what a profile tells of itself could be read and not written again; other kinds ended a run."""
    from slipstream.engine.calibration.profile import Profile, ProfileError

    whole = Profile.from_bytes(profile_bytes(), "x")
    for odd in (None, "x", [], 10**400):
        strange = dataclasses.replace(whole, about={**whole.about, "predicted_error": odd, "predicted_drift": odd})
        read = Profile.from_bytes(strange.to_bytes(), "x")
        assert read.relaxed(2.0) == read and _unexpected(read.about["predicted_drift"], [0.1]) == ""
    damaged = dataclasses.replace(whole, about={"x": "NUMBER"}).to_bytes().replace(b'\\"NUMBER\\"', b"     NaN  ")
    with pytest.raises(ProfileError, match="x cannot be used: it holds numbers that are not finite"):
        Profile.from_bytes(damaged, "x")


def test_a_line_of_a_hundred_thousand_blanks_takes_no_time():
    line = "a" + " " * 10**5 + "b"
    with judge.within(2.0):
        assert parse_loras(line) == ((line, 1.0),)
        assert parse_loras("x " + "9" * 10**5) == (("x " + "9" * 10**5, 1.0),)
    assert parse_loras("a b.safetensors 0.5, c: -1, d=.5, 7") == (
        ("a b.safetensors", 0.5),
        ("c", -1.0),
        ("d", 0.5),
        ("7", 1.0),
    )


@pytest.mark.parametrize("pattern", ["([a-z0-9_.]+)+!", "(a|aa)*b", ".*.*.*.*x", "a{1,9}b?c?d?", "x" * 400])
def test_layer_patterns_that_could_search_for_ever_are_refused(pattern):
    with pytest.raises(ValueError, match="repeats too much"):
        parse_overrides(f"{pattern} = keep")


@pytest.mark.parametrize(
    "pattern", [r"\(\)+", r"single_blocks\.(1|2)\d?\.", "[)]+x", "(?:img|txt)_mlp", "a(?=_mlp)", ".*mlp"]
)
def test_ordinary_layer_patterns_are_taken(pattern):
    assert parse_overrides(f"{pattern} = keep")[0].pattern == pattern


def test_a_sentence_stays_one_short_line():
    said = str(SlipstreamError(f"Calibrate: '{chr(10)}{'x' * 10**6}\ud800' is no file name; use letters."))
    assert len(said) <= HEAD + TAIL + 5 and said.isprintable() and said.endswith("use letters.")


@pytest.mark.parametrize(
    ("node", "values", "sentence"),
    [
        ("CacheLoader", {"preset": ["x"]}, "Cache Loader: preset is ['x'], but it must be one of Balanced, "),
        ("CacheLoader", {"drift_budget": math.nan}, "drift_budget is nan, but it must be a number from 0.0 to 1.0"),
        ("CacheLoader", {"max_skip": 2.5}, "max_skip is 2.5, but it must be a whole number from 0 to 20"),
        ("CacheLoader", {"max_skip": 10**5000}, "max_skip is a number of thousands of digits, but"),
        ("CacheLoader", {"prior_noise": "yes"}, "prior_noise is 'yes', but it must be on or off"),
        ("TaylorPredictor", {"order": None}, "Taylor Predictor: order is None, but it must be a whole number from"),
        ("HybridSwitch", {"cfg_b": math.inf}, "Hybrid Model Switch: cfg_b is inf, but it must be a number"),
        ("Calibrate", {"name": 7}, "Calibrate: name is 7, but it must be text"),
        ("W4A4Quantise", {"activations": "2 bit"}, "activations is '2 bit', but it must be one of 4 bit, 8 bit"),
    ],
)
def test_what_no_widget_gives_is_refused_when_the_node_runs(node, values, sentence):
    """Another pack's node of any type can be wired to a widget, past the host's validation."""
    nodes = {n.__name__: n for n in asyncio.run(SlipstreamExtension().get_node_list())}
    with pytest.raises(SlipstreamError) as refused:
        execute(nodes[node], values)
    assert sentence in str(refused.value)
