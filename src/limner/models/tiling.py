"""Large pictures in overlapping tiles, so that memory does not grow with them: through an autoencoder, and denoised.

An activation at full size takes some hundred times the memory of the picture. Tiles overlap and are blended with
weights that rise and fall linearly and sum to one. They are of one size and evenly spread, so none is narrow. What a
network knows of the whole picture (group norms, attention) it knows of the tile only: the result is near to that of
the whole picture, not equal; docs/tiling.md has by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from limner.errors import UsageError
from limner.types import Autoencoder, Images, Latents

OVERLAP = 0.25
"""Of a tile's side, at least."""
WHOLE, TILE = (192, 1536), (128, 1024)
"""The side in latents and in pixels of the largest square that an autoencoder takes whole, and of the tiles of what is
larger. Its attention grows with the fourth power of the first, all else with the square of the second."""


class Tiled:
    """An autoencoder that works as `autoencoder` does, one picture at a time and in tiles of at most `tile` pixels a
    side, which overlap by at least `overlap` of a side; pictures no larger than a tile are not cut."""

    def __init__(self, autoencoder: Autoencoder, tile: int = 512, overlap: float = OVERLAP) -> None:
        self.autoencoder = autoencoder
        self.factor, self.channels = autoencoder.factor, autoencoder.channels
        self.side = tile // self.factor  # in latents, as all measures below
        self.overlap = overlap_of(self.side, overlap)
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

        def picture(one: Tensor) -> Tensor:
            return blended(lambda _, tile: function(tile), one, self.side, self.overlap, before, after)

        return torch.cat([picture(one) for one in x.split(1)])


def through(autoencoder: Autoencoder, width: int, height: int, tile: int | None = None) -> Autoencoder:
    """An autoencoder for pictures of so many pixels whose memory does not grow with them: in tiles of `tile` pixels, 0
    for none, None for those that the size asks for (`tile_of`); and of pictures that are not cut no more at once than
    fit into the largest."""
    tile = tile_of(autoencoder.factor, width, height) if tile is None else tile
    if tile and max(width, height) > tile:
        return Tiled(autoencoder, tile)
    return Sliced(autoencoder, max(1, WHOLE[1] ** 2 // (width * height)))


def tile_of(factor: int, width: int, height: int) -> int:
    """The tiles in pixels that an autoencoder takes a picture in, 0 where it goes whole."""
    if width * height <= min(WHOLE[0] * factor, WHOLE[1]) ** 2:
        return 0
    return min(TILE[0] * factor, TILE[1])


class Sliced:
    """An autoencoder that works as `autoencoder` does, `count` pictures at a time."""

    def __init__(self, autoencoder: Autoencoder, count: int = 1) -> None:
        self.autoencoder, self.count = autoencoder, count
        self.factor, self.channels = autoencoder.factor, autoencoder.channels

    def encode(self, images: Images) -> Latents:
        return torch.cat([self.autoencoder.encode(some) for some in images.split(self.count)])

    def decode(self, latents: Latents) -> Images:
        return torch.cat([self.autoencoder.decode(some) for some in latents.split(self.count)])


# -------------------------------------------------------------------- tiles


def blended(
    function: Callable[[int, Tensor], Tensor], x: Tensor, side: int, overlap: int, before: int = 1, after: int = 1
) -> Tensor:
    """What `function(k, tile)` makes of the tiles of x (b, c, h, w), joined, where the k-th is that of
    `tiles(h, w, side, overlap)`. All lengths are in latents: x has `before` pixels to one, what is made `after`."""
    height, width = x.shape[2] // before, x.shape[3] // before
    if max(height, width) <= side:
        return function(0, x)
    rows, columns = weights(height, side, overlap, after, x), weights(width, side, overlap, after, x)
    result: Tensor | None = None
    places = tiles(height, width, side, overlap)
    for k, (top, bottom, left, right) in enumerate(places[:2] if x.is_meta else places):  # without data all are alike
        tile = function(k, x[:, :, top * before : bottom * before, left * before : right * before])
        down, along = rows[top], columns[left]
        if result is None:  # summed in float32 at least, or the weights would not sum to one
            size = (*tile.shape[:2], height * after, width * after)
            result = torch.zeros(size, device=tile.device, dtype=down.dtype)
        result[:, :, top * after : bottom * after, left * after : right * after] += tile * (down[:, None] * along)
    assert result is not None
    return result.to(x.dtype)


def overlap_of(side: int, share: float = OVERLAP) -> int:
    """In latents."""
    return max(1, round(share * side))


def tiles(height: int, width: int, side: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of the tiles of so many latents, row by row."""
    tall, wide = min(side, height), min(side, width)
    return [
        (top, top + tall, left, left + wide)
        for top in starts(height, side, overlap)
        for left in starts(width, side, overlap)
    ]


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where the tiles along one axis begin, the last as far from its end as the first from its start: not at all."""
    if length <= side:
        return [0]
    count = ceil((length - side) / (side - overlap)) + 1
    return [round(k * (length - side) / (count - 1)) for k in range(count)]


def weights(length: int, side: int, overlap: int, after: int, like: Tensor) -> dict[int, Tensor]:
    """Of the tiles along one axis, by their start: the weights over every pixel sum to one."""
    begun, side = starts(length, side, overlap), min(side, length)
    rise = (torch.arange(side * after, dtype=torch.float64) + 0.5) / (overlap * after)
    ramp = torch.minimum(rise, rise.flip(0)).clamp(max=1)
    total = torch.zeros(length * after, dtype=torch.float64)
    for start in begun:
        total[start * after : (start + side) * after] += ramp
    dtype = torch.promote_types(like.dtype, torch.float32)
    shares = (ramp / total[start * after : (start + side) * after] for start in begun)
    return dict(zip(begun, (share.to(like.device, dtype) for share in shares), strict=True))
