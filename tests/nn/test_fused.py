"""Kernels against what they stand for, in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.models import flux
from limner.nn import fused
from limner.nn.convolution import Conv2d

GPU = pytest.mark.gpu
SHAPES = [(1, 5, 64), (2, 7, 96), (3, 33, 3072), (1, 1, 1152)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def test_without_a_gpu_it_is_what_torch_says():
    x, shift, scale, y = draw(2, 5, 8), draw(2, 1, 8), 2 * draw(2, 1, 8), 3 * draw(2, 5, 8)
    normed = F.layer_norm(x, (8,), eps=1e-3)
    torch.testing.assert_close(fused.modulate(x, shift, scale, eps=1e-3), normed * (1 + scale) + shift)
    torch.testing.assert_close(fused.modulate(x, shift, scale, eps=1e-3, plus=0.0), normed * scale + shift)
    torch.testing.assert_close(fused.gated(x, scale, y), x + scale * y)
    assert not fused.turns(draw(2, 5, 1, 8), (x, draw(8), draw(8)))


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_kernels_round_once(shape, dtype):
    b, _, d = shape
    x, y = (draw(*shape, dtype=dtype, device="cuda") + k for k in (0, 1))
    rows = draw(b, 9 * d, dtype=dtype, device="cuda")[:, None]
    shift, scale, gate = rows.chunk(9, dim=-1)[2:5]  # rows that are not dense
    assert fused.fuses(x, shift, scale)
    for plus in (0.0, 1.0):
        exact = F.layer_norm(x.double(), (d,), eps=1e-6) * (plus + scale.double()) + shift.double()
        near(fused.modulate(x, shift, scale, plus=plus), exact, dtype)
    near(fused.gated(x, gate, y), x.double() + gate.double() * y.double(), dtype)


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "axes"), [(3, (4, 6, 6)), (24, (16, 56, 56))])
@torch.no_grad()
def test_heads_are_normalised_and_turned(heads, axes, dtype):
    width = sum(axes)
    table = flux.rope_table(flux.positions(5, [(2, 4), (3, 2)], "cuda"), axes, 10_000.0)
    first, second = draw(2, 5, 3 * heads * width, dtype=dtype), draw(2, 14, 4 * heads * width, dtype=dtype)
    parts = [
        (one.cuda()[..., : 3 * heads * width], *(1 + draw(2, width, dtype=dtype).cuda())) for one in (first, second)
    ]
    assert fused.turns(table, *parts)
    found = fused.turned(table, parts)
    exact = []
    for i in range(3):
        rows = [part[0].double().unflatten(-1, (3, heads, width))[:, :, i] for part in parts]
        if i < 2:
            rows = [
                F.rms_norm(row, (width,), part[1 + i].double(), 1e-6) for row, part in zip(rows, parts, strict=True)
            ]
        whole = torch.cat(rows, dim=1)
        exact.append(flux.rotate(whole, table.double()) if i < 2 else whole)
    for ours, theirs in zip(found, exact, strict=True):
        near(ours, theirs, dtype)


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 64, 7, 5), 32), ((2, 960, 8, 8), 32), ((1, 30, 65, 64), 5), ((40, 128, 32, 32), 32), ((1, 8, 1536, 1536), 4)],
)
@pytest.mark.parametrize(("told", "silu"), [(True, True), (False, True), (False, False)])
def test_groups_are_normalised_and_so_are_their_gradients(shape, groups, told, silu, dtype):
    b, c = shape[:2]
    x = 1 + 2 * draw(*shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    dy = draw(*shape[::-1], device="cuda", dtype=dtype).permute(3, 2, 1, 0)
    norm = nn.GroupNorm(groups, c, eps=1e-3, device="cuda")
    with torch.no_grad():
        norm.weight.copy_(draw(c)), norm.bias.copy_(draw(2, c)[1])
    more = [draw(2, b, c, device="cuda")[k] for k in range(2)] if told else []
    assert fused._takes(x)
    found, exact = [], []
    for results, kind in ((found, dtype), (exact, torch.float64)):
        network = norm if kind == dtype else copy.deepcopy(norm).double()
        leaves = [one.detach().to(kind if k == 0 or kind == torch.float64 else one.dtype).requires_grad_()
                  for k, one in enumerate([x, *more])]  # fmt: skip
        y = fused.normalized(leaves[0], network, *leaves[1:], silu=silu)
        results += [y, *torch.autograd.grad(y, [*leaves, network.weight, network.bias], dy.to(kind))]
    near(found[0], exact[0], dtype)
    near(found[1], exact[1], dtype)
    for ours, theirs in zip(found[2:], exact[2:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(), (40,)])
def test_pixels_are_shifted_in_place_and_the_shift_has_a_gradient(rows, dtype):
    x = draw(40, 130, 9, 7, device="cuda", dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    by = draw(*rows, 130, device="cuda").requires_grad_()
    dy = draw(7, 9, 130, 40, device="cuda", dtype=dtype).permute(3, 2, 1, 0)
    y = fused.shifted(x * 1, by)
    near(y, x.double() + by.double()[..., None, None], dtype)
    for ours, theirs in zip(torch.autograd.grad(y, (x, by), dy), (dy, dy.double().sum((2, 3))), strict=True):
        exact = theirs.double() if rows or ours.ndim == 4 else theirs.sum(0)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@GPU
@pytest.mark.parametrize("width", [64, 66])
def test_a_convolution_in_half_precision_is_that_of_torch(width):
    ours = Conv2d(32, width, 3, padding=1, device="cuda").to(memory_format=torch.channels_last)
    x = draw(4, 32, 16, 16, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        found, exact = ours(x), nn.Conv2d.forward(ours, x)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
    leaves = [x, ours.weight, ours.bias]
    dy = draw(4, width, 16, 16, device="cuda")
    for one, other in zip(*(torch.autograd.grad((y.float() * dy).sum(), leaves) for y in (found, exact)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


@GPU
@torch.no_grad()
def test_widths_without_a_kernel_are_left_to_torch():
    x = draw(2, 5, 3 * 24, dtype=torch.bfloat16, device="cuda")
    weight = draw(24, dtype=torch.bfloat16, device="cuda")
    assert not fused.turns(draw(2, 5, 1, 24, device="cuda"), (x, weight, weight))
    with torch.enable_grad():
        assert not fused.fuses(x)
    assert not fused.fuses(x.float())


@GPU
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@torch.no_grad()
def test_numbers_in_8_bits_are_widened(code):
    codes = (50 * draw(33, 1056)).cuda().clamp(-100, 100).to(code)
    for groups in (1, 3):
        scales = draw(33, groups, device="cuda").abs()
        exact = codes.double() * scales.double().repeat_interleave(1056 // groups, dim=1)
        assert fused.widens(codes, torch.bfloat16)
        near(fused.widened(codes, scales, torch.bfloat16), exact, torch.bfloat16)


def near(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    spacing = torch.finfo(dtype).eps
    assert ((ours.double() - exact).abs() <= 0.51 * spacing * exact.abs() + 1e-4).all()
