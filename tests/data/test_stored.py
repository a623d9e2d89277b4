"""Latents in files: used instead of the autoencoder, made again when stale or torn, and nothing else made again."""

from __future__ import annotations

import os

import numpy as np
import pytest
import stored_pictures as make
import torch
from PIL import Image
from torch import nn

from limner.data import stored
from limner.data.batches import DataConfig, open_batches
from limner.data.images import to_float
from limner.data.latents import encoded
from limner.data.stored import StoredLatents
from limner.errors import FileProblem

BUCKETS = {"buckets": True, "bucket_step": 8}


class Halves(nn.Module):
    """A system whose latents are every second pixel, times a weight; counts what it is asked."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.autoencoder = nn.Linear(1, 1, bias=False)
        self.autoencoder.weight.data.fill_(weight)
        self.asked = 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += len(images)
        return images[:, :, ::2, ::2] * self.autoencoder.weight[0, 0]


def opened(folder, system=None, seed=0, **fields) -> tuple[StoredLatents, Halves]:
    config = DataConfig(source="folder", folder=str(folder), **{"size": 32, "latent_views": 1} | fields)
    system = system or Halves()
    batches = encoded(open_batches(config, seed, torch.device("cpu")), system)
    assert isinstance(batches, StoredLatents)
    return batches, system


def files(cache):
    return sorted(p for p in cache.rglob("*") if p.is_file())


def same(one, other, steps=6):
    """Whether both give the same batches."""
    return all(
        torch.equal(a["latents"], b["latents"]) and a["ids"] == b["ids"] and a["captions"] == b["captions"]
        for a, b in ((one.batch(step, 4), other.batch(step, 4)) for step in range(steps))
    )


@pytest.mark.parametrize("fields", [{}, BUCKETS, {"crop": "random", "mirror": True, "latent_views": 3, **BUCKETS}])
def test_kept_latents_are_those_of_the_pictures_and_are_made_once(tmp_path, fields):
    folder, cache = make.folder(tmp_path / "a"), tmp_path / "cache"
    held, system = opened(folder, **fields)
    views = fields.get("latent_views", 1)
    assert system.asked == 10 * views
    first, system = opened(folder, cache=str(cache), **fields)
    assert system.asked == 10 * views
    assert len(files(cache)) == 10
    again, system = opened(folder, cache=str(cache), **fields)
    assert system.asked == 0
    assert same(held, first)
    assert same(held, again)
    batch = again.batch(0, 4)
    batches = open_batches(again.stream.config, 0, torch.device("cpu"))
    for latents, name in zip(batch["latents"], batch["ids"], strict=True):
        height, width = (2 * n for n in latents.shape[1:])
        i = batches.samples.ids.index(name)
        looks = [again.look(i, view) for view in range(views)]
        wanted = [to_float(torch.from_numpy(batches.picture(i, width, height, *look)))[:, ::2, ::2] for look in looks]
        assert any(torch.equal(latents, one.half().float()) for one in wanted)


def test_view_0_is_the_middle_and_the_others_are_taken_as_often(tmp_path):
    folder = make.folder(tmp_path / "a", make.all_of([(64, 32)]))
    batches, _ = opened(folder, crop="random", latent_views=4)
    assert batches.look(0, 0) == ((0.5, 0.5), False)
    assert len({batches.look(0, view) for view in range(4)}) == 4
    found = batches.batch(0, 200)["latents"]
    counts = [sum(torch.equal(one, view.float()) for one in found) for view in batches.held[0]["latents"]]
    assert sum(counts) == 200
    assert min(counts) > 25


@pytest.mark.parametrize("what", ["touched", "longer", "moved time"])
def test_a_picture_that_changed_is_encoded_again(tmp_path, capsys, what):
    folder, cache = make.folder(tmp_path / "a"), tmp_path / "cache"
    opened(folder, cache=str(cache))
    before = {p: p.read_bytes() for p in files(cache)}
    file = folder / "p03.png"
    if what == "touched":
        os.utime(file)
    elif what == "longer":
        file.write_bytes(make.picture(9, 50, 50))
    else:
        os.utime(file, (1, 1))
    batches, system = opened(folder, cache=str(cache))
    assert system.asked == 1
    assert batches.count == {"new": 0, "stale": 1, "torn": 0}
    assert f"latents in {cache} were made again: 1 stale" in capsys.readouterr().err
    assert sum(p.read_bytes() != before[p] for p in files(cache)) == 1
    assert same(batches, opened(folder)[0])


@pytest.mark.parametrize(
    "change",
    [{"system": 2.0}, {"size": 64}, {"crop": "random", "latent_views": 2}, {"masks": "none"}, {"version": 2}, BUCKETS],
)
def test_other_weights_shapes_and_views_make_all_stale(tmp_path, monkeypatch, change):
    folder, cache = make.folder(tmp_path / "a"), tmp_path / "cache"
    opened(folder, cache=str(cache))
    system = Halves(change.get("system", 1.0))
    monkeypatch.setattr(stored, "VERSION", change.get("version", stored.VERSION))
    fields = {name: value for name, value in change.items() if name not in ("system", "version")}
    batches, _ = opened(folder, system, cache=str(cache), **fields)
    wanted = 6 if change is BUCKETS else 10  # the square ones stay what they were
    assert batches.count == {"new": 0, "stale": wanted, "torn": 0}
    assert same(batches, opened(folder, system, **fields)[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: data.replace(b"kept", b"kopt"),
    ],
)
def test_a_torn_file_is_made_again(tmp_path, capsys, damage):
    folder, cache = make.folder(tmp_path / "a"), tmp_path / "cache"
    opened(folder, cache=str(cache))
    torn = files(cache)[4]
    whole = torn.read_bytes()
    torn.write_bytes(damage(whole))
    batches, system = opened(folder, cache=str(cache))
    assert (system.asked, batches.count["torn"]) == (1, 1)
    assert torn.read_bytes() == whole
    assert "were made again: 1 torn" in capsys.readouterr().err
    torn.write_bytes(damage(whole))
    with pytest.raises(FileProblem, match="is torn: --resume makes it again"):
        batches.batch(20, 10)


def test_a_kill_while_encoding_loses_nothing_that_was_written(tmp_path):
    class Killed(Halves):
        def encode(self, images):
            if self.asked >= 4:
                raise KeyboardInterrupt
            return super().encode(images)

    folder, cache = make.folder(tmp_path / "a"), tmp_path / "cache"
    config = DataConfig(source="folder", folder=str(folder), size=32, cache=str(cache))
    with pytest.raises(KeyboardInterrupt):
        StoredLatents(open_batches(config, 0, torch.device("cpu")), Killed(), pixels=2 * 32 * 32)
    assert len(files(cache)) == 4
    batches, system = opened(folder, cache=str(cache))
    assert (system.asked, batches.count["new"]) == (6, 6)
    assert same(batches, opened(folder)[0])


def test_a_bad_picture_has_no_latents_and_the_next_takes_its_place(tmp_path, capsys):
    folder, cache = make.folder(tmp_path / "a"), tmp_path / "cache"
    opened(folder, cache=str(cache))
    (folder / "p03.png").write_bytes(make.picture(3, 32, 32)[:-40])
    batches, system = opened(folder, cache=str(cache))
    assert (system.asked, len(files(cache))) == (0, 9)
    assert capsys.readouterr().err.count("left out: p03.png") == 1
    seen = [name for step in range(10) for name in batches.batch(step, 1)["ids"]]
    assert sorted(seen) == sorted(f"p{i:02d}.png" for i in (0, 1, 2, 4, 4, 5, 6, 7, 8, 9))
    with pytest.raises(FileProblem, match=r"^p03.png cannot be read"):
        opened(folder, cache=str(cache), bad="raise")


def test_masks_are_kept_with_the_latents(tmp_path):
    folder, cache = make.folder(tmp_path / "a", make.all_of([(64, 32), (64, 32)])), tmp_path / "cache"
    ramp = np.repeat(np.linspace(255, 0, 64)[None], 32, 0).astype(np.uint8)
    Image.fromarray(ramp).save(folder / "p00-mask.png")
    fields = {"cache": str(cache), "crop": "random", "mirror": True, "latent_views": 3}
    opened(folder, **fields)
    batches, system = opened(folder, **fields)
    assert system.asked == 0
    for step in range(4):
        batch = batches.batch(step, 2)
        k = batch["ids"].index("p00.png")
        assert batch["mask"].shape == (2, 1, 32, 32)
        assert (batch["mask"][1 - k] == 1).all()
        assert torch.allclose(batch["mask"][k, 0, ::2, ::2], (batch["latents"][k, 1] + 1) / 2, atol=0.02)
    os.utime(folder / "p00-mask.png", (1, 1))
    assert opened(folder, **fields)[0].count["stale"] == 1


def test_processes_encode_a_share_each(tmp_path, monkeypatch):
    folder, cache = make.folder(tmp_path / "a"), tmp_path / "cache"
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    asked = []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        batches, system = opened(folder, cache=str(cache), **BUCKETS)
        asked.append(system.asked)
    assert asked == [4, 3, 3]
    monkeypatch.undo()
    alone, counts = opened(folder, **BUCKETS)[0], []
    for step in range(3):
        parts = [batches.batch(step, 4, rank=rank, world=3) for rank in range(3)]
        counts.append(parts[0].get("count", 3))
        weighed = [zip(part["latents"], part.get("weight", torch.ones(1)), strict=True) for part in parts]
        rows = [latents for part in weighed for latents, weight in part if weight]
        assert torch.equal(torch.stack(rows), alone.batch(step, 4)["latents"])
    assert sorted(counts) == [3, 3, 4]
