"""Weights, gradients, moments and averages cut among the processes (FSDP2, arXiv:2304.11277), and whole again."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from limner.errors import UsageError
from limner.training.memory import repeated_blocks

if TYPE_CHECKING:
    from limner.training.config import TrainConfig
    from limner.training.processes import Processes

MODULATES = re.compile(r"(adaLN_modulation|modulation|_mod|time_emb_proj)\b")
"""Layers that networks ask for all blocks at once, before any of these is at work: they are cut by themselves."""


def check_sharding(config: TrainConfig, phases: int) -> None:
    """Raises UsageError where the whole of a matrix is needed, or of a system's phases, or of all that overflowed."""
    for name, found, wanted in (
        ("optimizer", config.optimizer, "adamw"),
        ("precision", config.precision.replace("auto", "fp32"), "bf16 or fp32"),
        ("phases", str(phases), "1"),
    ):
        if found not in wanted.split(" or "):
            raise UsageError(f"sharding=fsdp goes with {name}={wanted}, and this run has {found}: take sharding=ddp")


def shard(loss: nn.Module, system: nn.Module, processes: Processes) -> None:
    """Cut the parts of `system` that learn; each repeated block is whole only while it is at work. `loss` is the module
    that calls the system; frozen parts stay whole."""
    whole_parts = [part for part in system.children() if not any(p.requires_grad for p in part.parameters())]
    ignored = {p for part in whole_parts for p in part.parameters()}
    for p in set(system.parameters()) - ignored:
        p.data = p.data.contiguous()  # FSDP cuts no kernels that lie channels last
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in repeated_blocks(system):
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and MODULATES.search(name):
                fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(loss, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)


def twin(system: nn.Module) -> nn.Module:
    """A system to draw with and to export, whose parts that learn are whole and rest in the main memory; the others are
    those of `system`. To be made before that is cut."""
    other = copy.copy(system)
    learning = {name: part for name, part in system.named_children() if any(p.requires_grad for p in part.parameters())}
    other._modules = {**system._modules, **copy.deepcopy(learning)}
    return resting(other)


def resting(twin: nn.Module) -> nn.Module:
    """After its parts that learn were brought elsewhere."""
    for part in twin.children():
        if any(p.requires_grad for p in part.parameters()):
            part.cpu()
    if graphs := getattr(twin, "graphs", None):
        cast(Any, graphs).clear()  # recorded where the weights were
    return twin


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is cut, in the main memory, on every process; itself if it is not. All processes call it."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole `value` into `target`, or of it what this process has."""
    if isinstance(target, DTensor):
        local = value.to(target.device)
        value = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def everywhere(value: Tensor, like: Tensor) -> Tensor:
    """A scalar that all processes have alike, as may be computed with `like`."""
    if not isinstance(like, DTensor):
        return value
    from torch.distributed.tensor import Replicate

    return cast(Tensor, DTensor.from_local(value, like.device_mesh, [Replicate()], run_check=False))
