"""Solvers: from noise to data by asking a denoiser for x0 at falling noise levels.

Each is (denoise, x, sigmas, interpolant, *, noise, on_step) -> x at sigmas[-1]. `x` (b, c, h, w) sits at sigmas[0];
`denoise(x, sigma)` returns x0; `noise()` draws the fresh noise that stochastic solvers add. Every step is written on
the pair (alpha, sigma) of both ends without dividing by alpha, so pure noise (alpha = 0) is a legal start and one
function serves EDM and flow coordinates alike; second order needs a finite lambda = log(alpha / sigma) at both ends and
is first order where it is not. Only first order is free of the coordinate: `heun` is second order in sigma, `dpmpp_2m`
in lambda.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from limner import names
from limner.errors import UnknownName
from limner.sampling.interpolants import Interpolant
from limner.types import Denoise, Noise, OnStep

Sampler = Callable[..., Tensor]


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method on dx/dsigma = (x - x0) / sigma (EDM, arXiv:2206.00364, algorithm 1 without correction)."""
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x = x + (following - sigma) * (x - denoise(x, sigma)) / sigma
        _report(on_step, i, sigmas)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method, second order in sigma; the step to 0 is Euler's (EDM, arXiv:2206.00364, algorithm 1)."""
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        slope = (x - denoise(x, sigma)) / sigma
        end = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (end - denoise(end, following)) / following) / 2
            end = x + (following - sigma) * slope
        x = end
        _report(on_step, i, sigmas)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (arXiv:2010.02502, equations 12 and 16): `eta` 0 is deterministic, 1 is DDPM's smaller variance."""
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoise(x, sigma)
        eps = (x - interpolant.alpha(sigma) * x0) / sigma
        fresh = eta * following * math.sqrt(max(0.0, 1 - _decay(sigma, following, interpolant) ** 2))
        x = interpolant.alpha(following) * x0 + math.sqrt(max(0.0, following**2 - fresh**2)) * eps
        if fresh > 0:
            x = x + fresh * _drawn(noise)
        _report(on_step, i, sigmas)
    return x


euler_ancestral = partial(ddim, eta=1.0)


ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Pseudo linear multistep (PNDM, arXiv:2202.09778, equation 12): Adams and Bashforth's weights for even steps, over
    the last four slopes. The first step averages the slopes at its ends, so it asks twice."""
    slopes: list[Tensor] = []
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[:3]]
        slope = sum(weight * d for weight, d in zip(ADAMS[len(slopes) - 1], slopes, strict=True))
        if i == 0 and len(sigmas) > 2:
            end = x + (following - sigma) * slope
            slope = (slope + (end - denoise(end, following)) / following) / 2
        x = x + (following - sigma) * slope
        _report(on_step, i, sigmas)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2: second order in lambda with one call a step."""
    previous: Tensor | None = None
    last_h = math.inf
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoise(x, sigma)
        h = interpolant.half_log_snr(following) - interpolant.half_log_snr(sigma)
        estimate = x0
        if previous is not None and math.isfinite(h) and math.isfinite(last_h):
            estimate = x0 + (x0 - previous) * (h / (2 * last_h))
        x = interpolant.alpha(following) * estimate + following * (x - interpolant.alpha(sigma) * estimate) / sigma
        previous, last_h = x0, h
        _report(on_step, i, sigmas)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form (arXiv:2211.01095, section 6; k-diffusion's `sample_dpmpp_2m_sde`)."""
    previous: Tensor | None = None
    last_h = math.inf
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoise(x, sigma)
        h = interpolant.half_log_snr(following) - interpolant.half_log_snr(sigma)
        q = _decay(sigma, following, interpolant)  # e^-h, 0 at either infinite end
        gain = interpolant.alpha(following) * (1 - q ** (1 + eta))
        x = following / sigma * q**eta * x + gain * x0
        if previous is not None and math.isfinite(h) and math.isfinite(last_h):
            x = x + gain * (x0 - previous) * (h / (2 * last_h))
        fresh = following * math.sqrt(max(0.0, 1 - q ** (2 * eta)))
        if fresh > 0:
            x = x + fresh * _drawn(noise)
        previous, last_h = x0, h
        _report(on_step, i, sigmas)
    return x


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "ddim": ddim,
    "ddpm": euler_ancestral,
    "plms": plms,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "flow_euler": euler,
}
"""`flow_euler` is `euler`: in flow coordinates (x - x0) / sigma is the velocity."""


BARE = frozenset({"euler", "euler_a", "heun"})
"""Solvers that begin with sigma * eps, as if nothing lay under the noise: those of k-diffusion, and so in diffusers
unless timesteps are `leading`."""


def find(name: str) -> str:
    """Our name of a sampler, by any spelling. Raises UnknownName."""
    ours = names.find(name, names.SAMPLERS)
    if ours is None:
        raise UnknownName("sampler", name, SAMPLERS)
    return ours


def get(name: str) -> Sampler:
    return SAMPLERS[find(name)]


def _steps(sigmas: list[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(sigmas))


def _decay(sigma: float, following: float, interpolant: Interpolant) -> float:
    """e^(lambda - lambda') = (sigma'/alpha') / (sigma/alpha), in [0, 1]: how much of the noise of `sigma` is left."""
    return following * interpolant.alpha(sigma) / (interpolant.alpha(following) * sigma)


def _drawn(noise: Noise | None) -> Tensor:
    assert noise is not None, "a stochastic sampler needs a noise source"
    return noise()


def _report(on_step: OnStep | None, i: int, sigmas: list[float]) -> None:
    if on_step is not None:
        on_step(i + 1, len(sigmas) - 1)
