"""Previews: what latents show, by a linear map from their channels to those of pictures (latent2rgb), a pixel a latent.

A map is a row for each channel of the latents and a last one, a constant; pixels are in [-1, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from limner import pictures
from limner.models.autoencoder import KL_SD1, KL_SDXL, KL_UPSCALER, KLConfig
from limner.models.pixels import PixelsConfig
from limner.types import Autoencoder, Latents

Map = tuple[tuple[float, ...], ...]
NOTHING = (0.0, 0.0, 0.0)

PUBLISHED: dict[KLConfig, Map] = {
    KL_SD1: (
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
        NOTHING,
    ),
    KL_SDXL: (
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
        (0.1084, -0.0175, -0.0011),
    ),
    KL_UPSCALER: (
        (-0.2340, -0.3863, -0.3257),
        (0.0994, 0.0885, -0.0908),
        (-0.2833, -0.2349, -0.3741),
        (0.2523, -0.0055, -0.1651),
        NOTHING,
    ),
}
"""Of the autoencoders of Stable Diffusion 1 and 2, of XL and of the x4 upscaler; the numbers are those of ComfyUI's
`latent_formats.py`."""

ICONS: Map = (
    (0.0, 0.01, -0.02, 0.0), (-0.01, 0.0, 0.0, -0.01), (0.03, 0.0, 0.01, 0.03), (0.05, 0.02, 0.0, 0.06),
    (0.01, 0.01, 0.0, 0.02), (0.05, -0.06, -0.02, -0.05), (0.13, -0.09, 0.02, -0.01), (-0.01, 0.0, 0.02, -0.01),
    (-0.03, -0.02, -0.03, -0.06), (-0.02, -0.01, -0.01, -0.02), (-0.58, -0.51, -0.4, -0.69), (0.01, 0.0, -0.06, -0.02),
    (-0.08, -0.07, 0.16, -0.06), (-0.03, -0.01, 0.01, -0.01), (0.02, -0.04, -0.04, -0.01), (-0.01, -0.02, 0.0, 0.0),
    (-0.01, -0.04, -0.02, -0.04), (0.01, 0.01, 0.0, 0.02), (0.0, 0.03, 0.04, 0.0), (0.03, 0.0, 0.0, 0.03),
    (0.0, -0.01, 0.0, 0.01), (0.01, 0.0, 0.01, 0.01), (0.0, -0.01, -0.06, -0.04), (0.02, 0.06, 0.03, 0.03),
    (-0.03, -0.01, -0.01, -0.03), (0.01, -0.01, 0.0, -0.03), (-0.03, -0.02, -0.02, 0.0), (-0.02, 0.01, -0.01, -0.02),
    (0.05, 0.01, -0.01, 0.04), (0.0, 0.01, 0.0, 0.0), (-0.06, -0.02, 0.03, -0.03), (0.0, 0.02, -0.03, 0.01),
    (-0.49, -0.52, -0.56, -0.17),
)  # fmt: skip
"""Of the autoencoder that ships, to premultiplied RGBA: `fit` to 24 pictures drawn in the styles that it knows."""


def show(latents: Latents, known: Tensor) -> list[Image.Image]:
    """Latents by a map (channels + 1, 3 or 4) -> an RGB or RGBA picture of each row, a pixel a latent."""
    pixels = _with_one(latents.float().cpu()) @ known
    return [pictures.to_pil(row.nan_to_num().clamp(-1, 1).permute(2, 0, 1)) for row in pixels]


def fit(latents: Latents, images: Tensor) -> Tensor:
    """The map (channels + 1, c) from latents to what they decode to, by least squares."""
    small = F.avg_pool2d(images.float(), images.shape[-1] // latents.shape[-1])
    rows, pixels = _with_one(latents.float()).flatten(0, 2), small.movedim(1, -1).flatten(0, 2)
    return torch.linalg.lstsq(rows.cpu(), pixels.cpu(), driver="gelsd").solution


def of(autoencoder: Any) -> Tensor:
    """The map of an autoencoder: the published one, or `fit` to 16 soft patterns that it encodes and decodes, which
    takes it about as long as one picture of 256 pixels."""
    config = autoencoder.config
    if isinstance(config, PixelsConfig):
        return torch.eye(config.image_channels + 1)[:, :-1]
    if isinstance(config, KLConfig) and config in PUBLISHED:
        return torch.tensor(PUBLISHED[config])
    latents = _patterns(autoencoder)
    return fit(latents, autoencoder.decode(latents).clamp(-1, 1))


def _patterns(autoencoder: Autoencoder) -> Latents:
    channels = autoencoder.config.image_channels  # type: ignore[attr-defined]
    generator, side = torch.Generator().manual_seed(0), 8 * autoencoder.factor
    fields = [torch.randn(16, channels, n, n, generator=generator) for n in (2, 4, 8)]
    x = sum(F.interpolate(field, (side, side), mode="bicubic") for field in fields).mul(2).sigmoid()  # type: ignore[union-attr]
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], dim=1) if channels == 4 else x
    return autoencoder.encode((2 * x - 1).to(next(autoencoder.parameters()).device))  # type: ignore[attr-defined]


def _with_one(latents: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h, w, c + 1)."""
    return F.pad(latents.movedim(1, -1), (0, 1), value=1.0)
