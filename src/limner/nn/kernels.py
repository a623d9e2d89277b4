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


@triton.jit
def swish_slope(u):  # type: ignore[no-untyped-def]
    """The derivative of u * sigmoid(u)."""
    gate = tl.sigmoid(u)
    return gate * (1 + u * (1 - gate))


@triton.jit
def channel_sums(  # type: ignore[no-untyped-def]
    x, dy, slope, shift, sums, pixels, c, per, SILU: tl.constexpr, BACK: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of x (b, pixels, c) the sums of each channel and of its square over `per` pixels, (b, parts, 2, c); or, BACK, of
    du and of du * x, where dy is the derivative by y = silu(u), u = slope * x + shift, both (b, c)."""
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    at = tl.program_id(1) * C + tl.arange(0, C)
    there = at < c
    first, second = tl.zeros((P, C), tl.float32), tl.zeros((P, C), tl.float32)
    if BACK and SILU:
        k = tl.load(slope + batch * c + at, mask=there, other=0.0)[None, :]
        m = tl.load(shift + batch * c + at, mask=there, other=0.0)[None, :]
    for begin in range(0, per, P):
        pixel = begin + tl.arange(0, P)
        inside = (pixel < per) & (part * per + pixel < pixels)
        place = (batch * pixels + part * per + pixel)[:, None] * c + at[None, :]
        known = inside[:, None] & there[None, :]
        v = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
        if BACK:
            d = tl.load(dy + place, mask=known, other=0.0).to(tl.float32)
            if SILU:
                d = d * swish_slope(k * v + m)
            first += d
            second += d * v
        else:
            first += v
            second += v * v
    row = sums + (batch * tl.num_programs(2) + part) * 2 * c + at
    tl.store(row, tl.sum(first, 0), mask=there)
    tl.store(row + c, tl.sum(second, 0), mask=there)


@triton.jit
def group_lines(  # type: ignore[no-untyped-def]
    sums, weight, bias, weight_row, bias_row, slope, shift, mean, rstd, parts, count, c, groups, eps,
    G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """From the sums of a picture the line slope * x + shift of each channel (b, c), which is the group's norm times
    weight, and bias added; and its `mean` and `rstd` (b, groups)."""
    batch = tl.program_id(0).to(tl.int64)
    g, k = tl.arange(0, G)[:, None], tl.arange(0, K)[None, :]
    at, there = g * (c // groups) + k, (g < groups) & (k < c // groups)
    first, second = tl.zeros((G, K), tl.float32), tl.zeros((G, K), tl.float32)
    for part in range(parts):
        row = sums + (batch * parts + part) * 2 * c + at
        first += tl.load(row, mask=there, other=0.0)
        second += tl.load(row + c, mask=there, other=0.0)
    middle = tl.sum(first, 1) / count
    scale = 1.0 / tl.sqrt(tl.maximum(tl.sum(second, 1) / count - middle * middle, 0.0) + eps)
    line = tl.load(weight + batch * weight_row + at, mask=there, other=0.0).to(tl.float32) * scale[:, None]
    to = tl.load(bias + batch * bias_row + at, mask=there, other=0.0).to(tl.float32)
    tl.store(slope + batch * c + at, line, mask=there)
    tl.store(shift + batch * c + at, to - middle[:, None] * line, mask=there)
    group = tl.arange(0, G)
    tl.store(mean + batch * groups + group, middle, mask=group < groups)
    tl.store(rstd + batch * groups + group, scale, mask=group < groups)


@triton.jit
def group_slopes(  # type: ignore[no-untyped-def]
    sums, slope, mean, rstd, by, to, dweight, dbias, parts, count, c, groups, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """From the sums of du and du * x the derivatives by weight and bias (b, c), and the rest of that by x, which is
    slope * du + by * x + to, both (b, c)."""
    batch = tl.program_id(0).to(tl.int64)
    g, k = tl.arange(0, G)[:, None], tl.arange(0, K)[None, :]
    at, there = g * (c // groups) + k, (g < groups) & (k < c // groups)
    du, dux = tl.zeros((G, K), tl.float32), tl.zeros((G, K), tl.float32)
    for part in range(parts):
        row = sums + (batch * parts + part) * 2 * c + at
        du += tl.load(row, mask=there, other=0.0)
        dux += tl.load(row + c, mask=there, other=0.0)
    group = tl.arange(0, G)
    middle = tl.load(mean + batch * groups + group, mask=group < groups, other=0.0)
    scale = tl.load(rstd + batch * groups + group, mask=group < groups, other=0.0)
    dxhat = scale[:, None] * (dux - middle[:, None] * du)  # the sum of du times the norm
    line = tl.load(slope + batch * c + at, mask=there, other=0.0)  # weight * rstd
    along = -scale * tl.sum(line * dxhat, 1) / count
    tl.store(dbias + batch * c + at, du, mask=there)
    tl.store(dweight + batch * c + at, dxhat, mask=there)
    tl.store(by + batch * c + at, tl.zeros((G, K), tl.float32) + along[:, None], mask=there)
    rest = -tl.sum(line * du, 1) / count - along * middle
    tl.store(to + batch * c + at, tl.zeros((G, K), tl.float32) + rest[:, None], mask=there)


@triton.jit
def lined(  # type: ignore[no-untyped-def]
    x, dy, slope, shift, by, to, out, pixels, c, SILU: tl.constexpr, BACK: tl.constexpr, P: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """y = silu(u), u = slope * x + shift, of x (b, pixels, c); or, BACK, from the derivative by it that by x."""
    batch = tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * C + tl.arange(0, C)
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    there = at < c
    place = (batch * pixels + pixel)[:, None] * c + at[None, :]
    known = (pixel < pixels)[:, None] & there[None, :]
    v = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    k = tl.load(slope + batch * c + at, mask=there, other=0.0)[None, :]
    m = tl.load(shift + batch * c + at, mask=there, other=0.0)[None, :]
    if BACK:
        d = tl.load(dy + place, mask=known, other=0.0).to(tl.float32)
        if SILU:
            d = d * swish_slope(k * v + m)
        b = tl.load(by + batch * c + at, mask=there, other=0.0)[None, :]
        t = tl.load(to + batch * c + at, mask=there, other=0.0)[None, :]
        v = k * d + b * v + t
    else:
        v = k * v + m
        if SILU:
            v = v * tl.sigmoid(v)
    tl.store(out + place, v.to(out.dtype.element_ty), mask=known)


@triton.jit
def shifted(x, by, by_row, pixels, c, P: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """x (b, pixels, c) and by (b, c) added to it, in its place."""
    batch = tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * C + tl.arange(0, C)
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    there = at < c
    place = (batch * pixels + pixel)[:, None] * c + at[None, :]
    known = (pixel < pixels)[:, None] & there[None, :]
    v = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    v += tl.load(by + batch * by_row + at, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(x + place, v.to(x.dtype.element_ty), mask=known)
