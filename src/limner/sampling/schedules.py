"""Which noise levels a sampler visits: (steps, interpolant) -> steps + 1 falling sigmas, the last one 0."""

from __future__ import annotations

import math
from collections.abc import Callable

from limner.errors import UnknownName
from limner.sampling.interpolants import Interpolant

Schedule = Callable[[int, Interpolant], list[float]]


def uniform(steps: int, interpolant: Interpolant) -> list[float]:
    """Evenly spaced in sigma from sigma_max to 0."""
    return [interpolant.sigma_max * (1 - i / steps) for i in range(steps + 1)]


def shifted(shift: float) -> Schedule:
    """Uniform, then sigma -> shift * sigma / (1 + (shift - 1) * sigma): more steps at high noise (SD3,
    arXiv:2403.03206, equation 23). Only meaningful for sigma in [0, 1]; others are scaled to it and back."""

    def schedule(steps: int, interpolant: Interpolant) -> list[float]:
        top = interpolant.sigma_max
        return [top * shift * s / (1 + (shift - 1) * s) for s in (u / top for u in uniform(steps, interpolant))]

    return schedule


def karras(steps: int, interpolant: Interpolant, rho: float = 7.0) -> list[float]:
    """Evenly spaced in (sigma/alpha)^(1/rho) (EDM, arXiv:2206.00364, equation 5), then 0."""
    low, high = interpolant.ratio_min ** (1 / rho), interpolant.ratio_max ** (1 / rho)
    ratios = [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]
    return [interpolant.from_ratio(r) for r in ratios] + [0.0]


def exponential(steps: int, interpolant: Interpolant) -> list[float]:
    """Evenly spaced in log(sigma/alpha), then 0."""
    low, high = math.log(interpolant.ratio_min), math.log(interpolant.ratio_max)
    return [interpolant.from_ratio(math.exp(high + i / max(steps - 1, 1) * (low - high))) for i in range(steps)] + [0.0]


SCHEDULES: dict[str, Schedule] = {
    "uniform": uniform,
    "shifted": shifted(3.0),
    "karras": karras,
    "exponential": exponential,
}


def get(name: str) -> Schedule:
    if name not in SCHEDULES:
        raise UnknownName("schedule", name, SCHEDULES)
    return SCHEDULES[name]


def from_strength(sigmas: list[float], strength: float) -> list[float]:
    """The tail of a schedule that img2img walks: about `strength` (0, 1] of its steps, at least one."""
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * strength)) :]
