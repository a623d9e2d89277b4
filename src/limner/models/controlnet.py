"""ControlNet (arXiv:2302.05543): a second way down, told of a picture, that adds to what a U-Net hands over.

A union (ControlNet++, of xinsir) is one for several kinds of pictures: it is told which kind it sees, beside the time
and, by a small transformer, in every pixel. Unusual: in the authors' code that transformer's attention runs over the
batch, whose rows are alike where one picture is drawn. So every row attends to itself here, and a picture does not
depend on its neighbours.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.models.unet import DownPath, EmbeddingMLP, Residuals, Told, UNetConfig
from limner.nn.embeddings import sinusoid
from limner.nn.initialization import zero
from limner.types import Conditioning

HINT_WIDTHS = (16, 32, 96, 256)
UNION_HINT_WIDTHS = (48, 96, 192, 384)
KINDS = {
    "pose": 0, "depth": 1, "softedge": 2, "scribble": 2, "canny": 3, "lineart": 3, "mlsd": 3, "normal": 4,
    "segmentation": 5, "tile": 6,
}  # fmt: skip
"""What a union's pictures can be, and the number that it knows each by."""


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

    def see(self, hint: Tensor, kind: int = 0) -> Tensor:
        """What is made of a picture (1, 3, 8 h, 8 w) in [0, 1] once, whatever the time: (1, d, h, w)."""
        return self.controlnet_cond_embedding(hint)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, seen: Tensor) -> Residuals:
        """Noisy latents (b, c, h, w) at times t (b,), as the U-Net sees them, and what `see` made -> what the U-Net
        adds."""
        return self.added(self.conv_in(x).add_(seen), self.told(t, cond), cond)

    def added(self, x: Tensor, told: Told, cond: Conditioning) -> Residuals:
        middle, skips = self.down(x, told, cond)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        added = [*down, self.controlnet_mid_block(middle)]
        if self.pooled:
            added = [residual.mean(dim=(2, 3), keepdim=True) for residual in added]
        return Residuals(tuple(added[:-1]), added[-1])


class ControlNetUnion(ControlNet):
    def __init__(
        self, config: UNetConfig, hint_widths: tuple[int, ...] = UNION_HINT_WIDTHS, num_kinds: int = 6, depth: int = 1
    ) -> None:
        super().__init__(config, hint_widths)
        width = config.widths[0]
        self.task_embedding = nn.Parameter(width**0.5 * torch.randn(num_kinds, width))
        self.transformer_layes = nn.ModuleList(UnionBlock(width) for _ in range(depth))  # as it is spelled in files
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = EmbeddingMLP(256 * num_kinds, 4 * width)
        zero(self.spatial_ch_projs)

    @property
    def kinds(self) -> dict[str, int]:
        """Of KINDS, those that it knows."""
        return {name: k for name, k in KINDS.items() if k < len(self.task_embedding)}

    def see(self, hint: Tensor, kind: int = 0) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """As a ControlNet, of a `kind` that is a number of KINDS; and what the time is told of it (1, d)."""
        made = self.controlnet_cond_embedding(hint)
        task = made.mean(dim=(2, 3)) + self.task_embedding[kind]  # 1 d
        for block in self.transformer_layes:
            task = block(task)
        marks = F.one_hot(torch.tensor([kind], device=hint.device), len(self.task_embedding))[0]
        told = self.control_add_embedding(sinusoid(marks, 256).flatten()[None].to(hint.dtype))
        return made + self.spatial_ch_projs(task)[:, :, None, None], told

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, seen: tuple[Tensor, Tensor]) -> Residuals:  # type: ignore[override]
        made, told = seen
        return self.added(self.conv_in(x).add_(made), self.told(t, cond, told), cond)


class UnionBlock(nn.Module):
    """CLIP's block on one token a row (b, d), whose attention to itself alone is its value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias  # of queries, keys and values
        x = x + self.attn.out_proj(F.linear(self.ln_1(x), weight.chunk(3)[2], bias.chunk(3)[2]))
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


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
