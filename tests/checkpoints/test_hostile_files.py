"""Broken and hostile models: none crashes, hangs or runs code; each is refused in one line that names the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from limner import catalog
from limner.checkpoints import files, folders, single_files
from limner.errors import FileProblem


@pytest.fixture(scope="session")
def shapes(sd1_folder) -> dict[str, list[int]]:
    """Of a whole single file."""
    return {name: list(t.shape) for name, t in single_files.export(folders.recognise(sd1_folder)).items()}


def header(shapes: dict[str, list[int]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    place = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return entries


def write(path: Path, entries: dict[str, Any], size: int | None = None) -> None:
    """A safetensors file of zeros, which takes no room on the disk."""
    text = json.dumps(entries).encode()
    if size is None:
        size = max(entry["data_offsets"][1] for entry in entries.values())
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


HANGS = 60
"""Seconds after which it is taken for hung, on a machine however busy."""


def refused(path: Path, *words: str) -> None:
    began = time.monotonic()
    with pytest.raises(FileProblem) as caught:
        catalog.load(path)
    assert time.monotonic() - began < HANGS
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert all(word in message for word in (path.name, *words)), message


def test_the_whole_file_is_not_refused(shapes, tmp_path):
    write(tmp_path / "model.safetensors", header(shapes))
    assert catalog.load(tmp_path / "model.safetensors").name == "sd1"


# ------------------------------------------------------------------ containers

BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "one byte": lambda good: b"x",
    "a length alone": lambda good: good[:8],
    "half a header": lambda good: good[:500],
    "no header": lambda good: struct.pack("<Q", 0),
    "a header of 2^63 bytes": lambda good: struct.pack("<Q", 2**63) + good[8:],
    "a header of 10^12 bytes": lambda good: struct.pack("<Q", 10**12) + good[8:],
    "a header of 200 MB": lambda good: struct.pack("<Q", 200_000_000) + good[8:],
    "a byte too few": lambda good: good[:-1],
    "a byte too many": lambda good: good + b"\0",
    "not JSON": lambda good: struct.pack("<Q", 10) + b"x" * 10,
    "not UTF-8": lambda good: struct.pack("<Q", 10) + b'{"\xff":[]} ',
    "a list": lambda good: struct.pack("<Q", 2) + b"[]",
    "a deep list": lambda good: struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
    "a PNG": lambda good: b"\x89PNG\r\n\x1a\n" + good,
    "a ZIP": lambda good: b"PK\x03\x04" + good,
    "a pickle": lambda good: pickle.dumps({"a": 1}),
    "a web page": lambda good: b"<!DOCTYPE html><html><body>Log in</body></html>",
    "a pointer of git": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_torn_or_foreign_file_is_refused(name, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    write(path, header({"a": [4, 4], "b": [8]}))
    path.write_bytes(BYTES[name](path.read_bytes()))
    refused(path)


ENTRY: dict[str, dict[str, Any]] = {
    "offsets that overlap": {"data_offsets": [0, 32]},
    "offsets with a hole": {"data_offsets": [40, 56]},
    "offsets backwards": {"data_offsets": [48, 32]},
    "offsets beyond": {"data_offsets": [32, 10**15]},
    "offsets below 0": {"data_offsets": [-16, 0]},
    "one offset": {"data_offsets": [32]},
    "no shape": {"shape": None},
    "a shape too large": {"shape": [2**40, 2**40]},
    "a shape below 0": {"shape": [-8]},
    "a shape of fractions": {"shape": [8.0]},
    "another shape": {"shape": [9]},
    "another type": {"dtype": "F64"},
    "no such type": {"dtype": "F128"},
    "a number as type": {"dtype": 16},
}


@pytest.mark.parametrize("name", ENTRY)
def test_a_header_that_lies_is_refused(name, tmp_path):
    entries = header({"a": [4, 4], "b": [8]})
    entries["b"] |= ENTRY[name]
    write(tmp_path / "model.safetensors", entries, size=48)
    refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of Git LFS: run git lfs pull",
        ),
        ("\n<!doctype html><title>log in</title>", "a page of the web: log in"),
    ],
)
def test_what_was_downloaded_in_place_of_a_file_is_named(start, told, tmp_path):
    (tmp_path / "model.safetensors").write_text(start)
    with pytest.raises(FileProblem, match=told):
        files.read(tmp_path / "model.safetensors")


def test_a_type_that_is_not_read_is_named(tmp_path):
    entries = header({"a": [4, 4], "b": [8]})
    entries["b"]["dtype"] = "BF17"
    write(tmp_path / "model.safetensors", entries, size=48)
    with pytest.raises(FileProblem, match="numbers of a type 'BF17', which is not read"):
        files.read(tmp_path / "model.safetensors")


# ------------------------------------------------------------------- tensors

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
KEYS = [
    f"{UNET}input_blocks.0.0.weight",
    f"{UNET}input_blocks.1.0.in_layers.2.weight",
    f"{UNET}input_blocks.1.1.proj_in.weight",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.norm1.weight",
    f"{UNET}input_blocks.2.0.op.weight",
    f"{UNET}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
    f"{UNET}output_blocks.3.0.skip_connection.weight",
    f"{UNET}time_embed.0.weight",
    f"{UNET}out.2.weight",
    f"{VAE}encoder.conv_in.weight",
    f"{VAE}encoder.down.0.block.0.conv1.weight",
    f"{VAE}encoder.mid.attn_1.q.weight",
    f"{VAE}decoder.conv_in.weight",
    f"{VAE}decoder.conv_out.weight",
    f"{VAE}quant_conv.weight",
    f"{TEXT}embeddings.token_embedding.weight",
    f"{TEXT}embeddings.position_embedding.weight",
    f"{TEXT}encoder.layers.0.mlp.fc1.weight",
    f"{TEXT}encoder.layers.1.self_attn.q_proj.weight",
    f"{TEXT}final_layer_norm.weight",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "change",
    [
        lambda shape: None,
        lambda shape: [shape[0] + 1, *shape[1:]],
        # by 1 a U-Net would be one that sees depth
        lambda shape: [*shape[:-1], shape[-1] + 1] if len(shape) < 3 else [shape[0], shape[1] + 2, *shape[2:]],
        lambda shape: [0, *shape[1:]],
        lambda shape: shape[:1],
        lambda shape: [],
        lambda shape: [1, *shape],
    ],
    ids=["missing", "taller", "wider", "empty", "flat", "scalar", "deeper"],
)
def test_a_tensor_that_does_not_fit_is_refused(shapes, key, change, tmp_path):
    shape = change(shapes[key])
    changed = {k: v for k, v in shapes.items() if k != key} | ({} if shape is None else {key: shape})
    if changed == shapes or (shape and shape[0] > shapes[key][0] and "_embedding" in key):
        pytest.skip("a vector is flat as it is, and a text encoder may know more words or places")
    write(tmp_path / "model.safetensors", header(changed))
    refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize("key", ["control_model.x", f"{UNET}more.weight", f"{VAE}decoder.more", "lora_te_x.alpha", ""])
def test_a_tensor_too_many_is_refused_by_name(shapes, key, tmp_path):
    write(tmp_path / "model.safetensors", header(shapes | {key: [4]}))
    refused(tmp_path / "model.safetensors", "unknown", key)


@pytest.mark.parametrize(("kind", "size"), [("I64", 8), ("I32", 4), ("I8", 1), ("U8", 1), ("BOOL", 1)])
def test_weights_that_are_no_fractions_are_refused_by_name(shapes, kind, size, tmp_path):
    entries = header(shapes)
    *_, last = entries
    start = entries[last]["data_offsets"][0]
    entries[last] |= {"dtype": kind, "data_offsets": [start, start + size * int(torch.tensor(shapes[last]).prod())]}
    write(tmp_path / "model.safetensors", entries)
    refused(tmp_path / "model.safetensors", last)


# ------------------------------------------------------------------- pickles


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def torch_save(content: Any, path: Path) -> None:
    torch.save(content, path)


def old_torch_save(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def pickle_in_a_zip(content: Any, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(content))
        file.writestr("archive/version", "3\n")


WRITERS = [torch_save, old_torch_save, bare_pickle, pickle_in_a_zip]
CONTENTS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda evil: evil,
    "among tensors": lambda evil: {"state_dict": {"a": torch.zeros(1), "b": evil}},
    "beside them": lambda evil: {"state_dict": {"a": torch.zeros(1)}, "callbacks": evil},
    "as a name": lambda evil: {"state_dict": {evil: torch.zeros(1)}},
}


@pytest.mark.parametrize("ending", ["ckpt", "pt", "safetensors", "bin"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("content", CONTENTS)
def test_no_pickle_runs_code(content, writer, ending, tmp_path):
    path, marker = tmp_path / f"model.{ending}", tmp_path / "ran"
    writer(CONTENTS[content](Evil(marker)), path)
    refused(path, "not opened")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [1, [], {}, {"state_dict": 1}, {"state_dict": {"a": 1}}, {1: torch.zeros(1)}, torch.zeros(1)], ids=str
)
@pytest.mark.parametrize("writer", WRITERS[:2])
def test_a_checkpoint_without_a_table_of_tensors_is_refused(content, writer, tmp_path):
    writer(content, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt")


@pytest.mark.parametrize("writer", WRITERS[:2])
def test_a_checkpoint_of_tensors_is_opened(sd1_folder, writer, tmp_path):
    tensors = single_files.export(folders.recognise(sd1_folder))
    writer({"state_dict": {k: v.clone() for k, v in tensors.items()}, "global_step": 1}, tmp_path / "model.ckpt")
    system, expected = catalog.load(tmp_path / "model.ckpt"), catalog.load(sd1_folder)
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), expected.parameters(), strict=True))


# ------------------------------------------------------------------- folders


@pytest.fixture
def copy(sd1_folder, tmp_path) -> Path:
    """The folder, whose weights are not copied but linked."""
    shutil.copytree(sd1_folder, tmp_path / "model", copy_function=lambda a, b: os.link(a, b))
    for file in (tmp_path / "model").rglob("*.json"):
        text = file.read_bytes()
        file.unlink()
        file.write_bytes(text)
    return tmp_path / "model"


JSON = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
JSON += ["scheduler/scheduler_config.json", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("file", JSON)
@pytest.mark.parametrize(
    "text", [b"", b"x", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"a":' * 100_000], ids=lambda t: repr(t[:5])
)
def test_a_folder_with_broken_settings_is_refused(copy, file, text):
    if (file, text) == ("scheduler/scheduler_config.json", b"{}"):
        pytest.skip("means the defaults")
    (copy / file).write_bytes(text)
    with pytest.raises(FileProblem) as caught:
        catalog.load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_refused(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(FileProblem, match=part):
        catalog.load(copy)


VALUES: list[Any] = [-1, 0, 3, 10**9, 1.5, float("nan"), "4", [4], {"a": 1}, True]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("unet/config.json", "in_channels"),
        ("unet/config.json", "block_out_channels"),
        ("unet/config.json", "layers_per_block"),
        ("unet/config.json", "transformer_layers_per_block"),
        ("unet/config.json", "attention_head_dim"),
        ("unet/config.json", "cross_attention_dim"),
        ("unet/config.json", "down_block_types"),
        ("unet/config.json", "norm_num_groups"),
        ("unet/config.json", "time_cond_proj_dim"),
        ("unet/config.json", "a_setting_of_the_future"),
        ("vae/config.json", "latent_channels"),
        ("vae/config.json", "scaling_factor"),
        ("vae/config.json", "block_out_channels"),
        ("text_encoder/config.json", "num_hidden_layers"),
        ("text_encoder/config.json", "hidden_size"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("scheduler/scheduler_config.json", "beta_end"),
        ("scheduler/scheduler_config.json", "beta_schedule"),
        ("scheduler/scheduler_config.json", "steps_offset"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(copy, file, name, value):
    path = copy / file
    settings = json.loads(path.read_text())
    if settings.get(name) == value or (name, value) in ALLOWED:
        pytest.skip("can be")
    path.write_text(json.dumps(settings | {name: value}))
    began = time.monotonic()
    with pytest.raises(FileProblem) as caught:
        catalog.load(copy)
    assert time.monotonic() - began < HANGS
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


ALLOWED: list[tuple[str, Any]] = [
    ("scaling_factor", 3), ("scaling_factor", 1.5), ("scaling_factor", True), ("num_train_timesteps", 3),
    ("steps_offset", 0), ("steps_offset", 3), ("time_cond_proj_dim", 0), ("a_setting_of_the_future", 0),
]  # fmt: skip


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "missing"])
def test_an_index_that_leads_elsewhere_is_refused(copy, place):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": place}}))
    with pytest.raises(FileProblem, match="unet"):
        catalog.load(copy)


def test_parts_of_two_models_are_refused_by_name(copy):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 768}))
    with pytest.raises(FileProblem, match=r"network.text_width=768, but the text encoder's tokens have 64"):
        catalog.load(copy)
