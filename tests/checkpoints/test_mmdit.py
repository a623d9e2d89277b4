"""The layouts of Stable Diffusion 3's network: published names and shapes, diffusers' own table, and the inverse."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from limner.checkpoints.layouts import names, read, write
from limner.checkpoints.mmdit import config_of, diffusers_config, diffusers_layout, from_diffusers_config, is_diffusers
from limner.errors import CheckpointMismatch
from limner.models import mmdit
from limner.models.mmdit import MMDiT, MMDiTConfig

RELEASED = ["SD3_MEDIUM", "SD35_MEDIUM", "SD35_LARGE"]
ODD = MMDiTConfig(
    channels=3, patch=3, depth=3, num_heads=5, head_width=4, text_width=6, pooled_width=7, pos_embed_max=5
)
SMALL = [
    mmdit.SD3_TINY,
    replace(ODD, head_width=64, num_heads=1),
    replace(ODD, qk_norm="rms"),
    replace(ODD, qk_norm="rms", dual_blocks=(0, 2)),
]


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def on_meta(config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return MMDiT(config).state_dict()


def filled(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(MMDiT(config).state_dict()).items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What each module of Stability's mmditx.py has: names, and shapes in a width d.
def published(depth: int, dual: int, normed: bool, places: int) -> dict[str, tuple[int, ...]]:
    d = 64 * depth
    rows: dict[str, tuple[int, ...]] = {"pos_embed": (1, places, d), "x_embedder.proj.weight": (d, 16, 2, 2)}
    sizes = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d), "y_embedder.mlp.0": (d, 2048)}
    sizes |= {"y_embedder.mlp.2": (d, d), "context_embedder": (d, 4096)}
    sizes |= {"final_layer.linear": (64, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    for i in range(depth):
        for side in ("context_block", "x_block"):
            at, text = f"joint_blocks.{i}.{side}", side == "context_block"
            attentions = ["attn", "attn2"] if i < dual and not text else ["attn"]
            sizes |= {f"{at}.{name}.qkv": (3 * d, d) for name in attentions}
            rows |= {f"{at}.{name}.ln_{x}.weight": (64,) for name in attentions for x in "qk" if normed}
            ends = text and i == depth - 1
            sizes[f"{at}.adaLN_modulation.1"] = ((2 if ends else 3 * (1 + len(attentions))) * d, d)
            if not ends:
                sizes |= {f"{at}.{name}.proj": (d, d) for name in attentions}
                sizes |= {f"{at}.mlp.fc1": (4 * d, d), f"{at}.mlp.fc2": (d, 4 * d)}
    rows["x_embedder.proj.bias"] = (d,)
    rows |= {f"{name}.weight": shape for name, shape in sizes.items()}
    return rows | {f"{name}.bias": shape[:1] for name, shape in sizes.items()}


@pytest.mark.parametrize(
    ("name", "told", "count", "parameters", "digest"),
    [  # of the sorted names and shapes, a line each, of the authors' code
        ("SD3_MEDIUM", (24, 0, False, 36_864), 491, 2_028_328_000, "37026a80c799e08efcdbd0b517f326d6"),
        ("SD35_MEDIUM", (24, 13, True, 147_456), 665, 2_243_171_520, "d1a44fe78e34c9cdec236af5f8ec8005"),
        ("SD35_LARGE", (38, 0, True, 36_864), 923, 8_056_627_520, "d73da97d9c7f485f6679e21e8263ada1"),
    ],
)
def test_names_and_shapes_are_the_published_ones(name, told, count, parameters, digest):
    ours = shapes(on_meta(getattr(mmdit, name)))
    assert ours == published(*told)
    assert len(ours) == count
    lines = "\n".join(f"{key} {ours[key]}" for key in sorted(ours))
    assert hashlib.sha256(lines.encode()).hexdigest()[:32] == digest
    assert sum(torch.Size(shape).numel() for key, shape in ours.items() if key != "pos_embed") == parameters


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_in_diffusers_are_those_that_it_builds(name):
    config = getattr(mmdit, name)
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel.from_config(diffusers_config(config)).state_dict()
    layout, ours = diffusers_layout(config), on_meta(config)
    assert layout.keys() == ours.keys()
    assert names(layout) == theirs.keys()
    written = write(layout, ours)
    assert shapes(written) == shapes(theirs)
    assert shapes(read(layout, written, "file")) == shapes(ours)


@pytest.mark.parametrize("config", SMALL)
def test_diffusers_converts_our_names_to_what_we_write(config):
    """A second implementation of the table, which takes its tensors out of what it is given."""
    ours = filled(config)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(ours))
    assert same(converted, write(diffusers_layout(config), ours))


@pytest.mark.parametrize("config", SMALL)
def test_writing_what_was_read_gives_the_same_file(config):
    layout, ours = diffusers_layout(config), filled(config)
    theirs = write(layout, ours)
    assert same(read(layout, theirs, "file"), ours)
    assert same(write(layout, read(layout, theirs, "file")), theirs)


def test_scale_comes_before_shift_where_there_is_no_gate():
    config = replace(ODD, depth=2)
    d = config.width
    ours = {name: torch.zeros(shape) for name, shape in shapes(on_meta(config)).items()}
    halves = torch.arange(2.0).repeat_interleave(d)
    for name in ("final_layer", "joint_blocks.1.context_block"):
        ours[f"{name}.adaLN_modulation.1.bias"] = halves
    ours["joint_blocks.0.context_block.adaLN_modulation.1.bias"] = torch.arange(6.0).repeat_interleave(d)
    ours["joint_blocks.0.context_block.attn.qkv.bias"] = torch.arange(3.0).repeat_interleave(d)
    theirs = write(diffusers_layout(config), ours)
    assert torch.equal(theirs["norm_out.linear.bias"], halves.flip(0))
    assert torch.equal(theirs["transformer_blocks.1.norm1_context.linear.bias"], halves.flip(0))
    assert theirs["transformer_blocks.0.norm1_context.linear.bias"][::d].tolist() == [0, 1, 2, 3, 4, 5]
    for value, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        assert theirs[f"transformer_blocks.0.attn.{name}.bias"].unique().tolist() == [value]


@pytest.mark.parametrize("config", [*(getattr(mmdit, name) for name in RELEASED), *SMALL])
def test_a_configuration_is_found_in_names_and_shapes_of_either_layout(config):
    if not config.qk_norm and config.head_width != 64:
        config = replace(config, head_width=64)  # nothing else tells
    ours = on_meta(config)
    for tensors, theirs in ((ours, False), (write(diffusers_layout(config), ours), True)):
        assert is_diffusers(tensors) == theirs
        assert config_of(shapes(tensors)) == replace(config, base_grid=64)


def test_shapes_of_no_such_network_are_refused():
    found = shapes(on_meta(SMALL[2]))
    with pytest.raises(KeyError):
        config_of({name: shape for name, shape in found.items() if name != "pos_embed"})
    for name, shape in (("pos_embed", (1, 26, 20)), ("joint_blocks.0.x_block.attn.ln_q.weight", (6,))):
        with pytest.raises(CheckpointMismatch, match="no network of Stable Diffusion 3"):
            config_of(found | {name: shape})


# What the model cards' config.json say.
PUBLISHED = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
MEDIUM_35 = {"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"}
LARGE_35 = {"caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38, "qk_norm": "rms_norm"}


@pytest.mark.parametrize(("name", "more"), [("SD3_MEDIUM", {}), ("SD35_MEDIUM", MEDIUM_35), ("SD35_LARGE", LARGE_35)])
def test_settings_of_diffusers_are_read_and_written(name, more):
    config, settings = getattr(mmdit, name), PUBLISHED | more
    assert from_diffusers_config(settings) == config
    plain = {"dual_attention_layers": [], "qk_norm": None}
    assert diffusers_config(config) == plain | {k: v for k, v in settings.items() if k != "_diffusers_version"}


@pytest.mark.parametrize("config", SMALL)
def test_what_is_written_is_what_diffusers_has_and_is_read_again(config):
    theirs = diffusers.SD3Transformer2DModel.from_config(diffusers_config(config))
    assert from_diffusers_config(dict(theirs.config)) == config
    assert from_diffusers_config(diffusers_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 100_000}, "num_layers is 100000"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"out_channels": 32}, "out_channels is 32"),
        ({"caption_projection_dim": 1152}, "caption_projection_dim is 1152"),
        ({"dual_attention_layers": [24]}, r"dual_attention_layers is \[24\]"),
        ({"attention_head_dim": 1, "num_attention_heads": 2, "caption_projection_dim": 2}, "not in fours"),
        ({"dual_attention_layers": "all"}, "dual_attention_layers is 'all'"),
        ({"use_magic": True}, "use_magic is True"),
    ],
)
def test_settings_of_no_such_network_are_refused(changes, message):
    with pytest.raises(CheckpointMismatch, match=message):
        from_diffusers_config(PUBLISHED | changes, "folder/config.json")
