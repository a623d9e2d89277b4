"""The U-Net of DDPM, Improved DDPM, ADM, Stable Diffusion 1 and 2, SDXL and what was tuned from them, by configuration.

Denoising Diffusion Probabilistic Models, Ho et al., arXiv:2006.11239 (appendix B); Diffusion Models Beat GANs, Dhariwal
and Nichol, arXiv:2105.05233 (section 3: scale-and-shift norms, residual blocks that resample, more heads); Latent
Diffusion, Rombach et al., arXiv:2112.10752 (section 3.3: text enters by cross-attention); SDXL, arXiv:2307.01952.
Residual blocks halve the picture level by level and double it again, every output on the way down is joined to its
counterpart on the way up, and the time shifts (or scales and shifts) every block.
Unusual: names are those of diffusers' files, which therefore load as they are; any size works, since the way up goes
to the size of what it is joined to; padding tokens are attended to unless `cond.mask` says otherwise, as Stable
Diffusion was trained.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn import fused
from limner.nn.attention import Attention, SpatialAttention
from limner.nn.convolution import Conv2d, Downsample, Upsample
from limner.nn.embeddings import sinusoid
from limner.nn.initialization import zero
from limner.nn.linear import Linear
from limner.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """`widths`, `depths` and `text_only` have an entry a level, from fine to coarse; 0 is none in every count.
    `in_channels` and `out_channels` are those of what is denoised and predicted; norms are over `groups` of channels
    and add `eps`; `dropout` is within residual blocks.

    Heads are given by their number (`num_heads`) or by their width (`head_width`). Without `text_width` attention is
    over the picture alone, one layer of it wherever `depths` is 1; with it, `depths` layers of a transformer that also
    reads the text, and `mid_depth` in the middle.
    """

    type: Literal["unet"] = "unet"
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    num_blocks: int = 2
    """Residual blocks a level on the way down; there is one more on the way up."""
    depths: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    num_heads: int = 0
    head_width: int = 0
    text_width: int = 0
    text_only: tuple[bool, ...] = ()
    """Levels whose first attention reads the text too, instead of the picture (the x4 upscaler)."""
    linear_projection: bool = False
    """Into and out of the transformers goes a matrix instead of a 1 x 1 convolution: the same with other shapes."""
    vector_width: int = 0
    """Width of `cond.vector`: sizes, crops and pooled prompt of SDXL."""
    guidance_width: int = 0
    """Width of `cond.guidance`: the scale of guidance that a consistency model is told (arXiv:2310.04378)."""
    num_classes: int = 0
    """Classes of `cond.labels`, the last of which may stand for none; for the upscaler, levels of noise in the picture
    to enlarge."""
    groups: int = 32
    eps: float = 1e-5
    scale_shift: bool = False
    """Time scales and shifts what the second norm of a block gives (ADM's AdaGN) instead of shifting what it takes."""
    resample: Literal["conv", "block"] = "conv"
    """What halves and doubles the picture: a convolution, or a residual block around pooling and repetition."""
    pad: Literal["around", "after"] = "around"
    """Where halving convolutions see zeros: on all sides, or (Ho et al.) only right and below."""
    sines_first: bool = False
    """Whether sines come before cosines among the time's sinusoids (as in Ho et al.)."""
    freq_shift: int = 0
    """1 if the slowest of them has a period of 2π·10,000 sharp (as in Ho et al.)."""
    time_scale: float = 1.0
    """What times are multiplied by: 1000 where they are those of a flow, 0 to 1."""
    dropout: float = 0.0

    def heads(self, width: int) -> int:
        return self.num_heads or width // self.head_width

    def sees(self, latent_channels: int) -> Literal["", "depth", "picture", "mask", "else"]:
        """What comes beside latents of so many channels: nothing, a depth map, latents of a picture to edit, or a mask
        and latents of the picture around it."""
        known = {0: "", 1: "depth", latent_channels: "picture", latent_channels + 1: "mask"}
        return known.get(self.in_channels - latent_channels, "else")  # type: ignore[return-value]


SD1 = UNetConfig(num_heads=8, text_width=768)  # 860M parameters
SD1_INPAINT = replace(SD1, in_channels=9)  # beside the latents: the mask, and latents of the picture around it
SD1_EDIT = replace(SD1, in_channels=8)  # InstructPix2Pix, arXiv:2211.09800: beside the latents, those of the picture
SD2 = UNetConfig(head_width=64, text_width=1024, linear_projection=True)  # 866M
SD2_INPAINT = replace(SD2, in_channels=9)
SD2_DEPTH = replace(SD2, in_channels=5)  # beside the latents: how near each is
SDXL = UNetConfig(  # 2,567M
    widths=(320, 640, 1280),
    depths=(0, 2, 10),
    mid_depth=10,
    head_width=64,
    text_width=2048,
    linear_projection=True,
    vector_width=2816,  # pooled 1280 + 6 numbers x 256
)
SDXL_INPAINT = replace(SDXL, in_channels=9)
SDXL_EDIT = replace(SDXL, in_channels=8)
SDXL_REFINER = UNetConfig(  # 2,260M
    widths=(384, 768, 1536, 1536),
    depths=(0, 4, 4, 0),
    mid_depth=4,
    head_width=64,
    text_width=1280,
    linear_projection=True,
    vector_width=2560,  # pooled 1280 + 5 numbers x 256
)
X4_UPSCALER = UNetConfig(  # 473M
    in_channels=7,  # beside the latents, the noised small picture
    widths=(256, 512, 512, 1024),
    depths=(0, 1, 1, 1),
    num_heads=8,
    text_width=1024,
    text_only=(True, True, True, False),
    linear_projection=True,
    num_classes=1000,
)
DDPM_CIFAR = UNetConfig(  # 35.7M
    in_channels=3,
    out_channels=3,
    widths=(128, 256, 256, 256),
    depths=(0, 1, 0, 0),
    num_heads=1,
    eps=1e-6,
    pad="after",
    sines_first=True,
    freq_shift=1,
    dropout=0.1,
)
DDPM_256 = replace(  # 113.7M: LSUN and CelebA-HQ
    DDPM_CIFAR, widths=(128, 128, 256, 256, 512, 512), depths=(0, 0, 0, 0, 1, 0), dropout=0.0
)
IDDPM_CIFAR = UNetConfig(  # 52.5M: Improved DDPM, arXiv:2102.09672; the second half of its output is about the variance
    in_channels=3,
    out_channels=6,
    widths=(128, 256, 256, 256),
    num_blocks=3,
    depths=(0, 1, 1, 0),
    num_heads=4,
    scale_shift=True,
    dropout=0.3,
)
IDDPM_64 = replace(IDDPM_CIFAR, widths=(128, 256, 384, 512), depths=(0, 0, 1, 1), dropout=0.0)  # 121M, ImageNet
ADM_64 = UNetConfig(  # 296M, ImageNet
    in_channels=3,
    out_channels=6,
    widths=(192, 384, 576, 768),
    num_blocks=3,
    depths=(0, 1, 1, 1),
    head_width=64,
    num_classes=1000,
    scale_shift=True,
    resample="block",
    dropout=0.1,
)
ADM_128 = replace(  # 422M, ImageNet
    ADM_64,
    widths=(256, 256, 512, 768, 1024),
    num_blocks=2,
    depths=(0, 0, 1, 1, 1),
    num_heads=4,
    head_width=0,
    dropout=0.0,
)
ADM_256 = replace(  # 554M, ImageNet
    ADM_64, widths=(256, 256, 512, 512, 1024, 1024), num_blocks=2, depths=(0, 0, 0, 1, 1, 1), dropout=0.0
)

UNET_TINY = UNetConfig(widths=(32, 64), num_blocks=1, depths=(1, 1), head_width=16, text_width=32, groups=8)
ICONS_32 = replace(DDPM_CIFAR, num_classes=24)  # told one of 23 styles, or none
UNET_TINY_PIXELS = replace(DDPM_CIFAR, widths=(32, 64), num_blocks=1, depths=(0, 1), groups=8)


class Residuals(NamedTuple):
    """What a second network adds to this one. Of a ControlNet (arXiv:2302.05543): `down` to what the way down hands
    over to the way up, in the order of its making, conv_in's output first; `mid` to what the middle makes. Of a
    T2I-Adapter (arXiv:2302.08453): `levels` on the way down, at the end of each level, and of the middle if there is
    one more."""

    down: tuple[Tensor, ...] = ()
    mid: Tensor | None = None
    levels: tuple[Tensor, ...] = ()

    @staticmethod
    def sum(parts: Sequence[Residuals]) -> Residuals:
        """Of several networks at once, of which some tell the middle and some do not."""
        down, levels = (
            tuple(
                sum(there[1:], there[0]) for same in zip_longest(*rows) if (there := [x for x in same if x is not None])
            )
            for rows in ([part.down for part in parts], [part.levels for part in parts])
        )
        mid = [part.mid for part in parts if part.mid is not None]
        return Residuals(down, sum(mid[1:], mid[0]) if mid else None, levels)


Told = dict[nn.Module, Tensor]
"""Of every residual block, what it is told of the time (b, d)."""


class DownPath(nn.Module):
    """What a U-Net begins with, and a ControlNet is a copy of: the way down and the middle."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        widths, levels = config.widths, range(len(config.widths))
        width = 4 * widths[0]  # of the embedded time
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(widths[0], width, config.guidance_width)
        self.add_embedding = EmbeddingMLP(config.vector_width, width) if config.vector_width else None
        self.class_embedding = nn.Embedding(config.num_classes, width) if config.num_classes else None

        self.down_blocks = nn.ModuleList()
        self.made = [widths[0]]
        """Widths of what the way down hands over."""
        for i in levels:
            level = DownLevel(config, i, self.made[-1])
            self.down_blocks.append(level)
            self.made += [widths[i]] * (len(level.resnets) + len(level.downsamplers))

        self.mid_block = Middle(config)
        self.resblocks = resblocks_of(self)

    def reset_parameters(self) -> None:
        """Every residual branch starts at zero (Ho et al.'s code; ADM, Latent Diffusion)."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero(module.conv2)
            elif isinstance(module, SpatialTransformer):
                zero(module.proj_out)
            elif isinstance(module, SpatialAttention):
                zero(module.to_out[0])

    def down(
        self, x: Tensor, told: Told, cond: Conditioning, added: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """What follows conv_in: what the middle makes, and what the way down hands over, x first. `added` are `levels`
        of `Residuals`."""
        skips = [x]
        for i, level in enumerate(self.down_blocks):
            x, made = level(x, told, cond, added[i] if i < len(added) else None)
            skips += made
        x = self.mid_block(x, told, cond)
        return x + added[-1] if len(added) > len(self.down_blocks) else x, skips

    def embed(self, t: Tensor, cond: Conditioning, more: Tensor | None = None) -> Tensor:
        """What every block is told of the time, the sizes and the class, and `more` (b, d), after the SiLU that all of
        them begin with."""
        config = self.config
        frequencies = sinusoid(config.time_scale * t, config.widths[0], config.sines_first, config.freq_shift)
        emb = self.time_embedding(frequencies.to(self.conv_in.weight.dtype), cond.guidance)
        if self.add_embedding is not None:
            assert cond.vector is not None, "the network wants cond.vector"
            emb = emb + self.add_embedding(cond.vector)
        if self.class_embedding is not None:
            assert cond.labels is not None, "the network wants cond.labels"
            emb = emb + self.class_embedding(cond.labels)
        return F.silu(emb if more is None else emb + more)

    def told(self, t: Tensor, cond: Conditioning, more: Tensor | None = None) -> Told:
        """Of times t (b,), or of what `times` made of them (b, n)."""
        if t.ndim == 2:
            widths = [block.time_emb_proj.out_features for block in self.resblocks]
            return dict(zip(self.resblocks, t.split(widths, dim=1), strict=True))
        emb = self.embed(t, cond, more)
        return {block: block.time_emb_proj(emb) for block in self.resblocks}

    def times(self, t: Tensor, rows: int, cond: Conditioning, more: Tensor | None = None) -> Tensor:
        """What the blocks are told of each of the times t (k,), side by side: (k, rows, n). A drawing makes it once,
        and `forward` takes a time of it (rows, n) in place of times."""
        told = Conditioning(vector=cond.vector, labels=cond.labels, guidance=cond.guidance)
        each = rows if any(v is not None for v in told.tensors().values()) else 1
        emb = self.embed(t.repeat_interleave(each), told.map(lambda v: v.repeat(len(t), *[1] * (v.ndim - 1))), more)
        made = torch.cat([block.time_emb_proj(emb) for block in self.resblocks], dim=1)
        return made.unflatten(0, (len(t), each)).expand(-1, rows, -1)

    def tell(self, cond: Conditioning) -> None:
        """Keep in `cond` what every evaluation would make of it alone: keys and values of its words."""
        for block in self.modules():
            if isinstance(block, TransformerBlock) and cond.tokens is not None:
                for attention in (block.attn1, block.attn2) if block.text_only else (block.attn2,):
                    cond.keep(attention, partial(attention.told, cond.tokens))


class UNet(DownPath):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, made = config.widths, list(self.made)
        self.up_blocks = nn.ModuleList()
        above = widths[-1]
        for i in reversed(range(len(widths))):
            joined = [made.pop() for _ in range(config.num_blocks + 1)]
            self.up_blocks.append(UpLevel(config, i, above, joined))
            above = widths[i]

        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=config.eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.resblocks = resblocks_of(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """And so does the output."""
        super().reset_parameters()
        zero(self.conv_out)

    def tell(self, cond: Conditioning) -> None:
        super().tell(words_of(cond))

    def together(self, parts: Sequence[Residuals]) -> Residuals:
        """What several networks add at once."""
        return Residuals.sum(parts)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, residuals: Residuals | None = None) -> Tensor:
        """Noisy latents or images (b, c, h, w) at times t (b,), 0 to 999, whole or not -> what the network predicts
        (b, c, h, w). Pictures that come with x (a mask, another picture, depth) are channels of it, after the first.
        What `times` made of a time (b, n) will do in its place."""
        told = self.told(t, cond)
        cond = words_of(cond)

        x, skips = self.down(self.conv_in(x), told, cond, () if residuals is None else residuals.levels)

        if residuals is not None:
            if residuals.down:
                skips = [skip + more for skip, more in zip(skips, residuals.down, strict=True)]
            x = x if residuals.mid is None else x + residuals.mid

        for level in self.up_blocks:
            joined = [skips.pop() for _ in range(self.config.num_blocks + 1)]
            size = skips[-1].shape[-2:] if skips else None
            x = level(x, joined, told, cond, size)

        return self.conv_out(fused.normalized(x, self.conv_norm_out))


def resblocks_of(network: nn.Module) -> list[ResBlock]:
    return [module for module in network.modules() if isinstance(module, ResBlock)]


def words_of(cond: Conditioning) -> Conditioning:
    """With pictures as words behind the others."""
    if cond.images is None:
        return cond
    assert cond.tokens is not None
    return replace(cond, tokens=torch.cat([cond.tokens, cond.images], dim=1))


# ---------------------------------------------------------------------- levels


class DownLevel(nn.Module):
    """The blocks of a level, each followed by attention if the level has it; all but the last end at half the size."""

    def __init__(self, config: UNetConfig, level: int, in_width: int) -> None:
        super().__init__()
        width = config.widths[level]
        ins = [in_width] + [width] * (config.num_blocks - 1)
        self.resnets = nn.ModuleList(ResBlock(config, i, width) for i in ins)
        self.attentions = nn.ModuleList(attention(config, level) for _ in ins if config.depths[level])
        self.downsamplers = nn.ModuleList()
        if level + 1 < len(config.widths):
            self.downsamplers.append(
                Downsample(width, config.pad)
                if config.resample == "conv"
                else ResBlock(config, width, width, halve=True)
            )

    def forward(
        self, x: Tensor, told: Told, cond: Conditioning, added: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`added` joins what the last block makes, or, in a level without attention, what follows it."""
        made = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, told)
            if self.attentions:
                x = self.attentions[i](x, cond)
            made.append(x)
        if added is not None and (self.attentions or not self.downsamplers):
            made[-1] = x = x + added
        for downsample in self.downsamplers:
            x = downsample(x, told)
            made.append(x)
        if added is not None and self.downsamplers and not self.attentions:
            made[-1] = x = x + added
        return x, made


class Middle(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.resnets = nn.ModuleList(ResBlock(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([attention(config)] if config.mid_depth else [])

    def forward(self, x: Tensor, told: Told, cond: Conditioning) -> Tensor:
        x = self.resnets[0](x, told)
        for attend in self.attentions:
            x = attend(x, cond)
        return self.resnets[1](x, told)


class UpLevel(nn.Module):
    """As on the way down, every block joined to one of there; then the size of the next to join."""

    def __init__(self, config: UNetConfig, level: int, in_width: int, joined: list[int]) -> None:
        super().__init__()
        width = config.widths[level]
        ins = [in_width] + [width] * config.num_blocks
        self.resnets = nn.ModuleList(ResBlock(config, i + j, width) for i, j in zip(ins, joined, strict=True))
        self.attentions = nn.ModuleList(attention(config, level) for _ in ins if config.depths[level])
        self.upsamplers = nn.ModuleList()
        if level:
            self.upsamplers.append(Upsample(width) if config.resample == "conv" else ResBlock(config, width, width))

    def forward(
        self,
        x: Tensor,
        joined: list[Tensor],
        told: Told,
        cond: Conditioning,
        size: torch.Size | None,
    ) -> Tensor:
        for i, (resnet, skip) in enumerate(zip(self.resnets, joined, strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), told)
            if self.attentions:
                x = self.attentions[i](x, cond)
        for upsample in self.upsamplers:
            x = upsample(x, told, size)
        return x


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), told the time between; `halve`, or a size given, resamples after the
    first SiLU and on the shortcut (ADM)."""

    def __init__(self, config: UNetConfig, in_width: int, width: int, halve: bool = False) -> None:
        super().__init__()
        self.halve = halve
        self.scale_shift = config.scale_shift
        self.norm1 = nn.GroupNorm(config.groups, in_width, eps=config.eps)
        self.conv1 = Conv2d(in_width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.widths[0], (1 + config.scale_shift) * width)
        self.norm2 = nn.GroupNorm(config.groups, width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x: Tensor, told: Told, size: torch.Size | None = None) -> Tensor:
        h = fused.normalized(x, self.norm1)
        if self.halve:
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif size is not None:
            x, h = F.interpolate(x, size, mode="nearest"), F.interpolate(h, size, mode="nearest")
        h = self.conv1(h)
        if self.scale_shift:
            scale, shift = told[self].chunk(2, dim=1)
            h = fused.normalized(h, self.norm2, scale, shift)
        else:
            h = fused.normalized(fused.shifted(h, told[self]), self.norm2)
        return self.conv2(self.dropout(h)).add_(self.conv_shortcut(x))


# ------------------------------------------------------------------- attention


def attention(config: UNetConfig, level: int | None = None) -> nn.Module:
    """The attention of a level, or of the middle."""
    width = config.widths[-1 if level is None else level]
    if not config.text_width:
        return SpatialAttention(width, config.heads(width), config.groups, config.eps)
    depth = config.mid_depth if level is None else config.depths[level]
    text_only = level is not None and bool(config.text_only) and config.text_only[level]
    return SpatialTransformer(config, width, depth, text_only)


class SpatialTransformer(nn.Module):
    """x (b, c, h, w) + a transformer over its pixels, which reads the text in every layer."""

    def __init__(self, config: UNetConfig, width: int, depth: int, text_only: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)  # unlike all others
        self.linear = config.linear_projection
        project = Linear if self.linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in = project(width, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config, width, text_only) for _ in range(depth))
        self.proj_out = project(width, width)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        pixels = fused.normalized(x, self.norm, silu=False)
        pixels = pixels if self.linear else self.proj_in(pixels)
        pixels = rearrange(pixels, "b c h w -> b (h w) c")
        pixels = self.proj_in(pixels) if self.linear else pixels
        for block in self.transformer_blocks:
            pixels = block(pixels, cond)
        pixels = self.proj_out(pixels) if self.linear else pixels
        pixels = rearrange(pixels, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (pixels if self.linear else self.proj_out(pixels))


class TransformerBlock(nn.Module):
    """Attention among pixels, attention to the text, and a gated MLP, each after a norm and added."""

    def __init__(self, config: UNetConfig, width: int, text_only: bool) -> None:
        super().__init__()
        heads, text_width = config.heads(width), config.text_width
        self.text_only = text_only
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, text_width if text_only else width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, text_width, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        y = self.norm1(x)
        x = self.attn1(y, cond if self.text_only else None).add_(x)
        x = self.attn2(self.norm2(x), cond).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """Half of a projection, gated by the other (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


# ------------------------------------------------------------------ embeddings


class EmbeddingMLP(nn.Module):
    """`told_width` is of a second input, which is projected and added to the first."""

    def __init__(self, in_width: int, width: int, told_width: int = 0) -> None:
        super().__init__()
        self.cond_proj = nn.Linear(told_width, in_width, bias=False) if told_width else None
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and told is not None:
            x = x + self.cond_proj(told)
        return self.linear_2(F.silu(self.linear_1(x)))


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """A consistency model's `cond.guidance`, (b, width), of scales (b,) of guidance, 1 is none (arXiv:2310.04378,
    section 4.2; its code's sinusoids)."""
    return sinusoid(1000 * (scale - 1), width, sines_first=True, freq_shift=1)


def micro_conditioning(pooled: Tensor, numbers: Tensor) -> Tensor:
    """SDXL's `cond.vector`: the pooled prompt (b, d) and 256 sinusoids of each of `numbers` (b, k).

    The base model's six are height and width of the original, top and left of the crop, height and width of the
    target; the refiner's five end with the aesthetic score (6, or 2.5 for what is not wanted) instead of the target.
    """
    embedded = sinusoid(numbers.flatten(), 256).unflatten(0, numbers.shape).flatten(1)  # b (k 256)
    return torch.cat([pooled, embedded.to(pooled.dtype)], dim=1)


# ------------------------------------------------------------- spoilt networks


def sharing(network: nn.Module) -> nn.Module:
    """A copy with the very weights of `network`, whose modules can be changed while that one draws something else."""
    kept: list[Any] = [*network.parameters(), *network.buffers()]
    kept += [own for module in network.modules() if isinstance(module, Attention) for _, own, _ in module.beside]
    return copy.deepcopy(network, {id(one): one for one in kept})


def self_attentions(network: nn.Module) -> dict[str, Attention]:
    """The attention among pixels in a U-Net, by name; there is none in other networks."""
    found: dict[str, Attention] = {}
    for name, module in network.named_modules():
        if isinstance(module, TransformerBlock) and not module.text_only:
            found[f"{name}.attn1"] = module.attn1
        elif isinstance(module, SpatialAttention):
            found[name] = module
    return found


def within(network: nn.Module, layers: Sequence[str]) -> list[str]:
    """The names of the attention among pixels in `layers`, names that those of modules begin with, such as "mid_block"
    or "up_blocks.1". Raises UsageError for a layer that has none."""
    known, found = list(self_attentions(network)), []
    for layer in layers:
        names = [name for name in known if f"{name}.".startswith(f"{layer}.")]
        if not names:
            parts = [name.split(".") for name in known]
            blocks = list(dict.fromkeys(".".join(p[: 1 + p[1].isdecimal() * (p[0] != "mid_block")]) for p in parts))
            near = difflib.get_close_matches(layer, blocks, n=1) or blocks
            raise UsageError(f"no attention among pixels is in {layer!r:.80}: it is in {', '.join(near)}")
        found += names
    return found


def perturbed(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    """The network that perturbed attention guidance leads away from (arXiv:2403.17377, section 4.2): `within` layers
    every pixel attends to itself alone. Raises UsageError for a layer that has no attention among pixels."""
    spoilt = sharing(network)
    for name in within(network, layers):
        spoilt.get_submodule(name).identity = True  # type: ignore[assignment]
    return spoilt


# ---------------------------------------------------------------------- checks


def check(config: UNetConfig) -> None:
    """Raises UsageError where a configuration contradicts itself."""
    levels = len(config.widths)
    if not levels or len(config.depths) != levels or len(config.text_only) not in (0, levels):
        raise UsageError(
            f"widths={config.widths} names {levels} levels, depths={config.depths} and text_only={config.text_only} "
            "must name as many"
        )
    if config.num_blocks < 1:
        raise UsageError(f"num_blocks={config.num_blocks}: every level needs one at least")
    for width in config.widths:
        if config.groups < 1 or width < 1 or width % config.groups:
            raise UsageError(f"widths={config.widths}: {width} does not divide into groups={config.groups}")
    at = {width for width, depth in zip(config.widths, config.depths, strict=True) if depth}
    at |= {config.widths[-1]} if config.mid_depth else set()
    if at and (config.num_heads > 0) == (config.head_width > 0):
        raise UsageError("give either num_heads or head_width")
    for width in at:
        if width % (config.num_heads or config.head_width):
            raise UsageError(
                f"width {width} does not divide into num_heads={config.num_heads} or head_width={config.head_width}"
            )
    if not config.text_width and (max(*config.depths, config.mid_depth) > 1 or any(config.text_only)):
        raise UsageError("without text_width, depths are 0 or 1 and text_only is not set")
