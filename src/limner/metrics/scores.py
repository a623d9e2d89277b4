"""Scores of pictures against their originals, and the intervals that every figure is reported with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054
PSNR_CAP = 100.0
"""dB given to a picture without any error, so that a mean over pictures stays finite."""


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval; `n` is how many pictures or prompts it rests on."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int) -> Figure:
    """A share with Wilson's score interval (Wilson 1927, equation 3 in modern form); n >= 1."""
    assert 0 <= successes <= n
    assert n >= 1
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Figure(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)


def mean(values: Tensor) -> Figure:
    """Mean of (n,) values with the normal interval 1.96 s / sqrt(n)."""
    values = values.double()
    half = Z95 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Figure(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half, len(values))


def bootstrap(statistic: Callable[[Tensor], float], n: int, *, resamples: int = 1000, seed: int = 0) -> Figure:
    """`statistic` of (n,) positions into the data, with its percentile bootstrap interval (Efron 1979).

    The value is the statistic of all positions in order; each of `resamples` draws n of them with replacement.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Figure(statistic(torch.arange(n)), float(low), float(high), n)


def ratio(ours: Tensor, theirs: Tensor, *, seed: int = 0) -> Figure:
    """mean(ours) / mean(theirs) over the same n prompts, bootstrapped over prompts; infinite where theirs is 0."""
    assert ours.shape == theirs.shape

    def statistic(index: Tensor) -> float:
        below = float(theirs[index].double().mean())
        return float(ours[index].double().mean()) / below if below else math.inf

    return bootstrap(statistic, len(ours), seed=seed)


def on_white(images: Tensor) -> Tensor:
    """Premultiplied RGBA (b, 4, h, w) in [-1, 1] -> RGB (b, 3, h, w) in [-1, 1] on a white ground."""
    return images[:, :3] + 1 - images[:, 3:]


def squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error on white of pairs of premultiplied RGBA pictures (b, 4, h, w) in [-1, 1]; pixels in [0, 1]."""
    assert a.shape == b.shape
    return ((on_white(a).clamp(-1, 1) - on_white(b).clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))


def psnr(squared_error: Tensor) -> Tensor:
    """-10 log10 of mean squared errors of pixels in [0, 1]: dB, at most 100."""
    return -10 * squared_error.double().clamp(min=10 ** (-PSNR_CAP / 10)).log10()


def alpha_errors(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of the alpha channel of each pair of (b, 4, h, w) pictures in [-1, 1]; alpha in [0, 1]."""
    assert a.shape == b.shape
    return ((a[:, 3].clamp(-1, 1) - b[:, 3].clamp(-1, 1)) / 2).abs().mean(dim=(1, 2))
