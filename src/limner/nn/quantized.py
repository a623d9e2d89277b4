"""Matrices in few bits: kept as files store them, expanded to the type of what they are multiplied with when they are.

A matrix lies row by row in bytes: numbers of 8 bits, a scale for each row; numbers of 4 bits that stand for places in a
table, a scale for each group (NF4, arXiv:2305.14314); or the blocks of GGUF, which hold their scales. So rows can be
taken and joined in every kind. GGUF's layouts are those of ggml (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limner.nn import fused

AT_ONCE = 1 << 24
"""Numbers that are expanded in float32 at a time, which bounds what that takes."""
LEAST = 1 << 14
"""Numbers of the smallest matrix that `quantize_` changes."""
FP8_MAX = 448.0


@dataclass(frozen=True)
class Code:
    """A block is `values` numbers in `bytes` bytes; of blocks (n, bytes), `expand` makes (n, values) in float32."""

    values: int
    bytes: int
    expand: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix (or what is flattened to one) of `shape` in a `code`, of `BYTES`, `TABLED` or `BLOCKS`: `codes` (rows,
    bytes) in uint8, `scales` (rows, groups) in float32 or None where there are none, and the `table` of one that has
    one. It answers what readers of files ask of tensors; where they ask for numbers, it is expanded."""

    code: str
    codes: Tensor
    scales: Tensor | None
    table: Tensor | None
    shape: torch.Size

    @property
    def dtype(self) -> str:
        return self.code

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """What it stands for is."""
        return True

    @property
    def in_rows(self) -> bool:
        """Whether it is a matrix whose rows are those of `codes`."""
        return self.dim() == 2 and len(self.codes) == self.shape[0]

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All numbers, each rounded once to `dtype`."""
        return expanded(self.code, self.codes, self.scales, self.table, dtype).reshape(self.shape)

    def to(self, *where: Any, **more: Any) -> Tensor:
        dtype = next((one for one in (*where, *more.values()) if isinstance(one, torch.dtype)), torch.float32)
        return self.whole(dtype).to(*where, **more)

    def float(self) -> Tensor:
        return self.whole()

    def rows(self, first: int, last: int) -> Quantized:
        assert self.in_rows, "rows of what is no matrix"
        scales = None if self.scales is None else self.scales[first:last]
        shape = torch.Size((last - first, self.shape[1]))
        return Quantized(self.code, self.codes[first:last], scales, self.table, shape)

    def joins(self, other: Quantized) -> bool:
        """Whether both can be rows of one."""
        one, two = ((q.code, q.shape[1:], q.in_rows, None if q.scales is None else q.scales.shape[1])
                    for q in (self, other))  # fmt: skip
        if one != two or not self.in_rows:
            return False
        return self.table is None or (other.table is not None and torch.equal(self.table, other.table))


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Rows of all, one after the other; each `joins` the first."""
    first = parts[0]
    scales = None if first.scales is None else torch.cat([part.scales for part in parts])  # type: ignore[misc]
    shape = torch.Size((sum(part.shape[0] for part in parts), first.shape[1]))
    return Quantized(first.code, torch.cat([part.codes for part in parts]), scales, first.table, shape)


# -------------------------------------------------------------------- expanding


def expanded(code: str, codes: Tensor, scales: Tensor | None, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers of codes (rows, bytes) in `dtype`, (rows, columns)."""
    if code in BYTES:
        if scales is not None and fused.widens(codes, dtype):
            return fused.widened(codes.view(BYTES[code]), scales, dtype)
        whole = codes.view(BYTES[code]).to(dtype)  # exact
        return whole if scales is None else whole.mul_(scales)  # in float32, rounded once
    if code in TABLED:

        def some(codes: Tensor, scales: Any) -> Tensor:
            assert table is not None
            numbers = table[torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).int()]
            return (numbers.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1)

        columns = 2 * codes.shape[1]
    else:
        block = BLOCKS[code]

        def some(codes: Tensor, scales: Any) -> Tensor:
            return block.expand(codes.reshape(-1, block.bytes)).view(len(codes), -1)

        columns = codes.shape[1] // block.bytes * block.values
    step = max(AT_ONCE // max(columns, 1), 1)
    if len(codes) <= step:
        return some(codes, scales).to(dtype)
    whole = codes.new_empty(len(codes), columns, dtype=dtype)
    for k in range(0, len(codes), step):
        whole[k : k + step] = some(codes[k : k + step], None if scales is None else scales[k : k + step])
    return whole


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of every block (n, 1), as float32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def parted(codes: Tensor, width: int, bits: int) -> Tensor:
    """Bytes (n, k) that hold numbers of so many bits, the lowest first -> (n, k / width, 8 / bits, width): of every
    `width` bytes the first numbers, then the second ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(1, (-1, 1, width)) >> shifts[:, None]) & ((1 << bits) - 1)


