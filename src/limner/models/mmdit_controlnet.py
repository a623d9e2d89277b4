"""ControlNets (arXiv:2302.05543) for Stable Diffusion 3: blocks as an MMDiT's, told of a picture, that add to the image
tokens of the network.

The picture comes as latents, whose tokens are added to those of what is drawn. Unusual: what Stability published
for 3.5 large reads no text and has no positions of its own, but works on the tokens that the network makes of its
latents; others are told no pooled prompt, and see latents of the picture that are not shifted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from limner.models.mmdit import (
    SD3_MEDIUM,
    SD3_TINY,
    SD35_LARGE,
    Block,
    JointBlock,
    MMDiTConfig,
    PatchEmbed,
    Trunk,
)
from limner.nn.initialization import zero
from limner.nn.linear import Linear
from limner.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class MMDiTControlNetConfig:
    """`size` is of a network of so many blocks; without `embeds` and `reads_text` nothing depends on what it says of
    positions and of text."""

    type: Literal["mmdit_controlnet"] = "mmdit_controlnet"
    size: MMDiTConfig = field(default_factory=lambda: replace(SD3_MEDIUM, depth=6))
    reads_text: bool = True
    embeds: bool = True
    """Whether it makes tokens of latents itself, rather than take those of the network that it is for."""
    hint_channels: int = 16
    """Of the latents of a picture, and of a mask beside them."""
    zero_pooled: bool = True
    """Whether it is told zeros for the pooled prompt; its picture is scaled and not shifted then."""


SD3_CONTROLNET = MMDiTControlNetConfig()  # 539M parameters: of InstantX's kind
SD35_LARGE_CONTROLNET = MMDiTControlNetConfig(  # 2,154M: Stability's blur, canny and depth
    size=replace(SD35_LARGE, depth=19, qk_norm=""), reads_text=False, embeds=False, zero_pooled=False
)
SD3_CONTROLNET_TINY = MMDiTControlNetConfig(size=replace(SD3_TINY, depth=1), hint_channels=4)


class MMDiTControlNet(Trunk):
    """A fresh one adds nothing: what it adds goes through matrices that begin at zero."""

    def __init__(self, config: MMDiTControlNetConfig) -> None:
        size = config.size
        super().__init__(size, config.reads_text, config.embeds)
        self.control = config
        self.embeds = config.embeds
        self.largest = size.pos_embed_max if config.embeds else 0
        """Tokens a side of the largest picture that it has positions for, 0 where it has none of its own."""
        self.sees: Literal["latents", "scaled"] = "scaled" if config.zero_pooled else "latents"
        """What `see` is given: latents, or what the autoencoder makes times their scale, not shifted."""
        if config.reads_text:
            self.joint_blocks = nn.ModuleList(JointBlock(size, i in size.dual_blocks) for i in range(size.depth))
        else:
            self.transformer_blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.controlnet_blocks = nn.ModuleList(Linear(size.width, size.width) for _ in range(size.depth))
        self.pos_embed_input = PatchEmbed(config.hint_channels, size.patch, size.width)
        self.parts = [layer.parts for layer in self.modulations()]
        self.reset_parameters()
        for module in (*self.controlnet_blocks, self.pos_embed_input):
            zero(module)

    def pooled(self, cond: Conditioning) -> Tensor:
        told = super().pooled(cond)
        return torch.zeros_like(told) if self.control.zero_pooled else told

    def see(self, hint: Tensor, kind: int = 0) -> Tensor:
        """What is made of the latents of a picture (1, c, h, w) once, whatever the time: tokens (1, n, d)."""
        return self.pos_embed_input(hint)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, seen: Tensor) -> list[Tensor]:
        """Latents (b, c, h, w), or of one that does not embed them the image tokens that `embed` of its network makes
        (b, n, d), at times t as an MMDiT has them, and what `see` made -> `residuals` of that network, a block each."""
        told = self.told(t, cond)
        image, residuals = (self.embed(x) if self.control.embeds else x) + seen, []
        if self.control.reads_text:
            text = self.text(cond)
            for i, block in enumerate(self.joint_blocks):
                text, image = block(text, image, told[2 * i], told[2 * i + 1])
                residuals.append(self.controlnet_blocks[i](image))
        else:
            for i, block in enumerate(self.transformer_blocks):
                image = block(image, told[i])
                residuals.append(self.controlnet_blocks[i](image))
        return residuals
