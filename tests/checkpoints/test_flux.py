from __future__ import annotations

from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from limner.checkpoints.flux import config_of, diffusers_config, diffusers_layout, from_diffusers_config
from limner.checkpoints.layouts import Place, fit, read, write
from limner.errors import CheckpointMismatch, UsageError
from limner.models import flux
from limner.models.flux import Flux, guidance_embedding
from limner.types import Conditioning

RELEASED = [name for name, value in vars(flux).items() if isinstance(value, flux.FluxConfig)]
LARGE = [name for name in RELEASED if name != "FLUX_TINY"]
SMALL = replace(flux.FLUX_TINY, width=256, num_heads=2, axes=(16, 56, 56), in_channels=128, mlp_ratio=1.5)


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@cache
def on_meta(config) -> Flux:
    with torch.device("meta"):
        return Flux(config)


@cache
def diffusers_on_meta(config):
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel.from_config(diffusers_config(config))


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_has_a_place_which_is_that_of_diffusers(name):
    config = getattr(flux, name)
    layout, ours = diffusers_layout(config), on_meta(config).state_dict()
    assert layout.keys() == ours.keys()
    theirs = write(layout, ours)
    assert len(theirs) == sum(len(place.names) for place in layout.values())
    assert shapes(theirs) == shapes(diffusers_on_meta(config).state_dict())


def test_some_tensors_have_the_name_and_shape_that_published_files_of_diffusers_have():
    theirs = shapes(write(diffusers_layout(flux.FLUX_DEV), on_meta(flux.FLUX_DEV).state_dict()))
    spots = {
        "x_embedder.weight": (3072, 64),
        "context_embedder.weight": (3072, 4096),
        "time_text_embed.guidance_embedder.linear_1.weight": (3072, 256),
        "time_text_embed.text_embedder.linear_1.weight": (3072, 768),
        "transformer_blocks.18.norm1_context.linear.weight": (18432, 3072),
        "transformer_blocks.0.attn.add_k_proj.bias": (3072,),
        "transformer_blocks.0.attn.norm_added_q.weight": (128,),
        "transformer_blocks.0.ff_context.net.0.proj.weight": (12288, 3072),
        "single_transformer_blocks.37.proj_mlp.weight": (12288, 3072),
        "single_transformer_blocks.0.proj_out.weight": (3072, 15360),
        "norm_out.linear.weight": (6144, 3072),
        "proj_out.weight": (64, 3072),
    }
    assert {spot: theirs.get(spot) for spot in spots} == spots
    assert len(theirs) == 1160


def test_rows_lie_where_the_table_says():
    layout = diffusers_layout(replace(flux.FLUX_TINY, depth=1, depth_single=1))
    attn, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    then = (f"{single}.attn.to_k.weight", f"{single}.attn.to_v.weight", f"{single}.proj_mlp.weight")
    assert layout["single_blocks.0.linear1.weight"] == Place(
        f"{single}.attn.to_q.weight", then=then, rows=(64, 64, 64, 256)
    )
    added = (f"{attn}.add_k_proj.bias", f"{attn}.add_v_proj.bias")
    assert layout["double_blocks.0.txt_attn.qkv.bias"] == Place(f"{attn}.add_q_proj.bias", then=added, rows=(64,) * 3)
    assert layout["final_layer.adaLN_modulation.1.bias"] == Place("norm_out.linear.bias", kept="swapped")


