"""Solvers against answers known in closed form: a Gaussian mixture whose best denoiser is an integral done by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from limner.errors import UnknownName, UsageError
from limner.sampling import interpolants, samplers, schedules
from limner.sampling.guidance import within
from limner.sampling.interpolants import EDM, Flow, Interpolant, VPConfig, discrete
from limner.sampling.predictions import PREDICTIONS

MEANS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
SPREAD = 0.4
BOTH = [EDM(), Flow()]
VP = discrete(VPConfig())
PAIRS = [
    pytest.param(interpolant, name, id=f"{interpolant.name}-{name}")
    for interpolant in (*BOTH, VP)
    for name in schedules.SCHEDULES
    if interpolant is VP or name not in schedules.TIMED
]


def mixture_denoiser(interpolant: Interpolant):
    """E[x0 | x] when x0 is a mixture of Gaussians of means MEANS and standard deviation SPREAD."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        alpha = interpolant.alpha(sigma)
        variance = alpha**2 * SPREAD**2 + sigma**2
        residual = x[..., None] - alpha * MEANS
        posterior = (SHARES.log() - residual**2 / (2 * variance)).softmax(-1)
        means = MEANS + alpha * SPREAD**2 / variance * residual
        return (posterior * means).sum(-1)

    return denoise


def grid(interpolant: Interpolant, steps: int, low: float = 0.05, high: float = 20.0) -> list[float]:
    """Even in lambda between two finite noise levels, so that no step is cut to first order by an infinite end."""
    ratios = [math.exp(math.log(high) + i / steps * math.log(low / high)) for i in range(steps + 1)]
    return [interpolant.from_ratio(r) for r in ratios]


def begin(interpolant: Interpolant, sigma: float) -> Tensor:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    return x * math.hypot(interpolant.alpha(sigma), sigma)


def order(name: str, interpolant: Interpolant) -> float:
    """log2 of how much the error shrinks when the steps double, against the same solver at very many steps."""
    solve, denoise = samplers.get(name), mixture_denoiser(interpolant)
    ends = {
        n: solve(denoise, begin(interpolant, grid(interpolant, n)[0]), grid(interpolant, n), interpolant)
        for n in (40, 80, 1280)
    }
    errors = [(ends[n] - ends[1280]).abs().max().item() for n in (40, 80)]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("interpolant", BOTH, ids=lambda i: i.name)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("euler", 1), ("ddim", 1), ("heun", 2), ("dpm2", 2), ("dpmpp_2m", 2), ("res_multistep", 2), ("deis", 2)),
        ("rk4", 4),
        ("unipc", 3),  # two, and the corrector's one
    ],
)
def test_a_solver_shows_its_order_on_a_gaussian_mixture(name, expected, interpolant):
    assert order(name, interpolant) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(("interpolant", "schedule"), PAIRS)
def test_euler_is_ddim_without_noise(interpolant, schedule):
    sigmas = schedules.get(schedule)(12, interpolant)
    denoise, x = mixture_denoiser(interpolant), begin(interpolant, sigmas[0])
    one = samplers.euler(denoise, x, sigmas, interpolant)
    other = samplers.ddim(denoise, x, sigmas, interpolant)
    assert (one - other).abs().max() < 1e-12


@pytest.mark.parametrize("interpolant", BOTH, ids=lambda i: i.name)
def test_dopri5_errs_as_much_as_it_is_let(interpolant):
    """And asks more often the less that is."""
    pytest.importorskip("torchdiffeq")
    sigmas, asked = grid(interpolant, 4), []
    denoise, x = mixture_denoiser(interpolant), begin(interpolant, grid(interpolant, 1)[0])
    exact = samplers.rk4(denoise, x, grid(interpolant, 320), interpolant)
    counted = lambda x, sigma: (asked.append(sigma), denoise(x, sigma))[1]  # noqa: E731
    counts, errors = [], []
    for tolerance in (1e-4, 1e-6):
        asked.clear()
        end = samplers.dopri5(counted, x, sigmas, interpolant, rtol=tolerance, atol=tolerance)
        errors.append((end - exact).abs().max().item())
        counts.append(len(asked))
    assert errors[1] < 5e-5 < 5e-4 < errors[0] < 5e-3
    assert counts[0] < counts[1] < 200
    with pytest.raises(UsageError, match=r"rtol=0 and atol=0\.1: give numbers from 0 to 1"):
        samplers.dopri5(denoise, x, sigmas, interpolant, rtol=0, atol=0.1)
    with pytest.raises(UsageError, match="'dopri5' cannot keep rtol=1e-05"):
        samplers.dopri5(lambda x, sigma: x / 0, x, sigmas, interpolant)


