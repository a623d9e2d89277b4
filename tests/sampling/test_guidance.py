"""Ways of guidance against known answers and against those of diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg

from limner.errors import UnknownName, UsageError
from limner.sampling import interpolants
from limner.sampling.guidance import (
    Guidance,
    classified,
    classifier_free,
    combining,
    composed,
    guided,
    mimicking,
    projected,
    rescaled,
    zero_star,
)
from limner.sampling.interpolants import EDMConfig, SDEConfig, VPConfig
from limner.sampling.predictions import PREDICTIONS

VP = interpolants.get(VPConfig())
FLOW = interpolants.get("flow")
KINDS = [("eps", VP), ("v", VP), ("velocity", FLOW)]
SIGMA = 0.6


def latents(*seeds: int) -> list[torch.Tensor]:
    return [
        torch.randn(2, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]


def test_guidance_extrapolates_from_the_negative_to_the_prompt():
    denoise = guided(lambda x, s: (torch.tensor(3.0), torch.tensor(1.0)), classifier_free(4.0))
    assert denoise(torch.zeros(1), 0.5) == 9.0


def test_composed_prompts_of_weight_one_add_up():
    cond, other, uncond = latents(1, 2, 3)
    one = torch.ones(2, dtype=torch.float64)
    assert torch.allclose(composed([cond], [one], uncond), cond)
    assert torch.allclose(composed([cond, other], [one, 0.5 * one], uncond), cond + 0.5 * (other - uncond))


def test_projected_guidance_is_that_of_diffusers_over_several_steps():
    buffer, combine = MomentumBuffer(-0.5), projected(7.0, most=0.4)
    for k in range(3):
        cond, uncond, x = latents(3 * k, 3 * k + 1, 3 * k + 2)
        most = 0.4 * cond[0].numel() ** 0.5
        wanted = normalized_guidance(cond, uncond, 6.0, buffer, 0.0, most, use_original_formulation=True)
        assert (combine(cond, uncond, x, SIGMA) - wanted).abs().max() < 1e-12


def test_projected_guidance_adds_nothing_along_the_prompt():
    cond, uncond, x = latents(1, 2, 3)
    added = projected(7.0)(cond, uncond, x, SIGMA) - cond
    assert (added * cond).sum().abs() < 1e-10 < added.abs().max()


@pytest.mark.parametrize(("name", "interpolant"), KINDS)
def test_cfg_zero_star_is_that_of_diffusers_after_a_first_step_of_nothing(name, interpolant):
    prediction, alpha = PREDICTIONS[name], interpolant.alpha(SIGMA)
    told, other, x = latents(1, 2, 3)
    cond, uncond = (prediction.to_x0(out, x, alpha, SIGMA) for out in (told, other))
    combine = zero_star(4.0, prediction, interpolant)
    start = 0.9
    nothing = prediction.from_x0(combine(cond, uncond, x, start), x, interpolant.alpha(start), start)
    assert nothing.abs().max() < 1e-12
    scale = cfg_zero_star_scale(told.flatten(1), other.flatten(1))[..., None, None]
    wanted = other * scale + 4.0 * (told - other * scale)
    found = prediction.from_x0(combine(cond, uncond, x, SIGMA), x, alpha, SIGMA)
    assert (found - wanted).abs().max() < 1e-6  # theirs is in float32


@pytest.mark.parametrize(("name", "interpolant"), KINDS)
def test_rescaled_guidance_is_that_of_diffusers(name, interpolant):
    prediction, alpha = PREDICTIONS[name], interpolant.alpha(SIGMA)
    told, other, x = latents(1, 2, 3)
    cond, uncond = (prediction.to_x0(out, x, alpha, SIGMA) for out in (told, other))
    combine = rescaled(classifier_free(5.0), 0.7, prediction, interpolant)
    wanted = rescale_noise_cfg(other + 5.0 * (told - other), told, 0.7)
    assert (prediction.from_x0(combine(cond, uncond, x, SIGMA), x, alpha, SIGMA) - wanted).abs().max() < 1e-12


def test_mimicked_guidance_keeps_the_range_of_less_of_it_and_the_middle_of_its_own():
    cond, uncond, x = latents(1, 2, 3)
    strong, weak = (classifier_free(scale)(cond, uncond, x, SIGMA) for scale in (20.0, 2.0))
    found = mimicking(classifier_free(20.0), 2.0, share=1.0)(cond, uncond, x, SIGMA)

    def reach(v):
        return (v - v.mean((2, 3), keepdim=True)).abs().amax((2, 3))

    assert torch.allclose(reach(found), reach(weak), rtol=1e-5)
    assert torch.allclose(found.mean((2, 3)), strong.mean((2, 3)))
    same = mimicking(classifier_free(2.0), 20.0, share=1.0)(cond, uncond, x, SIGMA)
    assert torch.allclose(same, weak, rtol=1e-5)


@pytest.mark.parametrize("way", ["cfg", "apg", "cfg_zero"])
def test_every_way_at_scale_one_is_the_prompt_alone(way):
    cond, uncond, x = latents(1, 2, 3)
    combine = combining(Guidance(scale=1.0, way=way, rescale=0.5), PREDICTIONS["eps"], VP)
    combine(cond, uncond, x, 9.0)
    assert (combine(cond, uncond, x, SIGMA) - cond).abs().max() < 1e-10


def test_unknown_ways_and_absurd_amounts_are_refused():
    with pytest.raises(UnknownName, match="Did you mean 'cfg_zero'"):
        Guidance(way="cfg-zero")
    for wrong in ({"rescale": 1.5}, {"rescale": float("nan")}, {"mimic": -1.0}):
        with pytest.raises(UsageError, match="give 0 to 1 and 0 to 100"):
            Guidance(**wrong)


MEANS, SPREADS, SHARES = torch.tensor([[-0.8, 0.5, 0.6], [0.2, 0.4, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
"""Of a mixture of Gaussians, whose components are the classes of its values."""


def of_mixture(alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance of x in each class, and the gain by which x0 follows from x there."""
    variance = (alpha * SPREADS) ** 2 + sigma**2
    return alpha * MEANS, variance, alpha * SPREADS**2 / variance


