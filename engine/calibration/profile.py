"""A calibration's result as a small file: key steps, statistics, and what they were measured on.

One safetensors file: the tensors `gram`, `distance` and `size` (float64), where asked for a block mask and statistics
for correction and quantisation, and JSON under `slipstream_profile` in its metadata. Only data is ever read; a file
that is not exactly this is refused in one sentence.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ...kernels.files import write_whole
from .statistics import TrajectoryStatistics

KEY = "slipstream_profile"
VERSION = 2

# A profile is a few kB, or some MB with activation statistics; what claims more than this is not one.
LARGEST_FILE = 64 << 20
MOST_STEPS = 1000

REQUIRED = ("gram", "distance", "size")
BLOCKS = "blocks"


# Schedules of one range begin and end a little apart, as schedulers round; chosen, relative to the range.
SLACK = 0.02


class ProfileError(ValueError):
    """A profile that cannot be read or used, in one sentence."""


@dataclass(frozen=True)
class Point:
    """One schedule of the frontier: its key steps, the method that found it, the mean relative L1 error expected of
    its filled steps, and the error expected of the result, RMS relative to that of the final latent."""

    keys: tuple[int, ...]
    schedule: str
    drift: float
    error: float


@dataclass(frozen=True)
class Profile:
    """keys: computed steps of the schedule `sigmas` (n + 1 values); model: fingerprint of the model it was measured on;
    about: what else is worth showing (sampler, scheduler, cfg, size, host version, predicted and measured drift);
    frontier: the best schedule found for every number of computed steps; extras: further statistics by name, among them
    `blocks` [n, number of blocks] uint8, 1 where a block is computed: then blocks are skipped, not whole steps."""

    keys: tuple[int, ...]
    sigmas: tuple[float, ...]
    statistics: TrajectoryStatistics
    model: str = ""
    site: str = ""
    predictor: str = ""
    about: dict = field(default_factory=dict)
    frontier: tuple[Point, ...] = ()
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.sigmas) - 1
        if not 1 <= n <= MOST_STEPS or self.statistics.steps != n:
            raise ProfileError(f"its {n} steps and its statistics of {self.statistics.steps} do not belong together")
        if any(not math.isfinite(s) for s in self.sigmas) or any(
            high < low for high, low in zip(self.sigmas, self.sigmas[1:], strict=False)
        ):
            raise ProfileError("its sigmas are not a falling schedule")
        for keys in (self.keys, *(point.keys for point in self.frontier)):
            if not keys or list(keys) != sorted(set(keys)) or keys[0] != 0 or keys[-1] >= n:
                raise ProfileError("its key steps are not a rising list from 0 within its steps")
        mask = self.blocks
        shaped = mask is None or (mask.dtype == torch.uint8 and mask.ndim == 2 and len(mask) == n and mask.numel() > 0)
        if not shaped or (mask is not None and mask.max() > 1):
            raise ProfileError("its block mask is not a table of zeros and ones with a row per step")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def blocks(self) -> Tensor | None:
        return self.extras.get(BLOCKS)

    def to_bytes(self) -> bytes:
        """The file's content."""
        header = {
            "version": VERSION,
            "keys": list(self.keys),
            "sigmas": list(self.sigmas),
            "times": list(self.statistics.times),
            "model": self.model,
            "site": self.site,
            "predictor": self.predictor,
            "about": self.about,
            "frontier": [asdict(point) for point in self.frontier],
        }
        tensors = {name: getattr(self.statistics, name).contiguous() for name in REQUIRED}
        tensors |= {name: value.contiguous() for name, value in self.extras.items()}
        return safetensors.save(tensors, {KEY: json.dumps(header, allow_nan=False)})

    def save(self, path: Path) -> None:
        """Write the file whole or not at all: under a temporary name first, then renamed."""
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raises ProfileError for everything that is not one."""
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ProfileError(f"{path.name} is no Slipstream profile: it is larger than {LARGEST_FILE >> 20} MB")
            data = path.read_bytes()
        except FileNotFoundError:
            raise ProfileError(f"there is no profile {path.name}") from None
        except OSError:
            raise ProfileError(f"{path.name} cannot be read") from None
        return cls.from_bytes(data, path.name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Profile:
        """Read a profile from a file's content; name: what errors call it. Raises ProfileError."""
        try:
            tensors = safetensors.load(data)
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
        except (SafetensorError, KeyError, TypeError, ValueError, struct.error, RecursionError):
            raise ProfileError(f"{name} is no Slipstream profile, or it is damaged") from None
        try:
            return cls._from(header, tensors)
        except (ProfileError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise ProfileError(f"{name} cannot be used: {error}") from None

    @classmethod
    def _from(cls, header: dict, tensors: dict[str, Tensor]) -> Profile:
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise ProfileError("it was written by another version of Slipstream; calibrate again")
        try:
            json.dumps(header, allow_nan=False)  # as it is written when it travels on
        except (ValueError, RecursionError):
            raise ProfileError("it holds numbers that are not finite") from None
        statistics = [tensors.pop(name) for name in REQUIRED]
        if any(t.dtype != torch.float64 or not t.isfinite().all() for t in statistics):
            raise ProfileError("its statistics are not finite float64 tables")
        if any(t.dtype not in (torch.float32, torch.uint8) or not t.isfinite().all() for t in tensors.values()):
            raise ProfileError("its further statistics are not finite float32 tables")
        points = tuple(
            Point(_steps(p["keys"]), str(p["schedule"]), *(float(v) for v in _numbers([p["drift"], p["error"]])))
            for p in header.get("frontier", [])
        )
        about = header.get("about", {})
        return cls(
            _steps(header["keys"]),
            tuple(float(s) for s in _numbers(header["sigmas"])),
            TrajectoryStatistics(tuple(float(t) for t in _numbers(header["times"])), *statistics),
            model=str(header.get("model", "")),
            site=str(header.get("site", "")),
            predictor=str(header.get("predictor", "")),
            about=about if isinstance(about, dict) else {},
            frontier=points,
            extras=tensors,
        )

    def relaxed(self, factor: float) -> Profile:
        """The same profile at the point of its frontier that computes least within `factor` times the error expected of
        its own key steps; as it is where the frontier has none."""
        expected = self.about.get("predicted_error")
        limit = factor * expected if isinstance(expected, float) else 0.0  # about is whatever the file holds
        allowed = [p for p in self.frontier if p.error <= limit]
        if factor == 1.0 or not allowed or self.blocks is not None:
            return self
        point = min(allowed, key=lambda p: (len(p.keys), p.error))
        expected = {"predicted_drift": point.drift, "predicted_error": point.error}
        return dataclasses.replace(self, keys=point.keys, about={**self.about, "schedule": point.schedule, **expected})

    def keys_for(self, sigmas: Sequence[float]) -> tuple[int, ...]:
        """The key steps for another schedule over the same range: every key goes to the step nearest in time.

        sigmas: n + 1 falling values. A step's time is the place its sigma has in this profile's schedule, so another
        step count, another scheduler and a later start (denoise below 1) are all the same case. The first and the last
        step are always keys. Raises ProfileError where a schedule leaves the measured range.
        """
        steps = len(sigmas) - 1
        if steps < 1:
            raise ProfileError("an empty schedule has no key steps")
        if tuple(sigmas) == self.sigmas:
            return self.keys
        times = self._times(sigmas)
        chosen = {0, steps - 1}
        for key in self.keys:
            if key >= times[0] - 0.5:
                chosen.add(_nearest(times, key))
        return tuple(sorted(chosen))

    def rows_for(self, sigmas: Sequence[float]) -> list[int]:
        """For every step of another schedule over the same range, the step of this profile that is nearest in time.

        sigmas: n + 1 falling values; the result has n entries. Times and the ProfileError are those of `keys_for`.
        """
        if len(sigmas) < 2:
            raise ProfileError("an empty schedule has no key steps")
        if tuple(sigmas) == self.sigmas:
            return list(range(self.steps))
        return [_nearest(range(self.steps), time) for time in self._times(sigmas)]

    def _times(self, sigmas: Sequence[float]) -> list[float]:
        """The place in this profile's schedule of every step of another; ProfileError where one leaves its range."""
        top, bottom = self.sigmas[0], self.sigmas[-1]
        slack = SLACK * (top - bottom)
        if sigmas[0] > top + slack or sigmas[-1] < bottom - slack:
            raise ProfileError(
                f"it was measured for sigmas from {top:.4g} to {bottom:.4g}, and this run goes from {sigmas[0]:.4g} to "
                f"{sigmas[-1]:.4g}"
            )
        return [self.time_of(s) for s in sigmas[:-1]]

    def time_of(self, sigma: float) -> float:
        """The place that a sigma has in this profile's schedule, in steps; beyond its ends the ends."""
        for i in range(self.steps):
            high, low = self.sigmas[i], self.sigmas[i + 1]
            if high > low and sigma > low:
                return max(0.0, i + (high - sigma) / (high - low))
        return float(self.steps)


def _nearest(times: Sequence[float], time: float) -> int:
    """The index of the entry that is nearest to `time`, the first of several."""
    return min(range(len(times)), key=lambda i: abs(times[i] - time))


def _numbers(values: list) -> list:
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values):
        raise ProfileError("its steps are not numbers")
    return values


def _steps(values: list) -> tuple[int, ...]:
    if any(int(v) != v for v in _numbers(values)):
        raise ProfileError("its key steps are not whole numbers")
    return tuple(int(v) for v in values)
