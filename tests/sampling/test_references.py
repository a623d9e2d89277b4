"""Solvers and schedules against k-diffusion and diffusers, ten steps in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_k_dpm_2_ancestral_discrete, scheduling_lcm, scheduling_tcd
from torch import Tensor

from limner.sampling import samplers, schedules

from .test_samplers import VP, begin, mixture_denoiser


def noise() -> Callable[..., Tensor]:
    """The k-th draw is sin(k + 0 ... 8)."""
    count = itertools.count(1)
    return lambda *_, **__: torch.sin(next(count) + torch.arange(9.0, dtype=torch.float64))


@pytest.fixture
def double():
    """Numbers of diffusers that are float32 by default are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


K_DIFFUSION = {
    "euler": (-1.401816882558, 0.369960451949, 2.261208325814),
    "euler_a": (-0.416047783075, 0.568432961932, 0.522925711160),
    "heun": (-1.664609254538, 0.383302176370, 2.555048285767),
    "lms": (-1.534137233130, 0.376827137738, 2.415281740266),
    "dpm2": (-1.631525733931, 0.380926840549, 2.520190489038),
    "dpm2_a": (-0.748422625830, 0.831992659534, 0.382787973373),
    "dpmpp_2s_a": (-0.613045646584, 0.666535827448, 0.476998610859),
    "dpmpp_sde": (0.278104817019, 0.466718194503, 0.423561488069),
    "dpmpp_2m": (-1.672717485393, 0.386004858038, 2.572476897029),
    "dpmpp_2m_sde": (-0.911496798759, 0.556207619038, 0.795713100967),
    "dpmpp_2m_sde_heun": (-1.081499850839, 0.576495557740, 0.938116346757),
    "dpmpp_3m_sde": (-0.558636250884, 0.067417711574, 1.235557649791),
}


@pytest.mark.parametrize("name", K_DIFFUSION)
def test_a_solver_is_k_diffusions(name):
    """Its `sample_*` of k-diffusion 0.1.1 was asked once, with this denoiser, start, noise and Karras' levels: entries
    0, 4 and 8 of what it gave."""
    sigmas = schedules.karras(10, VP)
    end = samplers.get(name)(mixture_denoiser(VP), begin(VP, sigmas[0]), sigmas, VP, noise=noise())
    assert end[[0, 4, 8]].tolist() == pytest.approx(K_DIFFUSION[name], abs=1e-11)


CHURNED = {
    ("euler", 3.0): (-0.117246806435, 0.345605395077, 0.802724508134),
    ("heun", 3.0): (-0.765421897626, 0.430924465460, 0.824413148837),
    ("heun", 9.0): (-0.678242232766, 0.414936618848, 0.729573798887),  # more than the root of 2 allows
}


@pytest.mark.parametrize(("name", "churn"), CHURNED)
def test_churn_is_k_diffusions(name, churn):
    """As above, with `s_churn`."""
    sigmas = schedules.karras(10, VP)
    end = samplers.get(name)(mixture_denoiser(VP), begin(VP, sigmas[0]), sigmas, VP, noise=noise(), churn=churn)
    assert end[[0, 4, 8]].tolist() == pytest.approx(CHURNED[name, churn], abs=1e-11)


TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DIFFUSERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_solver_is_diffusers(name, steps, monkeypatch, double):
    """diffusers' tables, which it keeps in float32, are replaced by ours in float64; x is its own in VP coordinates."""
    cls, settings = DIFFUSERS[name]
    theirs = getattr(diffusers, cls)(**TABLE, **settings, timestep_spacing="leading")
    theirs.alphas_cumprod = 1 / (torch.tensor(VP.sigmas, dtype=torch.float64) ** 2 + 1)
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    with monkeypatch.context() as precise:
        precise.setattr(np, "float32", np.float64)
        theirs.set_timesteps(steps)
    variance_preserving = not hasattr(theirs, "sigmas") or name in ("unipc", "deis")
    numbers = noise()
    draw = lambda *_, **__: numbers()[None, :, None]  # noqa: E731
    for module in (scheduling_ddpm, scheduling_k_dpm_2_ancestral_discrete, scheduling_lcm, scheduling_tcd):
        monkeypatch.setattr(module, "randn_tensor", draw)

    sigmas = schedules.plan(schedules.settle("leading", name), name, steps, VP)
    denoise, x = mixture_denoiser(VP), begin(VP, sigmas[0])
    ours = samplers.get(name)(denoise, x, sigmas, VP, noise=noise()) * VP.input_scale(sigmas[-1])

    x = x * VP.input_scale(sigmas[0]) if variance_preserving else x
    x = x[None, :, None]  # b c n
    for t in theirs.timesteps:
        sigma = VP.at(float(t))
        real = x / VP.input_scale(sigma) if variance_preserving else x
        x = theirs.step((real - denoise(real, sigma)) / sigma, t, x, return_dict=False)[0]
    assert (ours - x.flatten()).abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["fixed_large", "learned_range"])
