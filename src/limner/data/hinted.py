"""Hints, the pictures that a control network is told: made of the pictures of a batch, or read beside them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner import hints, pictures

GREY = ("canny", "sobel", "scribble")
"""Makers whose three channels are alike."""


def made(maker: str, images: Tensor) -> Tensor:
    """What `maker`, one of `limner.hints.MAKERS`, makes of RGBA images (b, 4, h, w) in [-1, 1] on white: bytes (b, 3,
    h, w), of one of `GREY` (b, 1, h, w), on their device."""
    white = (pictures.opaque(images) + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    if maker == "canny":
        return hints.edges(white)[:, None].to(torch.uint8) * 255
    drawn = [hints.make(maker, Image.fromarray(one.permute(1, 2, 0).numpy())) for one in white.cpu()]
    found = torch.from_numpy(np.stack([np.array(one) for one in drawn])).permute(0, 3, 1, 2)
    return found[:, : 1 if maker in GREY else 3].contiguous().to(images.device)


def to_hints(bytes: Tensor) -> Tensor:
    """Bytes (b, 1 or 3, h, w) -> float (b, 3, h, w) in [0, 1]."""
    return bytes.float().div(255).expand(-1, 3, -1, -1)
