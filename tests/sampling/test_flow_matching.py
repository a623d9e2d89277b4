"""Paths, solvers and densities beside those of the package flow_matching, whose time runs from noise to data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from limner.metrics.likelihood import log_density
from limner.sampling import odes, predictions, samplers, schedules
from limner.sampling.interpolants import Flow

pytest.importorskip("flow_matching")
pytest.importorskip("torchdiffeq")
MEANS, SHARES, SPREAD = (torch.tensor(row, dtype=torch.float64) for row in ([-0.8, 0.3, 0.9], [0.3, 0.5, 0.2], [0.25]))
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def slope(sigma: Any, x: Tensor) -> Tensor:
    """dx/dsigma of entries that are each a mixture of normals, without a division by 0 at any sigma."""
    alpha = 1 - sigma
    variance = alpha**2 * SPREAD**2 + sigma**2
    centred = x[..., None] - alpha * MEANS
    posterior = (SHARES.log() - centred**2 / (2 * variance)).softmax(-1)
    return (posterior * ((sigma - alpha * SPREAD**2) / variance * centred - MEANS)).sum(-1)


def denoise(x: Tensor, sigma: float) -> Tensor:
    return x - sigma * slope(sigma, x)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return -slope(1 - t, x)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solver() -> Any:
    from flow_matching.solver import ODESolver

    return ODESolver(velocity_model=velocity)


def test_the_straight_path_and_its_velocity_are_those_of_the_package():
    from flow_matching.path import AffineProbPath
    from flow_matching.path.scheduler import CondOTScheduler

    x0, eps = noise(2, 5, 3, 4, 4)
    sigma = torch.linspace(0, 1, 5, dtype=torch.float64)
    theirs = AffineProbPath(CondOTScheduler()).sample(x_0=eps, x_1=x0, t=1 - sigma)
    level = sigma[:, None, None, None]
    alpha = Flow().alpha(level)
    assert torch.allclose(alpha * x0 + level * eps, theirs.x_t, atol=1e-15)
    assert torch.equal(predictions.get("velocity").target(x0, eps, alpha, level), -theirs.dx_t)


def test_eulers_steps_are_the_same():
    eps, grid = noise(20, 1, 2, 2), torch.linspace(0, 1, 11, dtype=torch.float64)
    theirs = solver().sample(x_init=eps, step_size=None, method="euler", time_grid=grid)
    ours = samplers.euler(denoise, eps, schedules.uniform(10, Flow()), Flow())
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("backwards", [False, True])
def test_dopri5_and_midpoints_lead_to_the_same_ends_both_ways(backwards):
    eps = noise(20, 1, 2, 2)
    start, end = (0.0, 1.0) if backwards else (1.0, 0.0)  # of sigma
    grid = torch.tensor([1 - start, 1 - end], dtype=torch.float64)
    x = odes.dopri5(slope, eps, 1.0, 0.0, **TIGHT) if backwards else eps
    ours = odes.dopri5(slope, x, start, end, **TIGHT)
    assert torch.allclose(ours, solver().sample(x, None, method="dopri5", time_grid=grid, **TIGHT), atol=1e-7)
    assert torch.allclose(ours, solver().sample(x, 0.005, method="midpoint", time_grid=grid), atol=2e-3)
    if backwards:
        assert torch.allclose(ours, eps, atol=1e-6)


def test_densities_are_the_same_and_those_of_the_mixture():
    x = MEANS[torch.arange(8) % 3].view(4, 2) + SPREAD * noise(4, 2)

    def of_noise(eps: Tensor) -> Tensor:
        return -(eps.square() + math.log(2 * math.pi)).sum(1) / 2

    _, theirs = solver().compute_likelihood(x, of_noise, None, method="dopri5", exact_divergence=True, **TIGHT)
    draws = torch.Generator().manual_seed(0)
    ours = log_density(denoise, x.view(4, 1, 1, 2), Flow(), draws, trace="exact", lowest=1e-5, rtol=1e-7, atol=1e-7)
    each = SHARES.log() - ((x[..., None] - MEANS) / SPREAD) ** 2 / 2 - SPREAD.log() - math.log(2 * math.pi) / 2
    truth = each.logsumexp(-1).sum(1)
    assert torch.allclose(theirs, truth, atol=1e-5)
    assert torch.allclose(ours.log, theirs, atol=1e-3)
