"""Which samples a step sees: epochs without replacement, and buckets of one shape each.

All of it is a pure function of (seed, step, size of a batch), so neither a resumed run nor one that goes on with
another number of processes sees a sample twice in an epoch, or leaves one out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from limner.data.batches import seeded


@dataclass(frozen=True)
class Bucket:
    """The samples, by position, that are learned as `width` x `height` pixels."""

    width: int
    height: int
    members: tuple[int, ...]


def bucket_sizes(size: int, step: int, most: float) -> list[tuple[int, int]]:
    """Every (width, height) in multiples of `step` pixels of at most size x size pixels, as high as that allows for its
    width or as wide for its height, and at most `most` times as long as short; from high to wide."""
    sizes = set()
    for one in range(step, math.floor(size * math.sqrt(most)) + 1, step):
        other = size * size // one // step * step
        if other and max(one, other) <= most * min(one, other):
            sizes |= {(one, other), (other, one)}
    return sorted(sizes, key=lambda s: (s[0] / s[1], s))


def nearest(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose ratio is nearest to that of a picture, by its logarithm: the first of several."""
    return min(sizes, key=lambda s: abs(math.log(s[0] / s[1] * height / width)))


class Epochs:
    """Steps of an endless run over buckets. A step has samples of one bucket.

    One bucket alone is a sequence of shuffled epochs, cut into batches that may begin in one and end in the next. Of
    several, each epoch has every bucket's own batches, in shuffled order; the last of a bucket is as small as it must
    be, so that `steps` steps see each sample once.
    """

    def __init__(self, buckets: Sequence[Bucket], seed: int) -> None:
        self.buckets, self.seed = list(buckets), seed
        self.order = lru_cache(2 * len(self.buckets) + 2)(self._order)

    def steps(self, size: int) -> int:
        """Of an epoch of several buckets."""
        return sum(-(-len(bucket.members) // size) for bucket in self.buckets)

    def step(self, step: int, size: int) -> tuple[Bucket, list[int]]:
        """The bucket, and `size` of its samples or fewer."""
        if len(self.buckets) == 1:
            members = self.buckets[0].members
            places = (divmod(k, len(members)) for k in range(step * size, (step + 1) * size))
            return self.buckets[0], [members[self.order(epoch, 0, len(members))[place]] for epoch, place in places]
        epoch, number = divmod(step, self.steps(size))
        which, number = 0, int(self.order(epoch, -1, self.steps(size))[number])
        while number >= (batches := -(-len(self.buckets[which].members) // size)):
            which, number = which + 1, number - batches
        members = self.buckets[which].members
        order = self.order(epoch, which, len(members))[number * size : (number + 1) * size]
        return self.buckets[which], [members[i] for i in order]

    def _order(self, epoch: int, stream: int, n: int) -> np.ndarray:
        return torch.randperm(n, generator=seeded(self.seed, epoch, 701 + stream)).numpy()


def share(count: int, rank: int, world: int) -> tuple[list[int], list[float] | None]:
    """Which of `count` rows are those of a process, as many as of any other, and what each weighs in its mean.

    Where they cannot be shared evenly, rows are repeated and weigh nothing, and the others so much that the mean over
    all processes is that over the `count` rows; else the weights are None.
    """
    each = -(-count // world)
    mine = range(rank * each, (rank + 1) * each)
    weights = None if count % world == 0 else [each * world / count if row < count else 0.0 for row in mine]
    return [row % count for row in mine], weights
