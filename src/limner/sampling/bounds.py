"""The terms of DDPM's variational bound (arXiv:2006.11239, equation 5), in nats of each dimension: for what learns by
it (arXiv:2102.09672) and for what measures it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from limner.sampling.interpolants import Discrete
from limner.sampling.samplers import deviations

BIN = 2 / 255
"""How far two neighbours of 256 values lie apart in [-1, 1]."""
STEP = ("small", "large", "kept")


@lru_cache
def steps(interpolant: Discrete) -> tuple[tuple[float, float, float], ...]:
    """Of the step down from each timestep the logarithms of DDPM's smaller and larger variance, and how much of x0 is
    in the mean of the posterior (equation 7). The last step has no smaller one: that of the step before it stands for
    it (as in the code of Improved DDPM)."""
    sigmas, rows = interpolant.sigmas, []
    for t, sigma in enumerate(sigmas):
        below = sigmas[t - 1] if t else 0.0
        small, large = deviations(sigma, below, interpolant)
        if not t:
            small = deviations(sigmas[1], sigmas[0], interpolant)[0] * interpolant.own_scale(sigmas[0])
        rows.append((2 * math.log(small), 2 * math.log(large), 1 - (below / sigma) ** 2))
    return tuple(rows)


def step(interpolant: Discrete, t: Tensor) -> dict[str, Tensor]:
    """`steps` of timesteps t (b,), each (b, 1, 1, 1), by the names of STEP."""
    rows = torch.tensor(steps(interpolant), dtype=torch.float32, device=t.device)[t]
    return {name: rows[:, k, None, None, None] for k, name in enumerate(STEP)}


def nats(x0: Tensor, said: Tensor, log_variance: Tensor, small: Tensor, kept: Tensor) -> Tensor:
    """What the steps down to x0, of which a network has `said` what it is, and the logarithm of the variance, cost:
    of the step to the data itself minus the logarithm of what it puts on x0, of others the divergence from the
    posterior, whose log variance is `small`. (b, c, h, w); `small` and `kept` (b, 1, 1, 1)."""
    last = kept == 1
    divergence = log_variance - small + (small - log_variance).exp() - 1
    divergence = (divergence + (kept * (x0 - said)).square() * (-log_variance).exp()) / 2
    nothing = torch.zeros_like(log_variance)  # where it is not asked, something whose gradient is a number
    decoded = discretized(x0, torch.where(last, said, x0), torch.where(last, log_variance, nothing))
    return torch.where(last, -decoded, divergence)


def discretized(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The logarithm of what a Gaussian puts on the bin of each of 256 values x in [-1, 1], of which the outermost two
    reach to infinity (arXiv:2006.11239, equation 13). All of one shape, or such as broadcast."""
    deviation = (log_variance / 2).exp()
    above = torch.where(x > 1 - BIN / 2, math.inf, (x + BIN / 2 - mean) / deviation)
    under = torch.where(x < -1 + BIN / 2, -math.inf, (x - BIN / 2 - mean) / deviation)
    flipped = under + above > 0  # by symmetry, so that both are in the lower half, where no digits are lost
    above, under = torch.where(flipped, -under, above), torch.where(flipped, -above, under)
    upper, lower = torch.special.log_ndtr(above), torch.special.log_ndtr(under)
    return upper + torch.log1p(-(lower - upper).exp())
