"""Score SDE: its three kinds of noise, predictors and correctors, and variances of DDPM's steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_sde_ve
from torch import Tensor, nn

from limner import catalog, pipeline
from limner.errors import UsageError
from limner.sampling import interpolants, samplers, schedules
from limner.sampling.interpolants import EDM, Flow, SDEConfig, Times

from .test_references import noise
from .test_samplers import MEANS, SHARES, SPREAD, VP, begin, mixture_denoiser

KINDS = ("vp", "subvp", "ve")
SDES = {kind: interpolants.continuous(SDEConfig(kind=kind, floor=1e-3)) for kind in KINDS}
CPU = torch.device("cpu")
FAST = (("pc", "sde_vp"), ("pc", "sde_ve"), ("pc_a", "sde_subvp"))


def moments(kind: str, mean: float, variance: float, until: float) -> tuple[float, float]:
    """Of what dx = f x dt + g dw does to a start (arXiv:2011.13456, equations 9, 11 and 12): m' = f m, v' = 2 f v +
    g^2, by many steps of Runge and Kutta's."""

    def slope(t: float, state: Tensor) -> Tensor:
        beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 / 2 * t * t
        drift = 0.0 if kind == "ve" else -beta / 2
        if kind == "ve":
            squared = (0.01 * 5000**t) ** 2 * 2 * math.log(5000)
        else:
            squared = beta * (1 if kind == "vp" else 1 - math.exp(-2 * integral))
        return torch.stack([drift * state[0], 2 * drift * state[1] + squared])

    state, h = torch.tensor([mean, variance], dtype=torch.float64), until / 400
    for k in range(400):
        t = k * h
        one = slope(t, state)
        two = slope(t + h / 2, state + h / 2 * one)
        three = slope(t + h / 2, state + h / 2 * two)
        state = state + h / 6 * (one + 2 * two + 2 * three + slope(t + h, state + h * three))
    return state[0].item(), state[1].item()


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_marginals_of_an_sde_are_those_of_its_integration(kind, t):
    model = SDES[kind]
    sigma = model.at(torch.tensor(t, dtype=torch.float64)).item()
    own = model.own_scale(sigma)
    mean, variance = moments(kind, 0.7, 0.3, t)
    assert own * 0.7 == pytest.approx(mean, rel=1e-6)
    begun = 0.01**2 if kind == "ve" else 0.0  # of its sigma at t = 0, which the paper leaves out too
    assert own**2 * 0.3 + (own * sigma) ** 2 == pytest.approx(variance + begun, rel=1e-6)
    assert model.clock(sigma) == pytest.approx(t, rel=1e-9)
    assert model.time(sigma) == pytest.approx(math.log(sigma) if kind == "ve" else 999 * t)
    assert model.input_scale(torch.tensor(sigma)).item() == pytest.approx(own)


@pytest.mark.parametrize("kind", KINDS)
def test_an_sde_learns_at_all_times_alike_and_begins_with_its_prior(kind):
    model = interpolants.get(SDEConfig(kind=kind, floor=0.1))
    told, sigma = model.draw(20_000, torch.Generator().manual_seed(0), CPU)
    times = torch.tensor([model.clock(s) for s in sigma.tolist()])
    assert (times.min(), times.max()) == (pytest.approx(0.1, abs=1e-3), pytest.approx(1, abs=1e-3))
    assert times.mean().item() == pytest.approx(0.55, abs=0.005)
    assert told[:9].tolist() == pytest.approx([model.time(s) for s in sigma[:9].tolist()], rel=1e-3)
    low, _ = model.draw(20_000, torch.Generator().manual_seed(0), CPU, Times(kind="logit_normal", mean=-2.0))
    assert low.mean() < told.mean()
    x = model.start(torch.tensor([1.0]), model.sigma_max).item()
    assert x * model.own_scale(model.sigma_max) == pytest.approx(50 if kind == "ve" else 1)


