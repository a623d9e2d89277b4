"""Doing as A1111 and ComfyUI do: generators by known answers, levels and noise by what the programs publish."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from limner.errors import MissingExtra, UsageError
from limner.sampling import compat, samplers, schedules

from .test_samplers import VP


def test_philox_has_the_published_answers():
    """The known answers of Random123 for philox4x32-10."""
    known = [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]  # fmt: skip
    for counter, key, expected in known:
        assert compat.philox(np.array(counter, np.uint64)[:, None], key)[:, 0].tolist() == expected


def test_a_card_draws_what_torch_draws_on_one():
    """torch.randn(3, 4, device="cuda") after torch.manual_seed(0), of a graphics card."""
    drawn = compat.CardGenerator(0)((3, 4))
    known = [[-0.92466259, -0.42534415, -2.6438457, 0.14518388], [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
             [-1.07454231, -0.36314407, -1.67105067, 2.26550497]]  # fmt: skip
    assert drawn.dtype == torch.float32
    assert drawn.numpy() == pytest.approx(np.array(known), abs=2e-7)


def test_a_card_draws_standard_normal_noise_that_is_new_each_time():
    generator = compat.CardGenerator(2**40 + 7)
    one, other = generator((4, 64, 64)), generator((4, 64, 64))
    assert one.mean().abs() < 0.02
    assert one.std() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.03


def test_a1111_draws_each_picture_from_a_generator_of_its_own():
    shape = (4, 8, 8)
    source = compat.Source("a1111-cpu", [5, 6], "cpu")
    first, second = source(shape), source(shape)
    for row, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first[row], torch.randn(shape, generator=generator))
        assert torch.equal(second[row], torch.randn(shape, generator=generator))
    delta = compat.Source("a1111-cpu", [5], "cpu", delta=31337)
    assert torch.equal(delta(shape), first[:1])
    assert torch.equal(delta(shape)[0], torch.randn(shape, generator=torch.Generator().manual_seed(5 + 31337)))
    card = compat.Source("a1111", [5, 6], "cpu")
    assert torch.equal(card(shape)[1], compat.CardGenerator(6)(shape))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 3, 5)])
def test_comfyui_draws_a_batch_at_once_whatever_part_of_it_is_asked_for(shape):
    whole = torch.randn((5, *shape), generator=torch.Generator().manual_seed(9))
    for place, count in ((0, 5), (0, 2), (3, 2), (4, 1)):
        if shape == (4, 3, 5) and place + count < 5:
            continue  # torch draws the end of what does not divide by 16 anew
        source = compat.Source("comfyui", [9] * count, "cpu", place=place)
        assert torch.equal(source(shape), whole[place : place + count])
        later = compat.CardGenerator(9)((place + count, *shape))
        assert torch.equal(source(shape), later[place:])


def walked(program: str, sampler: str, steps: int, strength: float | None, schedule: str = "auto", again: bool = False):
    named = compat.settle(schedule, sampler, program)
    return compat.sigmas(program, named, sampler, steps, strength, VP, again)[0]


@pytest.mark.parametrize(
    ("program", "sampler", "steps", "strength", "again", "expected"),
    [
        ("a1111", "euler", 20, 0.75, False, 16),  # int(steps * strength) + 1
        ("a1111", "euler", 20, 1.0, False, 20),
        ("a1111", "euler", 20, 0.01, False, 1),
        ("a1111", "euler", 20, 0.5, True, 20),  # of the second pass, all that was asked for
        ("a1111", "ddim", 20, 0.75, False, 14),  # over int(steps * strength) timesteps
        ("a1111", "ddim", 20, None, False, 19),
        ("a1111", "ddim", 20, 0.5, True, 18),
        ("a1111", "plms", 1, None, False, 1),
        ("a1111", "dpmpp_3m_sde", 20, 0.75, False, 16),
        ("comfyui", "euler", 20, 0.75, False, 20),  # of a schedule of 26
        ("comfyui", "euler", 20, 1.0, False, 20),
        ("comfyui", "dpm2", 20, 0.5, False, 20),
        ("comfyui", "dpm2", 20, None, False, 20),
    ],
)
def test_over_a_picture_programs_walk_so_many_steps(program, sampler, steps, strength, again, expected):
    assert len(walked(program, sampler, steps, strength, again=again)) == expected + 1


def test_levels_are_those_of_the_programs():
    steps = 10
    assert walked("comfyui", "euler", steps, 0.5) == schedules.normal(20, VP)[-11:]
    assert walked("comfyui", "euler", steps, None) == schedules.normal(steps, VP)
    assert walked("a1111", "euler", steps, None) == schedules.normal(steps, VP)
    assert walked("a1111", "dpmpp_2m", steps, None) == schedules.karras(steps, VP)
    assert walked("a1111", "euler", steps, None, "beta") == schedules.beta_sigmas(steps, VP)
    assert walked("comfyui", "euler", steps, None, "beta") == schedules.beta(steps, VP)
    longer = schedules.karras(steps + 1, VP)
    assert walked("a1111", "dpm2", steps, None) == [*longer[:-2], 0.0]
    longer = schedules.exponential(steps + 1, VP)
    assert walked("a1111", "dpmpp_3m_sde", steps, None) == [*longer[:-2], 0.0]
    assert walked("comfyui", "dpmpp_3m_sde", steps, None) == schedules.normal(steps, VP)
    kl = walked("a1111", "euler", steps, None, "kl_optimal")
    assert (len(kl), kl[-1]) == (steps + 1, pytest.approx(VP.ratio_min))
    ays = walked("a1111", "euler", 11, None, "ays")
    assert ays == pytest.approx([*schedules.AYS_SD1, 0.0])
    ddim = walked("a1111", "ddim", 30, None)  # 1000 // 30 = 33 goes 31 times into 1000
    assert [round(VP.time(s)) for s in ddim[:3]] == [991, 958, 925]
    assert (len(ddim), ddim[-1]) == (31, VP.sigmas[1])
    for program in ("a1111", "comfyui"):  # with other solvers
        ddim = walked(program, "euler", 30, None, "ddim_uniform")
        assert [round(VP.time(s)) for s in ddim[:2]] == [991, 958]
        assert (len(ddim), ddim[-2:]) == (32, [VP.sigmas[1], 0.0])
    # A1111 counts from the noisy end, where there is more than asked for
    assert len(walked("a1111", "euler", 30, 0.5, "ddim_uniform")) == 18
    assert len(walked("comfyui", "euler", 30, 0.5, "ddim_uniform")) == 31


def a1111_ddim(x0, x: torch.Tensor, steps: int) -> torch.Tensor:
    """As A1111's loop has it, over variance-preserving x: from every timestep to the one before, all but the first."""
    bars = torch.tensor([1 / (1 + s * s) for s in VP.sigmas], dtype=torch.float64)
    times = [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)]
    for t, before in zip(times[:0:-1], times[-2::-1], strict=True):
        clean = x0(x / bars[t].sqrt(), VP.sigmas[t])
        eps = (x - bars[t].sqrt() * clean) / (1 - bars[t]).sqrt()
        x = bars[before].sqrt() * clean + (1 - bars[before]).sqrt() * eps
    return x


