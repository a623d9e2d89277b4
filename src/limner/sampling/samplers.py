"""Solvers: from noise to data by asking a denoiser for x0 at falling noise levels.

Each is (denoise, x, sigmas, interpolant, *, noise, on_step) -> x at sigmas[-1]. `x` (b, c, h, w) sits at sigmas[0];
`denoise(x, sigma)` returns x0; `noise()` draws the fresh noise that stochastic solvers add; `on_step` hears of every
step, as (steps done, steps in all). Every step is written on the pair (alpha, sigma) of both ends without dividing by
alpha, so pure noise (alpha = 0) is a legal start and one function serves EDM and flow coordinates alike; second order
needs a finite lambda = log(alpha / sigma) at both ends and is first order where it is not. Only first order is free of
the coordinate: `heun` is second order in sigma, `dpmpp_2m` in lambda.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from limner import names
from limner.errors import UnknownName, UsageError
from limner.sampling import odes
from limner.sampling.interpolants import Discrete, Interpolant
from limner.sampling.schedules import karras
from limner.types import Denoise, Noise

Sampler = Callable[..., Tensor]


class Told(TypedDict, total=False):
    noise: Noise | None
    on_step: Callable[[int, int], None] | None
    spread: Callable[[float], Tensor] | None
    """What the denoiser said of the variance when it was last asked at this sigma, of the shape of x: 0 for DDPM's
    smaller, 1 for its larger, in between along a line in the logarithm (v of arXiv:2102.09672, equation 15)."""


# ------------------------------------------------------------------------------------------------- in sigma


def euler(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, churn: float = 0.0, **told: Unpack[Told]
) -> Tensor:
    """Euler's method on dx/dsigma = (x - x0) / sigma (EDM, arXiv:2206.00364, algorithm 2 without correction)."""
    for sigma, following in _steps(sigmas, told):
        x, level = _churned(x, sigma, churn / (len(sigmas) - 1), interpolant, told)
        x = x + (following - level) * (x - denoise(x, level)) / level
    return x


def heun(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, churn: float = 0.0, **told: Unpack[Told]
) -> Tensor:
    """Heun's method, second order in sigma; the step to 0 is Euler's (EDM, arXiv:2206.00364, algorithm 1; with `churn`,
    S_churn there, algorithm 2, which goes back into noise a little before each step)."""
    for sigma, following in _steps(sigmas, told):
        x, level = _churned(x, sigma, churn / (len(sigmas) - 1), interpolant, told)
        x = _heun(denoise, x, level, following)
    return x


def _churned(x: Tensor, sigma: float, share: float, interpolant: Interpolant, told: Told) -> tuple[Tensor, float]:
    """x further into noise, and its sigma: sigma / alpha grows by `share`, to no more than the root of 2 times what it
    is (EDM, algorithm 2, lines 4 to 6, with S_noise 1, at all sigmas). Pure noise stays what it is."""
    alpha = interpolant.alpha(sigma)
    if share == 0 or alpha == 0:
        return x, sigma
    level = interpolant.from_ratio(sigma / alpha * (1 + min(share, math.sqrt(2) - 1)))
    scale = interpolant.alpha(level) / alpha
    return _noised(scale * x, math.sqrt(max(0.0, level**2 - (scale * sigma) ** 2)), told), level


def _heun(denoise: Denoise, x: Tensor, sigma: float, following: float) -> Tensor:
    slope = (x - denoise(x, sigma)) / sigma
    end = x + (following - sigma) * slope
    if following > 0:
        slope = (slope + (end - denoise(end, following)) / following) / 2
        end = x + (following - sigma) * slope
    return end


def rk4(denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, **told: Unpack[Told]) -> Tensor:
    """The classical method of Runge and Kutta, fourth order in sigma with four calls a step; the step to 0 is
    Euler's."""
    slope = _slope(denoise)
    for sigma, following in _steps(sigmas, told):
        x = odes.rk4(slope, x, sigma, following) if following > 0 else x - sigma * slope(sigma, x)
    return x


