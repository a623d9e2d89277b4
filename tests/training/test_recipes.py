"""Recipes from nothing, in miniature: the loss falls, and what is drawn has the colour that was asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from limner import recipes
from limner.data.shapes import COLOURS

FALLS = {"dit": 0.3, "sd2-v": 0.6, "sdxl": 0.6, "sd3": 0.5, "flux": 0.5}
"""What is left of the loss of the first steps at the end."""


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def colour(image: Image.Image) -> str:
    """The name of the colour nearest to what is opaque."""
    pixels = np.asarray(image.convert("RGBA"), dtype=float).reshape(-1, 4)
    mean = np.average(pixels[:, :3], axis=0, weights=pixels[:, 3] + 1e-6)
    return min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())


def test_in_few_steps_the_loss_falls(limner, here):
    few = ("steps=60", "batch_size=16", "log_every=15", "data.limit=64", "sample_prompts=[]")
    done = limner("train", "dit-tiny", "-o", "run", "--device", "cpu", *few)
    assert done.code == 0, done.err
    found = losses(here / "run")
    assert found[-1] < 0.6 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FALLS)
def test_what_is_drawn_is_what_was_asked_for(name, limner, here):
    done = limner("train", f"{name}-tiny", "-o", "run", "--device", "cpu")
    assert done.code == 0, done.err
    found = losses(here / "run")
    assert sum(found[-3:]) / 3 < FALLS[name] * found[0]
    right = []
    for k, wanted in enumerate(("red", "green", "blue", "yellow", "purple", "black")):
        assert limner("generate", f"{wanted} circle", "-m", "run", "-s", k, "-o", f"{wanted}.png").code == 0
        right.append(colour(Image.open(f"{wanted}.png")) == wanted)
    assert sum(right) >= 5


@pytest.mark.parametrize("name", FALLS)
def test_what_a_recipe_needs_is_said_in_one_line(name, limner, here):
    done = limner("train", name, "-o", "run", "--device", "cpu")
    assert done.code == 2
    assert "system.autoencoder_from=FILE" in done.err
    assert ("system.text_encoder_from=FILE" in done.err) == (name != "dit")
    assert done.err.count("\n") == 1
    assert not (here / "run").exists()
    assert recipes.get(name).system.name.startswith(name)
