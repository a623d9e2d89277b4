"""The names that Latent Diffusion's code, and all that came of it, gives to the tensors of a U-Net.

diffusers' names are ours and need no table. Here the blocks of the way down are counted through (`input_blocks.0` is
the first convolution), halving included, and so are those of the way up, where doubling belongs to the block before it.
In files of a whole model the names begin with `model.diffusion_model.`. Improved DDPM and ADM of OpenAI began it; where
no text is read, attention is theirs.
"""

from __future__ import annotations

from limner.checkpoints.layouts import Place, early_diffusers
from limner.models.unet import UNetConfig

_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}


def ldm_layout(config: UNetConfig, *, by_head: bool = True) -> dict[str, Place]:
    """Our name -> place in a file of Stable Diffusion 1 or 2, SDXL, ADM, or another of the kind.

    `by_head` says how networks that read no text join queries, keys and values: head by head, or all queries first. No
    name nor shape tells. It is the first in all such files but ADM's at 64 pixels (`use_new_attention_order`).
    """
    layout: dict[str, Place] = {}

    def put(ours: str, theirs: str, *tensors: str) -> None:
        layout.update({f"{ours}.{tensor}": Place(f"{theirs}.{tensor}") for tensor in tensors or ("weight", "bias")})

    def block(ours: str, theirs: str, in_width: int, width: int) -> None:
        for a, b in _BLOCK.items():
            put(f"{ours}.{a}", f"{theirs}.{b}")
        if in_width != width:
            put(f"{ours}.conv_shortcut", f"{theirs}.skip_connection")

    def attention(ours: str, theirs: str, width: int, depth: int) -> None:
        if not config.text_width:
            put(f"{ours}.group_norm", f"{theirs}.norm")
            heads = config.heads(width) if by_head else 1
            for part, name in enumerate(("to_q", "to_k", "to_v")):
                layout[f"{ours}.{name}.weight"] = Place(f"{theirs}.qkv.weight", part, 3, heads, "1")
                layout[f"{ours}.{name}.bias"] = Place(f"{theirs}.qkv.bias", part, 3, heads)
            layout[f"{ours}.to_out.0.weight"] = Place(f"{theirs}.proj_out.weight", kept="1")
            layout[f"{ours}.to_out.0.bias"] = Place(f"{theirs}.proj_out.bias")
            return
        for name in ("norm", "proj_in", "proj_out"):
            put(f"{ours}.{name}", f"{theirs}.{name}")
        for k in range(depth):
            a, b = f"{ours}.transformer_blocks.{k}", f"{theirs}.transformer_blocks.{k}"
            for name in ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
                put(f"{a}.{name}", f"{b}.{name}")
            for name in ("to_q", "to_k", "to_v"):
                put(f"{a}.attn1.{name}", f"{b}.attn1.{name}", "weight")
                put(f"{a}.attn2.{name}", f"{b}.attn2.{name}", "weight")

    put("conv_in", "input_blocks.0.0")
    for a, b in (("linear_1", "0"), ("linear_2", "2")):
        put(f"time_embedding.{a}", f"time_embed.{b}")
        if config.vector_width:
            put(f"add_embedding.{a}", f"label_emb.0.{b}")
    if config.num_classes:
        put("class_embedding", "label_emb", "weight")

    widths, last = config.widths, len(config.widths) - 1
    made, x, n = [widths[0]], widths[0], 0
    for i, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
        for j in range(config.num_blocks):
            n += 1
            block(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", x, width)
            if depth:
                attention(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1", width, depth)
            x = width
            made.append(x)
        if i < last:
            n += 1
            made.append(x)
            if config.resample == "conv":
                put(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op")
            else:
                block(f"down_blocks.{i}.downsamplers.0", f"input_blocks.{n}.0", x, x)

    block("mid_block.resnets.0", "middle_block.0", x, x)
    if config.mid_depth:
        attention("mid_block.attentions.0", "middle_block.1", x, config.mid_depth)
    block("mid_block.resnets.1", f"middle_block.{2 if config.mid_depth else 1}", x, x)

    n = 0
    for i, (width, depth) in enumerate(zip(reversed(widths), reversed(config.depths), strict=True)):
        for j in range(config.num_blocks + 1):
            block(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", x + made.pop(), width)
            if depth:
                attention(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1", width, depth)
            x = width
            n += 1
        if i < last:
            theirs = f"output_blocks.{n - 1}.{2 if depth else 1}"
            if config.resample == "conv":
                put(f"up_blocks.{i}.upsamplers.0.conv", f"{theirs}.conv")
            else:
                block(f"up_blocks.{i}.upsamplers.0", theirs, x, x)

    put("conv_norm_out", "out.0")
    put("conv_out", "out.2")
    return layout


def old_diffusers_layout(config: UNetConfig) -> dict[str, Place]:
    """Our name -> place in a file that diffusers wrote of a network without text before 2023 (all of DDPM's are)."""
    return early_diffusers(ldm_layout(config))


def ddpm_layout(config: UNetConfig) -> dict[str, Place]:
    """Our name -> place in a file of DDPM as its PyTorch port keeps it (DDIM's repository): levels of the way up bear
    the numbers of those on the way down, and attention is made of 1 x 1 convolutions."""
    block = {"time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    layout = {}
    for ours in ldm_layout(config):
        match ours.split("."):
            case ["time_embedding", linear, tensor]:
                theirs = f"temb.dense.{'01'[linear == 'linear_2']}.{tensor}"
            case ["mid_block", "attentions", _, name, *_, tensor]:
                theirs = f"mid.attn_1.{attention[name]}.{tensor}"
            case ["mid_block", "resnets", k, name, tensor]:
                theirs = f"mid.block_{int(k) + 1}.{block.get(name, name)}.{tensor}"
            case [("down_blocks" | "up_blocks") as blocks, i, kind, k, name, *_, tensor]:
                way = "down" if blocks == "down_blocks" else "up"
                level = int(i) if way == "down" else len(config.widths) - 1 - int(i)
                theirs = {
                    "resnets": f"{way}.{level}.block.{k}.{block.get(name, name)}.{tensor}",
                    "attentions": f"{way}.{level}.attn.{k}.{attention.get(name)}.{tensor}",
                }.get(kind, f"{way}.{level}.{way}sample.{name}.{tensor}")
            case _:
                theirs = ours.replace("conv_norm_out", "norm_out")
        matrix = ".attentions." in ours and ".group_norm." not in ours and ours.endswith("weight")
        layout[ours] = Place(theirs, kept="1x1" if matrix else "as it is")
    return layout
