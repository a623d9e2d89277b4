"""LPIPS: how far apart two pictures look.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, Zhang et al., arXiv:1801.03924: squared
differences of what VGG16 (arXiv:1409.1556) sees in two pictures, normalised at each pixel and weighted by channel as
people judged (equation 1), version 0.1, which latent diffusion trains its autoencoders with.

Unusual: weights are not negative, so it is a distance; pictures are normalised by numbers near ImageNet's, rounded and
for [-1, 1]. Submodules are named as in the package `lpips` and as in the `loss.perceptual_loss` of taming-transformers'
files. No weights ship.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from limner.types import Images

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions; each stage after the first begins with a halving."""
INSIDE = "loss.perceptual_loss."
"""What its names begin with in a file of a whole training."""


class LPIPS(nn.Module):
    """14.7M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = VGG16()
        for k, widths in enumerate(STAGES):
            self.add_module(f"lin{k}", Linear(widths[-1]))

    def forward(self, a: Images, b: Images) -> Tensor:
        """RGB images (b, 3, h, w) in [-1, 1], 16 pixels a side or more -> distances (b, 1, 1, 1)."""
        mean, std = (a.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        total = a.new_zeros(len(a), 1, 1, 1)
        pairs = zip(self.net((a - mean) / std), self.net((b - mean) / std), strict=True)
        for k, (x, y) in enumerate(pairs):
            difference = (normalised(x) - normalised(y)).square()
            total = total + self.get_submodule(f"lin{k}")(difference).mean((2, 3), keepdim=True)
        return total


def normalised(features: Tensor) -> Tensor:
    """Of length 1 at each pixel."""
    features = features.float()
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)


class Linear(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class VGG16(nn.Module):
    """The convolutions of VGG16, numbered as torchvision does: what comes out of each stage."""

    def __init__(self) -> None:
        super().__init__()
        channels, number = 3, 0
        for k, widths in enumerate(STAGES):
            stage = nn.Sequential()
            if k:
                stage.add_module(str(number), nn.MaxPool2d(2))
                number += 1
            for width in widths:
                stage.add_module(str(number), nn.Conv2d(channels, width, 3, padding=1))
                stage.add_module(str(number + 1), nn.ReLU())
                channels, number = width, number + 2
            self.add_module(f"slice{k + 1}", stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        seen = []
        for stage in self.children():
            x = stage(x)
            seen.append(x)
        return seen


def weights_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of LPIPS among those of a file: of the package `lpips`, of LPIPS in taming-transformers, or of a
    whole training of an autoencoder; without constants, and without what the package names twice."""
    prefix = INSIDE if any(name.startswith(INSIDE) for name in tensors) else ""
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t.float() for name, t in inside.items() if not name.startswith(("lins.", "scaling_layer."))}
