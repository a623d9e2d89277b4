"""Weights in few bits: our own files', restored to float32 when loaded, and other programs', gathered into one kind.

Ours are symmetric and linear: w = q * scale, with q in [-127, 127] or [-7, 7]. 8 bits have one scale for each row of
the first axis, 4 bits one for each group of 32 along the flattened rest. On disk `name` holds q (two 4-bit values a
byte, low nibble first) and `name.scale` the float16 scales.

Other programs' lie with what belongs to them in tensors beside: `gathered` makes a `limner.nn.quantized.Quantized` of
each, and refuses by name what nobody here can read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import CheckpointMismatch
from limner.nn.quantized import BYTES, TABLED, Quantized, of_bytes

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


# -------------------------------------------------------------------- of other programs

SCALES = ("scale_weight", "weight_scale", "weight.scale", "scale", "SCB")
"""Of a matrix of one number a byte, beside its `weight`: ComfyUI's old name and new, others', and bitsandbytes', which
is 127 times as large."""
INPUTS = ("scale_input", "input_scale", "comfy_quant", "weight_format")
"""What is beside it that is of no use here."""
MARKER = "scaled_fp8"
STATE = "quant_state.bitsandbytes__"
KNOWN = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_rowwise")
"""ComfyUI's formats that are read."""
UNREAD: list[tuple[str, tuple[str, ...]]] = [  # the first of which all endings are there
    ("SVDQuant (nunchaku)", (".qweight", ".wscales")),
    ("SVDQuant (nunchaku)", (".qweight", ".smooth_factor")),
    ("GPTQ", (".qweight", ".g_idx")),
    ("AWQ", (".qweight", ".qzeros")),
    ("a way that packs numbers into qweight", (".qweight",)),
    ("NVFP4", (".weight_scale_2",)),
    ("fp8 in blocks", (".weight_scale_inv",)),
    ("fp8 of smoothed weights", (".pre_quant_scale",)),
    ("MXFP4", ("_blocks", "_scales")),
    ("HQQ", (".W_q",)),
    ("Quanto", (".weight._data",)),
    ("compressed-tensors", (".weight_packed",)),
    ("a way with zero points", (".weight_zero_point",)),
]
"""Quantisations that are told by the names of their tensors, and not read."""
ALONE = {getattr(torch, name, None): title for name, title in (("float4_e2m1fn_x2", "FP4"), ("float8_e8m0fnu", "MX"),
                                                               ("float8_e4m3fnuz", "AMD's fp8"))}  # fmt: skip
"""And by their types."""


def gathered(stored: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path | str) -> dict[str, Tensor]:
    """The tensors of a file of another program, each quantised weight with what belongs to it as one `Quantized` (they
    stand for tensors here). fp8 without scales stays as it is. Raises CheckpointMismatch for quantisations that are not
    read, by name, and for scales that cannot be."""
    refuse(stored, metadata, source)
    found = {name: t for name, t in stored.items() if name.rpartition(".")[2] != MARKER}
    for name in [name for name in found if name.endswith(".weight")]:
        base = name.removesuffix(".weight")
        kind = next((kind for kind in TABLED if f"{name}.{STATE}{kind}" in stored), None)
        if kind is not None:
            mine = {rest.removeprefix(f"{name}."): found.pop(rest) for rest in _beside(stored, name)}
            found[name] = _four_bits(stored[name], mine, kind, name, source)  # type: ignore[assignment]
            continue
        eight = stored[name].dtype in BYTES.values()
        named = next((end for end in SCALES if f"{base}.{end}" in stored and (eight or end == SCALES[0])), None)
        if named is not None:
            scale = found.pop(f"{base}.{named}").float() / (127 if named == "SCB" else 1)
            found[name] = _scaled(stored[name], scale, name, source)  # type: ignore[assignment]
            for end in INPUTS:
                found.pop(f"{base}.{end}", None)
    return found


def _beside(stored: Mapping[str, Tensor], name: str) -> list[str]:
    ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + kind for kind in TABLED))
    return [f"{name}.{end}" for end in ends if f"{name}.{end}" in stored]


