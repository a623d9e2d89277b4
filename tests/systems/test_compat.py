"""`compat` end to end on a small Stable Diffusion: what is drawn, remembered, and refused."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner import catalog, pipeline
from limner.errors import Ignored, UnknownName, UsageError
from limner.metadata import read_settings
from limner.sampling import compat, samplers, schedules

from . import stable_diffusion


@lru_cache(maxsize=1)
def loaded(folder: Path) -> Any:
    return catalog.load(folder, dtype=torch.float32)


@pytest.fixture
def sd1(sd1_folder) -> Any:
    return loaded(sd1_folder)


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image.image).astype(int)


def test_a1111_with_its_noise_on_the_processor_is_limner_but_for_where_it_begins_and_its_levels(sd1):
    """Euler over levels that A1111 lays out as we lay out `normal`: the same picture, of the same noise."""
    told = {"seed": 3, "steps": 4, "batch": 2, "guidance": 3.0, "sampler": "Euler"}
    theirs = pipeline.generate(sd1, "a (red:1.2) fox", compat="a1111-cpu", **told)
    ours = pipeline.generate(sd1, "a (red:1.2) fox", schedule="normal", **told)
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(theirs, ours, strict=True))
    assert [image.seed for image in theirs] == [3, 4]


def test_a1111_begins_with_the_noise_of_a_card(sd1, monkeypatch):
    """Against Euler's steps by hand from that noise."""
    request = pipeline.prepare(sd1, prompt="a fox", seed=3, steps=4, guidance=1.0, sampler="euler", compat="a1111")
    sigmas = schedules.normal(4, sd1.interpolant)
    with torch.inference_mode():
        cond = sd1.condition(["a fox"], request)
        ours = sd1.sample(cond, request, pipeline.noise_of([3], "cpu", request))
        eps = compat.CardGenerator(3)((4, 16, 16))[None]
        denoise = sd1.denoiser(cond[0][1](), None, (0.0, 1.0))
        wanted = samplers.euler(denoise, sigmas[0] * eps, sigmas, sd1.interpolant)
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_picture_of_comfyuis_batch_is_drawn_again_alone(sd1, limner, here, sd1_folder):
    told = ("-m", sd1_folder, "--compat", "comfyui", "--sampler", "euler_ancestral", "--steps", 3, "--dtype", "fp32")
    assert limner("a fox", *told, "-s", 5, "-b", 3, "-o", "all.png").code == 0
    settings = [read_settings(here / f"all-{k}.png") for k in (1, 2, 3)]
    assert [(one["seed"], one.get("place", 0), one["compat"]) for one in settings] == [
        (5, k, "comfyui") for k in range(3)
    ]  # fmt: skip
    assert (settings[0]["schedule"], settings[0]["prompt_dialect"]) == ("normal", "comfyui")
    again = limner("-C", "all-3.png", "-m", sd1_folder, "--dtype", "fp32", "-o", "again.png")
    assert again.code == 0, again.err
    one, other = (np.asarray(Image.open(here / name)).astype(int) for name in ("all-3.png", "again.png"))
    assert np.abs(one - other).max() <= 1
    first = np.asarray(Image.open(here / "all-1.png")).astype(int)
    assert np.abs(one - first).max() > 20


def test_a_batch_in_turns_is_the_same_batch(sd1, monkeypatch):
    request = pipeline.prepare(sd1, prompt="a fox", seed=5, steps=2, batch=3, sampler="euler_a", compat="comfyui")
    with torch.inference_mode():
        one, other = (pipeline.draw(sd1, ["a fox"] * 3, [5] * 3, request, chunk=chunk) for chunk in (8, 1))
    assert (one - other).abs().max() < 2e-3


