"""How data and noise mix: x = alpha * x0 + sigma * eps, written as alpha(sigma).

Two cases carry every diffusion and flow model (design after k-diffusion's EDM coordinates and SiT, arXiv:2401.08740):
`EDM` has alpha = 1 and sigma from 0 to infinity (DDPM, SD after an input scale), `Flow` has alpha = 1 - sigma and sigma
from 0 to 1 (rectified flow, SD3, FLUX). Both are straight lines in sigma, so dx/dsigma = (x - x0) / sigma in either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from limner.errors import UnknownName


@dataclass(frozen=True)
class Interpolant:
    """`ratio_min` and `ratio_max` bound sigma/alpha where a schedule lives on ratios (Karras, exponential)."""

    name: str
    sigma_max: float
    ratio_min: float
    ratio_max: float

    def alpha(self, sigma: float) -> float:
        raise AssertionError("an interpolant defines alpha")

    def from_ratio(self, ratio: float) -> float:
        """The sigma at which sigma/alpha is `ratio`."""
        raise AssertionError("an interpolant defines from_ratio")

    def half_log_snr(self, sigma: float) -> float:
        """lambda = log(alpha / sigma): minus infinity for pure noise, plus infinity for clean data."""
        alpha = self.alpha(sigma)
        if sigma == 0:
            return math.inf
        return -math.inf if alpha == 0 else math.log(alpha / sigma)

    def mix(self, x0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
        """alpha * x0 + sigma * eps; sigma may be a tensor that broadcasts."""
        return self.alpha(sigma) * x0 + sigma * eps  # type: ignore[arg-type]


@dataclass(frozen=True)
class EDM(Interpolant):
    """alpha = 1 (arXiv:2206.00364)."""

    name: str = "edm"
    sigma_max: float = 80.0
    ratio_min: float = 0.002
    ratio_max: float = 80.0

    def alpha(self, sigma: float) -> float:
        return sigma * 0 + 1.0

    def from_ratio(self, ratio: float) -> float:
        return ratio


@dataclass(frozen=True)
class Flow(Interpolant):
    """alpha = 1 - sigma (arXiv:2209.03003, arXiv:2210.02747)."""

    name: str = "flow"
    sigma_max: float = 1.0
    ratio_min: float = 0.02
    ratio_max: float = 500.0

    def alpha(self, sigma: float) -> float:
        return 1.0 - sigma

    def from_ratio(self, ratio: float) -> float:
        return ratio / (1 + ratio)


INTERPOLANTS: dict[str, Interpolant] = {"edm": EDM(), "flow": Flow()}


def get(name: str) -> Interpolant:
    if name not in INTERPOLANTS:
        raise UnknownName("interpolant", name, INTERPOLANTS)
    return INTERPOLANTS[name]
