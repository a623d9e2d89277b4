"""The names that Latent Diffusion's code, and all that came of it, gives to the tensors of a U-Net.

diffusers' names are ours and need no table. Here the blocks of the way down are counted through (`input_blocks.0` is
the first convolution), halving included, and so are those of the way up, where doubling belongs to the block before it.
In files of a whole model the names begin with `model.diffusion_model.`. Improved DDPM and ADM of OpenAI began it; where
no text is read, attention is theirs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    if config.guidance_width:
        put("time_embedding.cond_proj", "time_embed.cond_proj", "weight")
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


def classifier_layout(config: UNetConfig) -> dict[str, Place]:
    """Our name -> place in a file of guided_diffusion of a `limner.models.classifier.Classifier` whose first part is
    that of such a U-Net. Its attention goes head by head, but the pooling has all queries first."""
    layout = {f"encoder.{name}": place for name, place in ldm_layout(config).items() if not name.startswith(ENDS)}
    for tensor in ("weight", "bias"):
        kept: Any = "1" if tensor == "weight" else "as it is"
        layout[f"norm_out.{tensor}"] = Place(f"out.0.{tensor}")
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            layout[f"pool.{name}.{tensor}"] = Place(f"out.2.qkv_proj.{tensor}", part, 3, kept=kept)
        layout[f"pool.to_out.{tensor}"] = Place(f"out.2.c_proj.{tensor}", kept=kept)
    return layout | {"pool.positional_embedding": Place("out.2.positional_embedding")}


ENDS = ("up_blocks.", "conv_norm_out.", "conv_out.")


def ldm_config(shapes: Mapping[str, Sequence[int]]) -> UNetConfig:
    """The configuration of a U-Net that reads text, whose tensors have these names and shapes.

    How many heads there are they do not tell: networks of Stable Diffusion 1 and the upscaler have 8, later ones heads
    that are 64 wide. Raises KeyError for a name that every such network has.
    """
    levels: list[list[int]] = [[]]  # of each level the depths of its blocks
    widths: list[int] = []
    for n in itertools.count(1):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
        elif f"input_blocks.{n}.0.in_layers.2.weight" in shapes:
            widths[len(levels) - 1 :] = [shapes[f"input_blocks.{n}.0.in_layers.2.weight"][0]]
            levels[-1].append(_depth(shapes, f"input_blocks.{n}.1"))
        else:
            break
    at = [f"input_blocks.{1 + i * (len(levels[0]) + 1)}.1" for i in range(len(levels))]  # the first of a level
    return _config(
        shapes, "input_blocks.0.0", "out.2", widths, len(levels[0]), [max(depths, default=0) for depths in levels], at,
        "middle_block.1", {"vector": "label_emb.0.0", "classes": "label_emb", "guidance": "time_embed.cond_proj"},
    )  # fmt: skip


def own_config(shapes: Mapping[str, Sequence[int]]) -> UNetConfig:
    """As `ldm_config`, of a file with diffusers' names, which are ours."""
    levels = next(i for i in itertools.count() if f"down_blocks.{i}.resnets.0.conv1.weight" not in shapes)
    at = [f"down_blocks.{i}.attentions.0" for i in range(levels)]
    return _config(
        shapes, "conv_in", "conv_out", [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        next(j for j in itertools.count() if f"down_blocks.0.resnets.{j}.conv1.weight" not in shapes),
        [_depth(shapes, place) for place in at], at, "mid_block.attentions.0",
        {"vector": "add_embedding.linear_1", "classes": "class_embedding", "guidance": "time_embedding.cond_proj"},
    )  # fmt: skip


def _config(
    shapes: Mapping[str, Sequence[int]],
    first: str,
    out: str,
    widths: list[int],
    num_blocks: int,
    depths: list[int],
    at: list[str],
    middle: str,
    told: Mapping[str, str],
) -> UNetConfig:
    """`at` are the first attentions of the levels, where there is one; `told` is where numbers and classes come in."""
    attention = next((place for place, depth in zip(at, depths, strict=True) if depth), middle)
    linear = len(shapes[f"{attention}.proj_in.weight"]) == 2
    text_width = shapes[f"{attention}.transformer_blocks.0.attn2.to_k.weight"][1]
    vector, classes, guidance = (f"{told[name]}.weight" for name in ("vector", "classes", "guidance"))
    num_classes = shapes.get(classes, (0,))[0]
    sources = [shapes.get(f"{place}.transformer_blocks.0.attn1.to_k.weight", (0, 0))[1] for place in at]
    only = tuple(source == text_width != width for source, width in zip(sources, widths, strict=True))
    return UNetConfig(
        in_channels=shapes[f"{first}.weight"][1],
        out_channels=shapes[f"{out}.weight"][0],
        widths=tuple(widths),
        num_blocks=num_blocks,
        depths=tuple(depths),
        mid_depth=_depth(shapes, middle),
        num_heads=8 if num_classes or not linear else 0,
        head_width=0 if num_classes or not linear else 64,
        text_width=text_width,
        text_only=only if any(only) else (),
        linear_projection=linear,
        vector_width=shapes.get(vector, (0, 0))[1],
        guidance_width=shapes.get(guidance, (0, 0))[1],
        num_classes=num_classes,
    )


def _depth(shapes: Mapping[str, Sequence[int]], place: str) -> int:
    return next(k for k in itertools.count() if f"{place}.transformer_blocks.{k}.norm1.weight" not in shapes)


_WORDS = (
    "input_blocks|output_blocks|middle_block|transformer_blocks|in_layers|out_layers|emb_layers|skip_connection|"
    "time_embed|label_emb|cond_proj|proj_in|proj_out|to_q|to_k|to_v|to_out|attn[12]|norm[123]|norm|ff|net|proj|op|"
    "conv|out|weight|bias|[0-9]"
)


def dotted(name: str) -> str:
    """A name of `ldm_layout` from which the dots were taken, as the averaged weights (EMA) of Latent Diffusion's
    training bear them: only a block's own number has more than one digit."""
    name = re.sub(r"(input_blocks|output_blocks)([0-9]+)([0-9])", r"\1.\2.\3.", name)
    parts = (part if part.isdigit() else ".".join(re.findall(_WORDS, part)) for part in name.split(".") if part)
    return ".".join(parts)


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
