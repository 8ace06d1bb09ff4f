"""The bridge between noise coordinates: it names the same point, there and back, for every level."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slipstream.engine.coordinates import FLOW, VARIANCE_EXPLODING, Coordinates, factor, level_in

ALL = [VARIANCE_EXPLODING, FLOW, Coordinates(True, 2.5), Coordinates(True, 0.5)]
PAIRS = list(itertools.product(ALL, ALL))


def noisy(x0, n, level, where):
    """The definition in the module's first lines."""
    return (1 - level) * x0 + level * where.noise_scale * n if where.flow else x0 + level * n


@pytest.mark.parametrize("source,target", PAIRS)
@given(st.floats(1e-3, 0.98), st.floats(-3, 3), st.floats(-3, 3))
def test_the_same_clean_latent_and_noise_make_the_same_point(source, target, t, x0, n):
    level = t if source.flow else t / (1 - t)
    there, scale = level_in(level, source, target), factor(level, source, target)
    assert noisy(x0, n, level, source) * scale == pytest.approx(noisy(x0, n, there, target), rel=1e-9, abs=1e-9)
    assert level_in(there, target, source) == pytest.approx(level, rel=1e-9)
    assert factor(there, target, source) * scale == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("source,target", PAIRS)
def test_tensors_keep_their_shape_and_order(source, target):
    """A later level is later in every numbers, so one schedule serves all models."""
    levels = torch.linspace(0.95, 0.0, 20)
    there = level_in(levels, source, target)
    assert there.shape == levels.shape and bool((there.diff() < 0).all())
    assert [level_in(float(v), source, target) for v in levels] == pytest.approx(there.tolist(), rel=1e-4)


def test_equal_coordinates_change_nothing_at_all():
    levels = torch.rand(5)
    assert level_in(levels, FLOW, Coordinates(True, 1.0)) is levels and factor(levels, FLOW, FLOW) == 1.0
    other = Coordinates(False, 7.0)  # the scale of the noise belongs to flows
    assert level_in(levels, VARIANCE_EXPLODING, other) is levels


def test_the_ends():
    """Pure noise has no variance exploding name, and is itself in every flow; no noise is no noise."""
    assert level_in(1.0, FLOW, VARIANCE_EXPLODING) == math.inf
    double = Coordinates(True, 2.0)
    assert level_in(1.0, FLOW, double) == 1.0 and factor(1.0, FLOW, double) == 2.0
    for source, target in PAIRS:
        assert level_in(0.0, source, target) == 0.0 and factor(0.0, source, target) == 1.0