def q4(blocks: Tensor, head: int) -> Tensor:
    return parted(blocks[:, head : head + 16], 16, 4).flatten(1)


def q5(blocks: Tensor, head: int) -> Tensor:
    """As `q4`, with a fifth bit each in the four bytes before."""
    return q4(blocks, head + 4) | (parted(blocks[:, head : head + 4], 1, 1).flatten(1) << 4)


def q2_k(blocks: Tensor) -> Tensor:
    scales, numbers = blocks[:, :16], parted(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16).float()
    scale, least = half(blocks, 80) * (scales & 15).float(), half(blocks, 82) * (scales >> 4).float()
    return (scale[:, :, None] * numbers - least[:, :, None]).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    low, high = parted(blocks[:, 96:104], 8, 4).flatten(1), parted(blocks[:, 104:108], 4, 2).flatten(1)
    scales = half(blocks, 108) * ((low | high << 4).to(torch.int8) - 32).float()
    unset = parted(blocks[:, :32], 32, 1).reshape(-1, 16, 16) ^ 1
    numbers = parted(blocks[:, 32:96], 32, 2).reshape(-1, 16, 16).to(torch.int8) - (unset << 2).to(torch.int8)
    return (scales[:, :, None] * numbers.float()).flatten(1)


def of_k(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Of Q4_K and Q5_K, which differ in their numbers (n, 8, 32): scales and minima have six bits each."""
    first, second, third = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1).float()
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1).float()
    scale, least = half(blocks, 0) * scales, half(blocks, 2) * minima
    return (scale[:, :, None] * numbers.float() - least[:, :, None]).flatten(1)


def q4_k(blocks: Tensor) -> Tensor:
    return of_k(blocks, parted(blocks[:, 16:144], 32, 4).flatten(1, 2))


def q5_k(blocks: Tensor) -> Tensor:
    fifth = parted(blocks[:, 16:48], 32, 1).flatten(1, 2)
    return of_k(blocks, parted(blocks[:, 48:176], 32, 4).flatten(1, 2) | (fifth << 4))


def q6_k(blocks: Tensor) -> Tensor:
    low, high = parted(blocks[:, :128], 64, 4).reshape(-1, 16, 16), parted(blocks[:, 128:192], 32, 2)
    numbers = (low | (high.reshape(-1, 16, 16) << 4)).to(torch.int8) - 32
    scales = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scales[:, :, None] * numbers.float()).flatten(1)


BYTES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
"""Codes of one number a byte, and what it is."""
TABLED = ("nf4", "fp4")
"""Codes of two a byte, the first in the high bits."""
BLOCKS = {
    "Q4_0": Code(32, 18, lambda x: half(x, 0) * (q4(x, 2).to(torch.int8) - 8).float()),
    "Q4_1": Code(32, 20, lambda x: half(x, 0) * q4(x, 4).float() + half(x, 2)),
    "Q5_0": Code(32, 22, lambda x: half(x, 0) * (q5(x, 2).to(torch.int8) - 16).float()),
    "Q5_1": Code(32, 24, lambda x: half(x, 0) * q5(x, 4).float() + half(x, 2)),
    "Q8_0": Code(32, 34, lambda x: x[:, 2:].view(torch.int8).float() * half(x, 0)),
    "Q2_K": Code(256, 84, q2_k),
    "Q3_K": Code(256, 110, q3_k),
    "Q4_K": Code(256, 144, q4_k),
    "Q5_K": Code(256, 176, q5_k),
    "Q6_K": Code(256, 210, q6_k),
}
"""Codes of GGUF."""


# -------------------------------------------------------------------- making


def of_bytes(weight: Tensor, scales: Tensor | None = None) -> Quantized:
    """A matrix of one number a byte, `scales` (rows, 1) of its rows."""
    code = next(code for code, dtype in BYTES.items() if dtype == weight.dtype)
    return Quantized(code, weight.contiguous().view(torch.uint8), scales, None, weight.shape)


def to_fp8(weight: Tensor) -> Quantized:
    """A matrix in e4m3, the largest number of each row at the end of its range."""
    wide = weight.detach().float()
    scales = (wide.abs().amax(1, keepdim=True) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return of_bytes((wide / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales)


@torch.no_grad()
def quantize_(network: nn.Module, device: torch.device | None = None, least: int = LEAST) -> int:
    """Keep the matrices of a network's `limner.nn.linear.Linear` of `least` numbers or more as `to_fp8` makes them, one
    by one on a `device`, which is quicker on a GPU. Returns how many."""
    from limner.nn.linear import Linear

    large = [m for m in network.modules() if isinstance(m, Linear) and not m.code and m.weight.numel() >= least]
    for module in large:
        there = module.weight.device
        module.keep(to_fp8(module.weight.to(device or there)))
        module.to(there)
    return len(large)
