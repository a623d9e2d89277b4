"""From a named source to batches of floats and words, each batch a pure function of (seed, step)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limner.data import transforms
from limner.data.images import ImageSet, to_float
from limner.errors import UnknownName, UsageError
from limner.nn.embeddings import sent


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`source`: "icons", "shapes", "folder" or a classic set; `folder` where its files lie ("" = the usual place).
    `size` in pixels; `limit` > 0 keeps the first so many; `latent_views` > 0 encodes so many views of a picture once
    instead of encoding each batch; `cache` keeps rendered pictures in this folder ("" = in memory only).
    `other_sizes` are rows of (width, height, share of the steps) at which latents are drawn beside `size`: each step
    has one size, and one larger than `size` holds fewer pictures, so that no step has more pixels."""

    source: str = "icons"
    folder: str = ""
    split: str = "train"
    size: int = 256
    limit: int = 0
    augment: Literal["none", "view", "autoencoder"] = "none"
    latent_views: int = 0
    other_sizes: tuple[tuple[int, int, float], ...] = ()
    cache: str = ""


CLASSICS = ("mnist", "animal-mnist", "avatars64", "sprites32")
READ: dict[str, tuple[str, ...]] = {
    "icons": ("folder", "split", "cache"),
    "shapes": (),
    "folder": ("folder",),
    **dict.fromkeys(CLASSICS, ("folder", "split")),
}
"""What each source reads of `folder`, `split` and `cache`."""


def open_images(config: DataConfig) -> ImageSet:
    """The pictures a DataConfig names. Raises FileProblem, UsageError."""
    if config.source not in READ:
        raise UnknownName("data source", config.source, READ)
    for name in ("folder", "split", "cache"):
        if getattr(config, name) != getattr(DataConfig, name) and name not in READ[config.source]:
            raise UsageError(
                f"data.{name}={getattr(config, name)} has no effect on data.source={config.source}: leave it out"
            )
    folder = Path(config.folder) if config.folder else None
    if config.source == "shapes":
        from limner.data.shapes import shapes

        images = shapes(config.size)
    elif config.source == "icons":
        from limner.data.icons import open_icons

        cache = Path(config.cache) if config.cache else None
        workers = os.cpu_count() or 1
        images = open_icons(folder).image_set(split=config.split, size=config.size, workers=workers, cache=cache)
    elif config.source == "folder":
        from limner.data.folders import open_folder

        if folder is None:
            raise UsageError("data.source=folder needs data.folder=PATH")
        images = open_folder(folder, config.size)
    else:
        from limner.data.classics import open_classic

        images = open_classic(config.source, folder, split=config.split)
    return images.select(range(min(config.limit, len(images)))) if config.limit else images


def open_batches(config: DataConfig, seed: int, device: torch.device) -> ImageBatches:
    return ImageBatches(open_images(config), config, seed, device)


@dataclass(frozen=True)
class Draw:
    """Which pictures, which of their captions, and a number in [0, 1) each, for one rank's share of a batch."""

    index: Tensor
    captions: list[str]
    chance: Tensor


class ImageBatches:
    """Batches of {"images" (b, 4, h, w) in [-1, 1], "captions", "ids"}; see `limner.data.images.Batches`.

    The bytes move to `device` once when they fit in a third of its free memory.
    """

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, device: torch.device) -> None:
        self.set, self.config, self.seed, self.device = images, config, seed, device
        self.caption_weights = caption_weights(images)
        if device.type == "cuda" and images.images.nbytes < torch.cuda.mem_get_info(device)[0] / 3:
            self.set.images = images.images.to(device)

    def __len__(self) -> int:
        return len(self.set)

    def draw(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Draw:
        """The global batch is drawn whole on every rank, then sliced: the draw does not depend on `world`."""
        generator = seeded(self.seed, step, 0)
        index = torch.multinomial(self.set.weights, size, replacement=True, generator=generator)
        which = torch.multinomial(self.caption_weights[index], 1, generator=generator).flatten()
        chance = torch.rand(size, generator=generator)
        share = slice(rank * size // world, (rank + 1) * size // world)
        index, which, chance = index[share], which[share], chance[share]
        captions = [self.set.captions[i][k] for i, k in zip(index.tolist(), which.tolist(), strict=True)]
        return Draw(index, captions, chance)

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        draw = self.draw(step, size, rank=rank, world=world)
        images = self.pictures(draw.index)
        generator = seeded(self.seed, step, 1 + rank, self.device)
        if self.config.augment == "autoencoder":
            images = transforms.for_autoencoder(images, generator)
        elif self.config.augment == "view":
            images = transforms.view(images, self.set.mirror[draw.index].to(self.device), generator)
        return {"images": images, "captions": draw.captions, "ids": [self.set.ids[i] for i in draw.index.tolist()]}

    def pictures(self, index: Tensor) -> Tensor:
        """Float images (len(index), 4, h, w) on the device."""
        return to_float(self.set.images[sent(index, self.set.images.device)].to(self.device))


def caption_weights(images: ImageSet) -> Tensor:
    """How often each caption of a picture is taken (n, most captions): by position in the icon set, else equal."""
    shares: tuple[float, ...] = ()
    if images.name == "icons":
        from limner.data.icons import CAPTION_WEIGHTS

        shares = CAPTION_WEIGHTS
    table = torch.zeros(len(images), max(map(len, images.captions)))
    for row, captions in zip(table, images.captions, strict=True):
        weights = [*shares[: len(captions)], *[0.1 if shares else 1.0] * (len(captions) - len(shares))]
        row[: len(captions)] = torch.tensor(weights[: len(captions)])
    return table


def seeded(seed: int, step: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on these numbers only."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) & (2**63 - 1)
    return torch.Generator(device).manual_seed(mixed)