def dopri5(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **told: Unpack[Told],
) -> Tensor:
    """`odes.dopri5` on dx/dsigma, as score SDE and SiT draw (arXiv:2011.13456, section 4.3): the tolerances choose the
    steps, so `sigmas` only say where to begin and to end, and when progress is told. The step to 0 is Euler's, from the
    interpolant's lowest level or from that of `sigmas` where it is lower. Raises MissingExtra, UsageError."""
    levels = _steps(sigmas, told)
    _, due = next(levels)

    def slope(sigma: float, x: Tensor) -> Tensor:
        nonlocal due
        while sigma < due and due > sigmas[-1]:
            _, due = next(levels)
        return _slope(denoise)(sigma, x)

    low = sigmas[-1] or min(sigmas[-2], interpolant.from_ratio(interpolant.ratio_min))
    if low < sigmas[0]:
        x = odes.dopri5(slope, x, sigmas[0], low, rtol, atol)
    x = x if sigmas[-1] else x - low * slope(low, x)
    for _ in levels:
        pass
    return x


def _slope(denoise: Denoise) -> odes.Slope:
    """dx/dsigma of the ordinary differential equation whose solutions have the marginals of the noise."""
    return lambda sigma, x: (x - denoise(x, sigma)) / sigma


def restart(denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, **told: Unpack[Told]) -> Tensor:
    """Heun's method that near the end goes back into noise and down again (Restart, arXiv:2306.14878, algorithm 1), on
    the levels of `restarts`."""
    last = sigmas[0]
    for sigma, following in _reported(restarts(sigmas, interpolant), told):
        if sigma > last:
            scale = interpolant.alpha(sigma) / interpolant.alpha(last)
            x = _noised(scale * x, math.sqrt(sigma**2 - (scale * last) ** 2), told)
        x, last = _heun(denoise, x, sigma, following), following
    return x


