"""A calibration keeps little and estimates well."""

from __future__ import annotations

import pytest
import torch
from slipstream.engine.calibration import Recorder
from slipstream.engine.statistics import Statistics


def path(steps: int, elements: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, turn = (torch.randn(1, elements, generator=generator) for _ in range(2))
    return [start + turn * (i / steps) ** 2 for i in range(steps)]


def test_a_small_snapshot_is_taken_whole():
    snapshots, recorder = path(8, 100, 1), Recorder()
    for i, snapshot in enumerate(snapshots):
        recorder.push(float(i), "cond", (snapshot,))
    expected = Statistics.of(snapshots, range(8))
    found = recorder.statistics()
    assert torch.allclose(found.gram, expected.gram) and torch.allclose(found.distance, expected.distance)


def test_a_large_one_is_sampled_within_its_bytes_and_near_the_truth():
    snapshots, recorder = path(8, 200_000, 2), Recorder(sample=20_000)
    for i, snapshot in enumerate(snapshots):
        recorder.push(float(i), "cond", (snapshot, snapshot * 2))
    assert recorder.nbytes == 8 * 2 * 20_000 * 4
    expected = Statistics.of([torch.cat([s, s * 2]) for s in snapshots], range(8))
    found = recorder.statistics()
    assert torch.allclose(found.gram, expected.gram, rtol=0.05)
    assert torch.allclose(found.distance, expected.distance, rtol=0.05)


def test_streams_are_averaged_and_those_that_come_and_go_left_out():
    recorder = Recorder()
    one, two = path(4, 10, 3), path(4, 10, 4)
    for i in range(4):
        recorder.push(float(i), "positive", (one[i],))
        recorder.push(float(i), "negative", (two[i],))
        if i > 1:
            recorder.push(float(i), "late", (one[i] * 100,))
    expected = Statistics.merged([Statistics.of(one, range(4)), Statistics.of(two, range(4))])
    assert torch.allclose(recorder.statistics().gram, expected.gram)


def test_a_repeated_time_replaces_and_a_falling_one_is_refused_at_the_end():
    recorder = Recorder()
    for u, value in ((0.0, 1.0), (1.0, 5.0), (1.0, 2.0)):
        recorder.push(u, "cond", (torch.full((4,), value),))
    assert recorder.times == [0.0, 1.0]
    assert recorder.statistics().gram[1, 1].item() == pytest.approx(4.0)
    recorder.push(0.5, "cond", (torch.ones(4),))
    with pytest.raises(ValueError, match="back and forth"):
        recorder.statistics()
    with pytest.raises(ValueError, match="active at every step"):
        Recorder().statistics()