@pytest.mark.parametrize("interpolant", [EDM(), Flow(), VP], ids=lambda i: i.name)
def test_an_inverted_picture_comes_back_the_nearer_the_more_steps_there_are(interpolant):
    x0 = torch.tensor([-1.3, -0.8, 0.1, 0.6, 1.4, 2.2], dtype=torch.float64)
    denoise, errors = mixture_denoiser(interpolant), []
    for steps in (40, 80, 160):
        sigmas = [*grid(interpolant, steps), 0.0]
        seen = []
        x = samplers.invert(denoise, x0, sigmas, interpolant, on_step=lambda *done: seen.append(done))  # noqa: B023
        assert seen == [(i, steps + 1) for i in range(1, steps + 2)]
        errors.append((samplers.ddim(denoise, x, sigmas, interpolant) - x0).abs().max().item())
    assert errors[0] < 0.5
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.3)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.3)


def test_a_step_up_takes_eps_at_its_lower_end_and_from_data_at_the_higher():
    flow, x = Flow(), torch.tensor([-1.3, 0.1, 2.2], dtype=torch.float64)
    denoise = mixture_denoiser(flow)
    x0 = denoise(x, 0.2)
    up = samplers.invert(denoise, x, [0.3, 0.2], flow)
    assert (up - (0.7 * x0 + 0.3 * (x - 0.8 * x0) / 0.2)).abs().max() < 1e-12
    up = samplers.invert(denoise, x, [0.3, 0.0], flow)
    assert (up - (0.7 * x + 0.3 * (0.7 * x - 0.7 * denoise(0.7 * x, 0.3)) / 0.3)).abs().max() < 1e-12


@pytest.mark.parametrize(("interpolant", "schedule"), [(EDM(), "karras"), (Flow(), "uniform"), (VP, "trailing")])
def test_steps_inverted_by_iteration_are_undone_exactly(interpolant, schedule):
    """Also that from sigma = 0, and that to alpha = 0; without iteration they are not."""
    x0 = torch.tensor([-1.3, -0.8, 0.1, 0.6, 1.4, 2.2], dtype=torch.float64)
    sigmas, denoise = schedules.get(schedule)(50, interpolant), mixture_denoiser(interpolant)
    x = samplers.invert(denoise, x0, sigmas, interpolant, iterations=200, tolerance=1e-12)
    assert (samplers.ddim(denoise, x, sigmas, interpolant) - x0).abs().max() < 1e-6
    plain = samplers.invert(denoise, x0, sigmas, interpolant)
    assert (samplers.ddim(denoise, plain, sigmas, interpolant) - x0).abs().max() > 1e-3
    with pytest.raises(UsageError, match="is not inverted after 1 iterations: ask for more"):
        samplers.invert(denoise, x0, sigmas, interpolant, iterations=1, tolerance=1e-12)


def test_flow_euler_follows_the_velocity():
    """x + (t' - t) * velocity, with the velocity from the network's own definition eps - x0."""
    flow, sigmas = Flow(), schedules.uniform(10, Flow())
    denoise, x = mixture_denoiser(Flow()), begin(Flow(), 1.0)
    by_hand = x
    for t, following in itertools.pairwise(sigmas):
        x0 = denoise(by_hand, t)
        eps = (by_hand - (1 - t) * x0) / t
        by_hand = by_hand + (following - t) * (eps - x0)
    assert (samplers.get("flow_euler")(denoise, x, sigmas, flow) - by_hand).abs().max() < 1e-12


