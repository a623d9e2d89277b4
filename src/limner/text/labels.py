"""Classes for words: what class-conditional models read in place of a text encoder.

A prompt is the number of a class or one of its names; nothing stands for no class, which guidance leads away from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from limner.errors import UnknownName, UsageError
from limner.nn.embeddings import sent
from limner.text.prompts import Dialect, Text
from limner.types import Conditioning

IMAGENET = Path(__file__).parent.parent / "weights" / "imagenet" / "classes.txt"


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """A caption is one of `num_classes`. `names` are those of each class, with commas between; without any, 1000
    classes are taken for ImageNet's. With 0 classes there is nothing to be said: captions are empty."""

    type: Literal["labels"] = "labels"
    num_classes: int = 1000
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes < 0 or len(self.names) not in (0, self.num_classes):
            raise UsageError(f"{len(self.names)} names are not those of num_classes={self.num_classes}")


@lru_cache(maxsize=1)
def imagenet() -> tuple[str, ...]:
    """The names of the 1000 classes, as WordNet has them."""
    return tuple(IMAGENET.read_text(encoding="utf-8").splitlines())


class Labels(nn.Module):
    dialects: tuple[Dialect, ...] = ("plain",)
    clip_skip = None
    learned: frozenset[str] = frozenset()
    place: Tensor

    def __init__(self, config: LabelsConfig) -> None:
        super().__init__()
        self.config = config
        names = config.names or (imagenet() if config.num_classes == len(imagenet()) else ())
        self.known: dict[str, set[int]] = {}
        self.small: dict[str, set[int]] = {}
        """The classes of each name, as it is written, and in lower case."""
        for label, words in enumerate(names):
            for name in filter(None, (words.strip(), *map(str.strip, words.split(",")))):
                self.known.setdefault(name, set()).add(label)
                self.small.setdefault(name.lower(), set()).add(label)
        self.register_buffer("place", torch.empty(0, device="cpu"), persistent=False)  # on the device of the system

    def classes(self, prompts: Sequence[str]) -> list[int]:
        """The class of every prompt, `num_classes` for an empty one. Raises UsageError."""
        return [self.label(prompt.strip()) for prompt in prompts]

    def label(self, text: str) -> int:
        count = self.config.num_classes
        if not text:
            return count
        if not count:
            raise UsageError(f"{text!r:.80}: this model draws as it likes, it reads no words: leave the prompt out")
        if text.isascii() and text.isdecimal():
            if (number := int(text[:10])) >= count:
                raise UsageError(f"no class {text:.40}: this model has 0 to {count - 1}")
            return number
        if not self.known:
            raise UsageError(f"no class {text!r:.80}: this model's have no names here, give a number, 0 to {count - 1}")
        found = self.known.get(text) or self.small.get(text.lower())
        if found is None:
            raise UnknownName("class", text[:80], self.known, hint=f"A number will do too, 0 to {count - 1}.")
        if len(found) > 1:
            numbers = " and ".join(map(str, sorted(found)))
            raise UsageError(f"{text!r:.80} is the name of classes {numbers}: give the number of one")
        return min(found)

    def encode(self, prompts: list[str]) -> Conditioning:
        """As `labels` the class of every prompt."""
        return Conditioning(labels=sent(torch.tensor(self.classes(prompts)), self.place.device))

    def read(self, groups: Sequence[Sequence[Text]], dialect: Dialect, clip_skip: int | None) -> Conditioning:
        """A row for each text of each group, without weights: there is one dialect, and no layer to skip."""
        return self.encode(
            ["".join(piece.text for section in text for piece in section) for group in groups for text in group]
        )

    def words_cut(self, prompt: str) -> str:
        return ""  # what is no class is refused

    def words_unknown(self, prompt: str) -> str:
        return ""