@pytest.mark.parametrize("name", [name for name in schedules.SCHEDULES if name not in schedules.TIMED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_of_an_sde_falls_from_its_last_time_to_zero(kind, name):
    for steps in (1, 2, 100):
        sigmas = schedules.get(name)(steps, SDES[kind])
        assert (len(sigmas), sigmas[-1]) == (steps + 1, 0)
        assert all(a > b for a, b in itertools.pairwise(sigmas))
        assert sigmas[0] == pytest.approx(SDES[kind].sigma_max, rel=0.01)
    if name == "uniform":
        times = [SDES[kind].clock(sigma) for sigma in sigmas[:-1]]
        assert times == pytest.approx(torch.linspace(1, 1e-3, 100).tolist(), rel=1e-4)


def test_auto_is_what_a_model_without_timesteps_can_have():
    edm = interpolants.get(interpolants.EDMConfig())
    for model, usual in ((SDES["vp"], "uniform"), (Flow(), "uniform"), (edm, "karras"), (VP, "leading")):
        assert schedules.settle("auto", "ddim", model) == usual
        assert schedules.settle("kl_optimal", "ddim", model) == "kl_optimal"
    explodes = SDES["ve"]
    assert schedules.settle("auto", "pc", explodes) == "uniform"
    assert schedules.uniform(9, explodes) == pytest.approx(schedules.exponential(9, explodes))
    system = catalog.build(catalog.entry("ve-sde-tiny").config)
    assert pipeline.prepare(system, prompt="red circle", schedule="auto").schedule == "uniform"


def test_noise_that_no_sde_has_is_refused():
    for wrong in ({"beta_min": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"floor": 0.0}, {"beta_max": float("nan")}):
        with pytest.raises(UsageError, match="no SDE has betas"):
            SDEConfig(**wrong)
    with pytest.raises(UsageError, match="'normal' counts timesteps, which this model does not have: take 'uniform'"):
        schedules.get("normal")(5, SDES["vp"])


@pytest.mark.parametrize("corrections", [0, 1, 2])
@pytest.mark.parametrize("name", ["pc", "pc_a"])
@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_predictor_and_corrector_are_the_papers(kind, name, corrections):
    """In their own coordinates, from arXiv:2011.13456, algorithms 2 to 5 and equations 4 and 47, of which a step of
    DDPM with its smaller variance."""
    model = SDES[kind]
    sigmas, draw = schedules.uniform(10, model), noise()
    denoise, start = mixture_denoiser(model), begin(model, sigmas[0])
    x = start * model.own_scale(sigmas[0])
    for sigma, following in itertools.pairwise(sigmas):
        if kind == "vp":
            bar, below = 1 / (1 + sigma**2), 1 / (1 + following**2)
            beta, scale = 1 - bar / below, bar**0.5
        else:
            beta, scale, bar, below = 0.0, 1.0, 1.0, 1.0
        own = sigma * scale

        def score(x: Tensor, sigma=sigma, scale=scale, own=own) -> Tensor:
            return (scale * denoise(x / scale, sigma) - x) / own**2

        for _ in range(corrections):
            g, z = score(x), draw()
            step = 2 * (1 - beta) * (0.16 * z.norm() / g.norm()) ** 2
            x = x + step * g + (2 * step) ** 0.5 * z
        g = score(x)
        if following == 0:
            x = (x + own**2 * g) / scale
        elif kind == "vp" and name == "pc":
            x = (2 - (1 - beta) ** 0.5) * x + beta * g + beta**0.5 * draw()
        elif kind == "vp":
            tilde = beta * (1 - below) / (1 - bar)
            x = (x + beta * g) / (1 - beta) ** 0.5 + tilde**0.5 * draw()
        else:
            room = sigma**2 - following**2
            spread = room if name == "pc" else room * following**2 / sigma**2
            x = x + room * g + spread**0.5 * draw()
    ours = samplers.get(name)(denoise, start, sigmas, model, noise=noise(), corrections=corrections)
    assert (ours - x).abs().max() < 1e-9


def test_predictor_and_corrector_of_a_ve_are_diffusers(monkeypatch):
    theirs = diffusers.ScoreSdeVeScheduler(num_train_timesteps=10, snr=0.16, sigma_max=50.0)
    numbers, ve = noise(), SDES["ve"]
    monkeypatch.setattr(scheduling_sde_ve, "randn_tensor", lambda *_, **__: numbers()[None])
    theirs.set_timesteps(10)
    theirs.set_sigmas(10)
    sigmas = [*theirs.discrete_sigmas.double().tolist()[::-1], 0.0]
    denoise = mixture_denoiser(ve)
    x = y = begin(ve, sigmas[0])
    y = y[None]
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        score = lambda y, sigma=sigma: (denoise(y, sigma) - y) / sigma**2  # noqa: E731
        y = theirs.step_correct(score(y), y, return_dict=False)[0]
        y, end = theirs.step_pred(score(y), t, y, return_dict=False)
    ours = samplers.get("pc")(denoise, x, sigmas, ve, noise=noise())
    assert (ours - end[0]).abs().max() < 1e-5  # they count in float32


def test_each_picture_is_corrected_for_itself():
    ve, z = SDES["ve"], torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    sigmas, denoise = schedules.exponential(5, ve), mixture_denoiser(ve)
    both = samplers.get("pc")(denoise, 50 * z, sigmas, ve, noise=lambda: z)
    one = samplers.get("pc")(denoise, 50 * z[:1], sigmas, ve, noise=lambda: z[:1])
    assert (both[:1] - one).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(
            name, model, id=f"{name}-{model.name}", marks=() if (name, model.name) in FAST else pytest.mark.slow
        )
        for name in ("pc", "pc_a")
        for model in (*SDES.values(), VP, EDM(), Flow())
    ],
)
def test_predictor_and_corrector_draw_what_the_data_are(name, model):
    """The mean and the variance of a mixture, and shares of its parts."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(10_000, generator=generator, dtype=torch.float64)  # noqa: E731
    sigmas = schedules.get("karras" if model.name in ("edm", "sde_ve") else "uniform")(100, model)
    x = samplers.get(name)(mixture_denoiser(model), model.start(draw(), sigmas[0]), sigmas, model, noise=draw)
    mean = (SHARES * MEANS).sum()
    assert x.mean().item() == pytest.approx(mean.item(), abs=0.08)
    assert x.var().item() == pytest.approx((SPREAD**2 + (SHARES * (MEANS - mean) ** 2).sum()).item(), rel=0.08)
    assert (x < -0.25).double().mean().item() == pytest.approx(0.3, abs=0.05)


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] of N(0, 0.36) in EDM's coordinates."""
    return 0.36 / (0.36 + sigma**2) * x


