"""What every loss is least at: on data of a known density the best answer is known, and there the gradient vanishes.

Basis functions of x and t are added to that answer; the gradient of the expected loss with respect to their shares must
be 0 within the error of the draw, of which every row tells its part, and must not be once a share is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limner import catalog
from limner.sampling import interpolants, predictions
from limner.sampling.interpolants import SDE, Discrete, EDMConfig, Flow, Interpolant, SDEConfig, Times, VPConfig
from limner.systems.nonequilibrium import Trajectory, constant_fraction
from limner.systems.objectives import Objective

MEANS = torch.tensor([-0.9, 0.2, 0.7], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
SPREAD = 0.15
ROWS, SIDE, BASIS = 240, 8, 4
NOISES = {
    "vp_linear": catalog.DDPM_NOISE,
    "vp_cosine": catalog.IDDPM_NOISE,
    "edm": EDMConfig(),
    "flow": "flow",
    **{kind: SDEConfig(kind=kind) for kind in ("vp", "subvp", "ve")},  # type: ignore[arg-type]
}


def mixture(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(SHARES, math.prod(shape), replacement=True, generator=generator).view(shape)
    return MEANS[which] + SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)


def posterior(x: Tensor, alpha: Tensor | float, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mixture's x0 where x = alpha x0 + sigma eps."""
    variance = alpha**2 * SPREAD**2 + sigma**2
    residual = x[..., None] - alpha * MEANS if isinstance(alpha, float) else x[..., None] - alpha[..., None] * MEANS
    weights = (SHARES.log() - residual**2 / (2 * variance[..., None])).softmax(-1)
    gain = alpha * SPREAD**2 / variance
    means = MEANS + gain[..., None] * residual
    mean = (weights * means).sum(-1)
    return mean, (weights * (means - mean[..., None]) ** 2).sum(-1) + SPREAD**2 * sigma**2 / variance


