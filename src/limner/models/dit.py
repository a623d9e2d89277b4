"""The diffusion transformers of class-conditional ImageNet: DiT, and SiT, which is the same network told otherwise.

Scalable Diffusion Models with Transformers, Peebles and Xie, arXiv:2212.09748; SiT, Ma et al., arXiv:2401.08740.
Latents are cut into patches, each a token, and go through blocks of a vision transformer whose norms have no weights of
their own: the sum of the embedded time and class says, block by block, how what they give is scaled, shifted and gated
(adaLN-Zero, section 3.2), so that every block starts as the identity.
Unusual: positions are a table of sines and cosines that is never trained, yet lies in every file; half of what comes
out says how large the variance of a step of DDPM should be (arXiv:2102.09672, section 3.1), which no sampler here asks
for; a SiT counts its time from noise, 0, to data, 1, and its velocity points that way, which is turned here.
Names are those of the authors' files, which therefore load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn.embeddings import embedding, sinusoid
from limner.nn.fused import gated, modulate
from limner.nn.linear import Linear
from limner.types import Conditioning

FREQUENCIES = 256
"""Sinusoids of the time."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """`channels` are those of latents, `out_channels` as many, or twice as many with a learned variance. `size` is the
    side of the latents that positions were made for, in latents, as is `patch`, that of a token. `num_classes` does not
    count the last row of the table, which stands for no class. `depth` blocks are on tokens of `width`, with
    `num_heads` heads."""

    type: Literal["dit"] = "dit"
    channels: int = 4
    out_channels: int = 8
    patch: int = 2
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000
    size: int = 32
    to_data: bool = False
    """Time and velocity go from noise to data in its weights (SiT)."""
    guided_channels: int = 3
    """How many of the latents' channels guidance acts on, the first: 3 in the authors' programs, to whose numbers that
    belongs; diffusers takes all."""
    freq_shift: int = 0
    """1 in diffusers: the slowest sinusoid of the time has a period of 2π·10,000 sharp, whatever weights learned."""
    eps: float = 1e-6
    """Of the norm before an MLP; diffusers has 1e-5."""


DIT_S_2 = DiTConfig(width=384, depth=12, num_heads=6)  # 32.9M parameters
DIT_S_4 = replace(DIT_S_2, patch=4)  # 32.9M
DIT_S_8 = replace(DIT_S_2, patch=8)  # 33.1M
DIT_B_2 = DiTConfig(width=768, depth=12, num_heads=12)  # 130.3M
DIT_B_4 = replace(DIT_B_2, patch=4)  # 130.4M
DIT_B_8 = replace(DIT_B_2, patch=8)  # 130.9M
DIT_L_2 = DiTConfig(width=1024, depth=24)  # 457.8M
DIT_L_4 = replace(DIT_L_2, patch=4)  # 458.0M
DIT_L_8 = replace(DIT_L_2, patch=8)  # 458.6M
DIT_XL_2 = DiTConfig()  # 674.8M, 256 px
DIT_XL_4 = replace(DIT_XL_2, patch=4)  # 675.0M
DIT_XL_8 = replace(DIT_XL_2, patch=8)  # 675.7M
DIT_XL_2_512 = replace(DIT_XL_2, size=64)  # 674.8M, 512 px
SIT_XL_2 = replace(DIT_XL_2, to_data=True)  # 674.8M, 256 px; it has a variance beside its velocity, and no use for it
DIT_32 = replace(DIT_S_2, channels=3, out_channels=3, num_classes=23)  # 32.5M: pixels of icons, told a style or none
DIT_TINY = DiTConfig(width=64, depth=2, num_heads=2, size=8)


class DiT(nn.Module):
    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        width, side = config.width, config.size // config.patch
        self.x_embedder = PatchEmbedder(config)
        self.register_buffer("pos_embed", torch.zeros(1, side * side, width))
        self.t_embedder = TimeEmbedder(config)
        self.y_embedder = ClassEmbedder(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        if not self.pos_embed.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for matrices, deviations of 0.02 for what is embedded; every block starts as the identity and the
        output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        embedded: list[Any] = [self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table]
        for module in embedded:
            nn.init.normal_(module.weight, std=0.02)
        for module in (*self.modulating(), self.final_layer.linear):
            nn.init.zeros_(module.weight)
        self.pos_embed.copy_(table_of(self.config))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Noisy latents (b, c, h, w) at times t (b,), 0 to 999, whole or not, of the classes `cond.labels` (b,) -> eps
        and the variance (b, 2c, h, w), or eps alone without a learned one. Of a SiT, at t from 0, data, to 1, noise:
        the velocity (b, c, h, w). What `times` made of a time (b, n) will do in its place. h and w are multiples of
        the patch."""
        p, depth, width = self.config.patch, self.config.depth, self.config.width
        height = x.shape[2] // p
        told = self.modulations(self.embed(t, cond)) if t.ndim == 1 else t
        *each, last = told[:, None].split([6 * width] * depth + [2 * width], dim=2)  # b 1 6d, and b 1 2d

        tokens = self.x_embedder(x) + self.positions(height, x.shape[3] // p).to(x.dtype)  # b n d
        for block, modulation in zip(self.blocks, each, strict=True):
            tokens = block(tokens, modulation)
        patches = self.final_layer(tokens, last)
        out = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)
        return -out[:, : self.config.channels] if self.config.to_data else out

    def times(self, t: Tensor, rows: int, cond: Conditioning) -> Tensor:
        """How the blocks are modulated at each of the times t (k,), side by side: (k, rows, n). A drawing makes it
        once, and `forward` takes a time of it (rows, n) in place of times."""
        assert cond.labels is not None
        label = cond.labels.repeat(len(t))
        made = self.modulations(self.embed(t.repeat_interleave(rows), Conditioning(labels=label)))
        return made.unflatten(0, (len(t), rows))

    def embed(self, t: Tensor, cond: Conditioning) -> Tensor:
        """Time and class (b, d), after the SiLU that all modulations begin with."""
        assert cond.labels is not None, "the network wants cond.labels"
        return F.silu(self.t_embedder(1 - t if self.config.to_data else t) + self.y_embedder(cond.labels))

    def modulations(self, c: Tensor) -> Tensor:
        """Shift, scale and gate of attention and of the MLP of every block, shift and scale of the end: (b, n)."""
        return torch.cat([made(c) for made in self.modulating()], dim=1)

    def modulating(self) -> list[nn.Linear]:
        return [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]

    def positions(self, height: int, width: int) -> Tensor:
        """Of so many tokens (1, n, d): the table, or for other sizes than its own the same sinusoids computed anew, of
        places measured in parts of the shorter side, so that it is the same picture on a finer or coarser grid."""
        side = self.config.size // self.config.patch
        if (height, width) == (side, side):
            return self.pos_embed
        unit, device = side / min(height, width), self.pos_embed.device
        rows, columns = (unit * torch.arange(n, device=device, dtype=torch.float32) for n in (height, width))
        return sinusoids_2d(rows, columns, self.config.width)


