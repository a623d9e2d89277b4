"""ControlNets of FLUX.1 (arXiv:2302.05543, as InstantX and Shakker build them): a few blocks of FLUX's kind, told of a
picture, that add to the image tokens after FLUX's own.

Unusual: they see the latents of a picture, not its pixels; and a union, which is for several kinds of pictures, is told
which kind it sees by a word before the prompt. XLabs' do see pixels, and what they add after two blocks FLUX adds in
turns after all. Names are Black Forest Labs' where these have one, diffusers' otherwise.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from limner.models.controlnet import HintEmbedding
from limner.models.flux import FluxConfig, Residuals, Streams, patches
from limner.nn.linear import Linear
from limner.types import Conditioning

KINDS = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "low_quality": 6}
"""What a union's pictures can be, and the number that it knows each by."""


class FluxControlNet(Streams):
    """`config` is FLUX's but for the depths; `num_kinds` is 0 unless it is a union, and there are `hint_widths` if it
    sees pixels. A fresh one adds nothing."""

    def __init__(self, config: FluxConfig, num_kinds: int = 0, hint_widths: tuple[int, ...] = ()) -> None:
        super().__init__(config)
        width = config.width
        self.sees: Literal["latents", "pixels"] = "pixels" if hint_widths else "latents"
        self.input_hint_block = HintEmbedding(hint_widths, config.latents_in) if hint_widths else None
        self.controlnet_x_embedder = nn.Linear(config.in_channels, width)
        self.controlnet_mode_embedder = nn.Embedding(num_kinds, width) if num_kinds else None
        self.controlnet_blocks = nn.ModuleList(Linear(width, width) for _ in range(config.depth))
        self.controlnet_single_blocks = nn.ModuleList(Linear(width, width) for _ in range(config.depth_single))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        first = [self.controlnet_x_embedder] if self.input_hint_block is None else []
        for linear in (*first, *self.controlnet_blocks, *self.controlnet_single_blocks):
            nn.init.zeros_(linear.weight)

    @property
    def kinds(self) -> dict[str, int]:
        """Of KINDS, those that it knows."""
        modes = self.controlnet_mode_embedder
        return {} if modes is None else {name: k for name, k in KINDS.items() if k < modes.num_embeddings}

    def see(self, hint: Tensor, kind: int = 0) -> Tensor:
        """What is made of the latents (1, c, h, w) of a picture once, or of its pixels (1, 3, 8 h, 8 w) in [0, 1],
        whatever the time: (1, n, d); before it, of a union, the word for its `kind`, a number of KINDS."""
        if self.input_hint_block is not None:
            hint = self.input_hint_block(2 * hint - 1)
        seen = self.controlnet_x_embedder(patches(hint))
        if self.controlnet_mode_embedder is None:
            return seen
        word = self.controlnet_mode_embedder.weight[kind].expand(len(seen), 1, -1)
        return torch.cat([word, seen], dim=1)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, seen: Tensor) -> Residuals:
        """Latents (b, c, h, w) at times t (b,), as FLUX is given them, and what `see` made -> what FLUX adds."""
        told = self.told(t, cond)
        kinds = int(self.controlnet_mode_embedder is not None)
        word, seen = seen[:, :kinds], seen[:, kinds:]
        img = self.img_in(patches(x)) + seen  # b n d
        txt = torch.cat([word.expand(len(x), -1, -1), self.words(cond)], dim=1)  # b (1 + l) d
        table = self.table(txt.shape[1], [x])

        double, single = [], []
        for block, out in zip(self.double_blocks, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, next(told), next(told), table)
            double.append(out(img))
        tokens = torch.cat([txt, img], dim=1)
        for block, out in zip(self.single_blocks, self.controlnet_single_blocks, strict=True):
            tokens = block(tokens, next(told), table)
            single.append(out(tokens[:, txt.shape[1] :]))
        return Residuals(tuple(double), tuple(single), cycled=self.input_hint_block is not None)
