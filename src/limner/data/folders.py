"""A folder of pictures with captions -> ImageSet.

Captions lie in `metadata.jsonl` (lines {"file_name": ..., "text": ...}, as Hugging Face datasets write them) or in a
`.txt` beside each picture, one caption a line.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from limner.data.images import ImageSet, premultiply
from limner.errors import FileProblem, ImageProblem

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64_000_000
Fit = Literal["crop", "pad"]


def open_folder(path: Path, size: int, fit: Fit = "crop") -> ImageSet:
    """Every PNG, JPEG and WebP under `path`, in the order of their names, as squares of `size` pixels.

    `fit` "crop" keeps the middle square, "pad" the whole picture on transparent ground. Pictures that cannot be read
    are left out and named on stderr; a picture without a caption gets "" and is counted there. Ids are file names
    relative to `path`. Raises FileProblem: no such folder, no pictures, captions whose pictures are missing;
    ImageProblem if no picture can be read.
    """
    if not path.is_dir():
        raise FileProblem(f"{path} is not a folder; name one with PNG, JPEG or WebP pictures")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    names = [p.relative_to(path).as_posix() for p in files]
    written = _captions(path, names)
    if not files:
        raise FileProblem(f"no picture in {path}; put PNG, JPEG or WebP files there")
    images, kept, unreadable = [], [], []
    for file, name in zip(files, names, strict=True):
        try:
            images.append(square(read_picture(file), size, fit))
            kept.append(name)
        except ImageProblem as problem:
            unreadable.append(str(problem))
    if not kept:
        raise ImageProblem(f"none of {len(files)} pictures in {path} can be read; the first: {unreadable[0]}")
    if unreadable:
        print(f"{len(unreadable)} of {len(files)} pictures are left out: {'; '.join(unreadable)}", file=sys.stderr)
    bare = [name for name in kept if name not in written]
    if bare and written:
        print(f"{len(bare)} of {len(kept)} pictures have no caption: {', '.join(bare[:20])}", file=sys.stderr)
    return ImageSet(
        name=path.resolve().name,
        images=torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()),
        captions=[written.get(name, ("",)) for name in kept],
        ids=kept,
        weights=torch.ones(len(kept), dtype=torch.float64),
        mirror=torch.ones(len(kept), dtype=torch.bool),
        groups={},
    )


def read_picture(file: Path) -> Image.Image:
    """A PNG, JPEG or WebP of at most 64 megapixels as RGBA, turned upright. Raises ImageProblem."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the lower one
            with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    found = f"{picture.width} x {picture.height} pixels"
                    raise ImageProblem(f"{file} has {found}, more than 64 megapixels: shrink it")
                upright = ImageOps.exif_transpose(picture)
                if upright.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
                    upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
                return upright.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageProblem(f"{file} cannot be read as PNG, JPEG or WebP: {error}") from error


def square(rgba: Image.Image, size: int, fit: Fit) -> np.ndarray:
    """RGBA picture -> uint8 (size, size, 4), premultiplied before resampling: transparent pixels bleed no colour."""
    width, height = rgba.size
    if (width, height) == (size, size):
        return premultiply(np.asarray(rgba))
    side = min(width, height) if fit == "crop" else max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    middle = rgba.convert("RGBa").crop((left, top, left + side, top + side))  # outside the picture: transparent
    resized = np.array(middle.resize((size, size), Image.Resampling.LANCZOS))
    resized[..., :3] = np.minimum(resized[..., :3], resized[..., 3:])  # Lanczos overshoots
    return resized


def _captions(path: Path, names: list[str]) -> dict[str, tuple[str, ...]]:
    """File name -> its captions, from metadata.jsonl or else from the .txt files."""
    table = path / "metadata.jsonl"
    captions: dict[str, tuple[str, ...]] = {}
    if table.is_file():
        for number, line in enumerate(_read_text(table).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                captions[Path(row["file_name"]).as_posix()] = (str(row["text"]),)
            except (ValueError, KeyError, TypeError) as error:
                wanted = '{"file_name": ..., "text": ...}'
                raise FileProblem(f"line {number} of {table} is not {wanted} ({error!r}): mend it") from error
        lost = sorted(set(captions) - set(names))
    else:
        by_stem = {name.rpartition(".")[0]: name for name in names}
        texts = {p.relative_to(path).with_suffix("").as_posix(): p for p in sorted(path.rglob("*.txt"))}
        for stem, file in texts.items():
            lines = tuple(line.strip() for line in _read_text(file).splitlines() if line.strip())
            if stem in by_stem and lines:
                captions[by_stem[stem]] = lines
        lost = [stem + ".txt" for stem in texts if stem not in by_stem]
    if lost:
        some = ", ".join(lost[:10]) + (" ..." if len(lost) > 10 else "")
        raise FileProblem(f"{len(lost)} captions in {path} have no picture: {some}; add the pictures or remove these")
    return captions


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileProblem(f"{file} cannot be read as UTF-8 text: {error}") from error
