"""A calibration keeps little and estimates well."""

from __future__ import annotations

import pytest
import torch
from slipstream.engine.calibration.recorder import Activations, Recorder
from slipstream.engine.calibration.statistics import TrajectoryStatistics


def path(steps: int, elements: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, turn = (torch.randn(1, elements, generator=generator) for _ in range(2))
    return [start + turn * (i / steps) ** 2 for i in range(steps)]


def test_a_small_snapshot_is_taken_whole():
    snapshots, recorder = path(8, 100, 1), Recorder()
    for i, snapshot in enumerate(snapshots):
        recorder.push(float(i), "cond", (snapshot,))
    expected = TrajectoryStatistics.of(snapshots, range(8))
    found = recorder.statistics()
    assert torch.allclose(found.gram, expected.gram) and torch.allclose(found.distance, expected.distance)


def test_a_large_one_is_sampled_within_its_bytes_and_near_the_truth():
    snapshots, recorder = path(8, 200_000, 2), Recorder(sample=20_000)
    for i, snapshot in enumerate(snapshots):
        recorder.push(float(i), "cond", (snapshot, snapshot * 2))
    assert recorder.nbytes == 8 * 2 * 20_000 * 4
    expected = TrajectoryStatistics.of([torch.cat([s, s * 2]) for s in snapshots], range(8))
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
    expected = TrajectoryStatistics.merged(
        [TrajectoryStatistics.of(one, range(4)), TrajectoryStatistics.of(two, range(4))]
    )
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


def test_growth_is_measured_where_asked_and_is_the_denoisers():
    recorder = Recorder(probed=frozenset({2, 4}))
    generator = torch.Generator().manual_seed(0)
    x, seen = torch.randn(1, 4, 3, generator=generator), []
    for i in range(6):
        sigma = 1.0 - i / 6
        denoised = 0.7 * x + torch.sin(x * (1 + i))
        disturbance = recorder.disturbance(x, sigma, denoised)
        seen.append(disturbance is not None)
        if disturbance is not None:
            recorder.grown(disturbance, 1.7 * disturbance)
        x = x - (x - denoised) / sigma / 6
    assert seen == [False, False, True, False, True, False]
    assert recorder.growth == pytest.approx({2: 1.7, 4: 1.7})
    still = Recorder(probed=frozenset({1}))
    still.disturbance(x, 1.0, 0 * x)
    nothing = still.disturbance(0.5 * x, 0.5, 0 * x)  # the same slope again: nothing to disturb with
    still.grown(nothing, nothing)
    assert not nothing.any() and still.growth == {}


@pytest.mark.parametrize("sample", [10_000, 256])
def test_channel_moments_are_means_of_products_per_channel(sample):
    generator = torch.Generator().manual_seed(3)
    outputs, inputs = (torch.randn(5, 2, 3, 16, 16, generator=generator) for _ in range(2))
    recorder = Recorder(sample=sample, moments=True)
    for u in range(5):
        recorder.push(float(u), "cond", (outputs[u],), inputs[u])
    table = recorder.channel_moments()
    rows = torch.cat([outputs, inputs]).movedim(2, 0).reshape(3, 10, -1)
    rows = torch.cat([rows, torch.ones(3, 1, rows.shape[2])], 1)
    expected = rows @ rows.mT / rows.shape[2]
    assert table.shape == (3, 11, 11) and table.dtype == torch.float32
    assert torch.allclose(table, expected, atol=1e-5 if sample > 1536 else 0.5)
    other = Recorder(moments=True)
    other.push(0.0, "cond", (outputs[0],), inputs[0][:, :1])
    assert other.channel_moments() is None


def test_activations_are_the_ranges_of_every_linear_layers_input_and_nothing_stays_behind():
    network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    batches = [torch.randn(3, 5, 6), torch.randn(2, 6) * 3]
    activations = Activations({n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)})
    with activations, torch.no_grad():
        for batch in batches:
            network(batch)
    tables = activations.tables()
    rows = torch.cat([b.reshape(-1, 6) for b in batches])
    assert set(tables) == {f"activation/{layer}/{what}" for layer in "02" for what in ("absmax", "square")}
    assert torch.allclose(tables["activation/0/absmax"], rows.abs().amax(0))
    assert torch.allclose(tables["activation/0/square"], rows.square().mean(0))
    network(batches[0])
    assert torch.equal(activations.tables()["activation/0/absmax"], tables["activation/0/absmax"])
