"""PatchGAN: which patches of a picture are real.

Image-to-Image Translation with Conditional Adversarial Networks, Isola et al., arXiv:1611.07004, section 3.2.2: a small
convolutional network looks at every patch of a picture and says of each whether it is real. VQGAN (arXiv:2012.09841)
and latent diffusion (arXiv:2112.10752) train their autoencoders against it, here without a condition.

Unusual: batch norm, also where it only passes a gradient on; a convolution before a norm has no bias. Submodules are
named as in taming-transformers' files (`loss.discriminator.main.0.weight`), which therefore load as they are.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.types import Images

Layers = Annotated[int, Field(ge=1, le=6)]


class PatchGAN(nn.Module):
    """`layers` halvings from `width` channels on, which double up to eight times `width`; 3 of 64 look at patches of 70
    pixels, 2.8M parameters."""

    def __init__(self, channels: int = 3, width: int = 64, layers: Layers = 3) -> None:
        super().__init__()
        if width < 1 or not 1 <= layers <= 6:
            raise UsageError(f"no discriminator is {width} wide and has {layers} layers: give 1 or more, and 1 to 6")
        self.least = 3 * 2**layers
        widths = [width * min(2**k, 8) for k in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for k in range(1, layers + 1):
            stride = 2 if k < layers else 1
            blocks += [
                nn.Conv2d(widths[k - 1], widths[k], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[k]),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(self, images: Images) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> logits (b, 1, about h / 2**layers, about w / 2**layers), more is more
        real. Raises UsageError for pictures of fewer than `least` pixels."""
        if min(images.shape[2:]) < self.least:
            height, width = images.shape[2:]
            raise UsageError(
                f"pictures of {width} x {height} pixels are too small for the discriminator, which looks at "
                f"{self.least} and more: give a larger data.size, or fewer disc_layers"
            )
        return self.main(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Of a discriminator's logits (arXiv:1705.02894, section 3.1), halved."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The cross-entropy of the first GANs (arXiv:1406.2661, equation 1), halved."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """What makes both losses pull equally at the last layer of the decoder: lambda of VQGAN (arXiv:2012.09841, equation
    7), a scalar from 0 to 10,000 without a gradient."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
