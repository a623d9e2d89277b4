"""ControlNets in files: of the authors' code, of diffusers, and as differences to the U-Net they belong to; unions."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from limner.checkpoints import layouts, unet
from limner.checkpoints.components import UNETS
from limner.checkpoints.files import assign, shown
from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch, Ignored
from limner.models.controlnet import HINT_WIDTHS, ControlNet, ControlNetUnion
from limner.models.unet import UNetConfig

HINT, PREFIX = "controlnet_cond_embedding.", "control_model."
HINT_BLOCKS = ("conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out")
LORA, DIFFERENCE, TASKS = "lora_controlnet", "difference", "task_embedding"


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
    """The ControlNet of a file with these tensors, for a U-Net of the configuration `base` whose tensors are `own`. A
    whole model beside it is left out, which is told (Ignored).

    Raises CheckpointMismatch for one of another model, and for what is none.
    """
    inside = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if beside := len(tensors.keys() - {DIFFERENCE, LORA}) - len(inside) if inside else 0:
        warnings.warn(f"{path}: {beside} tensors beside the ControlNet are left out", Ignored, stacklevel=2)
    tensors = inside | {name: tensors[name] for name in (DIFFERENCE, LORA) if name in tensors} if inside else tensors
    if f"{HINT}conv_in.weight" in tensors:
        _same_base(path, tensors, base)
        network = _bare(_with_depths(base, tensors), tensors)
        layout = {name: Place(name) for name in network.state_dict()}
    elif "input_hint_block.0.weight" in tensors:
        _same_base(path, tensors, base)
        network = _bare(_seeing_latents(base), {})
        layout = ldm_layout(network)
        if LORA in tensors or DIFFERENCE in tensors:
            tensors = _whole(path, tensors, layout, own)
    else:
        first = shown(min(tensors, default="none"))
        raise CheckpointMismatch(
            f"{path} is no ControlNet or T2I-Adapter: none of its {len(tensors)} tensors is one's (first: {first})"
        )
    layouts.fit(layout, network.state_dict(), tensors, f"{path}, read as a ControlNet")
    assign(network, layouts.read(layout, tensors, path), path)
    return network.requires_grad_(False).eval()


def _bare(config: UNetConfig, tensors: Mapping[str, Tensor]) -> ControlNet:
    """The network with nothing in its weights yet, a union if there are tensors of one."""
    names = [f"{HINT}conv_in.weight", *(f"{HINT}blocks.{2 * k + 1}.weight" for k in range(9))]
    widths = tuple(tensors[name].shape[0] for name in names if name in tensors) or HINT_WIDTHS
    with torch.device("meta"):
        if TASKS not in tensors:
            return ControlNet(config, widths)
        return ControlNetUnion(config, widths, len(tensors[TASKS]), _count(tensors, "transformer_layes.{}.ln_1.weight"))


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    return next(k for k in itertools.count() if name.format(k) not in tensors)


def _seeing_latents(base: UNetConfig) -> UNetConfig:
    """`base` told no more than what it denoises: no mask beside it, no scale of guidance."""
    return replace(base, in_channels=base.out_channels, guidance_width=0)


def _with_depths(base: UNetConfig, tensors: Mapping[str, Tensor]) -> UNetConfig:
    """`base` with as many transformers as there are: small ControlNets of SDXL have fewer, or none."""

    def depth(place: str) -> int:
        return _count(tensors, f"{place}.transformer_blocks.{{}}.norm1.weight")

    levels = range(len(base.widths))
    return replace(
        _seeing_latents(base),
        depths=tuple(depth(f"down_blocks.{i}.attentions.0") for i in levels),
        mid_depth=depth("mid_block.attentions.0"),
    )


def _same_base(path: Path, tensors: Mapping[str, Tensor], base: UNetConfig) -> None:
    """Raises CheckpointMismatch for a ControlNet of a U-Net that reads other words."""
    ends = ("attn2.to_k.weight", "attn2.to_k.down")
    text = next((t.shape[1] for name, t in tensors.items() if name.endswith(ends) and t.dim() > 1), base.text_width)
    if text != base.text_width:
        its, mine = (UNETS.get(width, f"a model of words {width} wide") for width in (text, base.text_width))
        raise CheckpointMismatch(f"{path} is a ControlNet of {its}, this is {mine}: take one made for it")


def _whole(
    path: Path, tensors: Mapping[str, Tensor], layout: Mapping[str, Place], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a control-LoRA, W + up x down in place of W, as Stability's files have it; or of the differences
    from W that the authors' code can write."""
    marks, differs = {LORA, DIFFERENCE}, DIFFERENCE in tensors
    found = {name: t for name, t in tensors.items() if not name.endswith((".up", ".down")) and name not in marks}
    for ours, place in layout.items():
        module = place.name.removesuffix(".weight")
        up, down = tensors.get(f"{module}.up"), tensors.get(f"{module}.down")
        if ours not in own or (up is None) != (down is None):
            continue
        weight, there = own[ours].float(), found.get(place.name)
        if there is not None:
            if differs and there.shape == weight.shape:
                found[place.name] = weight.to(there.device) + there.float()
            continue
        if up is not None and down is not None:
            if up.shape[0] != weight.shape[0] or up.shape[1] != down.shape[0] or down[0].numel() != weight[0].numel():
                raise CheckpointMismatch(
                    f"{path}: {module}.up {tuple(up.shape)} and .down {tuple(down.shape)} make no {tuple(weight.shape)}"
                )
            weight = weight.to(up.device) + (up.flatten(1).float() @ down.flatten(1).float()).view(weight.shape)
        elif differs:
            continue  # is missing
        found[place.name] = weight.to(own[ours].dtype)
    used = {place.name.removesuffix(".weight") for place in layout.values()}
    stray = [name for name in tensors if name.endswith((".up", ".down")) and name.rpartition(".")[0] not in used]
    if stray:
        raise CheckpointMismatch(f"{path}: {len(stray)} of its keys are of no module (first: {min(stray):.100})")
    return found
