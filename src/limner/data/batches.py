"""From a named source to batches of floats and words, each batch a pure function of (seed, step)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from limner import hints
from limner.data import transforms
from limner.data.hinted import made, to_hints
from limner.data.images import ImageSet, to_float
from limner.data.samples import Samples, account, told_bare
from limner.errors import FileProblem, UnknownName, UsageError
from limner.nn.embeddings import sent

if TYPE_CHECKING:
    from limner.data.streams import Stream


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`source`: "icons", "shapes", a classic set, or samples that are read while the run goes on: "folder" (pictures
    beside .txt or metadata.jsonl), "webdataset" (tar shards), "parquet", "hf" (what datasets saved with save_to_disk).
    `folder` where its files lie ("" = the usual place), or the one file of shards or Parquet; `split` is the part of a
    source that has parts. `size` in pixels, 0 for the model's own; `limit` > 0 keeps the first so many; `latent_views`
    > 0 encodes so many views of a picture once instead of encoding each batch; `cache` keeps rendered pictures, or of
    samples their latents, in this folder ("" = in memory only), and beside latents what is made of captions, of which
    `text_cache` GB are held in memory where the text encoder learns nothing, 0 for none. `hints` are what a control
    network is told: what a maker of `limner.hints` makes of the pictures as they are drawn, or of samples NAME-hint.png
    "beside" a picture. `other_sizes` are rows of (width, height, share of the steps) at which latents are drawn beside
    `size`: each step has one size, and one larger than `size` holds fewer pictures, so that no step has more pixels.
    `augment` changes pictures as they are drawn: "view" moves and scales them a little, "autoencoder" also turns them,
    exchanges colours, and mirrors whatever it is.

    `caption_from` names what is said of pictures of a set in place of their captions, such as the "style" of icons;
    with `even`, all of them are drawn as often, where icons alike but for the tone of a skin are otherwise rarer.

    Of samples: `image_column` and `caption_column` name columns, or fields of JSON, that are not called as usual.
    `buckets` gives each picture the shape nearest its own, in steps of `bucket_step` pixels a side, no larger than
    size x size pixels and at most `bucket_ratio` times as long as short. A picture covers its shape; what is over is
    cut off around the middle (`crop`), or anywhere, and `mirror` turns half of them left to right. `masks` weight the
    loss: NAME-mask.png "beside" a picture, its "alpha", or "none". `trigger` is put before every caption;
    `shuffle_tags` shuffles what commas separate, but for the first `keep_tags`. Samples that are `bad` (unreadable,
    with a shorter side below `min_size` pixels) are told and skipped, or end the run."""

    source: str = "icons"
    folder: str = ""
    split: str = "train"
    size: int = 256
    limit: int = 0
    augment: Literal["none", "view", "autoencoder"] = "none"
    latent_views: int = 0
    other_sizes: tuple[tuple[int, int, float], ...] = ()
    cache: str = ""
    text_cache: float = 1.0
    caption_from: str = ""
    even: bool = False
    image_column: str = ""
    caption_column: str = ""
    buckets: bool = False
    bucket_step: int = 64
    bucket_ratio: float = 2.0
    crop: Literal["center", "random"] = "center"
    mirror: bool = False
    masks: Literal["beside", "alpha", "none"] = "beside"
    hints: str = "none"
    trigger: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    min_size: int = 0
    bad: Literal["skip", "raise"] = "skip"


CLASSICS = ("mnist", "animal-mnist", "avatars64", "sprites32")
_OF_SAMPLES = (
    *("folder", "cache", "caption_column", "buckets", "bucket_step", "bucket_ratio", "crop", "mirror", "masks"),
    *("trigger", "shuffle_tags", "keep_tags", "min_size", "bad"),
)
READ: dict[str, tuple[str, ...]] = {
    "icons": ("folder", "split", "cache", "other_sizes", "caption_from", "even"),
    "shapes": ("other_sizes", "caption_from"),
    **dict.fromkeys(CLASSICS, ("folder", "split", "other_sizes", "caption_from")),
    "folder": _OF_SAMPLES,
    "webdataset": _OF_SAMPLES,
    "parquet": (*_OF_SAMPLES, "image_column"),
    "hf": (*_OF_SAMPLES, "image_column", "split"),
}
"""What each source reads of the fields that not all read."""
SAMPLED = tuple(source for source, fields in READ.items() if "bad" in fields)


def check_fields(config: DataConfig) -> None:
    """Raises UsageError for a source that is not, and for fields that it does not read or that cannot be."""
    if config.source not in READ:
        raise UnknownName("data source", config.source, READ)
    for name in dict.fromkeys(name for names in READ.values() for name in names):
        if getattr(config, name) != getattr(DataConfig, name) and name not in READ[config.source]:
            raise UsageError(
                f"data.{name}={getattr(config, name)} has no effect on data.source={config.source}: leave it out"
            )
    check_hints(config)
    if config.source in SAMPLED and not config.folder:
        raise UsageError(f"data.source={config.source} needs data.folder=PATH")
    vain = [
        ("keep_tags", not config.shuffle_tags, "without data.shuffle_tags=true"),
        ("bucket_step", not config.buckets, "without data.buckets=true"),
        ("bucket_ratio", not config.buckets, "without data.buckets=true"),
        (
            "mirror",
            config.augment == "autoencoder",
            "with data.augment=autoencoder, which mirrors half of all pictures",
        ),
    ]
    for name, idle, why in vain:
        if idle and getattr(config, name) != getattr(DataConfig, name):
            raise UsageError(f"data.{name}={getattr(config, name)} has no effect {why}: leave it out")
    if config.bucket_step < 1 or config.bucket_ratio < 1:
        raise UsageError("data.bucket_step is of pixels and data.bucket_ratio of the longer to the shorter: from 1 on")


