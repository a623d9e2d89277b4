"""Quantised weights of other programs: each with what is beside it, and refusals by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from limner.checkpoints.layouts import Place, read
from limner.checkpoints.quantization import gathered
from limner.errors import CheckpointMismatch
from limner.nn.quantized import Quantized
from quantized_files import blocks, fp8, int8, nf4

torch.manual_seed(0)
WEIGHT = torch.randn(16, 128) * 0.1
BESIDE = {"x.bias": torch.randn(16), "norm.scale": torch.ones(16), "norm.weight": torch.ones(16).half()}
STORED = {
    "e4m3 with ComfyUI's old scale": fp8("x.weight", WEIGHT, "scaled") | {"scaled_fp8": torch.empty(0)},
    "e4m3 with ComfyUI's new scale": fp8("x.weight", WEIGHT, "weight_scale"),
    "int8": int8("x.weight", WEIGHT),
    "int8 with the scale behind the name": int8("x.weight", WEIGHT, "weight.scale"),
    "int8 of bitsandbytes": int8("x.weight", WEIGHT, "SCB"),
    "nf4": nf4("x.weight", WEIGHT, nested=False),
    "nf4, nested": nf4("x.weight", WEIGHT, nested=True),
}
NEAR = {"e": 1 / 16, "i": 1 / 250, "n": 0.16}
"""By the first letter, how far from the weight at most, in parts of its largest number."""


@pytest.mark.parametrize("kind", STORED)
def test_a_weight_is_gathered_with_what_is_beside_it(kind):
    found = gathered(STORED[kind] | BESIDE, {}, "file")
    assert found.keys() == {"x.weight"} | BESIDE.keys()
    assert isinstance(found["x.weight"], Quantized)
    assert found["x.weight"].shape == WEIGHT.shape
    whole = found["x.weight"].float()
    assert (whole - WEIGHT).abs().max() < NEAR[kind[0]] * WEIGHT.abs().max()
    assert (whole - WEIGHT).norm() < 0.2 * WEIGHT.norm()


def test_scales_are_those_of_their_programs():
    codes = torch.tensor([[2.0, -4], [8, 16]]).to(torch.float8_e4m3fn)
    one = gathered({"x.weight": codes, "x.scale_weight": torch.tensor(0.5)}, {}, "file")["x.weight"]
    assert one.float().tolist() == [[1, -2], [4, 8]]
    rows = gathered({"x.weight": codes, "x.weight_scale": torch.tensor([[0.5], [2]])}, {}, "file")["x.weight"]
    assert rows.float().tolist() == [[1, -2], [16, 32]]
    whole = torch.tensor([[127, -127], [0, 1]], dtype=torch.int8)
    bits = gathered({"x.weight": whole, "x.SCB": torch.tensor([3.0, 254])}, {}, "file")["x.weight"]
    assert bits.float().tolist() == [[3, -3], [0, 2]]
    half = gathered({"x.weight": torch.ones(2, 2).half(), "x.scale_weight": torch.tensor(3.0)}, {}, "file")["x.weight"]
    assert half.dtype == torch.float16
    assert half.tolist() == [[3, 3], [3, 3]]


def test_nested_groups_of_nf4_by_hand():
    table, steps = torch.arange(16.0), torch.arange(256.0)
    state = {"blocksize": 2, "shape": [2, 4], "nested_blocksize": 2, "nested_offset": 0.5}
    stored = {
        "x.weight": torch.tensor([0x12, 0x34, 0x56, 0x78], dtype=torch.uint8)[:, None], "x.weight.quant_map": table,
        "x.weight.absmax": torch.tensor([1, 2, 3, 4], dtype=torch.uint8), "x.weight.nested_quant_map": steps,
        "x.weight.nested_absmax": torch.tensor([10.0, 100]),
        "x.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    whole = gathered(stored, {}, "file")["x.weight"].float()
    scales = torch.tensor([[10.5, 10.5, 20.5, 20.5], [300.5, 300.5, 400.5, 400.5]])
    assert torch.equal(whole, torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]) * scales)


def test_plain_fp8_and_all_others_stay_tensors():
    stored = fp8("x.weight", WEIGHT, "plain") | BESIDE | {"x.scale": torch.ones(1), "y.weight": WEIGHT}
    del stored["x.scale"]
    found = gathered(stored, {}, "file")
    assert found.keys() == stored.keys()
    assert all(found[name] is stored[name] for name in stored)


# ------------------------------------------------------------------ layouts


@pytest.mark.parametrize("kind", [*STORED, "Q5_0"])
def test_layouts_take_and_join_rows_of_what_is_quantised(kind):
    def one(name: str, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        if kind == "Q5_0":
            return {name: blocks((16, 128), kind, generator)}
        stored = STORED[kind]
        return gathered({n.replace("x.", name.replace("weight", "")): t for n, t in stored.items()}, {}, "file")

    tensors = one("q.weight", 0) | one("k.weight", 1) | one("v.weight", 2) | one("all.weight", 3)
    whole = {name: tensor.float() for name, tensor in tensors.items()}
    layout = {
        "qkv": Place("q.weight", then=("k.weight", "v.weight"), rows=(16, 16, 16)),
        "third": Place("all.weight", part=1, parts=4),
        "swapped": Place("all.weight", kept="swapped"),
        "turned": Place("all.weight", kept="transposed"),
        "heads": Place("all.weight", part=0, parts=2, heads=4),
    }
    ours, plain = read(layout, tensors, "file"), read(layout, whole, "file")
    for name in layout:
        assert torch.equal(ours[name].float(), plain[name])
    assert {name for name, tensor in ours.items() if isinstance(tensor, Quantized)} == {"qkv", "third", "swapped"}


def test_rows_in_two_codes_are_joined_as_numbers():
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {"q": blocks((4, 256), "Q4_K", generator), "k": blocks((4, 256), "Q6_K", generator)}
    layout = {"both": Place("q", then=("k",), rows=(4, 4))}
    assert torch.equal(read(layout, tensors, "file")["both"], torch.cat([tensors["q"].whole(), tensors["k"].whole()]))


# ----------------------------------------------------------------- refusals


def refused(stored: dict[str, Tensor], *words: str, metadata: dict[str, str] | None = None) -> None:
    with pytest.raises(CheckpointMismatch) as caught:
        gathered(stored, metadata or {}, "model.safetensors")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert all(word in message for word in ("model.safetensors", *words)), message


def told(**values: Any) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


ONE = torch.ones(1)
UNREAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "GPTQ": ({"x.qweight": ONE, "x.qzeros": ONE, "x.scales": ONE, "x.g_idx": ONE}, "GPTQ"),
    "AWQ": ({"x.qweight": ONE, "x.qzeros": ONE, "x.scales": ONE}, "AWQ"),
    "nunchaku": ({"x.qweight": ONE, "x.wscales": ONE, "x.proj_down": ONE}, "SVDQuant"),
    "some": ({"x.qweight": ONE}, "qweight"),
    "MXFP4": ({"x_blocks": ONE, "x_scales": ONE}, "MXFP4"),
    "NVFP4": ({"x.weight": ONE, "x.weight_scale": ONE, "x.weight_scale_2": ONE}, "NVFP4"),
    "in blocks": ({"x.weight": ONE, "x.weight_scale_inv": ONE}, "fp8 in blocks"),
    "HQQ": ({"x.W_q": ONE, "x.meta": ONE}, "HQQ"),
    "Quanto": ({"x.weight._data": ONE, "x.weight._scale": ONE}, "Quanto"),
    "of ComfyUI": ({"x.weight": ONE, "x.comfy_quant": told(format="mxfp8")}, "mxfp8"),
    "turned": ({"x.weight": ONE, "x.comfy_quant": told(format="int8_tensorwise", convrot=True)}, "convrot"),
    "no JSON": ({"x.weight": ONE, "x.comfy_quant": torch.full((9,), 91, dtype=torch.uint8)}, "None"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_quantisation_that_is_not_read_is_refused_by_name(kind):
    stored, name = UNREAD[kind]
    refused(stored, f"quantised as {name}" if kind not in ("some", "of ComfyUI", "turned") else name, "not read here")


def test_a_name_without_dots_is_of_no_packing():
    """As averages of the original code have them."""
    stored = {"model_ema.diffusion_modelinput_blocks11attn1to_qweight": ONE}
    assert gathered(stored, {}, "file") == stored


def test_so_is_one_that_the_header_tells():
    layers = {"layers": {"x": {"format": "int8_blockwise", "group_size": 128}}}
    refused({"x.weight": ONE}, "int8_blockwise", metadata={"_quantization_metadata": json.dumps(layers)})
    for text in ("[", "[]", '{"layers": 3}', '{"layers": {"x": 3}}'):
        assert gathered({"x.weight": ONE}, {"_quantization_metadata": text}, "file").keys() == {"x.weight"}


def changed(stored: dict[str, Tensor], name: str, value: Tensor) -> dict[str, Tensor]:
    assert name in stored
    return stored | {name: value}


STATE = "x.weight.quant_state.bitsandbytes__nf4"
PLAIN, NESTED = STORED["nf4"], STORED["nf4, nested"]
GOOD = json.loads(bytes(NESTED[STATE].tolist()))
HOSTILE = {
    "a scale of another shape": changed(STORED["int8"], "x.weight_scale", torch.ones(15)),
    "a scale of blocks": changed(STORED["int8"], "x.weight_scale", torch.ones(16, 2)),
    "no scale at all": changed(STORED["int8"], "x.weight_scale", torch.ones(0)),
    "NaN": changed(STORED["int8"], "x.weight_scale", torch.full((16,), torch.nan)),
    "infinite": changed(STORED["e4m3 with ComfyUI's old scale"], "x.scale_weight", torch.tensor(torch.inf)),
    "NaN in nf4": changed(PLAIN, "x.weight.absmax", torch.full((32,), torch.nan)),
    "a group too few": changed(PLAIN, "x.weight.absmax", torch.ones(31)),
    "a table of 8": changed(PLAIN, "x.weight.quant_map", torch.ones(8)),
    "a table too short": changed(NESTED, "x.weight.nested_quant_map", torch.ones(1)),
    "too few of nested": changed(NESTED, "x.weight.nested_absmax", torch.ones(0)),
    "codes cut": changed(PLAIN, "x.weight", PLAIN["x.weight"][1:]),
    "codes of another type": changed(PLAIN, "x.weight", PLAIN["x.weight"].float()),
    "no state": changed(PLAIN, STATE, torch.full((5,), 91, dtype=torch.uint8)),
    "a state of numbers": changed(PLAIN, STATE, torch.ones(5)),
    **{
        f"{name} is {value!r}": changed(NESTED, STATE, told(**GOOD | {name: value}))
        for name, value in (
            ("shape", [16, 127]), ("shape", [-16, -128]), ("shape", "x"), ("shape", []), ("blocksize", 0),
            ("blocksize", 63), ("blocksize", "64"), ("blocksize", 2**40), ("nested_blocksize", 0),
            ("nested_blocksize", -1), ("nested_blocksize", None), ("nested_offset", "x"),
            ("nested_offset", float("nan")),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_together_is_refused_by_name(name):
    refused(HOSTILE[name], "x.weight")
