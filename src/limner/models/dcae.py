"""A deep-compression autoencoder: images <-> latents, 16 pixels a latent.

Deep Compression Autoencoder, Chen et al., arXiv:2410.10733: residual space-to-channel shortcuts let a plain
convolutional autoencoder train at high compression. Here with the KL bottleneck of latent diffusion (arXiv:2112.10752).
Unusual: four channels in and out (premultiplied RGBA, so transparency is part of the picture); the first and last 2x
are free (pixel unshuffle); no attention, so any size that is a multiple of `factor` works; latents are shifted and
scaled to unit variance inside, by buffers measured after training.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn.convolution import ChannelToSpace, ResidualBlock, SpaceToChannel


@dataclass(frozen=True, kw_only=True)
class DCAEConfig:
    """Pictures of `image_channels`, latents of `latent_channels`. `widths`, `encoder_blocks` and `decoder_blocks`
    (residual blocks a level) run from fine to coarse; the coarsest level has 2 ** len(widths) pixels a latent."""

    type: Literal["dcae"] = "dcae"
    image_channels: int = 4
    latent_channels: int = 32
    widths: tuple[int, ...] = (64, 128, 256, 256)
    encoder_blocks: tuple[int, ...] = (1, 2, 2, 1)
    decoder_blocks: tuple[int, ...] = (2, 2, 2, 1)

    @property
    def factor(self) -> int:
        return 2 ** len(self.widths)


DCAE_ICONS = DCAEConfig()  # 9.9M parameters
DCAE_TINY = DCAEConfig(latent_channels=8, widths=(16, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1))


class DCAE(nn.Module):
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.factor = config.factor
        self.channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, 4, h, w) in [-1, 1] -> latents (b, c, h / factor, w / factor) of about unit variance: the mean of
        the posterior, without sampling."""
        mean, _ = self.posterior(images)
        return (mean - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, not clamped."""
        return self.decoder(latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None])

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw latents, each (b, c, h / factor, w / factor)."""
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar.clamp(-20, 10)


class Encoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(4 * config.image_channels, widths[0], 3, padding=1)
        stages: list[nn.Module] = []
        for i, (width, blocks) in enumerate(zip(widths, config.encoder_blocks, strict=True)):
            stages += [SpaceToChannel(widths[i - 1], width)] if i else []
            stages += [ResidualBlock(width) for _ in range(blocks)]
        self.stages = nn.Sequential(*stages)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv_out(self.stages(self.conv_in(F.pixel_unshuffle(images, 2))))


class Decoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        stages: list[nn.Module] = []
        for i in reversed(range(len(widths))):
            stages += [ResidualBlock(widths[i]) for _ in range(config.decoder_blocks[i])]
            stages += [ChannelToSpace(widths[i], widths[i - 1])] if i else []
        self.stages = nn.Sequential(*stages)
        self.conv_out = nn.Conv2d(widths[0], 4 * config.image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv_out(F.silu(self.stages(self.conv_in(latents)))), 2)


def check(config: DCAEConfig) -> None:
    """Raises UsageError for what no autoencoder can be built of."""
    widths = config.widths
    if not len(widths) == len(config.encoder_blocks) == len(config.decoder_blocks) > 0:
        raise UsageError(
            f"widths={widths}, encoder_blocks={config.encoder_blocks} and decoder_blocks={config.decoder_blocks} must "
            "name as many levels, one or more"
        )
    if config.image_channels != 4 or min(*widths, config.latent_channels) < 1:
        raise UsageError(
            f"image_channels={config.image_channels}, latent_channels={config.latent_channels}, widths={widths}: "
            "pictures have 4 channels, the others 1 or more"
        )
    for fine, coarse in pairwise(widths):
        if coarse % 4 or 4 * fine % coarse:
            raise UsageError(f"widths={widths}: {coarse} must be a multiple of 4 that divides 4 x {fine}")
