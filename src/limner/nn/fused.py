"""What torch does in several passes over memory, in one: kernels in Triton on a GPU, where no gradients are wanted.

Elsewhere the same in torch, which is the definition. Kernels compute in float32 and round once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The kernels, None where there is no Triton, or it cannot build them (it needs a C compiler)."""
    try:
        from limner.nn import kernels as found

        row = torch.zeros(1, 1, 16, dtype=torch.bfloat16, device="cuda")
        found.gated[(1,)](row, row, row, row, 1, 16, 0, BLOCK=16)
    except Exception as error:  # whatever Triton, a compiler or a driver raises
        if not isinstance(error, ImportError):
            warnings.warn(f"no kernels of Triton ({str(error).strip()[:200]}): torch's do, slower", stacklevel=3)
        return None
    return found


def fuses(*tensors: Tensor) -> bool:
    """Whether kernels are there for these: on a GPU, in half precision, and nothing is compiled or differentiated."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.device.index == torch.cuda.current_device()  # where Triton launches
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and first.dtype in (torch.float16, torch.bfloat16)
        and all(tensor.dtype == first.dtype and tensor.stride(-1) == 1 for tensor in tensors)
        and kernels() is not None
    )


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, plus: float = 1.0) -> Tensor:
    """x (b, n, d), normalised over d, times `plus` + scale, and shift added, each (b, 1, d)."""
    if not (fuses(x, shift, scale) and x.is_contiguous()):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), plus + scale if plus else scale)
    out = torch.empty_like(x)
    b, n, d = x.shape
    kernels().modulate[(b * n,)](
        x, shift, scale, out, n, d, shift.stride(0), scale.stride(0), eps, plus, BLOCK=_power(d), num_warps=8
    )
    return out


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y, of x and y (b, n, d) and gate (b, 1, d)."""
    if not (fuses(x, gate, y) and x.is_contiguous() and y.is_contiguous()):
        return torch.addcmul(x, gate, y)
    out = torch.empty_like(x)
    b, n, d = x.shape
    kernels().gated[(b * n,)](x, gate, y, out, n, d, gate.stride(0), BLOCK=_power(d), num_warps=8)
    return out


def widens(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether `widened` has a kernel for codes (rows, columns)."""
    if not codes.is_cuda or dtype not in (torch.float16, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    here = codes.device.index == torch.cuda.current_device() and codes.is_contiguous()
    return here and torch.cuda.get_device_capability(codes.device) >= (8, 9) and kernels() is not None  # e4m3's first


def widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in 8 bits (rows, columns) in `dtype`, times scales (rows, groups), each for as many columns. Only where
    `widens`."""
    rows, columns = codes.shape
    out = codes.new_empty(rows, columns, dtype=dtype)
    grid = (rows, -(-columns // 1024))
    kernels().widened[grid](codes, scales.contiguous(), out, columns, scales.shape[1], BLOCK=1024, num_warps=4)
    return out


def turns(table: Tensor, *parts: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether `turned` has a kernel for these."""
    width = table.shape[-1]
    return table.dtype == torch.float32 and width & (width - 1) == 0 and fuses(*(one for part in parts for one in part))


def turned(table: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]], eps: float = 1e-6) -> tuple[Tensor, ...]:
    """Queries, keys and values (b, n, heads, e) of sequences behind each other: each of the parts is their product (b,
    n, 3 heads e) and the weights (e,) that scale queries and keys of one length, which are then turned by a table (2,
    n, 1, e) of `limner.models.flux.rope_table`. Only where `turns`."""
    half, width = table.stride(0), table.shape[-1]
    total, inner = sum(product.shape[1] for product, _, _ in parts), parts[0][0].shape[-1] // 3
    b, heads = len(parts[0][0]), inner // width
    q, k = (parts[0][0].new_empty(b, total, heads, width) for _ in range(2))
    first = 0
    for product, *weights in parts:
        n = product.shape[1]
        for i, (weight, out) in enumerate(zip(weights, (q, k), strict=True)):
            x = product[..., i * inner : (i + 1) * inner]
            kernels().turned[(n, b)](
                x, weight, table, out, heads, first, half, x.stride(0), x.stride(1), out.stride(0), out.stride(1), eps,
                E=width, HEADS=_power(heads), num_warps=4,
            )  # fmt: skip
        first += n
    values = [product[..., 2 * inner :].unflatten(-1, (heads, width)) for product, _, _ in parts]
    return q, k, torch.cat(values, dim=1) if len(values) > 1 else values[0]


def _power(n: int) -> int:
    return 2 ** math.ceil(math.log2(n))
