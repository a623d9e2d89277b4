"""A run that trains an adapter: from a folder of pictures to a file that draws what the run's own samples show."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from PIL import Image
from toy import StopAt

from limner import catalog
from limner.adapters.attaching import stack
from limner.errors import Assumed, UsageError
from limner.training import adapting, loop
from systems import flow_models, stable_diffusion

FEW = ["steps=6", "batch_size=2", "log_every=2", "save_every=2", "warmup=0", "lr=0.01", "adapter.rank=2"]


def trained(limner, out, model, pictures, *more):
    done = limner("train", "lora", "--model", model, "--data", pictures, "--out", out, "--device", "cpu", *FEW, *more)
    assert done.code == 0, done.err
    return done


def test_a_folder_of_pictures_becomes_a_file_that_draws_what_the_run_showed(
    limner, here, tiny_model, pictures, monkeypatch
):
    shown, draw = [], adapting.draw
    monkeypatch.setattr(adapting, "draw", lambda *told: shown.extend(draw(*told)) or shown)
    prompts = 'sample_prompts=["a blue square"]'
    done = trained(limner, "run", tiny_model, pictures, prompts, "ema_half_life=2")
    assert done.out.splitlines()[-1] == "run/lora.safetensors"
    assert len(list((here / "run" / "samples").glob("*.png"))) == 1
    asked = ("generate", "a blue square", "-m", tiny_model, "-s", 0)
    assert limner(*asked, "--lora", "run/lora.safetensors", "-o", "drawn.png").code == 0
    assert limner(*asked, "-o", "plain.png").code == 0
    drawn, plain = (Image.open(name) for name in ("drawn.png", "plain.png"))
    assert shown[0].tobytes() == drawn.tobytes() != plain.tobytes()
    told = limner("inspect", "run/lora.safetensors")
    assert "LoRA" in told.out
    (row,) = json.loads(limner("runs", "run", "--json").out)
    assert (row["recipe"], row["state"]) == ("lora", "finished")


def test_it_learns_nothing_else_and_says_whose_it_is(limner, here, tiny_model, pictures):
    trained(limner, "run", tiny_model, pictures)
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    weights = safetensors.torch.load_file(here / "run" / "checkpoints" / "step-000006" / "model.safetensors")
    assert all(name.startswith("adapter.parts.network:") for name in weights)
    config = json.loads((here / "run" / "config.json").read_text())
    assert (config["model"], config["adapter"]["rank"], config["system"]) == (str(tiny_model), 2, None)


@pytest.mark.parametrize("kind", ["lora", pytest.param("oft", marks=pytest.mark.slow)])
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
    done = limner("train", "lora", "-m", tiny_model, "-d", pictures, "-o", "more", "init_from=run/lora.safetensors")
    assert (done.code, "give RUN/checkpoints/step-…/ema.safetensors" in done.err) == (2, True)
    last = "init_from=run/checkpoints/step-000006/ema.safetensors"
    trained(limner, "more", tiny_model, pictures, last, "steps=1", "lr=1e-12", "seed=7")
    ended, began = (safetensors.torch.load_file(f"{run}/lora.safetensors") for run in ("run", "more"))
    assert all(torch.allclose(began[name], ended[name], atol=1e-3) for name in ended)
    assert any(ended[name].any() for name in ended if "lora_up" in name)
    (here / "run" / "lora.safetensors").unlink()
    (here / "run" / "config.json").write_text(json.dumps(copy))
    assert limner("train", "--resume", "run", "--device", "cpu").code == 3


# ------------------------------------------------------------------- words


@pytest.mark.parametrize("model", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_word_is_learned_and_said(model, limner, here, pictures, tmp_path):
    folder = getattr(stable_diffusion, model)(tmp_path / model)
    told = [
        "word.name=blob",
        "word.vectors=2",
        "word.like=a fox",
        *FEW[:-1],
        'sample_prompts=["a blob"]',
        "data.size=32",
    ]
    done = limner("train", "word", "-m", folder, "-d", pictures, "-o", "run", "--device", "cpu", *told)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "run/blob.safetensors"
    learned = safetensors.torch.load_file("run/blob.safetensors")
    assert {len(vectors) for vectors in learned.values()} == {2}
    asked = ("-m", folder, "-s", 0, "-W", 32, "-H", 32, "--steps", 2)
    for name, prompt, *more in (("a", "a blob", "--embedding", "run/blob.safetensors"), ("b", "a blob")):
        assert limner("generate", prompt, *asked, *more, "-o", f"{name}.png").code == 0
    assert (here / "a.png").read_bytes() != (here / "b.png").read_bytes()
    (grid,) = (here / "run" / "samples").glob("*.png")
    assert Image.open(grid).size[0] >= 32


def test_training_says_what_the_file_says_when_it_is_attached(tmp_path):
    system = catalog.load(stable_diffusion.sd1(tmp_path / "sd1"), dtype=torch.float32)
    plain = system.text_encoder.encode(["a blob of a fox"]).tokens
    learning = adapting.Wording(system, adapting.WordConfig(name="blob", vectors=3, like="a fox"), 0)
    with torch.no_grad():
        learning.vectors[0].normal_()
    said = system.text_encoder.encode(["a blob of a fox"]).tokens
    said.sum().backward()
    assert learning.vectors[0].grad.abs().sum(1).min() > 0
    assert not torch.allclose(said, plain)
    learning.write(tmp_path / "blob.safetensors")
    learning.off()
    assert torch.equal(system.text_encoder.encode(["a blob of a fox"]).tokens, plain)
    stack(system).attach(tmp_path / "blob.safetensors")
    assert torch.equal(system.text_encoder.encode(["a blob of a fox"]).tokens, said)
    stack(system).detach()


def test_captions_that_do_not_say_the_word_get_it_in_front(tmp_path, monkeypatch):
    system = catalog.load(stable_diffusion.sd1(tmp_path / "sd1"), dtype=torch.float32)
    learning, seen = adapting.Wording(system, adapting.WordConfig(name="blob"), 0), []
    monkeypatch.setattr(type(system), "examples", lambda self, batch, generator: seen.extend(batch["captions"]))
    learning.examples({"captions": ["a fox", "", "a Blob, red", "blobs"]}, torch.Generator())
    assert seen == ["blob, a fox", "blob", "a Blob, red", "blob, blobs"]
    for told, why in (
        ({"name": "a b"}, "word.name='a b'"),
        ({"vectors": 0}, "word.vectors=0"),
        ({"like": " "}, "no words"),
    ):
        with pytest.raises(UsageError, match=why):
            adapting.Wording(system, adapting.WordConfig(**told), 0)


# ------------------------------------------------------------------- whole networks


@pytest.mark.parametrize(
    "model", ["icons", "sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3", "flux"))]
)
def test_a_network_goes_on_learning_and_its_file_is_read(model, limner, here, pictures, tmp_path, tiny_model):
    makers = {"sd3": flow_models.sd3, "flux": flow_models.flux}
    source = tiny_model
    if model != "icons":
        source = (makers.get(model) or getattr(stable_diffusion, model))(tmp_path / model)
    few = [*FEW[:-1], "data.size=32", "steps=2", "save_every=2", "ema_half_life=0.1", "precision=fp32", "lr=0.02"]
    done = limner("train", "finetune", "-m", source, "-d", pictures, "-o", "run", "--device", "cpu", *few)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "run/final/finetune.safetensors"
    told: dict = {}
    if model in makers:
        files = flow_models.split_files(source, tmp_path / "files")
        told = {
            "vae": files["autoencoder"],
            "text_encoders": [files[n] for n in ("clip_l", "clip_g", "t5xxl") if n in files],
        }
    before, after = (
        catalog.load(source, dtype=torch.float32),
        catalog.load("run/final/finetune.safetensors", dtype=torch.float32, **told),
    )
    changes = []
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        apart = (old - new).abs().max() / old.abs().max().clamp(min=1e-6)
        changes.append(apart > 1e-2) if name.startswith("network.") else None
        assert name.startswith("network.") or apart < 1e-2, name
    assert sum(changes) > len(changes) / 2


def test_a_dit_goes_on_learning_and_a_sits_file_must_say_so(limner, here, pictures, tmp_path):
    folder = stable_diffusion.dit(tmp_path / "dit")
    for i, file in enumerate(sorted(pictures.glob("*.txt"))):
        file.write_text(str(i))
    few = [*FEW[:-1], "data.size=32", "steps=2", "save_every=2", "ema_half_life=0.1", "precision=fp32", "lr=0.02"]
    told = ("-d", pictures, "--device", "cpu", *few)
    done = limner("train", "finetune", "-m", folder, "-o", "run", *told)
    assert done.code == 0, done.err
    with pytest.warns(Assumed):
        after = catalog.load("run/final/finetune.safetensors", dtype=torch.float32, vae=folder / "vae")
    before = catalog.load(folder, dtype=torch.float32).network.state_dict()
    changed = {name: not torch.equal(t, before[name]) for name, t in after.network.state_dict().items()}
    assert [name for name, yes in changed.items() if not yes] == ["pos_embed"]

    (here / "sit.safetensors").symlink_to(here / "run" / "final" / "finetune.safetensors")
    (here / "vae").symlink_to(folder / "vae")
    done = limner("train", "finetune", "-m", "sit.safetensors", "-o", "more", *told)
    assert (done.code, "by its name alone: give name=sit-finetune" in done.err) == (2, True)
    done = limner("train", "finetune", "-m", "sit.safetensors", "-o", "more", *told, "name=sit-finetune")
    assert done.code == 0, done.err
    (here / "more" / "final" / "vae").symlink_to(folder / "vae")
    assert catalog.load("more/final/sit-finetune.safetensors", dtype=torch.float32).prediction.name == "velocity"


def test_a_folder_without_a_word_and_a_warmup_without_an_end_are_told(limner, here, tiny_model, pictures):
    for file in pictures.glob("*.txt"):
        file.unlink()
    few = ("-m", tiny_model, "-d", pictures, "--device", "cpu", *FEW[:-1], "data.size=32", "steps=2", "warmup=9")
    bare = "none of 3 pictures has a caption: put NAME.txt beside NAME, or say what all show, data.trigger=TEXT"
    told = limner("train", "lora", "-o", "bare", *few).out
    assert bare in told
    assert "warmup=9 is longer than the 2 steps: the learning rate never gets to lr=" in told
    told = limner("train", "lora", "-o", "said", *few[:-1], "data.trigger=a fox").out
    assert "has a caption" not in told
    assert "warmup" not in told
