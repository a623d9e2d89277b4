"""Names for the tensors of `models.autoencoder` in files that are not diffusers' (whose names are ours).

Files of the original code may hold more than the autoencoder: its tensors begin with `first_stage_model.` in a complete
Stable Diffusion, and a training file has a `loss.` beside it. Cut that off first; a layout knows only the autoencoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from limner.checkpoints.layouts import Layout, Place, early_diffusers
from limner.models.autoencoder import AutoencoderConfig, KLConfig, VQConfig


def ldm_layout(config: AutoencoderConfig) -> Layout:
    """The original latent diffusion (CompVis and Stability AI) and FLUX: `encoder.down.0.block.0.norm1.weight`.

    There, levels of the decoder count from the fine end as well, and attention is made of 1x1 convolutions.
    """
    last = len(config.widths) - 1
    rows: dict[str, Place] = {}
    for half, blocks in (("encoder", config.blocks), ("decoder", config.blocks + 1)):
        rows |= _module(f"{half}.conv_in", f"{half}.conv_in")
        for i, width in enumerate(config.widths):
            if half == "encoder":
                ours, theirs, step = f"encoder.down_blocks.{i}", f"encoder.down.{i}", "downsample" if i < last else ""
                before = config.widths[max(i - 1, 0)]
            else:
                ours, theirs, step = f"decoder.up_blocks.{last - i}", f"decoder.up.{i}", "upsample" if i else ""
                before = config.widths[min(i + 1, last)]
            for j in range(blocks):
                rows |= _residual(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", shortcut=j == 0 and before != width)
                if i in config.attention_levels:
                    rows |= _attention(f"{ours}.attentions.{j}", f"{theirs}.attn.{j}")
            if step:
                rows |= _module(f"{ours}.{step}rs.0.conv", f"{theirs}.{step}.conv")
        rows |= _residual(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1")
        rows |= _attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        rows |= _residual(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2")
        rows |= _module(f"{half}.conv_norm_out", f"{half}.norm_out")
        rows |= _module(f"{half}.conv_out", f"{half}.conv_out")
    if not isinstance(config, KLConfig) or config.quant_convs:
        rows |= _module("quant_conv", "quant_conv") | _module("post_quant_conv", "post_quant_conv")
    if isinstance(config, VQConfig):
        rows["quantize.embedding.weight"] = Place("quantize.embedding.weight")
    return rows


def ldm_config(shapes: Mapping[str, Sequence[int]], scale: float) -> KLConfig:
    """The configuration of a KL autoencoder whose tensors have these names and shapes, which do not tell its scale.

    Raises KeyError for a name that every one has.
    """
    return _config(shapes, scale, "encoder.down.{}.block.{}.conv1.weight")


def own_config(shapes: Mapping[str, Sequence[int]], scale: float) -> KLConfig:
    """As `ldm_config`, of a file with diffusers' names, which are ours."""
    return _config(shapes, scale, "encoder.down_blocks.{}.resnets.{}.conv1.weight")


def _config(shapes: Mapping[str, Sequence[int]], scale: float, block: str) -> KLConfig:
    """`block` is how the first weight of block j of level i is called; only the original code attends on the way."""
    down = block.format
    levels = next(i for i in itertools.count() if down(i, 0) not in shapes)
    return KLConfig(
        image_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        widths=tuple(shapes[down(i, 0)][0] for i in range(levels)),
        blocks=next(j for j in itertools.count() if down(0, j) not in shapes),
        attention_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in shapes),
        quant_convs="quant_conv.weight" in shapes,
        scale=scale,
    )


def early_diffusers_layout(config: AutoencoderConfig) -> Layout:
    """Files that diffusers wrote until mid-2023, which spell attention `query`, `key`, `value` and `proj_attn`."""
    return early_diffusers(ldm_layout(config))


def _residual(ours: str, theirs: str, shortcut: bool = False) -> dict[str, Place]:
    rows: dict[str, Place] = {}
    for name in ("norm1", "conv1", "norm2", "conv2"):
        rows |= _module(f"{ours}.{name}", f"{theirs}.{name}")
    return rows | (_module(f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut") if shortcut else {})


def _attention(ours: str, theirs: str) -> dict[str, Place]:
    rows = _module(f"{ours}.group_norm", f"{theirs}.norm")
    for name, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        rows |= {
            f"{ours}.{name}.weight": Place(f"{theirs}.{old}.weight", kept="1x1"),
            f"{ours}.{name}.bias": Place(f"{theirs}.{old}.bias"),
        }
    return rows


def _module(ours: str, theirs: str) -> dict[str, Place]:
    return {f"{ours}.{leaf}": Place(f"{theirs}.{leaf}") for leaf in ("weight", "bias")}
