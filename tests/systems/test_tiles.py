"""Large pictures in tiles: a network that looks at a pixel alone draws with them what it draws without, and no network
sees more than a tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from limner import catalog, metadata, pipeline
from limner.errors import Ignored, UsageError
from limner.models.unet import Residuals
from limner.types import Control

from . import stable_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion.upscaler(tmp_path_factory.mktemp("upscaler"))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def latents(system: Any, control: tuple[Control, ...] = (), **told: Any) -> torch.Tensor:
    told = {"prompt": "a red fox", "seed": 3, "steps": 4, "guidance": 3.0} | told
    request = replace(pipeline.prepare(system, **told), control=control)
    with torch.inference_mode():
        cond = system.condition([request.prompt], request)
        return system.sample(cond, request, pipeline.noise_source([3], "cpu"), **system.given(request, 1))


def pointwise(monkeypatch: Any, system: Any) -> list[tuple[int, ...]]:
    """Make its network look at nothing but the pixel it is asked about; returns the sizes it sees."""
    seen = []

    def forward(x, t, cond, residuals=None):
        seen.append(tuple(x.shape[2:]))
        said = (cond.tokens.mean((1, 2)) + t.mean(1))[:, None, None, None]
        out = 0.6 * x[:, :4].roll(1, dims=1) + 0.2 * x[:, 4:].sum(1, keepdim=True) + said
        return out if residuals is None else out + residuals.levels[0]

    monkeypatch.setattr(system.network, "forward", forward)
    return seen


class Watcher(nn.Module):
    """A control that adds the brightness of its picture."""

    def see(self, hint, kind):
        return F.avg_pool2d(hint.mean(1, keepdim=True), 2)

    def forward(self, x, t, cond, seen):
        assert seen.shape[2:] == x.shape[2:]
        return Residuals(levels=(seen.expand(len(x), 4, -1, -1),))


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("size", [(96, 96), (64, 200), (136, 40)])
def test_an_upscaler_that_looks_at_single_pixels_draws_the_same(folder, monkeypatch, size, sampler):
    system = catalog.load(folder)
    seen = pointwise(monkeypatch, system)
    told = {"image": noise(size[0] // 4, size[1] // 4), "width": size[0], "height": size[1], "sampler": sampler}
    whole = latents(system, **told)
    assert set(seen) == {(size[1] // 4, size[0] // 4)}
    seen.clear()
    cut = latents(system, **told, tile=48)
    assert set(seen) == {(min(12, size[1] // 4), min(12, size[0] // 4))}
    assert torch.allclose(cut, whole, atol=1e-5 * whole.abs().max())
    assert (whole.std((2, 3)) > 0.1).all()


def test_masks_and_controls_lie_where_the_tiles_do(sd1_folder, monkeypatch):
    system = catalog.load(sd1_folder)
    seen = pointwise(monkeypatch, system)
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (20, 10, 70, 50))
    told = {"image": noise(96, 64), "mask": mask, "width": 96, "height": 64, "strength": 0.7}
    control = (Control(Watcher(), noise(96, 64).transpose(Image.Transpose.ROTATE_180), weight=2.0),)
    plain, whole = latents(system, **told), latents(system, control, **told)
    seen.clear()
    assert torch.allclose(latents(system, control, **told, tile=40), whole, atol=1e-5)
    assert set(seen) == {(20, 20)}
    assert (plain - whole).abs().max() > 0.1


def test_guidance_that_remembers_does_so_tile_by_tile(sd1_folder, monkeypatch):
    """Each tile is guided as a picture of its own: where tiles do not overlap, they are such pictures."""
    system = catalog.load(sd1_folder)
    monkeypatch.setattr("limner.models.tiling.overlap_of", lambda side, share=0: 1)
    eps = torch.randn(1, 4, 32, 63, generator=torch.Generator().manual_seed(1))

    def drawn(part: torch.Tensor, **more: Any) -> torch.Tensor:
        width = 2 * part.shape[3]
        request = pipeline.prepare(system, prompt="fox", width=width, height=64, steps=3, seed=1, sampler="euler",
                                   guidance_kind="apg", guidance=8.0, **more)  # fmt: skip
        with torch.inference_mode():
            return system.sample(system.condition(["fox"], request), request, lambda shape: part)

    cut = drawn(eps, tile=64)  # of latents 0 to 31 and 31 to 62, which share one column
    left, right = drawn(eps[..., :32]), drawn(eps[..., 31:])
    assert torch.allclose(cut[..., :20], left[..., :20], atol=2e-2 * left.std())
    assert torch.allclose(cut[..., 43:], right[..., 12:], atol=2e-2 * right.std())


def test_sdxl_is_told_the_size_of_a_tile(tmp_path, monkeypatch):
    system = catalog.load(stable_diffusion.sdxl(tmp_path))
    told = []
    sized = system.sized
    monkeypatch.setattr(system, "sized", lambda cond, w, h, **more: (told.append((w, h)), sized(cond, w, h, **more))[1])
    latents(system, width=96, height=48, steps=1, tile=64)
    assert set(told) == {(64, 48)}


def test_large_upscales_choose_tiles_say_so_remember_and_redo_them(folder, here, limner):
    noise(24, 20).save("small.png")
    told = ("-m", folder, "--steps", 2, "-s", 3)
    done = limner("upscale", "small.png", *told, "-o", "large.png")
    assert (done.code, done.out) == (0, "large.png\n"), done.err
    assert "draws 96 x 80 pixels in 4 tiles of 64: tile 0 is all" in done.err
    assert Image.open("large.png").size == (96, 80)
    assert metadata.read_settings(here / "large.png")["tile"] == 64
    assert metadata.from_infotext(Image.open("large.png").info["parameters"])["tile"] == 64
    again = limner("generate", "-C", "large.png", "-i", "small.png", "-m", folder, "-o", "again.png")
    assert again.code == 0, again.err
    assert (here / "again.png").read_bytes() == (here / "large.png").read_bytes()
    plain = limner("upscale", "small.png", *told, "--tile", 0, "-o", "whole.png")
    assert (plain.code, "tiles" in plain.err) == (0, False)
    assert "tile" not in metadata.read_settings(here / "whole.png")
    apart = np.asarray(Image.open("whole.png")).astype(int) - np.asarray(Image.open("large.png"))
    assert np.abs(apart).max() > 1
    noise(16, 12).save("small.png")  # 64 x 48: not cut
    done = limner("upscale", "small.png", *told, "-o", "x.png")
    assert (done.code, "tiles" in done.err) == (0, False)
    plan = limner("upscale", "large.png", *told, "--dry-run", "--json")
    assert '"draws 384 x 320 pixels in 56 tiles of 64: tile 0 is all"' in plan.out, plan.err


@pytest.mark.parametrize("side", [24, 60])
def test_no_network_sees_more_of_a_larger_picture(folder, side):
    """So memory does not grow with it, but for the picture itself."""
    system = catalog.load(folder)
    seen, codec = [], []
    system.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2:]))
    system.autoencoder.decoder.register_forward_pre_hook(lambda _, given: codec.append(given[0].shape))
    pipe = pipeline.Pipeline(system, "x")
    picture = pipe.upscale(noise(side, side), "fox", steps=1, seed=1, batch=2, vae_tile=64)[0].image
    assert picture.size == (4 * side, 4 * side)
    assert set(seen) == {(16, 16)}
    assert set(codec) == {(1, 4, 16, 16)}


def test_pictures_in_tiles_are_equal_alone_and_in_a_batch(folder):
    pipe = pipeline.Pipeline(catalog.load(folder), "x")
    together = pipe.upscale(noise(24, 20), "fox", seed=5, steps=2, batch=2)
    (alone,) = pipe.upscale(noise(24, 20), "fox", seed=6, steps=2)
    assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(together[1].image)).max() <= 1


def test_the_autoencoder_takes_tiles_where_asked_or_needed(sd1_folder, here, limner, monkeypatch):
    from limner.models import tiling

    told = ("-m", sd1_folder, "--steps", 1, "-s", 3, "-W", 96, "-H", 64)
    whole = limner("a fox", *told, "-o", "whole.png")
    assert (whole.code, "tiles" in whole.err) == (0, False)
    asked = limner("a fox", *told, "--vae-tile", 48, "-o", "asked.png")
    assert "decodes 96 x 64 pixels in 6 tiles of 48: vae_tile 0 is all" in asked.err, asked.err
    assert metadata.read_settings(here / "asked.png")["vae_tile"] == 48
    again = limner("generate", "-C", "asked.png", "-m", sd1_folder, "-o", "again.png")
    assert (here / "again.png").read_bytes() == (here / "asked.png").read_bytes(), again.err
    monkeypatch.setattr(tiling, "WHOLE", (192, 64))
    monkeypatch.setattr(tiling, "TILE", (128, 48))
    needed = limner("a fox", *told, "-o", "needed.png")
    assert "decodes 96 x 64 pixels in 6 tiles of 48" in needed.err
    assert Image.open("needed.png").tobytes() == Image.open("asked.png").tobytes()
    assert Image.open("needed.png").tobytes() != Image.open("whole.png").tobytes()
    never = limner("a fox", *told, "--vae-tile", 0, "-o", "never.png")
    assert "tiles" not in never.err
    assert Image.open("never.png").tobytes() == Image.open("whole.png").tobytes()


def test_a_second_pass_is_in_tiles_too(sd1_folder):
    system = catalog.load(sd1_folder)
    seen: list[Any] = []
    system.network.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    told = {"width": 32, "height": 32, "hires": 2, "steps": 2, "seed": 1, "tile": 48}
    picture = pipeline.generate(system, "a fox", **told)[0]
    assert picture.image.size == (64, 64)
    assert set(seen) == {(16, 16), (24, 24)}
    assert pipeline.parts(system, pipeline.prepare(system, prompt="fox", **told)) == [
        "draws 64 x 64 pixels in 4 tiles of 48: tile 0 is all"
    ]


def test_tiles_that_cannot_be_or_do_nothing_are_told(tiny_model):
    pipe = pipeline.load(tiny_model, "cpu")
    for told, message in (
        ({"tile": 30}, "tile is 30: give a multiple of 4 pixels from 16 on, or 0 for all"),
        ({"tile": 8}, "tile is 8: give a multiple of 4 pixels from 16 on"),
        ({"vae_tile": -4}, "vae_tile is -4: give a whole number from 0"),
        ({"tile": "64"}, "tile is '64': give a whole number"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe.generate("red circle", steps=1, **told)
    with pytest.warns(Ignored, match="tile 32 has no effect"):
        pipe.generate("red circle", steps=1, tile=32)
