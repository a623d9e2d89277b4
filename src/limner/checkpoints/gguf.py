"""GGUF, the container of ggml and llama.cpp, versions 2 and 3: its tensors, mapped, under the names of published files.

A header of keys with values and of tensors, then the data (the specification is docs/gguf.md of ggml). Axes are the
other way round than torch's. Networks keep their authors' names in it, T5 has those of llama.cpp.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import CheckpointMismatch, FileProblem
from limner.nn.quantized import BLOCKS, Quantized

MAGIC = b"GGUF"
MOST, LONGEST, DEEPEST = 1_000_000, 100_000, 4
"""Entries of a header, characters of a name, axes of a tensor."""
PLAIN = {0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
         28: torch.float64, 30: torch.bfloat16}  # fmt: skip
"""ggml's numbers of types that are torch's."""
CODES = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
         14: "Q6_K"}  # fmt: skip
OTHERS = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
          22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}  # fmt: skip
"""Types that are not read."""
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SHAPES = "comfy.gguf.orig_shape."
"""Before the name of a tensor: the shape that it had before it was made flat."""
T5 = {
    "token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm", "output": "lm_head",
}  # fmt: skip
T5_BLOCK = {
    "attn_q": "0.SelfAttention.q", "attn_k": "0.SelfAttention.k", "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o", "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm", "ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo", "ffn_norm": "1.layer_norm",
}  # fmt: skip
BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")


class _Header:
    """Reads numbers and strings, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 4

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return value

    def skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise ValueError("it ends early")

    def string(self, keep: bool = True) -> str:
        length = self.number("Q")
        start = self.place
        self.skip(length)
        if not keep:
            return ""
        if length > LONGEST:
            raise ValueError(f"a name of {length} characters")
        return self.data[start : self.place].decode()

    def value(self, wanted: bool) -> Any:
        """What a key has; of arrays, which may be long, those of numbers, if `wanted`."""
        kind = self.number("I")
        if kind == STRING:
            return self.string(keep=False)
        if kind != ARRAY:
            return self.number(VALUES[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            for _ in range(_few(count)):
                self.string(keep=False)
            return None
        size = struct.calcsize(VALUES[kind])  # arrays of arrays are in no such file
        if wanted and count <= DEEPEST:
            return [self.number(VALUES[kind]) for _ in range(count)]
        return self.skip(count * size)


def _few(count: int) -> int:
    if count > MOST:
        raise ValueError(f"{count} entries")
    return count


def is_gguf(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(4) == MAGIC


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; a quantised one is a `limner.nn.quantized.Quantized`. Raises FileProblem for a file that
    is not whole, CheckpointMismatch for one in types that are not read."""
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            rows, shapes, start, size = _header(_Header(data), path)
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        found = {name: _tensor(mapped[start:], shapes, name, *row) for name, row in rows.items()}
    except (struct.error, ValueError, KeyError, OSError, RuntimeError) as error:
        reason = f"no such type as {error}" if isinstance(error, KeyError) else str(error).splitlines()[0][:200]
        raise FileProblem(f"{path} is not a whole GGUF file ({reason}): get it again") from error
    if any(name.startswith("enc.blk.") for name in found):
        found = {t5_name(name): tensor for name, tensor in found.items()}
    return found


Row = tuple[int, tuple[int, ...], int]
"""Of a tensor: the number of its type, its shape, and where it begins in the data."""


def _header(header: _Header, path: Path) -> tuple[dict[str, Row], dict[str, list[int]], int, int]:
    """The tensors, shapes that some had once, where data begins, and how large the file is."""
    version, count, keys = header.number("I"), header.number("Q"), header.number("Q")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version if version < 1 << 16 else 'for big-endian machines'}, not 2 or 3")
    alignment, shapes = 32, {}
    for _ in range(_few(keys)):
        key = header.string()
        value = header.value(wanted=key.startswith(SHAPES))
        if key == "general.alignment":
            alignment = value
        elif key.startswith(SHAPES) and isinstance(value, list):
            shapes[key.removeprefix(SHAPES)] = value
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise ValueError(f"its alignment is {alignment!r:.40}")
    rows: dict[str, Row] = {}
    for _ in range(_few(count)):
        name, axes = header.string(), header.number("I")
        if axes > DEEPEST or name in rows:
            raise ValueError(f"{name!r:.100} has {axes} axes, or is there twice")
        shape = tuple(header.number("Q") for _ in range(axes))[::-1]
        rows[name] = header.number("I"), shape, header.number("Q")
    kinds = {kind for kind, _, _ in rows.values()} - CODES.keys() - PLAIN.keys()
    unread = sorted(OTHERS.get(kind, f"type {kind}") for kind in kinds)
    if unread:
        raise CheckpointMismatch(
            f"{path} is quantised as {' and '.join(unread)} of GGUF, which is not read here: get it in Q8_0, Q6_K, "
            "Q5_K, Q4_K or F16"
        )
    start = -(-header.place // alignment) * alignment
    for name, (kind, shape, place) in rows.items():
        if place % alignment or start + place + _bytes(name, kind, shape) > len(header.data):
            raise ValueError(f"{name!r:.100} is not where it says, or the file is cut off")
    return rows, shapes, start, len(header.data)


def _bytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind not in CODES:
        return math.prod(shape) * PLAIN[kind].itemsize
    code = BLOCKS[CODES[kind]]
    if not shape or shape[-1] % code.values:
        raise ValueError(f"{name!r:.100} is {shape}, which is no multiple of {code.values} numbers of {CODES[kind]}")
    return math.prod(shape) // code.values * code.bytes


def _tensor(
    data: Tensor, shapes: dict[str, list[int]], name: str, kind: int, shape: tuple[int, ...], place: int
) -> Tensor:
    stored = data[place : place + _bytes(name, kind, shape)]
    whole = shapes.get(name, shape)
    if math.prod(whole) != math.prod(shape) or min(whole, default=1) < 0:
        raise ValueError(f"{name!r:.100} is {shape}, and was {tuple(whole)} once, they say")
    if kind in PLAIN:
        return stored.view(PLAIN[kind]).view(*whole)
    code = BLOCKS[CODES[kind]]
    rows = whole[0] if len(whole) == 2 and whole[1] % code.values == 0 else math.prod(shape[:-1])
    return Quantized(CODES[kind], stored.view(rows, -1), None, None, torch.Size(whole))  # type: ignore[return-value]


def t5_name(name: str) -> str:
    """The name in transformers' files of a tensor of T5 in llama.cpp's."""
    if match := BLOCK.fullmatch(name):
        return f"encoder.block.{match[1]}.layer.{T5_BLOCK.get(match[2], match[2])}.weight"
    whole, _, kind = name.rpartition(".")
    if name.startswith("dec."):
        return f"decoder.{name.removeprefix('dec.')}"
    return f"{T5.get(whole, whole)}.{kind}"