def check(config: DiTConfig) -> None:
    """Raises UsageError for what is no network."""
    counts = (config.channels, config.patch, config.depth, config.num_heads, config.num_classes, config.width)
    if min(counts) < 1 or config.width % 4 or config.width % config.num_heads:
        raise UsageError(
            f"width={config.width} is not in fours (2-D sinusoids), or not in parts over num_heads={config.num_heads}"
        )
    if config.size < 1 or config.size % config.patch:
        raise UsageError(f"size={config.size} is not in patches of {config.patch}")
    if config.out_channels not in (config.channels, 2 * config.channels):
        raise UsageError(f"out_channels={config.out_channels} is neither channels={config.channels} nor twice as many")


def table_of(config: DiTConfig) -> Tensor:
    """The positions that files of the authors hold (1, n, d), in float32."""
    if torch.get_default_device().type == "meta":  # where sinusoids import a compiler, for seconds
        return torch.empty(1, (config.size // config.patch) ** 2, config.width)
    places = torch.arange(config.size // config.patch, dtype=torch.float64)
    return sinusoids_2d(places, places, config.width).float()


def sinusoids_2d(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Places along two axes -> (1, rows x columns, width): half is about the column, half about the row, each sines
    first."""
    powers = torch.arange(width // 4, dtype=rows.dtype, device=rows.device) / (width // 4)
    angles = (places[:, None] * 10_000.0**-powers for places in (rows, columns))
    down, across = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    size = (len(rows), len(columns), width // 2)
    return torch.cat([across[None].expand(size), down[:, None].expand(size)], dim=2).flatten(0, 1)[None]


class PatchEmbedder(nn.Module):
    """Latents (b, c, h, w) as tokens (b, n, d), row by row: a convolution whose windows do not overlap, computed as the
    matrix product that it is."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.freq_shift = config.freq_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = sinusoid(t, FREQUENCIES, freq_shift=self.freq_shift)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))


class ClassEmbedder(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = embedding(config.num_classes + 1, config.width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class DiTBlock(nn.Module):
    """Attention and an MLP, each modulated and gated."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.eps = config.eps
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)  # each b 1 d
        x = gated(x, gate1, self.attn(modulate(x, shift1, scale1)))
        return gated(x, gate2, self.mlp(modulate(x, shift2, scale2, self.eps)))


class Attention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))


class MLP(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, 4 * config.width)
        self.fc2 = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=2)
        return self.linear(modulate(x, shift, scale))
