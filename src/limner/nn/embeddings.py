"""Numbers and positions as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of t (b,) as (b, width): cosines, then sines (arXiv:1706.03762; DDPM's layout)."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t (b,) in [0, 1] -> (b, width): sinusoid of 1000 t, then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = nn.Linear(frequencies, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        embedded = sinusoid(1000 * t, self.frequencies).to(self.fc1.weight.dtype)
        return self.fc2(nn.functional.silu(self.fc1(embedded)))


def rope_table(positions: Tensor, head_width: int, base: float = 100.0) -> Tensor:
    """Rotary angles (arXiv:2104.09864) of positions (n, axes) -> (2, n, head_width): the cosine of every pair twice,
    then its sine with the sign that each of the two takes.

    Each axis turns an equal share of the pairs; position 0 turns nothing.
    """
    axes = positions.shape[1]
    pairs = head_width // 2 // axes
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float32, device=positions.device) / pairs)
    angles = (positions.float()[:, :, None] * frequencies).flatten(1)
    angles = torch.nn.functional.pad(angles, (0, head_width // 2 - pairs * axes))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x (..., n, d) by `table` (2, n, d)."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)
