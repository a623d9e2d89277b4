"""Spellings of modules: known answers from published files, and nothing that means two things."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from limner import catalog
from limner.adapters.names import Spelled, block, modules, spellings

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
T5 = "encoder.block.23.layer.0.SelfAttention.q"
FLUX = {
    "lora_unet_double_blocks_18_img_attn_qkv": "network.double_blocks.18.img_attn.qkv",
    "lora_unet_single_blocks_37_linear1": "network.single_blocks.37.linear1",
    "lora_unet_final_layer_adaLN_modulation_1": "network.final_layer.adaLN_modulation.1",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"text_encoder.clip_l.{TE}.0.mlp.fc1",
    "lora_te3_encoder_block_23_layer_0_SelfAttention_q": f"text_encoder.t5xxl.{T5}",
    "lora_te2_encoder_block_23_layer_0_SelfAttention_q": f"text_encoder.t5xxl.{T5}",
    "diffusion_model.double_blocks.0.img_mlp.2": "network.double_blocks.0.img_mlp.2",
    "base_model.model.single_blocks.0.modulation.lin": "network.single_blocks.0.modulation.lin",
    "double_blocks.0.img_attn.norm.query_norm.scale": "network.double_blocks.0.img_attn.norm.query_norm",
    "double_blocks.0.processor.qkv_lora2": "network.double_blocks.0.txt_attn.qkv",
    "single_blocks.0.processor.qkv": "network.single_blocks.0.linear1[:9216]",
    "transformer.transformer_blocks.0.attn.to_k": "network.double_blocks.0.img_attn.qkv[3072:6144]",
    "transformer.transformer_blocks.0.attn.add_v_proj": "network.double_blocks.0.txt_attn.qkv[6144:9216]",
    "transformer.transformer_blocks.0.norm1_context.linear": "network.double_blocks.0.txt_mod.lin",
    "transformer.single_transformer_blocks.5.proj_mlp": "network.single_blocks.5.linear1[9216:21504]",
    "transformer.single_transformer_blocks.5.proj_out": "network.single_blocks.5.linear2",
    "transformer.proj_out": "network.final_layer.linear",
    "transformer.norm_out.linear": "network.final_layer.adaLN_modulation.1 swapped",
    "lora_transformer_single_transformer_blocks_5_attn_to_q": "network.single_blocks.5.linear1[:3072]",
    "lora_transformer_time_text_embed_guidance_embedder_linear_1": "network.guidance_in.in_layer",
    "lycoris_transformer_blocks_3_ff_context_net_0_proj": "network.double_blocks.3.txt_mlp.0",
    "transformer.double_blocks.0.img_attn.qkv.1": "network.double_blocks.0.img_attn.qkv[3072:6144]",
    "transformer.single_blocks.0.linear1.3": "network.single_blocks.0.linear1[9216:21504]",
}
CONTEXT = "network.joint_blocks.{}.context_block"
SD3 = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "network.joint_blocks.0.x_block.attn.qkv",
    "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": f"{CONTEXT.format(23)}.adaLN_modulation.1",
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": f"text_encoder.clip_g.{TE}.31.self_attn.out_proj",
    "lora_te3_encoder_block_23_layer_0_SelfAttention_q": f"text_encoder.t5xxl.{T5}",
    f"text_encoder_3.{T5}": f"text_encoder.t5xxl.{T5}",
    "transformer.transformer_blocks.0.attn.add_q_proj": "network.joint_blocks.0.context_block.attn.qkv[:1536]",
    "transformer.transformer_blocks.22.norm1_context.linear": f"{CONTEXT.format(22)}.adaLN_modulation.1",
    "transformer.transformer_blocks.23.norm1_context.linear": f"{CONTEXT.format(23)}.adaLN_modulation.1 swapped",
    "transformer.pos_embed.proj": "network.x_embedder.proj",
}  # fmt: skip
SD35 = SD3 | {"transformer.transformer_blocks.12.attn2.to_v": "network.joint_blocks.12.x_block.attn2.qkv[3072:4608]"}
DIT = {
    "blocks.27.attn.qkv": "network.blocks.27.attn.qkv",
    "transformer.transformer_blocks.27.attn1.to_k": "network.blocks.27.attn.qkv[1152:2304]",
    "transformer.transformer_blocks.0.norm1.linear": "network.blocks.0.adaLN_modulation.1",
}
TABLES = {
    "sd1": SD1, "sd2": SD1, "sdxl": SDXL, "sdxl-refiner": {}, "icons": ICONS, "flux-dev": FLUX, "sd3-medium": SD3,
    "sd3.5-medium": SD35, "dit": DIT,
}  # fmt: skip
LONG = ("sdxl-refiner", "sd3-medium", "sd3.5-medium")


def said(found: Spelled) -> str:
    rows = "" if found.rows is None else f"[{found.rows[0] or ''}:{found.rows[1]}]"
    return f"{found.module}{rows}{' swapped' * found.swapped}"


def bare(name: str):
    with torch.device("meta"):
        return catalog.build(catalog.entry(name).config)


@pytest.mark.parametrize("name", TABLES)
def test_published_spellings_are_known(name):
    table = spellings(bare(name))
    assert {spelling: said(table[spelling]) for spelling in TABLES[name]} == TABLES[name]
    assert "transformer.transformer_blocks.0.norm1.emb.timestep_embedder.linear_1" not in table  # of one block of many


@pytest.mark.parametrize(("name", "module"), [("icons", "blocks.0.qkv"), ("sd1", "mid_block.resnets.0.conv1")])
def test_names_are_told_as_those_of_the_program_that_gives_them(name, module):
    table = spellings(bare(name))
    prefixes = {"diffusion_model.": "ComfyUI", "unet.": "diffusers", "network.": "the model", "": "the model"}
    assert {prefix: table[prefix + module].program for prefix in prefixes} == prefixes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in TABLES]
)
def test_every_module_is_spelled_in_every_way_and_no_spelling_is_lost(name):
    system = bare(name)
    table = spellings(system)
    towers = [] if name in ("icons", "dit") else list(system.text_encoder.named_children())
    parts = [("network", system.network)] + [(f"text_encoder.{i}", tower) for i, tower in towers]
    known = defaultdict(set)
    for found in table.values():
        known[found.module].add(found.program)
    for prefix, part in parts:
        for module in modules(part):
            programs = known[f"{prefix}.{module}"]
            alike = len(towers) >= 2 and prefix.startswith("text_encoder.")  # LyCORIS does not say which of two towers
            alike &= prefix != "text_encoder.t5xxl"
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
        ("text_encoder.t5xxl.encoder.block.0.layer.0.SelfAttention.q", "text_encoder.t5xxl"),
        ("text_encoder.1.text_projection", "text_encoder.1"),
    ],
)
def test_a_module_belongs_to_a_block(module, wanted):
    assert block(module) == wanted
