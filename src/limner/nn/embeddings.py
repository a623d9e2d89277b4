"""Numbers and positions as vectors, and ids on their way to a table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int, sines_first: bool = False, freq_shift: int = 0) -> Tensor:
    """Sinusoids of t (b,) as (b, width), in float32: cosines, then sines (arXiv:1706.03762), or as DDPM has them.

    The order of the products is that of the published networks: the last bit of a frequency is 6e-5 of an angle at
    t = 999. `freq_shift` 1 gives the slowest a period of 2π·10,000 sharp.
    """
    half = width // 2
    powers = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * powers.exp()
    parts = [angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()]
    return nn.functional.pad(torch.cat(parts, dim=-1), (0, width % 2))


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table of vectors, not yet filled: to fill an nn.Embedding(rows, width) on the meta device, torch imports its
    whole compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on `device`, without waiting for the work queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
    angles = nn.functional.pad(angles, (0, head_width // 2 - pairs * axes))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x (..., n, d) by `table` (2, n, d)."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)
