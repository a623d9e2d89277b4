"""The icon set made anew, out of pinned public packages fetched with their own clients (npm, apt-get).

packages   which packages, their hashes, how to get and read them
naming     Unicode's emoji and the names that icon sets give them
sets       which icons become pictures, and what they are called at first
pictures   how each looks: blanks, doubles, colours
records    tidy labels, splits, captions
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from limner.data.icons import FILES, IconRecord, in_parallel, svg_renderer
from limner.data.rebuild.naming import EmojiNames
from limner.data.rebuild.packages import download
from limner.data.rebuild.pictures import look_at
from limner.data.rebuild.records import Picture, make_records
from limner.data.rebuild.sets import candidates
from limner.errors import FileProblem

RECORDS_SHA256 = "b7270298c41c0b23aba46e3238d46a6151e5491f3e8faa260ab3f03ff15925a3"
"""`fingerprint` of the 38,816 records that the shipped model was trained and judged on."""


def rebuild_icons(
    out: Path, clipart: bool = True, workers: int | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Make the icon pack in the new folder `out` (about 110 MB of downloads, some minutes of drawing); returns it.

    Without `clipart` its 2,080 pictures are missing, and a few others change their split, because those hang on all
    labels. Nothing is left behind if anything fails. Raises FileProblem: `out` exists, a client is missing or fails, a
    package is not the pinned one, the disk is full; MissingExtra without the SVG renderer.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileProblem(f"{out} exists already and is not overwritten: remove it, or name another folder with --out")
    svg_renderer()  # missing: say so before the downloads
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".limner-") as temp:
            downloads, made = Path(temp, "downloads"), Path(temp, "icons")
            downloads.mkdir()
            say("fetching packages")
            packages = download(downloads, clipart)
            found = candidates(packages, EmojiNames(packages))
            say(f"drawing {len(found)} pictures")
            jobs = [(i, c.source, c.set == "openclipart") for i, c in enumerate(found)]
            looks = dict(in_parallel(look_at, jobs, workers or os.cpu_count() or 1, "drawing icons"))
            pictures = make_records(found, [looks[i] for i in range(len(found))])
            say(f"writing {len(pictures)} records")
            write_pack(made, pictures)
            made.replace(out)
    except OSError as error:
        raise FileProblem(
            f"the icon set cannot be made in {out}: {error}; free space or name another folder"
        ) from error
    if fingerprint([record for _, record in pictures]) != RECORDS_SHA256:
        say("captions or splits differ from the shipped model's: train on them, but compare no figures")
    return out


def fingerprint(records: list[IconRecord]) -> str:
    """SHA-256 of what training and evaluation rest on: ids, splits, weights and captions but for those with colours.

    Colours are measured from pixels and may change with the renderer; names do not.
    """
    return hashlib.sha256(_json([[r.id, r.split, r.weight, r.captions[:3]] for r in records])).hexdigest()


def write_pack(folder: Path, pictures: list[tuple[Picture, IconRecord]]) -> None:
    """The three files that `open_icons` reads."""
    folder.mkdir()
    sources = [p.candidate.source for p, _ in pictures]
    svgs = [source if isinstance(source, str) else None for source in sources]
    webps = [p.look.webp for p, _ in pictures]
    offsets = np.cumsum([0, *map(len, webps)], dtype=np.int64)
    records = _json([asdict(record) for _, record in pictures])
    (folder / FILES[0]).write_bytes(lzma.compress(_json(svgs), preset=7))
    np.savez(folder / FILES[1], blob=np.frombuffer(b"".join(webps), np.uint8), offsets=offsets)
    (folder / FILES[2]).write_bytes(gzip.compress(records, 9, mtime=0))


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
