"""A ControlNet (arXiv:2302.05543) for a JointDiT: a few narrower blocks of its kind on the same grid, told of a
picture, that add to its image tokens.

Unusual, to stay small: it is no copy of the network that it is for, but begins anew; and it reads no tokens of the
prompt, only what they are pooled to. The picture's pixels are halved by convolutions until one is a latent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from limner.errors import UsageError
from limner.models.joint_dit import JOINT_DIT_ICONS, Block, JointDiTConfig, Trunk, check
from limner.nn.embeddings import TimeEmbedding
from limner.nn.initialization import zero
from limner.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class JointDiTControlNetConfig:
    """`size` is its own, but for channels, words and positions, which are those of the network that it is for, of
    `base_depth` blocks `base_width` wide; each of `hint_widths` is of a convolution that halves the picture."""

    type: Literal["joint_dit_controlnet"] = "joint_dit_controlnet"
    size: JointDiTConfig = field(
        default_factory=lambda: replace(JOINT_DIT_ICONS, width=256, depth=4, num_heads=4, hidden=416)
    )
    base_width: int = 512
    base_depth: int = 10
    hint_widths: tuple[int, ...] = (32, 64, 128, 256)


JOINT_DIT_ICONS_CONTROLNET = JointDiTControlNetConfig()  # 3.9M parameters


def config_for(base: JointDiTConfig, halvings: int, depth: int = 0) -> JointDiTControlNetConfig:
    """One for latents of 2 ** `halvings` pixels a side: half as wide as its network, of `depth` blocks, 4 at most if
    that is 0."""
    width, heads = base.width // 2, max(1, base.num_heads // 2)
    depth = depth or min(4, base.depth)
    if depth > base.depth:
        raise UsageError(f"control.depth={depth}: the network has {base.depth} blocks to add to")
    size = replace(base, width=width, depth=depth, num_heads=heads, hidden=13 * width // 8)
    widths = tuple(max(4, width >> k) for k in reversed(range(halvings)))
    return JointDiTControlNetConfig(size=size, base_width=base.width, base_depth=base.depth, hint_widths=widths)


class JointDiTControlNet(Trunk):
    """A fresh one adds nothing: what it adds goes through matrices that begin at zero."""

    def __init__(self, config: JointDiTControlNetConfig) -> None:
        super().__init__()
        check(config.size)
        self.config, self.control = config.size, config
        size, width = config.size, config.size.width
        self.hint_in = nn.Sequential()
        for a, b in itertools.pairwise((3, *config.hint_widths)):
            self.hint_in.extend([nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU()])
        self.hint_out = nn.Linear(config.hint_widths[-1], width)
        self.image_in = nn.Linear(size.channels, width)
        self.time_in = TimeEmbedding(width)
        self.pooled_in = nn.Linear(size.text_width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, config.base_width) for _ in range(size.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As a JointDiT; zero at the way out."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.modulation.weight)
        for linear in self.controlnet_blocks:
            zero(linear)

    @property
    def places(self) -> list[int]:
        """Before which blocks of its network it adds, counted from 0: spread evenly, the first at the first."""
        return [k * self.control.base_depth // self.config.depth for k in range(self.config.depth)]

    def see(self, hint: Tensor, kind: int = 0) -> Tensor:
        """What is made of pictures (b, 3, H, W) in [0, 1] once, whatever the time: tokens (b, n, d)."""
        return self.hint_out(rearrange(self.hint_in(hint), "b c h w -> b (h w) c"))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, seen: Tensor) -> list[Tensor | None]:
        """Latents (b, c, h, w) at times t (b,), as a JointDiT is given them, and what `see` made -> its `residuals`."""
        assert cond.pooled is not None
        added: list[Tensor | None] = [None] * self.control.base_depth
        tokens = self.image_in(rearrange(x, "b c h w -> b (h w) c")) + seen  # b n d
        _, modulation = self.modulate_by(t, cond.pooled)
        table = self.rope(0, x.shape[2], x.shape[3], x.device)
        for place, block, out in zip(self.places, self.blocks, self.controlnet_blocks, strict=True):
            tokens = block(tokens, modulation, table)
            added[place] = out(tokens)
        return added
