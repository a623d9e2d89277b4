"""Guidance wraps a denoiser and is again a denoiser, so samplers never learn of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from limner.types import Denoise

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(x, sigma) -> (x0 given the prompt, x0 given the negative prompt), from one pass of the network over both."""


def classifier_free(pair: Pair, scale: float) -> Denoise:
    """Classifier-free guidance (arXiv:2207.12598): uncond + scale * (cond - uncond); 1 is no guidance."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond, uncond = pair(x, sigma)
        return torch.lerp(uncond, cond, scale)

    return denoise
