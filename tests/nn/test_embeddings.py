from __future__ import annotations

import torch

from limner.nn.embeddings import rope_table, rotate


def test_rotating_is_multiplying_by_a_complex_number():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 7, 16), torch.randn(7, 2)
    frequencies = 100 ** (-torch.arange(4) / 4)
    angles = (positions[:, :, None] * frequencies).flatten(1)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, rope_table(positions, 16)), torch.cat([turned.real, turned.imag], dim=-1))
