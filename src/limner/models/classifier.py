"""The classifier of noisy pictures that guidance asks: half a U-Net, and attention over what is left of the picture.

Diffusion Models Beat GANs, Dhariwal and Nichol, arXiv:2105.05233 (section 4): the way down and the middle of ADM's
U-Net, whose 8 x 8 pixels one query, their mean, attends to (the pooling of CLIP, arXiv:2103.00020, section 2.3).
Unusual: positions are learned, so a network sees pictures of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.models.unet import DownPath, UNetConfig
from limner.nn.linear import Linear
from limner.types import Conditioning, Images


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """`widths` and `depths` (1 for attention) have an entry a level, from fine to coarse; norms are over `groups` of
    channels; the heads of attention are `head_width` wide."""

    type: Literal["classifier"] = "classifier"
    num_classes: int = 1000
    """Of the classes that it tells."""
    size: int = 64
    """Pixels a side."""
    widths: tuple[int, ...] = (128, 256, 384, 512)
    num_blocks: int = 4
    """Residual blocks a level."""
    depths: tuple[int, ...] = (0, 1, 1, 1)
    head_width: int = 64
    groups: int = 32

    def __post_init__(self) -> None:
        most = 2 ** (len(self.widths) - 1)
        if self.num_classes < 2 or self.size < most or self.size % most or self.head_width < 1:
            raise UsageError(
                f"num_classes={self.num_classes}, size={self.size}, head_width={self.head_width}: give 2 classes or "
                f"more, and for {len(self.widths)} levels a multiple of {most} pixels"
            )
        if not self.widths or self.widths[-1] % self.head_width:
            raise UsageError(f"widths={self.widths} do not end with a multiple of head_width={self.head_width}")

    @property
    def unet(self) -> UNetConfig:
        """The U-Net of which it is the first half."""
        return UNetConfig(
            in_channels=3, out_channels=3, widths=self.widths, num_blocks=self.num_blocks, depths=self.depths,
            head_width=self.head_width, groups=self.groups, scale_shift=True, resample="block",
        )  # fmt: skip


ADM_CLASSIFIER_64 = ClassifierConfig()  # 65M, ImageNet
ADM_CLASSIFIER_128 = ClassifierConfig(size=128, widths=(128, 128, 256, 384, 512), num_blocks=2, depths=(0, 0, 1, 1, 1))
ADM_CLASSIFIER_256 = ClassifierConfig(
    size=256, widths=(128, 128, 256, 256, 512, 512), num_blocks=2, depths=(0, 0, 0, 1, 1, 1)
)
CLASSIFIER_32 = ClassifierConfig(size=32, widths=(128, 256, 256), num_blocks=2, depths=(0, 1, 1))
CLASSIFIER_TINY = ClassifierConfig(size=16, widths=(24, 48), num_blocks=1, depths=(0, 1), head_width=24, groups=8)


class Classifier(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config, unet = config, config.unet
        self.encoder = DownPath(unet)
        self.encoder.reset_parameters()
        width, left = unet.widths[-1], config.size // 2 ** (len(unet.widths) - 1)
        self.norm_out = nn.GroupNorm(unet.groups, width, eps=unet.eps)
        self.pool = AttentionPool(width, unet.heads(width), left**2, config.num_classes)

    def forward(self, x: Images, t: Float[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """Noisy pictures (b, 3, size, size) of unit variance (alpha^2 + sigma^2 = 1) at times t, 0 to 999 -> the logits
        of their classes."""
        nothing = Conditioning()
        x, _ = self.encoder.down(self.encoder.conv_in(x), self.encoder.told(t, nothing), nothing)
        return self.pool(F.silu(self.norm_out(x)))


class AttentionPool(nn.Module):
    """What the mean of all pixels finds when it attends to them and to itself."""

    def __init__(self, width: int, num_heads: int, pixels: int, out_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(width, pixels + 1) / width**0.5)
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = Linear(width, out_width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = rearrange(x, "b c h w -> b (h w) c")
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding.T
        q = rearrange(self.to_q(x[:, 0]), "b (h e) -> b h e", h=self.num_heads)
        k, v = (rearrange(f(x), "b n (h e) -> b h n e", h=self.num_heads) for f in (self.to_k, self.to_v))
        share = torch.einsum("bhe,bhne->bhn", q, k * q.shape[-1] ** -0.5).softmax(-1)
        return self.to_out(torch.einsum("bhn,bhne->bhe", share, v).flatten(1))