def refuse(stored: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path | str) -> None:
    """Raises CheckpointMismatch for a quantisation that is not read."""
    told = next(((ALONE[t.dtype], name) for name, t in stored.items() if t.dtype in ALONE), None)
    for title, endings in UNREAD if told is None else ():
        first = [next((name for name in stored if name.endswith(ending)), "") for ending in endings]
        if all(first):
            told = title, first[0]
            break
    formats = {name: _json(bytes(t.tolist())) for name, t in stored.items() if _is_format(name, t)}
    layers = _json(metadata.get("_quantization_metadata", "{}").encode()).get("layers", {})
    formats |= {name: one for name, one in layers.items() if isinstance(one, dict)} if isinstance(layers, dict) else {}
    for name, one in formats.items() if told is None else ():
        if one.get("format") not in KNOWN or one.get("convrot"):
            turned = " of turned weights (convrot)" if one.get("convrot") else ""
            told = f"{one.get('format')!r:.60}{turned}", name
    if told is not None:
        raise CheckpointMismatch(
            f"{source} is quantised as {told[0]}, which is not read here (first: {told[1]:.200}): get it in 16 bits, "
            "fp8, int8, nf4 or GGUF"
        )


def _is_format(name: str, tensor: Tensor) -> bool:
    return name.endswith(".comfy_quant") and tensor.dtype == torch.uint8 and tensor.numel() < 10_000


def _json(text: bytes) -> dict[str, Any]:
    """An object, empty for what is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _scaled(weight: Tensor, scale: Tensor, name: str, source: Path | str) -> Tensor | Quantized:
    """A matrix, or whatever else, times one number or one for each row."""
    rows = len(weight) if weight.dim() else 1
    if scale.numel() != 1 and tuple(scale.shape) not in ((rows,), (rows, 1)):
        raise CheckpointMismatch(
            f"{source}: the scale of {name} is {tuple(scale.shape)}, where one number is wanted, or one for each of "
            f"{rows} rows"
        )
    if not scale.isfinite().all():
        raise CheckpointMismatch(f"{source}: the scale of {name} is no number (NaN or infinite): it is damaged")
    if weight.dtype not in BYTES.values() or weight.dim() < 2:
        return (weight.float() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(_wide(weight.dtype))
    flat = of_bytes(weight.flatten(1), scale.reshape(-1, 1).expand(rows, 1).contiguous())
    return Quantized(flat.code, flat.codes, flat.scales, None, weight.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in BYTES.values() else dtype


def _four_bits(codes: Tensor, beside: Mapping[str, Tensor], kind: str, name: str, source: Path | str) -> Quantized:
    """A weight of bitsandbytes: two numbers a byte, the largest of each group beside, which may be quantised too."""
    state = _json(bytes(beside[STATE + kind].tolist()) if beside[STATE + kind].dtype == torch.uint8 else b"")
    try:
        shape = torch.Size(state["shape"])
        if min(shape) < 1:
            raise ValueError
        size, table, peaks = state["blocksize"], beside["quant_map"].float(), beside["absmax"]
        groups = math.prod(shape) // size
        whole = type(size) is int and size % 2 == 0 and groups * size == math.prod(shape) == 2 * codes.numel()
        if not whole or codes.dtype != torch.uint8 or table.shape != (16,) or peaks.shape != (groups,):
            raise ValueError
        if "nested_absmax" in beside:
            each = beside["nested_absmax"].float()[torch.arange(groups) // int(state["nested_blocksize"])]
            peaks = beside["nested_quant_map"].float()[peaks.int()] * each + float(state["nested_offset"])
        peaks = peaks.float()
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointMismatch(f"{source}: the {kind} weight {name} is not as its quant_state says") from error
    if not (peaks.isfinite().all() and table.isfinite().all()):
        raise CheckpointMismatch(f"{source}: the scale of {name} is no number (NaN or infinite): it is damaged")
    rows = shape[0] if len(shape) == 2 and shape[1] % size == 0 else 1
    return Quantized(kind, codes.reshape(rows, -1), peaks.view(rows, -1), table, shape)