def test_comfyui_over_a_picture_walks_all_the_steps_it_is_asked_for(sd1):
    seen: list[int] = []
    told = {"image": Image.new("RGB", (32, 32), "red"), "strength": 0.5, "steps": 6, "seed": 1, "sampler": "euler"}
    for program, steps in (("comfyui", 6), ("a1111", 4), (None, 3)):
        seen.clear()
        pipeline.generate(sd1, "a fox", compat=program, on_step=lambda done, total, preview: seen.append(total), **told)
        assert set(seen) == {steps}, program


def test_a1111_aligns_steps_by_the_model(sd1, tmp_path):
    told = {"prompt": "a fox", "steps": 11, "schedule": "Align Your Steps", "sampler": "Euler", "compat": "a1111"}
    xl = catalog.load(stable_diffusion.sdxl(tmp_path), dtype=torch.float32)
    for system, levels in ((sd1, schedules.AYS_SD1), (xl, schedules.AYS_SDXL)):
        assert system.sigmas(pipeline.prepare(system, **told)) == pytest.approx([*levels, 0.0])


@pytest.mark.parametrize("program", ["a1111-cpu", "comfyui"])
def test_what_is_under_a_mask_is_begun_from_at_full_strength_too(sd1, program):
    """Unlike here, where nothing is left of it then."""
    told = {"mask": Image.new("L", (32, 32), "white"), "strength": 1, "steps": 3, "seed": 1, "sampler": "euler"}
    red, blue = (
        pixels(pipeline.generate(sd1, "a fox", compat=program, image=Image.new("RGB", (32, 32), colour), **told)[0])
        for colour in ("red", "blue")
    )
    assert (red != blue).any()


def test_settings_say_what_was_done_as_and_infotext_too(sd1, limner, here, sd1_folder):
    told = ("a fox", "-m", sd1_folder, "--steps", 1, "-s", 1, "--dtype", "fp32")
    done = limner(*told, "--compat", "a1111-cpu", "--noise-delta", 31337, "-o", "fox.png")
    assert done.code == 0, done.err
    settings = read_settings(here / "fox.png")
    assert (settings["compat"], settings["noise_delta"]) == ("a1111-cpu", 31337)
    text = Image.open(here / "fox.png").info["parameters"]
    assert "RNG: CPU" in text
    assert "ENSD: 31337" in text
    assert json.loads(Image.open(here / "fox.png").info["limner"])["compat"] == "a1111-cpu"


def test_what_cannot_be_is_refused_and_what_differs_is_told(sd1, tiny_model):
    with pytest.raises(UnknownName, match=r"no program 'a111'\. Did you mean 'a1111'"):
        pipeline.prepare(sd1, prompt="x", compat="a111")
    with pytest.raises(UsageError, match="noise_delta is A1111's"):
        pipeline.prepare(sd1, prompt="x", compat="comfyui", noise_delta=1)
    with pytest.raises(UsageError, match="place is that of a picture in ComfyUI's batch"):
        pipeline.prepare(sd1, prompt="x", place=1)
    with pytest.raises(UsageError, match="what a1111 does is known for Stable Diffusion 1, 2 and XL, not icons-tiny"):
        pipeline.prepare(pipeline.load(tiny_model, "cpu").system, prompt="x", compat="a1111")
    with pytest.warns(Ignored, match="unipc is Limner's: a1111 has other formulas for it, or none"):
        pipeline.generate(sd1, "x", compat="a1111", sampler="unipc", steps=1, seed=1)


@pytest.mark.parametrize("sampler", ["DPM++ SDE", "DPM++ 2M SDE", "DPM++ 3M SDE"])
@pytest.mark.parametrize("program", ["a1111", "comfyui"])
def test_sde_solvers_take_brownian_noise(sd1, program, sampler):
    pytest.importorskip("torchsde")
    told = {"seed": 3, "steps": 4, "sampler": sampler, "compat": program, "image": Image.new("RGB", (32, 32))}
    one, other = (pipeline.generate(sd1, "a fox", batch=batch, **told)[0] for batch in (1, 2))
    assert np.abs(pixels(one) - pixels(other)).max() <= 1