def restarts(sigmas: list[float], interpolant: Interpolant) -> list[tuple[float, float]]:
    """Both ends of the steps of `restart`, as many as `sigmas` has, by A1111's choice: below 20 steps those of it;
    below 36 nine of them once go back from the level nearest to sigma / alpha = 0.1 to that nearest to 2; from 36 on
    two times a quarter of them. What is left is spaced as Karras', whatever `sigmas` is between its ends."""
    steps = len(sigmas) - 1
    count, times = (steps // 4, 2) if steps >= 36 else (9, 1) if steps >= 20 else (0, 0)
    if not times:
        return list(itertools.pairwise(sigmas))

    def ratio(sigma: float) -> float:
        return min(sigma / interpolant.alpha(sigma), interpolant.ratio_max) if sigma < interpolant.sigma_max else top

    def between(high: float, low: float, steps: int) -> list[float]:
        return karras(steps, replace(interpolant, ratio_min=ratio(low), ratio_max=ratio(high)))

    top = interpolant.ratio_max
    levels = [sigmas[0], *between(sigmas[0], sigmas[-2], steps - count * times)[1:]]
    ratios = [ratio(level) for level in levels]
    low, high = (ratios.index(min(ratios, key=lambda r: abs(r - wanted))) for wanted in (0.1, 2.0))
    again = list(itertools.pairwise(between(levels[high], levels[low], count + 1)[:-1])) if high < low else []
    whole = list(itertools.pairwise(levels))
    return [*whole[:low], *again * times, *whole[low:]]


def dpm2(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, eta: float = 0.0, **told: Unpack[Told]
) -> Tensor:
    """Two calls a step, the second half way in lambda, whose slope is taken over the whole (k-diffusion's `dpm_2`,
    after DPM-Solver-2, arXiv:2206.00927). With `eta` 1 it goes further down and adds noise (`dpm_2_ancestral`)."""
    for sigma, following in _steps(sigmas, told):
        level, scale, fresh = _down(sigma, following, interpolant, eta)
        slope = (x - denoise(x, sigma)) / sigma
        middle = _middle(sigma, level, interpolant)
        if middle is not None:
            inner = x + (middle - sigma) * slope
            slope = (inner - denoise(inner, middle)) / middle
        x = scale * (x + (level - sigma) * slope)
        x = _noised(x, fresh, told)
    return x


ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, **told: Unpack[Told]) -> Tensor:
    """Pseudo linear multistep (PNDM, arXiv:2202.09778, equation 12): Adams and Bashforth's weights for even steps, over
    the last four slopes. The first step averages the slopes at its ends, so it asks twice."""
    slopes: list[Tensor] = []
    for sigma, following in _steps(sigmas, told):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[:3]]
        slope = sum(weight * d for weight, d in zip(ADAMS[len(slopes) - 1], slopes, strict=True))
        if len(slopes) == 1 and len(sigmas) > 2:
            end = x + (following - sigma) * slope
            slope = (slope + (end - denoise(end, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def lms(denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, **told: Unpack[Told]) -> Tensor:
    """Linear multistep: Adams and Bashforth's weights for the steps as they are, over the last four slopes."""
    past: list[tuple[float, Tensor]] = []
    for sigma, following in _steps(sigmas, told):
        past = [(sigma, (x - denoise(x, sigma)) / sigma), *past[:3]]
        levels = [level for level, _ in past]
        x = x + sum(_lagrange(levels, j, sigma, following) * slope for j, (_, slope) in enumerate(past))
    return x


def _lagrange(nodes: list[float], j: int, start: float, end: float) -> float:
    """Integral from `start` to `end` of the polynomial that is 1 at node j and 0 at the others, by Gauss's rule of two
    points, which is exact up to degree 3."""
    total = 0.0
    for point in (-(3**-0.5), 3**-0.5):
        tau = (start + end) / 2 + point * (end - start) / 2
        others = [node for k, node in enumerate(nodes) if k != j]
        total += math.prod((tau - node) / (nodes[j] - node) for node in others)
    return total * (end - start) / 2


# ---------------------------------------------------------------------------------------- of any coordinate


def ddim(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, eta: float = 0.0, **told: Unpack[Told]
) -> Tensor:
    """DDIM (arXiv:2010.02502, equations 12 and 16): `eta` 0 is deterministic, 1 is DDPM's smaller variance."""
    for sigma, following in _steps(sigmas, told):
        x = _ancestral(x, denoise(x, sigma), sigma, following, interpolant, eta, told)
    return x


euler_ancestral = partial(ddim, eta=1.0)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    large: bool = False,
    **told: Unpack[Told],
) -> Tensor:
    """DDPM (arXiv:2006.11239, algorithm 2) with the smaller variance, that of the posterior, with the `large` one, that
    of the noise which the step takes away (section 3.2), or, whatever `large` is, with that which the denoiser says
    beside x0, by `spread` (arXiv:2102.09672, equation 15). The step to 0 has none, as in algorithm 2."""
    spread = told.get("spread")
    for sigma, following in _steps(sigmas, told):
        x = _kept(x, denoise(x, sigma), sigma, following, interpolant, _fresh(sigma, following, interpolant, 1.0))
        if following > 0:
            small, most = deviations(sigma, following, interpolant)
            if spread is None:
                x = _noised(x, most if large else small, told)
            else:
                share = spread(sigma)
                x = x + torch.exp((1 - share) * math.log(small) + share * math.log(most)) * _drawn(told)
    return x


def predictor_corrector(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    ancestral: bool = False,
    snr: float = 0.16,
    corrections: int = 1,
    **told: Unpack[Told],
) -> Tensor:
    """Score SDE's predictor and corrector (arXiv:2011.13456, algorithms 2 to 5), in the process's own coordinates: at
    each level `corrections` steps of Langevin of a length that `snr` sets, each picture for itself, then reverse
    diffusion (equation 46) or, where `ancestral`, DDPM's step with its smaller variance (equation 47). The step to 0 is
    to x0 (appendix G)."""
    for sigma, following in _steps(sigmas, told):
        own, decay, fresh = _forward(sigma, following, interpolant)
        for _ in range(corrections):
            score, z = (interpolant.alpha(sigma) * denoise(x, sigma) - x) / sigma**2, _drawn(told)
            step = 2 * (decay * snr * _norm(z) / _norm(score)) ** 2
            x = x + step * score + (2 * step).sqrt() * z
        x0 = denoise(x, sigma)
        if ancestral or following == 0:
            x = _ancestral(x, x0, sigma, following, interpolant, 1.0, told)
        else:
            score = (interpolant.alpha(sigma) * x0 - x) / (own * sigma) ** 2  # times own, of own * x
            x = own / interpolant.own_scale(following) * ((2 - decay) * x + fresh**2 * score)
            x = _noised(x, fresh / interpolant.own_scale(following), told)
    return x


def _norm(x: Tensor) -> Tensor:
    """The length of each row."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())) or None, keepdim=True)


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    trace: bool = True,
    **told: Unpack[Told],
) -> Tensor:
    """Latent consistency models (arXiv:2310.04378, algorithm 3): x0, then noise again. Where there are timesteps, x0 is
    mixed with a `trace` of x, as in training (equation 9, with times ten times as long)."""
    for sigma, following in _steps(sigmas, told):
        x0 = denoise(x, sigma)
        if trace and isinstance(interpolant, Discrete):
            t = 10 * interpolant.time(sigma)
            x0 = (0.25 * interpolant.input_scale(sigma) * x + t * math.hypot(t, 0.5) * x0) / (t * t + 0.25)
        x = _noised(interpolant.alpha(following) * x0, following, told)
    return x


def tcd(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, eta: float = 0.3, **told: Unpack[Told]
) -> Tensor:
    """Trajectory consistency distillation (arXiv:2402.19159, algorithm 4): DDIM to 1 - `eta` of the time of the next
    level, then noise up to it; nothing is added in the last step."""
    if not isinstance(interpolant, Discrete):
        raise UsageError("the sampler 'tcd' counts timesteps, which this model does not have: take 'lcm'")
    for sigma, following in _steps(sigmas, told):
        time = interpolant.time(following) if following > 0 else 0.0
        level = min(interpolant.sigmas[math.floor((1 - eta) * time)], following)
        x = _moved(x, denoise(x, sigma), sigma, level, interpolant)
        x = _noised(x, math.sqrt(following**2 - level**2), told)
    return x


def invert(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    iterations: int = 0,
    tolerance: float = 1e-5,
    **told: Unpack[Told],
) -> Tensor:
    """The x at sigmas[0] from which `ddim` comes to the `x` at sigmas[-1], data where that is 0: DDIM the other way
    round (arXiv:2010.02502, section 4.3), which takes eps at the lower end of a step for that at the higher and is
    right to first order.

    With `iterations` each step is solved for the x that a step of `ddim` takes back where it came from, to `tolerance`
    of its greatest entry, by iteration from that guess (arXiv:2309.04907). Raises UsageError if so many are too few,
    as they always are where one step from much noise goes to data: no noise may have that answer.
    """
    for following, sigma in _reported([*itertools.pairwise(sigmas[::-1])], told):
        alpha, above = interpolant.alpha(following), interpolant.alpha(sigma)
        if following > 0:
            guess = _moved(x, denoise(x, following), following, sigma, interpolant)
        elif above == 0:
            raise UsageError("one step from noise alone to data is not inverted: ask for more of them")
        else:  # where eps has no answer: with that of the same picture under no noise yet at the higher end
            guess = above * x + above * (x - denoise(above * x, sigma))
        rate = above / alpha if above > 0 else sigma / following  # more than x there moves with x here
        for _ in range(iterations):
            error = x - _moved(guess, denoise(guess, sigma), sigma, following, interpolant)
            if error.abs().max() <= tolerance * x.abs().max():
                break
            guess = guess + rate * error
        else:
            if iterations:
                raise UsageError(
                    f"the step up to sigma {sigma:g} is not inverted after {iterations} iterations: "
                    "ask for more of them, for more steps, or for less guidance"
                )
        x = guess
    return x


# ------------------------------------------------------------------------------------------------ in lambda


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, eta: float = 1.0, **told: Unpack[Told]
) -> Tensor:
    """DPM-Solver++(2S), arXiv:2211.01095, algorithm 1, with the middle half way in lambda; it goes further down and
    adds noise, as k-diffusion does."""
    for sigma, following in _steps(sigmas, told):
        level, scale, fresh = _down(sigma, following, interpolant, eta)
        x0 = denoise(x, sigma)
        middle = _middle(sigma, level, interpolant)
        if middle is not None:
            x0 = denoise(_moved(x, x0, sigma, middle, interpolant), middle)
        x = _noised(scale * _moved(x, x0, sigma, level, interpolant), fresh, told)
    return x


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, eta: float = 1.0, **told: Unpack[Told]
) -> Tensor:
    """Two ancestral steps from the same x, the first half way in lambda to learn the x0 of the second (k-diffusion's
    `dpmpp_sde`)."""
    for sigma, following in _steps(sigmas, told):
        x0 = denoise(x, sigma)
        middle = _middle(sigma, following, interpolant)
        if middle is not None:
            x0 = denoise(_ancestral(x, x0, sigma, middle, interpolant, eta, told), middle)
        x = _ancestral(x, x0, sigma, following, interpolant, eta, told)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, **told: Unpack[Told]
) -> Tensor:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2: second order in lambda with one call a step."""
    previous: Tensor | None = None
    last_h = math.inf
    for sigma, following in _steps(sigmas, told):
        x0 = denoise(x, sigma)
        h = _h(sigma, following, interpolant)
        estimate = x0
        if previous is not None and math.isfinite(h) and math.isfinite(last_h):
            estimate = x0 + (x0 - previous) * (h / (2 * last_h))
        x = interpolant.alpha(following) * estimate + following * (x - interpolant.alpha(sigma) * estimate) / sigma
        previous, last_h = x0, h
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    interpolant: Interpolant,
    eta: float = 1.0,
    heun: bool = False,
    **told: Unpack[Told],
) -> Tensor:
    """SDE-DPM-Solver++(2M), arXiv:2211.01095, section 6. The change of x0 counts as if it were all there in the middle
    of the step, or with `heun` as a line through both (k-diffusion's `sample_dpmpp_2m_sde`)."""
    previous: Tensor | None = None
    last_h = math.inf
    for sigma, following in _steps(sigmas, told):
        x0 = denoise(x, sigma)
        h = _h(sigma, following, interpolant)
        q = _decay(sigma, following, interpolant)  # e^-h, 0 at either infinite end
        gain = interpolant.alpha(following) * (1 - q ** (1 + eta))
        x = following / sigma * q**eta * x + gain * x0
        if previous is not None and math.isfinite(h) and math.isfinite(last_h):
            whole = (1 + eta) * h
            share = interpolant.alpha(following) * (1 + math.expm1(-whole) / whole) if heun else gain / 2
            x = x + share * (x0 - previous) * (h / last_h)
        x = _noised(x, following * math.sqrt(max(0.0, 1 - q ** (2 * eta))), told, (sigma, following))
        previous, last_h = x0, h
    return x


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, eta: float = 1.0, **told: Unpack[Told]
) -> Tensor:
    """As `dpmpp_2m_sde` with a parabola through the last three x0 (k-diffusion's `sample_dpmpp_3m_sde`)."""
    past: list[tuple[Tensor, float]] = []  # x0 of the steps before, and their h, newest first
    for sigma, following in _steps(sigmas, told):
        x0 = denoise(x, sigma)
        h = _h(sigma, following, interpolant)
        q = _decay(sigma, following, interpolant)
        alpha = interpolant.alpha(following)
        x = following / sigma * q**eta * x + alpha * (1 - q ** (1 + eta)) * x0
        known = [(old, last) for old, last in past if math.isfinite(last)]
        if known and math.isfinite(h):
            whole = (1 + eta) * h
            phi2 = math.expm1(-whole) / whole + 1
            slope = (x0 - known[0][0]) * (h / known[0][1])
            if len(known) > 1:
                r0, r1 = known[0][1] / h, known[1][1] / h
                bend = (slope - (known[0][0] - known[1][0]) / r1) / (r0 + r1)
                slope = slope + bend * r0
                x = x - alpha * (phi2 / whole - 0.5) * bend
            x = x + alpha * phi2 * slope
        x = _noised(x, following * math.sqrt(max(0.0, 1 - q ** (2 * eta))), told, (sigma, following))
        past = [(x0, h), *past[:1]]
    return x


