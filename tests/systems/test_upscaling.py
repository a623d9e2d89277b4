"""Pictures made larger: by the x4 upscaler as diffusers does it, by other models over the enlarged picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limner import catalog, exchange, metadata, pictures, pipeline
from limner.checkpoints import files, folders, single_files
from limner.errors import Assumed, Ignored, UsageError
from limner.sampling.interpolants import VPConfig, discrete

from . import stable_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stable_diffusion.upscaler(tmp_path_factory.mktemp("upscaler"))


@pytest.fixture(scope="module")
def file(folder) -> Path:
    path = folder.parent / "upscaler.safetensors"
    tensors = {k: v.contiguous() for k, v in single_files.export(folders.recognise(folder)).items()}
    save_file(tensors | {"low_scale_model.betas": torch.zeros(1000)}, path)
    return path


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(folder) -> Any:
    return catalog.load(folder)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def latents(system: Any, picture: Image.Image, **told: Any) -> torch.Tensor:
    told = {"seed": 3, "steps": 5, "guidance": 5.0} | told | pipeline.enlarging(system, picture, None)
    request = pipeline.prepare(system, prompt="a red fox", image=picture, **told)
    with torch.inference_mode():
        cond = system.condition([request.prompt], request)
        return system.sample(cond, request, pipeline.noise_source([3], "cpu"), **system.given(request, 1))


@pytest.mark.parametrize(("level", "sampler"), [(20, "ddim"), (0, "ddim"), (350, "euler")])
@pytest.mark.parametrize("size", [(8, 8), (16, 8)])
def test_it_enlarges_as_diffusers_does(theirs, ours, file, size, level, sampler):
    cls = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}[sampler]
    theirs.scheduler = cls.from_config(theirs.scheduler.config)
    wanted = theirs(
        "a red fox", image=noise(*size), num_inference_steps=5, guidance_scale=5.0, noise_level=level,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    with pytest.warns(Assumed, match="no name tells the noise of an upscaler"):
        of_file = catalog.load(file)
    for system in (ours, of_file):
        made = latents(system, noise(*size), sampler=sampler, noise_level=level)
        assert made.shape == (1, 4, size[1], size[0])
        assert (made - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_configuration_that_contradicts_itself_is_refused():
    config = catalog.entry("x4-upscaler").config
    for changes in ({"in_channels": 4}, {"in_channels": 9}, {"num_classes": 0}, {"num_classes": 1001}):
        with pytest.raises(UsageError, match="a network that enlarges sees a small picture"):
            catalog.build(replace(config, network=replace(config.network, **changes)))
    with pytest.raises(UsageError, match="in_channels=7, but the autoencoder's latents have 4"):
        catalog.build(replace(config, small_noise=None))


def test_a_file_tells_what_a_folder_tells(ours, file):
    found = single_files.recognise(file, files.read(file)[0])
    config = catalog.config_of(found)
    assert (config.name, config.prediction, config.autoencoder.scale) == ("x4-upscaler", "v", 0.08333)
    assert discrete(config.small_noise).sigmas == ours.small_noise.sigmas
    assert ours.name == "x4-upscaler"
    assert exchange.inspect(file)["model"] == "x4-upscaler"


def test_a_folder_made_of_a_file_is_an_upscaler_of_diffusers(file, theirs, ours, tmp_path):
    exchange.convert(file, tmp_path / "folder")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert isinstance(again, diffusers.StableDiffusionUpscalePipeline)
    assert torch.equal(again.low_res_scheduler.alphas_cumprod, theirs.low_res_scheduler.alphas_cumprod)
    found = replace(single_files.recognise(file, files.read(file)[0]), small_noise=VPConfig(first=0.001, last=0.01))
    told = folders.export(replace(found, size=32))[0]["low_res_scheduler/scheduler_config.json"]
    assert (told["beta_start"], told["beta_end"], told["prediction_type"]) == (0.001, 0.01, "epsilon")
    for name, tensor in theirs.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], tensor), name


def test_the_small_picture_is_seen_under_noise_of_its_level(ours, monkeypatch):
    """Known answer: its own share is the root of what DDPM leaves of it after so many steps."""
    seen = []
    forward = ours.network.forward
    monkeypatch.setattr(ours.network, "forward", lambda x, t, cond: (seen.append((x, cond)), forward(x, t, cond))[1])
    picture = noise(8, 8)
    latents(ours, picture, steps=1, noise_level=100)
    x, cond = seen[0]
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    left = (1 - betas).cumprod(0)[100].item()
    eps = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3))
    plain = pictures.to_tensor(picture, 8, 8)[0, :3]
    assert torch.allclose(x[0, 4:], left**0.5 * plain + (1 - left) ** 0.5 * eps, atol=1e-5)
    assert cond.labels.tolist() == [100, 100]


def test_pictures_are_equal_alone_and_in_a_batch(ours):
    pipe = pipeline.Pipeline(ours, "x")
    together = pipe.upscale(noise(8, 8), "fox", seed=5, steps=2, batch=3)
    for i in (0, 2):
        (alone,) = pipe.upscale(noise(8, 8), "fox", seed=5 + i, steps=2)
        assert alone.image.size == (32, 32)
        apart = np.abs(np.asarray(alone.image).astype(int) - np.asarray(together[i].image))
        assert apart.max() <= 1


def test_the_command_enlarges_remembers_and_redoes(folder, here, limner):
    noise(12, 8).save("small.png")
    done = limner("upscale", "small.png", "-m", folder, "--steps", 2, "-s", 3, "--noise-level", 30, "-o", "large.png")
    assert (done.code, done.out) == (0, "large.png\n"), done.err
    assert Image.open("large.png").size == (48, 32)
    told = metadata.read_settings(here / "large.png")
    assert [told[name] for name in ("model", "noise_level", "strength", "prompt")] == ["x4-upscaler", 30, 1.0, ""]
    again = limner("generate", "-C", "large.png", "-i", "small.png", "-m", folder, "-o", "again.png")
    assert again.code == 0, again.err
    assert (here / "again.png").read_bytes() == (here / "large.png").read_bytes()
    lost = limner("generate", "-C", "large.png", "-m", folder)
    assert "add -i PICTURE" in lost.err


def test_other_models_paint_over_the_enlarged_picture(tiny_model, here, limner):
    noise(20, 16).save("small.png")
    common = ("-m", tiny_model, "--steps", 4, "-s", 3)
    done = limner("upscale", "small.png", "fox", *common, "-o", "large.png")
    assert done.code == 0, done.err
    told = metadata.read_settings(here / "large.png")
    assert (told["width"], told["height"], told["strength"]) == (40, 32, 0.5)
    same = limner(
        "generate", "fox", *common, "-i", "small.png", "-W", 40, "-H", 32, "--strength", 0.5, "-o", "same.png"
    )
    assert same.code == 0, same.err
    assert (here / "same.png").read_bytes() == (here / "large.png").read_bytes()
    assert "the prompt is empty" in limner("upscale", "small.png", *common).err


def test_what_an_upscaler_cannot_do_is_said_in_a_line(ours, tiny_model):
    small = noise(8, 8)
    for told, message in (
        ({}, "x4-upscaler enlarges pictures, but none was given"),
        ({"image": small, "mask": Image.new("L", (8, 8), 255)}, "leave mask, strength and variation out"),
        ({"image": small, "strength": 0.5}, "leave mask, strength and variation out"),
        ({"image": small, "variation": 0.5}, "leave mask, strength and variation out"),
        ({"image": small, "noise_level": 351}, "noise_level is 351: x4-upscaler knows 0 to 350"),
        ({"image": small, "noise_level": 1000}, "noise_level is 1000: give a whole number from 0"),
    ):
        with pytest.raises(UsageError, match=message):
            pipeline.prepare(ours, prompt="fox", **told)
    pipe, tiny = pipeline.Pipeline(ours, "x"), pipeline.load(tiny_model)
    with pytest.raises(UsageError, match="x4-upscaler enlarges by 4, no more and no less"):
        pipe.upscale(small, factor=2)
    with pytest.raises(UsageError, match="4 times 2000 x 1000 pixels is more than x4-upscaler draws, 4096 a side"):
        pipe.upscale(Image.new("RGB", (2000, 1000)))
    with pytest.raises(UsageError, match=r"factor is 0.5: give a number above 1"):
        tiny.upscale(small, "fox", factor=0.5)
    with pytest.warns(Ignored, match="noise_level has no effect"):
        tiny.generate("fox", steps=1, noise_level=30)
