from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from limner import catalog, metadata, recipes
from limner.data.batches import open_batches
from limner.data.latents import LatentBatches
from limner.models.pixels import PixelsConfig
from limner.training import loop, memory, state
from limner.training.config import parse_overrides
from limner.training.processes import Processes

RUN = ("--out", "run")
TINY = ("icons-tiny", *RUN)
AUTOENCODER = ("icons-autoencoder-tiny", *RUN)
LEVELS = ("widths", "encoder_blocks", "decoder_blocks")
SHAPES = {"x": (1, 32, 32), "y": (1,)}
DIGITS = ("data.source=mnist", "data.folder=../digits")
FEW = ("steps=3", "batch_size=4", "save_every=2", "log_every=1", "data.limit=8")


@pytest.fixture
def trained(limner, here):
    """A finished run of three steps in `run`."""
    result = limner("train", "icons-autoencoder-tiny", "--out", "run", "--device", "cpu", *FEW)
    assert result.code == 0, result
    return result


def test_a_recipe_is_trained_from_data_to_a_file_that_loads(limner, here, trained):
    run = here / "run"
    final = run / "final" / "icons-autoencoder-tiny.safetensors"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # else whoever trained could not be stopped any more
    assert trained.out.splitlines()[-1] == str(final.relative_to(here))
    assert catalog.load(final).family
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000003"]
    config = json.loads((run / "config.json").read_text())
    assert (config["steps"], config["data"]["limit"]) == (3, 8)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_resuming_a_finished_run_says_so_and_changes_nothing(limner, here, trained):
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    result = limner("train", "--resume", "run")
    assert (result.code, result.err) == (0, "")
    assert "run is finished: run/final/icons-autoencoder-tiny.safetensors" in result.out
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before
    found = re.search(r"limner (train icons-autoencoder-tiny --out NEW init_from=\S+) steps=N", result.out)
    assert found, result.out
    assert limner(*found[1].split(), "--device", "cpu", *FEW, "steps=1", "lr=1e-12").code == 0
    ended, began = (load_file(f"{run}/final/icons-autoencoder-tiny.safetensors") for run in ("run", "NEW"))
    assert all(torch.allclose(began[name], ended[name], atol=1e-6) for name in ended if "latent_" not in name)


