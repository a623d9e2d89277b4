"""The names that Latent Diffusion's code, and all that came of it, gives to the tensors of a U-Net.

diffusers' names are ours and need no table. Here the blocks of the way down are counted through (`input_blocks.0` is
the first convolution), halving included, and so are those of the way up, where doubling belongs to the block before it.
In files of a whole model the names begin with `model.diffusion_model.`.
"""

from __future__ import annotations

from limner.checkpoints.layouts import Place
from limner.models.unet import UNetConfig

_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}


def ldm_layout(config: UNetConfig) -> dict[str, Place]:
    """Our name -> place in a file of Stable Diffusion 1 or 2, SDXL, or another of the kind."""
    layout: dict[str, Place] = {}

    def put(ours: str, theirs: str, *tensors: str) -> None:
        layout.update({f"{ours}.{tensor}": Place(f"{theirs}.{tensor}") for tensor in tensors or ("weight", "bias")})

    def block(ours: str, theirs: str, in_width: int, width: int) -> None:
        for a, b in _BLOCK.items():
            put(f"{ours}.{a}", f"{theirs}.{b}")
        if in_width != width:
            put(f"{ours}.conv_shortcut", f"{theirs}.skip_connection")

    def attention(ours: str, theirs: str, depth: int) -> None:
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
                attention(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1", depth)
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
        attention("mid_block.attentions.0", "middle_block.1", config.mid_depth)
    block("mid_block.resnets.1", f"middle_block.{2 if config.mid_depth else 1}", x, x)

    n = 0
    for i, (width, depth) in enumerate(zip(reversed(widths), reversed(config.depths), strict=True)):
        for j in range(config.num_blocks + 1):
            block(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", x + made.pop(), width)
            if depth:
                attention(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1", depth)
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