def test_euler_in_edm_and_in_flow_coordinates_walk_the_same_path():
    """First order is free of the coordinate: x_flow = x_edm / (1 + ratio) at every step."""
    edm, flow = EDM(), Flow()
    edm_sigmas, flow_sigmas = grid(edm, 20), grid(flow, 20)
    x = begin(edm, edm_sigmas[0])
    one = samplers.euler(mixture_denoiser(edm), x, edm_sigmas, edm)
    other = samplers.euler(mixture_denoiser(flow), x / (1 + edm_sigmas[0]), flow_sigmas, flow)
    assert (one / (1 + edm_sigmas[-1]) - other).abs().max() < 1e-12


def drawn_twice(solver, interpolant, sigmas, **kwargs):
    generator = torch.Generator().manual_seed(5)
    x = begin(interpolant, sigmas[0])
    noise = lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return solver(mixture_denoiser(interpolant), x, sigmas, interpolant, noise=noise, **kwargs)


def test_euler_ancestral_is_ddpm_with_the_smaller_variance():
    """Against the posterior mean and variance of DDPM (arXiv:2006.11239, equations 6 and 7), in VP coordinates."""
    edm = EDM()
    sigmas = schedules.karras(10, edm)
    denoise, generator = mixture_denoiser(edm), torch.Generator().manual_seed(5)
    x = begin(edm, sigmas[0])
    for sigma, following in itertools.pairwise(sigmas):
        bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + following**2)
        alpha, state = bar / bar_next, x * math.sqrt(bar)
        x0 = denoise(x, sigma)
        mean = (
            math.sqrt(bar_next) * (1 - alpha) / (1 - bar) * x0 + math.sqrt(alpha) * (1 - bar_next) / (1 - bar) * state
        )
        variance = (1 - bar_next) / (1 - bar) * (1 - alpha)
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64) if following > 0 else 0.0
        x = (mean + math.sqrt(variance) * z) / math.sqrt(bar_next)
    assert (drawn_twice(samplers.euler_ancestral, edm, sigmas) - x).abs().max() < 1e-12
    assert (drawn_twice(samplers.ddim, edm, sigmas, eta=1.0) - x).abs().max() < 1e-12


@pytest.mark.parametrize("interpolant", BOTH, ids=lambda i: i.name)
def test_dpmpp_2m_is_its_sde_without_noise(interpolant):
    sigmas = schedules.get("uniform")(12, interpolant)
    one = drawn_twice(samplers.dpmpp_2m, interpolant, sigmas)
    other = drawn_twice(samplers.dpmpp_2m_sde, interpolant, sigmas, eta=0.0)
    assert (one - other).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "more"),
    [("euler_a", {}), ("ddpm_large", {}), ("dpmpp_2m_sde", {}), ("restart", {}), ("heun", {"churn": 40.0})],
)
def test_a_stochastic_solver_keeps_the_variance_of_a_gaussian(name, more):
    """Data N(0, 1) has x0 = x * alpha / (alpha^2 + sigma^2); samples must come out with variance 1, but for the bias of
    400 steps, which is first order for `euler_a` (0.054 at 100 steps)."""
    flow = Flow()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return x * flow.alpha(sigma) / (flow.alpha(sigma) ** 2 + sigma**2)

    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20_000, generator=generator, dtype=torch.float64)  # noqa: E731
    end = samplers.get(name)(denoise, draw(), schedules.uniform(400, flow), flow, noise=draw, **more)
    assert end.var().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("interpolant", [Flow(), VP], ids=lambda i: i.name)
