"""Painting under a mask: what is kept is kept, what is painted is what diffusers paints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from limner import catalog, metadata, pictures, pipeline
from limner.errors import ImageProblem, UsageError

from . import stable_diffusion


@pytest.fixture(scope="module", params=[4, 9])
def model(request, tmp_path_factory) -> tuple[Any, Any, Path]:
    """(of diffusers, ours, its folder): an ordinary Stable Diffusion 1, and one for inpainting."""
    diffusers.utils.logging.set_verbosity_error()
    folder = stable_diffusion.sd1(tmp_path_factory.mktemp(f"sd{request.param}"))
    parts = diffusers.StableDiffusionPipeline.from_pretrained(folder).components
    parts["unet"] = stable_diffusion.network(in_channels=request.param)
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(parts["scheduler"].config)
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe, catalog.load(folder), folder


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(size: tuple[int, int], *corners: int, shade: int = 255) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle(corners, fill=shade)
    return mask


@pytest.mark.parametrize("strength", [0.8, 1.0])
def test_it_paints_what_diffusers_paints(model, strength, monkeypatch):
    """On a mask that fits the grid of latents, and with latents that are the means: diffusers draws some at random."""
    pipe, system, _ = model
    if strength == 1 and not system.beside:
        pytest.skip("at full strength diffusers forgets the picture for a step of an ordinary model")
    monkeypatch.setattr(
        diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
        "sample",
        lambda self, generator=None: self.mode(),
    )
    image, mask = noise((32, 32)), box((32, 32), 8, 4, 23, 19)
    wanted = pipe(
        "a red fox", image=image, mask_image=mask, strength=strength, num_inference_steps=5, guidance_scale=5.0,
        height=32, width=32, generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    request = pipeline.prepare(
        system, prompt="a red fox", seed=3, steps=5, guidance=5.0, sampler="euler", image=image, mask=mask,
        strength=strength, width=32, height=32,
    )  # fmt: skip
    with torch.inference_mode():
        cond = system.condition(["a red fox"], request)
        ours = system.sample(cond, request, pipeline.noise_source([3], "cpu"), **system.given(request, 1))
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_what_is_black_is_kept_bit_for_bit(model):
    _, system, _ = model
    image, mask = noise((32, 32)), box((32, 32), 9, 5, 20, 17)
    told = {"seed": 3, "steps": 2, "width": 32, "height": 32, "strength": 0.9}
    painted = pipeline.generate(system, "a fox", image=image, mask=mask, **told)[0].image
    kept = np.asarray(mask) == 0
    assert (np.asarray(painted)[kept] == np.asarray(image)[kept]).all()
    middle = np.s_[9:13, 13:17]
    assert (np.asarray(painted)[middle] != np.asarray(image)[middle]).mean() > 0.9


def test_transparent_pictures_keep_their_pixels_too(tiny_model):
    image, mask = noise((32, 32), "RGBA"), box((32, 32), 0, 0, 15, 31)
    told = {"seed": 3, "steps": 2, "image": image, "mask": mask, "strength": 1.0}
    painted = pipeline.load(tiny_model, "cpu").generate("red circle", **told)[0].image
    assert painted.mode == "RGBA"
    assert (np.asarray(painted)[:, 16:] == np.asarray(image)[:, 16:]).all()
    assert (np.asarray(painted)[:, :8] != np.asarray(image)[:, :8]).any(-1).mean() > 0.5


def test_the_kept_latents_end_where_they_began(tiny_model):
    system = pipeline.load(tiny_model, "cpu").system
    image, mask = noise((32, 32), "RGBA"), box((32, 32), 0, 0, 3, 3)
    for sampler in ("euler", "euler_a", "dpmpp_2m", "heun", "unipc"):
        request = pipeline.prepare(
            system, prompt="red circle", seed=1, steps=4, image=image, mask=mask, strength=0.7, sampler=sampler
        )
        given = system.given(request, 1)
        with torch.inference_mode():
            cond = system.condition(["red circle"], request)
            found = system.sample(cond, request, pipeline.noise_source([1], "cpu"), **given)
        keep = given["paint"][0, 0] == 0
        assert keep.sum() == keep.numel() - 1
        assert torch.allclose(found[0][:, keep], given["start"][0][:, keep], atol=1e-4), sampler
        assert not torch.allclose(found[0][:, ~keep], given["start"][0][:, ~keep], atol=1e-2)


def test_an_inpainting_model_draws_without_a_picture(model):
    _, system, _ = model
    assert pipeline.generate(system, "a fox", seed=1, steps=1, width=32, height=32)[0].image.size == (32, 32)
    assert system.defaults.strength == (1.0 if system.beside else catalog.entry("sd1").config.defaults.strength)


def test_edges_fade_inwards_by_the_blur():
    soft = pictures.softened(box((64, 64), 16, 0, 63, 63), 8)
    assert (soft[:, :16] == 0).all()
    assert (soft[:, 30:] > 0.99).all()
    assert (np.diff(soft[32]) >= 0).all()
    assert 0.2 < soft[32, 18] < 0.8
    assert set(np.unique(pictures.softened(box((64, 64), 16, 0, 63, 63), 0))) == {0.0, 1.0}
    assert pictures.softened(box((8, 8), 0, 0, 8, 8, shade=51), 0)[4, 4] == pytest.approx(0.2)


def test_a_grey_mask_mixes_and_colours_count_by_their_alpha():
    red, clear = Image.new("RGBA", (4, 4), (255, 0, 0, 255)), Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    half = Image.new("L", (4, 4), 51)
    assert pictures.paste(clear, red, half, 0).getpixel((1, 1)) == (255, 0, 0, 204)
    grey = pictures.paste(Image.new("RGB", (4, 4), "black"), clear, half, 0)
    assert grey.getpixel((1, 1)) == (204, 204, 204)


def test_any_pixel_of_a_latent_paints_it():
    mask = Image.new("L", (32, 32), 0)
    mask.putpixel((17, 5), 1)
    found = pictures.to_latents(mask, 32, 32, 8)
    assert found.nonzero().tolist() == [[0, 0, 0, 2]]


def test_masks_that_cannot_be(tiny_model, tmp_path):
    pipe = pipeline.load(tiny_model, "cpu")
    image = noise((32, 32), "RGBA")
    with pytest.raises(ImageProblem, match="the mask has 16 x 16 pixels, the picture 32 x 32"):
        pipe.generate("fox", image=image, mask=Image.new("L", (16, 16), 255))
    with pytest.raises(ImageProblem, match="black everywhere"):
        pipe.generate("fox", image=image, mask=Image.new("L", (32, 32), 0))
    with pytest.raises(UsageError, match="no picture was given: add -i IMAGE"):
        pipe.generate("fox", mask=Image.new("L", (32, 32), 255))
    with pytest.raises(UsageError, match="no mask was given"):
        pipe.generate("fox", image=image, mask_blur=3)
    with pytest.raises(UsageError, match=r"mask_blur is -1: give a number from 0"):
        pipe.generate("fox", image=image, mask=Image.new("L", (32, 32), 255), mask_blur=-1)
    with pytest.raises(UsageError, match="expand is"):
        pipe.edit(image, "fox", expand=(0, 0, 0, 0))


def test_editing_keeps_the_size_and_expanding_adds_to_it(limner, here, tiny_model):
    picture, kept = noise((32, 24), "RGBA"), np.s_[0:24, 8:40]
    picture.save("fox.png")
    told = ("-m", tiny_model, "-s", 1, "--steps", 2)
    done = limner("edit", "fox.png", "red circle", *told, "-o", "edited.png")
    assert (done.code, done.out) == (0, "edited.png\n"), done.err
    assert Image.open("edited.png").size == (32, 24)
    done = limner("edit", "fox.png", "red circle", *told, "-o", "wide.png", "--expand", 8, 0, 8, 0)
    assert done.code == 0, done.err
    wide = Image.open("wide.png")
    assert wide.size == (48, 24)
    assert (np.asarray(wide)[kept] == np.asarray(picture)[:, :32][kept[0], : 40 - 8]).all()
    pipe = pipeline.load(tiny_model, "cpu")
    again = pipe.edit("fox.png", "red circle", seed=1, steps=2, expand=(8, 0, 8, 0))[0].image
    assert again.tobytes() == wide.tobytes()


def test_a_picture_under_a_mask_is_redone_with_both(limner, here, tiny_model):
    noise((32, 32), "RGBA").save("fox.png")
    box((32, 32), 0, 0, 15, 31).save("mask.png")
    told = ("-m", tiny_model, "-s", 1, "--steps", 2)
    given = ("-i", "fox.png", "--mask", "mask.png")
    assert limner("red circle", *told, *given, "--mask-blur", 2, "-o", "a.png").code == 0
    settings = metadata.read_settings(here / "a.png")
    assert settings["mask_blur"] == 2
    assert ", Mask blur: 2, " in Image.open("a.png").info["parameters"]
    assert limner("generate", "-C", "a.png", "-m", tiny_model, *given, "-o", "b.png").code == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    done = limner("generate", "-C", "a.png", "-m", tiny_model, "-i", "fox.png")
    assert (done.code, "add --mask MASK" in done.err) == (2, True)