def test_other_variances_of_ddpm_are_diffusers(kind, monkeypatch, double):
    """A network says what is learned beside eps, from -1 to 1, the denoiser from 0 to 1. (The last timestep is 0 here:
    after another diffusers adds noise to x0.)"""
    model, learned = replace(VP, offset=0), kind == "learned_range"
    theirs = diffusers.DDPMScheduler(**{**TABLE, "steps_offset": 0}, clip_sample=False, variance_type=kind)
    theirs.alphas_cumprod = 1 / (torch.tensor(model.sigmas, dtype=torch.float64) ** 2 + 1)
    theirs.set_timesteps(10)
    numbers = noise()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: numbers()[None, :, None])
    sigmas = schedules.plan("leading", "ddpm", 10, model)
    said = {sigma: torch.sin(7 * sigma + torch.arange(9.0, dtype=torch.float64)) for sigma in sigmas}
    told = {"spread": lambda sigma: (said[sigma] + 1) / 2} if learned else {}
    denoise, x = mixture_denoiser(model), begin(model, sigmas[0])
    ours = samplers.get("ddpm" if learned else "ddpm_large")(denoise, x, sigmas, model, noise=noise(), **told)
    y = (x * model.input_scale(sigmas[0]))[None, :, None]
    for t in theirs.timesteps:
        sigma = model.sigmas[int(t)]
        real = y / model.input_scale(sigma)
        output = [(real - denoise(real, sigma)) / sigma, *([said[sigma][None, :, None]] if learned else [])]
        y = theirs.step(torch.cat(output, dim=1), t, y, return_dict=False)[0]
    assert (ours - y.flatten()).abs().max() < 1e-8


def a1111_restart(denoise, x: Tensor, sigmas: list[float], draw: Callable[..., Tensor]) -> Tensor:
    """Heun's steps over a list of levels, written from the paper and from what A1111 chooses."""
    steps = len(sigmas) - 1

    def karras(n: int, low: float, high: float) -> np.ndarray:
        return (high ** (1 / 7) + np.linspace(0, 1, n) * (low ** (1 / 7) - high ** (1 / 7))) ** 7

    levels = np.array(sigmas)
    if steps >= 20:
        back, times = (9, 1) if steps < 36 else (steps // 4, 2)
        levels = np.append(karras(steps - back * times, sigmas[-2], sigmas[0]), 0.0)
        low, high = np.abs(levels - 0.1).argmin(), np.abs(levels - 2).argmin()
        again = list(karras(back + 1, levels[low], levels[high])) if high < low else []
        levels = np.array([*levels[: low + 1], *again * times, *levels[low + 1 :]])
    for sigma, following in itertools.pairwise(levels.tolist()):
        if following >= sigma:
            x = x + (following**2 - sigma**2) ** 0.5 * draw() if following > sigma else x
            continue
        d = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * d
        x = (
            euler
            if following == 0
            else x + (following - sigma) * (d + (euler - denoise(euler, following)) / following) / 2
        )
    return x


@pytest.mark.parametrize("schedule", ["karras", "normal"])
@pytest.mark.parametrize("steps", [1, 10, 19, 20, 35, 36, 50])
def test_restart_is_a1111s(steps, schedule):
    sigmas = schedules.get(schedule)(steps, VP)
    denoise, x, seen = mixture_denoiser(VP), begin(VP, sigmas[0]), []
    ours = samplers.get("Restart")(denoise, x, sigmas, VP, noise=noise(), on_step=lambda *told: seen.append(told))
    assert (ours - a1111_restart(denoise, x, sigmas, noise())).abs().max() < 1e-8
    assert seen == [(i, steps) for i in range(1, steps + 1)]


def test_restart_over_a_picture_begins_no_higher_than_the_picture():
    """A tail of a schedule, as img2img walks it: of too little noise to go back to sigma 2."""
    for strength in (0.05, 0.3, 0.6):
        sigmas = schedules.from_strength(schedules.karras(50, VP), strength)
        steps = samplers.restarts(sigmas, VP)
        assert max(a for a, _ in steps) == steps[0][0] == sigmas[0]
        denoise, x = mixture_denoiser(VP), begin(VP, sigmas[0])
        ours = samplers.get("restart")(denoise, x, sigmas, VP, noise=noise())
        assert (ours - a1111_restart(denoise, x, sigmas, noise())).abs().max() < 1e-8


def test_res_multistep_is_dpm_solver_with_a_line_through_two_x0():
    """diffusers' with `solver_type="heun"`, which computes in float32."""
    theirs = diffusers.DPMSolverMultistepScheduler(**TABLE, solver_type="heun")
    theirs.set_timesteps(10)
    sigmas = schedules.plan("linspace", "res_multistep", 10, VP)
    denoise, x = mixture_denoiser(VP), begin(VP, sigmas[0])
    ours = samplers.get("res_multistep")(denoise, x, sigmas, VP)
    x = x * VP.input_scale(sigmas[0])
    for t in theirs.timesteps:
        sigma = VP.at(float(t))
        real = x / VP.input_scale(sigma)
        x = theirs.step((real - denoise(real, sigma)) / sigma, t, x, return_dict=False)[0]
    assert (ours - x).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 7, 10, 30])
