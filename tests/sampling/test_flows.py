"""Flows as SD3 and FLUX walk them: schedules and solvers against diffusers, in float64."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from limner import names
from limner.errors import UsageError
from limner.sampling import interpolants, samplers, schedules
from limner.sampling.interpolants import Flow, FlowConfig, Shifted

from .test_samplers import begin, mixture_denoiser

SD3 = FlowConfig(shift=3.0)
FLUX = FlowConfig(by_tokens=True)


def flow(config: FlowConfig, tokens: int = 1024) -> Shifted:
    made = interpolants.get(config).sized(tokens)
    assert isinstance(made, Shifted)
    return made


@pytest.fixture
def double(monkeypatch):
    """Numbers of diffusers that are float32 are float64."""
    monkeypatch.setattr(np, "float32", np.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_shift_of_flux_grows_with_the_picture():
    shifts = {tokens: FLUX.at(tokens) for tokens in (256, 1024, 4096)}
    assert shifts == pytest.approx({256: math.exp(0.5), 1024: math.exp(0.63), 4096: math.exp(1.15)})
    assert [SD3.at(tokens) for tokens in shifts] == [3.0] * 3


def test_a_shift_moves_the_middle_and_keeps_the_ends():
    assert schedules.shifted(2, flow(SD3)) == [1.0, 0.75, 0.0]
    assert schedules.shifted(4, flow(FlowConfig())) == schedules.uniform(4, Flow())
    assert schedules.shifted(2, Flow()) == [1.0, 0.75, 0.0]  # of a model that has no shift of its own


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 28])
@pytest.mark.parametrize(
    ("config", "name", "told"),
    [
        (SD3, "normal", {"shift": 3.0}),
        (SD3, "linspace", {"shift": 3.0}),
        (FlowConfig(), "normal", {}),
        (FLUX, "shifted", {"use_dynamic_shifting": True}),
        (FlowConfig(), "shifted", {"shift": 1.0}),
    ],
)
def test_a_schedule_is_diffusers(config, name, told, steps, double):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**told)
    sigmas = np.linspace(1, 1 / steps, steps) if name == "shifted" else None  # as FluxPipeline does
    theirs.set_timesteps(steps, sigmas=sigmas, mu=0.63 if config.by_tokens else None)
    assert schedules.plan(name, "euler", steps, flow(config)) == pytest.approx(theirs.sigmas.tolist(), abs=1e-12)


def test_a_thousand_levels_are_counted_as_comfyui_counts_them():
    """`simple` takes every so many-th of them, `sgm_uniform` goes evenly in time and leaves the cleanest out."""
    model = flow(SD3)
    assert schedules.get("simple")(4, model) == pytest.approx([1, 3 * 0.75 / 2.5, 0.75, 3 * 0.25 / 1.5, 0])
    first = 3 * 0.001 / (1 + 2 * 0.001)
    middle = (1 + first) / 2
    assert schedules.get("sgm_uniform")(2, model) == pytest.approx([1, 3 * middle / (1 + 2 * middle), 0])


SOLVERS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    "unipc": (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_diffusers_step_for_step(name, steps, double):
    cls, told = SOLVERS[name]
    theirs = getattr(diffusers, cls)(**told)
    theirs.set_timesteps(steps)
    sigmas = [float(sigma) for sigma in theirs.sigmas]
    if name == "heun":  # which asks twice at each but the first and the last
        sigmas = [*sigmas[0::2], sigmas[-1]] if sigmas[-1] != sigmas[-2] else sigmas
        sigmas = list(dict.fromkeys(sigmas))
    model = flow(SD3)
    denoise, x = mixture_denoiser(model), begin(model, sigmas[0])
    walked = []
    ours = samplers.get(name)(lambda x, s: (walked.append(x), denoise(x, s))[1], x, sigmas, model)

    y = x[None, :, None]
    for i, t in enumerate(theirs.timesteps):
        assert (walked[i] - y.flatten()).abs().max() < 1e-8
        sigma = float(t) / 1000 if "FlowMatch" in cls else sigmas[i]  # others round their timesteps
        y = theirs.step((y - denoise(y, sigma)) / sigma, t, y, return_dict=False)[0]
    assert (ours - y.flatten()).abs().max() < 1e-8


def test_published_names_are_known():
    for theirs, ours in (("FlowMatchEulerDiscreteScheduler", "flow_euler"), ("FlowMatchHeunDiscreteScheduler", "heun")):
        assert names.find(theirs, names.SAMPLERS) == ours


@pytest.mark.parametrize("told", [{"shift": 0.0}, {"shift": float("nan")}, {"by_tokens": True, "most": 1e9}])
def test_no_flow_is_shifted_by_anything(told):
    with pytest.raises(UsageError, match="no flow is shifted by"):
        FlowConfig(**told)
