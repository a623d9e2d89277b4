"""Attention that two or more networks use, under the names of diffusers' files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.nn import fused
from limner.nn.linear import Linear
from limner.types import Conditioning


class Attention(nn.Module):
    """Queries from x, keys and values from x or from words, all heads scaled by 1/√(their width)."""

    identity = False
    """Whether all attend to themselves alone (see `limner.models.unet.perturbed`)."""

    def __init__(self, width: int, num_heads: int, source_width: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(source_width, width, bias=bias)
        self.to_v = Linear(source_width, width, bias=bias)
        self.to_out = nn.Sequential(Linear(width, width))
        self.beside: Sequence[tuple[int, nn.ModuleDict, float]] = ()
        """Of other words, at the end of what is attended to: how many, keys and values of their own, and how much what
        they say counts (IP-Adapter, arXiv:2308.06721, equation 5)."""

    def forward(self, x: Tensor, cond: Conditioning | None = None) -> Tensor:
        """x (b, n, d), which attends to the tokens (b, l, e) of `cond` that its mask shows, or to itself without -> (b,
        n, d)."""
        q, where = self.heads(self.to_q(x)), None
        if cond is None:
            k, v, others = self.told(x)
        else:
            assert cond.tokens is not None
            k, v, others = cond.keep(self, partial(self.told, cond.tokens))
            where = None if cond.mask is None else cond.mask[:, None, None, :]
        attended = v if self.identity else F.scaled_dot_product_attention(q, k, v, attn_mask=where)
        for k, v, weight in others:
            attended = attended + weight * F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(attended, "b h n e -> b n (h e)"))

    def told(self, source: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, float]]]:
        """Keys and values of `source`, and of each group of other words at its end, with its weight."""
        others = []
        for count, own, weight in reversed(self.beside):
            source, words = source[:, :-count], source[:, -count:]
            if weight:
                others.append((self.heads(own["to_k_ip"](words)), self.heads(own["to_v_ip"](words)), weight))
        return self.heads(self.to_k(source)), self.heads(self.to_v(source)), others

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h e) -> b h n e", h=self.num_heads)


class SpatialAttention(Attention):
    """x + attention among all pixels of x (b, c, h, w); `cond` is not read."""

    def __init__(self, width: int, num_heads: int, groups: int, eps: float) -> None:
        super().__init__(width, num_heads, width, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=eps)

    def forward(self, x: Tensor, cond: Conditioning | None = None) -> Tensor:
        pixels = rearrange(fused.normalized(x, self.group_norm, silu=False), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(pixels), "b (h w) c -> b c h w", h=x.shape[2])
