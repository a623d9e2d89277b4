"""Straightness of flows whose paths are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limner.errors import UsageError
from limner.metrics.straightness import straightness
from limner.sampling.interpolants import EDM, Flow

NOISE = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def normal(mean: float, spread: float):
    """E[x0 | x] of N(mean, spread^2), whose paths are mean * (1 - sigma) + deviation(sigma) * eps."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        alpha = 1 - sigma
        return mean + spread**2 * alpha / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)

    return denoise


def coupled(mean: float, spread: float):
    """The same data, where each eps belongs to mean + spread * eps: what reflow makes of it."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        eps = (x - (1 - sigma) * mean) / ((1 - sigma) * spread + sigma)
        return mean + spread * eps

    return denoise


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_the_paths_between_two_normals_bend_by_the_closed_form(mean):
    """The deviation of x is the root of alpha^2 + sigma^2 where that of the data is 1: S = 2 - pi / 2 times eps^2,
    the integral of its derivative's square."""
    found = straightness(normal(mean, 1.0), NOISE, Flow())
    wanted = (2 - math.pi / 2) * NOISE.square().flatten(1).mean(1)
    assert found.shape == (len(NOISE),)
    assert torch.allclose(found, wanted.double(), rtol=1e-3)
    coarse = straightness(normal(mean, 1.0), NOISE, Flow(), steps=10) / found - 1
    finer = straightness(normal(mean, 1.0), NOISE, Flow(), steps=20) / found - 1
    assert (coarse / finer).mean().item() == pytest.approx(4, rel=0.2)  # second order


@pytest.mark.parametrize("denoise", [normal(0.4, 0.0), coupled(0.4, 0.3), coupled(-0.2, 2.0)])
def test_straight_paths_have_none_in_any_number_of_steps(denoise):
    for steps in (1, 7):
        assert straightness(denoise, NOISE[:8], Flow(), steps).abs().max() < 1e-9


def test_what_has_no_straight_paths_is_refused():
    with pytest.raises(UsageError, match="straightness is of flows along straight paths"):
        straightness(normal(0.0, 1.0), NOISE, EDM())
