"""Pictures as the noise that they come back from, and pictures on the way between two noises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from limner import catalog, metadata, pictures, pipeline
from limner.errors import Ignored, UnknownName, UsageError
from limner.sampling import samplers
from limner.sampling.interpolants import SDE, Discrete, VPConfig

from .test_catalogue import noisy

SPREAD = 0.2


class Gaussian(nn.Module):
    """Answers as the best denoiser does of pixels that are normal, around -0.2 in class 0 and 0.2 in all others."""

    def __init__(self, system: Any) -> None:
        super().__init__()
        self.config, self.model, self.prediction = system.network.config, system.interpolant, system.prediction
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, cond):
        if isinstance(self.model, SDE):
            sigma = self.model.at(t.double() / 999)
        elif isinstance(self.model, Discrete):
            sigma = torch.tensor([self.model.at(time) for time in t.tolist()])
        else:
            sigma = t
        sigma, mean = (v.float()[:, None, None, None] for v in (sigma, torch.where(cond.labels == 0, -0.2, 0.2)))
        alpha = self.model.alpha(sigma)
        whole = x / self.model.input_scale(sigma)
        x0 = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (whole - alpha * mean)
        return self.prediction.from_x0(x0, whole, alpha, sigma)


def built(name: str = "flow-matching-tiny", **changes: Any) -> Any:
    config: Any = catalog.entry(name).config
    system: Any = catalog.build(replace(config, **changes)).eval()
    system.network = Gaussian(system)
    return system


def picture(seed: int) -> Image.Image:
    x = -0.2 + SPREAD * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
    return pictures.to_pil(x)


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(float) / 127.5 - 1


def drawn(system: Any, prompt: str, **told: Any) -> np.ndarray:
    return values(pipeline.generate(system, prompt, **{"seed": 1, "guidance": 1.0} | told)[0].image)


LOOSE = VPConfig(betas="linear", first=1e-4, last=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("flow-matching-tiny", {}, {}),
        ("ddpm-tiny", {}, {}),
        ("vp-sde-tiny", {}, {}),
        ("flow-matching-tiny", {}, {"strength": 0.5, "sampler": "heun"}),
        ("ddpm-tiny", {"interpolant": LOOSE}, {"schedule": "leading"}),  # which ends above 0
    ],
)
def test_an_inverted_picture_comes_back_and_goes_where_another_class_is(name, changes, told):
    system, given = built(name, **changes), picture(0)
    back = [
        np.abs(drawn(system, "0", image=given, invert="0", steps=n, **told) - values(given)).mean() for n in (10, 80)
    ]
    assert back[1] < 0.025  # three values of 255
    assert back[1] < 0.35 * back[0]
    if not told.get("strength"):  # all noise of one class is all noise of the other
        moved = drawn(system, "1", image=given, invert="0", steps=80, **told) - values(given)
        assert np.abs(moved - 0.4).mean() < 0.025


def test_inversion_is_not_guided_and_counts_its_steps_from_the_end():
    system, given, asked = built(), picture(0), []
    seen = system.network.register_forward_pre_hook(lambda _, told: asked.append((len(told[0]), float(told[1][0]))))
    pipeline.generate(system, "1", image=given, invert="0", steps=5, guidance=3.0, seed=1)
    seen.remove()
    assert [rows for rows, _ in asked] == [1] * 5 + [2] * 5
    assert [round(t, 5) for _, t in asked[:5]] == [0.2, 0.2, 0.4, 0.6, 0.8]
    heard = []
    told = {"image": given, "invert": "0", "variation": 1.0, "variation_image": picture(1), "steps": 4, "guidance": 1.0}
    pipeline.generate(system, "0", **told, on_step=lambda done, total, _: heard.append((done, total)))
    assert heard == [(k, 12) for k in range(1, 13)]


def test_a_row_of_pictures_lies_between_two_seeds():
    system = noisy("flow-matching-tiny").eval()
    told = {"steps": 2, "seed": 3, "variation_seed": 8}
    row = pipeline.generate(system, "red circle", variation=(0, 1), batch=10, **told)  # more than are drawn at once
    ends = [pipeline.generate(system, "red circle", steps=2, seed=seed)[0] for seed in (3, 8)]
    for found, wanted in zip((row[0], row[-1]), ends, strict=True):
        assert np.abs(values(found.image) - values(wanted.image)).max() < 0.01
    assert row[0].settings == ends[0].settings
    assert [p.settings.get("variation", 0) for p in row] == pytest.approx([k / 9 for k in range(10)])
    assert {p.settings["variation_seed"] for p in row[1:]} == {8}
    again = pipeline.generate(system, **{k: v for k, v in row[8].settings.items() if k not in ("limner", "model")})
    assert np.abs(values(again[0].image) - values(row[8].image)).max() < 0.01
    assert again[0].settings == row[8].settings
    metadata.check_settings(row[8].settings)


def test_a_row_of_pictures_lies_between_two_pictures():
    system, a, b = built(), picture(0), picture(1)
    told = {"image": a, "variation_image": b, "invert": "0", "steps": 60, "guidance": 1.0, "seed": 1}
    row = pipeline.generate(system, "0", variation=(0, 1), batch=3, **told)
    assert np.abs(values(row[0].image) - values(a)).mean() < 0.012
    assert np.abs(values(row[2].image) - values(b)).mean() < 0.012
    middle = values(row[1].image)
    correlations = [np.corrcoef(middle.flatten(), values(end).flatten())[0, 1] for end in (a, b)]
    assert correlations == pytest.approx([2**-0.5] * 2, abs=0.05)
    assert middle.std() == pytest.approx(values(a).std(), rel=0.1)  # as a mean of both would not be
    known = pictures.digest(pictures.open_image(b))
    assert [p.settings.get("variation_image_hash") for p in row] == [None, known, known]
    alone = pipeline.generate(system, "0", variation=0.5, **told)[0]
    assert np.abs(values(alone.image) - middle).max() < 0.01
    assert alone.settings == row[1].settings


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"image": None}, "no picture was given: add -i IMAGE"),
        ({"sampler": "pc"}, "'pc' adds noise, but an inverted picture has its own: take 'ddim'"),
        ({"variation": 0.5}, "add variation_image"),
        ({"variation_image": picture(1)}, "by no variation: give --variation"),
        ({"variation": 0.5, "variation_image": picture(1), "variation_seed": 3}, "leave one of them out"),
        ({"variation": (0, 1), "variation_image": picture(1)}, "in one picture: ask for a larger batch"),
        ({"variation": (0, 1, 2)}, "give a number from 0 to 1, or two"),
        ({"variation": (0, 2), "batch": 3}, "variation is 2"),
        ({"compat": "a1111"}, "a1111 inverts no pictures as is done here"),
        ({"invert": 3}, "the inverted prompt is int, not text"),
        ({"invert": "fox"}, "no class 'fox'"),
    ],
)
def test_what_cannot_be_inverted_is_refused(told, reason):
    with pytest.raises((UsageError, UnknownName), match=reason):
        pipeline.prepare(built(), **{"prompt": "0", "image": picture(0), "invert": "0"} | told)


def test_what_begins_with_no_noise_of_its_own_inverts_nothing_and_copies_are_told():
    first = catalog.build(catalog.entry("sohl-dickstein-2015-tiny").config)
    with pytest.raises(UsageError, match="draws from no noise that a picture could be inverted to"):
        pipeline.prepare(first, prompt="", image=picture(0), invert="")
    with pytest.warns(Ignored, match="pictures of one prompt are alike"):
        pipeline.generate(built(), "0", image=picture(0), invert="0", steps=2, batch=2)
    with pytest.raises(UsageError, match="one step from noise alone to data is not inverted"):
        pipeline.generate(built(), "0", image=picture(0), invert="0", steps=1)


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS.keys() - {"dopri5"}))  # which is slow to import
def test_samplers_that_follow_the_flow_draw_no_noise(name):
    from limner.sampling.interpolants import discrete

    model = discrete(LOOSE)
    sigmas = [model.at(999 - 25 * k) for k in range(40)] + [0.0]
    denoise = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    if name in samplers.FLOWING:
        assert samplers.get(name)(denoise, x, sigmas, model).isfinite().all()
    else:
        with pytest.raises(AssertionError, match="needs a noise source"):
            samplers.get(name)(denoise, x, sigmas, model)
