"""GGUF files: what is in them, and what is no whole one."""

from __future__ import annotations

import struct

import pytest
import torch

from limner.checkpoints import files, parts, t5
from limner.checkpoints.gguf import OTHERS, t5_name
from limner.errors import CheckpointMismatch, FileProblem
from limner.nn.quantized import BLOCKS, Quantized
from limner.text.t5 import T5_TINY, T5Encoder
from quantized_files import blocks, gguf

GENERATOR = torch.Generator().manual_seed(0)
WHOLE = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "a.bias": torch.arange(3.0).half(),
    "b.weight": torch.randn(2, 3, 2, 2).bfloat16(),
    **{f"{kind}.weight": blocks((4, 512), kind, GENERATOR) for kind in BLOCKS},
}


def test_all_that_was_written_is_read(tmp_path):
    path = gguf(tmp_path / "x.gguf", WHOLE, general__architecture="flux", words=["a", "bc"], numbers=[1, 2, 3], one=7)
    found, metadata = files.read(path)
    assert metadata == {}
    assert list(found) == list(WHOLE)
    for name, tensor in WHOLE.items():
        assert found[name].shape == tensor.shape
        if isinstance(tensor, Quantized):
            assert found[name].dtype == tensor.code
            assert torch.equal(found[name].float(), tensor.whole())
            assert found[name].is_floating_point()
        else:
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_the_gguf_package_reads_the_same(tmp_path):
    reader = pytest.importorskip("gguf.gguf_reader")
    path = gguf(tmp_path / "x.gguf", WHOLE, general__architecture="flux", words=["a", "bc"], numbers=[1, 2, 3])
    theirs = {tensor.name: tensor for tensor in reader.GGUFReader(path).tensors}
    assert theirs.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert tuple(theirs[name].shape) == tuple(tensor.shape)[::-1]
        if isinstance(tensor, Quantized):
            assert torch.equal(torch.from_numpy(theirs[name].data.reshape(tensor.codes.shape).copy()), tensor.codes)


@pytest.mark.parametrize(("once", "in_rows"), [([8, 256], True), ([16, 128], False), ([8, 64, 2, 2], False)])
def test_a_tensor_made_flat_has_the_shape_that_it_had(tmp_path, once, in_rows):
    flat = blocks((8, 256), "Q4_K", GENERATOR)
    path = gguf(tmp_path / "x.gguf", {"c.weight": flat}, **{"comfy.gguf.orig_shape.c.weight": once})
    found = files.read(path)[0]["c.weight"]
    assert tuple(found.shape) == tuple(once)
    assert found.in_rows is in_rows
    assert torch.equal(found.float(), flat.whole().reshape(once))


LLAMA = {
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "enc.blk.0.attn_q.weight",
    "encoder.block.0.layer.0.SelfAttention.k.weight": "enc.blk.0.attn_k.weight",
    "encoder.block.0.layer.0.SelfAttention.v.weight": "enc.blk.0.attn_v.weight",
    "encoder.block.0.layer.0.SelfAttention.o.weight": "enc.blk.0.attn_o.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "enc.blk.0.attn_rel_b.weight",
    "encoder.block.0.layer.0.layer_norm.weight": "enc.blk.0.attn_norm.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "enc.blk.0.ffn_gate.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": "enc.blk.0.ffn_up.weight",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": "enc.blk.0.ffn_down.weight",
    "encoder.block.0.layer.1.layer_norm.weight": "enc.blk.0.ffn_norm.weight",
}


def test_t5_has_the_names_of_llama_cpp(tmp_path):
    """All of them, as llama.cpp's convert_hf_to_gguf.py gives them; the decoder's are not needed."""
    weights = T5Encoder(T5_TINY).state_dict()
    named = {}
    for name, tensor in weights.items():
        first = name.replace("block.1.", "block.0.")
        named[LLAMA[first].replace("blk.0.", "blk.1.") if first != name else LLAMA[name]] = tensor.contiguous()
    named |= {"dec.blk.0.attn_q.weight": torch.ones(2, 2), "output.weight": torch.ones(2, 2)}
    path = gguf(tmp_path / "t5.gguf", named, general__architecture="t5")
    held = t5.held(parts.read(path), path)
    config, layout = t5.tower(held, path)
    assert config == T5_TINY
    assert held.tensors.keys() == weights.keys() == layout.keys()
    assert all(torch.equal(held.tensors[name], weights[name]) for name in weights)
    assert t5_name("dec.blk.0.attn_q.weight") == "decoder.blk.0.attn_q.weight"


