"""Learned words (textual inversion, arXiv:2208.01618): vectors that a text encoder reads where the prompt has a name.

Files are those of A1111 (`.pt`, through torch's reader that runs no code), of kohya's programs (`emb_params`), of
diffusers (one tensor, named as the word), and pairs for Stable Diffusion XL (`clip_l`, `clip_g`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner.adapters.files import Entry, digest
from limner.checkpoints import files
from limner.errors import CheckpointMismatch
from limner.text.clip import CLIPTowers
from limner.text.joined import JoinedText

WIDTHS = {(768,): "sd1", (1024,): "sd2", (768, 1280): "sdxl", (1280,): "sdxl-refiner"}
PAIR = ("clip_l", "clip_g")
MOST, MOST_TENSORS = 75, 2


@dataclass(frozen=True)
class Words:
    """A file read: `vectors` are (n, width of the tower) for each tower, `names` what the prompt may say."""

    path: Path
    name: str
    hash: str
    names: tuple[str, ...]
    vectors: tuple[Tensor, ...]
    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    """Of weights it changes none."""


def stored(path: Path) -> dict[str, Tensor]:
    """The vectors in a file by their names there, {} where it holds something else. Raises FileProblem."""
    raw: Any = files.unpickled(path) if path.is_file() and files.is_torch(path) else files.read(path, MOST_TENSORS)[0]
    inner = raw.get("string_to_param", raw) if isinstance(raw, dict) else {}
    if not isinstance(inner, dict) or not 0 < len(inner) <= MOST_TENSORS:
        return {}
    rows = {str(name): value for name, value in inner.items()}
    if not all(isinstance(v, Tensor) and v.dim() in (1, 2) and v.is_floating_point() for v in rows.values()):
        return {}
    alone = next(iter(rows))
    fits = rows.keys() == set(PAIR) or (len(rows) == 1 and (raw is not inner or "." not in alone or alone[0] == "<"))
    return rows if fits else {}


def base(vectors: Mapping[str, Tensor]) -> str:
    """The model of the catalogue that vectors are for, "" for none."""
    return WIDTHS.get(tuple(t.shape[-1] for _, t in _sorted(vectors)), "")


def _sorted(vectors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(vectors.items(), key=lambda row: PAIR.index(row[0]) if row[0] in PAIR else 0)


def read(path: Path, vectors: Mapping[str, Tensor], system: nn.Module) -> Words:
    """The `stored` vectors of a file for the towers of `system`. Raises CheckpointMismatch."""
    name, own = getattr(system, "name", "this model"), system.text_encoder
    if not isinstance(own, CLIPTowers):
        does = "which {} does not read with" if not isinstance(own, JoinedText) else "of which those of {} learn none"
        raise CheckpointMismatch(f"{path} is a learned word for CLIP's text encoders, {does.format(name)}")
    rows = _sorted(vectors)
    widths = tuple(tower.config.width for tower in own)  # type: ignore[union-attr]
    found = tuple(tensor.shape[-1] for _, tensor in rows)
    if found != widths:
        made = f"it was made for {base(vectors)}, " if base(vectors) else ""
        has, wants = (" and ".join(map(str, sizes)) for sizes in (found, widths))
        raise CheckpointMismatch(f"{path} does not fit {name}: {made}its vectors are {has} wide, and {wants} are read")
    matrices = tuple(tensor.reshape(-1, tensor.shape[-1]).float() for _, tensor in rows)
    for (key, _), matrix in zip(rows, matrices, strict=True):
        if not 0 < len(matrix) <= MOST or not matrix.isfinite().all():
            raise CheckpointMismatch(f"{path}: {key:.100} has {len(matrix)} vectors, not 1 to {MOST} of finite numbers")
    spelled = [key for key, _ in rows if key not in (*PAIR, "emb_params", "*")]
    names = dict.fromkeys(word.strip() for word in (path.stem, *spelled) if 0 < len(word.strip()) <= 200)
    return Words(path, path.stem, digest(path), tuple(names), matrices)


def put(system: nn.Module, on: list[Words], tables: list[Tensor]) -> list[Tensor]:
    """The towers' tables of vectors, each with the rows of all words after its own; the towers learn their names."""
    made = []
    for i, (tower, table) in enumerate(zip(system.text_encoder, tables, strict=True)):  # type: ignore[arg-type]
        learned: dict[str, list[int]] = {}
        end = len(table)
        for words in on:
            ids = list(range(end, end := end + len(words.vectors[i])))
            learned |= {name.lower(): ids for name in words.names}
        tower.learned = learned
        made.append(torch.cat([table, *(words.vectors[i].to(table) for words in on)]))
    return made
