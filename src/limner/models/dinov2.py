"""DINOv2 (arXiv:2304.07193): a vision transformer that learnt to see without labels, as the eye of other networks.

Each of a layer's two steps is weighed channel by channel (layer scale, arXiv:2103.17239). It takes pictures of other
sizes than it was trained at: its positions are stretched over them. Names are those of transformers' files.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn.vit import MLP, Attention, PatchEmbeddings


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """Trained at `size` pixels a side, in squares of `patch`. `masked`: the token that stood for hidden squares in
    training is kept, though nothing here looks at it."""

    width: int = 384
    depth: int = 12
    num_heads: int = 6
    hidden: int = 1536
    size: int = 518
    patch: int = 14
    norm_eps: float = 1e-6
    masked: bool = True

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UsageError(f"width={self.width} is not in equal parts over num_heads={self.num_heads}")
        if self.size < self.patch:
            raise UsageError(f"size={self.size} is not a patch of {self.patch}")


DINOV2_SMALL = DINOv2Config()
DINOV2_BASE = DINOv2Config(width=768, num_heads=12, hidden=3072)
DINOV2_LARGE = DINOv2Config(width=1024, depth=24, num_heads=16, hidden=4096)
DINOV2_TINY = DINOv2Config(width=32, depth=4, num_heads=2, hidden=64, size=56)


class DINOv2(nn.Module):
    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.depth))})
        self.layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: Tensor, layers: Collection[int]) -> list[Tensor]:
        """Pictures (b, 3, h, w) of whole patches -> the states (b, 1 + patches, width) after each of `layers`, counted
        from 1, in rising order; the first token stands for the whole picture."""
        x, found = self.embeddings(images), []
        for number, layer in enumerate(self.encoder["layer"].children(), 1):
            x = layer(x)
            if number in layers:
                found.append(self.layernorm(x))
        return found


class Embeddings(nn.Module):
    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        self.config = config
        self.side = config.size // config.patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        if config.masked:
            self.mask_token = nn.Parameter(torch.zeros(1, config.width))
        self.patch_embeddings = PatchEmbeddings(config.width, config.patch)
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + self.side**2, config.width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        first = self.cls_token.expand(len(images), -1, -1)
        height, width = (n // self.config.patch for n in images.shape[2:])
        return torch.cat([first, self.patch_embeddings(images)], 1) + self.positions(height, width)

    def positions(self, height: int, width: int) -> Tensor:
        """Those of so many patches, (1, 1 + height * width, d)."""
        if (height, width) == (self.side, self.side):
            return self.position_embeddings
        first, rest = self.position_embeddings.split([1, self.side**2], 1)
        square = rest.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        # in float32 at any precision, as the published networks do
        stretched = F.interpolate(square.float(), (height, width), mode="bicubic").to(rest.dtype)
        return torch.cat([first, stretched.flatten(2).mT], 1)


class Layer(nn.Module):
    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.num_heads)
        self.layer_scale1 = LayerScale(config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.hidden)
        self.layer_scale2 = LayerScale(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1
