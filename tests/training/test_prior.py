"""Prior preservation: what a step's loss is by hand and by diffusers' formula, and which pictures it is of."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from toy import StopAt

from limner import catalog, metadata, recipes
from limner.data.batches import DataConfig, open_batches
from limner.data.latents import LatentBatches
from limner.errors import FileProblem
from limner.systems.objectives import Objective
from limner.text import bpe
from limner.text.clip import CLIPTextConfig, CLIPTowers, CLIPTowersConfig
from limner.training import adapting, loop, prior
from limner.training.config import parse_overrides
from limner.training.loop import cut
from limner.training.prior import WithPrior
from limner.training.processes import Processes

CPU = torch.device("cpu")
FEW = ["steps=4", "batch_size=2", "log_every=2", "save_every=2", "warmup=0", "prior.images=3"]


@pytest.fixture
def pictures(here):
    (here / "pictures").mkdir()
    for i, color in enumerate(("red", "blue", "green", "black", "white")):
        Image.new("RGB", (40, 24 + 8 * (i % 2)), color).save(here / "pictures" / f"{i}.png")
    return here / "pictures"


@pytest.fixture
def of_class(here):
    """Five pictures of a class, one with a caption of its own."""
    (here / "class").mkdir()
    for i in range(5):
        Image.new("RGBA", (64, 48), (40 * i, 100, 200, 255)).save(here / "class" / f"{i}.png")
    (here / "class" / "3.txt").write_text("a third dog")
    return here / "class"


def batches(own, folder, system, weight=0.7) -> WithPrior:
    told = ["prior.prompt=a dog", f"prior.folder={folder}", f"prior.weight={weight}"]
    config = parse_overrides(recipes.get("lora-tiny"), told)
    return WithPrior(own, prior.opened(folder, config, CPU), config.prior.weight, system)


@pytest.mark.parametrize(("gamma", "parts"), [(0.0, 1), (1.0, 3)])
def test_the_loss_is_that_of_the_own_rows_plus_so_much_of_that_of_the_class(of_class, monkeypatch, gamma, parts):
    system = catalog.build(catalog.entry("icons-tiny").config)
    system.objective = Objective(min_snr_gamma=gamma)
    own = LatentBatches(open_batches(DataConfig(source="shapes", size=32, limit=8), 0, CPU), system, 1)
    batch = batches(own, of_class, system).batch(3, 6)
    assert batch["latents"].shape == (12, 8, 8, 8)
    rows: list[torch.Tensor] = []
    error = Objective.error

    def spied(self, output, target, **told):
        how = {name: value for name, value in told.items() if name != "weight"}
        for k, (o, t) in enumerate(zip(output, target, strict=True)):
            of_row = {name: x[k : k + 1] if torch.is_tensor(x) else x for name, x in how.items()}
            rows.append(error(self, o[None], t[None], **of_row))
        return error(self, output, target, **told)

    monkeypatch.setattr(Objective, "error", spied)
    found = sum(
        share * system.loss(part, "main", torch.Generator().manual_seed(k))["loss"]
        for k, (part, share) in enumerate(cut(batch, parts))
    )
    by_hand = torch.stack(rows[:6]).mean() + 0.7 * torch.stack(rows[6:]).mean()
    torch.testing.assert_close(found, by_hand)


def test_it_is_what_diffusers_trains_with(of_class, monkeypatch):
    """As train_dreambooth of diffusers says it: the halves of one batch."""
    system = catalog.build(catalog.entry("sd1-tiny").config)
    own = LatentBatches(open_batches(DataConfig(source="shapes", size=32, limit=8), 0, CPU), system, 1)
    batch, told = batches(own, of_class, system).batch(0, 2), []
    error = Objective.error

    def spied(self, output, target, **how):
        told.extend([output, target])
        return error(self, output, target, **how)

    monkeypatch.setattr(Objective, "error", spied)
    found = system.loss(batch, "main", torch.Generator().manual_seed(0))["loss"]
    model_pred, model_pred_prior = torch.chunk(told[0], 2, dim=0)
    target, target_prior = torch.chunk(told[1], 2, dim=0)
    loss = F.mse_loss(model_pred, target) + 0.7 * F.mse_loss(model_pred_prior, target_prior)
    torch.testing.assert_close(found, loss)


@pytest.mark.parametrize("views", [0, 1])
def test_pictures_of_the_class_have_the_size_of_the_step_and_their_words(pictures, of_class, views):
    system = catalog.build(catalog.entry("icons-tiny").config)
    fields = {"buckets": True, "bucket_step": 8, "latent_views": views, "trigger": "a sks dog"}
    images = open_batches(DataConfig(source="folder", folder=str(pictures), size=32, **fields), 0, CPU)
    both = batches(loop.encoded(images, system), of_class, system)
    kind, shapes, seen = "latents" if views else "images", set(), []
    for step in range(8):
        batch, own = both.batch(step, 2), both.own.batch(step, 2)
        n = len(own["ids"])
        assert torch.equal(batch[kind][:n], own[kind])
        assert batch[kind].shape == (2 * n, *own[kind].shape[1:])
        assert batch["prior"] == [False] * n + [True] * n
        assert batch["count"] == n
        assert batch["weight"].tolist() == pytest.approx([2.0] * n + [1.4] * n)
        for name, caption in zip(batch["ids"][n:], batch["captions"][n:], strict=True):
            assert caption == ("a third dog" if name == "prior/3.png" else "a dog")
        assert set(batch["captions"][:n]) == {"a sks dog"}
        shapes.add(batch[kind].shape[2:])
        seen += batch["ids"][n:]
    assert len(shapes) > 1
    assert set(seen) == {f"prior/{i}.png" for i in range(5)}


def test_processes_share_the_pictures_of_the_class_and_rows_that_weigh_nothing_have_none(of_class):
    system = catalog.build(catalog.entry("icons-tiny").config)
    images = open_batches(DataConfig(source="shapes", size=32, limit=8), 0, CPU)

    class Padded:
        def batch(self, *args, rank, world):
            batch = images.batch(*args, rank=rank, world=world)
            weight = torch.tensor([4 / 3, 0.0 if rank else 4 / 3])
            return batch | {"weight": weight, "count": 3, "mask": torch.zeros(2, 1, 32, 32)}

    both = batches(Padded(), of_class, system)
    parts = [both.batch(0, 4, rank=rank, world=2) for rank in (0, 1)]
    assert len({name for part in parts for name in part["ids"][2:]}) == 4
    assert parts[1]["weight"].tolist() == pytest.approx([8 / 3, 0, 0.7 * 8 / 3, 0])
    assert parts[0]["count"] == 3
    assert parts[0]["mask"].mean((1, 2, 3)).tolist() == [0, 0, 1, 1]


def trained(limner, recipe, model, out, *more):
    told = ("-m", model, "-d", "pictures", "--device", "cpu", "data.size=32", "prior.prompt=a {red|blue} dog")
    done = limner("train", recipe, *told, "-o", out, *FEW, *more)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize(
    "recipe", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("finetune", "word"))]
)
def test_a_class_is_drawn_before_the_first_step_and_a_resumed_run_ends_alike(
    recipe, limner, here, pictures, monkeypatch, request
):
    model = request.getfixturevalue("sd1_folder" if recipe == "word" else "tiny_model")
    trained(limner, recipe, model, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequests", lambda *_: StopAt(1))
        assert "saved at step 1" in trained(limner, recipe, model, "parts").out
    names = sorted(path.name for path in (here / "whole" / "prior").iterdir())
    assert names == [f"00000{i}.{ending}" for i in range(3) for ending in ("png", "txt")]
    before = {path.name: path.read_bytes() for path in (here / "parts" / "prior").iterdir()}
    for i in range(3):
        asked = metadata.read_settings(here / "whole" / "prior" / f"00000{i}.png")
        assert asked["seed"] == i
        assert before[f"00000{i}.txt"].decode() == f"{asked['prompt']}\n"
        assert asked["prompt"] in ("a red dog", "a blue dog")
    assert limner("generate", "-C", "whole/prior/000002.png", "-m", model, "-o", "again.png").code == 0
    drawn, again = (
        torch.tensor(list(Image.open(path).convert("RGB").tobytes()), dtype=torch.float32)
        for path in ("whole/prior/000002.png", "again.png")
    )
    assert (drawn - again).abs().max() <= 1  # as alone, not among others
    (here / "parts" / "prior" / "000001.png").unlink()
    (here / "parts" / "prior" / "000002.txt").unlink()
    assert limner("train", "--resume", "parts", "--device", "cpu").code == 0
    assert {path.name: path.read_bytes() for path in (here / "parts" / "prior").iterdir()} == before
    for name in ("model", "ema", "optimizer"):
        a, b = ((here / run / "checkpoints" / "step-000004" / f"{name}.safetensors") for run in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes()


def test_whole_pictures_are_not_drawn_again_and_those_of_a_folder_never(
    limner, here, tiny_model, pictures, of_class, monkeypatch
):
    monkeypatch.setattr(prior.pipeline, "generate", lambda *_, **__: pytest.fail("it drew"))
    assert trained(limner, "lora", tiny_model, "run", "prior.images=100", "prior.folder=class").code == 0
    assert not (here / "run" / "prior").exists()


def test_the_class_says_nothing_of_a_word():
    seen = []
    tower = CLIPTextConfig(width=32, depth=1, num_heads=1, hidden=32)
    base = SimpleNamespace(
        adapters=None,
        text_encoder=CLIPTowers(CLIPTowersConfig(towers=(tower,)), [bpe.shipped()]),
        examples=lambda batch, *_: seen.extend(batch["captions"]),
    )
    learning = adapting.Wording(base, adapting.WordConfig(name="blob"), 0)
    learning.examples({"captions": ["a fox", "a dog"], "prior": [False, True]}, torch.Generator())
    assert seen == ["blob, a fox", "a dog"]


def test_what_is_learned_is_not_drawn(limner, here, tiny_model, pictures, monkeypatch):
    """The class is drawn by the model as it came, whatever the adapter begins with."""
    begin = adapting.trainable.beginning
    plain = {}
    for name in ("zero", "random"):
        with monkeypatch.context() as patch:
            if name == "random":
                patch.setattr(adapting.trainable, "beginning", lambda *told: {
                    k: torch.nn.Parameter(torch.randn_like(v)) for k, v in begin(*told).items()
                })  # fmt: skip
            patch.setattr(loop, "StopRequests", lambda *_: StopAt(0))
            trained(limner, "lora", tiny_model, name)
        plain[name] = [path.read_bytes() for path in sorted((here / name / "prior").iterdir())]
    assert plain["zero"] == plain["random"]


@pytest.mark.parametrize(
    ("code", "message", "recipe", "changes"),
    [
        (2, "dreambooth learns beside pictures of a class: name it, prior.prompt='a dog'", "dreambooth", []),
        (2, "prior.weight=0.5 is of pictures of what?", "lora", ["prior.weight=0.5"]),
        (2, "prior.images=7 are drawn where there is no", "lora", ["prior.folder=class", "prior.images=7"]),
        (2, "prior.weight=0: give more than 0", "lora", ["prior.prompt=a dog", "prior.weight=0"]),
        (2, "have no captions: say what they show, prior.prompt=TEXT", "lora", ["prior.folder=class"]),
        (2, "class has masks, but", "lora", ["prior.folder=masked/class", "prior.prompt=a dog"]),
        (3, "nowhere is not a folder; name one with", "lora", ["prior.folder=nowhere"]),
        (2, "icons-tiny trains a system of its own, and prior", "icons-tiny", ["prior.prompt=a dog"]),
    ],
)
def test_a_prior_of_nothing_is_told_before_anything_is_drawn(
    limner, here, tiny_model, pictures, of_class, code, message, recipe, changes
):
    masked = here / "masked" / "class"
    masked.mkdir(parents=True)
    for name in ("a.png", "a-mask.png"):
        Image.new("RGB", (32, 32)).save(masked / name)
    model = [] if recipe == "icons-tiny" else ["-m", tiny_model, "-d", "pictures", "data.size=32"]
    done = limner("train", recipe, *model, "-o", "run", "--device", "cpu", *changes)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert message in done.err
    assert not (here / "run").exists()


def test_of_processes_that_see_other_folders_one_says_so(tmp_path, tiny_model):
    config = parse_overrides(recipes.get("lora"), ["prior.prompt=a dog", "prior.images=9"])
    model = catalog.load(tiny_model)
    alone = Processes(rank=1, world=2)
    alone.agree = lambda value: value
    with pytest.raises(FileProblem, match=r"000000\.png is not there: all processes must see"):
        prior.drawn(model, config, tmp_path, alone)
    first = Processes(rank=0, world=2)
    first.agree = lambda value: value
    assert prior.drawn(model, config, tmp_path, first) == tmp_path / "prior"
    settings = [metadata.read_settings(tmp_path / "prior" / f"{i:06d}.png")["seed"] for i in range(9)]
    assert all(b - a == 1 for a, b in pairwise(settings))
