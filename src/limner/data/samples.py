"""Captioned pictures wherever they lie, read one at a time: what folders, shards and tables have in common."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from limner.data.images import premultiply
from limner.errors import FileProblem, ImageProblem
from limner.hints import on_white

FORMATS = ("PNG", "JPEG", "WEBP")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64_000_000
BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error,
          Image.DecompressionBombError)  # fmt: skip
"""What Pillow raises for broken files."""
HEADER = 1 << 16
"""Bytes in which the size of most pictures is found."""


class Blob(Protocol):
    """The bytes of a picture, wherever they are."""

    def read(self, most: int = -1) -> bytes:
        """All of them, or the first `most`. Raises OSError, or ImageProblem with a reason and no name."""

    def stamp(self) -> str:
        """Another text when the bytes may have changed: of sizes, times and places, not of the bytes."""

    def length(self) -> int:
        """How many bytes they are, or the file that they are in. Raises OSError."""


@dataclass(frozen=True)
class Piece:
    """`size` bytes of a file from `offset`; all of it if `size` is -1."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self, most: int = -1) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(min((n for n in (self.size, most) if n >= 0), default=-1))

    def length(self) -> int:
        return self.size if self.size >= 0 else os.stat(self.path).st_size  # noqa: PTH116 (a Path's is slower)

    def stamp(self) -> str:
        found = os.stat(self.path)  # noqa: PTH116 (a Path's is slower)
        return f"{found.st_size}/{found.st_mtime_ns}/{self.offset}/{self.size}"


