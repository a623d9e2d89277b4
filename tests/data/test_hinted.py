"""Hints: those of the very pictures that a batch holds, however these were cut, mirrored, moved and kept."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from limner import hints
from limner.data.batches import DataConfig, open_batches
from limner.data.hinted import GREY, made, to_hints
from limner.data.latents import encoded
from limner.errors import FileProblem, UnknownName, UsageError

VIEWS = {"crop": "random", "mirror": True, "latent_views": 3}


class Whole(nn.Module):
    """A system whose latents are the picture."""

    grid = 1

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = nn.Identity()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A few large shapes, opaque."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    """Pictures with a copy of themselves as hint, but for one without."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(5):
        picture(i).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"number {i}")
        if i:
            picture(i).save(place / f"{i}{'-.'[i % 2]}hint.png")
    return place


def opened(place, **fields):
    config = DataConfig(**{"source": "folder", "folder": str(place or ""), "size": 32} | fields)
    return encoded(open_batches(config, 0, torch.device("cpu")), Whole())


def seen(batch):
    """The pictures of a batch, and its hints."""
    return (batch["latents"] if "latents" in batch else batch["images"]), batch["hints"]


WAYS = [
    (None, {"source": "shapes", "augment": "view"}),
    (None, {"source": "shapes", "latent_views": 3, "limit": 8, "other_sizes": ((16, 24, 0.5),)}),
    ("folder", {"crop": "random", "mirror": True}),
    ("folder", VIEWS | {"buckets": True, "bucket_step": 8}),
    ("folder", VIEWS | {"cache": "cache"}),
]


@pytest.mark.parametrize(("source", "fields"), WAYS)
def test_they_are_made_of_the_pictures_that_are_learned(source, fields, folder, here):
    batches = opened(folder if source else None, hints="canny", **fields)
    edges = 0
    for step in range(4):
        images, found = seen(batches.batch(step, 4))
        assert torch.equal(found, to_hints(made("canny", images)))
        assert found.shape == (len(images), 3, *images.shape[2:])
        edges += found.sum()
    assert edges > 0
    first, hint = getattr(batches, "stream", getattr(batches, "batches", batches)).first(1)[0]
    assert (len(hint), hint.dtype, bool(first)) == (1, torch.uint8, True)


@pytest.mark.parametrize("fields", [{"crop": "random", "mirror": True}, VIEWS, VIEWS | {"cache": "cache"}])
def test_those_beside_are_cut_and_mirrored_as_their_pictures(fields, folder, here, capsys):
    batches = opened(folder, hints="beside", **fields)
    for step in range(4):
        batch = batches.batch(step, 4)
        images, found = seen(batch)
        assert torch.allclose(found, (images[:, :3] + 1) / 2, atol=2e-3)
        assert "0.png" not in batch["ids"]
    assert "left out: 0.png has no hint beside it" in capsys.readouterr().err


def test_a_file_of_kept_latents_is_made_again_for_another_hint(folder, here, capsys):
    told = VIEWS | {"cache": "cache", "hints": "beside"}
    before = {tuple(b["ids"]): b["hints"] for b in (opened(folder, **told).batch(k, 1) for k in range(4))}
    picture(9).save(folder / "2-hint.png")
    after = opened(folder, **told)
    assert "made again: 1 stale" in capsys.readouterr().err
    for step in range(4):
        batch = after.batch(step, 1)
        assert torch.equal(batch["hints"], before[tuple(batch["ids"])]) == (batch["ids"] != ["2.png"])


def test_shards_and_tables_have_them_too(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in (1, 2):
            for ending in ("png", "hint.png"):
                data = io.BytesIO()
                picture(i).save(data, "PNG")
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = data.tell()
                tar.addfile(member, io.BytesIO(data.getvalue()))
    sources = {"webdataset": tmp_path / "a.tar"}
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with tarfile.open(tmp_path / "a.tar") as tar:
        rows = {
            name: [tar.extractfile(f"{i}.{end}").read() for i in (1, 2)]
            for name, end in (("image", "png"), ("hint", "hint.png"))
        }
    parquet.write_table(pyarrow.table(rows | {"text": ["one", "two"]}), tmp_path / "a.parquet")
    for source, file in (sources | {"parquet": tmp_path / "a.parquet"}).items():
        images, found = seen(opened(file, source=source, hints="beside").batch(0, 2))
        assert torch.allclose(found, (images[:, :3] + 1) / 2, atol=2e-3)


def test_a_batch_of_edges_is_that_of_its_pictures_and_makers_keep_their_colours():
    images = torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) for i in range(4)])
    for one, found in zip(images, hints.edges(images), strict=True):
        alone = hints.canny(Image.fromarray(one.permute(1, 2, 0).numpy()))
        assert np.array_equal(np.array(alone)[..., 0] > 0, found.numpy())
    floats = torch.cat([images.float() / 127.5 - 1, torch.ones(4, 1, 32, 40)], 1)
    for maker, make in hints.MAKERS.items():
        wanted = np.array(make(picture(1)))
        found = to_hints(made(maker, floats))[1].mul(255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(found, wanted), maker
        assert (maker in GREY) == (len(made(maker, floats)[0]) == 1)


def test_what_cannot_be_had_is_told(folder):
    for fields, error, why in (
        ({"hints": "cany"}, UnknownName, "canny"),
        ({"hints": "depth"}, UsageError, "NAME-hint.png"),
        ({"hints": "lineart"}, UsageError, "lineart"),
        ({"hints": "beside", "source": "shapes", "folder": ""}, UsageError, "nothing lies beside"),
    ):
        with pytest.raises(error, match=why):
            opened(folder, **fields)
    picture(0).save(folder / "0-hint.png")
    picture(3, 20, 16).save(folder / "4-hint.png")
    with pytest.raises(FileProblem, match=r"the hint of 4\.png has 20 x 16 pixels, the picture 40 x 32"):
        opened(folder, hints="beside", bad="raise").batch(0, 5)
    for file in folder.glob("*hint.png"):
        file.unlink()
    with pytest.raises(FileProblem, match=r"no picture in .* has a hint: put NAME-hint.png beside NAME"):
        opened(folder, hints="beside")