@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_every_solver_reports_each_step_and_ends_on_the_data(name, interpolant):
    if name == "tcd" and interpolant is not VP:
        with pytest.raises(UsageError, match="'tcd' counts timesteps"):
            samplers.tcd(lambda x, s: x, torch.ones(4), [1.0, 0.0], interpolant)
        return
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")
    seen = []
    target = torch.full((4,), 0.25, dtype=torch.float64)
    noise = lambda: torch.ones(4, dtype=torch.float64)  # noqa: E731
    end = samplers.get(name)(
        lambda x, s: target,
        noise(),
        schedules.plan("trailing" if interpolant is VP else "uniform", "", 6, interpolant),
        interpolant,
        noise=noise,
        on_step=lambda d, n: seen.append((d, n)),
    )
    assert (end - target).abs().max() < (1e-6 if name == "lcm" else 1e-12)  # which keeps a trace of x
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(("interpolant", "name"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 16, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_schedule_falls_from_its_top_to_zero(name, interpolant, steps):
    steps = min(steps, {"lcm": 50, "hyper": 800}.get(name, steps))
    sigmas = schedules.get(name)(steps, interpolant)
    assert len(sigmas) == steps + 1 or (name, steps) == ("beta", 1000)
    assert sigmas[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    if name not in ("leading", "ddim_uniform", "hyper") and (name, steps) != ("linspace", 1):
        assert sigmas[0] == pytest.approx(interpolant.sigma_max, rel=0.01)


@pytest.mark.parametrize("name", schedules.TIMED)
def test_a_schedule_of_timesteps_is_refused_where_there_are_none_or_too_few(name):
    with pytest.raises(UsageError, match=f"'{name.removesuffix('_xl').replace('sgm_uniform', 'normal')}' counts time"):
        schedules.plan(name, "euler", 10, Flow())
    with pytest.raises(UsageError, match="has 1000 timesteps at most"):
        schedules.plan(name, "euler", 1001, VP)


def test_karras_has_the_published_values():
    """sigma_max 80, sigma_min 0.002, rho 7, n 3: the middle is ((80^(1/7) + 0.002^(1/7)) / 2)^7."""
    assert schedules.karras(3, EDM()) == pytest.approx([80, 2.5152, 0.002, 0], rel=1e-3)


def test_strength_walks_the_tail_of_the_schedule():
    sigmas = schedules.uniform(10, Flow())
    assert schedules.from_strength(sigmas, 0.6) == sigmas[4:]
    assert schedules.from_strength(sigmas, 1.0) == sigmas
    assert len(schedules.from_strength(sigmas, 0.001)) == 2


@pytest.mark.parametrize("interpolant", BOTH, ids=lambda i: i.name)
@pytest.mark.parametrize("name", sorted(PREDICTIONS))
def test_a_prediction_of_the_target_gives_x0_back(name, interpolant):
    prediction, sigma = PREDICTIONS[name], 0.37
    x0, eps = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha = interpolant.alpha(sigma)
    x = interpolant.mix(x0, eps, sigma)
    output = prediction.target(x0, eps, alpha, sigma)
    if name == "velocity" and interpolant.name == "edm":
        pytest.skip("velocity is defined on the flow interpolant")
    assert (prediction.to_x0(output, x, alpha, sigma) - x0).abs().max() < 1e-12
    assert (prediction.from_x0(x0, x, alpha, sigma) - output).abs().max() < 1e-12


@pytest.mark.parametrize("interpolant", BOTH, ids=lambda i: i.name)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5)])
def test_guidance_acts_inside_its_interval_alone(interpolant, low, high):
    answer = {True: torch.tensor(9.0), False: torch.tensor(3.0)}
    asked = []

    def told(guided):
        return lambda x, sigma: (asked.append(guided), answer[guided])[1]

    denoise = within((low, high), told(True), told(False), interpolant)
    for level in (1.0, 0.875, 0.75, 0.5, 0.25, 0.125):
        sigma = interpolant.sigma_max if level == 1 else interpolant.from_ratio(level / (1 - level))
        inside = low < level <= high
        assert denoise(torch.zeros(1), sigma) == answer[inside]
        assert asked.pop() is inside
        assert asked == []


@pytest.mark.parametrize(
    ("module", "wrong", "nearest"),
    [(samplers, "eulr", "euler"), (schedules, "karas", "karras"), (interpolants, "flwo", "flow")],
)
def test_an_unknown_name_gets_the_nearest(module, wrong, nearest):
    with pytest.raises(UnknownName, match=nearest):
        module.get(wrong)
