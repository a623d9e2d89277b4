"""Kernels in Triton, for `limner.nn.fused`; importing this needs Triton, which comes with torch for GPUs."""

from __future__ import annotations

import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]


@triton.jit
def modulate(x, shift, scale, out, n, d, shift_row, scale_row, eps, plus, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row (d,) of x: normalised, times plus + scale, and shift added, of its batch."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // n
    at = tl.arange(0, BLOCK)
    there = at < d
    v = tl.load(x + row * d + at, mask=there, other=0.0).to(tl.float32)
    v = tl.where(there, v - tl.sum(v, 0) / d, 0.0)
    v = v / tl.sqrt(tl.sum(v * v, 0) / d + eps)
    by = tl.load(scale + batch * scale_row + at, mask=there, other=0.0).to(tl.float32)
    to = tl.load(shift + batch * shift_row + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * d + at, (v * (plus + by) + to).to(out.dtype.element_ty), mask=there)


@triton.jit
def gated(x, gate, y, out, n, d, gate_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row (d,) of x + gate * y."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < d
    v = tl.load(x + row * d + at, mask=there, other=0.0).to(tl.float32)
    w = tl.load(y + row * d + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gate + (row // n) * gate_row + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * d + at, (v + g * w).to(out.dtype.element_ty), mask=there)


@triton.jit
def turned(  # type: ignore[no-untyped-def]
    x, weight, table, out, heads, first, half, x_batch, x_token, out_batch, out_token, eps,
    E: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The heads of a token, (heads, E): each of length one and then turned by the table's row of the token."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    e = tl.arange(0, E)[None, :]
    there = (h < heads) & (e < E)
    own = x + batch * x_batch + token * x_token + h * E
    v = tl.load(own + e, mask=there, other=0.0).to(tl.float32)
    other = tl.load(own + (e ^ 1), mask=there, other=0.0).to(tl.float32)
    length = 1.0 / tl.sqrt(tl.sum(v * v, 1) / E + eps)[:, None]
    v = v * length * tl.load(weight + e).to(tl.float32)
    other = other * length * tl.load(weight + (e ^ 1)).to(tl.float32)
    row = table + (first + token) * E
    v = v * tl.load(row + e) + other * tl.load(row + half + e)
    place = out + batch * out_batch + (first + token) * out_token + h * E
    tl.store(place + e, v.to(out.dtype.element_ty), mask=there)


@triton.jit
def widened(codes, scales, out, columns, groups, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers in 8 bits (rows, columns), times the scale of their group of columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    v = tl.load(codes + row * columns + at, mask=there, other=0.0).to(tl.float32)
    by = tl.load(scales + row * groups + at // (columns // groups), mask=there, other=0.0)
    tl.store(out + row * columns + at, (v * by).to(out.dtype.element_ty), mask=there)
