"""What torch does in several passes over memory, in one: kernels in Triton on a GPU, where no gradients are wanted but
for `normalized` and `shifted`, which have them.

Elsewhere the same in torch, which is the definition. Kernels compute in float32 and round once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
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
        and not torch.is_grad_enabled()
        and all(tensor.dtype == first.dtype and tensor.stride(-1) == 1 for tensor in tensors)
        and _takes(first)
    )


def _takes(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.device.index == torch.cuda.current_device()  # where Triton launches
        and x.dtype in (torch.float16, torch.bfloat16)
        and not torch.compiler.is_compiling()
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


def normalized(
    x: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True
) -> Tensor:
    """silu(norm(x)) of x (b, c, h, w), before the SiLU times 1 + scale and shift added, both (b, c), if they are there.
    The kernels read x with channels last."""
    if "forward" in vars(norm) or not _takes_pixels(x):
        y = norm(x)
        if scale is not None and shift is not None:
            y = torch.addcmul(shift[..., None, None], y, 1 + scale[..., None, None])
        return F.silu(y) if silu else y
    weight, bias = norm.weight[None], norm.bias[None]
    if scale is not None and shift is not None:
        weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
    rows = len(x), x.shape[1]
    return _Normalized.apply(x, weight.expand(rows), bias.expand(rows), norm.num_groups, norm.eps, silu)


def _takes_pixels(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and _takes(x)


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        (b, c, h, w), new = x.shape, partial(torch.empty, dtype=torch.float32, device=x.device)
        slope, shift, mean, rstd = new(b, c), new(b, c), new(b, groups), new(b, groups)
        sums = _channel_sums(x, x, slope, shift, silu, back=False)
        kernels().group_lines[(b,)](
            sums, weight, bias, weight.stride(0), bias.stride(0), slope, shift, mean, rstd, sums.shape[1],
            h * w * c // groups, c, groups, eps, G=_power(groups), K=_power(c // groups),
        )  # fmt: skip
        ctx.save_for_backward(x, slope, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return _lined(x, x, slope, shift, slope, shift, silu, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, slope, shift, mean, rstd = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        (b, c, h, w), groups = x.shape, ctx.groups
        sums = _channel_sums(x, dy, slope, shift, ctx.silu, back=True)
        by, to, dweight, dbias = (torch.empty_like(slope) for _ in range(4))
        kernels().group_slopes[(b,)](
            sums, slope, mean, rstd, by, to, dweight, dbias, sums.shape[1], h * w * c // groups, c, groups,
            G=_power(groups), K=_power(c // groups),
        )  # fmt: skip
        return _lined(x, dy, slope, shift, by, to, ctx.silu, back=True), dweight, dbias, None, None, None


def shifted(x: Tensor, by: Tensor) -> Tensor:
    """x (b, c, h, w) and what is added to all pixels of a channel, (c,) or (b, c), in its place. The kernel is for
    where gradients are wanted, as torch is slow at their sums."""
    if not (torch.is_grad_enabled() and _takes_pixels(x)):
        return x.add_(by[..., None, None])
    return _Shifted.apply(x, by.expand(x.shape[:2]))


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        kernels().shifted[_grid(x)](x, by, by.stride(0), x[0, 0].numel(), x.shape[1], P=PIXELS, C=CHANNELS)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        dy = dy.contiguous(memory_format=torch.channels_last)
        return dy, _channel_sums(dy, dy, dy, dy, False, back=False)[:, :, 0].sum(1)


def _grid(x: Tensor) -> tuple[int, int, int]:
    """A program for some pixels and channels of each picture; the first may be the longest."""
    b, c, h, w = x.shape
    return -(-h * w // PIXELS), -(-c // CHANNELS), b


PIXELS, CHANNELS = 32, 64
"""Of what a program that reads pixels holds at a time."""
PROGRAMS = 1024
"""As many as keep a GPU at work: sums over few rows and channels are cut among as many."""


def _channel_sums(x: Tensor, dy: Tensor, slope: Tensor, shift: Tensor, silu: bool, back: bool) -> Tensor:
    b, c, h, w = x.shape
    strips = -(-c // CHANNELS)
    most = max(1, min(PROGRAMS // (b * strips), -(-h * w // PIXELS)))
    per = -(-h * w // (most * PIXELS)) * PIXELS
    parts = -(-h * w // per)
    sums = torch.empty(b, parts, 2, c, dtype=torch.float32, device=x.device)
    kernels().channel_sums[(b, strips, parts)](
        x, dy, slope, shift, sums, h * w, c, per, SILU=silu, BACK=back, P=PIXELS, C=CHANNELS
    )
    return sums


def _lined(
    x: Tensor, dy: Tensor, slope: Tensor, shift: Tensor, by: Tensor, to: Tensor, silu: bool, back: bool
) -> Tensor:
    out, pixels = torch.empty_like(x), x[0, 0].numel()
    kernels().lined[_grid(x)](
        x, dy, slope, shift, by, to, out, pixels, x.shape[1], SILU=silu, BACK=back, P=PIXELS, C=CHANNELS
    )
    return out


def _power(n: int) -> int:
    return 2 ** math.ceil(math.log2(n))
