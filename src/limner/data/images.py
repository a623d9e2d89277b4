"""Captioned pictures in memory, and the batches a training run draws from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass
class ImageSet:
    """n captioned pictures of one size, held as bytes.

    `images` uint8 (n, 4, h, w), RGBA with the colours premultiplied by alpha (0 where transparent).
    `captions` several ways to describe each picture, the plainest first, at least one each (may be "").
    `ids` a name for each picture, unique, used in messages and for sorting out duplicates.
    `weights` how often each is drawn, relative to the others. `mirror` True where a mirror image is still
    described by the same words. `groups` free labels for metrics (style, concept, ...), one list a name.
    """

    name: str
    images: Tensor
    captions: list[tuple[str, ...]]
    ids: list[str]
    weights: Tensor
    mirror: Tensor
    groups: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, keep: Sequence[int]) -> ImageSet:
        """The pictures at these positions, in this order."""
        index = torch.as_tensor(keep, dtype=torch.long)
        return ImageSet(
            name=self.name,
            images=self.images[index],
            captions=[self.captions[i] for i in keep],
            ids=[self.ids[i] for i in keep],
            weights=self.weights[index],
            mirror=self.mirror[index],
            groups={k: [v[i] for i in keep] for k, v in self.groups.items()},
        )


class Batches(Protocol):
    """An endless supply of batches: batch k is a pure function of (the seed it was opened with, k).

    So a resumed run needs nothing but its step to go on with the same data. `size` is the global batch;
    rank r of `world` gets its slice of it, as long as any other's. A batch is {"images": float (b, 4, h, w) in [-1, 1],
    "captions": list of b strings, "ids": list of b strings}, or has what a system asked to be cached for "images". It
    may be smaller than `size`. It may have "hints" (b, 3, h, w) in [0, 1], what a control network is told of pictures
    of h x w pixels, "mask" (b, 1, h, w) in [0, 1], by which each pixel counts in the loss, and
    "weight" (b,), by which each row counts in its mean, with "count", how many rows of all ranks do.
    """

    def __len__(self) -> int: ...
    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]: ...


def premultiply(rgba: np.ndarray) -> np.ndarray:
    """Straight RGBA bytes (..., 4) -> the same with colours multiplied by alpha, rounded to nearest."""
    alpha = rgba[..., 3:4].astype(np.uint16)
    colour = (rgba[..., :3].astype(np.uint16) * alpha + 127) // 255
    return np.concatenate([colour.astype(np.uint8), rgba[..., 3:4]], axis=-1)


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)
