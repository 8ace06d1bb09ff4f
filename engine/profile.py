"""A calibration's result as a small file: key steps, statistics, and what they were measured on.

One safetensors file: the tensors `gram` and `distance` (float64, n x n) and JSON under `slipstream_profile` in its
metadata. Only data is ever read; a file that is not exactly this is refused in one sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .search import Statistics

KEY = "slipstream_profile"
VERSION = 1

# A profile is a few kB; a header that claims more than this is not one.
LARGEST_FILE = 64 << 20
MOST_STEPS = 1000


class ProfileError(ValueError):
    """A profile that cannot be read or used, in one sentence."""


@dataclass(frozen=True)
class Profile:
    """keys: computed steps of the schedule `sigmas` (n + 1 values); model: fingerprint of the model it was measured on;
    about: what else is worth showing (sampler, scheduler, cfg, size, host version, predicted and measured drift)."""

    keys: tuple[int, ...]
    sigmas: tuple[float, ...]
    statistics: Statistics
    model: str = ""
    site: str = ""
    predictor: str = ""
    about: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.sigmas) - 1
        if not 1 <= n <= MOST_STEPS or self.statistics.steps != n:
            raise ProfileError(f"its {n} steps and its statistics of {self.statistics.steps} do not belong together")
        if any(not math.isfinite(s) for s in self.sigmas) or any(
            high < low for high, low in zip(self.sigmas, self.sigmas[1:], strict=False)
        ):
            raise ProfileError("its sigmas are not a falling schedule")
        if not self.keys or list(self.keys) != sorted(set(self.keys)) or self.keys[0] != 0 or self.keys[-1] >= n:
            raise ProfileError("its key steps are not a rising list from 0 within its steps")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def save(self, path: Path) -> None:
        """Write the file whole or not at all: under a temporary name first, then renamed."""
        header = {
            "version": VERSION,
            "keys": list(self.keys),
            "sigmas": list(self.sigmas),
            "times": list(self.statistics.times),
            **{name: value for name, value in asdict(self).items() if name in ("model", "site", "predictor", "about")},
        }
        tensors = {"gram": self.statistics.gram.contiguous(), "distance": self.statistics.distance.contiguous()}
        temporary = path.with_name(path.name + ".part")
        try:
            save_file(tensors, temporary, metadata={KEY: json.dumps(header, allow_nan=False)})
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raises ProfileError for everything that is not one."""
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ProfileError(f"{path.name} is no Slipstream profile: it is larger than {LARGEST_FILE >> 20} MB")
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in ("gram", "distance")}
        except FileNotFoundError:
            raise ProfileError(f"there is no profile {path.name}") from None
        except (OSError, SafetensorError, KeyError, ValueError, UnicodeDecodeError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{path.name} is no Slipstream profile, or it is damaged") from None
        try:
            return cls._from(header, tensors)
        except (ProfileError, TypeError, KeyError, ValueError) as error:
            raise ProfileError(f"{path.name} cannot be used: {error}") from None

    @classmethod
    def _from(cls, header: dict, tensors: dict[str, torch.Tensor]) -> Profile:
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise ProfileError("it was written by another version of Slipstream")
        if any(t.dtype != torch.float64 or t.ndim != 2 or not t.isfinite().all() for t in tensors.values()):
            raise ProfileError("its statistics are not finite float64 matrices")
        numbers = (*header["keys"], *header["sigmas"], *header["times"])
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
            raise ProfileError("its steps are not numbers")
        if any(int(k) != k for k in header["keys"]):
            raise ProfileError("its key steps are not whole numbers")
        texts = {name: str(header.get(name, "")) for name in ("model", "site", "predictor")}
        about = header.get("about", {})
        return cls(
            tuple(int(k) for k in header["keys"]),
            tuple(float(s) for s in header["sigmas"]),
            Statistics(tuple(float(t) for t in header["times"]), tensors["gram"], tensors["distance"]),
            about=about if isinstance(about, dict) else {},
            **texts,
        )

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
        top, bottom = self.sigmas[0], self.sigmas[-1]
        slack = 0.02 * (top - bottom)
        if sigmas[0] > top + slack or sigmas[-1] < bottom - slack:
            raise ProfileError(
                f"it was measured for sigmas from {top:.4g} to {bottom:.4g}, and this run goes from {sigmas[0]:.4g} to "
                f"{sigmas[-1]:.4g}"
            )
        times = [self._time(s) for s in sigmas[:-1]]
        chosen = {0, steps - 1}
        for key in self.keys:
            if key >= times[0] - 0.5:
                chosen.add(min(range(steps), key=lambda i, key=key: abs(times[i] - key)))
        return tuple(sorted(chosen))

    def _time(self, sigma: float) -> float:
        for i in range(self.steps):
            high, low = self.sigmas[i], self.sigmas[i + 1]
            if high > low and sigma > low:
                return max(0.0, i + (high - sigma) / (high - low))
        return float(self.steps)