# ------------------------------------------------------------------- hostile


def refused(path, *words: str) -> None:
    with pytest.raises(FileProblem) as caught:
        files.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert all(word in message for word in (path.name, *words)), message


def whole(path):
    return gguf(path, {"a.weight": blocks((4, 64), "Q8_0", GENERATOR), "b": torch.ones(4)}, general__name="x", n=[1, 2])


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = whole(tmp_path / "x.gguf").read_bytes()
    for length in [*range(4, 200, 3), *range(200, len(data) - 16, 61), len(data) - 17]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        refused(tmp_path / "cut.gguf", "not a whole GGUF file")


def header(version=3, count=1, keys=0, tail=b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, keys) + tail


def tensor(name=b"a", shape=(32,), kind=8, place=0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, place)
    return struct.pack("<Q", len(name)) + name + axes + b"\0" * 128


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


BYTES = {
    "version 1": header(version=1, tail=tensor()),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + tensor(),
    "10^15 tensors": header(count=10**15, tail=tensor()),
    "10^15 keys": header(keys=10**15, tail=tensor()),
    "a name of 10^15 characters": header(tail=struct.pack("<Q", 10**15) + tensor()),
    "a name of no UTF-8": header(tail=tensor(name=b"\xff\xfe")),
    "a row of half a block": header(tail=tensor(shape=(48,))),
    "9 axes": header(tail=tensor(shape=(32,) * 9)),
    "a shape of 2^62": header(tail=tensor(shape=(2**31, 2**31))),
    "a place beyond": header(tail=tensor(place=2**40)),
    "a place between": header(tail=tensor(place=8)),
    "one name twice": header(count=2, tail=tensor()[:-128] + tensor()),
    "an alignment of 1": header(keys=1, tail=key(b"general.alignment", 4, struct.pack("<I", 1)) + tensor()),
    "an alignment in words": header(keys=1, tail=key(b"general.alignment", 8, struct.pack("<Q", 1) + b"x") + tensor()),
    "a value of no type": header(keys=1, tail=key(b"k", 99, b"") + tensor()),
    "an array of arrays": header(keys=1, tail=key(b"k", 9, struct.pack("<IQ", 9, 3)) + tensor()),
    "10^15 words": header(keys=1, tail=key(b"k", 9, struct.pack("<IQ", 8, 10**15)) + tensor()),
    "10^15 numbers": header(keys=1, tail=key(b"k", 9, struct.pack("<IQ", 4, 10**15)) + tensor()),
    "another shape once": header(
        keys=1, tail=key(b"comfy.gguf.orig_shape.a", 9, struct.pack("<IQii", 5, 2, 5, 7)) + tensor()
    ),
    "a shape below 0 once": header(
        keys=1, tail=key(b"comfy.gguf.orig_shape.a", 9, struct.pack("<IQii", 5, 2, -4, -8)) + tensor()
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_header_that_lies_is_refused(name, tmp_path):
    (tmp_path / "x.gguf").write_bytes(BYTES[name])
    refused(tmp_path / "x.gguf", "not a whole GGUF file")


def test_a_type_that_is_not_known_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(header(tail=tensor(kind=77)))
    refused(tmp_path / "x.gguf", "quantised as type 77 of GGUF, which is not read here")


def test_the_header_that_does_not_lie_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(header(tail=tensor()))
    assert files.read(tmp_path / "x.gguf")[0]["a"].shape == (32,)


@pytest.mark.parametrize("kind", [16, 20, 29, 34, 39])
def test_a_type_that_is_not_read_is_refused_by_name(kind, tmp_path):
    (tmp_path / "x.gguf").write_bytes(header(tail=tensor(shape=(256,), kind=kind)))
    refused(tmp_path / "x.gguf", f"quantised as {OTHERS[kind]} of GGUF", "not read here")
    with pytest.raises(CheckpointMismatch):
        files.read(tmp_path / "x.gguf")
