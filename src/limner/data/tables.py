"""Parquet files, and datasets that Hugging Face `datasets` saved -> Samples, both read by pyarrow.

The rows of saved datasets are read from the disk when they are wanted; Parquet is made to be read in whole and is held
in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.data.folders import CAPTIONS
from limner.data.samples import Piece, Samples, alternatives, no_picture
from limner.devices import memory_of
from limner.errors import FileProblem, ImageProblem, MissingExtra, UnknownName, UsageError

IMAGES = ("image", "img", "picture", "jpg", "png", "webp")
"""What the picture is called where nobody says; the first that is there."""


@dataclass(frozen=True)
class Cell:
    """A row of a column of bytes, or of {"bytes": ..., "path": ...}, of a file."""

    column: Any
    row: int
    file: Path

    def read(self, most: int = -1) -> bytes:
        value = self.column[self.row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ImageProblem("holds no bytes of a picture")
        return value if most < 0 else value[:most]

    def length(self) -> int:
        return Piece(self.file).length()

    def stamp(self) -> str:
        return f"{Piece(self.file).stamp()}/{self.row}"


def open_parquet(
    path: Path, image_column: str = "", caption_column: str = "", masks: bool = True, hints: bool = False
) -> Samples:
    """The rows of one .parquet file, or of all below a folder in the order of their names. Ids are FILE:ROW.

    Raises FileProblem, UnknownName for a column, MissingExtra.
    """
    pyarrow = _pyarrow("data.source=parquet")
    from pyarrow import parquet

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.parquet") if p.is_file())
    if not files:
        raise FileProblem(f"no .parquet in {path}: name one, or a folder of them")
    import torch

    size, have = sum(p.stat().st_size for p in files), memory_of(torch.device("cpu"))
    if size > have / 2:
        raise FileProblem(
            f"{path} has {size / 1e9:,.0f} GB, more than half of this machine's memory: save it with save_to_disk of "
            "the package 'datasets' and give data.source=hf"
        )

    beside = [what for what, asked in (("mask", masks), ("hint", hints)) if asked]

    def read(file: Path) -> Any:
        names = parquet.read_schema(file).names
        wanted = dict.fromkeys((*_columns(file, names, image_column, caption_column), *beside))
        return parquet.ParquetFile(file).read(columns=[name for name in wanted if name in names])

    return _samples(path, files, read, pyarrow, image_column, caption_column, beside)


def open_saved(
    path: Path,
    split: str = "train",
    image_column: str = "",
    caption_column: str = "",
    masks: bool = True,
    hints: bool = False,
) -> Samples:
    """A dataset, or the `split` of several, that `save_to_disk` of Hugging Face `datasets` wrote. Ids are FILE:ROW.

    Raises FileProblem, UnknownName for a split or column, UsageError, MissingExtra.
    """
    pyarrow = _pyarrow("data.source=hf")
    told = _json(path / "dataset_dict.json") if (path / "dataset_dict.json").is_file() else None
    if told is not None:
        if split not in told.get("splits", []):
            raise UnknownName(f"split of {path}", split, map(str, told.get("splits", [])))
        folder = path / split
    elif split != "train":
        raise UsageError(f"data.split={split} has no effect: {path} is a single dataset; leave it out")
    else:
        folder = path
    if not (folder / "state.json").is_file():
        raise FileProblem(f"{folder} has no state.json: name a folder that save_to_disk of 'datasets' wrote")
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise FileProblem(f"{folder} keeps its rows in an order of their own: save it again after flatten_indices()")
    try:
        files = [folder / Path(one["filename"]).name for one in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise FileProblem(f"{folder / 'state.json'} names no files of data: save the dataset again") from error

    def read(file: Path) -> Any:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()

    beside = [what for what, asked in (("mask", masks), ("hint", hints)) if asked]
    return _samples(path, files, read, pyarrow, image_column, caption_column, beside)


def _samples(
    path: Path,
    files: list[Path],
    read: Any,
    pyarrow: Any,
    image_column: str,
    caption_column: str,
    beside: Sequence[str],
) -> Samples:
    made = Samples(str(path), [], [], pictures := [], masks=[])
    for file in files:
        try:
            table = read(file)
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise FileProblem(f"{file} cannot be read ({reason}): fetch it again, or remove it") from error
        names = table.column_names
        image, caption = _columns(file, names, image_column, caption_column)
        start, count = len(made), table.num_rows
        made.ids += [f"{file.name if file == path else file.relative_to(path).as_posix()}:{i}" for i in range(count)]
        pictures += [Cell(table[image], i, file) for i in range(count)]
        texts = table[caption].to_pylist() if caption else [""] * count
        for i, value in enumerate(texts, start):
            captions = alternatives(value)
            made.captions.append(captions or ("",))
            if captions is None:
                made.problems[i] = f"{made.ids[i]} has {type(value).__name__}, not text, in the column {caption}"
        for what, found in (("mask", made.masks), ("hint", made.hints)):
            cells = table[what] if what in beside and what in names else []
            found += [Cell(cells, i, file) if cells and cells[i].is_valid else None for i in range(count)]
    if not made.ids:
        raise no_picture(path, "its tables have no rows")
    if not any(made.masks):
        made.masks = []
    if not any(made.hints):
        made.hints = []
    return made


def _columns(file: Path, names: list[str], image: str, caption: str) -> tuple[str, str]:
    """The columns of the picture and of the caption; "" where there is none of captions and none was named."""
    for name in (image, caption):
        if name and name not in names:
            raise UnknownName(f"column of {file}", name, names)
    image = image or next((name for name in IMAGES if name in names), "")
    if not image:
        raise FileProblem(f"{file} has no column of pictures among {', '.join(names)}: name it, data.image_column=NAME")
    return image, caption or next((name for name in CAPTIONS if name in names), "")


def _pyarrow(purpose: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise MissingExtra("pyarrow", "data", purpose) from None
    return pyarrow


def _json(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileProblem(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise FileProblem(f"{file} is not a JSON object")
    return told
