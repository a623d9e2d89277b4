"""SigLIP's tower of pictures (arXiv:2303.15343): a vision transformer (arXiv:2010.11929) that learnt what texts go with
what pictures, pair by pair. It has no token for the whole picture: squares alone, which Redux looks at. Names are those
of transformers' files, whose pooling (`head`) nothing here asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from limner.errors import UsageError
from limner.hints import on_white
from limner.nn.clip import ACTIVATIONS, Layer


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """Pictures of `size` pixels a side in squares of `patch`."""

    width: int = 1152
    depth: int = 27
    num_heads: int = 16
    hidden: int = 4304
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    size: int = 384
    patch: int = 14
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.width % self.num_heads:
            raise UsageError(f"width={self.width} is not in equal parts over num_heads={self.num_heads}")
        if not 0 < self.patch <= self.size:
            raise UsageError(f"size={self.size} is not a patch of {self.patch}")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")


SO400M_384 = SigLIPConfig()  # 413M parameters, 428M with the pooling; Redux's
SIGLIP_TINY = SigLIPConfig(width=48, depth=2, num_heads=3, hidden=80, size=28, patch=7)


class SigLIPVision(nn.Module):
    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, size, size), as `prepared` makes them -> the states of all squares, row by row (b, n, width)."""
        return self.vision_model(images)


class VisionTransformer(nn.Module):
    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config, False) for _ in range(config.depth))})
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images)
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x)
        return self.post_layernorm(x)


class PatchEmbeddings(nn.Module):
    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.position_embedding = nn.Embedding((config.size // config.patch) ** 2, config.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embedding(images).flatten(2).transpose(1, 2) + self.position_embedding.weight  # b n d


def prepared(image: Image.Image, size: int) -> Tensor:
    """A picture, on white, as SigLIP sees it: (1, 3, size, size) in [-1, 1], all of it, pressed into a square by
    bicubic interpolation."""
    image = on_white(image).resize((size, size), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).float() / 127.5 - 1).permute(2, 0, 1)[None]
