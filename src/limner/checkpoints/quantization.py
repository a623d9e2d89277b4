"""Weights in 8 or 4 bits, one scale a row or a group: smaller files, restored to float32 when loaded.

Symmetric and linear: w = q * scale, with q in [-127, 127] or [-7, 7]. 8 bits have one scale for each row of the first
axis, 4 bits one for each group of 32 along the flattened rest. On disk `name` holds q (two 4-bit values a byte, low
nibble first) and `name.scale` the float16 scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import CheckpointMismatch

GROUP = 32


def quantize(
    tensors: Mapping[str, Tensor], bits: Callable[[str, Tensor], int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`bits(name, tensor)` chooses 8, 4, 16 (float16) or 32 (as is). Returns (tensors for the file, how to restore)."""
    stored: dict[str, Tensor] = {}
    recipe: dict[str, Any] = {}
    for name, tensor in tensors.items():
        choice = bits(name, tensor)
        if choice == 32:
            stored[name] = tensor
        elif choice == 16:
            stored[name] = tensor.to(torch.float16)
            recipe[name] = {"bits": 16}
        else:
            q, scale = _quantize(tensor.float(), choice)
            stored[name], stored[f"{name}.scale"] = q, scale
            recipe[name] = {"bits": choice, "shape": list(tensor.shape)}
    return stored, recipe


def dequantize(stored: Mapping[str, Tensor], recipe: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """The reverse of `quantize`. Raises CheckpointMismatch where the file and its recipe disagree."""
    tensors = dict(stored)
    for name, entry in recipe.items():
        try:
            if entry["bits"] == 16:
                tensors[name] = tensors[name].float()
                continue
            q, scale = tensors[name], tensors.pop(f"{name}.scale").float()
            tensors[name] = _dequantize(q, scale, entry["bits"], entry["shape"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointMismatch(f"{source}: the quantised weight {name} is not as its recipe says") from error
    return tensors


def _quantize(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows = _grouped(tensor, bits)
    top = 2 ** (bits - 1) - 1
    peak = rows.abs().amax(1, keepdim=True)
    # 4 bits gain from clipping the largest values a little: take the clip of least squared error, row by row
    clips = (1.0,) if bits == 8 else (1.0, 0.95, 0.9, 0.85, 0.8)
    best_scale, best_error = peak, torch.full_like(peak, torch.inf)
    for clip in clips:
        scale = (peak * clip / top).clamp_min(6e-8).half().float()
        error = (_round(rows, scale, top) * scale - rows).square().sum(1, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    q = _round(rows, best_scale, top).to(torch.int8)
    if bits == 4:
        low, high = (q.flatten()[0::2] + 8).to(torch.uint8), (q.flatten()[1::2] + 8).to(torch.uint8)
        q = low | (high << 4)
    else:
        q = q.reshape(tensor.shape)
    return q, best_scale.flatten().half()


def _dequantize(q: Tensor, scale: Tensor, bits: int, shape: list[int]) -> Tensor:
    if bits == 4:
        pairs = scale.new_empty(*q.shape, 2)
        pairs[..., 0], pairs[..., 1] = q & 15, q >> 4
        return pairs.sub_(8).view(-1, GROUP).mul_(scale[:, None]).view(shape)
    return q.float().mul_(scale.reshape(-1, *[1] * (q.dim() - 1)))


def _grouped(tensor: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return tensor.reshape(len(tensor), -1)
    assert tensor.numel() % GROUP == 0, f"4 bits need a multiple of {GROUP} values, not {tuple(tensor.shape)}"
    return tensor.reshape(-1, GROUP)


def _round(rows: Tensor, scale: Tensor, top: int) -> Tensor:
    return (rows / scale).round().clamp(-top, top)
