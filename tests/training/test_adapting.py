"""A run that trains an adapter: from a folder of pictures to a file that draws what the run's own samples show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from toy import StopAt

from limner.training import loop

FEW = ["steps=6", "batch_size=2", "log_every=2", "save_every=2", "warmup=0", "lr=0.01", "adapter.rank=2"]


@pytest.fixture
def pictures(here):
    (here / "pictures").mkdir()
    for i, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (40, 32), color).save(here / "pictures" / f"{i}.png")
        (here / "pictures" / f"{i}.txt").write_text(f"a {color} square")
    return here / "pictures"


def trained(limner, out, model, pictures, *more):
    done = limner("train", "lora", "--model", model, "--data", pictures, "--out", out, "--device", "cpu", *FEW, *more)
    assert done.code == 0, done.err
    return done


def test_a_folder_of_pictures_becomes_a_file_that_draws_what_the_run_showed(limner, here, tiny_model, pictures):
    prompts = 'sample_prompts=["a red square", "a blue square"]'
    done = trained(limner, "run", tiny_model, pictures, prompts, "sample_every=6", "ema_half_life=2")
    assert done.out.splitlines()[-1] == "run/lora.safetensors"
    settings = ("-m", tiny_model, "--lora", "run/lora.safetensors", "-s", 1, "-o", "drawn.png")
    assert limner("generate", "a blue square", *settings).code == 0
    assert limner("generate", "a blue square", "-m", tiny_model, "-s", 1, "-o", "plain.png").code == 0
    (grid,) = (here / "run" / "samples").glob("*.png")
    second = Image.open("drawn.png")
    shown = np.asarray(Image.open(grid).convert("RGBA"))
    drawn, plain = (np.asarray(Image.open(name).convert("RGBA")) for name in ("drawn.png", "plain.png"))
    side = second.height
    places = [
        (top, left)
        for top in range(shown.shape[0] - side + 1)
        for left in range(shown.shape[1] - side + 1)
        if np.array_equal(shown[top : top + side, left : left + side], drawn)
    ]
    assert len(places) == 1
    assert not np.array_equal(drawn, plain)
    told = limner("inspect", "run/lora.safetensors")
    assert "LoRA" in told.out
    assert "icons" in told.out


def test_it_learns_nothing_else_and_says_whose_it_is(limner, here, tiny_model, pictures):
    trained(limner, "run", tiny_model, pictures)
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    weights = safetensors.torch.load_file(here / "run" / "checkpoints" / "step-000006" / "model.safetensors")
    assert all(name.startswith("adapter.parts.network:") for name in weights)
    config = json.loads((here / "run" / "config.json").read_text())
    assert (config["model"], config["adapter"]["rank"], config["system"]) == (str(tiny_model), 2, None)


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind, limner, here, tiny_model, pictures, monkeypatch):
    trained(limner, "whole", tiny_model, pictures, f"adapter.kind={kind}")
    for steps in (1, 3):
        with monkeypatch.context() as patch:
            stop = StopAt(steps)
            patch.setattr(loop, "StopRequests", lambda *_, stop=stop: stop)
            args = ("--resume", "parts") if steps > 1 else ()
            if args:
                assert limner("train", *args, "--device", "cpu").code in (0, 1)
            else:
                limner("train", "lora", "-m", tiny_model, "-d", pictures, "-o", "parts", "--device", "cpu",
                       *FEW, f"adapter.kind={kind}")  # fmt: skip
    assert limner("train", "--resume", "parts", "--device", "cpu").code == 0
    for name in ("lora.safetensors", "checkpoints/step-000006/ema.safetensors"):
        assert (here / "parts" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_what_cannot_be_is_told_before_the_first_step(limner, here, tiny_model, other_model, pictures):
    done = limner("train", "lora", "-m", "nowhere.safetensors", "-d", pictures, "-o", "run")
    assert (done.code, "nowhere.safetensors" in done.err) == (3, True)
    done = limner("train", "lora", "-m", tiny_model, "-d", here / "none", "-o", "run")
    assert (done.code, "none" in done.err) == (3, True)
    done = limner("train", "lora", "-m", tiny_model, "-d", pictures, "-o", "run", 'adapter.targets=["attn9"]')
    assert (done.code, "fits 'attn9'" in done.err) == (2, True)
    assert not (here / "run").exists()
    done = limner("train", "icons-tiny", "-m", tiny_model, "-o", "run")
    assert (done.code, "icons-tiny trains a system of its own: leave model out" in done.err) == (2, True)
    trained(limner, "run", tiny_model, pictures)
    copy = json.loads((here / "run" / "config.json").read_text()) | {"model": str(other_model)}
    (here / "run" / "lora.safetensors").unlink()
    (here / "run" / "config.json").write_text(json.dumps(copy))
    assert limner("train", "--resume", "run", "--device", "cpu").code == 3
