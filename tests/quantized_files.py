"""Quantised files as other programs write them, of weights of any kind."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.checkpoints.gguf import CODES, PLAIN
from limner.nn.quantized import BLOCKS, Quantized

NUMBERS = {name: number for number, name in CODES.items()} | {
    str(dtype).removeprefix("torch."): number for number, dtype in PLAIN.items()
}
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # fmt: skip
"""Bytes of a block where its scales in float16 are."""
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip


def blocks(shape: tuple[int, ...], kind: str, generator: torch.Generator, scale: float = 1e-3) -> Quantized:
    """A matrix of random codes, its largest numbers some hundred times `scale`."""
    code = BLOCKS[kind]
    rows, count = math.prod(shape[:-1]), shape[-1] // code.values
    raw = torch.randint(0, 256, (rows * count, code.bytes), generator=generator, dtype=torch.uint8)
    for at in HALVES[kind]:
        half = (scale * torch.rand(rows * count, 1, generator=generator)).half()
        raw[:, at : at + 2] = half.view(torch.uint8)
    return Quantized(kind, raw.view(rows, -1), None, None, torch.Size(shape))


def gguf(path: Path, tensors: Mapping[str, Tensor | Quantized], **keys: Any) -> Path:
    """A file of version 3. `keys` are strings, whole numbers, or lists of either."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(one: Any) -> bytes:
        if isinstance(one, str):
            return struct.pack("<I", 8) + text(one)
        if isinstance(one, int):
            return struct.pack("<II", 4, one)
        items = [value(item) for item in one]
        kind = items[0][:4] if items else struct.pack("<I", 8)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(text(name.replace("__", ".")) + value(one) for name, one in keys.items())
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantized):
            number, raw = NUMBERS[tensor.code], tensor.codes
        else:
            number, raw = NUMBERS[str(tensor.dtype).removeprefix("torch.")], tensor.contiguous().flatten()
        shape = tuple(tensor.shape)[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, len(data))
        data += raw.flatten().view(torch.uint8).numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def fp8(name: str, weight: Tensor, spelling: str) -> dict[str, Tensor]:
    """A matrix in e4m3 with one scale, as ComfyUI "scaled" or "weight_scale" spells it, or "plain" without."""
    if spelling == "plain":
        return {name: weight.to(torch.float8_e4m3fn)}
    base = name.removesuffix(".weight")
    scale = weight.abs().max() / 448
    whole = (weight / scale).to(torch.float8_e4m3fn)
    if spelling == "scaled":
        return {name: whole, f"{base}.scale_weight": scale, f"{base}.scale_input": torch.tensor(1.0)}
    told = json.dumps({"format": "float8_e4m3fn"}).encode()
    return {name: whole, f"{base}.weight_scale": scale[None], f"{base}.input_scale": torch.tensor([1.0]),
            f"{base}.comfy_quant": torch.tensor(list(told), dtype=torch.uint8)}  # fmt: skip


def int8(name: str, weight: Tensor, spelling: str = "weight_scale") -> dict[str, Tensor]:
    """A matrix in int8, a scale for each row."""
    peak = weight.abs().amax(1, keepdim=True)
    whole = (weight / peak * 127).round().to(torch.int8)
    scale = peak[:, 0] if spelling == "SCB" else peak / 127
    return {name: whole, f"{name.removesuffix('.weight')}.{spelling}": scale}


def nf4(name: str, weight: Tensor, nested: bool, size: int = 64) -> dict[str, Tensor]:
    """A matrix as bitsandbytes writes it, the largest numbers of groups `nested` in 8 bits or not."""
    table = torch.tensor(NF4)
    groups = weight.float().reshape(-1, size)
    peaks = groups.abs().amax(1)
    index = torch.bucketize(groups / peaks[:, None], (table[1:] + table[:-1]) / 2).flatten().to(torch.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "float32", "shape": list(weight.shape)}
    stored = {name: (index[0::2] << 4 | index[1::2])[:, None], f"{name}.quant_map": table}
    if nested:
        steps = torch.linspace(-1, 1, 256)
        offset = peaks.mean()
        chunks = (peaks - offset).split(256)
        tops = torch.stack([chunk.abs().max().clamp_min(1e-8) for chunk in chunks])
        each = torch.cat([c / top for c, top in zip(chunks, tops, strict=True)])
        stored[f"{name}.absmax"] = torch.bucketize(each, (steps[1:] + steps[:-1]) / 2).to(torch.uint8)
        stored |= {f"{name}.nested_absmax": tops, f"{name}.nested_quant_map": steps}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        stored[f"{name}.absmax"] = peaks
    stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored
