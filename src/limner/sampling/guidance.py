"""Guidance wraps a denoiser and is again a denoiser, so samplers never learn of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limner.sampling.interpolants import Interpolant
from limner.types import Denoise

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(x, sigma) -> (x0 given the prompt, x0 given the negative prompt), from one pass of the network over both."""


def classifier_free(pair: Pair, scale: float) -> Denoise:
    """Classifier-free guidance (arXiv:2207.12598): uncond + scale * (cond - uncond); 1 is no guidance."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond, uncond = pair(x, sigma)
        return torch.lerp(uncond, cond, scale)

    return denoise


def composed(parts: Sequence[Tensor], weights: Sequence[Tensor], uncond: Tensor) -> Tensor:
    """x0 of several prompts at once: uncond + sum of weight * (part - uncond), weights (b,) each (Composable Diffusion,
    arXiv:2206.01714, equation 11)."""
    x0 = uncond
    for part, weight in zip(parts, weights, strict=True):
        x0 = x0 + weight[:, None, None, None] * (part - uncond)
    return x0


def within(interval: tuple[float, float], guided: Denoise, plain: Denoise, interpolant: Interpolant) -> Denoise:
    """`guided` at noise levels in `interval`, else `plain`, which may ask the network for half as much (guidance
    interval, arXiv:2404.07724). Levels are those of the flow, low < sigma / (alpha + sigma) <= high, so (0, 1] is
    everywhere and (s, s] nowhere, in any coordinate."""
    low, high = interval

    def denoise(x: Tensor, sigma: float) -> Tensor:
        level = sigma / (interpolant.alpha(sigma) + sigma)
        return guided(x, sigma) if low < level <= high else plain(x, sigma)

    return denoise