@pytest.mark.parametrize("steps", [2, 10, 30])
def test_ddim_ends_where_a1111_ends(steps):
    eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def x0(x: torch.Tensor, sigma: float) -> torch.Tensor:  # of data of deviation 0.6 about 0.3
        return (0.36 * x + 0.3 * sigma**2) / (0.36 + sigma**2)

    levels = compat.sigmas("a1111", "ddim_uniform", "ddim", steps, None, VP, False)
    found = samplers.ddim(x0, compat.begin("a1111", "ddim", VP, None, eps, levels), levels[0], VP)
    found = VP.input_scale(levels[0][-1]) * found
    assert (found - a1111_ddim(x0, eps, steps)).abs().max() < 1e-9


def comfyuis(name: str, x0, x: torch.Tensor, levels: list[float], noise) -> torch.Tensor:
    """ComfyUI's formulas: DDPM over variance-preserving x, LCM, and the multistep solver of arXiv:2308.02157."""
    before = None
    for k, (sigma, following) in enumerate(itertools.pairwise(levels)):
        clean = x0(x, sigma)
        bar, next_bar = 1 / (1 + sigma**2), 1 / (1 + following**2)
        alpha = bar / next_bar
        if name == "lcm":
            x = clean + (following * noise() if following else 0)
        elif name == "ddpm":
            eps = (x - clean) / sigma
            x = (x * bar**0.5 - (1 - alpha) * eps / (1 - bar) ** 0.5) / alpha**0.5
            x = x + (((1 - alpha) * (1 - next_bar) / (1 - bar)) ** 0.5 * noise() if following else 0)
            x = x / next_bar**0.5
        elif following == 0 or before is None:
            x = x + (following - sigma) * (x - clean) / sigma
        else:
            h, c2 = math.log(sigma / following), -math.log(levels[k - 1] / sigma) / math.log(sigma / following)
            phi1 = -math.expm1(-h) / h
            phi2 = (1 - phi1) / h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * clean + phi2 / c2 * before)
        before = clean
    return x


