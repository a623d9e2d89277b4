"""Spellings of modules: known answers from published files, and nothing that means two things."""

from __future__ import annotations

import pytest
import torch

from limner import catalog
from limner.adapters.names import block, modules, spellings

TE = "text_model.encoder.layers"
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
SD1 = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": f"network.{BLOCK}.attn1.to_q",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0": f"network.{BLOCK}.attn2.to_out.0",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj": f"network.{BLOCK}.ff.net.0.proj",
    "lora_unet_output_blocks_2_1_conv": "network.up_blocks.0.upsamplers.0.conv",
    "lora_unet_mid_block_attentions_0_proj_in": "network.mid_block.attentions.0.proj_in",
    "lora_unet_down_blocks_0_resnets_1_conv2": "network.down_blocks.0.resnets.1.conv2",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": f"text_encoder.0.{TE}.0.self_attn.q_proj",
    f"unet.{BLOCK}.attn1.to_out.0": f"network.{BLOCK}.attn1.to_out.0",
    f"unet.{BLOCK}.attn1.processor.to_out": f"network.{BLOCK}.attn1.to_out.0",
    f"base_model.model.{BLOCK}.attn1.to_v": f"network.{BLOCK}.attn1.to_v",
    "lycoris_mid_block_resnets_0_conv1": "network.mid_block.resnets.0.conv1",
    "unet.middle_block.0.in_layers.2": "network.mid_block.resnets.0.conv1",
    "diffusion_model.time_embed.0": "network.time_embedding.linear_1",
    f"text_encoder.{TE}.11.mlp.fc2": f"text_encoder.0.{TE}.11.mlp.fc2",
    f"text_encoder.{TE}.3.self_attn.to_out": f"text_encoder.0.{TE}.3.self_attn.out_proj",
    f"clip_l.{TE}.0.mlp.fc1": f"text_encoder.0.{TE}.0.mlp.fc1",
}  # fmt: skip
SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": f"network.{BLOCK}.attn2.to_k",
    "lora_unet_middle_block_1_transformer_blocks_9_norm1": "network.mid_block.attentions.0.transformer_blocks.9.norm1",
    "lora_unet_output_blocks_0_1_proj_out": "network.up_blocks.0.attentions.0.proj_out",
    "lora_unet_label_emb_0_0": "network.add_embedding.linear_1",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"text_encoder.0.{TE}.0.mlp.fc1",
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": f"text_encoder.1.{TE}.31.self_attn.out_proj",
    "lora_te2_text_projection": "text_encoder.1.text_projection",
    f"text_encoder_2.{TE}.0.self_attn.q_proj": f"text_encoder.1.{TE}.0.self_attn.q_proj",
    f"clip_g.{TE}.0.mlp.fc1": f"text_encoder.1.{TE}.0.mlp.fc1",
}  # fmt: skip
ICONS = {
    "blocks.3.qkv": "network.blocks.3.qkv",
    "network.blocks.3.mlp_in": "network.blocks.3.mlp_in",
    "base_model.model.blocks.0.proj": "network.blocks.0.proj",
    "transformer.modulation": "network.modulation",
    "lora_transformer_time_in_fc1": "network.time_in.fc1",
}
TABLES = {"sd1": SD1, "sd2": SD1, "sdxl": SDXL, "sdxl-refiner": {}, "icons": ICONS}


def bare(name: str):
    with torch.device("meta"):
        return catalog.build(catalog.entry(name).config)


@pytest.mark.parametrize("name", TABLES)
def test_published_spellings_are_known(name):
    table = spellings(bare(name))
    assert {spelling: table[spelling].module for spelling in TABLES[name]} == TABLES[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "sdxl-refiner" else ()) for name in TABLES]
)
def test_every_module_is_spelled_in_every_way_and_no_spelling_is_lost(name):
    system = bare(name)
    table = spellings(system)
    towers = [] if name == "icons" else list(enumerate(system.text_encoder))
    parts = [("network", system.network)] + [(f"text_encoder.{i}", tower) for i, tower in towers]
    for prefix, part in parts:
        for module in modules(part):
            programs = {found.program for found in table.values() if found.module == f"{prefix}.{module}"}
            alike = len(towers) == 2 and prefix != "network"  # LyCORIS does not say which of two towers
            assert {"kohya", "diffusers", "PEFT", *["LyCORIS"] * (not alike)} <= programs, module
    owners = dict(system.named_modules())
    assert all(found.module in owners for found in table.values())


def test_a_spelling_of_two_modules_means_neither():
    table = spellings(bare("sdxl"))
    assert "lycoris_text_model_encoder_layers_0_mlp_fc1" not in table
    assert "base_model.model.text_model.encoder.layers.0.mlp.fc1" not in table
    assert "base_model.model.text_encoder_2.text_model.encoder.layers.0.mlp.fc1" in table


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("network.down_blocks.1.attentions.0.proj_in", "down_blocks.1"),
        ("network.mid_block.resnets.0.conv1", "mid_block"),
        ("network.conv_in", "conv_in"),
        ("network.blocks.3.qkv", "blocks.3"),
        ("text_encoder.1.text_projection", "text_encoder.1"),
    ],
)
def test_a_module_belongs_to_a_block(module, wanted):
    assert block(module) == wanted
