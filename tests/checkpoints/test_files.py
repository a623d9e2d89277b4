from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from limner import catalog
from limner.checkpoints import files
from limner.checkpoints.quantization import dequantize, quantize
from limner.errors import CheckpointMismatch, FileProblem


def test_eight_bits_are_within_half_a_step_of_the_largest_value():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    stored, recipe = quantize({"w": w}, lambda n, t: 8)
    assert stored["w"].dtype == torch.int8
    restored = dequantize(stored, recipe, "x")["w"]
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((restored - w).abs() <= 0.51 * step + 1e-6).all()


def test_four_bits_pack_two_values_a_byte_and_come_back_in_order():
    w = torch.arange(-7, 8).float().repeat(64)[:64].reshape(2, 32)
    w[:, 0] = 7  # a full-range value in every group of 32
    stored, recipe = quantize({"w": w}, lambda n, t: 4)
    assert stored["w"].numel() == 32
    assert (dequantize(stored, recipe, "x")["w"] - w).abs().max() <= 0.01


def test_a_system_survives_its_file(tmp_path):
    config = catalog.entry("icons-tiny").config
    system = catalog.build(config)
    for p in system.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(1))
    catalog.save(system, config, tmp_path / "x.safetensors")
    loaded = catalog.load(tmp_path / "x.safetensors")
    for name, value in system.state_dict().items():
        if not name.startswith("text_encoder."):
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_guidance_interval_is_stored_checked_and_everywhere_in_older_files(tmp_path):
    config = catalog.entry("icons-tiny").config
    config = replace(config, defaults=replace(config.defaults, guidance_interval=(0.25, 0.75)))
    catalog.save(catalog.build(config), config, tmp_path / "x.safetensors")
    assert catalog.load(tmp_path / "x.safetensors").defaults == config.defaults
    stored = asdict(config)
    for wrong in ([0.75, 0.25], [-1, 1], [0, 2], [float("nan"), 1], [0.5]):
        stored["defaults"]["guidance_interval"] = wrong
        with pytest.raises(CheckpointMismatch, match="guidance_interval"):
            catalog.parse(stored, "x")
    del stored["defaults"]["guidance_interval"]
    assert catalog.parse(stored, "x").defaults.guidance_interval == (0.0, 1.0)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "header", "empty"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, damage):
    path = tmp_path / "bad.safetensors"
    files.save(path, {"w": torch.zeros(100)}, {"kind": "diffusion"})
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[:-7], "foreign": b"PK\x03\x04" + data, "header": b"\xff" * 8 + data[8:], "empty": b""}[
            damage
        ]
    )
    with pytest.raises(FileProblem, match=r"bad\.safetensors") as caught:
        files.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_program_and_a_wrong_configuration_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FileProblem, match="holds no network that is known"):
        catalog.load(tmp_path / "other.safetensors")
    files.save(tmp_path / "odd.safetensors", {"w": torch.zeros(2)}, {"kind": "diffusion", "max_tokens": "many"})
    with pytest.raises(CheckpointMismatch, match="max_tokens"):
        catalog.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("change", "words"), [("drop", "1 missing"), ("add", "1 unknown"), ("reshape", r"\(3, 2\) in the file")]
)
def test_every_key_and_shape_must_fit(tmp_path, change, words):
    tensors = dict(nn.Linear(2, 2).state_dict())
    if change == "drop":
        del tensors["bias"]
    elif change == "add":
        tensors["extra"] = torch.zeros(1)
    else:
        tensors["weight"] = torch.zeros(3, 2)
    with pytest.raises(CheckpointMismatch, match=words):
        files.assign(nn.Linear(2, 2), tensors, tmp_path / "f.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    files.save(path, {"w": torch.zeros(4)}, {"n": 1})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FileProblem, match="No space left"):
        files.save(path, {"w": torch.ones(4)}, {"n": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_configurations_are_json(tmp_path):
    files.save(tmp_path / "w.safetensors", {"w": torch.zeros(1)}, {"b": 1, "a": [1, 2]})
    assert files.load(tmp_path / "w.safetensors")[1] == json.loads('{"a": [1, 2], "b": 1}')
