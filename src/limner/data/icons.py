"""The icon set: 38,816 captioned emoji, icons and clip art, most of them as SVG, drawn at any size.

A pack is a folder of three files (`limner data icons` makes it from public packages):

    svgs.json.xz       a list of SVG texts, None where the picture is a raster
    raster.npz         `blob`, `offsets`: WebP bytes of picture i are blob[offsets[i]:offsets[i+1]]
    captions.json.gz   a list of records in the same order, the fields of `IconRecord`
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner.data.folders import square
from limner.data.images import ImageSet
from limner.errors import FileProblem, ImageProblem, MissingExtra, UnknownName, UsageError

FILES = ("svgs.json.xz", "raster.npz", "captions.json.gz")
SPLITS = ("train", "val", "test_style", "test_compose", "test_concept")
CAPTION_WEIGHTS = (0.15, 0.45, 0.25, 0.15)
"""How often captions 0 to 3 are drawn: label alone, with its style, with tags, with style and colours.

127 pictures have a fifth or sixth caption: the name of an equal picture that was merged into this one (a flag that two
territories share), in the form "name, style". Both names are true; batches draw each a tenth as often as these four.
"""
PART_SHARES = {"emoji": 0.65, "icon": 0.20, "mono": 0.12, "clipart": 0.03}
"""Share of the draws that go to each part; inside a part the records' own weights decide."""
GROUPS = ("style", "concept", "group", "tone", "tint", "part", "set", "licence", "split")

Job = TypeVar("Job")
Result = TypeVar("Result")

_RENDER_VERSION = 1  # part of the cache key: raise it when the same record gives other pixels

# A mirror image is described by other words if it shows a side, a turn, a course of time, a map or writing.
_HANDED_WORDS = r"""
    left right (left|right|up|down|for|back)wards? (left|right|front)-?(facing|pointing) facing pointing arrows?
    direction north south east west (counter|anti)?clockwise turn bend rotat\w+ caret chevron corner next previous
    rewind undo redo return back reply share play skip export import log(in|out)? enter exit indent outdent align\w*
    sort\w* list clock o'clock thirty watch alarm time timer stopwatch compass calendar date quarter waxing waning
    gibbous crescent globe map world earth africa asia\S* americas europe\S* flags? banner signs? button keycap zodiac
    symbols? logo badge medal text font letters? alphabet\w* abc\w* latin words? type typing typography paragraph
    heading bold italic underline digits? numbers? numeric\w* hundred percent question formula calculator newspaper
    keyboard code coding html css sql pdf docs? id az atm sos vip new e-mail at stop gps usb cd dvd sd hd tv abacus
    score treble clef music(al)? notes? chart graph stock trends? increas\w+ decreas\w+ analytics signal currency
    dollar euro yen pound rupee ruble bitcoin banknote cards? dice die mahjong domino joker receipt license translate
    language plus minus equals convenience
"""
_HANDED = re.compile(rf"\d|(?<![\w'-])[b-z](?![\w'-])|\b({'|'.join(_HANDED_WORDS.split())})\b")
_HANDED_TAGS = {"clock", "oclock", "text", "alphabet", "direction", "arrow", "arrowshape", "keyboard", "roadsign"} | {
    f"{side}{end}" for side in ("left", "right") for end in ("ward", "wards", "-facing", "-pointing")
}


@dataclass(frozen=True, kw_only=True)
class IconRecord:
    """What is known of one picture.

    `concept` is the label without its skin tone; `tint` the named colour of a one-colour icon; `colors` up to three
    names measured from the pixels; `captions` see CAPTION_WEIGHTS; `split` one of SPLITS; `weight` 1/sqrt(number of
    skin tones), less for flags, one-colour icons and clip art; `licence` an SPDX name; `part` a key of PART_SHARES;
    `core` False for the skin tones that a smaller pack would leave out; `hex` the emoji's code points or None.
    """

    id: str
    set: str
    style: str
    concept: str
    label: str
    group: str
    tone: str | None
    tint: str | None
    colors: tuple[str, ...]
    tags: tuple[str, ...]
    captions: tuple[str, ...]
    split: str
    weight: float
    licence: str
    part: str
    core: bool
    hex: str | None


