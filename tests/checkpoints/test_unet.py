from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from limner.checkpoints.layouts import read, write
from limner.checkpoints.unet import ldm_layout
from limner.models import unet
from limner.models.unet import UNet

RELEASED = [name for name, value in vars(unet).items() if isinstance(value, unet.UNetConfig)]
LATENT = [name for name in RELEASED if getattr(unet, name).text_width]


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def on_meta(config) -> UNet:
    with torch.device("meta"):
        return UNet(config)


@pytest.mark.parametrize("name", LATENT)
def test_every_tensor_has_one_place(name):
    config = getattr(unet, name)
    layout = ldm_layout(config)
    assert layout.keys() == on_meta(config).state_dict().keys()
    assert len({place.name for place in layout.values()}) == len(layout)


@pytest.mark.parametrize(
    ("name", "count", "digest"),
    [  # of the sorted names in the published files, a line each, without model.diffusion_model.
        ("SD1", 686, "3422671e7bd3eb47ccfdac42b0130db78b6aa6059e027e48f1619b3ae787c968"),
        ("SD2", 686, "3422671e7bd3eb47ccfdac42b0130db78b6aa6059e027e48f1619b3ae787c968"),
        ("SDXL", 1680, "fa772cb99a827a1512d5ec6638e805767ccc001946e4ee5649a12d7ffe3a0191"),
    ],
)
def test_names_are_those_of_the_published_files(name, count, digest):
    names = sorted(place.name for place in ldm_layout(getattr(unet, name)).values())
    assert len(names) == count
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "spots"),
    [
        (
            "SD1",
            {
                "input_blocks.0.0.weight": (320, 4, 3, 3),
                "time_embed.2.bias": (1280,),
                "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
                "input_blocks.3.0.op.weight": (320, 320, 3, 3),
                "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
                "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
                "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
                "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
                "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
                "output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
                "out.2.weight": (4, 320, 3, 3),
            },
        ),
        (
            "SD2",
            {
                "input_blocks.1.1.proj_in.weight": (320, 320),
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
            },
        ),
        (
            "SDXL",
            {
                "label_emb.0.0.weight": (1280, 2816),
                "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
                "input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
                "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
            },
        ),
        (
            "SDXL_REFINER",
            {
                "input_blocks.0.0.weight": (384, 4, 3, 3),
                "label_emb.0.0.weight": (1536, 2560),
                "input_blocks.4.1.proj_in.weight": (768, 768),
                "middle_block.1.transformer_blocks.3.norm3.weight": (1536,),
            },
        ),
        ("X4_UPSCALER", {"label_emb.weight": (1000, 1024), "input_blocks.10.0.skip_connection.bias": (1024,)}),
        ("SD2_DEPTH", {"input_blocks.0.0.weight": (320, 5, 3, 3)}),
    ],
)
def test_some_tensors_have_the_shape_that_published_files_have(name, spots):
    config = getattr(unet, name)
    theirs = shapes(write(ldm_layout(config), on_meta(config).state_dict()))
    assert {spot: theirs.get(spot) for spot in spots} == spots


@pytest.mark.parametrize("name", LATENT)
def test_diffusers_converts_what_is_written_to_our_names(name):
    """A second implementation of the table; it renames without computing, so that released sizes cost nothing."""
    config = getattr(unet, name)
    ours = on_meta(config).state_dict()
    told = {"layers_per_block": config.num_blocks}
    if config.vector_width:
        told |= {"class_embed_type": None, "addition_embed_type": "text_time"}
    if config.num_classes:
        told |= {"class_embed_type": None, "num_class_embeds": config.num_classes}
    theirs = {f"model.diffusion_model.{key}": value for key, value in write(ldm_layout(config), ours).items()}
    converted = convert_ldm_unet_checkpoint(theirs, told)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


@pytest.mark.parametrize("config", [unet.UNET_TINY, replace(unet.UNET_TINY, depths=(0, 2), vector_width=6)])
def test_reading_what_was_written_is_the_identity(config):
    ours = UNet(config).state_dict()
    layout = ldm_layout(config)
    again = read(layout, write(layout, ours), "file")
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
