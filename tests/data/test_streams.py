"""Batches of samples: which, when, how they are cut, and what becomes of bad ones."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import stored_pictures as make
import torch
from PIL import Image

from limner.data import streams
from limner.data.batches import DataConfig, open_batches
from limner.errors import FileProblem

BUCKETS = {"buckets": True, "bucket_step": 8}


def opened(folder, seed=0, **fields):
    config = DataConfig(source="folder", folder=str(folder), **{"size": 32} | fields)
    return open_batches(config, seed, torch.device("cpu"))


def ids(batches, steps, size, world=1):
    """The ids of these steps that count, all processes together."""
    found = []
    for step in steps:
        for rank in range(world):
            batch = batches.batch(step, size, rank=rank, world=world)
            weights = batch.get("weight", torch.ones(len(batch["ids"])))
            assert len(batch["ids"]) == len(batch["captions"]) == len(batch["images"]) == len(weights)
            found += [i for i, weight in zip(batch["ids"], weights, strict=True) if weight]
    return found


@pytest.mark.parametrize("fields", [{}, BUCKETS])
@pytest.mark.parametrize("worlds", [(1, 1), (2, 2), (3, 3), (1, 2), (3, 1)])
def test_every_sample_is_seen_once_an_epoch_also_by_another_number_of_processes(tmp_path, fields, worlds):
    folder = make.folder(tmp_path / "a")
    batches, size = opened(folder, **fields), 6
    epochs = 3
    steps = batches.epochs.steps(size) * epochs if fields else 10 * epochs // size
    middle = steps // 2
    seen = ids(batches, range(middle), size, worlds[0])
    seen += ids(opened(folder, **fields), range(middle, steps), size, worlds[1])  # as after a resume
    assert Counter(seen) == {f"p{i:02d}.png": epochs for i in range(10)}
    assert seen == ids(opened(folder, **fields), range(steps), size)


@pytest.mark.parametrize("fields", [{"crop": "random", "mirror": True}, {"augment": "view", "mirror": True, **BUCKETS}])
def test_a_batch_is_a_function_of_seed_and_step(tmp_path, fields):
    folder = make.folder(tmp_path / "a")
    wanted = {step: opened(folder, **fields).batch(step, 4) for step in (7, 3)}
    batches = opened(folder, **fields)
    for step in (0, 3, 4, 5, 6, 7, 3):
        found = batches.batch(step, 4)
        if step in wanted:
            assert torch.equal(found["images"], wanted[step]["images"])
            assert found["captions"] == wanted[step]["captions"]
    other = opened(folder, seed=1, **fields).batch(3, 4)
    assert other["images"].shape != found["images"].shape or not torch.equal(other["images"], found["images"])


def test_pictures_are_what_lies_in_the_files(tmp_path):
    batch = opened(make.folder(tmp_path / "a")).batch(0, 10)
    assert batch["images"].shape == (10, 4, 32, 32)
    assert batch["images"].dtype == torch.float32
    for image, name, caption in zip(batch["images"], batch["ids"], batch["captions"], strict=True):
        i = int(name[1:3])
        assert image[0].unique().tolist() == [pytest.approx(10 * i / 127.5 - 1)]
        assert (image[3] == 1).all()
        assert caption.startswith(f"picture {i},")
        if make.SIZES[i] == (64, 32):  # the middle half: green from 3/4 to 1/4
            assert image[1, 0, 0] == pytest.approx(0.5, abs=0.05)
            assert image[1, 0, -1] == pytest.approx(-0.5, abs=0.05)
            assert image[2, 0, 0] == 1
            assert image[2, -1, 0] == -1
            break
    else:
        raise AssertionError


def test_in_buckets_each_picture_keeps_its_shape(tmp_path):
    batches = opened(make.folder(tmp_path / "a"), **BUCKETS)
    shapes = {(32, 32): [0, 3, 6, 7], (40, 24): [1, 4, 8], (24, 40): [2, 5, 9]}
    assert {(b.width, b.height): list(b.members) for b in batches.buckets} == shapes
    for step in range(8):
        batch = batches.batch(step, 4)
        height, width = batch["images"].shape[-2:]
        assert {int(name[1:3]) for name in batch["ids"]} <= set(shapes[width, height])


def test_a_crop_is_anywhere_if_asked_and_half_are_mirrored(tmp_path):
    folder = make.folder(tmp_path / "a", make.all_of([(64, 32)]))
    plain = opened(folder).batch(0, 40)["images"]
    assert all(torch.equal(plain[0], one) for one in plain)
    green = opened(folder, crop="random").batch(0, 40)["images"][:, 1, 0, 0]
    assert len(green.unique()) > 10
    assert green.max() > 0.9
    assert green.min() < 0.2
    turned = opened(folder, mirror=True).batch(0, 40)["images"]
    same = [torch.equal(one, plain[0]) for one in turned]
    assert all(
        torch.equal(one, plain[0] if kept else plain[0].flip(-1)) for one, kept in zip(turned, same, strict=True)
    )
    assert 10 < sum(same) < 30


def test_tags_are_shuffled_but_for_the_first_and_the_trigger_comes_before_all(tmp_path):
    folder = make.folder(
        tmp_path / "a", [("x", make.picture(1, 32, 32), "one, two,three , four"), ("y", make.picture(2, 32, 32), " ")]
    )
    said = {
        c
        for k in range(10)
        for c in opened(folder, trigger="sks", shuffle_tags=True, keep_tags=1).batch(k, 6)["captions"]
    }
    rest = permutations(("two", "three", "four"))
    assert said == {"sks", *(", ".join(("sks", "one", *tags)) for tags in rest)}
    assert set(opened(folder).batch(0, 2)["captions"]) == {"one, two,three , four", ""}


def test_each_of_several_captions_is_taken(tmp_path):
    folder = make.folder(tmp_path / "a", [("x", make.picture(1, 32, 32), "one\ntwo\nthree")])
    assert set(opened(folder).batch(0, 40)["captions"]) == {"one", "two", "three"}


def test_masks_are_cut_as_their_pictures_and_white_where_there_is_none(tmp_path):
    folder = make.folder(tmp_path / "a", make.all_of([(64, 32), (64, 32)]))
    assert "mask" not in opened(folder).batch(0, 2)
    ramp = np.repeat(np.linspace(255, 0, 64)[None], 32, 0).astype(np.uint8)
    Image.fromarray(ramp).save(folder / "p00-mask.png")
    for fields in ({}, {"crop": "random", "mirror": True}):
        for step in range(4):
            batch = opened(folder, **fields).batch(step, 2)
            masks = dict(zip(batch["ids"], batch["mask"], strict=True))
            images = dict(zip(batch["ids"], batch["images"], strict=True))
            assert masks["p00.png"].shape == (1, 32, 32)
            assert (masks["p01.png"] == 1).all()
            assert torch.allclose(masks["p00.png"][0], (images["p00.png"][1] + 1) / 2, atol=0.02)
    assert "mask" not in opened(folder, masks="none").batch(0, 2)
    moved = opened(folder, augment="view", mirror=True).batch(0, 2)
    k = moved["ids"].index("p00.png")
    assert torch.allclose(moved["mask"][k, 0], (moved["images"][k, 1] + 1) / 2, atol=0.05)


def test_alpha_may_be_the_mask_of_what_is_below_it(tmp_path):
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[:, :4, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    batch = opened(tmp_path, size=8, masks="alpha").batch(0, 1)
    assert batch["mask"][0, 0, 0].tolist() == [0] * 4 + [pytest.approx(200 / 255)] * 4
    assert batch["images"][0, 0].unique().tolist() == [pytest.approx(200 / 127.5 - 1)]
    assert (batch["images"][0, 3] == 1).all()


# ------------------------------------------------------------------------------------------------------ bad samples


def damaged(tmp_path):
    """Ten pictures, of which 3 is cut short, 4 is text, and 6 has a caption that is none."""
    folder = make.folder(tmp_path / "a", make.all_of([(32, 32)] * 10))
    data = (folder / "p03.png").read_bytes()
    (folder / "p03.png").write_bytes(data[:-40])
    (folder / "p04.png").write_text("no picture")
    (folder / "p06.txt").write_bytes(b"\xff")
    return folder


def test_a_bad_sample_is_named_once_and_the_next_takes_its_place(tmp_path, capsys):
    folder = damaged(tmp_path)
    batches = opened(folder)
    assert len(batches) == 9  # what is known to be bad has no place
    seen = Counter(ids(batches, range(18), 1))
    assert seen == {f"p{i:02d}.png": 6 if i == 5 else 2 for i in (0, 1, 2, 5, 7, 8, 9)}
    assert sorted(batches.bad) == [3, 4, 6]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert {line.split()[2] for line in said} == {"p03.png", "p04.png", "p06.txt"}
    assert all(line.startswith("left out: ") for line in said)


def test_batches_do_not_depend_on_when_a_bad_sample_was_found(tmp_path):
    folder = damaged(tmp_path)
    batches = opened(folder)
    whole = [batches.batch(step, 4) for step in range(12)]
    for step in (11, 5, 0):
        again = opened(folder).batch(step, 4)
        assert again["ids"] == whole[step]["ids"]
        assert torch.equal(again["images"], whole[step]["images"])


def test_with_buckets_what_has_no_size_is_left_out_before_the_first_step(tmp_path, capsys):
    batches = opened(damaged(tmp_path), min_size=32, **BUCKETS)
    assert sorted(batches.bad) == [4, 6]
    assert "p04.png cannot be read as PNG, JPEG or WebP" in capsys.readouterr().err
    seen = Counter(ids(batches, range(2), 4))  # of 3, which is cut short, the next takes the place
    assert seen == {f"p{i:02d}.png": 2 if i == 5 else 1 for i in (0, 1, 2, 5, 7, 8, 9)}


def test_pictures_that_are_too_small_are_left_out_if_asked(tmp_path, capsys):
    batches = opened(make.folder(tmp_path / "a"), min_size=32)
    assert [int(name[1:3]) for name in sorted(set(ids(batches, range(5), 5)))] == [0, 1, 2, 3, 8]
    assert "left out: p04.png has 48 x 24 pixels, fewer than data.min_size=32" in capsys.readouterr().err


def test_a_mask_of_another_size_makes_its_picture_bad(tmp_path, capsys):
    folder = make.folder(tmp_path / "a", make.all_of([(32, 32)] * 2))
    Image.new("L", (16, 32)).save(folder / "p00-mask.png")
    assert set(ids(opened(folder), range(2), 2)) == {"p01.png"}
    assert "the mask of p00.png has 16 x 32 pixels, the picture 32 x 32" in capsys.readouterr().err


def test_a_bad_sample_ends_the_run_if_asked(tmp_path):
    folder = damaged(tmp_path)
    with pytest.raises(FileProblem, match=r"^p06.txt is not UTF-8 .*; data.bad=skip would leave it out$"):
        opened(folder, bad="raise")
    (folder / "p06.txt").unlink()
    batches = opened(folder, bad="raise")
    for _ in range(2):
        with pytest.raises(FileProblem, match=r"^p0[34].png cannot be read .*; data.bad=skip would leave it out$"):
            ids(batches, range(10), 1)


def test_many_bad_samples_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(streams, "MOST_NAMED", 1)
    batches = opened(damaged(tmp_path))
    ids(batches, range(10), 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[1] == "more than 1 bad samples: the rest is counted, not named"
    assert len(batches.bad) == 3


def test_where_nothing_is_good_the_first_reason_is_given(tmp_path):
    folder = make.folder(tmp_path / "a")
    for file in folder.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(FileProblem, match=r"none of 10 pictures of .* learned as 32 x 32 .* the first: p00.png cannot"):
        opened(folder).batch(0, 1)
    with pytest.raises(FileProblem, match=r"none of 10 samples of .* can be used; the first: p00.png cannot be read"):
        opened(folder, **BUCKETS)


def test_the_next_steps_are_read_before_they_are_asked_for(tmp_path):
    batches = opened(make.folder(tmp_path / "a"))
    batches.batch(4, 2)
    assert [key[0] for key in batches.pending] == [5, 6, 7]
    pending = batches.pending[5, 2, 0, 1]
    batches.batch(5, 2)
    assert all(future.done() for future in pending)
    batches.batch(0, 3)
    assert [key[:2] for key in batches.pending] == [(1, 3), (2, 3), (3, 3)]
    assert len(opened(tmp_path / "a", limit=4)) == 4
