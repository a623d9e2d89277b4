from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from limner import types
from limner.errors import UsageError
from limner.models import tiling
from limner.models.autoencoder import KL_TINY, KLAutoencoder
from limner.models.tiling import Tiled


class Blocks:
    """An autoencoder that looks at nothing but the pixels of a latent, and remembers the sizes it was given."""

    factor, channels = 4, 3

    def __init__(self):
        self.seen = []

    def encode(self, images):
        self.seen.append(tuple(images.shape))
        return F.avg_pool2d(images, self.factor)

    def decode(self, latents):
        self.seen.append(tuple(latents.shape))
        return F.interpolate(latents, scale_factor=float(self.factor))


SIZES = [(32, 32), (32, 36), (36, 32), (80, 100), (200, 16), (64, 264)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
def test_tiles_of_a_local_autoencoder_join_without_a_seam(height, width, overlap):
    plain, images = Blocks(), torch.randn(2, 3, height, width, dtype=torch.float64)
    tiled = Tiled(plain, tile=32, overlap=overlap)
    latents = tiled.encode(images)
    torch.testing.assert_close(latents, plain.encode(images))
    torch.testing.assert_close(tiled.decode(latents), plain.decode(latents))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_are_of_one_size_and_of_one_picture(height, width):
    plain = Blocks()
    tiled = Tiled(plain, tile=32, overlap=0.25)
    tiled.encode(torch.zeros(2, 3, height, width))
    tiled.decode(torch.zeros(2, 3, height // 4, width // 4))
    sizes = set(plain.seen)
    assert sizes == {(1, 3, min(height, 32), min(width, 32)), (1, 3, min(height // 4, 8), min(width // 4, 8))}


def test_half_precision_loses_nothing_in_the_blend():
    latents = torch.ones(1, 3, 25, 25, dtype=torch.bfloat16)
    images = Tiled(Blocks(), tile=32, overlap=0.6).decode(latents)
    assert images.dtype == torch.bfloat16
    assert torch.equal(images, torch.ones(1, 3, 100, 100, dtype=torch.bfloat16))


def test_a_picture_no_larger_than_a_tile_is_not_cut():
    network = KLAutoencoder(KL_TINY)
    images = torch.randn(2, 3, 24, 32)
    tiled = Tiled(network, tile=32)
    assert isinstance(tiled, types.Autoencoder)
    with torch.no_grad():
        latents = tiled.encode(images)
        torch.testing.assert_close(latents, network.encode(images))
        torch.testing.assert_close(tiled.decode(latents), network.decode(latents))


def test_far_from_their_edges_tiles_are_what_the_network_makes_of_them():
    network = KLAutoencoder(KL_TINY)
    latents = torch.randn(1, 4, 8, 14)
    with torch.no_grad():
        images = Tiled(network, tile=32, overlap=0.25).decode(latents)
        left, right = network.decode(latents[..., :8]), network.decode(latents[..., 6:])
    assert images.shape == (1, 3, 32, 56)
    torch.testing.assert_close(images[..., :24], left[..., :24])
    torch.testing.assert_close(images[..., 32:], right[..., 8:])
    share = (torch.arange(8) + 0.5) / 8  # of the right one, across the overlap of two latents
    torch.testing.assert_close(images[..., 24:32], left[..., 24:] * (1 - share) + right[..., :8] * share)


def test_what_cannot_be_tiled_is_refused():
    with pytest.raises(UsageError, match="not a multiple of 4"):
        Tiled(Blocks(), tile=32).encode(torch.zeros(1, 3, 40, 38))
    for tile, overlap in ((32, 1.0), (32, -0.1), (4, 0.25)):
        with pytest.raises(UsageError, match="cannot overlap"):
            Tiled(Blocks(), tile=tile, overlap=overlap)


def test_the_size_chooses_what_goes_whole():
    for factor, width, height, tile in (
        (8, 1536, 1536, 0),
        (8, 3072, 768, 0),
        (8, 1536, 1544, 1024),
        (4, 768, 768, 0),
        (4, 4096, 4096, 512),  # 128 latents: its attention has four times as many of a pixel
        (32, 1536, 1536, 0),
        (32, 2048, 2048, 1024),
    ):
        assert tiling.tile_of(factor, width, height) == tile


def test_pictures_that_go_whole_go_together_while_they_fit():
    plain, images = Blocks(), torch.randn(5, 3, 1024, 1024)
    codec = tiling.through(plain, 1024, 1024, 0)
    latents = codec.encode(images)
    assert torch.equal(codec.decode(latents), plain.decode(latents))
    assert [size[0] for size in plain.seen[:10]] == [2, 2, 1, 2, 2, 1, 5]
    assert isinstance(codec, types.Autoencoder)
    assert isinstance(tiling.through(plain, 1024, 1024), Tiled)  # 256 latents a side
    assert isinstance(tiling.through(plain, 512, 512), tiling.Sliced)
    assert isinstance(tiling.through(plain, 64, 128, 64), Tiled)
    assert isinstance(tiling.through(plain, 64, 64, 64), tiling.Sliced)