def unipc(denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, **told: Unpack[Told]) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv:2302.04867, algorithms 1 and 2): every x0 also corrects the step that
    led to it, which costs no call. The last step is first order."""
    start, origin, last_h, ratio = x, math.inf, math.inf, 0.0  # of the step before; `ratio` 0 if it was first order
    past: list[Tensor] = []  # x0, newest first
    for i, (sigma, following) in enumerate(_steps(sigmas, told)):
        x0 = denoise(x, sigma)
        if past:
            change = (x0 - past[0]) / 2
            if ratio:
                new, old = _corrector(last_h, ratio)
                change = new * (x0 - past[0]) + old / ratio * (past[1] - past[0])
            gain = interpolant.alpha(sigma) * (1 - _decay(origin, sigma, interpolant))
            x = _moved(start, past[0], origin, sigma, interpolant) + gain * change
        h = _h(sigma, following, interpolant)
        second = past and i + 2 < len(sigmas) and math.isfinite(h) and math.isfinite(last_h)
        start, origin, last_h, ratio = x, sigma, h, -last_h / h if second else 0.0
        x = _moved(start, x0, sigma, following, interpolant)
        if second:
            gain = interpolant.alpha(following) * (1 - _decay(sigma, following, interpolant))
            x = x + gain / (2 * ratio) * (past[0] - x0)
        past = [x0, *past[:1]]
    return x


def _corrector(h: float, ratio: float) -> tuple[float, float]:
    """Weights of the new x0 and of the one two steps back, which lies `ratio` (below 0) of the step away (arXiv:
    2302.04867, equation 11 for p = 2)."""
    b = math.expm1(-h)
    phi = -b / h - 1
    first, second = phi / b, 2 * (-phi / h - 0.5) / b
    old = (first - second) / (1 - ratio)
    return first - old, old


def deis(denoise: Denoise, x: Tensor, sigmas: list[float], interpolant: Interpolant, **told: Unpack[Told]) -> Tensor:
    """DEIS of order 2 (arXiv:2204.13902, section 3.3): eps is a line in lambda, integrated over sigma / alpha. A last
    step is first order if there are few, as in diffusers."""
    previous: Tensor | None = None
    last_h = math.inf
    for i, (sigma, following) in enumerate(_steps(sigmas, told)):
        x0 = denoise(x, sigma)
        eps = (x - interpolant.alpha(sigma) * x0) / sigma
        h = _h(sigma, following, interpolant)
        x = _moved(x, x0, sigma, following, interpolant)
        last = i + 2 == len(sigmas) and len(sigmas) <= 15
        if previous is not None and not last and math.isfinite(h) and math.isfinite(last_h):
            here, there = sigma / interpolant.alpha(sigma), following / interpolant.alpha(following)
            x = x + interpolant.alpha(following) * (here - there - there * h) / last_h * (previous - eps)
        previous, last_h = eps, h
    return x


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "rk4": rk4,
    "dopri5": dopri5,
    "restart": restart,
    "lms": lms,
    "dpm2": dpm2,
    "dpm2_a": partial(dpm2, eta=1.0),
    "ddim": ddim,
    "ddpm": ddpm,
    "ddpm_large": partial(ddpm, large=True),
    "pc": predictor_corrector,
    "pc_a": partial(predictor_corrector, ancestral=True),
    "plms": plms,
    "dpmpp_2s_a": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": partial(dpmpp_2m_sde, heun=True),
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "deis": deis,
    "res_multistep": partial(dpmpp_2m_sde, eta=0.0, heun=True),
    "lcm": lcm,
    "tcd": tcd,
    "flow_euler": euler,
}
"""`flow_euler` is `euler`: in flow coordinates (x - x0) / sigma is the velocity. `res_multistep` (arXiv:2308.02157) is
DPM++ 2M with a line through two x0."""


FLOWING = frozenset(
    {"euler", "heun", "rk4", "dopri5", "lms", "dpm2", "ddim", "plms", "dpmpp_2m", "unipc", "deis", "res_multistep",
     "flow_euler"}
)  # fmt: skip
"""Those that follow the ordinary differential equation of the noise and draw none: what `invert` leads up, they lead
down again."""


def find(name: str) -> str:
    """Our name of a sampler, by any spelling. Raises UnknownName."""
    ours = names.find(name, names.SAMPLERS)
    if ours is None:
        raise UnknownName("sampler", name, SAMPLERS)
    return ours


def get(name: str) -> Sampler:
    return SAMPLERS[find(name)]


def takes(name: str, option: str) -> bool:
    """Whether a sampler may be told `option`, "eta" or "churn"."""
    return option in inspect.signature(get(name)).parameters


# -------------------------------------------------------------------------------------------------- a step


def _steps(sigmas: list[float], told: Told) -> Iterator[tuple[float, float]]:
    """Both ends of each step, which is reported when it is done."""
    return _reported(list(itertools.pairwise(sigmas)), told)


def _reported(steps: list[tuple[float, float]], told: Told) -> Iterator[tuple[float, float]]:
    for done, ends in enumerate(steps, start=1):
        yield ends
        if (on_step := told.get("on_step")) is not None:
            on_step(done, len(steps))


def _noised(x: Tensor, fresh: float, told: Told, ends: tuple[float, float] | None = None) -> Tensor:
    """x and `fresh` noise, which may depend on the ends of the step (`limner.sampling.compat.Brownian`)."""
    if fresh <= 0:
        return x
    between = getattr(told.get("noise"), "between", None)
    return x + fresh * (_drawn(told) if between is None or ends is None else between(*ends))


def _drawn(told: Told) -> Tensor:
    noise = told.get("noise")
    assert noise is not None, "a stochastic sampler needs a noise source"
    return noise()


def _moved(x: Tensor, x0: Tensor, sigma: float, following: float, interpolant: Interpolant) -> Tensor:
    """x at `following` if x0 and eps stay what they are."""
    eps = (x - interpolant.alpha(sigma) * x0) / sigma
    return interpolant.alpha(following) * x0 + following * eps


def _ancestral(
    x: Tensor, x0: Tensor, sigma: float, following: float, interpolant: Interpolant, eta: float, told: Told
) -> Tensor:
    """As `_moved`, with `eta` of DDPM's noise in place of as much eps."""
    fresh = _fresh(sigma, following, interpolant, eta)
    return _noised(_kept(x, x0, sigma, following, interpolant, fresh), fresh, told, (sigma, following))


