"""Blocks of vision transformers (arXiv:2010.11929) under the names of transformers' files, which DINOv2 and ViTPose
share. Their layers differ in the names of norms, and are in the files of these networks."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbeddings(nn.Module):
    """A picture as tokens, one for each square of `patch` pixels, row by row; `padding` pixels of black surround it."""

    def __init__(self, width: int, patch: int, padding: int = 0) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch, patch, padding)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.projection(images), "b d h w -> b (h w) d")


class Attention(nn.Module):
    """Every token looks at all."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(self.attention[name](x), "b n (h e) -> b h n e", h=self.num_heads)
            for name in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.output["dense"](rearrange(attended, "b h n e -> b n (h e)"))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
