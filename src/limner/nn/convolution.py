"""Convolutions that two or more networks use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.nn import fused


class Conv2d(nn.Conv2d):
    """As torch's, whose bias is differentiated in one pass over memory on a GPU (`limner.nn.fused.shifted`)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not (x.is_cuda and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(x)
        return fused.shifted(self._conv_forward(x, self.weight, None), self.bias)


class ChannelRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of every pixel of (b, c, h, w), with a gain and a bias a channel."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + self.eps)
        return (x * scale).to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class ResidualBlock(nn.Module):
    """x + norm(conv(silu(conv(x)))), 3x3 (the block of DC-AE, arXiv:2410.10733)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class Downsample(nn.Module):
    """Half the height and width, by a convolution that sees zeros on all sides or only right and below (`pad`); `emb`
    is not read."""

    def __init__(self, channels: int, pad: Literal["around", "after"]) -> None:
        super().__init__()
        self.after = pad == "after"
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if self.after else 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.after else x)


class Upsample(nn.Module):
    """Twice the height and width, or `size`, by repetition, then a convolution; `emb` is not read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: torch.Size | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size, None if size else 2.0, "nearest"))


class SpaceToChannel(nn.Module):
    """Halve height and width: convolve and fold 2x2 pixels into channels, beside a shortcut that averages channels
    of the folded input (DC-AE, arXiv:2410.10733, section 3.1)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels // 4, 3, padding=1)
        self.group = 4 * channels // out_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pixel_unshuffle(x, 2).unflatten(1, (-1, self.group)).mean(2)
        return F.pixel_unshuffle(self.conv(x), 2) + shortcut


class ChannelToSpace(nn.Module):
    """Double height and width: the reverse, with a 1x1 convolution and channels repeated on the shortcut."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels * 4, 1)
        self.repeats = 4 * out_channels // channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x) + x.repeat_interleave(self.repeats, dim=1), 2)