def _kept(x: Tensor, x0: Tensor, sigma: float, following: float, interpolant: Interpolant, fresh: float) -> Tensor:
    """As `_moved`, with as much less eps as leaves room for noise of the deviation `fresh`."""
    eps = (x - interpolant.alpha(sigma) * x0) / sigma
    return interpolant.alpha(following) * x0 + math.sqrt(max(0.0, following**2 - fresh**2)) * eps


def deviations(sigma: float, following: float, interpolant: Interpolant) -> tuple[float, float]:
    """DDPM's smaller and larger standard deviation of x at `following`, given x at `sigma` and, for the smaller, x0
    (arXiv:2006.11239, section 3.2: the roots of beta tilde and beta, in our coordinates)."""
    _, _, fresh = _forward(sigma, following, interpolant)
    return _fresh(sigma, following, interpolant, 1.0), fresh / interpolant.own_scale(following)


def _forward(sigma: float, following: float, interpolant: Interpolant) -> tuple[float, float, float]:
    """The process's own scale at `sigma`, and of its step up to there, from `following`, what x is multiplied by and
    the deviation of the noise added."""
    own, below = interpolant.own_scale(sigma), interpolant.own_scale(following)
    decay = own * interpolant.alpha(sigma) / (below * interpolant.alpha(following))
    return own, decay, math.sqrt(max(0.0, (own * sigma) ** 2 - (decay * below * following) ** 2))


