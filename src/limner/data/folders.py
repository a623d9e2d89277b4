"""A folder of pictures with captions -> Samples, and pictures fitted into squares.

Captions lie in `metadata.jsonl` or `captions.jsonl` (lines {"file_name": ..., "text": ...}, as Hugging Face datasets
write them) or in a `.txt` beside each picture, one caption a line.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from limner.data.images import premultiply
from limner.data.samples import ENDINGS, Blob, Piece, Samples, alternatives, mask_of, no_picture, some, text_of
from limner.errors import FileProblem, ImageProblem

TABLES = ("metadata.jsonl", "captions.jsonl")
CAPTIONS = ("text", "caption", "captions", "prompt")
"""What the caption is called where nobody says, in lines of JSON and in tables; the first that is there."""


def open_folder(path: Path, caption_column: str = "", masks: bool = True, hints: bool = False) -> Samples:
    """Every PNG, JPEG and WebP under `path`, in the order of their names; with `masks`, NAME-mask.png and NAME.mask.png
    are those of NAME, and with `hints`, NAME-hint.png and NAME.hint.png, which are no pictures without either. Ids are
    file names relative to `path`, captions without one "".

    Raises FileProblem: no such folder, no pictures, a line that is no caption, captions whose pictures are missing.
    """
    if not path.is_dir():
        raise FileProblem(f"{path} is not a folder; name one with PNG, JPEG or WebP pictures")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    files = {p.relative_to(path).as_posix(): p for p in found}
    stems = {stem_of(name) for name in files}
    kinds = [what for what, wanted in (("mask", masks), ("hint", hints)) if wanted]
    of = {what: {mask_of(stem_of(name), what): name for name in files} for what in kinds}
    names = [name for name in files if not any(mask_of(stem_of(name), what) in stems for what in (*kinds, "hint"))]
    problems: dict[str, str] = {}
    captions = _captions(path, names, caption_column, problems)
    if not names:
        raise no_picture(path, "put PNG, JPEG or WebP files there")

    def beside(what: str) -> list[Blob | None]:
        found = of.get(what, {})
        blobs = [Piece(files[found[s]]) if (s := stem_of(name)) in found else None for name in names]
        return list(blobs) if any(blobs) else []

    return Samples(
        name=str(path),
        ids=names,
        captions=[captions.get(name, ("",)) for name in names],
        pictures=[Piece(files[name]) for name in names],
        masks=beside("mask"),
        hints=beside("hint"),
        problems={i: problems[name] for i, name in enumerate(names) if name in problems},
    )


def stem_of(name: str) -> str:
    return name.rpartition(".")[0]


def square(rgba: Image.Image, size: int) -> np.ndarray:
    """The whole of an RGBA picture on transparent ground: uint8 (size, size, 4), premultiplied before resampling, so
    that transparent pixels bleed no colour."""
    width, height = rgba.size
    if (width, height) == (size, size):
        return premultiply(np.asarray(rgba))
    side = max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    middle = rgba.convert("RGBa").crop((left, top, left + side, top + side))  # outside the picture: transparent
    resized = np.array(middle.resize((size, size), Image.Resampling.LANCZOS))
    resized[..., :3] = np.minimum(resized[..., :3], resized[..., 3:])  # Lanczos overshoots
    return resized


def caption_in(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """The captions of a row of JSON. Raises FileProblem."""
    names = [column] if column else CAPTIONS
    found = next((alternatives(row[name]) for name in names if name in row), None)
    if found is None:
        raise FileProblem(f"{where} has no text or list of texts in {' or '.join(names)}: mend it, or name the field")
    return found


def _captions(path: Path, names: list[str], column: str, problems: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """File name -> its captions, from a table or else from the .txt files, of which `problems` gets the unreadable."""
    tables = [path / name for name in TABLES if (path / name).is_file()]
    captions: dict[str, tuple[str, ...]] = {}
    if tables:
        table = tables[0]
        try:
            rows = table.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileProblem(f"{table} cannot be read as UTF-8 text: {error}") from error
        for number, line in enumerate(rows, 1):
            if not line.strip():
                continue
            where = f"line {number} of {table}"
            try:
                row = json.loads(line)
                name = PurePosixPath(row["file_name"]).as_posix()
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                wanted = '{"file_name": ..., "text": ...}'
                raise FileProblem(f"{where} is not {wanted} ({error!r}): mend it") from error
            captions[name] = captions.get(name, ()) + caption_in(row, column, where)
        lost = sorted(set(captions) - set(names))
    else:
        by_stem: dict[str, list[str]] = {}
        for name in names:
            by_stem.setdefault(stem_of(name), []).append(name)
        texts = {stem_of(p.relative_to(path).as_posix()): p for p in sorted(path.rglob("*.txt"))}
        for stem, file in texts.items():
            try:
                text = text_of(file.read_bytes(), f"{stem}.txt")
            except (OSError, ImageProblem) as problem:
                problems |= dict.fromkeys(by_stem.get(stem, []), str(problem))
                continue
            if lines := tuple(line.strip() for line in text.splitlines() if line.strip()):
                captions |= dict.fromkeys(by_stem.get(stem, []), lines)
        lost = [stem + ".txt" for stem in texts if stem not in by_stem]
    if lost:
        raise FileProblem(
            f"{len(lost)} captions in {path} have no picture: {some(lost)}; add the pictures or remove these"
        )
    return captions
