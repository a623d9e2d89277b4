"""The network of the first diffusion models (Sohl-Dickstein et al. 2015, arXiv:1503.03585, appendix D.2).

Convolutions of a picture at several scales, averaged to a coarser grid, convolved there, repeated back to the finer one
and summed; beside them dense layers that see the picture whole; above both a small network of every pixel by itself.
It is told no time: its outputs are coefficients of functions of t, and whoever reads them out at a t sums those. Sizes,
initialisation and nonlinearities are those of the authors' repository, Sohl-Dickstein/Diffusion-Probabilistic-Models,
where each scale has a nonlinearity of its own; the paper's are `softplus` and `tanh`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MultiscaleConfig:
    """`conv_width`, `dense_width` and `pixel_width` are of the hidden layers of each kind, the depths how many there
    are. Without dense layers any size will do whose sides are multiples of `unit`."""

    type: Literal["multiscale"] = "multiscale"
    channels: int
    """Of the pictures: 1, or 3."""
    size: int
    """The side of the pictures in pixels, where there are dense layers."""
    conv_width: int = 20
    conv_depth: int = 4
    """Convolutions one after another, at every scale."""
    num_scales: int = 1
    """Each twice as coarse as the one before."""
    dense_width: int = 500
    """0 leaves the dense layers out."""
    dense_depth: int = 4
    """Dense layers one after another."""
    dense_channels: int = 2
    """What the dense layers say of a pixel."""
    pixel_width: int = 20
    """Of the layers that see each pixel alone."""
    pixel_depth: int = 2
    """How many of these there are."""
    num_coeffs: int = 10
    """Functions of time."""
    conv_activation: Literal["leaky_relu", "softplus"] = "leaky_relu"
    """The authors' code has the first, the paper the second."""
    dense_activation: Literal["leaky_relu", "tanh"] = "leaky_relu"
    """Likewise."""

    @property
    def unit(self) -> int:
        """What widths and heights are multiples of, in pixels."""
        return self.size if self.dense_width else 2 ** (self.num_scales - 1)


MULTISCALE_MNIST = MultiscaleConfig(channels=1, size=28)  # 1.7M parameters
MULTISCALE_CIFAR10 = MultiscaleConfig(
    channels=3, size=32, conv_width=100, conv_depth=6, dense_width=1000, dense_depth=6, dense_channels=5,
    pixel_width=100, pixel_depth=4,
)  # fmt: skip
MULTISCALE_TINY = MultiscaleConfig(
    channels=3, size=16, conv_width=32, conv_depth=3, num_scales=3, dense_width=96, dense_depth=3, pixel_width=48,
    pixel_depth=3,
)  # fmt: skip


class Multiscale(nn.Module):
    def __init__(self, config: MultiscaleConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        inputs = (config.channels, *[config.conv_width] * (config.conv_depth - 1))
        self.convs = nn.Sequential(*(MultiscaleConvolution(n, config) for n in inputs))
        known, pixels = config.conv_width, config.channels * config.size**2
        if config.dense_width:
            widths = [pixels, *[config.dense_width] * (config.dense_depth - 1), config.dense_channels * config.size**2]
            self.dense = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))
            known += config.dense_channels
        widths = [known, *[config.pixel_width] * (config.pixel_depth - 1), 2 * config.num_coeffs * config.channels]
        self.pixels = nn.ModuleList(nn.Conv2d(n, m, 1) for n, m in pairwise(widths))
        for layer in (*(self.dense if config.dense_width else ()), *self.pixels):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "two b n c h w"]:
        """Coefficients of the mean and of the variance. Raises UsageError for a size that it was not made for."""
        config, (height, width) = self.config, x.shape[2:]
        whole_only = config.dense_width and (height, width) != (config.size, config.size)
        if whole_only or height % config.unit or width % config.unit:
            what = f"{config.size} x {config.size}" if config.dense_width else f"in multiples of {config.unit}"
            raise UsageError(f"pictures have {width} x {height} pixels, and the network sees such {what}")
        y = self.convs(x)
        if config.dense_width:
            whole = x.flatten(1)
            for layer in self.dense:
                whole = activated(layer(whole), config.dense_activation)
            whole = rearrange(whole, "b (h w c) -> b c h w", h=height, w=width) / math.sqrt(config.dense_channels)
            y = torch.cat([y / math.sqrt(config.conv_width), whole], dim=1)
        *hidden, last = self.pixels
        for layer in hidden:
            y = activated(layer(y), config.dense_activation)
        return rearrange(last(y), "b (c two n) h w -> two b n c h w", two=2, n=config.num_coeffs)


class MultiscaleConvolution(nn.Module):
    """A layer: the mean over the scales of what is found at each of them."""

    def __init__(self, channels: int, config: MultiscaleConfig) -> None:
        super().__init__()
        self.activation = config.conv_activation
        self.scales = nn.ModuleList(
            nn.Conv2d(channels, config.conv_width, 3, padding=1) for _ in range(config.num_scales)
        )
        for conv in self.scales:
            # pictures are smooth, so that what nine pixels say adds up rather than cancels
            nn.init.normal_(conv.weight, std=1 / (math.sqrt(config.conv_width) * 9))  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for scale in reversed(range(len(self.scales))):  # from the coarsest on
            seen = F.avg_pool2d(x, 2**scale) if scale else x
            found = activated(self.scales[scale](seen), self.activation)
            total = found if total is None else found + F.interpolate(total, scale_factor=2.0, mode="nearest")
        assert total is not None
        return total / len(self.scales)


def activated(x: Tensor, kind: str) -> Tensor:
    if kind == "leaky_relu":
        return F.leaky_relu(x, 0.05)
    return F.softplus(x) if kind == "softplus" else torch.tanh(x)


def check(config: MultiscaleConfig) -> None:
    """Raises UsageError for what no network can be built of."""
    counts = ["size", "conv_width", "conv_depth", "num_scales", "pixel_width", "pixel_depth"]
    for name in (*counts, *(["dense_depth", "dense_channels"] if config.dense_width else [])):
        if getattr(config, name) < 1:
            raise UsageError(f"network.{name}={getattr(config, name)}: give 1 or more")
    if config.channels not in (1, 3, 4):
        raise UsageError(f"network.channels={config.channels}: pictures have 1 of grey, 3 of colour or 4, with alpha")
    if config.num_coeffs < 2:
        raise UsageError(f"network.num_coeffs={config.num_coeffs}: give 2 or more")
    if config.num_scales > 16 or config.size % 2 ** (config.num_scales - 1):
        raise UsageError(
            f"network.size={config.size} is not halved {config.num_scales - 1} times: give fewer network.num_scales"
        )