@dataclass(frozen=True)
class IconPack:
    """An open pack: `records`, and in the same order either an SVG text or WebP bytes.

    `digest` is the SHA-256 of the contents (not of the compressed files): what a model card names as training data.
    """

    folder: Path
    records: list[IconRecord]
    svgs: list[str | None]
    blob: np.ndarray
    offsets: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.records)

    def source(self, i: int) -> str | bytes:
        """SVG text or WebP bytes of picture i."""
        svg = self.svgs[i]
        return svg if svg is not None else self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def render(self, i: int, size: int) -> np.ndarray:
        """Picture i as uint8 (size, size, 4), RGBA with the colours premultiplied by alpha.

        Raises ImageProblem if it cannot be drawn, MissingExtra if the SVG renderer is not installed.
        """
        try:
            return draw(self.source(i), size)
        except (ValueError, OSError) as error:
            raise ImageProblem(f"picture {self.records[i].id!r} of {self.folder} cannot be drawn: {error}") from error

    def image_set(
        self,
        split: str | None = "train",
        size: int = 256,
        select: Callable[[IconRecord], bool] | None = None,
        workers: int | None = None,
        cache: Path | None = None,
    ) -> ImageSet:
        """Every picture of `split` (None: of all) for which `select(record)` is true, drawn at `size` pixels.

        `workers` processes draw (None: one a core). With a folder `cache` the drawn bytes (size² * 4 a picture) are
        kept there and memory-mapped the next time. A picture that cannot be drawn is left out with a line on stderr.
        Raises UnknownName for the split, UsageError if nothing is left to draw, ImageProblem if all fail.
        """
        if split is not None and split not in SPLITS:
            raise UnknownName("split", split, SPLITS)
        if size < 1:
            raise UsageError(f"icons cannot be drawn at {size} pixels; ask for 1 or more")
        rows = [i for i, r in enumerate(self.records) if split in (None, r.split) and (select is None or select(r))]
        if not rows:
            raise UsageError(f"no icon of {self.folder} is in split {split!r} and in the selection; widen it")
        images, failed = self._drawn(rows, size, workers or os.cpu_count() or 1, cache)
        if failed:
            names = ", ".join(self.records[i].id for i in failed[:20]) + (" ..." if len(failed) > 20 else "")
            print(f"{len(failed)} of {len(rows)} icons cannot be drawn and are left out: {names}", file=sys.stderr)
        kept = [i for i in rows if i not in set(failed)]
        records = [self.records[i] for i in kept]
        return ImageSet(
            name="icons",
            images=images,
            captions=[r.captions for r in records],
            ids=[r.id for r in records],
            weights=draw_weights(records),
            mirror=torch.tensor([mirrors(r) for r in records]),
            groups={name: [getattr(r, name) or "" for r in records] for name in GROUPS},
        )

    def _drawn(self, rows: list[int], size: int, workers: int, cache: Path | None) -> tuple[Tensor, list[int]]:
        """Bytes (n - failed, 4, size, size) of `rows` in order, and the rows that failed."""
        shape = (len(rows), 4, size, size)
        if cache is None:
            images = np.empty(shape, np.uint8)
            failed = self._draw_into(images, rows, size, workers)
            return torch.from_numpy(images[: len(rows) - len(failed)]), failed
        key = json.dumps([self.digest, size, _RENDER_VERSION, [self.records[i].id for i in rows]])
        path = cache / f"icons-{size}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npy"
        skipped = path.with_suffix(".skipped.json")
        if cache.is_file():
            raise FileProblem(f"{cache} is a file: give the folder to keep drawn icons in")
        if not path.exists():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=cache) as temp:
                    images = np.lib.format.open_memmap(Path(temp, "images"), "w+", np.uint8, shape)
                    failed = self._draw_into(images, rows, size, workers)
                    images.flush()
                    Path(temp, "skipped").write_text(json.dumps(failed))
                    Path(temp, "skipped").replace(skipped)
                    Path(temp, "images").replace(path)  # last: its presence says that both are whole
            except OSError as error:
                raise FileProblem(
                    f"drawn icons cannot be kept in {cache}: {error.strerror or error}; free space or name another"
                ) from error
        failed = json.loads(skipped.read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the map is read-only, and nobody writes to it
            return torch.from_numpy(np.load(path, mmap_mode="r"))[: len(rows) - len(failed)], failed

    def _draw_into(self, images: np.ndarray, rows: list[int], size: int, workers: int) -> list[int]:
        """Fill the front of `images` (n, 4, size, size) with `rows`; return the rows that failed."""
        if any(self.svgs[i] is not None for i in rows):
            svg_renderer()  # missing: say so before any work
        slow_first = sorted(range(len(rows)), key=lambda k: _effort(self.source(rows[k])), reverse=True)
        failed = []
        jobs = [(k, self.source(rows[k]), size) for k in slow_first]
        for k, drawn in in_parallel(_draw_job, jobs, workers, "drawing icons"):
            if isinstance(drawn, str):
                failed.append((rows[k], drawn))
            else:
                images[k] = drawn.transpose(2, 0, 1)
        if len(failed) == len(rows):
            raise ImageProblem(f"none of {len(rows)} icons can be drawn; the first said: {failed[0][1]}")
        bad = {i for i, _ in failed}
        for to, k in enumerate([k for k, i in enumerate(rows) if i not in bad] if bad else []):
            images[to] = images[k]
        return sorted(bad)


def open_icons(folder: Path | None = None) -> IconPack:
    """Open the pack in `folder`; None looks in each of `default_folders()`.

    Raises FileProblem if there is none or it is torn.
    """
    if folder and folder.is_file():
        raise FileProblem(f"{folder} is a file: give the folder of the icon pack")
    places = [folder] if folder else default_folders()
    found = next((p for p in places if all((p / name).is_file() for name in FILES)), None)
    if found is None:
        raise FileProblem(f"no icon pack in {' or '.join(map(str, places))}: run `limner data icons`")
    try:
        svg_bytes = lzma.decompress((found / FILES[0]).read_bytes())
        row_bytes = gzip.decompress((found / FILES[2]).read_bytes())
        with np.load(found / FILES[1], allow_pickle=False) as raster:
            blob, offsets = raster["blob"], raster["offsets"]
        svgs = json.loads(svg_bytes)
        records = [_record(row) for row in json.loads(row_bytes)]
    except (OSError, ValueError, KeyError, TypeError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise FileProblem(f"the icon pack in {found} is torn ({error}): run `limner data icons` again") from error
    if not len(svgs) == len(records) == len(offsets) - 1:
        counts = f"{len(svgs)} SVG texts, {len(offsets) - 1} rasters and {len(records)} records"
        raise FileProblem(f"the icon pack in {found} has {counts}, which must be equal: run `limner data icons` again")
    digest = hashlib.sha256()
    for part in (svg_bytes, blob.tobytes(), offsets.tobytes(), row_bytes):
        digest.update(hashlib.sha256(part).digest())
    return IconPack(found, records, svgs, blob, offsets, digest.hexdigest())


def _record(row: dict[str, Any]) -> IconRecord:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
    return IconRecord(**fields)


def default_folders() -> list[Path]:
    """$LIMNER_DATA, $LIMNER_DATA/icons, ./data/icons and the user's cache; `limner data icons` writes to the last."""
    given = os.environ.get("LIMNER_DATA")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [*([Path(given), Path(given, "icons")] if given else []), Path("data", "icons"), user / "limner" / "icons"]


def mirrors(record: IconRecord) -> bool:
    """Whether the mirror image is still described by the record's captions: no flag, symbol, side, time or writing."""
    if record.group in ("flag", "symbol") or _HANDED_TAGS & set(record.tags):
        return False
    return not _HANDED.search(record.label)


def draw_weights(records: list[IconRecord]) -> Tensor:
    """How often each is drawn, float64 (n,) with mean 1: PART_SHARES between parts, `weight` inside a part.

    A part without pictures leaves its share to the others in proportion.
    """
    total = {part: sum(r.weight for r in records if r.part == part) for part in PART_SHARES}
    weights = torch.tensor([r.weight / total[r.part] * PART_SHARES[r.part] for r in records], dtype=torch.float64)
    return weights / weights.mean()


def draw(source: str | bytes, size: int) -> np.ndarray:
    """SVG text (of 128 x 128) or the bytes of a PNG, JPEG or WebP -> uint8 (size, size, 4), premultiplied.

    Resampled premultiplied (Lanczos), so no colour of transparent pixels bleeds in. Raises ValueError, OSError.
    """
    if isinstance(source, str):
        svg = source.replace('width="128" height="128"', f'width="{size}" height="{size}"', 1)
        picture = render_svg(svg, size, size)
    else:
        picture = Image.open(io.BytesIO(source), formats=["WEBP", "PNG", "JPEG"])
    return square(picture.convert("RGBA"), size)


def render_svg(svg: str, width: int, height: int | None = None) -> Image.Image:
    """SVG text -> RGBA picture of these pixels; without `height` in its own proportions. Raises ValueError."""
    # Without dpi=96 every length in mm or pt is an error.
    try:
        png = svg_renderer()(svg_string=svg, width=width, height=height, skip_system_fonts=True, dpi=96)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a bug inside resvg, which Python would take for an interrupt
            raise
        raise ValueError(f"the renderer gave up: {error}") from error
    return Image.open(io.BytesIO(bytes(png)), formats=["PNG"]).convert("RGBA")


def svg_renderer() -> Callable[..., bytes]:
    """resvg: SVG text -> PNG bytes. Raises MissingExtra."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise MissingExtra("resvg_py", "data", "drawing SVG icons") from error
    return svg_to_bytes


def _effort(source: str | bytes) -> int:
    """Orders pictures by the time they take: filters and gradients cost most, then length."""
    if isinstance(source, bytes):
        return 0
    return len(source) + 20_000 * source.count("<filter") + 2_000 * source.count("Gradient id")


def _draw_job(job: tuple[int, str | bytes, int]) -> tuple[int, np.ndarray | str]:
    try:
        return job[0], draw(job[1], job[2])
    except (ValueError, OSError) as error:
        return job[0], str(error)


def in_parallel(function: Callable[[Job], Result], jobs: list[Job], workers: int, description: str) -> Iterator[Result]:
    """function(job) of every job, in their order, from `workers` processes; a progress bar if stderr is a terminal.
    Raises UsageError when one of them ends before its time."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    progress = partial(
        track,
        description=description,
        total=len(jobs),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    if workers == 1 or len(jobs) < 64:
        yield from progress(map(function, jobs))
        return
    # Not by fork, which copies the locks that other threads hold but not the threads, and this process's signal
    # handlers. A fork server (Python's own default from 3.14 on) has neither, and imports torch once for all workers.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["limner.data.icons"])
    try:
        with ProcessPoolExecutor(min(workers, len(jobs)), context) as pool:
            yield from progress(pool.map(function, jobs, chunksize=8))
    except BrokenProcessPool as error:
        raise UsageError(
            f"{description}: a process ended before its time, as for want of memory, or since a script that asks for "
            "this has no `if __name__ == '__main__':` around what it does"
        ) from error
