"""Profiles: a round trip is exact, other schedules are met by time, and no file can do more than be refused."""

from __future__ import annotations

import io
import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from slipstream.engine.calibration import profile as profiles
from slipstream.engine.calibration.profile import KEY, Point, Profile, ProfileError
from slipstream.engine.calibration.statistics import TrajectoryStatistics
from slipstream.kernels import files


def example(steps: int = 10, keys=(0, 1, 2, 5, 9)) -> Profile:
    path = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
    sigmas = tuple(1.0 - i / steps for i in range(steps + 1))
    statistics = TrajectoryStatistics.of(path, [float(i) for i in range(steps)])
    frontier = (Point((0, 9), "even", 0.25, 0.125), Point((0, 4, 9), "CacheQuant", 0.1, 0.05))
    extras = {"blocks": torch.ones(steps, 3, dtype=torch.uint8), "moments": torch.rand(2, 3)}
    about = {"sampler": "euler", "cfg": 1.5}
    return Profile(keys, sigmas, statistics, "abc", "model output", "newton 1", about, frontier, extras)


def test_a_round_trip_is_exact(tmp_path):
    written = example()
    written.save(tmp_path / "p.safetensors")
    read = Profile.load(tmp_path / "p.safetensors")
    for name in ("keys", "sigmas", "model", "site", "predictor", "about", "frontier"):
        assert getattr(read, name) == getattr(written, name), name
    assert read.statistics.times == written.statistics.times
    for name in ("gram", "distance", "size"):
        assert torch.equal(getattr(read.statistics, name), getattr(written.statistics, name)), name
    assert read.extras.keys() == written.extras.keys()
    assert all(torch.equal(read.extras[name], written.extras[name]) for name in written.extras)
    assert read.to_bytes() == written.to_bytes() == (tmp_path / "p.safetensors").read_bytes()
    assert (tmp_path / "p.safetensors").stat().st_size < 8000
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_key_steps_for_other_schedules_keep_their_time():
    profile = example()
    assert profile.keys_for(profile.sigmas) == profile.keys
    double = [1.0 - i / 20 for i in range(21)]
    assert profile.keys_for(double) == (0, 2, 4, 10, 18, 19)
    late = [0.5 - i / 20 for i in range(11)]  # starts in the middle: denoise 0.5
    assert profile.keys_for(late) == (0, 8, 9)
    squeezed = [(1.0 - i / 10) ** 2 for i in range(11)]
    keys = profile.keys_for(squeezed)
    assert keys[0] == 0 and keys[-1] == 9 and len(keys) <= len(profile.keys) + 1
    with pytest.raises(ProfileError, match="measured for sigmas from 1 to 0"):
        profile.keys_for([14.6, 3.0, 0.0])


def test_rows_for_other_schedules_are_the_nearest_in_time():
    profile = example()
    assert profile.rows_for(profile.sigmas) == list(range(10))
    assert profile.rows_for([1.0 - i / 20 for i in range(21)])[::2] == list(range(10))
    assert profile.rows_for([1.0 - i / 5 for i in range(6)]) == [0, 2, 4, 6, 8]
    assert profile.rows_for([0.5 - i / 20 for i in range(11)])[::2] == [5, 6, 7, 8, 9]
    with pytest.raises(ProfileError, match="measured for sigmas from 1 to 0"):
        profile.rows_for([14.6, 3.0, 0.0])
    with pytest.raises(ProfileError, match="empty schedule"):
        profile.rows_for([1.0])


def damaged(tmp_path, name: str):
    """Files that are not profiles, each in its own way."""
    path = tmp_path / "p.safetensors"
    example().save(path)
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    plan = json.loads(header["__metadata__"][KEY])
    gram = torch.eye(10, dtype=torch.float64)
    matrices = {"gram": gram, "distance": gram.clone(), "size": torch.ones(10, dtype=torch.float64)}

    def rewrite(tensors=matrices, **changes):
        save_file(tensors, path, metadata={KEY: json.dumps({**plan, **changes})})

    {
        "empty": lambda: path.write_bytes(b""),
        "truncated": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "huge header": lambda: path.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:]),
        "text": lambda: path.write_text("import os; os.system('true')"),
        "pickle": lambda: torch.save({"a": 1}, path),
        "foreign": lambda: save_file({"weight": torch.zeros(2)}, path),
        "no json": lambda: save_file(matrices, path, metadata={KEY: "{"}),
        "list": lambda: save_file(matrices, path, metadata={KEY: "[]"}),
        "version": lambda: rewrite(version=1),
        "dtype": lambda: rewrite({**matrices, "gram": gram.float()}),
        "shape": lambda: rewrite({**matrices, "gram": gram[:9].clone()}),
        "nan": lambda: rewrite({**matrices, "gram": gram * float("nan")}),
        "no size": lambda: rewrite({"gram": gram, "distance": gram.clone()}),
        "wild mask": lambda: rewrite({**matrices, "blocks": torch.full((10, 3), 7, dtype=torch.uint8)}),
        "empty mask": lambda: rewrite({**matrices, "blocks": torch.zeros(10, 0, dtype=torch.uint8)}),
        "frontier": lambda: rewrite(frontier=[{"keys": [0, 99], "schedule": "even", "drift": 0.1, "error": 0.1}]),
        "frontier words": lambda: rewrite(frontier=[{"keys": [0], "schedule": 1, "drift": "x", "error": 0.1}]),
        "keys": lambda: rewrite(keys=[0, 99]),
        "negative key": lambda: rewrite(keys=[-1, 5]),
        "fraction": lambda: rewrite(keys=[0, 1.5]),
        "words": lambda: rewrite(keys=["0", "__import__"]),
        "rising sigmas": lambda: rewrite(sigmas=list(range(11))),
        "no keys": lambda: rewrite(keys=[]),
    }[name]()
    return path


@pytest.mark.parametrize(
    "name",
    ["empty", "truncated", "huge header", "text", "pickle", "foreign", "no json", "list", "version", "dtype", "shape",
     "nan", "no size", "wild mask", "empty mask", "frontier", "frontier words", "keys", "negative key", "fraction",
     "words", "rising sigmas", "no keys"],
)  # fmt: skip
def test_h78_a_file_that_is_no_profile_is_refused_in_one_sentence(tmp_path, name):
    path = damaged(tmp_path, name)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=r"p\.safetensors") as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_h78_a_missing_and_an_enormous_file(tmp_path, monkeypatch):
    with pytest.raises(ProfileError, match="there is no profile"):
        Profile.load(tmp_path / "nowhere.safetensors")
    example().save(tmp_path / "p.safetensors")
    monkeypatch.setattr(profiles, "LARGEST_FILE", 100)
    with pytest.raises(ProfileError, match="larger than"):
        Profile.load(tmp_path / "p.safetensors")


def test_h79_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    example().save(path)
    before = path.read_bytes()

    def full(path, mode):
        class Disk(io.FileIO):
            def write(self, data):
                super().write(b"half")
                raise OSError(28, "No space left on device")

        return Disk(path, mode)

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        example(keys=(0, 9)).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