def test_stop_after_saves_and_resume_goes_on_to_the_same_end(limner, here, trained):
    args = ("icons-autoencoder-tiny", "--out", "parts", "--device", "cpu", *FEW)
    result = limner("train", *args, "--stop-after", "0")
    assert result.code == 0
    assert "the time given is over: saved at step 0" in result.out
    assert not (here / "parts" / "final").exists()
    assert limner("train", "--resume", "parts", "--device", "cpu").code == 0
    whole, parts = (load_file(here / run / "final" / "icons-autoencoder-tiny.safetensors") for run in ("run", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_painting_with_a_run_that_was_stopped_asks_to_resume(limner, here):
    assert limner("train", *TINY, "--device", "cpu", "--stop-after", "0").code == 0
    result = limner("fox", "-m", "run")
    assert (result.code, result.out) == (3, "")
    assert result.err == "limner: run is a run that did not finish: go on with `limner train --resume run`\n"


@pytest.mark.parametrize("name", ["ema", "model"])
def test_painting_with_a_checkpoint_says_what_to_give(limner, here, trained, monkeypatch, name):
    result = limner("fox", "-m", f"run/checkpoints/step-000003/{name}.safetensors")
    assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
    assert "is of a checkpoint, which only training reads" in result.err
    assert "finish the run and give -m run" in result.err
    monkeypatch.chdir("run/checkpoints/step-000003")
    assert "give -m ../.." in limner("fox", "-m", f"{name}.safetensors").err
    assert "the run to finish, then -m ../.." in limner("inspect", f"{name}.safetensors").out


def test_a_run_that_never_saved_starts_anew(limner, here, trained):
    for folder in ("checkpoints", "final"):
        for path in sorted((here / "run" / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (here / "run" / folder).rmdir()
    result = limner("train", "--resume", "run", "--device", "cpu")
    assert result.code == 0
    assert "run never saved a checkpoint: starting anew" in result.out
    assert (here / "run" / "final" / "icons-autoencoder-tiny.safetensors").exists()


def test_a_run_that_another_process_trains_is_refused(limner, here):
    run = here / "run"
    run.mkdir()
    (run / "limner.lock").write_text("process 1 on earth, which was killed")
    with state.claim(run, recipes.get("icons-tiny")):
        before = {p: p.read_bytes() for p in run.iterdir()}
        result = limner("train", "--resume", "run")
        assert (result.code, result.out) == (3, "")
        assert result.err.startswith(f"limner: run is being trained by process {os.getpid()} on ")
        assert result.err.count("\n") == 1
        assert {p: p.read_bytes() for p in run.iterdir()} == before


@pytest.mark.parametrize(
    ("code", "message", "args"),
    [
        (2, "no recipe: limner train RECIPE --out RUN", []),
        (2, "no folder for the run", ["icons-tiny"]),
        (2, "no recipe 'icon-tiny'. Did you mean 'icons-tiny'", ["icon-tiny", "--out", "run"]),
        (2, "no field 'stepps'. Did you mean 'steps'", ["icons-tiny", "stepps=3", "--out", "run"]),
        (2, "steps=0: ", ["icons-tiny", "steps=0", "--out", "run"]),
        (2, "data.limit=-4: -4 cannot be", ["icons-tiny", "data.limit=-4", "steps=1", "--out", "run"]),
        (
            2,
            "system.network.depth=-1: -1 cannot be",
            ["icons-tiny", "system.network.depth=-1", "steps=1", "--out", "run"],
        ),
        (
            2,
            "system.defaults.guidance=nan: nan cannot be",
            ["icons-tiny", "system.defaults.guidance=nan", "steps=1", "--out", "run"],
        ),
        (2, "lr=nan: ", ["icons-tiny", "lr=nan", "--out", "run"]),
        (2, "not a field=value pair", ["icons-tiny", "steps", "--out", "run"]),
        (2, "no device 'tpu'", ["icons-tiny", "--out", "run", "--device", "tpu"]),
        (2, "--stop-after", ["icons-tiny", "--out", "run", "--stop-after", "-1"]),
        (2, "--stop-after", ["icons-tiny", "--out", "run", "--stop-after", "nan"]),
        (2, "--resume takes the run's folder and nothing else", ["icons-tiny", "--resume", "run"]),
        (2, "give data.latent_views=1 or more", [*TINY, "data.latent_views=0", "data.other_sizes=[[16,16,0.5]]"]),
        (2, "data.other_sizes: 18 x 16 is not", [*TINY, "data.other_sizes=[[18,16,0.5]]"]),
        (2, "optimizer=muon moves the linear layers", ["icons-autoencoder-tiny", "optimizer=muon", "--out", "run"]),
        (2, "width=64 is not in fours", [*TINY, "system.network.num_heads=0"]),
        (2, "width=60 is not in fours", [*TINY, "system.network.width=60"]),
        (2, "other_sizes=[[16,16,.5]]: give JSON (expected value at", [*TINY, "data.other_sizes=[[16,16,.5]]"]),
        (2, "max_tokens=0", [*TINY, "system.max_tokens=0"]),
        (2, "no sampler 'eulr'. Did you mean 'euler'", [*TINY, "system.defaults.sampler=eulr"]),
        (2, "steps is 0", [*TINY, "system.defaults.steps=0"]),
        (2, "network.channels=7, but", [*TINY, "system.network.channels=7"]),
        (2, "network.text_width=7, but", [*TINY, "system.network.text_width=7"]),
        (2, "hidden=0, base_grid=8", [*TINY, "system.network.hidden=0"]),
        (2, "optimizer=muon moves the linear layers", [*TINY, "system.network.depth=0", "optimizer=muon"]),
        (2, "max_tokens=0", ["icons-tiny", "--out", "made/here/run", "system.max_tokens=0"]),
        (2, "max_tokens=0", ["icons-tiny", "--out", "empty", "system.max_tokens=0"]),
        (2, "icons-autoencoder-tiny is an autoencoder", [*AUTOENCODER, 'sample_prompts=["red circle"]']),
        (2, "sampler 'eulr'", [*AUTOENCODER, "system.defaults.sampler=eulr"]),
        (2, "Invalid value for '--stop-after': 'soon': give a number; see", [*TINY, "--stop-after", "soon"]),
        (3, "train icons-autoencoder --out runs/icons-autoencoder`, or name its file", ["icons", "--out", "run"]),
        (3, "with system.autoencoder_from=FILE", ["icons", "--out", "run"]),
        (3, "full is a folder: give the path of a .saf", [*TINY, "system.autoencoder_from=full"]),
        (3, "full/file is a file: give --out a new folder", ["icons-tiny", "--out", "full/file"]),
        (3, "full/file is a file: give the folder of the run", ["--resume", "full/file"]),
        (2, "max_tokens=513: a prompt has 3 tokens, with its", [*TINY, "system.max_tokens=513"]),
        (2, "max_tokens=1: ", [*TINY, "system.max_tokens=1"]),
        (2, "system.name=: give", [*TINY, "system.name="]),
        (2, "name=nnnn", [*TINY, "name=" + 101 * "n"]),
        (2, "max_prompt_chars is 30000", [*TINY, "system.defaults.max_prompt_chars=30000"]),
        (2, "prediction=eps says nothing", [*TINY, "system.prediction=eps"]),
        (2, "batch_size=9999999999999: ", [*TINY, "batch_size=9999999999999"]),
        (2, "seed=9999999999999999999: ", [*TINY, "seed=9999999999999999999"]),
        (2, "name=..: ", [*TINY, "name=.."]),
        (2, "system.caption_dropout=2: ", [*TINY, "system.caption_dropout=2"]),
        (2, "the prompt is empty", [*TINY, 'sample_prompts=["a fox", ""]']),
        (2, "iddpm-tiny learns a variance by the bound alone", ["iddpm-tiny", "loss.variance_weight=0", *RUN]),
        (2, "loss.variance_weight=0.001, but ddpm-tiny says", ["ddpm-tiny", "loss.variance_weight=0.001", *RUN]),
        (2, "data.source=folder needs data.folder=PATH", [*TINY, "data.source=folder"]),
        (2, "pictures of 33 pixels are not in multiples of 4", [*TINY, "data.size=33"]),
        (2, "pictures of 2 pixels are not in multiples of 4", [*TINY, "data.size=2"]),
        (2, "pictures of 36 pixels are not in multiples of 8", ["icons-autoencoder-tiny", "data.size=36", *RUN]),
        (2, "pictures of 28 pixels are not in multiples of 8", ["icons-autoencoder-tiny", *DIGITS, *RUN]),
        (2, "data.latent_views are latents", ["icons-autoencoder-tiny", "data.latent_views=1", *RUN]),
        (2, "8 x 8 pixels are too small for the discriminator, wh", ["kl-f8-tiny", "data.size=8", *RUN]),
        (3, "no file nofile", ["kl-f8-tiny", "system.loss.perceptual_from=nofile", *RUN]),
        (2, "must name as many levels", [*TINY, "system.autoencoder.encoder_blocks=1"]),
        (2, "system.network.depth=999999: give 1,000 at", [*TINY, "system.network.depth=999999"]),
        (2, "autoencoder.encoder_blocks=9999: give", [*TINY, "system.autoencoder.encoder_blocks=1,9999"]),
        (2, "data.size=100000: give 4096 pixels at most", [*TINY, "data.size=100000"]),
        (4, "GB at least, and there are", [*TINY, "system.network.depth=900", "system.network.width=50000"]),
        (4, "batch_size=10000000 takes ", [*TINY, "batch_size=10000000"]),
        (4, "batch_size=10000000 takes ", [*AUTOENCODER, "batch_size=10000000"]),
        (2, "data.augment=view changes pictures as they", [*TINY, "data.augment=view"]),
        (2, "data.cache=x has no effect on data.source=shapes", [*TINY, "data.cache=x"]),
        (2, "data.split=test has no effect on data.source=sh", [*TINY, "data.split=test"]),
        (2, "data.folder=empty has no effect on data.source=", [*TINY, "data.folder=empty"]),
        (2, "one or more", [*TINY, *(f"system.autoencoder.{name}=[]" for name in LEVELS)]),
        (2, "pictures have 4 channels", [*TINY, "system.autoencoder.image_channels=3"]),
        (2, "widths=(0, 32): pictures have 4 channels, the others 1", [*TINY, "system.autoencoder.widths=0,32"]),
        (2, "2 must be a multiple of 4", [*TINY, "system.autoencoder.widths=16,2"]),
        (2, "24 must be a multiple of 4 that divides 4 x 16", [*TINY, "system.autoencoder.widths=16,24"]),
        (3, "run holds no training run", ["--resume", "run"]),
        (3, "full is not empty", ["icons-autoencoder-tiny", "--out", "full"]),
        (3, "cannot write full/file/run", ["icons-autoencoder-tiny", "--out", "full/file/run"]),
        (3, "File name too long", ["icons-autoencoder-tiny", "--out", f"made/{'x' * 300}"]),
        (3, "File name too long", ["--resume", "x" * 300]),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_leaves_nothing(limner, here, code, message, args):
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "file").write_text("mine")
    (here.parent / "digits").mkdir()
    digits = {f"x_{split}": np.zeros((1, 28, 28), np.uint8) for split in ("train", "test")}
    np.savez(here.parent / "digits" / "mnist.npz", **digits, y_train=[0], y_test=[0])
    result = limner("train", *args)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert sorted(str(p.relative_to(here)) for p in here.rglob("*")) == ["empty", "full", "full/file"]


def failing(monkeypatch, limner, change):
    """Train with batches that `change`(step, images) has changed."""
    original = loop.open_batches

    def changed(*args):
        batches = original(*args)
        draw = batches.batch

        def batch(step, *args, **kwargs):
            made = draw(step, *args, **kwargs)
            return made | {"images": change(step, made["images"])}

        batches.batch = batch
        return batches

    monkeypatch.setattr(loop, "open_batches", changed)
    return limner("train", "icons-autoencoder-tiny", "--out", "run", "--device", "cpu", *FEW)


def test_a_run_that_diverges_ends_with_5_and_one_line(limner, here, monkeypatch):
    result = failing(monkeypatch, limner, lambda step, images: images / (step != 2))
    assert result.code == 5
    assert result.err.startswith("limner: step 2 diverged: ")
    assert "the last checkpoint in run/checkpoints is good" in result.err
    assert result.err.count("\n") == 1
    assert [p.name for p in (here / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_run_that_diverges_at_once_leaves_nothing(limner, here, monkeypatch):
    result = failing(monkeypatch, limner, lambda step, images: images / 0)
    assert result.code == 5
    assert result.err.startswith("limner: step 0 diverged: ")
    assert result.err.endswith("no checkpoint was saved yet: lower the lr\n")
    assert not list(here.iterdir())


def test_a_run_too_large_for_the_memory_ends_with_4_and_leaves_nothing(limner, here, monkeypatch):
    def full(step, images):
        raise MemoryError

    result = failing(monkeypatch, limner, full)
    assert result.code == 4
    assert result.err.startswith("limner: out of memory: ")
    assert not list(here.iterdir())


def test_fields_that_change_nothing_are_told(limner, here, monkeypatch):
    digits = {
        f"{name}_{part}": np.zeros(shape, np.uint8) for part in ("train", "test") for name, shape in SHAPES.items()
    }
    np.savez("mnist.npz", **digits)
    few = ("data.source=mnist", "data.folder=.", "data.size=64", "muon_lr_scale=3", "--stop-after", "0")
    result = limner("train", *AUTOENCODER, "--device", "cpu", *few)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[:2] == [
        "muon_lr_scale=3 has no effect with optimizer=adamw",
        "data.size=64 has no effect: the pictures of mnist have 32 pixels",
    ]


def test_a_step_is_measured_without_its_weights_and_a_larger_size_by_what_it_holds(monkeypatch):
    needs = []
    monkeypatch.setattr(memory, "compare", lambda need, *_: needs.append(need))
    torch.manual_seed(0)
    config = parse_overrides(recipes.get("icons-tiny"), ["data.limit=8", "data.other_sizes=[[64,64,0.99]]"])
    system = catalog.build(config.system)
    batches = LatentBatches(open_batches(config.data, 0, torch.device("cpu")), system, 1)
    for step in (0, next(k for k in range(1000) if len(batches.batch(k, 32)["ids"]) == 32)):
        monkeypatch.setattr(
            batches, "batch", lambda _, *a, step=step, **kw: LatentBatches.batch(batches, step, *a, **kw)
        )
        memory.check_batch(system, batches, config, Processes())
    large, main = needs
    assert 0.8 < large / main < 1.2  # a quarter of the pictures of four times the size
    x = torch.ones(100, 100)
    weight = torch.nn.Parameter(torch.ones(100, 100))
    kept = SimpleNamespace(parameters=lambda: [weight], loss=lambda *_: {"loss": ((x @ weight).exp() @ weight).sum()})
    assert memory.kept_by(kept, {}, "main", torch.device("cpu")) == 2 * 100 * 100 * 4  # x and its exponential


def test_a_run_that_is_told_to_end_has_done_as_asked(limner, here, monkeypatch):
    monkeypatch.setattr(loop.StopRequests, "asked", lambda self: 2)  # SIGTERM
    result = limner("train", *AUTOENCODER, "--device", "cpu", *FEW)
    assert (result.code, result.err) == (0, "")
    assert "terminated: saved at step 0; to go on: limner train --resume run" in result.out


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in recipes.names() if n.endswith("-tiny") and recipes.get(n).system])
def test_every_tiny_recipe_is_trained_and_draws_by_commands_alone(here, name):
    def limner(*args: str) -> str:
        command = [sys.executable, "-m", "limner", *args, "--device", "cpu"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    final = limner("train", name, "--out", "run").splitlines()[-1]
    assert final == f"run/final/{name}.safetensors"
    losses = [json.loads(line)["loss"] for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    system = recipes.get(name).system
    task = catalog.entry(system.name).task
    if recipes.get(name).distillation is None:  # whose levels come nearer one another while it learns
        assert sum(losses[-5:]) < (0.9 if task == "classification" else 0.6) * sum(losses[:5])
    if task == "classification":  # of much noise no class can be told
        return
    disc = Image.new("RGBA", (32, 32))
    ImageDraw.Draw(disc).ellipse((6, 6, 26, 26), fill=(225, 40, 45, 255))
    disc.save("disc.png")
    on_white = isinstance(getattr(system, "autoencoder", None), PixelsConfig)
    words = {"autoencoding": ["-i", "disc.png"], "unconditional": []}
    asked = words.get(task, ["red circle" if on_white else "solid red circle"])
    (path,) = limner("generate", *asked, "-m", "run", "--seed", "0").splitlines()
    if task == "unconditional":
        assert Image.open(path).convert("L").getextrema()[1] > 0
        return
    picture = Image.open(path).convert("RGBA")
    red, green, blue, alpha = (np.array(picture) / 255.0).transpose(2, 0, 1)
    alpha = 1 - (green + blue) / 2 if on_white else alpha
    there = (np.array(disc.resize(picture.size))[..., 3] > 127).astype(float)
    if on_white:  # large or small, filled or not
        assert alpha[there == 0].mean() < 0.8 * alpha[there > 0].mean()
    else:
        assert abs(alpha - there).mean() < 0.15  # a disc, about where it should be
    assert (red * alpha).sum() > 1.1 * max((green * alpha).sum(), (blue * alpha).sum())


def test_ctrl_c_saves_and_ends_with_130(limner, here, monkeypatch):
    monkeypatch.setattr(loop.StopRequests, "asked", lambda self: 3)
    result = limner("train", "icons-autoencoder-tiny", "--out", "run", "--device", "cpu", *FEW)
    assert result.code == 130
    assert "interrupted: saved at step 0" in result.out
    assert result.err == ""  # said once
    assert [p.name for p in (here / "run" / "checkpoints").iterdir()] == ["step-000000"]


def test_a_checkpoint_is_packed_as_the_final_weights_of_its_step_would_be(limner, here, monkeypatch):
    """What a run that was cut short leaves is as good as what one of fewer steps would have."""
    assert limner("train", "icons-tiny", "-o", "run", "steps=4", "save_every=4", "sample_every=0").code == 0
    pack = Path(__file__).parents[2] / "tools" / "pack.py"
    for source, out in (("run", "a.safetensors"), ("run/checkpoints/step-000004", "b.safetensors")):
        monkeypatch.setattr(sys, "argv", [str(pack), source, out, "--bits", "32"])
        runpy.run_path(str(pack), run_name="__main__")
    assert (here / "a.safetensors").read_bytes() == (here / "b.safetensors").read_bytes()
    assert limner("red circle", "-m", "b.safetensors", "-s", 1, "--steps", 1, "-o", "c.png").code == 0


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_sd1_tiny_learns_and_is_drawn_from(limner, here):
    args = (
        "sd1-tiny",
        *RUN,
        "--device",
        "cpu",
        "steps=30",
        "batch_size=12",
        "warmup=3",
        "log_every=10",
        "sample_prompts=[]",
    )
    assert limner("train", *args).code == 0
    first, _, last = losses(here / "run")
    assert last < 0.75 * first
    assert limner("red circle", "-m", "run", "-s", 1, "-o", "circle.png").code == 0
    settings = metadata.read_settings(here / "circle.png")
    assert (settings["model"], settings["width"]) == ("sd1-tiny", 32)
    assert len(Image.open("circle.png").convert("RGB").getcolors(1024)) > 100


SMALL_SD1 = (
    "system.network.widths=32,64", "system.network.num_blocks=1", "system.network.depths=1,0",
    "system.network.text_width=64", "system.autoencoder.widths=32,64", "system.autoencoder.blocks=1",
    'system.text_encoder.towers=[{"width":64,"depth":2,"num_heads":1,"hidden":128}]', "system.defaults.width=32",
    "system.defaults.height=32", "system.defaults.steps=4", "data.source=shapes", "data.size=32", "data.limit=16",
    "steps=60", "batch_size=4", "lr=2e-3", "lr_schedule=cosine", "warmup=5", "precision=fp32", "log_every=20",
    'sample_prompts=["red circle"]',
)  # fmt: skip


@pytest.mark.parametrize(
    "whole", ["ours", *(pytest.param(name, marks=pytest.mark.slow) for name in ("folder", "file", "parts"))]
)
@pytest.mark.filterwarnings("ignore")
def test_sd1_learns_beside_the_autoencoder_and_the_words_of_any_file(limner, here, sd1_folder, whole):
    source = catalog.load(sd1_folder)
    given = dict.fromkeys(("autoencoder", "text_encoder"), sd1_folder)
    if whole == "file":
        assert limner("convert", sd1_folder, "whole.safetensors").code == 0
        given = dict.fromkeys(given, Path("whole.safetensors"))
    elif whole == "parts":
        given = {"autoencoder": sd1_folder / "vae", "text_encoder": sd1_folder / "text_encoder"}
    elif whole == "ours":
        config = catalog.config_of(catalog.recognise(sd1_folder))
        catalog.save(source, config, here / "ours.safetensors")
        given = dict.fromkeys(given, Path("ours.safetensors"))
    steps = () if whole == "folder" else ("steps=1",)
    files = [f"system.{name}_from={file}" for name, file in given.items()]
    result = limner("train", "sd1", *RUN, "--device", "cpu", *SMALL_SD1, *files, *steps)
    assert result.code == 0, result
    if whole == "folder":
        assert losses(here / "run")[-1] < 0.5 * losses(here / "run")[0]
    assert limner("red circle", "-m", "run", "-s", 1, "--steps", 2, "-o", "circle.png").code == 0
    trained = catalog.load(here / "run" / "final" / "sd1.safetensors")
    for part in ("autoencoder", "text_encoder"):
        ours, theirs = (getattr(system, part).state_dict() for system in (trained, source))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    assert trained.network.state_dict().keys() == source.network.state_dict().keys()


@pytest.mark.parametrize(
    ("code", "message", "args"),
    [
        (2, "with system.autoencoder_from=FILE and system.text_encoder_from=FILE", ["sd1"]),
        (2, "of Stable Diffusion 1, with system.text_encoder_from=FILE", ["sd1", "system.autoencoder_from=SD1"]),
        (3, "no autoencoder no.safetensors: name its file with system.autoencoder_from=FILE",
         ["sd1", *SMALL_SD1, "system.autoencoder_from=no.safetensors", "system.text_encoder_from=SD1"]),
        (3, "no text encoder no.safetensors: name its file with system.text_encoder_from=FILE",
         ["sd1", *SMALL_SD1, "system.autoencoder_from=SD1", "system.text_encoder_from=no.safetensors"]),
        (3, "in the file, (32, 3, 3, 3) in the model",
         ["sd1", *SMALL_SD1, "system.autoencoder_from=ODD", "system.text_encoder_from=SD1"]),
        (3, "the U-Net reads with CLIP-L, 96 wide, but the text encoders given are 64 wide",
         ["sd1", *SMALL_SD1, "system.autoencoder_from=SD1", "system.text_encoder_from=SD1",
          "system.network.text_width=96",
          'system.text_encoder.towers=[{"width":96,"depth":2,"num_heads":1,"hidden":128}]']),
        (3, "holds no text encoder of CLIP's kind",
         ["sd1", *SMALL_SD1, "system.autoencoder_from=SD1", "system.text_encoder_from=ODD"]),
        (2, "system.text_encoder_from=SD1 is for CLIP and T5", ["icons-tiny", "system.text_encoder_from=SD1"]),
    ],
)  # fmt: skip
def test_what_sd1_cannot_learn_beside_is_said_in_a_line(limner, here, sd1_folder, code, message, args):
    (here / "SD1").symlink_to(sd1_folder)
    odd = load_file(sd1_folder / "vae" / "diffusion_pytorch_model.safetensors")
    odd["encoder.conv_in.weight"] = odd["encoder.conv_in.weight"][:, :, :1].clone()
    save_file(odd, here / "ODD")
    result = limner("train", *args, "--out", "run", "--device", "cpu")
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (here / "run").exists()


def test_a_run_starts_from_a_file_of_stable_diffusion_in_full_precision(limner, here, sd1_folder, monkeypatch):
    monkeypatch.setattr(catalog, "_multiplies_bf16", lambda: True)
    args = ("train", "sd1", *RUN, "--device", "cpu", *SMALL_SD1, f"init_from={sd1_folder}", "steps=1", "lr=1e-20")
    assert limner(*args).code == 0
    trained = catalog.load(here / "run" / "final" / "sd1.safetensors").state_dict()
    source = catalog.load(sd1_folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(trained[name], source[name]) for name in source)
