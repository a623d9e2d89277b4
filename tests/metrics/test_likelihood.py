"""Likelihoods against what is known in closed form, and DDPM's bound against its formulas in its own coordinates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from limner.errors import MissingExtra, UsageError
from limner.metrics.likelihood import flow_bits, log_density, variational_bits
from limner.sampling import interpolants, odes
from limner.sampling.bounds import BIN, discretized
from limner.sampling.interpolants import EDM, EDMConfig, Flow, Interpolant, SDEConfig, VPConfig

MEANS, SHARES, SPREAD = (torch.tensor(row, dtype=torch.float64) for row in ([-0.5, 0.2, 0.6], [0.3, 0.5, 0.2], [0.15]))
VP = interpolants.get(VPConfig(betas="linear", first=0.0001, last=0.02))
INTERPOLANTS = [EDM(), Flow(), VP, *(interpolants.get(SDEConfig(kind=kind)) for kind in ("vp", "subvp", "ve"))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(interpolant: Interpolant):
    """E[x0 | x] of entries that are each a mixture of Gaussians."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        alpha = interpolant.alpha(sigma)
        variance = alpha**2 * SPREAD**2 + sigma**2
        residual = x[..., None] - alpha * MEANS
        posterior = (SHARES.log() - residual**2 / (2 * variance)).softmax(-1)
        return (posterior * (MEANS + alpha * SPREAD**2 / variance * residual)).sum(-1)

    return denoise


def true_log_density(x: Tensor) -> Tensor:
    """(b,) in nats."""
    each = SHARES.log() - ((x[..., None] - MEANS) / SPREAD) ** 2 / 2 - SPREAD.log() - math.log(2 * math.pi) / 2
    return each.logsumexp(-1).flatten(1).sum(1)


def true_bits(images: Tensor) -> Tensor:
    """(b,) bits per dimension, by the probability of each bin."""
    edges = ((images[..., None] + BIN / 2 * torch.tensor([-1.0, 1.0]))[..., None] - MEANS) / SPREAD
    inside = (SHARES * torch.special.ndtr(edges).diff(dim=-2).squeeze(-2)).sum(-1)
    return -inside.log2().flatten(1).mean(1)


def drawn(count: int, size: int = 8) -> Tensor:
    """Data (b, 1, h, w) of the mixture."""
    draws = generator(7)
    which = torch.multinomial(SHARES, count * size * size, replacement=True, generator=draws)
    x = MEANS[which] + SPREAD * torch.randn(len(which), generator=draws, dtype=torch.float64)
    return x.view(count, 1, size, size)


