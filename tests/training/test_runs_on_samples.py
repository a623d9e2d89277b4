"""Runs that learn from files: resumed to the same bits, with bad samples told, and masks in the loss."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from toy import StopAt, ToyBatches, ending, fit

from limner import catalog, recipes
from limner.data.batches import DataConfig, open_batches
from limner.errors import UsageError
from limner.sampling import predictions
from limner.systems.objectives import Objective
from limner.training import loop
from limner.training.config import TrainConfig, parse_overrides

sys.path.append(str(Path(__file__).parent.parent / "data"))
import stored_pictures as make


def configured(recipe: str, folder: Path, *changes: str) -> TrainConfig:
    few = ("steps=4", "batch_size=4", "log_every=1", "save_every=2", "warmup=0", "sample_prompts=[]")
    config = replace(recipes.get(recipe), data=DataConfig(source="folder", folder=str(folder), size=32))
    return parse_overrides(config, [*few, "data.buckets=true", "data.bucket_step=8", *changes])


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("icons-autoencoder-tiny", ("data.crop=random", "data.mirror=true")),
        ("icons-tiny", ("data.crop=random", "data.latent_views=2", "data.cache=CACHE", "data.shuffle_tags=true")),
    ],
)
def test_a_run_on_a_folder_resumes_to_the_same_bits_past_bad_samples(tmp_path, monkeypatch, capsys, recipe, changes):
    folder = make.folder(tmp_path / "pictures")
    (folder / "p03.png").write_bytes(make.picture(3, 40, 40)[:-40])
    (folder / "p06.png").write_text("no picture")
    changes = [change.replace("CACHE", str(tmp_path / "cache")) for change in changes]
    config = configured(recipe, folder, *changes)
    assert loop.train(config, tmp_path / "whole", device="cpu") == 0
    with monkeypatch.context() as patched:
        patched.setattr(loop, "StopRequests", lambda seconds: StopAt(2))
        assert loop.train(config, tmp_path / "parts", device="cpu") == 1
    assert loop.train(config, tmp_path / "parts", device="cpu", resume=True) == 0
    assert ending(tmp_path / "whole", config) == ending(tmp_path / "parts", config)
    said = capsys.readouterr()
    assert "pictures in buckets: 3 of 24 x 40, " in said.out
    last = lines(tmp_path / "whole")[-1]
    assert last["bad_samples"] == 2
    told = [name for row in lines(tmp_path / "whole") for name in row.get("left_out", [])]
    assert {name.split()[0] for name in told} == {"p03.png", "p06.png"}
    assert len(told) == 2
    assert [row["images"] for row in lines(tmp_path / "parts")] == [row["images"] for row in lines(tmp_path / "whole")]
    assert said.err.count("left out: p03.png") == 3


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("icons-tiny", "data.bucket_step=6", "data.bucket_step=6 is not in multiples of 4, which icons-tiny needs"),
        ("icons-autoencoder-tiny", "data.bucket_step=12", "data.bucket_step=12 is not in multiples of 8"),
        ("icons-autoencoder-tiny", "data.cache=x", "data.cache=x keeps latents, an autoencoder learns from pictures"),
        ("icons-autoencoder-tiny", "data.masks=alpha", "data.masks=alpha has no effect on icons-autoencoder-tiny"),
    ],
)
def test_what_a_system_cannot_learn_from_is_refused(tmp_path, recipe, change, message):
    with pytest.raises(UsageError, match=message):
        loop.train(configured(recipe, make.folder(tmp_path / "a"), change), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_fields_that_change_nothing_are_told(tmp_path):
    tell = [
        (("data.latent_views=2",), "data.latent_views=2 would be one view"),
        (("data.cache=x", "data.crop=random"), "data.crop and data.mirror have no effect on one view"),
    ]
    for changes, said in tell:
        assert [line[: len(said)] for line in loop.vain(configured("icons-tiny", tmp_path, *changes), 32)] == [said]
    assert loop.vain(configured("icons-tiny", tmp_path, "data.latent_views=2", "data.mirror=true"), 32) == []


def test_masks_that_a_system_does_not_read_are_told(tmp_path, capsys):
    folder = make.folder(tmp_path / "a", make.all_of([(32, 32)] * 4))
    (folder / "p00-mask.png").write_bytes(make.picture(0, 32, 32))
    assert loop.train(configured("icons-autoencoder-tiny", folder, "steps=1"), tmp_path / "run", device="cpu") == 0
    assert "masks have no effect on icons-autoencoder-tiny: data.masks=none" in capsys.readouterr().out


def test_rows_that_do_not_count_are_no_images_that_were_seen(tmp_path):
    class Padded(ToyBatches):
        def batch(self, *args, **kwargs):
            return super().batch(*args, **kwargs) | {"count": 5}

    assert fit(tmp_path / "run", batches=Padded()) == 0
    assert [row["images"] for row in lines(tmp_path / "run")] == [5 * row["step"] for row in lines(tmp_path / "run")]


def test_an_autoencoder_measures_its_latents_of_all_shapes(tmp_path):
    torch.manual_seed(0)
    config = configured("icons-autoencoder-tiny", make.folder(tmp_path / "a"))
    system, batches = catalog.build(config.system), open_batches(config.data, 0, torch.device("cpu"))
    system.finish(batches, chunk=4)
    images = [batches.batch(k, 4)["images"] for k in range(10)]
    assert len({image.shape for image in images}) > 1
    with torch.no_grad():
        z = torch.cat([system.autoencoder.posterior(x)[0].transpose(0, 1).flatten(1) for x in images], 1)
    assert torch.allclose(system.autoencoder.latent_mean, z.mean(1), atol=1e-6)
    assert torch.allclose(system.autoencoder.latent_std, z.std(1).clamp_min(1e-3), atol=1e-6)


def test_masks_and_weights_multiply_the_errors():
    output, target = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    errors = (output - target).square()

    def error(mask=None, weight=None):
        return Objective().error(output, target, predictions.get("eps"), 1.0, torch.ones(2, 1, 1, 1), mask, weight)

    assert torch.equal(error(), F.mse_loss(output, target))
    mask = torch.zeros(2, 1, 16, 32)
    mask[0, :, :, :8] = 1  # the first of four columns
    mask[1, :, :8, 24:28] = 1  # half of the last column's upper place
    alone = errors[0, :, :, 0].mean(), errors[1, :, 0, 3].mean()
    assert torch.allclose(error(mask), sum(alone) / 2)
    assert torch.allclose(error(weight=torch.tensor([2.0, 0.0])), errors[0].mean())
    assert torch.allclose(error(mask, torch.tensor([0.0, 1.0])), alone[1] / 2)


def test_a_system_learns_nothing_where_the_mask_is_black():
    torch.manual_seed(0)
    system = catalog.build(recipes.get("icons-tiny").system)
    batch = {"images": torch.rand(2, 4, 32, 32) * 2 - 1, "captions": ["a", "b"]}
    plain, white, black = (
        system.loss(batch | more, "main", torch.Generator().manual_seed(0))["loss"]
        for more in ({}, {"mask": torch.ones(2, 1, 32, 32)}, {"mask": torch.zeros(2, 1, 32, 32)})
    )
    assert torch.allclose(plain, white)
    assert black == 0 < plain
