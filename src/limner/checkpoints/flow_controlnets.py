"""ControlNets of FLUX.1 and Stable Diffusion 3 in files: of diffusers, as InstantX, Shakker and others publish them, of
XLabs, and of Stability."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.checkpoints import flux, layouts, mmdit, t2i_adapter
from limner.checkpoints.components import UNETS
from limner.checkpoints.files import assign, shown
from limner.checkpoints.layouts import Place
from limner.errors import Assumed, CheckpointMismatch
from limner.models.flux import FluxConfig
from limner.models.flux_controlnet import FluxControlNet
from limner.models.mmdit import MMDiTConfig
from limner.models.mmdit_controlnet import MMDiTControlNet

Shapes = Mapping[str, Sequence[int]]
FLUX, SD3 = "FLUX.1", "Stable Diffusion 3"
ZERO_POOLED = "force_zeros_for_pooled_projection"
"""What diffusers' config.json says of it."""


def family(names: Mapping[str, Any]) -> str:
    """Of which of the two a ControlNet with tensors of these names is, "" for neither."""
    if "controlnet_blocks.0.weight" not in names:
        return ""
    if "pos_embed_input.proj.weight" in names:
        return SD3
    return FLUX if "controlnet_x_embedder.weight" in names or flux.is_authors(names) else ""


def read(
    path: Path, tensors: Mapping[str, Tensor], base: FluxConfig | MMDiTConfig, factor: int, settings: Mapping[str, Any]
) -> FluxControlNet | MMDiTControlNet:
    """The ControlNet of a file with these tensors, for a network of the configuration `base` on latents of `factor`
    pixels. `settings` are those of diffusers' folder, if it is one. What no tensor tells without is taken as InstantX
    has it, and said (Assumed).

    Raises CheckpointMismatch for one of another model, and for what is none.
    """
    mine = FLUX if isinstance(base, FluxConfig) else SD3
    if family(tensors) != mine:
        raise _another(path, tensors, mine)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        if isinstance(base, FluxConfig):
            network, layout = _flux(path, shapes, base, factor)
        else:
            network, layout = _sd3(path, shapes, base, settings)
    except KeyError as error:
        raise CheckpointMismatch(f"{path} is like a ControlNet of {mine}, but not whole: no {error}") from error
    layouts.fit(layout, network.state_dict(), tensors, f"{path}, read as a ControlNet of {mine}")
    assign(network, layouts.read(layout, tensors, path), path)
    return network.requires_grad_(False).eval()


def _flux(
    path: Path, shapes: Shapes, base: FluxConfig, factor: int
) -> tuple[FluxControlNet | MMDiTControlNet, dict[str, Place]]:
    config, num_kinds = flux.controlnet_config_of(shapes, path)
    hint_widths = flux.hint_widths_of(shapes)
    authors = flux.is_authors(shapes)
    seen = 0 if authors else shapes["controlnet_x_embedder.weight"][1]
    if seen > config.in_channels:
        raise _inpaints(path)
    its = {
        "channels of tokens": (config.in_channels, base.out_channels), "width": (config.width, base.width),
        "heads": (config.num_heads, base.num_heads), "width of words": (config.text_width, base.text_width),
        "width of the pooled prompt": (config.pooled_width, base.pooled_width),
        "pixels a latent": (2 ** (len(hint_widths) - 1) if hint_widths else factor, factor),
    }  # fmt: skip
    _same(path, FLUX, its)
    if config.guidance_embedded and not base.guidance_embedded:
        raise CheckpointMismatch(
            f"{path} is a ControlNet of a FLUX.1 that is told the scale of guidance, such as dev, which this one is "
            "not: take one made for it"
        )
    with torch.device("meta"):
        network = FluxControlNet(config, num_kinds, hint_widths)
    if authors:
        return network, flux.xlabs_layout(config, hint_widths)
    return network, flux.controlnet_layout(config, num_kinds, hint_widths)


def _sd3(
    path: Path, shapes: Shapes, base: MMDiTConfig, settings: Mapping[str, Any]
) -> tuple[FluxControlNet | MMDiTControlNet, dict[str, Place]]:
    config = mmdit.control_config_of(shapes)
    if config.embeds:
        zero_pooled = settings.get(ZERO_POOLED, True)
        if not isinstance(zero_pooled, bool):
            raise CheckpointMismatch(f"{path}: {ZERO_POOLED} is {zero_pooled!r:.100}, not true or false")
        config = replace(config, zero_pooled=zero_pooled)
    size = config.size
    if config.hint_channels == base.channels + 1:
        raise _inpaints(path)
    its = {
        "channels of the picture": (config.hint_channels, base.channels), "patch": (size.patch, base.patch),
        "width": (size.width, base.width), "width of the pooled prompt": (size.pooled_width, base.pooled_width),
    }  # fmt: skip
    if config.embeds:
        its["channels of latents"] = size.channels, base.channels
    if config.reads_text:
        its["width of words"] = size.text_width, base.text_width
    _same(path, SD3, its)
    if config.embeds and not settings:
        warnings.warn(
            f"{path}: no tensor tells whether it is told the pooled prompt; it is taken for one like InstantX's, which "
            "is not, and sees latents that are not shifted",
            Assumed,
            2,
        )
    with torch.device("meta"):
        network = MMDiTControlNet(config)
    if "transformer_blocks.0.attn.qkv.weight" in shapes:
        return network, mmdit.stability_control_layout(config)
    return network, mmdit.control_layout(config)


# -------------------------------------------------------------------- what does not fit


def _same(path: Path, title: str, rows: Mapping[str, tuple[int, int]]) -> None:
    """Raises CheckpointMismatch unless both of each row, the file's and the model's, are the same."""
    apart = [f"{name} {its}, here {mine}" for name, (its, mine) in rows.items() if its != mine]
    if apart:
        raise CheckpointMismatch(f"{path} is a ControlNet of another {title} than this: {'; '.join(apart)}")


def _inpaints(path: Path) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{path} is a ControlNet for inpainting, which sees a mask too: those are not read here; limner edit --mask "
        "paints with the model alone"
    )


def _another(path: Path, tensors: Mapping[str, Tensor], mine: str) -> CheckpointMismatch:
    """What the file is for, if not for `mine`."""
    kind, its = ("T2I-Adapter", "a U-Net") if t2i_adapter.is_one(tensors) else ("ControlNet", family(tensors))
    ends = ("attn2.to_k.weight", "attn2.to_k.down")
    words = next((t.shape[1] for name, t in tensors.items() if name.endswith(ends) and t.dim() > 1), None)
    hints = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
    if not its and (words is not None or any(name.endswith(hints) for name in tensors)):
        its = UNETS.get(words or 0, "a U-Net")
    if not its:
        first = shown(min(tensors, default="none"))
        return CheckpointMismatch(
            f"{path} is no ControlNet: none of its {len(tensors)} tensors is one's (first: {first})"
        )
    return CheckpointMismatch(f"{path} is a {kind} of {its}, this is {mine}: take one made for it")