@dataclass
class Samples:
    """n pictures of any size, with captions.

    `ids` a name for each, unique, that tells a person where it is. `captions` several ways to describe each, at least
    one (may be ""). `pictures`, `masks` and `hints` their bytes; a mask is white where the picture should be learned,
    and None is white all over; a hint is what a control network is told. `problems` why some of them, by position,
    cannot be learned from, as far as that is known without looking at the picture.
    """

    name: str
    ids: list[str]
    captions: list[tuple[str, ...]]
    pictures: Sequence[Blob]
    masks: list[Blob | None] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    hints: list[Blob | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright picture, from its header. Raises ImageProblem."""
        try:
            return _size(self._bytes(i, HEADER), self.ids[i])
        except ImageProblem:  # long metadata come before the size
            return _size(self._bytes(i), self.ids[i])

    def load(self, i: int) -> Image.Image:
        """The picture as upright RGBA of 8 bits, colours not multiplied by alpha. Raises ImageProblem."""
        return decode(self._bytes(i), self.ids[i])

    def mask(self, i: int) -> Image.Image | None:
        """The mask as 8 bits of grey, where the sample has one. Raises ImageProblem."""
        blob = self.masks[i] if self.masks else None
        if blob is None:
            return None
        name = f"the mask of {self.ids[i]}"
        return decode(_read(blob, name), name).convert("L")

    def hint(self, i: int) -> Image.Image:
        """The hint on white, as opaque RGBA. Raises ImageProblem."""
        blob, name = self.hints[i], f"the hint of {self.ids[i]}"
        if blob is None:
            raise ImageProblem(f"{self.ids[i]} has no hint")
        return on_white(decode(_read(blob, name), name)).convert("RGBA")

    def length(self, i: int) -> str:
        """Bytes of the picture, and of its mask and its hint."""
        blobs = [self.pictures[i], *(beside[i] for beside in (self.masks, self.hints) if beside)]
        try:
            return "/".join("" if blob is None else str(blob.length()) for blob in blobs)
        except OSError:
            return "gone"

    def _bytes(self, i: int, most: int = -1) -> bytes:
        return _read(self.pictures[i], self.ids[i], most)


def _read(blob: Blob, name: str, most: int = -1) -> bytes:
    try:
        return blob.read(most)
    except OSError as error:
        raise ImageProblem(f"{name} cannot be read: {error.strerror or error}") from error
    except ImageProblem as problem:
        raise ImageProblem(f"{name} {problem}") from problem


def decode(data: bytes, name: str) -> Image.Image:
    """A PNG, JPEG or WebP of at most 64 megapixels as RGBA, turned upright. Raises ImageProblem."""
    try:
        with _opened(data, name) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGBA")
    except BROKEN as error:
        raise _unreadable(name, error) from error


def _size(data: bytes, name: str) -> tuple[int, int]:
    with _opened(data, name) as picture:
        turned = "exif" in picture.info and picture.getexif().get(0x0112, 1) >= 5
        return (picture.height, picture.width) if turned else picture.size


def _opened(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the lower one
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except BROKEN as error:
        raise _unreadable(name, error) from error
    if picture.width * picture.height > MAX_PIXELS:
        found = f"{picture.width} x {picture.height} pixels"
        raise ImageProblem(f"{name} has {found}, more than 64 megapixels: shrink it")
    return picture


def _unreadable(name: str, error: Exception) -> ImageProblem:
    why = "it is none" if isinstance(error, UnidentifiedImageError) else error
    return ImageProblem(f"{name} cannot be read as PNG, JPEG or WebP: {why}")


def covering(picture: Image.Image, width: int, height: int, place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """The largest part of an RGBA or grey picture that has the ratio width / height, scaled to that size: uint8
    (height, width, 4) or (height, width, 1). `place` in [0, 1] is where it is cut out, (0.5, 0.5) the middle.

    Colours are premultiplied before resampling: transparent pixels bleed no colour.
    """
    scale = max(width / picture.width, height / picture.height)
    wide, high = min(picture.width, round(width / scale)), min(picture.height, round(height / scale))
    left, top = int((picture.width - wide) * place[0]), int((picture.height - high) * place[1])
    box = (left, top, left + wide, top + high)
    if picture.mode == "L":
        return np.array(picture.resize((width, height), Image.Resampling.BILINEAR, box))[..., None]
    if (wide, high) == (width, height):
        return premultiply(np.asarray(picture.crop(box)))
    opaque = picture.getchannel("A").getextrema() == (255, 255)
    plain = picture.convert("RGB" if opaque else "RGBa")  # three channels take half the time of four
    resized = np.array(plain.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3))
    if opaque:
        return np.concatenate([resized, np.full((height, width, 1), 255, np.uint8)], -1)
    resized[..., :3] = np.minimum(resized[..., :3], resized[..., 3:])  # Lanczos overshoots
    return resized


def text_of(data: bytes, name: str) -> str:
    """Raises ImageProblem: a caption that cannot be read makes its sample unfit."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImageProblem(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def alternatives(value: object) -> tuple[str, ...] | None:
    """What a row of a table says for a caption: a text, or several in a list; None if it is neither."""
    if isinstance(value, str):
        return (value.strip(),)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return tuple(one.strip() for one in value)
    return None


def mask_of(stem: str, what: str = "mask") -> str:
    """Of which picture a file of this stem may be the mask, or the hint: fox for fox-mask and fox.mask, else ""."""
    return stem[: -len(what) - 1] if stem.endswith((f"-{what}", f".{what}")) else ""


def account(ids: Sequence[str], captions: Sequence[tuple[str, ...]], sizes: Iterable[str]) -> dict[str, int | str]:
    """What tells samples from others at little cost: how many there are, and hashes of their names, their captions and
    the `sizes` of what they are read from."""

    def hashed(texts: Iterable[str]) -> str:
        return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]

    said = ("\n".join(alternatives) for alternatives in captions)
    return {"samples": len(ids), "names": hashed(ids), "captions": hashed(said), "sizes of files": hashed(sizes)}


def some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def told_bare(samples: Samples) -> str:
    """A line that names pictures without a caption, if others have one."""
    pairs = enumerate(zip(samples.ids, samples.captions, strict=True))
    bare = [name for i, (name, captions) in pairs if captions == ("",) and i not in samples.problems]
    if not bare or len(bare) + len(samples.problems) == len(samples):
        return ""
    return f"{len(bare)} of {len(samples)} pictures have no caption: {some(bare, 20)}"


def no_picture(path: Path, wanted: str) -> FileProblem:
    return FileProblem(f"no picture in {path}; {wanted}")
