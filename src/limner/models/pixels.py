"""No autoencoder: diffusion on the pixels themselves, as before latent diffusion (DDPM, ADM, EDM, flow matching)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from limner.types import Images, Latents


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """`image_channels` are 3, where transparency goes onto white, or 4."""

    type: Literal["pixels"] = "pixels"
    image_channels: Literal[3, 4] = 3

    @property
    def latent_channels(self) -> int:
        return self.image_channels

    @property
    def factor(self) -> int:
        return 1


class Pixels(nn.Module):
    """Its latents are the images, in [-1, 1]."""

    factor = 1
    scale = 1.0

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.image_channels

    def encode(self, images: Images) -> Latents:
        return images

    def decode(self, latents: Latents) -> Images:
        return latents

    def from_latents(self, latents: Latents) -> Latents:
        return latents
