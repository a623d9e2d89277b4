"""T2I-Adapters in files: of the authors' code and of diffusers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from limner.checkpoints import layouts
from limner.checkpoints.files import assign
from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch
from limner.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from limner.models.unet import UNetConfig

XL_FOLD = 16


def is_one(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors of these names are of one."""
    bare = {name.removeprefix("adapter.") for name in tensors}
    return any(f"body.0.{block}block1.weight" in bare for block in ("", "resnets.0.", "body.0."))


def read(path: Path, tensors: Mapping[str, Tensor], base: UNetConfig, factor: int) -> T2IAdapter:
    """The T2I-Adapter of a file with these tensors, for a U-Net of the configuration `base` on latents of `factor`
    pixels. Raises CheckpointMismatch for one of another model, and for what is none."""
    names = ours(tensors)
    found = {name: tensors[theirs] for name, theirs in names.items()}
    try:
        config = config_of(found)
    except (KeyError, ZeroDivisionError) as error:
        raise CheckpointMismatch(f"{path} is like a T2I-Adapter, but not whole: there is no {error}") from error
    wanted = places(base, factor)
    kinds = [replace(config, halved=halved) for halved in (tuple(range(1, len(config.widths))), (2,))]
    config = next((kind for kind in kinds if told(kind) in (wanted, wanted[:-1])), config)
    if told(config) not in (wanted, wanted[:-1]):
        its = "Stable Diffusion XL" if config.fold == XL_FOLD else "Stable Diffusion 1 or 2"
        rows = (", ".join(f"{width} at 1/{size}" for width, size in made) for made in (told(config), wanted))
        raise CheckpointMismatch("{} is a T2I-Adapter of {}: it tells {}, this model has {}".format(path, its, *rows))
    with torch.device("meta"):
        network = T2IAdapter(config)
    layout = {name: Place(names.get(name, name)) for name in network.state_dict()}
    layouts.fit(layout, network.state_dict(), tensors, f"{path}, read as a T2I-Adapter")
    assign(network, layouts.read(layout, tensors, path), path)
    return network.requires_grad_(False).eval()


def ours(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name, which is diffusers' without `adapter.`, -> that of the file. The authors count the blocks of all levels
    through, the first of which may have an `in_conv`."""
    bare = {name.removeprefix("adapter."): name for name in tensors}
    step = next((k for k in itertools.count(1) if f"body.{k}.in_conv.weight" in bare or k > 99), 1)

    def name(theirs: str) -> str:
        if "body.0.body.0.block1.weight" in bare:  # light
            return re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", theirs)
        if "body.0.block1.weight" in bare and (match := re.fullmatch(r"body\.(\d{1,3})\.(\w+)\.(\w+)", theirs)):
            level, k = divmod(int(match[1]), step)
            return f"body.{level}.{f'resnets.{k}.' if match[2] != 'in_conv' or k else ''}{match[2]}.{match[3]}"
        return theirs

    return {name(theirs): full for theirs, full in bare.items()}


def config_of(tensors: Mapping[str, Tensor]) -> T2IAdapterConfig:
    """Of tensors with our names. Raises KeyError for one that every T2I-Adapter has."""
    light = "body.0.out_conv.weight" in tensors
    last = "body.{}.out_conv.weight" if light else "body.{}.resnets.0.block1.weight"
    widths = tuple(tensors[last.format(k)].shape[0] for k in range(_count(tensors, last)))
    folded = tensors["body.0.in_conv.weight" if light else "conv_in.weight"].shape[1]
    channels = 3 if folded % 3 == 0 else 1
    fold = math.isqrt(folded // channels)
    return T2IAdapterConfig(
        widths=widths, halved=(2,) if fold == XL_FOLD else tuple(range(1, len(widths))), fold=fold, light=light,
        num_blocks=_count(tensors, "body.0.resnets.{}.block1.weight"), in_channels=channels,
    )  # fmt: skip


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    return next(k for k in itertools.count() if name.format(k) not in tensors)


def told(config: T2IAdapterConfig) -> list[tuple[int, int]]:
    """Width of what each level makes, and how many pixels a side are one."""
    return [(width, config.fold * 2 ** sum(at <= i for at in config.halved)) for i, width in enumerate(config.widths)]


def places(base: UNetConfig, factor: int) -> list[tuple[int, int]]:
    """The same of what a U-Net can be told: at the end of each level, and by the middle."""
    last = len(base.widths) - 1
    rows = [
        (width, factor * 2 ** (i + (not depth and i < last)))
        for i, (width, depth) in enumerate(zip(base.widths, base.depths, strict=True))
    ]
    return [*rows, (base.widths[-1], factor * 2**last)]
