"""Attention that two or more networks use, under the names of diffusers' files."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.nn.linear import Linear


class Attention(nn.Module):
    """Queries from x, keys and values from `source`, all heads scaled by 1/√(their width)."""

    def __init__(self, width: int, num_heads: int, source_width: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(source_width, width, bias=bias)
        self.to_v = Linear(source_width, width, bias=bias)
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor, source: Tensor | None, mask: Tensor | None) -> Tensor:
        """x (b, n, d) and source (b, l, e), of which `mask` (b, l) tells what is real -> (b, n, d)."""
        q, k, v = (
            rearrange(y, "b n (h e) -> b h n e", h=self.num_heads)
            for y in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        where = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=where)
        return self.to_out(rearrange(attended, "b h n e -> b n (h e)"))


class SpatialAttention(Attention):
    """x + attention among all pixels of x (b, c, h, w); `source` and `mask` are not read."""

    def __init__(self, width: int, num_heads: int, groups: int, eps: float) -> None:
        super().__init__(width, num_heads, width, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=eps)

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        pixels = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(pixels, pixels, None), "b (h w) c -> b c h w", h=x.shape[2])
