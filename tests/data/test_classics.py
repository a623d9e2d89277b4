"""The classic sets from files as their packages ship them, small."""

import gzip
import io
import json
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from limner.data.classics import open_classic
from limner.errors import FileProblem, UnknownName

GREY = np.arange(12 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(12, 28, 28)
LABELS = np.array([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6], np.uint8)


def idx(array):
    return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, opener=open, ending=""):
    for stem, part in (("train", slice(8)), ("t10k", slice(8, 12))):
        for name, array in ((f"{stem}-images-idx3-ubyte", GREY[part]), (f"{stem}-labels-idx1-ubyte", LABELS[part])):
            with opener(folder / (name + ending), "wb") as file:
                file.write(idx(array))


def test_mnist_reads_the_same_from_idx_gz_and_npz(tmp_path):
    folders = [tmp_path / name for name in ("idx", "gz", "npz")]
    for folder in folders:
        folder.mkdir()
    write_idx(folders[0])
    write_idx(folders[1], gzip.open, ".gz")
    np.savez(folders[2] / "mnist.npz", x_train=GREY[:8], y_train=LABELS[:8], x_test=GREY[8:], y_test=LABELS[8:])
    for folder in folders:
        train, test = (open_classic("mnist", folder, split) for split in ("train", "test"))
        assert train.images.shape == (8, 4, 28, 28)
        assert (train.images[:, 0].numpy() == GREY[:8]).all()
        assert (test.images[:, 2].numpy() == GREY[8:]).all()
        assert (train.images[:, 3] == 255).all()
        assert train.captions[0] == ("seven", "a handwritten digit seven")
        assert test.groups == {"label": ["five", "nine", "zero", "six"], "split": ["test"] * 4}
        assert not train.mirror.any()
        assert len(open_classic("mnist", folder, None)) == 12


def test_animals_come_from_the_npz_or_from_the_package_itself(tmp_path):
    images, labels = np.repeat(GREY, 2, axis=0)[:20], np.arange(20) % 10
    names = np.array(["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"])
    for folder in (tmp_path / "npz", tmp_path / "package"):
        folder.mkdir()
    np.savez(tmp_path / "npz" / "animal_mnist.npz", x=images, y=labels, names=names)
    for part, array in (("data", images), ("label", labels)):
        (tmp_path / "package" / f"animal_{part}_version_3.gz").write_bytes(gzip.compress(pickle.dumps(array)))
    for folder in (tmp_path / "npz", tmp_path / "package"):
        animals = open_classic("animal-mnist", folder, None)
        assert (animals.images[:, 1].numpy() == images).all()
        assert animals.captions[5] == ("elephant", "a silhouette of an elephant")
        assert len(open_classic("animal-mnist", folder, "test")) == 2


class Attack:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_holds_more_than_numbers_is_refused_unrun(tmp_path, capsys):
    (tmp_path / "animal_data_version_3.gz").write_bytes(gzip.compress(pickle.dumps(Attack())))
    (tmp_path / "animal_label_version_3.gz").write_bytes(gzip.compress(pickle.dumps(LABELS)))
    with pytest.raises(FileProblem, match=r"print.*only arrays of numbers"):
        open_classic("animal-mnist", tmp_path)
    assert capsys.readouterr().out == ""


def test_an_npz_that_hides_a_pickle_is_refused_unrun(tmp_path, capsys):
    np.savez(tmp_path / "mnist.npz", x_train=np.array([Attack()], dtype=object))
    with pytest.raises(FileProblem, match="torn or foreign"):
        open_classic("mnist", tmp_path)
    assert capsys.readouterr().out == ""


def test_avatars_keep_their_own_split_and_words(tmp_path):
    blobs = []
    for colour in ((255, 0, 0, 255), (0, 0, 255, 128)):
        file = io.BytesIO()
        Image.new("RGBA", (64, 64), colour).save(file, "WEBP", lossless=True)
        blobs.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, blobs)])
    np.savez(tmp_path / "avatars64.npz", blob=np.frombuffer(b"".join(blobs), np.uint8), offsets=offsets)
    rows = [
        {"id": f"a-{i}", "style": "micah", "licence": "CC0", "captions": [f"face {i}"], "split": s}
        for i, s in enumerate(("test", "train"))
    ]
    (tmp_path / "avatars64.captions.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    faces = open_classic("avatars64", tmp_path)
    assert faces.ids == ["a-1"]
    assert faces.captions == [("face 1",)]
    assert faces.images[0, :, 0, 0].tolist() == [0, 0, 128, 128]
    assert faces.groups["style"] == ["micah"]


def test_sprites_are_premultiplied_and_every_tenth_is_for_testing(tmp_path):
    np.savez(tmp_path / "sprites32_crawl.npz", images=np.full((20, 32, 32, 4), 100, np.uint8))
    rows = [
        {"id": f"s{i}", "label": "x", "category": "c", "licence": "CC0", "captions": ["x", "x, c"]} for i in range(20)
    ]
    (tmp_path / "sprites32_crawl.captions.json").write_text(json.dumps(rows))
    sprites = open_classic("sprites32", tmp_path, "test")
    assert sprites.ids == ["s9", "s19"]
    assert sprites.images[0, :, 0, 0].tolist() == [39, 39, 39, 100]
    rows.pop()
    (tmp_path / "sprites32_crawl.captions.json").write_text(json.dumps(rows))
    with pytest.raises(FileProblem, match=r"do not belong together.*19, 20"):
        open_classic("sprites32", tmp_path)


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"\x1f" + data[1:], lambda data: b""])
def test_a_torn_idx_file_is_named(tmp_path, spoil):
    write_idx(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(FileProblem, match="t10k-images-idx3-ubyte"):
        open_classic("mnist", tmp_path)


def test_missing_files_and_unknown_names_say_what_there_is(tmp_path):
    with pytest.raises(FileProblem, match=r"no mnist\.npz or train-images-idx3-ubyte in"):
        open_classic("mnist", tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(GREY))
    with pytest.raises(FileProblem, match="train-labels-idx1-ubyte is missing"):
        open_classic("mnist", tmp_path)
    with pytest.raises(UnknownName, match="Did you mean 'mnist'"):
        open_classic("minst", tmp_path)
    with pytest.raises(UnknownName, match="no split 'val'"):
        open_classic("mnist", tmp_path, "val")
