"""Redux: pictures as words behind those of the prompt of FLUX.1.

Black Forest Labs published it with FLUX.1 Tools in 2024: each state of SigLIP's tower becomes a token as T5's are. The
network, which attends to all tokens alike, is left as it is. Names are those of the published file.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """States of pictures are `width` wide, tokens of words `text_width`."""

    width: int = 1152
    text_width: int = 4096


REDUX_DEV = ReduxConfig()  # 64.5M parameters
REDUX_TINY = ReduxConfig(width=48, text_width=32)


class Redux(nn.Module):
    def __init__(self, config: ReduxConfig) -> None:
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.width, 3 * config.text_width)
        self.redux_down = nn.Linear(3 * config.text_width, config.text_width)

    def forward(self, x: Tensor) -> Tensor:
        """States (b, n, width) -> tokens (b, n, text_width)."""
        return self.redux_down(F.silu(self.redux_up(x)))
