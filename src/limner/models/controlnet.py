"""ControlNet (arXiv:2302.05543): a second way down, told of a picture, that adds to what a U-Net hands over."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from limner.models.unet import DownPath, Residuals, UNetConfig, zero
from limner.types import Conditioning

HINT_WIDTHS = (16, 32, 96, 256)


class ControlNet(DownPath):
    """Names are diffusers'. A fresh one adds nothing: what it adds goes through convolutions that begin at zero."""

    def __init__(self, config: UNetConfig, hint_widths: tuple[int, ...] = HINT_WIDTHS) -> None:
        super().__init__(config)
        self.pooled = False
        """Whether what it adds is the same everywhere: it tells of the picture as a whole (shuffle)."""
        self.controlnet_cond_embedding = HintEmbedding(hint_widths, config.widths[0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in self.made)
        self.controlnet_mid_block = nn.Conv2d(self.made[-1], self.made[-1], 1)
        for module in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            zero(module)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, hint: Tensor) -> Residuals:
        """Noisy latents (b, c, h, w) at times t (b,), as the U-Net sees them, and a picture `hint` (b, 3, 8 h, 8 w) in
        [0, 1] -> what the U-Net adds."""
        emb = self.embed(t, cond)
        x = self.conv_in(x).add_(self.controlnet_cond_embedding(hint))
        middle, skips = self.down(x, emb, cond.tokens, cond.mask)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        added = [*down, self.controlnet_mid_block(middle)]
        if self.pooled:
            added = [residual.mean(dim=(2, 3), keepdim=True) for residual in added]
        return Residuals(tuple(added[:-1]), added[-1])


class HintEmbedding(nn.Module):
    """A picture in the size of its latents: (b, 3, 8 h, 8 w) -> (b, width, h, w)."""

    def __init__(self, widths: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in itertools.pairwise(widths):
            self.blocks.append(nn.Conv2d(a, a, 3, padding=1))
            self.blocks.append(nn.Conv2d(a, b, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)
        zero(self.conv_out)

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)