def test_a_learned_variance_keeps_a_gaussian_in_few_steps_where_neither_of_ddpms_does():
    """That of x' given x is the smaller, and what x0 is not known to share^2, share = 1 - (sigma'/sigma)^2."""
    sigmas = schedules.plan("trailing", "ddpm", 8, VP)[:-1]
    after = dict(itertools.pairwise(sigmas))

    def spread(sigma: float) -> Tensor:
        following = after[sigma]
        small, large = samplers.deviations(sigma, following, VP)
        kept, left = 1 - following**2 / sigma**2, 0.36 * sigma**2 / (0.36 + sigma**2)
        right = small**2 + kept**2 * left
        return torch.tensor((math.log(right) / 2 - math.log(small)) / math.log(large / small), dtype=torch.float64)

    ends = {}
    for name, told in (("ddpm", {}), ("ddpm_large", {}), ("learned", {"spread": spread})):
        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(40_000, generator=generator, dtype=torch.float64)  # noqa: B023, E731
        x = math.hypot(0.6, sigmas[0]) * draw()
        end = samplers.get("ddpm" if told else name)(gaussian, x, sigmas, VP, noise=draw, **told)
        ends[name] = end.var().item() - sigmas[-1] ** 2
    assert ends["learned"] == pytest.approx(0.36, abs=0.01)
    assert ends["ddpm"] < 0.33
    assert ends["ddpm_large"] > 0.39


class Knowing(nn.Module):
    """Says what noise lies over the one picture that it knows, by what it is told of the time."""

    def __init__(self, system, picture: Tensor) -> None:
        super().__init__()
        self.config, self.model, self.picture = system.network.config, system.interpolant, picture
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, cond):
        sigma = t.double().exp() if self.model.config.kind == "ve" else self.model.at(t.double() / 999)
        sigma = sigma[:, None, None, None]
        return ((x / self.model.input_scale(sigma) - self.picture) / sigma).float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_system_learns_and_draws_with_an_sde(kind):
    """Of a picture of which a network says all noise without error, the loss is 0, and every sampler draws it."""
    config = catalog.entry("icons-tiny").config
    system = catalog.build(replace(config, interpolant=SDEConfig(kind=kind, floor=1e-3), prediction="eps")).eval()
    picture = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0))
    system.network = Knowing(system, picture)
    batch = {"latents": picture.repeat(16, 1, 1, 1), "captions": ["a fox"] * 16}
    assert float(system.loss(batch, "main", torch.Generator().manual_seed(0))["loss"]) < 1e-3
    for sampler, schedule in (("euler", "uniform"), ("ddpm_large", "uniform"), ("pc", "uniform"), ("pc_a", "karras")):
        request = pipeline.prepare(system, prompt="any", sampler=sampler, schedule=schedule, steps=4, guidance=1.0)
        with torch.inference_mode():
            drawn = system.sample(system.condition(["any"], request), request, pipeline.noise_source([1], "cpu"))
        assert torch.allclose(drawn[0], picture, atol=1e-2), sampler
