"""Which noise levels a sampler visits: (steps, interpolant) -> steps + 1 falling sigmas, the last one 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from limner import names
from limner.errors import UnknownName, UsageError
from limner.sampling.interpolants import Discrete, Interpolant

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


def leading(steps: int, interpolant: Interpolant, more: int = 0) -> list[float]:
    """Timesteps at whole distances from the clean end, moved up by the model's offset, then 0 (as diffusers has it).

    `more` is 1 for solvers whose timesteps diffusers lays out as for one step more, and leaves out the cleanest.
    """
    sigmas = timed(interpolant, "leading", steps + more)
    stride = len(sigmas) // (steps + more)
    offset = min(interpolant.offset, len(sigmas) - 1 - (steps + more - 1) * stride)  # type: ignore[attr-defined]
    return [sigmas[i * stride + offset] for i in reversed(range(more, steps + more))] + [0.0]


def linspace(steps: int, interpolant: Interpolant, more: int = 0) -> list[float]:
    """Timesteps evenly from the last to the first, then 0; between two, sigma is linear; `more` is as in `leading`,
    and then they are whole (as diffusers has it)."""
    sigmas = timed(interpolant, "linspace", steps + more)
    top = len(sigmas) - 1
    times = [i * top / max(steps + more - 1, 1) for i in reversed(range(more, steps + more))]
    return [_between(sigmas, round(t) if more else t) for t in times] + [0.0]


def trailing(steps: int, interpolant: Interpolant, more: int = 0) -> list[float]:
    """Timesteps at even distances from the noisy end, rounded, then 0 (arXiv:2305.08891, table 2)."""
    sigmas = timed(interpolant, "trailing", steps)
    return [sigmas[round(len(sigmas) * (1 - i / steps)) - 1] for i in range(steps)] + [0.0]


SPACINGS = {"leading": leading, "linspace": linspace, "trailing": trailing}
ONE_MORE = frozenset({"dpmpp_2m", "dpmpp_2m_sde"})
"""Solvers whose timesteps diffusers lays out as for one step more."""
SHORT = frozenset({"ddim", "plms"})
"""Solvers that end at the first timestep's sigma instead of 0, unless the model says otherwise (Latent Diffusion)."""


def plan(name: str, sampler: str, steps: int, interpolant: Interpolant) -> list[float]:
    """The sigmas that `sampler` walks. Raises UnknownName, and UsageError for a schedule that the model cannot have."""
    if name not in SPACINGS:
        return get(name)(steps, interpolant)
    sigmas = SPACINGS[name](steps, interpolant, more=int(sampler in ONE_MORE))
    return [*sigmas[:-1], interpolant.end] if sampler in SHORT and isinstance(interpolant, Discrete) else sigmas


def usual(sampler: str) -> str:
    """The schedule of `sampler` where neither the request nor the model names one: what diffusers takes."""
    return USUAL.get(sampler, "linspace")


USUAL = {"ddim": "leading", "ddpm": "leading", "plms": "leading"}


def timed(interpolant: Interpolant, name: str, steps: int) -> tuple[float, ...]:
    """The sigmas of the model's timesteps. Raises UsageError where it has none, or fewer than `steps`."""
    if not isinstance(interpolant, Discrete):
        raise UsageError(f"the schedule {name!r} counts timesteps, which this model does not have: take 'uniform'")
    if steps > len(interpolant.sigmas):
        raise UsageError(f"the schedule {name!r} has {len(interpolant.sigmas)} timesteps at most: ask for fewer steps")
    return interpolant.sigmas


def _between(sigmas: Sequence[float], t: float) -> float:
    low = min(int(t), len(sigmas) - 2)
    return sigmas[low] + (t - low) * (sigmas[low + 1] - sigmas[low])


SCHEDULES: dict[str, Schedule] = {
    "uniform": uniform,
    "shifted": shifted(3.0),
    "karras": karras,
    "exponential": exponential,
    **SPACINGS,
}


def find(name: str) -> str:
    """Our name of a schedule, by any spelling. Raises UnknownName."""
    ours = names.find(name, names.SCHEDULES)
    if ours is None or ours not in {"auto", *SCHEDULES}:
        raise UnknownName("schedule", name, ["auto", *SCHEDULES])
    return ours


def get(name: str) -> Schedule:
    return SCHEDULES[find(name)]


def from_strength(sigmas: list[float], strength: float) -> list[float]:
    """The tail of a schedule that img2img walks: about `strength` (0, 1] of its steps, at least one."""
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(steps * strength)) :]
