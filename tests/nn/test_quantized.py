"""Matrices in few bits: every code by hand, and the layer that keeps one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limner.devices import bytes_of
from limner.nn.linear import Linear
from limner.nn.quantized import AT_ONCE, BLOCKS, Quantized, expanded, of_bytes, quantize_, to_fp8
from quantized_files import HALVES, blocks


def half(number: float) -> list[int]:
    return torch.tensor([number]).half().view(torch.uint8).tolist()


def alone(kind: str, raw: list[int]) -> torch.Tensor:
    """The numbers of one block."""
    return expanded(kind, torch.tensor([raw], dtype=torch.uint8), None, None, torch.float32)[0]


def filled(size: int, **places: int) -> list[int]:
    return [places.get(f"b{k}", 0) for k in range(size)]


# ------------------------------------------------------------------ by hand


def test_blocks_of_4_bits_hold_the_first_half_in_the_low_bits():
    numbers = alone("Q4_0", half(0.5) + filled(16, b0=0x3F, b15=0xA1))
    assert numbers[[0, 16, 15, 31]].tolist() == [3.5, -2.5, -3.5, 1.0]  # 15 - 8, 3 - 8, 1 - 8, 10 - 8, halved
    assert numbers[1] == -4
    numbers = alone("Q4_1", half(0.5) + half(10) + filled(16, b0=0x3F))
    assert numbers[[0, 16, 1]].tolist() == [17.5, 11.5, 10]


def test_blocks_of_5_bits_hold_the_fifth_apart():
    numbers = alone("Q5_0", [*half(1), 0b10, 0, 0, 0x80, *filled(16, b1=0x04, b15=0x70)])
    assert numbers[[0, 1, 17, 31, 15]].tolist() == [-16, 4, -16, 7, -16]  # 4 + 16 - 16, 7 + 16 - 16
    numbers = alone("Q5_1", [*half(1), *half(-1), 1, 0, 0, 0, *filled(16, b0=0x23)])
    assert numbers[[0, 16, 1]].tolist() == [18, 1, -1]


def test_blocks_of_8_bits_are_signed():
    assert alone("Q8_0", half(0.25) + filled(32, b0=4, b1=252))[:3].tolist() == [1, -1, 0]


def test_blocks_of_2_bits_have_a_scale_and_a_least_for_sixteen():
    scales = filled(16, b0=0x12, b1=0x01, b2=0x03)  # of the first sixteen 2, less 1 minimum; then 1; then 3
    numbers = alone("Q2_K", scales + filled(64, b0=0b1110_0111, b16=0b01) + half(0.5) + half(0.25))
    # the first numbers of four groups of 32 lie in one byte, the lowest bits first
    assert numbers[[0, 32, 1, 16]].tolist() == [0.5 * 2 * 3 - 0.25, 0.5 * 3 * 1, -0.25, 0.5]


def test_blocks_of_3_bits_take_4_away_where_a_bit_is_not_set():
    mask = filled(32, b0=0b1)
    numbers = alone("Q3_K", mask + filled(64, b0=0b11_10) + filled(12, b0=0x0F, b8=0b10) + half(1))
    assert numbers[0] == (0x0F + 0x20 - 32) * 2  # the bit is set: 2
    assert numbers[1] == 15 * -4
    assert numbers[32] == -32 * (3 - 4)  # the third group of sixteen has the scale 0 - 32


def test_blocks_of_k_have_scales_of_6_bits():
    scales = filled(12, b0=0b11_000101, b4=0b01_000010, b8=0x21)
    # 0: scale 5, least 2; 4: scale 1 + 48, least 2 + 16
    numbers = alone("Q4_K", half(1) + half(0.5) + scales + filled(128, b0=0x03, b64=0x07))
    assert numbers[[0, 1, 128]].tolist() == [5 * 3 - 1, -1, 49 * 7 - 9]
    numbers = alone("Q5_K", half(1) + half(0.5) + scales + filled(32, b0=0b10001) + filled(128, b0=0x03, b64=0x07))
    assert numbers[[0, 1, 128]].tolist() == [5 * 19 - 1, -1, 49 * 23 - 9]


def test_blocks_of_6_bits_take_32_away():
    low, high = filled(128, b0=0x51, b32=0x0F), filled(64, b0=0b00_10_00_11)
    numbers = alone("Q6_K", low + high + filled(16, b0=2, b2=255, b4=1) + half(0.5))
    assert numbers[0] == (1 + 48 - 32) * 2 * 0.5
    assert numbers[32] == (15 - 32) * -1 * 0.5  # the second 32, whose first two bits are 0, at scale -1
    assert numbers[64] == (5 + 32 - 32) * 0.5


def test_four_bits_of_a_table_come_high_bits_first():
    table = torch.arange(16.0)
    codes, scales = torch.tensor([[0x12, 0x3F], [0xA0, 0x0B]], dtype=torch.uint8), torch.tensor([[1.0, 10], [2, 0.5]])
    numbers = expanded("nf4", codes, scales, table, torch.float32)
    assert numbers.tolist() == [[1, 2, 30, 150], [20, 0, 0, 5.5]]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_is_exact_in_half_precision(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    q = of_bytes(every.view(dtype))
    numbers = every.view(dtype).float()
    for wider in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(q.whole(wider).float().nan_to_num(7.0), numbers.nan_to_num(7.0))


def test_a_scaled_number_is_rounded_once():
    torch.manual_seed(0)
    whole, scales = torch.randint(-127, 128, (64, 96), dtype=torch.int8), torch.rand(64, 1)
    assert torch.equal(of_bytes(whole, scales).whole(torch.bfloat16), (whole.float() * scales).bfloat16())


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_equal_those_of_the_gguf_package_bit_for_bit(kind):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    q = blocks((5, 3 * BLOCKS[kind].values), kind, torch.Generator().manual_seed(1), scale=10.0)
    theirs = quants.dequantize(q.codes.numpy(), constants.GGMLQuantizationType[kind])
    assert torch.equal(q.whole(), torch.from_numpy(theirs))


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "nf4"])
def test_what_is_expanded_in_pieces_is_the_same(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    if kind == "nf4":
        codes = torch.randint(0, 256, (7, 256), generator=generator, dtype=torch.uint8)
        scales, table = torch.rand(7, 8, generator=generator), torch.arange(16.0)
        q = Quantized(kind, codes, scales, table, torch.Size((7, 512)))
    else:
        q = blocks((7, 512), kind, generator)
    whole = q.whole(torch.bfloat16)
    monkeypatch.setattr("limner.nn.quantized.AT_ONCE", 1024)
    assert q.numel() < AT_ONCE
    assert torch.equal(q.whole(torch.bfloat16), whole)


def test_rows_can_be_taken_and_joined():
    from limner.nn.quantized import joined

    for q in (blocks((8, 256), "Q3_K", torch.Generator().manual_seed(0)), to_fp8(torch.randn(8, 256))):
        assert torch.equal(joined([q.rows(5, 8), q.rows(0, 5)]).whole(), q.whole().roll(3, 0))


# ---------------------------------------------------------------- the layer


def kept(q: Quantized, bias: bool = True) -> Linear:
    torch.manual_seed(2)
    layer = Linear(q.shape[1], q.shape[0], bias=bias)
    layer.keep(q)
    return layer


@pytest.mark.parametrize("kind", [*HALVES, "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_with_the_expanded_matrix(kind, bias):
    generator = torch.Generator().manual_seed(0)
    q = to_fp8(torch.randn(24, 512, generator=generator)) if kind == "fp8" else blocks((24, 512), kind, generator)
    layer, plain = kept(q, bias), Linear(512, 24, bias=bias)
    plain.weight.data = q.whole()
    if bias:
        plain.bias.data = layer.bias.data
    x = torch.randn(3, 5, 512)
    with torch.inference_mode():
        assert torch.equal(layer(x), plain(x))
        narrow = nn.functional.linear(x.bfloat16(), q.whole(torch.bfloat16), layer.bias.bfloat16() if bias else None)
        assert torch.equal(layer.bfloat16()(x.bfloat16()), narrow)


def test_no_change_of_type_touches_what_is_kept():
    q = to_fp8(torch.randn(32, 64))
    layer = kept(q)
    for change in (nn.Module.half, nn.Module.double, nn.Module.bfloat16, nn.Module.float):
        change(layer)
    assert torch.equal(layer.quantized.whole(), q.whole())
    assert bytes_of(layer) == 32 * 64 + 32 * 4 + 32 * 4
    assert list(layer.state_dict()) == ["bias"]


def test_a_weight_put_there_comes_first_and_can_be_taken_away():
    layer = kept(to_fp8(torch.randn(32, 64)), bias=False)
    x = torch.randn(2, 64)
    before = layer(x)
    layer.weight = nn.Parameter(torch.ones(32, 64))
    assert torch.allclose(layer(x), x.sum(1, keepdim=True).expand(2, 32), atol=1e-5)
    layer.weight = None
    assert torch.equal(layer(x), before)


def test_gradients_reach_what_it_is_told():
    layer = kept(to_fp8(torch.randn(32, 64)))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.quantized.whole().sum(0).expand(2, 64), atol=1e-5)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0", "fp8"])
def test_it_compiles_without_a_break_and_runs_without_data(kind):
    q = to_fp8(torch.randn(16, 256)) if kind == "fp8" else blocks((16, 256), kind, torch.Generator().manual_seed(0))
    layer, x = kept(q).bfloat16(), torch.randn(2, 256).bfloat16()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert layer.to("meta")(x.to("meta")).shape == (2, 16)


def test_fp8_with_a_scale_a_row_is_close_and_reaches_its_largest():
    torch.manual_seed(0)
    weight = torch.randn(40, 80) * torch.logspace(-6, 3, 40)[:, None]
    weight[3] = 0
    whole = to_fp8(weight).whole()
    assert ((whole - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) * 2**-9 / 448).all()
    assert torch.allclose(whole.abs().amax(1), weight.abs().amax(1), rtol=1e-6)


def test_quantize_changes_large_matrices_alone():
    network = nn.Sequential(Linear(64, 256), nn.Linear(256, 256), Linear(256, 8), nn.LayerNorm(8))
    whole = bytes_of(network)
    assert quantize_(network, least=4096) == 1
    assert [getattr(module, "code", "") for module in network] == ["e4m3", "", "", ""]
    assert bytes_of(network) == whole - 3 * 64 * 256 + 4 * 256
    assert quantize_(network, least=4096) == 0
