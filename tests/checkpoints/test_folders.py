"""Folders of diffusers in all the ways that they lie on disks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from limner import catalog
from limner.checkpoints import folders
from limner.checkpoints.files import read
from limner.checkpoints.layouts import EARLY
from limner.errors import FileProblem


@pytest.fixture
def copy(sd1_folder, tmp_path) -> Path:
    return shutil.copytree(sd1_folder, tmp_path / "model")


def same(one: Path, other: Path, tolerance: float = 0.0) -> bool:
    a, b = (dict(catalog.load(path).named_parameters()) for path in (one, other))
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


UNET = "unet/diffusion_pytorch_model"


def test_a_part_may_lie_in_half_precision(copy, sd1_folder):
    tensors = read(copy / f"{UNET}.safetensors")[0]
    save_file({name: tensor.half() for name, tensor in tensors.items()}, copy / f"{UNET}.fp16.safetensors")
    assert same(copy, sd1_folder)  # the whole precision is taken where both are there
    (copy / f"{UNET}.safetensors").unlink()
    assert not same(copy, sd1_folder)
    assert same(copy, sd1_folder, 2e-3)


def test_a_part_may_lie_in_shards(copy, sd1_folder):
    tensors = read(copy / f"{UNET}.safetensors")[0]
    names, places = list(tensors), {}
    for k, some in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{k + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, copy / "unet" / file)
        places |= dict.fromkeys(some, file)
    (copy / f"{UNET}.safetensors").unlink()
    (copy / f"{UNET}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert same(copy, sd1_folder)


def test_a_part_may_lie_in_a_torch_file(copy, sd1_folder):
    for old, new in ((UNET, UNET), ("text_encoder/model", "text_encoder/pytorch_model")):
        torch.save(read(copy / f"{old}.safetensors")[0], copy / f"{new}.bin")
        (copy / f"{old}.safetensors").unlink()
    assert same(copy, sd1_folder)


def test_old_names_and_buffers_are_read(copy, sd1_folder):
    vae, text = copy / "vae/diffusion_pytorch_model.safetensors", copy / "text_encoder/model.safetensors"
    tensors = read(vae)[0]
    for new, old in EARLY.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, vae)
    more = {"text_model.embeddings.position_ids": torch.arange(77)}
    flat = {k.removeprefix("text_model."): v for k, v in (read(text)[0] | more).items()}
    save_file(flat, text)
    assert same(copy, sd1_folder)
    assert folders.recognise(copy).beside == {"embeddings.position_ids": 1}


def test_a_folder_may_lie_in_another_or_in_the_cache_of_the_hub(copy, sd1_folder, tmp_path):
    assert catalog.find(tmp_path) == copy
    cache = tmp_path / "models--some--one" / "snapshots"
    cache.mkdir(parents=True)
    copy.rename(cache / "0123abcd")
    assert catalog.find(tmp_path / "models--some--one") == cache / "0123abcd"
    shutil.copytree(cache / "0123abcd", cache / "4567cdef")
    with pytest.raises(FileProblem, match="holds 2 models, such as 0123abcd"):
        catalog.find(tmp_path / "models--some--one")


@pytest.mark.parametrize(
    ("cls", "told", "expected"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, ("plms", "auto")),
        ("PNDMScheduler", {"skip_prk_steps": False}, ("", "auto")),
        ("PNDMScheduler", {}, ("", "auto")),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, ("ddim", "trailing")),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, ("euler", "karras")),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}, ("euler_a", "linspace")),
        ("DPMSolverMultistepScheduler", {}, ("dpmpp_2m", "auto")),
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}, ("dpmpp_2m", "exponential")),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, ("dpmpp_2m_sde", "auto")),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, ("", "auto")),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, ("", "auto")),
        ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_order": 2}, ("deis", "auto")),
        ("LCMScheduler", {"timestep_spacing": "leading"}, ("lcm", "leading")),
        ("DPMSolverSinglestepScheduler", {}, ("", "auto")),
    ],
)
def test_the_scheduler_of_a_folder_is_our_sampler_and_schedule(copy, cls, told, expected):
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": cls, "beta_schedule": "scaled_linear", **told}))
    found = folders.recognise(copy)
    assert (found.sampler, found.schedule) == expected
    assert bool(found.assumed) == (not expected[0])


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (
            "PNDMScheduler",
            {"skip_prk_steps": True, "beta_end": 0.012, "beta_start": 0.00085, "beta_schedule": "scaled_linear"},
        ),
        (
            "DDIMScheduler",
            {"set_alpha_to_one": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ),
        (
            "DDPMScheduler",
            {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        ),
    ],
)
def test_the_noise_of_a_folder_is_diffusers(copy, cls, told):
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": cls, **told}))
    theirs = getattr(diffusers, cls)(**told)
    system = catalog.load(copy)
    bars = 1 / (torch.tensor(system.interpolant.sigmas) ** 2 + 1)
    close = (bars - theirs.alphas_cumprod).abs()
    assert close[: -1 if told.get("rescale_betas_zero_snr") else None].max() < 1e-5
    end = getattr(theirs, "final_alpha_cumprod", torch.tensor(1.0)).item()
    if cls != "DDPMScheduler":
        assert system.interpolant.end == pytest.approx((1 / end - 1) ** 0.5, rel=1e-4)
    names = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    assert system.prediction.name == names[theirs.config.prediction_type]