@pytest.mark.parametrize("name", ["ddpm", "lcm", "res_multistep"])
def test_solvers_of_which_nothing_is_told_are_comfyuis(name):
    def noise(seed: int = 3):
        generator = torch.Generator().manual_seed(seed)
        return lambda: torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)

    def x0(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return (0.36 * x + 0.3 * sigma**2) / (0.36 + sigma**2) + 0.1 * torch.sin(x / (1 + sigma))

    levels = compat.sigmas("comfyui", "normal", name, 8, None, VP, False)[0]
    assert compat.differing("comfyui", "normal", name) == []
    x = levels[0] * noise(1)()
    found = compat.solver("comfyui", name)(x0, x, levels, VP, noise=noise())
    assert (found - comfyuis(name, x0, x, levels, noise())).abs().max() < 1e-9


def test_a_little_strength_of_a_long_schedule_is_refused_in_a_line():
    for program, again in (("comfyui", False), ("a1111", True)):
        with pytest.raises(UsageError, match=rf"a strength of 1e-09 makes \d+ steps of 20 as {program} counts them"):
            compat.sigmas(program, "karras", "euler", 20, 1e-9, VP, again)


def test_what_programs_have_not_is_told():
    told = {
        (
            "a1111-cpu",
            "karras",
            "ddim",
        ): "the schedule karras has no effect: a1111-cpu has timesteps of its own for ddim",
        ("a1111", "trailing", "euler"): "the schedule trailing is Limner's: a1111 has none of that name",
        ("a1111", "lcm", "lcm"): "lcm is Limner's: a1111 has other formulas for it, or none",
        ("comfyui", "normal", "plms"): "plms is Limner's: comfyui has other formulas for it, or none",
    }
    for (program, schedule, sampler), sentence in told.items():
        assert compat.differing(program, schedule, sampler)[0] == sentence
    for program, schedule, sampler in (
        ("a1111", "ddim_uniform", "ddim"), ("a1111", "beta_sigmas", "restart"), ("comfyui", "beta", "res_multistep"),
        ("comfyui", "normal", "ddpm"), ("comfyui", "simple", "lcm"),
    ):  # fmt: skip
        assert compat.differing(program, schedule, sampler) == []


def test_programs_begin_with_noise_of_their_own_variance():
    eps, start = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 5.0)
    top = VP.sigma_max

    def begun(program: str, sampler: str, start: torch.Tensor | None, levels: Sequence[float]) -> float:
        both = list(levels), [*([3.0] if start is not None else []), *levels]
        return compat.begin(program, sampler, VP, start, eps, both).item()

    assert begun("a1111", "dpmpp_2m", None, [top, 0.0]) == pytest.approx(top)
    assert begun("a1111", "ddim", None, [top, 0.0]) == pytest.approx(math.hypot(1, top))
    assert begun("comfyui", "euler", None, [top, 0.0]) == pytest.approx(math.hypot(1, top))
    assert begun("comfyui", "euler", None, [2.0, 0.0]) == pytest.approx(2.0)
    assert begun("a1111", "euler", start, [2.0, 0.0]) == pytest.approx(7.0)
    # A1111's DDIM is given the noise of the timestep above that which it begins with
    assert begun("a1111", "ddim", start, [2.0, 0.0]) == pytest.approx((5 + 3) / math.hypot(1, 3) * math.hypot(1, 2))


def test_a1111_turns_noise_by_columns():
    a, b = torch.randn(2, 1, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    turned = compat.slerp(a, b, 0.3)
    one, other = a[0, 2, :, 3], b[0, 2, :, 3]
    angle = torch.arccos((one @ other) / one.norm() / other.norm())
    expected = (torch.sin(0.7 * angle) * one + torch.sin(0.3 * angle) * other) / torch.sin(angle)
    assert (turned[0, 2, :, 3] - expected).abs().max() < 1e-5
    assert torch.equal(compat.slerp(a, a, 0.3), a * 0.3 + a * 0.7)


def test_brownian_noise_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"SDE samplers .* needs the package 'torchsde': pip install 'limner\[compat\]'"
    ):
        compat.require("dpmpp_2m_sde")
    compat.require("euler_a")


@pytest.mark.parametrize("program", ["a1111", "a1111-cpu", "comfyui"])
def test_brownian_noise_is_that_of_one_path(program):
    """Increments over one step are the sum of those over its halves, of unit variance, and those that torchsde's tree
    of the seed has."""
    torchsde = pytest.importorskip("torchsde")
    shape, levels = (4, 8, 8), schedules.karras(10, VP)
    draw = compat.Source(program, [3, 3 if program == "comfyui" else 4], "cpu").brownian(shape, levels)
    whole = draw.between(levels[2], levels[4])
    halves = [draw.between(levels[k], levels[k + 1]) * (levels[k] - levels[k + 1]) ** 0.5 for k in (2, 3)]
    assert (whole * (levels[2] - levels[4]) ** 0.5 - sum(halves)).abs().max() < 1e-4
    assert whole.shape == (2, *shape)
    assert whole.std() == pytest.approx(1, abs=0.15)
    if program == "a1111":
        return
    low, high = (torch.tensor(end([s for s in levels if s > 0])) for end in (min, max))
    zeros = torch.zeros((2, *shape) if program == "comfyui" else shape)
    tree = torchsde.BrownianTree(low, zeros, high, entropy=3)
    expected = -tree(torch.tensor(levels[4]), torch.tensor(levels[2])) / (levels[2] - levels[4]) ** 0.5
    assert (whole[0] - (expected[0] if program == "comfyui" else expected)).abs().max() < 1e-6


def test_a_cards_brownian_noise_leaves_torchsde_as_it_was():
    pytest.importorskip("torchsde")
    module = sys.modules["torchsde._brownian.brownian_interval"]
    own = module._randn
    levels = schedules.karras(10, VP)
    card, cpu = (compat.Source(p, [3], "cpu").brownian((4, 8, 8), levels) for p in ("a1111", "a1111-cpu"))
    assert (card.between(2.0, 1.0) - cpu.between(2.0, 1.0)).abs().max() > 0.1
    assert module._randn is own