@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize(
    ("sampler", "cls"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("ddim", "DDIMScheduler"),
        ("plms", "PNDMScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_timesteps_are_spaced_as_diffusers_spaces_them(sampler, cls, spacing, steps):
    told = {"skip_prk_steps": True} if sampler == "plms" else {}
    theirs = getattr(diffusers, cls)(**TABLE, **told, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    times = list(dict.fromkeys(theirs.timesteps.tolist()))  # PNDM has one twice
    sigmas = schedules.plan(schedules.settle(spacing, sampler), sampler, steps, VP)
    assert [VP.time(sigma) for sigma in sigmas[:-1]] == pytest.approx(times, abs=1e-2)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_schedules_of_ratios_are_diffusers(name):
    theirs = diffusers.DPMSolverMultistepScheduler(**TABLE, **{f"use_{name}_sigmas": True})
    theirs.set_timesteps(10)
    assert schedules.get(f"use_{name}_sigmas")(10, VP) == pytest.approx(theirs.sigmas.tolist(), rel=1e-4)


def times(name: str, steps: int) -> list[float]:
    return [VP.time(sigma) for sigma in schedules.get(name)(steps, VP)[:-1]]


def test_schedules_of_timesteps_have_the_levels_of_their_programs():
    """Written down from what ComfyUI's and A1111's of the name give for a table of 1000; beta's by scipy."""
    assert times("normal", 4) == pytest.approx([999, 666, 333, 0])
    assert times("sgm_uniform", 4) == pytest.approx([999, 749.25, 499.5, 249.75])
    assert times("simple", 7) == [999, 857, 714, 571, 428, 285, 142]
    assert times("ddim_uniform", 10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert times("turbo", 4) == [999, 749, 499, 249]
    assert times("beta", 10) == [999, 959, 876, 765, 637, 500, 362, 234, 123, 40]
    assert schedules.get("ays")(10, VP)[:-1] == pytest.approx(schedules.AYS_SD1[:-1])
    assert schedules.get("ays_xl")(5, VP)[:-1] == pytest.approx([14.615, 3.771, 1.342, 0.555, 0.234])


def test_beta_quantiles_are_scipys():
    known = [1.0, 0.9085132044499549, 0.7245867092223766, 0.5, 0.2754132907776235, 0.09148679555004528, 0.0]
    low, high = VP.ratio_min, VP.ratio_max
    expected = [low + share * (high - low) for share in known]
    assert schedules.beta_sigmas(7, VP)[:-1] == pytest.approx(expected, abs=1e-12)


def test_kl_optimal_is_even_in_the_arc_tangent():
    angles = torch.tensor(schedules.kl_optimal(9, VP)[:-1], dtype=torch.float64).atan()
    assert angles.diff().std() < 1e-12


def test_linear_quadratic_bends_without_a_corner():
    done = 1 - torch.tensor(schedules.linear_quadratic(12, VP), dtype=torch.float64) / VP.sigma_max
    assert done[6] == pytest.approx(0.025)
    assert done[:7].diff().tolist() == pytest.approx([0.025 / 6] * 6)
    bends = done[6:].diff().diff()
    assert bends.tolist() == pytest.approx([bends[0].item()] * 5)
    assert done[6:8].diff() - bends[0] / 2 == pytest.approx(0.025 / 6)
