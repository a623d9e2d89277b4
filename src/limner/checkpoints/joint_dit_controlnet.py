"""ControlNets of our own flow transformers in files of ours, which say in their metadata what they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from limner.checkpoints import files
from limner.checkpoints.quantization import quantize
from limner.errors import CheckpointMismatch, complaint
from limner.models.joint_dit import JointDiTConfig
from limner.models.joint_dit_controlnet import JointDiTControlNet, JointDiTControlNetConfig

TITLE = "icons"
SMALLEST = 4096
"""Numbers of a matrix that is stored in 8 bits."""


def is_one(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are of one."""
    return {"hint_in.0.weight", "hint_out.weight", "controlnet_blocks.0.weight"} <= names.keys()


def save(network: JointDiTControlNet, path: Path, bits: int) -> None:
    """Write the file: matrices in `bits` 8, 16 or 32, the rest in 16 at least. Raises FileProblem."""
    tensors = {name: tensor.detach().cpu().float() for name, tensor in network.state_dict().items()}
    stored, recipe = quantize(
        tensors, lambda _, t: bits if bits != 8 else 8 if t.dim() > 1 and t.numel() >= SMALLEST else 16
    )
    files.save(path, stored, {**asdict(network.control), "quantization": recipe})


def config_in(path: Path) -> JointDiTControlNetConfig:
    """Of a file with one. Raises FileProblem, CheckpointMismatch."""
    told = files.config_in(files.read(path)[1], path)
    told.pop("quantization", None)
    try:
        return TypeAdapter(JointDiTControlNetConfig).validate_python(told)
    except ValidationError as error:
        reason = complaint(error.errors()[0])
        raise CheckpointMismatch(f"{path} is like a ControlNet of {TITLE}, but says otherwise ({reason})") from error


def read(path: Path, base: Any, factor: int) -> JointDiTControlNet:
    """The ControlNet of a file, for a network of the configuration `base` on latents of `factor` pixels. Raises
    FileProblem, and CheckpointMismatch for one of another model, and for what is none."""
    if not is_one(files.read(path)[0]):
        raise CheckpointMismatch(f"{path} is no ControlNet of {TITLE}, which this is: take one made for it")
    if not isinstance(base, JointDiTConfig):
        raise CheckpointMismatch(f"{path} is a ControlNet of {TITLE}, this is another: take one made for it")
    config = config_in(path)
    mine = (_outer(base), base.width, base.depth, factor)
    its = (_outer(config.size), config.base_width, config.base_depth, 2 ** len(config.hint_widths))
    if its != mine:
        told, here = (f"{n[2]} blocks {n[1]} wide on {n[0].channels} channels of {n[3]} pixels" for n in (its, mine))
        raise CheckpointMismatch(f"{path} is a ControlNet of another network than this: of {told}, here {here}")
    if not 0 < config.size.depth <= base.depth or min(config.hint_widths, default=0) < 1:
        raise CheckpointMismatch(f"{path} is like a ControlNet of {TITLE}, but its sizes cannot be: get it again")
    with torch.device("meta"):
        network = JointDiTControlNet(config)
    files.assign(network, files.load(path)[0], path)
    return network.requires_grad_(False).eval()


def _outer(size: JointDiTConfig) -> JointDiTConfig:
    """What it shares with the network that it is for."""
    return replace(size, width=0, depth=0, num_heads=0, hidden=0)
