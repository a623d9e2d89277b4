"""WebDataset shards -> Samples: tar files whose members of one name and many endings are a sample.

A sample KEY has KEY.jpg, .jpeg, .png or .webp, its caption in KEY.txt, KEY.caption (one a line) or KEY.json, and may
have a mask, KEY.mask.png, and a hint, KEY.hint.png. Members are found once, at the beginning; then any is read from its
place in the file.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from limner.data.folders import caption_in
from limner.data.samples import ENDINGS, Blob, Piece, Samples, no_picture, some, text_of
from limner.errors import FileProblem, ImageProblem

TEXTS = ("txt", "caption", "json")
PICTURES = tuple(ending[1:] for ending in ENDINGS)


def open_shards(path: Path, caption_column: str = "", masks: bool = True, hints: bool = False) -> Samples:
    """The samples of one .tar, or of all below a folder in the order of their names. Ids are SHARD/MEMBER.

    Raises FileProblem: no shards, one that is torn, compressed or no tar, no pictures, captions without a picture.
    """
    shards = [path] if path.is_file() else sorted(p for p in path.rglob("*.tar") if p.is_file())
    if not shards:
        raise FileProblem(f"no .tar in {path}: name a WebDataset shard or a folder of them")
    made = Samples(str(path), [], [], pictures := [], masks=[])
    lost = []
    for shard in shards:
        name = shard.relative_to(path).as_posix() if shard != path else shard.name
        for key, parts in _members(shard).items():
            ending = next((e for e in PICTURES if e in parts), None)
            if ending is None:
                lost += [f"{name}/{key}.{e}" for e in TEXTS if e in parts]
                continue
            identity = f"{name}/{key}.{ending}"
            captions: tuple[str, ...] = ("",)
            try:
                captions = _captions(parts, f"{name}/{key}", caption_column)
            except ImageProblem as problem:
                made.problems[len(made)] = str(problem)
            mask, hint = (
                next((parts[f"{what}.{e}"] for e in PICTURES if f"{what}.{e}" in parts), None)
                for what in ("mask", "hint")
            )
            made.ids.append(identity)
            made.captions.append(captions)
            pictures.append(parts[ending])
            made.masks.append(mask if masks else None)
            made.hints.append(hint if hints else None)
    if lost:
        raise FileProblem(f"{len(lost)} captions in {path} have no picture: {some(lost)}; make these shards anew")
    if not pictures:
        raise no_picture(path, "a WebDataset shard has KEY.jpg, .png or .webp and KEY.txt or KEY.json")
    if not any(made.masks):
        made.masks = []
    if not any(made.hints):
        made.hints = []
    return made


def _members(shard: Path) -> dict[str, dict[str, Blob]]:
    """Key -> {ending: where it lies}, in the order of the file. Raises FileProblem."""
    found: dict[str, dict[str, Blob]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                key, dot, ending = base.partition(".")
                if not (member.isreg() and key and dot) or member.issparse():
                    continue
                parts = found.setdefault(folder + slash + key, {})
                if ending.lower() in parts:
                    raise FileProblem(f"{shard} has two members {member.name}: make it anew")
                parts[ending.lower()] = Piece(shard, member.offset_data, member.size)
            if Piece(shard, tar.offset, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the mark at its end is missing")  # where it is, tarfile just ends
    except (tarfile.TarError, OSError, ValueError) as error:
        raise FileProblem(
            f"{shard} cannot be read as an uncompressed tar after {len(found)} samples ({error}): fetch it again, "
            "unpack what compressed it, or remove it"
        ) from error
    return found


def _captions(parts: dict[str, Blob], name: str, column: str) -> tuple[str, ...]:
    """Raises ImageProblem for what is no caption."""
    ending = next((e for e in TEXTS if e in parts), None)
    if ending is None:
        return ("",)
    text = text_of(parts[ending].read(), f"{name}.{ending}")
    if ending != "json":
        return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)
    try:
        row = json.loads(text)
        return caption_in(row if isinstance(row, dict) else {}, column, f"{name}.json")
    except (ValueError, RecursionError) as error:
        raise ImageProblem(f"{name}.json is not JSON: {error}") from error
    except FileProblem as problem:
        raise ImageProblem(str(problem)) from problem