def pictures(count: int, size: int = 8) -> Tensor:
    """Such data in 8 bits."""
    return ((drawn(count, size).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


# ------------------------------------------------------------------------------------------------- the bound


def steps(count: int) -> interpolants.Discrete:
    """The same noise in fewer steps."""
    places = torch.linspace(0, len(VP.sigmas) - 1, count).round().int().tolist()
    return replace(VP, sigmas=tuple(VP.sigmas[k] for k in places))


def right(sigma: float) -> Tensor:
    """Of the variances between DDPM's two, that of data which spread far wider than the noise of most steps."""
    return torch.ones(1, dtype=torch.float64)


def test_the_bound_lies_above_the_entropy_by_a_gap_that_shrinks_with_the_steps():
    """A perfect model pays for its steps alone."""
    images = pictures(4, 32)
    truth = true_bits(images).mean().item()
    gaps = [
        variational_bits(mixture(VP), images, steps(n), generator(), variance=right, clip=False).total.mean().item()
        - truth
        for n in (25, 50, 100)
    ]
    assert gaps[0] > 1.5 * gaps[1] > 1.5**2 * gaps[2] > 0


def test_a_perfect_model_of_all_steps_costs_the_entropy():
    images = pictures(4, 24)
    found = variational_bits(mixture(VP), images, VP, generator(), variance=right, clip=False)
    assert found.total.mean().item() == pytest.approx(true_bits(images).mean().item(), abs=0.03)
    assert found.terms.shape == (4, 1000)


def test_every_tenth_term_estimates_the_sum_of_all():
    images = pictures(4)
    whole = variational_bits(mixture(VP), images, VP, generator(), clip=False)
    part = variational_bits(mixture(VP), images, VP, generator(1), every=10, clip=False)
    assert len(part.times) == len(part.weights) == part.terms.shape[1] == 110
    assert (part.times[9:13], part.weights[9:13], sum(part.weights)) == ([9, 10, 16, 26], [1, 1, 10, 10], 1000)
    assert part.total.mean().item() == pytest.approx(whole.total.mean().item(), rel=0.02)


def wavy(x: Tensor, sigma: float) -> Tensor:
    """A denoiser that is not right, in part beyond [-1, 1]."""
    return x / (1 + sigma**2) + 0.4 * torch.sin(9 * x / (1 + sigma))


def shares(sigma: float) -> Tensor:
    """A learned variance, of all sizes, unlike at each level and place."""
    return (torch.arange(64, dtype=torch.float64).view(1, 8, 8) * 0.7 + sigma).sin() / 2 + 0.5


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large", shares], ids=["small", "large", "learned"])
def test_the_bound_is_that_of_the_papers_formulas(variance, clip):
    """In DDPM's coordinates, with numpy, from arXiv:2006.11239, equations 6, 7 and 13, and arXiv:2102.09672, equation
    15, as guided-diffusion's code clips and starts them."""
    model, images = interpolants.get(VPConfig(betas="cosine", steps=12)), pictures(3)
    x0, draws, bits = images.numpy(), generator(5), math.log(2) * 64
    bars = np.array([1 / (1 + s * s) for s in model.sigmas])
    before = np.append(1.0, bars[:-1])
    betas = 1 - bars / before
    tilde = betas * (1 - before) / (1 - bars)
    least = np.log(np.append(tilde[1], tilde[1:]))
    total = []
    for t in range(12):
        eps = torch.randn(images.shape, generator=draws).numpy().astype(np.float64)
        x = np.sqrt(bars[t]) * x0 + np.sqrt(1 - bars[t]) * eps
        guess = wavy(torch.from_numpy(x / np.sqrt(bars[t])), model.sigmas[t]).numpy()
        guess = guess.clip(-1, 1) if clip else guess
        means = [
            np.sqrt(before[t]) * betas[t] / (1 - bars[t]) * one
            + np.sqrt(1 - betas[t]) * (1 - before[t]) / (1 - bars[t]) * x
            for one in (x0, guess)
        ]
        v = variance(model.sigmas[t]).numpy() if callable(variance) else float(variance == "large" and t > 0)
        log = v * np.log(betas[t]) + (1 - v) * least[t]
        if t:
            kl = 0.5 * (log - least[t] + np.exp(least[t] - log) + (means[0] - means[1]) ** 2 / np.exp(log) - 1)
        else:
            low, high = ((x0 + sign / 255 - means[1]) / np.exp(log / 2) for sign in (-1, 1))
            low, high = np.where(x0 < -0.999, -99, low), np.where(x0 > 0.999, 99, high)
            cdf = lambda z: torch.special.ndtr(torch.from_numpy(z)).numpy()  # noqa: E731
            inside = np.where(low > 0, cdf(-low) - cdf(-high), cdf(high) - cdf(low))
            kl = -np.log(inside)
        total.append(kl.reshape(3, -1).sum(1) / bits)
    prior = 0.5 * (-1 - np.log(1 - bars[-1]) + 1 - bars[-1] + bars[-1] * x0**2)
    ours = variational_bits(wavy, images, model, generator(5), variance=variance, clip=clip)
    assert np.isfinite(total).all()
    assert ours.terms.numpy() == pytest.approx(np.stack(total, 1), rel=1e-9)
    assert ours.prior.numpy() == pytest.approx(prior.reshape(3, -1).sum(1) / bits, rel=1e-9)
    assert ours.total.numpy() == pytest.approx(np.sum(total, 0) + prior.reshape(3, -1).sum(1) / bits, rel=1e-9)


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.3), (-0.99, 0.01), (1.3, 0.02), (0.0, 5.0)])
def test_the_decoder_shares_out_one_over_256_values(mean, deviation):
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    found = discretized(
        values, torch.tensor(mean, dtype=torch.float64), torch.tensor(2 * math.log(deviation), dtype=torch.float64)
    )
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-6)
    draws = mean + deviation * torch.randn(200_000, generator=generator(), dtype=torch.float64)
    counted = torch.bincount(((draws.clamp(-1, 1) + 1) * 127.5).round().long(), minlength=256) / len(draws)
    assert (found.exp() - counted).abs().max() < 0.004
    assert found.isfinite().all()  # however far away


