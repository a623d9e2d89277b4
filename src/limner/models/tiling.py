"""Large pictures through an autoencoder in overlapping tiles, so that memory does not grow with the picture.

An activation at full size takes some hundred times the memory of the picture. Tiles overlap and are blended with
weights that rise and fall linearly and sum to one. They are of one size and evenly spread, so none is narrow. What a
network knows of the whole picture (group norms, attention) it knows of the tile only: the result is near to that of
the whole picture, not equal.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from limner.errors import UsageError
from limner.types import Autoencoder, Images, Latents


class Tiled:
    """An autoencoder that works as `autoencoder` does, one picture at a time and in tiles of at most `tile` pixels a
    side, which overlap by at least `overlap` of a side; pictures no larger than a tile are not cut."""

    def __init__(self, autoencoder: Autoencoder, tile: int = 512, overlap: float = 0.25) -> None:
        self.autoencoder = autoencoder
        self.factor, self.channels = autoencoder.factor, autoencoder.channels
        self.side = tile // self.factor  # in latents, as all measures below
        self.overlap = max(1, round(overlap * self.side))
        if not 0 <= overlap < 1 or self.overlap >= self.side:
            raise UsageError(f"tiles of {tile} pixels ({self.side} latents) cannot overlap by {overlap:g} of a side")

    def encode(self, images: Images) -> Latents:
        """Images -> latents; height and width must be multiples of `factor`."""
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise UsageError(f"{images.shape[3]} x {images.shape[2]} pixels are not a multiple of {self.factor}")
        return self._tiled(self.autoencoder.encode, images, self.factor, 1)

    def decode(self, latents: Latents) -> Images:
        return self._tiled(self.autoencoder.decode, latents, 1, self.factor)

    def _tiled(self, function: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int) -> Tensor:
        """`function` turns tiles with `before` pixels a latent into tiles with `after`."""
        height, width = x.shape[2] // before, x.shape[3] // before
        if max(height, width) <= self.side:
            return torch.cat([function(picture) for picture in x.split(1)])
        rows, columns = self._spans(height, after, x), self._spans(width, after, x)
        result: Tensor | None = None
        for k, picture in enumerate(x.split(1)):
            for top, bottom, down in rows:
                for left, right, along in columns:
                    tile = function(picture[:, :, top * before : bottom * before, left * before : right * before])
                    if result is None:  # summed in float32 at least, or the weights would not sum to one
                        size = (len(x), tile.shape[1], height * after, width * after)
                        result = torch.zeros(size, device=tile.device, dtype=down.dtype)
                    place = result[k, :, top * after : bottom * after, left * after : right * after]
                    place += tile[0] * (down[:, None] * along)
        assert result is not None
        return result.to(x.dtype)

    def _spans(self, length: int, after: int, like: Tensor) -> list[tuple[int, int, Tensor]]:
        """(start, end, weights) of the tiles along one axis of `length` latents; the weights over every pixel sum to
        one."""
        side = min(self.side, length)
        count = ceil((length - side) / (side - self.overlap)) + 1 if length > side else 1
        starts = [round(k * (length - side) / max(count - 1, 1)) for k in range(count)]
        rise = (torch.arange(side * after, dtype=torch.float64) + 0.5) / (self.overlap * after)
        weights = torch.minimum(rise, rise.flip(0)).clamp(max=1)
        total = torch.zeros(length * after, dtype=torch.float64)
        for start in starts:
            total[start * after : (start + side) * after] += weights
        spans = []
        for start in starts:
            share = weights / total[start * after : (start + side) * after]
            spans.append((start, start + side, share.to(like.device, torch.promote_types(like.dtype, torch.float32))))
        return spans