def check_hints(config: DataConfig) -> None:
    """Raises UsageError, UnknownName for hints that cannot be had."""
    if config.hints == "beside" and config.source not in SAMPLED:
        raise UsageError(
            f"data.hints=beside: nothing lies beside pictures of data.source={config.source}: name a maker"
        )
    if config.hints in hints.WITH_MODELS:
        raise UsageError(
            f"data.hints={config.hints}: a model finds that in pictures; make them first, put them beside as "
            "NAME-hint.png and give data.hints=beside"
        )
    if config.hints not in ("none", "beside"):
        hints.known(config.hints)


def open_samples(config: DataConfig) -> Samples:
    """The samples of one of `SAMPLED`. Raises FileProblem, UsageError, MissingExtra."""
    folder, beside = Path(config.folder), (config.masks == "beside", config.hints == "beside")
    if not folder.exists():
        raise FileProblem(f"data.folder={folder} does not exist")
    if config.source == "folder":
        from limner.data.folders import open_folder

        samples = open_folder(folder, config.caption_column, *beside)
    elif config.source == "webdataset":
        from limner.data.shards import open_shards

        samples = open_shards(folder, config.caption_column, *beside)
    else:
        from limner.data.tables import open_parquet, open_saved

        columns = (config.image_column, config.caption_column, *beside)
        samples = (
            open_parquet(folder, *columns) if config.source == "parquet" else open_saved(folder, config.split, *columns)
        )
    if config.hints == "beside":
        if not samples.hints:
            raise FileProblem(
                f"no picture in {folder} has a hint: put NAME-hint.png beside NAME, or give data.hints=canny"
            )
        for i in (i for i, hint in enumerate(samples.hints) if hint is None):
            samples.problems.setdefault(i, f"{samples.ids[i]} has no hint beside it")
    if told := told_bare(samples):
        print(told, file=sys.stderr)
    return samples


def open_images(config: DataConfig) -> ImageSet:
    """The pictures of a source that is held in memory. Raises FileProblem, UsageError."""
    check_fields(config)
    folder = Path(config.folder) if config.folder else None
    if config.source == "shapes":
        from limner.data.shapes import shapes

        images = shapes(config.size)
    elif config.source == "icons":
        from limner.data.icons import open_icons

        cache = Path(config.cache) if config.cache else None
        workers = os.cpu_count() or 1
        images = open_icons(folder).image_set(split=config.split, size=config.size, workers=workers, cache=cache)
    else:
        from limner.data.classics import open_classic

        images = open_classic(config.source, folder, split=config.split)
    if config.even:
        images = replace(images, weights=torch.ones_like(images.weights))
    if config.caption_from:
        images = replace(images, captions=said(images, config.caption_from))
    return images.select(range(min(config.limit, len(images)))) if config.limit else images


def said(images: ImageSet, group: str) -> list[tuple[str, ...]]:
    """The captions of pictures of which this alone is told. Raises UnknownName."""
    if group not in images.groups:
        raise UnknownName("data.caption_from", group, images.groups)
    return [(value,) for value in images.groups[group]]


def open_batches(config: DataConfig, seed: int, device: torch.device) -> ImageBatches | Stream:
    """Raises FileProblem, UsageError, MissingExtra."""
    check_fields(config)
    if config.source in SAMPLED:
        from limner.data.streams import Stream

        return Stream(open_samples(config), config, seed, device)
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

    @property
    def side(self) -> int:
        return self.set.images.shape[-1]

    def account(self) -> dict[str, int | str]:
        """What tells these pictures from others; see `limner.data.samples.account`."""
        return account(self.set.ids, self.set.captions, map(str, self.set.images.shape))

    def words(self) -> list[str]:
        """All captions that there are."""
        return [caption for captions in self.set.captions for caption in captions]

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
        seen = {"hints": to_hints(made(self.config.hints, images))} if self.config.hints != "none" else {}
        ids = [self.set.ids[i] for i in draw.index.tolist()]
        return {"images": images, "captions": draw.captions, "ids": ids} | seen

    def first(self, count: int) -> list[tuple[str, Tensor]]:
        """A caption and the hint, bytes (c, h, w), of each of the first so many pictures."""
        index = torch.arange(min(count, len(self)))
        seen = made(self.config.hints, self.pictures(index)).cpu()
        return [(self.set.captions[i][0], one) for i, one in zip(index.tolist(), seen, strict=True)]

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
