"""A joint-attention diffusion transformer over text and image tokens.

Of the Stable Diffusion 3 kind (Esser et al., arXiv:2403.03206): text and image tokens attend to each other in every
block, queries and keys are normalised, time and the pooled prompt modulate every block, and the output is a velocity.
Unusual, to stay small: text and image tokens share all weights (as FLUX's single-stream blocks do); one modulation
projection serves all blocks, each block adding its own learned offset (PixArt-alpha's adaLN-single, arXiv:2310.00426);
positions are 2-D rotary, centred, and measured in parts of the shorter side, so that a picture of another size is the
same picture on a finer or coarser grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn.embeddings import TimeEmbedding, rope_table, rotate
from limner.nn.fused import modulate
from limner.nn.linear import Linear
from limner.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class JointDiTConfig:
    """Latents of `channels`; `depth` blocks on tokens of `width`, with `num_heads` heads and MLPs of width `hidden`;
    `text_width` is that of the text's tokens."""

    type: Literal["joint_dit"] = "joint_dit"
    channels: int = 32
    width: int = 512
    depth: int = 10
    num_heads: int = 8
    hidden: int = 1408
    text_width: int = 384
    base_grid: int = 16
    """Positions run over this many units along the shorter side, whatever its number of tokens."""


JOINT_DIT_ICONS = JointDiTConfig()
JOINT_DIT_TINY = JointDiTConfig(channels=8, width=64, depth=2, num_heads=2, hidden=128, base_grid=8)


def check(config: JointDiTConfig) -> None:
    """Raises UsageError for sizes that cannot be."""
    width = config.width
    if config.num_heads < 1 or width < 1 or width % (4 * config.num_heads):
        raise UsageError(f"width={width} is not in fours (2-D rotary positions) over num_heads={config.num_heads}")
    if config.hidden < 1 or config.base_grid < 1:
        raise UsageError(f"hidden={config.hidden}, base_grid={config.base_grid}: both must be 1 or more")


class Trunk(nn.Module):
    """What a JointDiT and a ControlNet for it have alike: how they are told of times, words and places."""

    config: JointDiTConfig
    time_in: TimeEmbedding
    pooled_in: nn.Linear
    modulation: nn.Linear

    def modulate_by(self, t: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """A lone row is computed as one of two: matrix products of one row round differently from those of many, and an
        image must not depend on the size of its batch."""
        if len(t) == 1:
            c, modulation = self.modulate_by(t.repeat(2), pooled.repeat(2, 1))
            return c[:1], modulation[:1]
        c = F.silu(self.time_in(t) + self.pooled_in(pooled))
        return c, self.modulation(c).unflatten(-1, (6, -1))

    def rope(self, text: int, height: int, width: int, device: torch.device) -> Tensor:
        """Rotary table (2, text + height * width, head_width): the grid is centred on 0, text sits at 0."""
        unit = self.config.base_grid / min(height, width)
        rows = unit * (torch.arange(height, device=device) - (height - 1) / 2)
        columns = unit * (torch.arange(width, device=device) - (width - 1) / 2)
        grid = torch.cartesian_prod(rows, columns)
        positions = torch.cat([grid.new_zeros(text, 2), grid])
        return rope_table(positions, self.config.width // self.config.num_heads)


class JointDiT(Trunk):
    def __init__(self, config: JointDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        check(config)
        self.image_in = nn.Linear(config.channels, width)
        self.text_norm = nn.LayerNorm(config.text_width)
        self.text_in = nn.Linear(config.text_width, width)
        self.text_pad = nn.Parameter(torch.zeros(width))
        self.time_in = TimeEmbedding(width)
        self.pooled_in = nn.Linear(config.text_width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_modulation = nn.Parameter(torch.zeros(2, width))
        self.final = nn.Linear(width, config.channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for matrices, zero for biases; every block starts as the identity and the output as zero (adaLN-zero,
        arXiv:2212.09748)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.final.weight)

    def together(self, parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
        """What several networks add at once."""
        return [sum(there[1:], there[0]) if (there := [x for x in same if x is not None]) else None
                for same in zip(*parts, strict=True)]  # fmt: skip

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, residuals: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Latents (b, c, h, w) at times t (b,) in [0, 1] -> velocity (b, c, h, w). `residuals` of a ControlNet, (b, n,
        d) or None for each block, are added to the image tokens before it."""
        assert cond.tokens is not None
        assert cond.mask is not None
        assert cond.pooled is not None
        height, width = x.shape[-2:]
        image = self.image_in(rearrange(x, "b c h w -> b (h w) c"))
        text = self.text_in(self.text_norm(cond.tokens))
        text = torch.where(cond.mask[..., None], text, self.text_pad.to(text.dtype))
        c, modulation = self.modulate_by(t, cond.pooled)  # b d, b 6 d
        table = self.rope(text.shape[1], height, width, x.device)

        tokens = torch.cat([text, image], dim=1)  # b (l + n) d
        for block, added in zip(self.blocks, residuals or [None] * len(self.blocks), strict=True):
            if added is not None:
                tokens = torch.cat([tokens[:, : text.shape[1]], tokens[:, text.shape[1] :] + added], dim=1)
            tokens = block(tokens, modulation, table)
        tokens = tokens[:, text.shape[1] :]

        shift, scale = (self.final_modulation + c[:, None]).chunk(2, dim=1)
        tokens = self.final(modulate(tokens, shift, scale))
        return rearrange(tokens, "b (h w) c -> b c h w", h=height)


class Block(nn.Module):
    """Attention and a gated MLP (SwiGLU, arXiv:2002.05202), each modulated and gated."""

    def __init__(self, config: JointDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.offset = nn.Parameter(torch.zeros(6, width))
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(width // config.num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // config.num_heads, eps=1e-6)
        self.proj = Linear(width, width, bias=False)
        self.mlp_in = Linear(width, 2 * config.hidden, bias=False)
        self.mlp_out = Linear(config.hidden, width, bias=False)

    def forward(self, tokens: Tensor, modulation: Tensor, table: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.offset + modulation).chunk(6, dim=1)  # each b 1 d
        tokens = torch.addcmul(tokens, gate1, self.attend(modulate(tokens, shift1, scale1), table))
        value, gate = self.mlp_in(modulate(tokens, shift2, scale2)).chunk(2, dim=-1)
        return torch.addcmul(tokens, gate2, self.mlp_out(F.silu(gate) * value))

    def attend(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(rearrange(attended, "b h n e -> b n (h e)"))
