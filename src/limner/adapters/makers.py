"""Makers of control pictures that look with a model which a person brings: how near all is, how someone stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from limner import metadata, pictures
from limner.checkpoints import estimators, files, hub, parts
from limner.errors import CheckpointMismatch, FileProblem, UsageError

BESIDE = (estimators.CONFIG, estimators.SHOWN)
NOTHING = {
    "depth": "nothing nearer than the rest is found",
    "pose": "no joint of a person, who should be one and fill the picture, is found",
}
"""What a black picture means."""


class Finder:
    """What `maker`, one of `limner.hints.WITH_MODELS`, makes of a picture with a network on the CPU. `name` and `hash`
    are those of its file, as pictures remember them. The last picture is kept: it is asked for again and again."""

    def __init__(self, network: Any, maker: str, name: str, hash: str) -> None:
        self.network, self.maker, self.name, self.hash = network, maker, name, hash
        self.last: tuple[str, Image.Image] | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        """Of an RGB picture, in its size. Raises CheckpointMismatch."""
        key = pictures.digest(image)
        if self.last is None or self.last[0] != key:
            try:
                self.last = key, self.network.picture(image)
            except CheckpointMismatch as error:
                raise CheckpointMismatch(f"{self.name}: {error}") from error
        return self.last[1]


def open_finder(known: dict[str, tuple[Any, Finder]], maker: str, source: str | Path) -> Finder:
    """The model of a maker in a folder of transformers, in a file beside its config.json, or in a repository of the
    Hub, hf:owner/name. `known` keeps one of each maker. Raises FileProblem, CheckpointMismatch, UsageError."""
    if not isinstance(source, str | Path) or not str(source):
        raise UsageError(f"the model of {maker} is {source!r:.80}: give a folder, a file or hf:owner/name")
    if problem := metadata.misnamed(name := called(source)):
        raise UsageError(f"{name!r:.60} cannot be remembered by a picture ({problem}): rename it")
    path = hub.fetch(str(source), BESIDE) if str(source).startswith(hub.PREFIX) else Path(source)
    try:
        there = path.exists()
        paths = [*parts.weights(path), *((path if path.is_dir() else path.parent) / n for n in BESIDE)] if there else []
        key = [(str(p), p.stat().st_mtime_ns) for p in paths if p.is_file()]
    except (OSError, ValueError) as error:
        raise FileProblem(f"cannot read {str(source)!r:.200}: give a folder, a file or hf:owner/name") from error
    if maker not in known or known[maker][0] != key:
        network = estimators.READERS[maker](path)
        known[maker] = key, Finder(network, maker, name, files.digest(*parts.weights(path)))
    return known[maker][1]


def called(source: str | Path) -> str:
    """What a picture calls a model: the repository of the Hub, its folder, or its file, where that is not `model`."""
    if said := hub.NAME.fullmatch(str(source)):
        return said["name"].split("/")[1]
    path = Path(source).absolute()
    return path.name if path.is_dir() else path.parent.name if path.stem in ("model", "pytorch_model") else path.stem
