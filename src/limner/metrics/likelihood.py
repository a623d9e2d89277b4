"""How probable a denoiser holds pictures, in bits per dimension: DDPM's bound, and the value along the flow.

Both take a `Denoise`, as samplers do, so guidance, conditions and the network's prediction are whatever it is made of.
Sums are in float64; smaller is better, and 8 bits is what a picture of noise costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limner.errors import UsageError
from limner.sampling import bounds, odes
from limner.sampling.bounds import BIN
from limner.sampling.interpolants import Discrete, Interpolant
from limner.types import Denoise, Images

LOG2 = math.log(2)
Variance = Literal["small", "large"] | Callable[[float], Tensor]
Trace = Literal["rademacher", "gaussian", "exact"]
SOLVERS = ("dopri5", "rk4", "heun")


@dataclass(frozen=True)
class Bound:
    """Bits per dimension of each picture: `total` (b,) is `prior` (b,) and the sum of `terms` (b, n), of which column k
    is L of the timestep `times[k]`, the first that of the decoder, and counts `weights[k]` times."""

    total: Tensor
    prior: Tensor
    terms: Tensor
    times: list[int]
    weights: list[int]


@dataclass(frozen=True)
class Density:
    """`log` (b,) is the logarithm of the density of each x, in nats over all its dimensions, `bits` (b,) the bits per
    dimension where x is a picture of 8 bits; `evaluations` counts the calls of the denoiser."""

    log: Tensor
    bits: Tensor
    evaluations: int


# ------------------------------------------------------------------------------------------------- the bound


@torch.no_grad()
def variational_bits(
    denoise: Denoise,
    images: Images,
    interpolant: Discrete,
    generator: torch.Generator,
    *,
    variance: Variance = "small",
    every: int = 1,
    clip: bool = True,
) -> Bound:
    """DDPM's variational bound on the bits per dimension of 8-bit pictures in [-1, 1] (arXiv:2006.11239, equations 5
    and 13), with one draw of noise from `generator`, a CPU's, for each term.

    `variance` of the steps is beta tilde (`small`), beta (`large`), or what the denoiser says beside x0, as `spread` of
    the samplers: 0 to 1, at the same sigma just asked for (arXiv:2102.09672, equation 15). With `every` k one timestep,
    in the middle, stands for k of them, but the first 1 + k for themselves, where most is lost: an estimate of the
    bound in less time. The bound of a shorter chain is that of a `Discrete` of fewer sigmas. `clip` keeps x0 in
    [-1, 1], as both papers do. Raises UsageError.
    """
    if not isinstance(interpolant, Discrete):
        raise UsageError("the variational bound counts timesteps, which this model does not have: take flow_bits")
    sigmas, dimensions = interpolant.sigmas, images[0].numel()
    if not (0 < every < len(sigmas)) or (isinstance(variance, str) and variance not in ("small", "large")):
        raise UsageError(
            f"the bound's variance is {variance!r:.50} and it takes every {every}-th timestep of {len(sigmas)}: "
            "say small, large or a function, and a whole number from 1 on"
        )
    x0 = _bytes(images)
    apart = 1 + min(every, len(sigmas) - 1)
    groups = [range(first, min(first + every, len(sigmas))) for first in range(apart, len(sigmas), every)]
    times = [*range(apart), *(group[len(group) // 2] for group in groups)]
    weights = [*[1] * apart, *map(len, groups)]
    terms = []
    for t in times:
        sigma = sigmas[t]
        eps = torch.randn(images.shape, generator=generator).to(images)
        said = denoise((x0 + sigma * eps).to(images.dtype), sigma).double()
        said = said.clamp(-1, 1) if clip else said
        small, large, kept = bounds.steps(interpolant)[t]
        share = variance(sigma).double() if callable(variance) else float(variance == "large" and t > 0)
        log = torch.as_tensor((1 - share) * small + share * large, dtype=torch.float64, device=x0.device)
        kept_of, small_of = (x0.new_full((1, 1, 1, 1), value) for value in (kept, small))
        nats = bounds.nats(x0, said, log.expand_as(x0), small_of, kept_of)
        terms.append(nats.flatten(1).sum(1) / (LOG2 * dimensions))
    left = 1 / (1 + sigmas[-1] ** 2)  # alpha bar of the last timestep, which the prior takes for 0
    prior = (left * x0.square() - left - math.log1p(-left)) / 2
    bits, each = prior.flatten(1).sum(1) / (LOG2 * dimensions), torch.stack(terms, dim=1)
    return Bound(bits + each @ torch.tensor(weights).to(each), bits, each, times, weights)


# ------------------------------------------------------------------------------------------------- the flow


def flow_bits(
    denoise: Denoise,
    images: Images,
    interpolant: Interpolant,
    generator: torch.Generator,
    *,
    noise: Literal["uniform", "gaussian"] = "uniform",
    lowest: float = 1e-3,
    **how: Any,
) -> Density:
    """The bits per dimension of 8-bit pictures in [-1, 1] by `log_density`, whose keywords this takes, in expectation
    no fewer than those of the pictures themselves, if it is solved finely enough.

    `noise` from `generator` makes them continuous. It is uniform over the bin of each value (dequantization,
    arXiv:1511.01844, section 3.1), as flows are measured: of models that end at different `lowest` it says different
    things, and where that is far above 1e-3 it is not the noise that they know there. Or it is that of `lowest`, or of
    the least that there is, taken away again by DDPM's decoder (arXiv:2006.11239, equation 13), as in the variational
    bound, whatever the model. Raises UsageError, MissingExtra."""
    exact = _bytes(images)
    if noise == "uniform":
        even = torch.rand(images.shape, generator=generator).to(images) - 0.5
        return log_density(denoise, exact.to(images.dtype) + BIN * even, interpolant, generator, lowest=lowest, **how)
    low = interpolant.from_ratio(lowest)
    alpha = interpolant.alpha(low)
    ratio, eps = low / alpha, torch.randn(images.shape, generator=generator).to(exact)
    x = (exact + ratio * eps).to(images.dtype)
    found = log_density(denoise, x, interpolant, generator, lowest=lowest, **how)
    with torch.no_grad():
        said = denoise(alpha * x, low).double()
    decoded = bounds.discretized(exact, said, exact.new_full((1, 1, 1, 1), 2 * math.log(ratio)))
    noised = -eps.square() / 2 - math.log(ratio) - math.log(2 * math.pi) / 2
    nats = (noised - decoded).flatten(1).sum(1) - found.log
    return Density(found.log, nats / (LOG2 * images[0].numel()), found.evaluations + 1)


def log_density(
    denoise: Denoise,
    x: Tensor,
    interpolant: Interpolant,
    generator: torch.Generator,
    *,
    trace: Trace = "rademacher",
    probes: int = 1,
    solver: str = "dopri5",
    steps: int = 100,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    lowest: float = 1e-3,
) -> Density:
    """The density that a denoiser gives to data x (b, c, h, w), by the change of variables along the flow dx/dsigma =
    (x - x0) / sigma from sigma / alpha = `lowest` up to sigma_max, where it is that of noise alone (FFJORD,
    arXiv:1810.01367, section 2.2; score SDE, arXiv:2011.13456, equation 39), in any interpolant.

    The divergence is that of `probes` draws of Hutchinson's estimator (FFJORD, section 3.1), of signs or Gaussian, kept
    along the way and drawn by `generator`, a CPU's, or `exact`, with a pass for each dimension. `solver` is dopri5,
    which keeps `rtol` and `atol`, or rk4 or heun in so many `steps`, even in log sigma. The denoiser must be one that
    can be differentiated. Raises UsageError, MissingExtra.
    """
    if solver not in SOLVERS or trace not in ("rademacher", "gaussian", "exact") or probes < 1 or steps < 1:
        raise UsageError(
            f"no density is found by solver {solver!r:.30}, trace {trace!r:.30}, {probes} probes and {steps} steps: "
            f"take one of {', '.join(SOLVERS)}, one of rademacher, gaussian, exact, and whole numbers from 1 on"
        )
    low, high = interpolant.from_ratio(lowest), interpolant.sigma_max
    if not 0 < low < high:
        raise UsageError(f"the flow has sigmas up to {high:g}: lowest is {lowest:g}, give one between 0 and that")
    rows, dimensions = len(x), x[0].numel()
    if trace == "exact":
        directions = [one.expand(rows, -1).view_as(x) for one in torch.eye(dimensions, device=x.device, dtype=x.dtype)]
    else:
        draws = [torch.randn(x.shape, generator=generator).to(x) for _ in range(probes)]
        directions = draws if trace == "gaussian" else [draw.sign() for draw in draws]
    share = 1.0 if trace == "exact" else 1 / probes
    evaluations = 0

    def slope(log_sigma: float, state: Tensor) -> Tensor:
        """Of x and, behind it, of the divergence of x0 a dimension, in log sigma: dx/dlog sigma = x - x0."""
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            here = state[:, :-1].view_as(x).detach().requires_grad_()
            x0 = denoise(here, math.exp(log_sigma))
            if not x0.requires_grad:
                raise UsageError(
                    "the denoiser gives no gradient, which a density needs: call it without inference_mode"
                )
            found = [torch.autograd.grad(x0, here, one, retain_graph=True)[0] * one for one in directions]
        divergence = share * torch.stack([part.flatten(1).sum(1) for part in found]).sum(0) / dimensions
        return torch.cat([(here - x0).detach().flatten(1), divergence[:, None]], dim=1)

    start, end = math.log(low), math.log(high)
    alpha = interpolant.alpha(low)
    state = torch.cat([alpha * x.flatten(1), torch.zeros_like(x.flatten(1)[:, :1])], dim=1)
    if solver == "dopri5":
        state = odes.dopri5(slope, state, start, end, rtol, atol)
    else:
        step = odes.rk4 if solver == "rk4" else odes.heun
        for k in range(steps):
            state = step(slope, state, *(start + (end - start) * place / steps for place in (k, k + 1)))
    deviation = float(interpolant.start(torch.ones((), dtype=torch.float64), high))
    noise, divergence = state[:, :-1].double() / deviation, state[:, -1].double()
    each = -(noise.square() + math.log(2 * math.pi)).mean(1) / 2 - math.log(deviation)  # of a dimension, at the top
    each = each + (end - start) - divergence + math.log(alpha)  # the divergence of x - x0 is the dimension less x0's
    return Density(dimensions * each, -(each + math.log(BIN)) / LOG2, evaluations)


def _bytes(images: Images) -> Tensor:
    """Pictures in float64. Raises UsageError for values that no 8 bits have."""
    levels = (images.double() + 1) * 127.5
    if not ((levels - levels.round()).abs().max() < 0.01 and levels.min() > -0.5 and levels.max() < 255.5):
        raise UsageError(
            "bits are counted of pictures of 8 bits, k / 127.5 - 1 with k of 0 to 255: round these to such"
        )
    return levels.round() / 127.5 - 1
