from __future__ import annotations

import hashlib
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from limner.checkpoints.layouts import Place, read, write
from limner.checkpoints.unet import ddpm_layout, ldm_layout, old_diffusers_layout
from limner.models import unet
from limner.models.unet import UNet

RELEASED = [name for name, value in vars(unet).items() if isinstance(value, unet.UNetConfig)]
LATENT = [name for name in RELEASED if getattr(unet, name).text_width]
PIXELS = [name for name in RELEASED if name not in LATENT]


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def on_meta(config) -> UNet:
    with torch.device("meta"):
        return UNet(config)


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_has_one_place(name):
    config = getattr(unet, name)
    names = on_meta(config).state_dict().keys()
    for layout in (
        ldm_layout(config),
        *([ddpm_layout(config), old_diffusers_layout(config)] if name in PIXELS else []),
    ):
        assert layout.keys() == names
        assert len({(place.name, place.part) for place in layout.values()}) == len(layout)


@pytest.mark.parametrize(
    ("layout", "name", "count", "digest"),
    [  # of the sorted names, a line each, without model.diffusion_model.: of published files, or of their authors' code
        (ldm_layout, "SD1", 686, "3422671e7bd3eb47ccfdac42b0130db78b6aa6059e027e48f1619b3ae787c968"),
        (ldm_layout, "SD2", 686, "3422671e7bd3eb47ccfdac42b0130db78b6aa6059e027e48f1619b3ae787c968"),
        (ldm_layout, "SDXL", 1680, "fa772cb99a827a1512d5ec6638e805767ccc001946e4ee5649a12d7ffe3a0191"),
        (ldm_layout, "IDDPM_CIFAR", 446, "76a9e2cfd3634d68aeb8845506d25c7b2c5b924af65aabcd5f2aa817dd444287"),
        (ldm_layout, "IDDPM_64", 450, "13ffbe9d45c5be2e18f9b8e6801e264aba5ba3bc5748b75d767f8f8f7735af17"),
        (ldm_layout, "ADM_64", 541, "a761555b497d81ab19c76d4aaa6bc0e3b0c9efcadf16afab0336da15f7f2a36e"),
        (ldm_layout, "ADM_128", 493, "a7de044d796b4e433780f70130604eb7addac577b83e74c63ac6ec08db95371b"),
        (ldm_layout, "ADM_256", 567, "0daba198b08e3157c081f2f4c793bad50af0c6a49d5d761324538692423ddb83"),
        (ddpm_layout, "DDPM_CIFAR", 328, "b815dbc03cb83489fb09522f0ff8ecaf1d09a33ec33b2bb09b32a595ea467051"),
        (ddpm_layout, "DDPM_256", 450, "29f10f735d7e420a9a92562aa0578b109e78bae61be0298218cd48d26a97fce9"),
    ],
)
def test_names_are_the_published_ones(layout, name, count, digest):
    names = sorted({place.name for place in layout(getattr(unet, name)).values()})
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
        (
            "ADM_256",
            {"input_blocks.10.1.qkv.weight": (1536, 512, 1), "input_blocks.10.1.proj_out.weight": (512, 512, 1)},
        ),
        ("SD2_DEPTH", {"input_blocks.0.0.weight": (320, 5, 3, 3)}),
        ("SD1_EDIT", {"input_blocks.0.0.weight": (320, 8, 3, 3), "out.2.weight": (4, 320, 3, 3)}),
        ("SDXL_EDIT", {"input_blocks.0.0.weight": (320, 8, 3, 3), "label_emb.0.0.weight": (1280, 2816)}),
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


def test_diffusers_renames_its_old_names_to_ours():
    config = unet.DDPM_CIFAR
    with torch.device("meta"):
        ours = UNet(config).state_dict()
        theirs = diffusers.UNet2DModel(
            block_out_channels=config.widths,
            down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        )
    old = write(old_diffusers_layout(config), ours)
    assert "mid_block.attentions.0.proj_attn.weight" in old
    theirs._fix_state_dict_keys_on_load(old)
    assert old.keys() == ours.keys()
    assert all(old[key] is ours[key] for key in ours)


def test_ddpm_counts_levels_of_the_way_up_as_those_of_the_way_down():
    layout = ddpm_layout(unet.DDPM_CIFAR)
    assert layout["up_blocks.2.attentions.0.to_q.weight"] == Place("up.1.attn.0.q.weight", kept="1x1")
    assert layout["up_blocks.2.attentions.0.to_k.bias"] == Place("up.1.attn.0.k.bias")
    assert layout["up_blocks.0.upsamplers.0.conv.weight"] == Place("up.3.upsample.conv.weight")
    assert layout["down_blocks.1.attentions.1.to_out.0.weight"] == Place("down.1.attn.1.proj_out.weight", kept="1x1")
    assert layout["mid_block.attentions.0.group_norm.weight"] == Place("mid.attn_1.norm.weight")
    assert layout["time_embedding.linear_2.weight"] == Place("temb.dense.1.weight")


def test_queries_keys_and_values_are_joined_head_by_head_or_not():
    """Rows of one attention, four heads of two: which of ours comes at which row of theirs."""
    config = replace(unet.UNET_TINY_PIXELS, widths=(8,), depths=(1,), num_heads=4)
    ours = {key: torch.zeros_like(value) for key, value in UNet(config).state_dict().items()}
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        ours[f"mid_block.attentions.0.{name}.bias"] = 10.0 * k + torch.arange(8)
    heads = write(ldm_layout(config), ours)["middle_block.1.qkv.bias"].tolist()
    parts = write(ldm_layout(config, by_head=False), ours)["middle_block.1.qkv.bias"].tolist()
    assert heads == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23, 4, 5, 14, 15, 24, 25, 6, 7, 16, 17, 26, 27]
    assert parts == [*range(8), *range(10, 18), *range(20, 28)]


TINY = [
    (ldm_layout, unet.UNET_TINY),
    (ldm_layout, replace(unet.UNET_TINY, depths=(0, 2), vector_width=6, num_classes=3)),
    (ldm_layout, replace(unet.UNET_TINY_PIXELS, num_heads=4, resample="block", scale_shift=True)),
    (ldm_layout, replace(unet.UNET_TINY_PIXELS, depths=(1, 0), mid_depth=0)),
    (ddpm_layout, unet.UNET_TINY_PIXELS),
    (old_diffusers_layout, unet.UNET_TINY_PIXELS),
]


@pytest.mark.parametrize(("layout", "config"), TINY)
def test_reading_what_was_written_is_the_identity(layout, config):
    ours = UNet(config).state_dict()
    again = read(layout(config), write(layout(config), ours), "file")
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
