"""Batches of samples that are read while the run goes on: some steps ahead, each a pure function of (seed, step)."""

from __future__ import annotations

import os
import random
import sys
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from limner.data import transforms
from limner.data.batches import seeded
from limner.data.epochs import Bucket, Epochs, bucket_sizes, nearest, share
from limner.data.hinted import made, to_hints
from limner.data.images import to_float
from limner.data.samples import Samples, account, covering, some
from limner.errors import FileProblem, ImageProblem, UsageError

if TYPE_CHECKING:
    from limner.data.batches import DataConfig

T = TypeVar("T")
AHEAD = 3
"""Steps whose pictures are read before they are asked for."""
MOST_NAMED = 20
"""Bad samples that are named; more are counted."""


@dataclass(frozen=True)
class Look:
    """One row of a batch: where a picture is cut out, whether it is mirrored, which view of it, its words."""

    place: tuple[float, float]
    mirror: bool
    view: float
    captions: random.Random


class Stream:
    """Batches of {"images" (b, 4, h, w) in [-1, 1], "captions", "ids"} of Samples; see `limner.data.images.Batches`.

    Where the samples have masks, also "mask" (b, 1, h, w) in [0, 1], and with data.hints "hints" (b, 3, h, w). Where a
    batch cannot be shared evenly by the processes, also "weight" (b,), what each row counts in the mean, and "count",
    the rows of all processes that count; see `limner.data.epochs.share`.

    A bad sample is told on stderr and its place taken by the next of its bucket; `bad` has all that were met, by
    position, with the reason. Raises FileProblem if none is left, or at the first with data.bad=raise.
    """

    def __init__(
        self,
        samples: Samples,
        config: DataConfig,
        seed: int,
        device: torch.device,
        members: Collection[int] | None = None,
    ) -> None:
        """`members` are the places of those that are read, None for all."""
        self.samples, self.config, self.seed, self.device = samples, config, seed, device
        self.masked = config.masks == "alpha" or bool(samples.masks)
        self.hinted = bool(samples.hints)
        self.pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "limner-data")
        self.pending: dict[tuple[int, int, int, int], list[Future[tuple[int, Any]]]] = {}
        self.bad: dict[int, str] = {}
        self.told = 0
        self.count = count = min(config.limit, len(samples)) if config.limit else len(samples)
        known = {i: why for i, why in samples.problems.items() if i < count}
        sizes: list[tuple[int, int]] = [(0, 0)] * count
        if config.buckets or config.min_size:
            for i, found in enumerate(self.mapped(self._measured, range(count))):
                if isinstance(found, str):
                    known.setdefault(i, found)
                else:
                    sizes[i] = found
        self.note(known)
        good = [i for i in range(count) if i not in known and (members is None or i in members)]
        if not good:
            first = next(iter(self.bad.values()), "it is held out")
            raise FileProblem(f"none of {count} samples of {samples.name} can be used; the first: {first}")
        self.buckets = self._buckets(good, sizes)
        self.epochs = Epochs(self.buckets, seed)
        shapes = [f"{len(bucket.members)} of {bucket.width} x {bucket.height}" for bucket in self.buckets]
        self.notes = [f"pictures in buckets: {some(shapes, 30)}"] if config.buckets else []

    def only(self, members: Collection[int], name: str = "") -> Stream:
        """The same of some places alone, which keep latents in a folder of this name in that of all."""
        kept = f"{self.config.cache}/{name}" if name and self.config.cache else self.config.cache
        return Stream(self.samples, replace(self.config, cache=kept), self.seed, self.device, set(members))

    def __len__(self) -> int:
        return sum(len(bucket.members) for bucket in self.buckets)

    @property
    def side(self) -> int:
        return self.config.size

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        _, indices, rows, weights = self.plan(step, size, rank, world)
        taken = self.fetched(step, size, rank, world, self.read)
        ids = [i for i, _ in taken]
        planes = to_float(torch.from_numpy(np.stack([found for _, found in taken])).to(self.device))
        generator = seeded(self.seed, step, 1 + rank, self.device)
        if self.config.augment == "autoencoder":
            planes = transforms.for_autoencoder(planes, generator)
        elif self.config.augment == "view":
            mirror = torch.full((len(planes),), self.config.mirror, device=self.device)
            planes = transforms.view(planes, mirror, generator)
        batch = {"images": planes[:, :4]} | self.told_of(step, ids, rows, weights, len(indices))
        if self.config.hints != "none":
            batch["hints"] = to_hints(self.hints_of(planes))
        return batch | ({"mask": (planes[:, 4:5] + 1) / 2} if self.masked else {})

    def hints_of(self, planes: Tensor) -> Tensor:
        """Of what `picture` gave, as float in [-1, 1]: those beside the pictures, or made of these, in bytes."""
        if self.hinted:
            return (planes[:, -3:] + 1).mul(127.5).round().to(torch.uint8)
        return made(self.config.hints, planes[:, :4])

    def first(self, count: int) -> list[tuple[str, Tensor]]:
        """A caption and the hint, bytes (c, h, w), of each of the first so many good pictures."""
        found: list[tuple[str, Tensor]] = []
        rows = sorted((i, bucket.width, bucket.height) for bucket in self.buckets for i in bucket.members)
        for i, width, height in rows:
            if len(found) < count:
                with suppress(ImageProblem):
                    planes = to_float(torch.from_numpy(self.picture(i, width, height, (0.5, 0.5), False))[None])
                    found.append((self.caption(i, random.Random(i)), self.hints_of(planes)[0]))
        return found

    def told_of(
        self, step: int, ids: list[int], rows: list[int], weights: list[float] | None, count: int
    ) -> dict[str, Any]:
        """What a batch has beside its pictures."""
        captions = [self.caption(i, self.look(step, row).captions) for i, row in zip(ids, rows, strict=True)]
        told: dict[str, Any] = {"captions": captions, "ids": [self.samples.ids[i] for i in ids]}
        if weights is not None:
            told |= {"weight": torch.tensor(weights, device=self.device), "count": count}
        return told

    @property
    def bare(self) -> bool:
        """Whether nothing is said of any picture."""
        return not self.config.trigger and all(captions == ("",) for captions in self.samples.captions)

    def account(self) -> dict[str, int | str]:
        """What tells these samples from others; see `limner.data.samples.account`."""
        samples, places = self.samples, range(self.count)
        return account(samples.ids[: self.count], samples.captions[: self.count], self.mapped(samples.length, places))

    def words(self) -> list[str] | None:
        """All captions that there are; None where tags are shuffled to ever new ones."""
        if self.config.shuffle_tags:
            return None
        members = (i for bucket in self.buckets for i in bucket.members)
        return [self.said(caption) for i in members for caption in self.samples.captions[i]]

    def said(self, caption: str) -> str:
        """With the trigger before it."""
        return ", ".join(part for part in (self.config.trigger, caption) if part)

    def caption(self, i: int, coin: random.Random) -> str:
        """One of the sample's captions, its tags shuffled and the trigger before it, if that is asked."""
        caption = coin.choice(self.samples.captions[i])
        if self.config.shuffle_tags:
            tags = [tag.strip() for tag in caption.split(",")]
            rest = tags[self.config.keep_tags :]
            coin.shuffle(rest)
            caption = ", ".join(tags[: self.config.keep_tags] + rest)
        return self.said(caption)

    def look(self, step: int, row: int) -> Look:
        """Of row `row` of the whole batch, whatever the number of processes."""
        coin = random.Random(f"{self.seed}/{step}/{row}")
        place, mirror, view = (coin.random(), coin.random()), coin.random() < 0.5, coin.random()
        return Look(
            place if self.config.crop == "random" else (0.5, 0.5),
            mirror and self.config.mirror and self.config.augment == "none",
            view,
            coin,
        )

    def plan(
        self, step: int, size: int, rank: int, world: int
    ) -> tuple[Bucket, list[int], list[int], list[float] | None]:
        """The step's bucket and samples, and which rows of it are this process's, with their weights."""
        bucket, indices = self.epochs.step(step, size)
        return bucket, indices, *share(len(indices), rank, world)

    def fetched(
        self, step: int, size: int, rank: int, world: int, read: Callable[[int, Bucket, Look], T]
    ) -> list[tuple[int, T]]:
        """What `read` makes of each row of this process, and the sample it is of; the next steps are begun."""
        wanted = [(step + k, size, rank, world) for k in range(AHEAD + 1)]
        for key in [key for key in self.pending if key not in wanted]:
            for future in self.pending.pop(key):
                future.cancel()
        for key in wanted:
            if key not in self.pending:
                bucket, indices, rows, _ = self.plan(*key)
                self.pending[key] = [
                    self.pool.submit(self.good, indices[row], bucket, self.look(key[0], row), read) for row in rows
                ]
        taken = [future.result() for future in self.pending.pop(wanted[0])]
        self.note({})
        return taken

    def mapped(self, function: Callable[[int], T], members: Sequence[int]) -> Iterator[T]:
        """As `map`, in threads, a few thousand at a time."""
        for start in range(0, len(members), 4096):
            yield from self.pool.map(function, members[start : start + 4096])

    def picture(self, i: int, width: int, height: int, place: tuple[float, float], mirror: bool) -> np.ndarray:
        """uint8 (4, height, width), and one plane more where there are masks, and then three of hints that lie beside.
        Raises ImageProblem."""
        picture = self.samples.load(i)
        mask = self.samples.mask(i) if self.config.masks == "beside" else None
        if self.config.masks == "alpha":
            mask = picture.getchannel("A")
            picture.putalpha(255)
        if mask is not None and mask.size != picture.size:
            found, wanted = ("{} x {}".format(*one.size) for one in (mask, picture))
            raise ImageProblem(f"the mask of {self.samples.ids[i]} has {found} pixels, the picture {wanted}")
        parts = [covering(picture, width, height, place)]
        if self.masked:
            white = np.full((height, width, 1), 255, np.uint8)
            parts.append(white if mask is None else covering(mask, width, height, place))
        if self.hinted:
            hint = self.samples.hint(i)
            if hint.size != picture.size:
                found, wanted = ("{} x {}".format(*one.size) for one in (hint, picture))
                raise ImageProblem(f"the hint of {self.samples.ids[i]} has {found} pixels, the picture {wanted}")
            parts.append(covering(hint, width, height, place)[..., :3])
        planes = np.concatenate(parts, -1).transpose(2, 0, 1)
        return np.ascontiguousarray(planes[..., ::-1] if mirror else planes)

    def read(self, i: int, bucket: Bucket, look: Look) -> np.ndarray:
        """As `picture`."""
        return self.picture(i, bucket.width, bucket.height, look.place, look.mirror)

    def good(self, i: int, bucket: Bucket, look: Look, read: Callable[[int, Bucket, Look], T]) -> tuple[int, T]:
        """What `read` makes of sample `i`, or of the next of its bucket that is good."""
        start = bisect_left(bucket.members, i)
        for k in range(len(bucket.members)):
            i = bucket.members[(start + k) % len(bucket.members)]
            if i in self.bad:
                continue
            try:
                return i, read(i, bucket, look)
            except ImageProblem as problem:
                self.refuse(str(problem))
                self.bad[i] = str(problem)
        why = self.bad[bucket.members[0]]
        raise FileProblem(
            f"none of {len(bucket.members)} pictures of {self.samples.name} to be learned as {bucket.width} x "
            f"{bucket.height} pixels can be used; the first: {why}"
        )

    def note(self, more: dict[int, str]) -> None:
        """Tell on stderr of bad samples that were not told yet."""
        self.bad |= more
        reasons = list(self.bad.values())
        if reasons:
            self.refuse(reasons[0])
        for number, why in enumerate(reasons[self.told :], self.told + 1):
            if number <= MOST_NAMED:
                print(f"left out: {why}", file=sys.stderr)
            elif number == MOST_NAMED + 1:
                print(f"more than {MOST_NAMED} bad samples: the rest is counted, not named", file=sys.stderr)
        self.told = len(reasons)

    def refuse(self, why: str) -> None:
        """Raises FileProblem if bad samples are not to be left out."""
        if self.config.bad == "raise":
            raise FileProblem(f"{why}; data.bad=skip would leave it out")

    def _measured(self, i: int) -> tuple[int, int] | str:
        try:
            width, height = self.samples.size(i)
        except ImageProblem as problem:
            return str(problem)
        if min(width, height) < self.config.min_size:
            return (
                f"{self.samples.ids[i]} has {width} x {height} pixels, fewer than data.min_size={self.config.min_size}"
            )
        return width, height

    def _buckets(self, good: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Bucket]:
        config = self.config
        if not config.buckets:
            return [Bucket(config.size, config.size, tuple(good))]
        shapes = bucket_sizes(config.size, config.bucket_step, config.bucket_ratio)
        if not shapes:
            raise UsageError(
                f"data.size={config.size} has no bucket in steps of data.bucket_step={config.bucket_step}: give a "
                "smaller step"
            )
        members: dict[tuple[int, int], list[int]] = {shape: [] for shape in shapes}
        for i in good:
            members[nearest(*sizes[i], shapes)].append(i)
        return [Bucket(*shape, tuple(found)) for shape, found in members.items() if found]
