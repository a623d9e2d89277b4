"""How straight the paths are along which a flow leads from noise to data."""

from __future__ import annotations

import torch
from torch import Tensor

from limner.errors import UsageError
from limner.sampling.interpolants import Flow, Interpolant
from limner.types import Denoise


@torch.no_grad()
def straightness(denoise: Denoise, noise: Tensor, interpolant: Interpolant, steps: int = 100) -> Tensor:
    """S of the paths from `noise` (b, c, h, w), (b,) a dimension: the mean over time of the squared distance between
    the velocity and that of the straight line between the ends, 0 where each path is straight and of even pace
    (arXiv:2209.03003, section 2.2).

    The ordinary differential equation is solved by the midpoint method in so many `steps` of two calls each, whose
    middles are the times of the mean: the end lies where the mean of their velocities leads, so that S is their
    variance. Raises UsageError for what is no flow.
    """
    if not isinstance(interpolant, Flow) or steps < 1:
        raise UsageError(
            f"straightness is of flows along straight paths, in 1 step or more, not of {interpolant.name} in {steps}"
        )
    x, length = noise.double(), 1 / steps
    mean, square = torch.zeros_like(x), torch.zeros_like(x)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoise(x.to(noise.dtype), sigma).double()) / sigma

    for k in range(steps):
        sigma = 1 - k * length
        velocity = slope(x - length / 2 * slope(x, sigma), sigma - length / 2)
        x = x - length * velocity
        mean, square = mean + velocity / steps, square + velocity.square() / steps
    return (square - mean.square()).flatten(1).mean(1)
