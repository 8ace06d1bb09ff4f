"""The sigma grid of a run and its step coordinate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """Maps sigma to the continuous step coordinate u: u = i at sigmas[i], linear between.

    sigmas: the schedule the sampler was given, strictly decreasing but for repeats, N + 1 values for N steps.
    """

    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def decreasing(self) -> bool:
        """Whether u is defined: at least one step, and sigma never rises (a restart schedule does)."""
        pairs = list(zip(self.sigmas, self.sigmas[1:], strict=False))
        return bool(pairs) and all(a >= b for a, b in pairs) and self.sigmas[0] > self.sigmas[-1]

    def weights(self) -> tuple[float, ...]:
        """What an error in a noise prediction does at each step, relative to the mean step; sigma variance exploding.

        The sampler multiplies it by the step in sigma; at noise level sigma the latent is of size sqrt(1 + sigma^2).
        """
        pairs = zip(self.sigmas, self.sigmas[1:], strict=False)
        effects = [(a - b) / (1.0 + a * a) ** 0.5 for a, b in pairs]
        mean = sum(effects) / max(len(effects), 1)
        return tuple(e / mean for e in effects) if mean > 0 else ()

    def u(self, sigma: float) -> float:
        """Step coordinate of sigma; beyond both ends the first or last interval is continued.

        No value is looked up by equality: samplers round, add churn and evaluate between the grid points.
        """
        last = self.steps - 1
        for i in range(self.steps):
            high, low = self.sigmas[i], self.sigmas[i + 1]
            if high > low and (sigma > low or i == last):
                return i + (high - sigma) / (high - low)
        high, low = next((a, b) for a, b in reversed(list(zip(self.sigmas, self.sigmas[1:], strict=False))) if a > b)
        return last + (high - sigma) / (high - low)
