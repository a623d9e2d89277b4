"""IP-Adapter (arXiv:2308.06721): a picture as a few words more, which a U-Net attends to beside those of the prompt.

Names of the tensors are those of its authors' files, `image_proj.` and `ip_adapter.N.` left off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.models.unet import TransformerBlock, UNet
from limner.nn.attention import Attention


class ImageProjection(nn.Module):
    """What stands for the whole picture (b, width) -> words (b, count, text_width)."""

    whole = True

    def __init__(self, width: int, text_width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.proj = nn.Linear(width, count * text_width)
        self.norm = nn.LayerNorm(text_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (self.count, -1)))


class FullProjection(nn.Module):
    """Each state of the picture (b, n, width) a word (b, n, text_width): "full face" adapters, where n is `count`."""

    whole = False

    def __init__(self, width: int, text_width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.proj = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, text_width), nn.LayerNorm(text_width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Resampler(nn.Module):
    """All states of the picture (b, n, width) -> words (b, count, text_width): learned queries attend to them and to
    themselves (the Perceiver of Flamingo, arXiv:2204.14198, section 3.1.1). "Plus" adapters have it."""

    whole = False

    def __init__(self, width: int, text_width: int, count: int, inner: int, depth: int, num_heads: int, hidden: int):
        super().__init__()
        self.count = count
        self.latents = nn.Parameter(torch.randn(1, count, inner) * inner**-0.5)
        self.proj_in = nn.Linear(width, inner)
        self.proj_out = nn.Linear(inner, text_width)
        self.norm_out = nn.LayerNorm(text_width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(inner, num_heads),
                    nn.Sequential(
                        nn.LayerNorm(inner),
                        nn.Linear(inner, hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(hidden, inner, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        latents, x = self.latents.expand(len(x), -1, -1), self.proj_in(x)
        for layer in self.layers:
            latents = latents + layer[0](x, latents)  # type: ignore[index]
            latents = latents + layer[1](latents)  # type: ignore[index]
        return self.norm_out(self.proj_out(latents))


class PerceiverAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, head_width: int = 64) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.to_q(latents), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class IPAdapter(nn.Module):
    """`layers` has the keys and values of each attention to text, in the order of `attentions`."""

    def __init__(self, projection: nn.Module, widths: Sequence[int], text_width: int) -> None:
        super().__init__()
        self.projection: Any = projection
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(text_width, width, bias=False) for name in ("to_k_ip", "to_v_ip")})
            for width in widths
        )


def attentions(network: UNet) -> dict[str, Attention]:
    """The attentions to text of a U-Net by name, in the order of IP-Adapter's files: down, up, middle."""
    found = {f"{k}.attn2": block.attn2 for k, block in network.named_modules() if isinstance(block, TransformerBlock)}
    order = ("down_blocks", "up_blocks", "mid_block")
    return dict(sorted(found.items(), key=lambda row: order.index(row[0].partition(".")[0])))


@contextmanager
def attached(network: UNet, adapters: Sequence[tuple[IPAdapter, Callable[[str], float]]]) -> Iterator[None]:
    """While it lasts, `network` attends to `cond.images`, the words of all `adapters` one after the other, each by its
    weight in a module of this name."""
    rows = attentions(network) if adapters else {}
    for k, (name, attention) in enumerate(rows.items()):
        attention.beside = [
            (one.projection.count, cast(nn.ModuleDict, one.layers[k]), weight_in(name)) for one, weight_in in adapters
        ]
    try:
        yield
    finally:
        for attention in rows.values():
            attention.beside = ()
