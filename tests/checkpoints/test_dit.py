"""The two layouts of a DiT, what tells its configuration, and files that are not whole."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor

from limner.checkpoints import dit as checkpoints
from limner.checkpoints import files
from limner.checkpoints.layouts import names, read, write
from limner.errors import CheckpointMismatch
from limner.models import dit
from limner.models.dit import DiT, DiTConfig
from limner.types import Conditioning

RELEASED = [name for name, value in vars(dit).items() if isinstance(value, DiTConfig) and not name.endswith("TINY")]
SMALL = DiTConfig(width=64, depth=3, num_heads=1, num_classes=9, size=6)


def on_meta(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def noise(seed: int = 0) -> dict[str, Tensor]:
    """Of the authors' layout; positions are what they are."""
    generator = torch.Generator().manual_seed(seed)
    network = DiT(SMALL)
    values = {name: torch.randn(t.shape, generator=generator) / 8 for name, t in network.state_dict().items()}
    return values | {"pos_embed": network.pos_embed}


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_has_one_place_and_shapes_tell_the_network(name):
    config = getattr(dit, name)
    ours = on_meta(config).state_dict()
    for layout in (checkpoints.original_layout(config), checkpoints.diffusers_layout(config)):
        assert layout.keys() == ours.keys()
        assert len(names(layout)) == sum(len(place.names) for place in layout.values())
    assert all(place.name == key for key, place in checkpoints.original_layout(config).items())
    assert checkpoints.config_of(shapes(ours), config.to_data) == config


def test_names_and_shapes_are_those_of_the_published_folder():
    """As `facebook/DiT-XL-2-256` says in its config.json, beside the defaults."""
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(out_channels=8).state_dict()
    written = write(checkpoints.diffusers_layout(dit.DIT_XL_2), on_meta(dit.DIT_XL_2).state_dict())
    assert shapes(checkpoints.parted(dit.DIT_XL_2, written)) == shapes(theirs)


def test_both_layouts_are_one_network_and_writing_what_was_read_gives_the_same_file():
    original = noise()
    plain, other = checkpoints.original_layout(SMALL), checkpoints.diffusers_layout(SMALL)
    theirs = checkpoints.parted(SMALL, write(other, original))
    assert "pos_embed" not in theirs
    for place, part in enumerate("qkv"):
        own = original["blocks.2.attn.qkv.bias"][64 * place : 64 * (place + 1)]
        assert torch.equal(theirs[f"transformer_blocks.2.attn1.to_{part}.bias"], own)
    x, t, cond = torch.randn(2, 4, 6, 6), torch.tensor([999, 0]), Conditioning(labels=torch.tensor([8, 9]))
    outputs = []
    for held, layout in ((original, plain), (theirs, other)):
        whole = held if held is original else checkpoints.joined(SMALL, held, "file")
        ours = read(layout, whole, "file")
        again = write(layout, ours)
        again = again if held is original else checkpoints.parted(SMALL, again)
        assert again.keys() == held.keys()
        assert all(torch.equal(tensor, held[name]) for name, tensor in again.items())
        network = DiT(SMALL)
        network.load_state_dict(ours)
        outputs.append(network(x, t, cond))
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0.01


@pytest.mark.parametrize("change", ["another", "missing", "of another shape"])
def test_copies_of_what_is_embedded_must_be_the_same(change):
    theirs = checkpoints.parted(SMALL, write(checkpoints.diffusers_layout(SMALL), noise()))
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.weight"
    if change == "missing":
        del theirs[name]
    else:
        theirs[name] = theirs[name] + 1 if change == "another" else theirs[name][:3]
    with pytest.raises(CheckpointMismatch, match=rf"file: {name} is missing or not the same as in block 0"):
        checkpoints.joined(SMALL, theirs, "file")


def test_of_what_a_training_saved_the_average_is_taken(tmp_path):
    average, weights = noise(1), noise(2)
    saved = {"ema": average, "opt": {"state": {}, "param_groups": []}, "args": Namespace(model="DiT-S/2")}
    for model in ({"model": weights}, {"model": {f"module.{name}": tensor for name, tensor in weights.items()}}):
        torch.save(model | saved, tmp_path / "0400000.pt")
        found, _ = files.read(tmp_path / "0400000.pt")
        assert checkpoints.prefix_of(found) == ""
        assert torch.equal(found["blocks.1.attn.qkv.weight"], average["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "ema."])
def test_a_network_is_found_under_the_names_of_trainings(prefix):
    held = {prefix + name: tensor for name, tensor in noise().items()}
    held |= {"model.x": torch.zeros(1)} if prefix == "ema." else {}
    assert checkpoints.prefix_of(held) == prefix
    del held[f"{prefix}y_embedder.embedding_table.weight"]
    assert checkpoints.prefix_of(held) is None


@pytest.mark.parametrize(
    ("name", "sit"),
    [
        ("SiT-XL-2-256x256.pt", True), ("sit.safetensors", True), ("my_sit_b2.pt", True),
        ("DiT-XL-2-256x256.pt", False), ("situation.pt", False), ("website-dit.pt", False), ("0400000.pt", False),
    ],
)  # fmt: skip
def test_a_name_says_sit_as_a_word(tmp_path, name, sit):
    assert checkpoints.says(tmp_path / name, "sit") == sit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pos_embed": None}, "is like a DiT, but not whole: there is no 'pos_embed'"),
        ({"pos_embed": (1, 8, 64)}, "its 8 positions are no square"),
        ({"x_embedder.proj.weight": (64, 4)}, "shapes do not fit together"),
        ({"x_embedder.proj.weight": (30, 4, 2, 2)}, "shapes do not fit together"),
        ({"final_layer.linear.weight": (20, 64)}, "out_channels=5"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_a_line(tmp_path, change, says):
    vae = tmp_path / "vae"
    widths = {"block_out_channels": (8, 8), "down_block_types": ["DownEncoderBlock2D"] * 2}
    diffusers.AutoencoderKL(**widths, up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=2).save_pretrained(vae)
    held = noise()
    for name, shape in change.items():
        held |= {name: torch.zeros(shape)} if shape else {}
        held = held if shape else {key: tensor for key, tensor in held.items() if key != name}
    with pytest.raises(CheckpointMismatch) as error:  # without --vae: it lies beside
        checkpoints.recognise(tmp_path / "dit.pt", held)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    found = checkpoints.recognise(tmp_path / "dit.pt", noise())
    assert (found.network, found.size, found.unsaid) == (SMALL, 12, True)
    sit = checkpoints.recognise(tmp_path / "sit.pt", noise())
    assert (sit.network, sit.noise, sit.prediction) == (replace(SMALL, to_data=True), "flow", "velocity")
    said = checkpoints.recognise(tmp_path / "sit.pt", noise(), "v")
    assert (said.network, said.prediction, said.assumed) == (SMALL, "v", ())