def log_odds(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """log p(y | x) of values x (b, c, h, w) that are each of a class, in a last axis."""
    mean, variance, _ = of_mixture(alpha, sigma)
    return (SHARES.log() - variance.log() / 2 - (x[..., None] - mean) ** 2 / (2 * variance)).log_softmax(-1)


@pytest.mark.parametrize(
    "interpolant",
    [VP, interpolants.get(EDMConfig()), FLOW, interpolants.get(SDEConfig(kind="ve"))],
    ids=lambda i: i.name,
)
def test_a_classifier_makes_the_denoiser_of_all_that_of_its_class(interpolant):
    """Exactly, at scale 1, where both are known (Bayes)."""

    def denoise(x: torch.Tensor, sigma: float, of: int | None = None) -> torch.Tensor:
        alpha = interpolant.alpha(sigma)
        mean, _, gain = of_mixture(alpha, sigma)
        each = MEANS + gain * (x[..., None] - mean)
        return each[..., of] if of is not None else (log_odds(x, alpha, sigma).exp() * each).sum(-1)

    def likelihood(x: torch.Tensor, ratio: float) -> torch.Tensor:
        norm = math.hypot(1, ratio)
        return log_odds(x, 1 / norm, ratio / norm)[..., 1].sum((1, 2, 3))

    (x,) = latents(1)
    for ratio in (0.05, 0.6, 3.0, 40.0):
        sigma = interpolant.from_ratio(ratio)
        with torch.inference_mode():
            led = classified(denoise, likelihood, 1.0, interpolant, 100.0)(x, sigma)
            half = classified(denoise, likelihood, 0.5, interpolant, 100.0)(x, sigma)
        assert (led - (wanted := denoise(x, sigma, 1))).abs().max() < 1e-9
        assert (half - (wanted + denoise(x, sigma)) / 2).abs().max() < 1e-9
        assert (wanted - denoise(x, sigma)).abs().max() > 0.01


def test_where_nothing_is_left_of_the_picture_a_classifier_still_leads():
    """At the noisy end of a flow, as at the largest ratio that it knows; towards the mean of the class."""
    (x,) = latents(2)
    asked: list[float] = []

    def likelihood(x: torch.Tensor, ratio: float) -> torch.Tensor:
        asked.append(ratio)
        norm = math.hypot(1, ratio)
        return log_odds(x, 1 / norm, ratio / norm)[..., 1].sum((1, 2, 3))

    mean = (SHARES * MEANS).sum()
    led = classified(lambda x, sigma: mean.expand_as(x), likelihood, 1.0, FLOW, 1000.0)(x, 1.0)
    assert asked == [1000.0]
    assert (led - MEANS[1]).abs().max() < 0.01


def test_a_step_of_ddpm_moves_its_mean_by_the_variance_times_the_gradient():
    """Algorithm 1 of arXiv:2105.05233, with the larger variance, but for a root of 1 - beta."""
    (x,) = latents(3)
    high, low = 700, 699
    sigma, below = VP.sigmas[high], VP.sigmas[low]
    kept, before = 1 / (1 + sigma**2), 1 / (1 + below**2)
    beta = 1 - kept / before
    x0 = torch.zeros_like(x)
    slope = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    led = classified(lambda x, sigma: x0, lambda x, ratio: (slope * x).sum((1, 2, 3)), 2.0, VP, 1e3)(x, sigma)
    moved = before**0.5 * beta / (1 - kept) * led
    assert torch.allclose(moved, 2 * beta * slope / (1 - beta) ** 0.5)
