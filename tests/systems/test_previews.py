"""Previews: what latents show without decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import limner
from limner import catalog, pictures, pipeline
from limner.errors import UsageError
from limner.models.autoencoder import KL_SD1
from limner.systems import previews


def on_white(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), float)


def alike(a: Image.Image, b: Image.Image) -> float:
    """The correlation of two pictures' pixels, on white."""
    big = on_white(b).reshape(a.height, b.height // a.height, a.width, -1, 3).mean((1, 3))
    return float(np.corrcoef(on_white(a).ravel(), big.ravel())[0, 1])


def test_a_preview_of_the_last_step_of_icons_is_like_the_picture_and_costs_no_evaluation():
    pipe = limner.load("icons", "cpu")
    asked = {"seed": 1, "steps": 4, "batch": 2, "width": 128, "height": 128}
    calls, seen = [], []
    handle = pipe.system.network.register_forward_hook(lambda *_: calls.append(1))
    decode = pipe.system.autoencoder.decoder.register_forward_hook(lambda *_: calls.append(100))
    plain = pipe.generate("3d emoji of a red fox", **asked)
    spent, calls[:] = sum(calls), []
    watched = pipe.generate("3d emoji of a red fox", **asked, on_step=lambda *told: seen.append((told, told[2]())))
    handle.remove(), decode.remove()
    assert sum(calls) == spent
    assert [picture.image.tobytes() for picture in watched] == [picture.image.tobytes() for picture in plain]
    assert [told[:2] for told, _ in seen] == [(done, 4) for done in range(1, 5)]
    for place, picture in enumerate(plain):
        shown = [images[place] for _, images in seen]
        assert (shown[-1].mode, shown[-1].size) == ("RGBA", (8, 8))
        assert alike(shown[-1], picture.image) > 0.9
        assert alike(shown[-1], picture.image) > alike(shown[0], picture.image)


def test_nothing_is_computed_for_who_does_not_ask(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(previews, "of", lambda autoencoder: asked.append(1) or torch.zeros(9, 4))
    pipe, kept = limner.load(tiny_model, "cpu"), []
    pipe.generate("fox", seed=1, steps=2, on_step=lambda done, total, preview: kept.append(preview))
    assert not asked
    assert kept[0]()[0].size == kept[1]()[0].size == (8, 8)  # later, too
    assert len(asked) == 1


def test_autoencoders_without_a_published_map_get_one_of_their_own(monkeypatch):
    system = catalog.build(catalog.entry("icons-tiny").config)  # whose autoencoder was trained
    images = torch.cat([torch.full((1, 4, 32, 32), -1.0), torch.ones(1, 4, 32, 32)])
    images[0, :, :16] = torch.tensor([0.6, -0.8, -0.8, 1.0])[:, None, None]
    images[1, 1:3, :, 16:] = -0.5
    latents = system.encode(images)
    for shown, image in zip(system.preview(latents), system.decode(latents).clamp(-1, 1), strict=True):
        assert alike(shown, pictures.to_pil(image)) > 0.9


def test_a_published_map_is_its_rows_and_a_constant():
    latents = torch.zeros(1, 4, 1, 2)
    latents[0, 1, 0, 1] = 1.0
    (picture,) = previews.show(latents, torch.tensor(previews.PUBLISHED[KL_SD1]))
    assert np.asarray(picture).tolist() == [[[128] * 3, [round(127.5 * (1 + c)) for c in (0.325, 0.4974, 0.235)]]]


def test_fit_finds_a_linear_autoencoder():
    known = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    images = torch.einsum("bchw,cd->bdhw", latents, known[:-1]) + known[-1][:, None, None]
    assert torch.allclose(previews.fit(latents, F.interpolate(images, scale_factor=4)), known, atol=1e-5)


def test_the_second_pass_and_every_picture_of_a_large_batch_are_shown(tiny_model, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 2)
    pipe, seen = limner.load(tiny_model, "cpu"), []
    pipe.generate(
        "fox", seed=1, steps=2, batch=3, hires=2, width=16, height=16, hires_steps=2, hires_strength=1,
        on_step=lambda done, total, preview: seen.append((done, total, [image.size for image in preview()])),
    )  # fmt: skip
    sizes = [[(4, 4)] * 2, [(4, 4)] * 2, [(8, 8)] * 2, [(8, 8)] * 2, [(4, 4)], [(4, 4)], [(8, 8)], [(8, 8)]]
    assert seen == [(done, 8, size) for done, size in enumerate(sizes, start=1)]


@pytest.mark.parametrize("wrong", [lambda done, total: None, "often"])
def test_a_callback_that_cannot_be_told_is_refused(tiny_model, wrong):
    with pytest.raises(UsageError, match=r"give a function of \(done, total, preview\)"):
        limner.load(tiny_model, "cpu").generate("fox", on_step=wrong)
