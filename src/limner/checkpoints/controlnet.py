"""ControlNets in files: of the authors' code, of diffusers, and as differences to the U-Net they belong to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from limner.checkpoints import layouts, unet
from limner.checkpoints.components import UNETS
from limner.checkpoints.files import assign
from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch
from limner.models.controlnet import HINT_WIDTHS, ControlNet
from limner.models.unet import UNetConfig

HINT = "controlnet_cond_embedding."
HINT_BLOCKS = ("conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out")


def ldm_layout(network: ControlNet) -> dict[str, Place]:
    """Our name -> place in a file of the authors' code, without `control_model.`."""
    names = network.state_dict().keys()
    layout = {ours: place for ours, place in unet.ldm_layout(network.config).items() if ours in names}
    rows = {f"{HINT}{ours}": f"input_hint_block.{2 * k}" for k, ours in enumerate(HINT_BLOCKS)}
    rows |= {f"controlnet_down_blocks.{k}": f"zero_convs.{k}.0" for k in range(len(network.made))}
    rows["controlnet_mid_block"] = "middle_block_out.0"
    for ours, theirs in rows.items():
        layout |= {f"{ours}.{tensor}": Place(f"{theirs}.{tensor}") for tensor in ("weight", "bias")}
    return layout


def read(path: Path, tensors: Mapping[str, Tensor], base: UNetConfig, own: Mapping[str, Tensor]) -> ControlNet:
    """The ControlNet of a file with these tensors, for a U-Net of the configuration `base` whose tensors are `own`.

    Raises CheckpointMismatch for one of another model, and for what is none.
    """
    tensors = {name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}
    if f"{HINT}conv_in.weight" in tensors:
        _same_base(path, tensors, base)
        network = _bare(_with_depths(base, tensors), _hint_widths(tensors))
        layout = {name: Place(name) for name in network.state_dict()}
    elif "input_hint_block.0.weight" in tensors:
        network = _bare(replace(base, in_channels=base.out_channels))
        layout = ldm_layout(network)
        if "lora_controlnet" in tensors:
            tensors = _whole(path, tensors, layout, own)
        _same_base(path, tensors, base)
    else:
        first = min(tensors, default="none")
        raise CheckpointMismatch(
            f"{path} is no ControlNet: of its {len(tensors)} tensors (first: {first:.100}) none is one's"
        )
    if unions := sorted(name for name in tensors if name.startswith(("task_embedding", "control_add_embedding"))):
        raise CheckpointMismatch(
            f"{path} is a ControlNet of several kinds (union: {unions[0]}), which Limner does not read"
        )
    layouts.fit(layout, network.state_dict(), tensors, f"{path}, read as a ControlNet")
    assign(network, layouts.read(layout, tensors, path), path)
    return network.requires_grad_(False).eval()


def _bare(config: UNetConfig, hint_widths: tuple[int, ...] = HINT_WIDTHS) -> ControlNet:
    with torch.device("meta"):
        return ControlNet(config, hint_widths)


def _hint_widths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    names = [f"{HINT}conv_in.weight", *(f"{HINT}blocks.{2 * k + 1}.weight" for k in range(9))]
    return tuple(tensors[name].shape[0] for name in names if name in tensors)


def _with_depths(base: UNetConfig, tensors: Mapping[str, Tensor]) -> UNetConfig:
    """`base` with as many transformers as there are: small ControlNets of SDXL have fewer, or none."""

    def depth(place: str) -> int:
        blocks = (f"{place}.transformer_blocks.{k}.norm1.weight" for k in itertools.count())
        return next(k for k, name in enumerate(blocks) if name not in tensors)

    levels = range(len(base.widths))
    return replace(
        base,
        in_channels=base.out_channels,
        depths=tuple(depth(f"down_blocks.{i}.attentions.0") for i in levels),
        mid_depth=depth("mid_block.attentions.0"),
    )


def _same_base(path: Path, tensors: Mapping[str, Tensor], base: UNetConfig) -> None:
    """Raises CheckpointMismatch for a ControlNet of a U-Net that reads other words."""
    text = next((t.shape[-1] for name, t in tensors.items() if name.endswith("attn2.to_k.weight")), base.text_width)
    if text != base.text_width:
        its, mine = (UNETS.get(width, f"a model of words {width} wide") for width in (text, base.text_width))
        raise CheckpointMismatch(f"{path} is a ControlNet of {its}, this is {mine}: take one made for it")


def _whole(
    path: Path, tensors: Mapping[str, Tensor], layout: Mapping[str, Place], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a control-LoRA: W + up x down in place of W, as Stability's files have it."""
    found = {
        name: t for name, t in tensors.items() if not name.endswith((".up", ".down")) and name != "lora_controlnet"
    }
    for ours, place in layout.items():
        module = place.name.removesuffix(".weight")
        up, down = tensors.get(f"{module}.up"), tensors.get(f"{module}.down")
        if place.name in found or ours not in own or (up is None) != (down is None):
            continue
        weight = own[ours]
        if up is not None and down is not None:
            if up.shape[0] != weight.shape[0] or up.shape[1] != down.shape[0] or down[0].numel() != weight[0].numel():
                raise CheckpointMismatch(
                    f"{path}: {module}.up {tuple(up.shape)} and .down {tuple(down.shape)} make no {tuple(weight.shape)}"
                )
            product = up.flatten(1).float() @ down.flatten(1).float()
            weight = (weight.float().cpu() + product.view(weight.shape)).to(up.dtype)
        found[place.name] = weight.cpu()
    return found
