"""T2I-Adapter, Mou et al., arXiv:2302.08453: a small network that makes of a picture what a U-Net's way down adds.

The picture's pixels are folded into channels, then every level of the U-Net gets what a few residual blocks make of the
level before, halved. Unlike a ControlNet it sees neither the noisy latents nor the time nor the words, so it is asked
once a picture. Names are diffusers'. Three are published: full (Stable Diffusion 1), light (its colours), and XL's,
which halves once, before its third level, and tells the middle what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from limner.models.unet import Residuals
from limner.types import Conditioning

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig:
    """`fold` pixels a side become one, `in_channels` 1 is a grey picture; `halved` are the levels that begin at half
    the size."""

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    halved: tuple[int, ...] = (1, 2, 3)
    num_blocks: int = 2
    in_channels: int = 3
    fold: int = 8
    light: bool = False


T2I_SD1 = T2IAdapterConfig()  # 77M
T2I_SD1_LIGHT = T2IAdapterConfig(num_blocks=4, light=True)
T2I_SDXL = T2IAdapterConfig(halved=(2,), fold=16)


class T2IAdapter(nn.Module):
    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        folded, widths = config.in_channels * config.fold**2, config.widths
        if not config.light:
            self.conv_in = nn.Conv2d(folded, widths[0], 3, padding=1)
        ins = [folded if config.light else widths[0], *widths]
        self.body = nn.ModuleList(
            (LightLevel if config.light else Level)(a, b, config.num_blocks, i in config.halved)
            for i, (a, b) in enumerate(zip(ins, widths, strict=False))
        )

    def see(self, hint: Tensor, kind: int = 0) -> tuple[Tensor, ...]:
        """A picture (1, 3, H, W) in [0, 1] -> what each level adds, (1, d, H / fold, W / fold) and smaller; sides that
        `fold` does not divide are stretched to what it does."""
        if self.config.in_channels == 1:
            hint = (hint * hint.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        fold = self.config.fold
        size = [math.ceil(side / fold) * fold for side in hint.shape[-2:]]
        if size != list(hint.shape[-2:]):
            hint = F.interpolate(hint, size, mode="bilinear")
        x = F.pixel_unshuffle(hint, fold)
        x = x if self.config.light else self.conv_in(x)
        made = []
        for level in self.body:
            x = level(x)
            made.append(x)
        return tuple(made)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, seen: Sequence[Tensor]) -> Residuals:
        """What `see` made, whatever the latents, the time and the words."""
        return Residuals(levels=tuple(seen))


class Level(nn.Module):
    def __init__(self, in_width: int, width: int, num_blocks: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.in_conv = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()
        self.resnets = nn.Sequential(*(Block(width, 1) for _ in range(num_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets(self.in_conv(halved(x) if self.halve else x))


class LightLevel(nn.Module):
    """The same at a quarter of the width."""

    def __init__(self, in_width: int, width: int, num_blocks: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.in_conv = nn.Conv2d(in_width, width // 4, 1)
        self.resnets = nn.Sequential(*(Block(width // 4, 3) for _ in range(num_blocks)))
        self.out_conv = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.resnets(self.in_conv(halved(x) if self.halve else x)))


class Block(nn.Module):
    """x + conv(relu(conv(x))); `kernel` is the size of the second."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True)
