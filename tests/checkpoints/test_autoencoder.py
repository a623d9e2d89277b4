from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from limner.checkpoints.autoencoder import early_diffusers_layout, ldm_layout
from limner.checkpoints.layouts import read, write
from limner.models.autoencoder import (
    KL_FLUX,
    KL_SD1,
    KL_SD3,
    KL_TINY,
    KL_UPSCALER,
    VQ_F4,
    VQ_TINY,
    KLAutoencoder,
    VQAutoencoder,
    VQConfig,
)

CONFIGS = {
    "sd1": (KL_SD1, 248),
    "sd3": (KL_SD3, 244),
    "flux": (KL_FLUX, 244),
    "x4-upscaler": (KL_UPSCALER, 204),
    "vq-f4": (VQ_F4, 205),
    "vq-tiny": (VQ_TINY, 153),
    "attention": (replace(KL_TINY, attention_levels=(1, 2)), 212),
}
configs = pytest.mark.parametrize(("config", "tensors"), CONFIGS.values(), ids=CONFIGS)
layouts = pytest.mark.parametrize("layout", [ldm_layout, early_diffusers_layout])


def build(config, device="meta"):
    with torch.device(device):
        return (VQAutoencoder if isinstance(config, VQConfig) else KLAutoencoder)(config)


@configs
@layouts
def test_a_layout_has_a_row_for_every_tensor(config, tensors, layout):
    rows = layout(config)
    assert rows.keys() == build(config).state_dict().keys()
    assert len({place.name for place in rows.values()}) == len(rows) == tensors


@configs
@layouts
def test_reading_undoes_writing(config, tensors, layout):
    rows, ours = layout(config), build(config).state_dict()
    file = write(rows, ours)
    assert {name: tensor.shape for name, tensor in read(rows, file, "file").items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }


@layouts
def test_values_come_back_bit_for_bit(layout):
    rows, ours = layout(KL_TINY), build(KL_TINY, "cpu").state_dict()
    file = write(rows, ours)
    again = read(rows, file, "file")
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert all(torch.equal(tensor, file[name]) for name, tensor in write(rows, again).items())


def test_the_original_names_of_stable_diffusion():
    file = write(ldm_layout(KL_SD1), build(KL_SD1).state_dict())
    assert {name: tuple(file[name].shape) for name in NAMES} == NAMES
    assert "encoder.down.3.downsample.conv.weight" not in file
    assert "decoder.up.0.upsample.conv.weight" not in file


NAMES = {  # of v1-5-pruned.safetensors, without `first_stage_model.`
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.block.0.norm1.weight": (128,),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.2.downsample.conv.bias": (512,),
    "encoder.mid.block_1.conv2.weight": (512, 512, 3, 3),
    "encoder.mid.attn_1.norm.weight": (512,),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.attn_1.proj_out.bias": (512,),
    "encoder.norm_out.weight": (512,),
    "encoder.conv_out.weight": (8, 512, 3, 3),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.mid.block_2.norm2.bias": (512,),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.1.block.2.conv1.weight": (256, 256, 3, 3),
    "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.norm_out.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.bias": (4,),
}


def test_original_files_are_read_as_by_diffusers():
    """Each tensor filled with a number of its own, so that no two can be exchanged."""
    config = replace(KL_TINY, widths=(16, 32, 32, 32), blocks=2)
    shapes = write(ldm_layout(config), build(config).state_dict())
    file = {name: torch.full(tensor.shape, float(k)) for k, (name, tensor) in enumerate(shapes.items())}
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=config.widths,
        layers_per_block=2,
        norm_num_groups=8,
    )
    expected = convert_ldm_vae_checkpoint(dict(file), theirs.config)
    ours = read(ldm_layout(config), file, "file")
    assert ours.keys() == expected.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_early_names_of_diffusers():
    rows = early_diffusers_layout(KL_SD1)
    changed = {name: place.name for name, place in rows.items() if place.name != name}
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    assert changed == {
        f"{half}.mid_block.attentions.0.{new}.{leaf}": f"{half}.mid_block.attentions.0.{old}.{leaf}"
        for half in ("encoder", "decoder")
        for new, old in words.items()
        for leaf in ("weight", "bias")
    }
