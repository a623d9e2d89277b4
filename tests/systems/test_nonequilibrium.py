"""Diffusion as it began: closed forms of Gaussians, numbers by brute force, and what a person can ask of it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from limner import catalog, pipeline, recipes
from limner.data.batches import open_batches
from limner.errors import UsageError
from limner.systems.nonequilibrium import (
    Bound,
    Trajectory,
    bound_in_bits,
    bumps,
    constant_fraction,
    isotropic,
    multiplied,
)

NAME = "sohl-dickstein-2015-tiny"


def built(**changes):
    """A system whose weights are noise."""
    torch.manual_seed(0)
    system = catalog.build(replace(catalog.entry(NAME).config, **changes))
    for p in system.parameters():
        p.data.normal_(std=0.1)
    return system.eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 8) -> torch.Tensor:
    return open_batches(recipes.get(NAME).data, 0, torch.device("cpu")).batch(0, count)["images"]


# ------------------------------------------------------------------ the forward process


def test_each_step_erases_the_same_part_of_the_first_variance():
    steps = 1000
    betas = constant_fraction(steps)
    assert betas[[0, -1]].tolist() == [1 / steps, 1 / 2]
    left = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])
    erased = left[:-1] - left[1:]
    assert torch.allclose(erased, torch.full_like(erased, 1 / steps), rtol=0.01)
    assert left[-1].item() == pytest.approx(1 / steps, rel=0.01)


def test_the_first_beta_has_a_floor_and_a_learned_schedule_begins_as_the_constant_fraction():
    system = built(trajectory=1000, first_beta=0.02)
    system.schedule.data.zero_()
    betas = system.trajectory().betas
    fraction = constant_fraction(1000)
    assert betas[0].item() == pytest.approx(0.02 + 1e-6 + 1e-3 * (1 - 0.020011), rel=1e-9)
    assert torch.allclose(betas[1:], fraction[1:], rtol=1.1e-3)
    system.schedule.data[:5] = 1.0
    moved = system.trajectory().betas
    assert (moved[1:300] > 2 * betas[1:300]).all()
    assert torch.allclose(moved[-50:], betas[-50:], rtol=1e-3)


def test_bumps_are_gaussians_that_sum_to_one():
    found = bumps(100, 10)
    assert torch.allclose(found.sum(1), torch.ones(100, dtype=torch.float64))
    x, centre, width = np.linspace(-1, 1, 100), np.linspace(-1, 1, 10), 1 / 9
    wanted = np.exp(-((x[:, None] - centre) ** 2) / (2 * width**2))
    np.testing.assert_allclose(found, wanted / wanted.sum(1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("t", [1, 5, 19])
def test_the_posterior_of_a_step_is_that_of_numbers_by_brute_force(t):
    """On a fine grid: q(x^(t) | x^(0)) times q(x^(t+1) | x^(t)), normalised."""
    trajectory = Trajectory(constant_fraction(20))
    x0, x = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (0.7, -0.4))
    mean, std = trajectory.posterior(x0, x, torch.tensor([t]))
    grid = np.linspace(-8, 8, 200_001)
    before, beta = np.prod(1 - trajectory.betas[:t].numpy()), trajectory.betas[t].item()
    log = -((grid - before**0.5 * 0.7) ** 2) / (2 * (1 - before)) - (-0.4 - (1 - beta) ** 0.5 * grid) ** 2 / (2 * beta)
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    assert mean.item() == pytest.approx((weight * grid).sum(), abs=1e-9)
    assert std.item() ** 2 == pytest.approx((weight * grid**2).sum() - (weight * grid).sum() ** 2, rel=1e-6)


# ------------------------------------------------------------------ the step back


def test_mean_and_variance_of_a_step_back_are_those_of_the_authors_code():
    system = built(trajectory=50)
    system.network.double()
    x = torch.randn(3, 3, 16, 16, generator=seeded(), dtype=torch.float64)
    t = torch.tensor([1, 20, 49])
    mu, sigma = system.kernel(system.trajectory())(x, t)

    z = system.network(x).detach().numpy()  # two b n c h w
    beta = system.trajectory().betas.detach().numpy()
    for row, at in enumerate(t.tolist()):
        x_at, centres = np.linspace(-1, 1, 50)[at], np.linspace(-1, 1, 10)
        basis = np.exp(-((x_at - centres) ** 2) / (2 * (1 / 9) ** 2))
        basis /= basis.sum()
        mu_coeff, beta_coeff = (np.einsum("nchw,n->chw", z[k, row], basis) for k in range(2))
        wanted = x[row].numpy() * np.sqrt(1 - beta[at]) + mu_coeff * np.sqrt(beta[at])
        np.testing.assert_allclose(mu[row].detach(), wanted, atol=1e-5)
        reverse = 1 / (1 + np.exp(-(beta_coeff / np.sqrt(50) + np.log(beta[at] / (1 - beta[at])))))
        np.testing.assert_allclose(sigma[row].detach() ** 2, reverse, rtol=1e-5)


# ------------------------------------------------------------------ the bound


def back(trajectory: Trajectory, mean: float, variance: float):
    """The step back that is right for data N(mean, variance): p(x^(t) | x^(t+1)) of two Gaussians."""

    def kernel(x, t):
        beta, after = (v[t][:, None, None, None].to(x) for v in (trajectory.betas, trajectory.alphas))
        before = after / (1 - beta)
        m, v = before.sqrt() * mean, before * variance + 1 - before
        gain = (1 - beta).sqrt() * v / ((1 - beta) * v + beta)
        return m + gain * (x - (1 - beta).sqrt() * m), (v * (1 - gain * (1 - beta).sqrt())).sqrt().expand_as(x)

    return kernel


def gaussian_bound(steps: int, mean: float, std: float) -> float:
    """How far the bound is above the entropy. It is quadratic in picture and noise, so that its mean over two values of
    each, a deviation either side of their mean, is that over all of them."""
    trajectory = Trajectory(constant_fraction(steps))
    x0 = mean + std * torch.tensor([1, 1, -1, -1]).double().view(4, 1, 1, 1)
    eps = torch.tensor([1, -1, 1, -1]).double().view(4, 1, 1, 1)
    kernel = back(trajectory, mean, std**2)
    terms = [trajectory.nats(kernel, x0, torch.full((4,), t), eps).mean().item() for t in range(1, steps)]
    return sum(terms) / (steps - 1) - 0.5 * math.log(2 * math.pi * math.e * std**2)


def test_with_the_right_steps_back_the_bound_of_a_normal_distribution_is_its_entropy():
    assert gaussian_bound(30, 0.0, 1.0) == pytest.approx(0, abs=1e-9)
    assert gaussian_bound(300, 0.0, 1.0) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.6), (0.0, 0.9), (-1.0, 1.5)])
def test_with_the_right_steps_back_the_bound_of_any_gaussian_goes_to_its_entropy(mean, std):
    gaps = [gaussian_bound(steps, mean, std) for steps in (50, 100, 200, 400)]
    assert all(gap > 0 for gap in gaps)
    assert all(0.4 < after / before < 0.6 for before, after in pairwise(gaps))  # of the first order in 1 / steps
    assert gaps[-1] < 0.005


def test_with_wrong_steps_back_the_bound_is_worse_and_all_steps_agree_with_some_of_them(monkeypatch):
    system = built(trajectory=20)
    pictures = images(16)
    every = bound_in_bits(system, pictures, seeded(1))
    some = bound_in_bits(system, pictures, seeded(2), steps=10)
    assert (every.steps, some.steps) == (19, 10)
    assert isinstance(some, Bound)
    assert abs(every.bits - some.bits) < 5 * some.error + 0.1
    assert every.bits > every.gaussian
    assert every.gain == every.gaussian - every.bits
    right = system.trajectory()
    monkeypatch.setattr(system, "kernel", lambda trajectory: back(right, 0.0, 1.0))
    normal = bound_in_bits(system, pictures, seeded(1))  # its first beta is in the way of exactness
    assert normal.bits == pytest.approx(normal.gaussian, abs=0.15)


def test_bits_are_of_values_of_8_bits():
    """Noise of +-k levels about grey has an entropy that is known: that of so many values, as good as a density."""
    system = built(mean=0.0, std=0.25)
    levels = torch.randint(96, 160, (64, 4, 16, 16), generator=seeded())
    pictures = levels / 127.5 - 1
    pictures[:, 3] = 1
    x0 = system.prepared(pictures, seeded())
    assert x0.shape == (64, 3, 16, 16)
    assert ((x0 - system.autoencoder.encode(pictures)).abs() * 0.25 * 127.5).max() <= 0.5 + 1e-4
    uniform = 0.5 * math.log2(2 * math.pi * math.e * 64**2 / 12)  # the Gaussian of a uniform variable 64 levels wide
    assert system.in_bits(isotropic(x0)).item() == pytest.approx(uniform, abs=0.01)


def test_the_loss_is_a_fair_draw_of_the_bound():
    system, told = built(trajectory=20), {"images": images(4).repeat(8, 1, 1, 1)}
    with torch.no_grad():
        found = [system.loss(told, "main", seeded(seed)) for seed in range(8)]
    every = bound_in_bits(system, images(4), seeded(1))
    draws = torch.tensor([one["loss"] for one in found])
    assert abs(draws.mean() - every.bits) < 5 * draws.std() / math.sqrt(8) + 0.05
    assert all(one["gain"] == one["gaussian"] - one["loss"] for one in found)


def test_a_learned_schedule_gets_a_gradient_and_a_fixed_one_does_not():
    for learned in (True, False):
        system = built(learned_schedule=learned)
        system.loss({"images": images()}, "main", seeded())["loss"].backward()
        assert (system.schedule.grad is not None and bool(system.schedule.grad.all())) is learned
        assert any(p is system.schedule for p in system.phase_parameters("main")) is learned


# ------------------------------------------------------------------ inpainting


def test_a_step_times_a_gaussian_is_their_normalised_product():
    mean, std, picture = (torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.5, -1.0))
    for deviation in (0.2, 3.0):
        m, s = multiplied(mean, std, picture, torch.tensor([deviation], dtype=torch.float64))
        precision = 1 / 0.25 + 1 / deviation**2
        assert s.item() ** -2 == pytest.approx(precision)
        assert m.item() == pytest.approx((0.3 / 0.25 - 1.0 / deviation**2) / precision)
    held, free = (multiplied(mean, std, picture, torch.tensor([d], dtype=torch.float64)) for d in (0.0, math.inf))
    assert (held[0].item(), held[1].item(), free[0].item(), free[1].item()) == (-1.0, 0.0, 0.3, 0.5)


RHO, KNOWN = 0.8, 1.2


def pair(steps: int, repeats: int):
    """A system of two pixels, N(0, 1) each and correlated, with the right steps back."""
    system = built(trajectory=steps, first_beta=0.0, repeats=repeats)
    covariance = torch.tensor([[1, RHO], [RHO, 1]]).double()

    def kernel(trajectory):
        @lru_cache(maxsize=1)
        def right(t):
            beta = trajectory.betas[t]
            before = trajectory.alphas[t] / (1 - beta)
            v = before * covariance + (1 - before) * torch.eye(2)
            gain = (1 - beta).sqrt() * v @ torch.linalg.inv((1 - beta) * v + beta * torch.eye(2))
            spread = v - gain @ v * (1 - beta).sqrt()
            return gain.T.float(), spread.diag().sqrt().float()  # the model has a variance of each pixel by itself

        def step(x, t):
            gain, std = right(t[0].item())
            return (x.flatten(1) @ gain).view(x.shape), std.view(1, 1, 1, 2)

        return step

    system.schedule.data.zero_()
    system.kernel = kernel
    return system


def painted(steps: int, repeats: int, count: int = 3_000) -> torch.Tensor:
    """The second pixel, where the first is known."""
    generator, shape = seeded(3), (count, 1, 1, 2)
    picture = torch.tensor([KNOWN, 0.0]).view(1, 1, 1, 2).expand(shape)
    deviation = torch.tensor([0.0, math.inf]).view(1, 1, 1, 2)
    draw = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    found = pair(steps, repeats).walk(draw(), steps - 1, draw, picture, deviation)
    assert torch.equal(found[..., 0], picture[..., 0])
    return found[..., 1].flatten()


def test_with_steps_repeated_inpainting_draws_from_the_conditional_of_a_gaussian():
    steps = 100
    found, rho = painted(steps, 20), RHO * (1 - 1 / steps)  # of x^(1), which is what a walk ends at
    assert found.mean().item() == pytest.approx(rho * KNOWN, abs=5 * math.sqrt((1 - rho**2) / len(found)))
    assert found.var().item() == pytest.approx(1 - rho**2, rel=5 * math.sqrt(2 / len(found)))


def test_inpainting_as_published_lags_behind_the_conditional_by_what_its_steps_come_to():
    """Its mean and variance by recursion: x^(t) is held to x^(0), so what is drawn comes late."""
    steps = 200
    found = painted(steps, 1)
    system = pair(steps, 1)
    kernel = system.kernel(system.trajectory())
    mean, variance = 0.0, 1.0
    for t in range(steps - 1, 0, -1):
        at = torch.tensor([t])
        m = [kernel(torch.tensor([[[[a, b]]]]), at)[0][0, 0, 0, 1].item() for a, b in ((KNOWN, 0.0), (0.0, 1.0))]
        std = kernel(torch.zeros(1, 1, 1, 2), at)[1][0, 0, 0, 1].item()
        mean, variance = m[0] + m[1] * mean, m[1] ** 2 * variance + std**2
    assert found.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / len(found)))
    assert found.var().item() == pytest.approx(variance, rel=0.05)
    assert 0.7 * RHO * KNOWN < mean < 0.95 * RHO * KNOWN


def test_a_mask_keeps_the_known_pixels_at_every_step_and_hides_the_others():
    system = built(trajectory=6)
    request = SimpleNamespace(width=16, height=16, strength=1.0, on_step=None)
    start, paint = torch.randn(2, 3, 16, 16, generator=seeded()), torch.zeros(2, 1, 16, 16)
    paint[..., 8:] = 1
    noise = lambda seed: pipeline.noise_source([seed, seed + 1], "cpu")  # noqa: E731
    with torch.no_grad():
        found = system.sample(None, request, noise(1), start, paint)
        hidden = system.sample(None, request, noise(1), torch.where(paint > 0, 5.0, start), paint)
        free = system.sample(None, request, noise(1))
    assert torch.equal(found[..., :8], start[..., :8])
    assert torch.equal(found, hidden)
    assert not torch.allclose(found[..., 8:], free[..., 8:], atol=1e-3)


# ------------------------------------------------------------------ a person's requests


def test_it_draws_without_words_and_again_from_what_a_picture_remembers():
    system = built(trajectory=8)
    one, two = pipeline.generate(system, "", seed=3, batch=2)
    again = {k: v for k, v in two.settings.items() if k not in ("limner", "model")}
    assert pipeline.generate(system, **again)[0].image.tobytes() == two.image.tobytes() != one.image.tobytes()
    assert (two.settings["steps"], two.settings["prompt"]) == (8, "")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": "a fox"}, f"{NAME} reads no words, it draws what it learned to: leave the prompt out"),
        ({"prompt": "", "negative": "a fox"}, "reads no words"),
        ({"prompt": "", "steps": 4}, "walks all of its 8 steps back, and nothing leads it: leave steps out"),
        ({"prompt": "", "sampler": "heun", "guidance": 3.0}, "leave guidance and sampler out"),
        ({"prompt": "", "tile": 16}, "leave tile out"),
        ({"prompt": "", "width": 32}, "width is 32"),
    ],
)
def test_what_it_cannot_do_is_one_line(asked, said):
    with pytest.raises(UsageError, match=said):
        pipeline.prepare(built(trajectory=8), **asked)


def test_a_little_strength_keeps_a_picture():
    system = built(trajectory=40)
    red = Image.new("RGB", (16, 16), (220, 30, 30))

    def distance(strength: float) -> float:
        found = pipeline.generate(system, "", image=red, strength=strength, seed=0)[0].image
        return float(np.abs(np.asarray(found, dtype=float) - np.asarray(red)).mean())

    assert distance(0.05) < distance(1.0) / 2


def test_grey_pictures_are_drawn_grey_and_colours_averaged():
    config = catalog.entry(NAME).config
    system = built(network=replace(config.network, channels=1), trajectory=5)
    found = pipeline.generate(system, "", seed=0)[0].image
    assert found.mode == "RGB"
    assert len({channel.tobytes() for channel in found.split()}) == 1
    pixel = torch.tensor([0.5, -0.25, 0.5, 1.0]).view(1, 4, 1, 1).expand(1, 4, 16, 16)
    assert system.decode(system.encode(pixel)).unique().item() == pytest.approx(0.25, abs=1e-6)


def test_a_run_draws_and_edits_by_its_folder(limner, here):
    few = ("steps=4", "batch_size=4", "log_every=2", "system.trajectory=6", "sample_prompts=[]")
    done = limner("train", NAME, "-o", "run", "--device", "cpu", *few)
    assert done.code == 0, done.err
    assert limner("generate", "-m", "run", "-s", 1, "-o", "drawn.png").code == 0
    drawn = Image.open("drawn.png")
    assert (drawn.size, drawn.mode) == ((16, 16), "RGB")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save("mask.png")
    asked = ("edit", "drawn.png", "", "--mask", "mask.png", "--mask-blur", 0, "-m", "run", "-s", 2, "-o", "edited.png")
    assert limner(*asked).code == 0
    old, new = np.asarray(drawn), np.asarray(Image.open("edited.png"))
    assert (old[:, :8] == new[:, :8]).all()
    assert (old[:, 8:] != new[:, 8:]).any()
    plan = limner("generate", "-m", "run", "--dry-run")
    assert plan.code == 0, plan.err
    refused = limner("generate", "a fox", "-m", "run")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "reads no words" in refused.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.latent_views=1", "data.latent_views are latents, a model of pixels learns from pictures: give 0"),
        ("loss.offset_noise=0.1", "loss.… is of diffusion and flows, a model of pixels learns by its own"),
        ("data.size=24", "pictures of 24 pixels are not in multiples of 16"),
        ("data.size=32", "pictures have 32 x 32 pixels, and the network sees such 16 x 16"),
        ("system.std=0", "a deviation above 0"),
        ("system.trajectory=1", "give 2 to 1000 steps"),
        ("system.trajectory=1001", "give 2 to 1000 steps"),
    ],
)
def test_what_it_cannot_learn_from_is_one_line(change, said, limner, here):
    done = limner("train", NAME, "-o", "run", "--device", "cpu", change)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