def test_a_picture_far_from_its_mean_costs_what_the_tail_does():
    """60 deviations away, by the first terms of the normal tail's series at the near end of the bin."""
    near = (0.6 - BIN / 2) / 0.01
    by_hand = -(near**2) / 2 - math.log(near * math.sqrt(2 * math.pi)) + math.log1p(-(near**-2) + 3 * near**-4)
    far = torch.tensor([0.6, -0.6], dtype=torch.float64)
    found = discretized(far, torch.zeros(2, dtype=torch.float64), torch.tensor(2 * math.log(0.01), dtype=torch.float64))
    assert found.tolist() == pytest.approx([by_hand] * 2, rel=1e-9)


# ------------------------------------------------------------------------------------------------- the flow


@pytest.mark.parametrize(
    "interpolant",
    [i if i.name in ("flow", "vp", "sde_ve") else pytest.param(i, marks=pytest.mark.slow) for i in INTERPOLANTS],
    ids=lambda i: i.name,
)
def test_the_flow_has_the_density_of_a_mixture_in_any_interpolant(interpolant):
    """The entries do not depend on one another, so that Hutchinson's signs are exact. Noise alone has no mean, which
    data of a mean of 0.07 keep a little of, under noise of 50 the most."""
    x = drawn(4, 4)
    found = log_density(mixture(interpolant), x, interpolant, generator(), solver="rk4", steps=80)
    assert (found.log - true_log_density(x)).abs().max() / 16 < {"flow": 5e-4, "sde_ve": 2e-3}.get(
        interpolant.name, 1e-3
    )
    assert found.evaluations == 320


@pytest.mark.parametrize("interpolant", [pytest.param(Flow(), marks=pytest.mark.slow), VP], ids=lambda i: i.name)
def test_dopri5_finds_the_density_by_its_tolerances(interpolant):
    pytest.importorskip("torchdiffeq")
    x = drawn(4, 2)
    fine, coarse = (
        log_density(mixture(interpolant), x, interpolant, generator(), trace="exact", rtol=tol, atol=tol)
        for tol in (1e-5, 1e-2)
    )
    assert (fine.log - true_log_density(x)).abs().max() / 4 < 1e-3
    assert coarse.evaluations < fine.evaluations < 500


ROOT = torch.randn(6, 6, generator=generator(3), dtype=torch.float64) / 3
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(6, dtype=torch.float64)