def _down(sigma: float, following: float, interpolant: Interpolant, eta: float) -> tuple[float, float, float]:
    """A level below `following`, and the scale and the noise that bring x from there to it."""
    fresh = _fresh(sigma, following, interpolant, eta)
    if fresh == 0:
        return following, 1.0, 0.0
    alpha = interpolant.alpha(following)
    level = interpolant.from_ratio(math.sqrt(max(0.0, following**2 - fresh**2)) / alpha)
    return level, alpha / interpolant.alpha(level), fresh


def _fresh(sigma: float, following: float, interpolant: Interpolant, eta: float) -> float:
    """The noise that DDPM adds in a step, times `eta`."""
    return eta * following * math.sqrt(max(0.0, 1 - _decay(sigma, following, interpolant) ** 2))


def _middle(sigma: float, following: float, interpolant: Interpolant) -> float | None:
    """The level half way in lambda, None where an end is infinite."""
    middle = (interpolant.half_log_snr(sigma) + interpolant.half_log_snr(following)) / 2
    return interpolant.from_ratio(math.exp(-middle)) if math.isfinite(middle) else None


def _h(sigma: float, following: float, interpolant: Interpolant) -> float:
    """The length of a step in lambda."""
    return interpolant.half_log_snr(following) - interpolant.half_log_snr(sigma)


def _decay(sigma: float, following: float, interpolant: Interpolant) -> float:
    """e^(lambda - lambda') = (sigma'/alpha') / (sigma/alpha), in [0, 1]: how much of the noise of `sigma` is left."""
    return following * interpolant.alpha(sigma) / (interpolant.alpha(following) * sigma)