@pytest.mark.parametrize("name", ["FLUX_DEV", "FLUX_SCHNELL"])
def test_diffusers_converts_our_names_to_those_of_the_table(name):
    """A second implementation of the table, for released sizes alone."""
    config = getattr(flux, name)
    ours = on_meta(config).state_dict()
    prefixed = {f"model.diffusion_model.{key}": value for key, value in ours.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(prefixed)
    assert shapes(converted) == shapes(write(diffusers_layout(config), ours))


@torch.no_grad()
def test_either_file_is_the_same_network_and_is_written_as_it_was_read():
    config = flux.FLUX_TINY
    theirs = diffusers.FluxTransformer2DModel.from_config(diffusers_config(config)).state_dict()
    theirs = {name: torch.randn(tensor.shape) / 8 for name, tensor in theirs.items()}
    layout, first, second = diffusers_layout(config), Flux(config), Flux(config)
    fit(layout, first.state_dict(), theirs, "file")
    first.load_state_dict(read(layout, theirs, "file"))
    original = first.state_dict()  # as Black Forest Labs name it
    second.load_state_dict(read({name: Place(name) for name in original}, original, "file"))

    again = write(layout, first.state_dict())
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    cond = Conditioning(
        tokens=torch.randn(2, 5, 32), pooled=torch.randn(2, 24), guidance=guidance_embedding(torch.tensor([3.5, 1]))
    )
    asked = (torch.randn(2, 16, 4, 6), torch.tensor([0.5, 1.0]), cond)
    assert torch.equal(first(*asked), second(*asked))


@pytest.mark.parametrize("config", [*(getattr(flux, name) for name in LARGE), SMALL], ids=[*LARGE, "small"])
def test_names_and_shapes_tell_the_configuration(config):
    ours = on_meta(config).state_dict()
    assert config_of(shapes(ours)) == config
    assert config_of(shapes(write(diffusers_layout(config), ours))) == config


def wrong(**changes):
    found = shapes(on_meta(SMALL).state_dict())
    for name, shape in changes.items():
        found[name] = shape
    return found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"distilled_guidance_layer.in_proj.weight": (1, 1)} | wrong(),
            "a file is a model of Chroma, which is another",
        ),
        ({"single_stream_modulation.lin.weight": (1, 1)} | wrong(), "a model of FLUX.2"),
        ({"single_stream_modulation.linear.weight": (1, 1)}, "a model of FLUX.2"),
        ({}, "no FLUX.1: x_embedder.weight is missing"),
        ({"transformer_blocks.0.attn.add_q_proj.weight": (1, 1)}, "no FLUX.1: x_embedder.weight is missing"),
        (wrong(**{"img_in.weight": (256,)}), r"img_in.weight is \(256,\)"),
        (wrong(**{"img_in.weight": (0, 64)}), r"img_in.weight is \(0, 64\)"),
        (wrong(**{"img_in.weight": (256, 10**9)}), r"img_in.weight is \(256, 1000000000\)"),
        (wrong(**{"img_in.weight": (250, 64)}), "add up to a head's width, 250"),
        (wrong(**{"img_in.weight": (64, 64)}), "num_heads=0"),
        (wrong(**{"double_blocks.0.img_attn.norm.query_norm.scale": (64,)}), "its heads are 64 wide"),
    ],
)
def test_another_network_is_refused_by_name(found, message):
    with pytest.raises(CheckpointMismatch, match=message):
        config_of(found, "a file")


@pytest.mark.parametrize("name", RELEASED)
def test_configurations_go_to_diffusers_and_back(name):
    config = getattr(flux, name)
    settings = diffusers_config(config)
    assert from_diffusers_config(settings) == config
    whole = dict(diffusers_on_meta(config).config)  # with all that diffusers adds
    assert from_diffusers_config({**whole, "_class_name": "FluxTransformer2DModel"}) == config


def test_what_a_config_json_leaves_out_is_what_diffusers_takes():
    assert from_diffusers_config({"_class_name": "FluxTransformer2DModel"}) == flux.FLUX_SCHNELL
    told = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "out_channels": None}
    assert from_diffusers_config(told) == flux.FLUX_DEV


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "'SD3Transformer2DModel', not FluxTransformer2DModel"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"num_layers": "19"}, "num_layers is '19'"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"guidance_embeds": 1}, "guidance_embeds is 1"),
        ({"num_attention_heads": 0}, "num_heads=0"),
        ({"axes_dims_rope": [64, 64]}, r"axes=\(64, 64\) must be three"),
        ({"axes_dims_rope": [16, 56, "56"]}, "not a list of whole numbers"),
        ({"axes_dims_rope": [16, 56, 58]}, "a head's width, 128"),
    ],
)
def test_a_config_json_that_cannot_be_is_refused(changes, message):
    with pytest.raises(CheckpointMismatch, match=message):
        from_diffusers_config(diffusers_config(flux.FLUX_DEV) | changes, "config.json")


def test_diffusers_is_not_told_of_what_it_cannot_build():
    with pytest.raises(UsageError, match=r"mlp_ratio=1.5"):
        diffusers_config(SMALL)