def correlated(interpolant: Interpolant):
    """E[x0 | x] of N(0, COVARIANCE) over the six entries of a row."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        alpha = interpolant.alpha(sigma)
        gain = torch.linalg.solve(
            alpha**2 * COVARIANCE + sigma**2 * torch.eye(6, dtype=torch.float64), alpha * COVARIANCE
        )
        return (x.flatten(1) @ gain).view_as(x)

    return denoise


@pytest.mark.parametrize(
    "interpolant",
    [
        Flow(),
        pytest.param(interpolants.get(EDMConfig()), marks=pytest.mark.slow),
        pytest.param(VP, marks=pytest.mark.slow),
    ],
    ids=lambda i: i.name,
)
def test_hutchinsons_estimate_is_right_on_average_and_exact_where_it_is_told_to_be(interpolant):
    normal = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), COVARIANCE)
    x = normal.sample().view(1, 1, 2, 3)
    truth = normal.log_prob(x.flatten()).item()
    how = {"solver": "rk4", "steps": 40}
    exact = log_density(correlated(interpolant), x, interpolant, generator(), trace="exact", **how)
    assert exact.log.item() == pytest.approx(truth, abs=1e-3)
    for trace in ("rademacher", "gaussian"):  # one picture, 2000 draws
        many = log_density(
            correlated(interpolant), x.repeat(2000, 1, 1, 1), interpolant, generator(), trace=trace, **how
        )
        error = many.log.std().item() / 2000**0.5
        assert abs(many.log.mean().item() - truth) < 4 * error
        assert 0.001 < error < 1
    some = log_density(correlated(interpolant), x.repeat(500, 1, 1, 1), interpolant, generator(), probes=8, **how)
    one = log_density(correlated(interpolant), x.repeat(500, 1, 1, 1), interpolant, generator(), **how)
    assert one.log.var().item() / some.log.var().item() == pytest.approx(8, rel=0.4)


def test_bits_of_the_flow_are_the_entropy_of_a_perfect_model():
    """But for what even noise in a bin costs, a little here, where a bin is a twentieth of the deviation."""
    images, seen = pictures(6), []
    denoise = lambda x, sigma: (seen.append(x.detach()), mixture(Flow())(x, sigma))[1]  # noqa: E731
    found = flow_bits(denoise, images, Flow(), generator(), solver="rk4", steps=80)
    within = (seen[0] / Flow().alpha(Flow().from_ratio(1e-3)) - images) / BIN
    assert (within.min().item(), within.max().item()) == (pytest.approx(-0.5, abs=0.01), pytest.approx(0.5, abs=0.01))
    assert found.bits.mean().item() == pytest.approx(true_bits(images).mean().item(), abs=2e-3)
    assert found.bits.shape == (6,)


def test_heun_is_of_second_order_and_rk4_of_fourth():
    x, flow = drawn(1, 2), Flow()
    for solver, expected in (("heun", 2), ("rk4", 4)):
        ends = [log_density(mixture(flow), x, flow, generator(), solver=solver, steps=n).log for n in (30, 60, 240)]
        assert math.log2(abs(ends[0] - ends[2]) / abs(ends[1] - ends[2])) == pytest.approx(expected, abs=0.4)


def test_what_has_no_likelihood_is_refused_in_a_line(monkeypatch):
    images = pictures(1)
    with pytest.raises(UsageError, match="counts timesteps, which this model does not have"):
        variational_bits(wavy, images, Flow(), generator())
    with pytest.raises(UsageError, match="variance is 'middle' and it takes every 0-th timestep of 1000"):
        variational_bits(wavy, images, VP, generator(), variance="middle", every=0)
    for wrong in (images * 0.99, images * 2 + 5):
        with pytest.raises(UsageError, match="bits are counted of pictures of 8 bits"):
            flow_bits(wavy, wrong, Flow(), generator())
    with pytest.raises(UsageError, match="no density is found by solver 'dopri8'"):
        log_density(wavy, images, Flow(), generator(), solver="dopri8")
    with pytest.raises(UsageError, match="lowest is 0, give one between"):
        log_density(wavy, images, Flow(), generator(), lowest=0)
    with pytest.raises(UsageError, match="gives no gradient"):
        log_density(lambda x, s: x.detach(), images, Flow(), generator(), solver="heun")
    monkeypatch.setattr(odes, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"the solver 'dopri5' needs the package 'torchdiffeq': pip install 'limner\[eval\]'"
    ):
        log_density(wavy, images, Flow(), generator())


@pytest.mark.parametrize("interpolant", [Flow(), interpolants.get(EDMConfig()), VP], ids=lambda i: i.name)
def test_bits_of_the_flow_with_noise_of_its_end_are_no_fewer_than_the_entropy_whatever_the_model(interpolant):
    """Of pixels of three values, as icons on white have them: uniform noise is not what is known at the end, where that
    is noise of more than a bin."""
    values, shares = torch.tensor([255.0, 100.0, 180.0]) / 127.5 - 1, torch.tensor([0.8, 0.1, 0.1])

    def denoise(x: Tensor, sigma: float) -> Tensor:
        alpha = interpolant.alpha(sigma)
        far = (x[..., None] - alpha * values.to(x)) ** 2 / (2 * sigma**2)
        return (shares.to(x).log() - far).softmax(-1) @ values.to(x)

    picked = torch.multinomial(shares, 512, replacement=True, generator=generator())
    images = values[picked].view(1, 1, 16, 32)
    entropy = -shares.log2()[picked].mean().item()
    how = {"solver": "rk4", "steps": 100, "lowest": 1e-2}
    found = flow_bits(denoise, images.double(), interpolant, generator(), noise="gaussian", **how).bits.item()
    white, within = (picked == 0).float().mean().item(), math.erf(BIN / 2 / 0.01 / 2**0.5)
    beyond = (1 + within) / 2  # the last bin has no end
    lost = -white * math.log2(beyond) - (1 - white) * math.log2(within)
    assert found == pytest.approx(entropy + lost, abs=3e-3)  # EDM's data is seen through the most noise