def basis(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(b, k, h, w): of x (b, 1, h, w) at unit variance and of how noisy it is."""
    u, noisy = x / (0.5 * alpha**2 + sigma**2).sqrt(), sigma / (alpha + sigma)
    return torch.cat([torch.ones_like(u), u, (4 * u).tanh(), noisy * (3 * u).cos()], dim=1)


class Best(nn.Module):
    """Answers with the mean of the posterior, and `shares` (b, k) of the basis beside."""

    def __init__(self, system: Any) -> None:
        super().__init__()
        self.model: Interpolant = system.interpolant
        self.prediction, self.config = system.prediction, system.network.config
        self.shares = torch.zeros(ROWS, BASIS, dtype=torch.float64, requires_grad=True)

    def sigma(self, t: Tensor) -> Tensor:
        if isinstance(self.model, SDE):
            return t.exp() if self.model.config.kind == "ve" else self.model.at(t / 999)
        if isinstance(self.model, Discrete):
            return torch.tensor(self.model.sigmas, dtype=torch.float64)[t.long()]
        return t if isinstance(self.model, Flow) else (4 * t).exp()

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        sigma = self.sigma(t.double())[:, None, None, None]
        alpha = self.model.alpha(sigma)  # type: ignore[arg-type]
        x = x / self.model.input_scale(sigma)
        x0, _ = posterior(x, alpha * torch.ones_like(sigma), sigma)
        answer = self.prediction.from_x0(x0, x, alpha, sigma)
        added = torch.einsum("bk,bkhw->bhw", self.shares, basis(x, alpha * torch.ones_like(sigma), sigma))
        return answer + added[:, None]


def of_rows(loss: Tensor, shares: Tensor) -> Tensor:
    """The part (b, k) that every row has in the gradient."""
    return torch.autograd.grad(loss, shares)[0]


def check(loss: Callable[[], Tensor], shares: Tensor, added: float = 1.0) -> None:
    """The gradient is 0, but for the error of the draw, and is more than that by far where a function is added."""
    rows = of_rows(loss(), shares)
    error = rows.square().sum(0).sqrt()
    assert (rows.sum(0).abs() < 4.5 * error).all(), rows.sum(0) / error
    for k in range(shares.shape[1]):
        shares.data.zero_()[:, k] = added
        assert of_rows(loss(), shares).sum(0)[k] > 6 * error[k], k


def learner(noise: Any, prediction: str, objective: Objective, **changes: Any) -> Any:
    config: Any = catalog.entry("ddpm-tiny").config
    system: Any = catalog.build(replace(config, **changes))
    system.interpolant, system.objective = interpolants.get(noise), objective
    system.prediction = predictions.get(prediction)
    return system


@pytest.fixture(scope="module")
def plain() -> Any:
    return learner("flow", "velocity", Objective())


@pytest.mark.parametrize("prediction", [*predictions.PREDICTIONS])
@pytest.mark.parametrize("noise", NOISES)
def test_the_least_of_a_loss_is_the_mean_of_the_posterior(noise, prediction, plain):
    """As it is, and whatever times, rows and places count."""
    if (noise, prediction) == ("flow", "eps"):
        pytest.skip("refused: it says nothing at the noisy end")
    plain.interpolant, plain.prediction = interpolants.get(NOISES[noise]), predictions.get(prediction)
    batch = {"latents": mixture((ROWS, 1, SIDE, SIDE)), "captions": ["red circle"] * ROWS}
    generator = torch.Generator().manual_seed(1)
    counts = {
        "weight": torch.rand(ROWS, generator=generator),
        "mask": torch.rand(ROWS, 1, SIDE, SIDE, generator=generator),
    }
    times = Times() if noise == "edm" else Times(kind="logit_normal", mean=-0.5, shift=2.0)
    for plain.objective, more in ((Objective(), {}), (Objective(min_snr_gamma=5.0, times=times), counts)):
        examples = plain.examples(batch | more, generator)
        best = plain.network = Best(plain)
        check(lambda: plain.error(examples)["loss"], best.shares)  # noqa: B023


class Spread(nn.Module):
    """Answers with the noise of normal data of deviation 0.6, and with the variance of the true step back."""

    def __init__(self, system: Any) -> None:
        super().__init__()
        self.model = system.interpolant
        self.shares = torch.zeros(ROWS, 3, dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        sigma = torch.tensor(self.model.sigmas, dtype=torch.float64)[t][:, None, None, None]
        below = torch.tensor([0.0, *self.model.sigmas[:-1]], dtype=torch.float64)[t][:, None, None, None]
        x = x / self.model.input_scale(sigma)
        x0 = 0.36 / (0.36 + sigma**2) * x
        kept, alpha, before = 1 - below**2 / sigma**2, (1 + sigma**2) ** -0.5, (1 + below**2) ** -0.5
        beta = 1 - (alpha / before) ** 2
        small = beta * (1 - before**2) / (1 - alpha**2)  # beta tilde: arXiv:2006.11239, equation 7
        wanted = small + (before * kept) ** 2 * 0.36 * sigma**2 / (0.36 + sigma**2)
        share = (wanted / small).log() / (beta / small).log()
        u = x / (0.36 + sigma**2).sqrt()
        functions = torch.cat([torch.ones_like(u), u**2 - 1, kept * torch.ones_like(u)], dim=1)
        added = torch.einsum("bk,bkhw->bhw", self.shares, functions)[:, None]
        variance = torch.where(below > 0, 2 * share - 1 + added, 0.0)  # the step to data is of bins
        return torch.cat([(x - x0) / sigma, variance], dim=1)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_the_variance_that_is_learned_is_that_of_the_true_step_back(betas):
    noise = VPConfig(betas=betas, first=0.02, last=0.3, steps=12, offset=0, to_zero=True)
    system = learner(noise, "eps", Objective(variance_weight=0.001))
    x0 = 0.6 * torch.randn(ROWS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    examples = system.examples({"latents": x0, "captions": ["red circle"] * ROWS}, torch.Generator().manual_seed(1))
    best = system.network = Spread(system)
    check(lambda: system.error(examples)["bits"], best.shares)


def test_the_least_of_the_first_bound_is_the_moments_of_the_true_step_back():
    """Sohl-Dickstein et al., by mean and deviation at once; the variance of the posterior counts in the second."""
    walk = Trajectory(constant_fraction(20).clamp(1e-3, 1 - 1e-3))
    x0, generator = mixture((ROWS, 1, SIDE, SIDE)), torch.Generator().manual_seed(1)
    t = torch.randint(1, 20, (ROWS,), generator=generator)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    shares = torch.zeros(ROWS, 2 * BASIS, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = walk.alphas[t][:, None, None, None]
        found, variance = posterior(x, alpha.sqrt(), (1 - alpha).sqrt())
        mean, std = walk.posterior(found, x, t)
        of_x0 = walk.posterior(torch.ones_like(x), torch.zeros_like(x), t)[0]
        functions = basis(x, alpha.sqrt(), (1 - alpha).sqrt())
        moved, widened = (torch.einsum("bk,bkhw->bhw", part, functions)[:, None] for part in shares.split(BASIS, 1))
        deviation = (std**2 + of_x0**2 * variance).sqrt()
        return mean + deviation * moved, deviation * widened.exp()

    check(lambda: walk.nats(step, x0, t, eps).mean(), shares)
