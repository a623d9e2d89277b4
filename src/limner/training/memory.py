"""Whether a run can fit into memory: what never will is refused before anything is built or drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limner import catalog, pipeline
from limner.data.images import Batches
from limner.devices import memory_of
from limner.errors import OutOfMemory, UsageError
from limner.nn.graphs import BLOCKS
from limner.training.processes import Processes

if TYPE_CHECKING:
    from limner.training.config import TrainConfig

MOST_LAYERS, MOST_WIDE = 1000, 100_000
"""More than any network has; what is within is counted."""
COMPILED = 3.0
"""Compiled blocks keep less for the way back than what is measured here, but never so much less."""

REPEATED = (*BLOCKS, "resnets", "attentions")
"""What transformers and U-Nets call their repeated blocks."""


def check_parameters(config: TrainConfig, device: torch.device, pieces: int = 1) -> None:
    """Raises UsageError for counts beyond any use, OutOfMemory if weights, gradients, moments and averages alone are
    more than the device's memory, which has all of the weights at first, and then one of so many `pieces`."""
    system = config.system
    assert system is not None
    check_counts(system, "system")
    with torch.device("meta"):
        built = catalog.build(catalog.bare(system))
    count = sum(p.numel() for p in built.parameters() if p.requires_grad)
    compare(
        max(4, 16 / pieces) * count, device, f"{count / 1e6:,.0f} million parameters take", "make the network smaller"
    )


def check_counts(section: Any, path: str) -> None:
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{path}.{field.name}"
        most = MOST_LAYERS if "depth" in field.name or "blocks" in field.name else MOST_WIDE
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                check_counts(part, name)
            elif isinstance(part, int) and part > most and field.name != "disc_start":
                raise UsageError(f"{name}={part}: give {most:,} at most")


def check_batch(system: Any, batches: Batches, config: TrainConfig, processes: Processes) -> None:
    """Raises OutOfMemory if what the loss of one step keeps for the way back is more than the device's memory: it is
    measured with one picture, and with it twice."""
    device, world = processes.device, processes.world
    batch = batches.batch(0, world, rank=processes.rank, world=world)
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    most = math.ceil(config.batch_size / world / config.accumulate)
    if "latents" in batch:  # a larger size than data.size has fewer
        pixels = math.prod(batch["latents"].shape[-2:]) * system.grid**2
        most *= min(1.0, config.data.size**2 / pixels)
    with autocast(config, device):
        kept = max(
            kept_by(system, twice(batch), phase, device) - kept_by(system, batch, phase, device)
            for phase in system.phases
        )
    need = most * kept / (COMPILED if config.compile else 1)
    compare(need, device, f"batch_size={config.batch_size} takes", "give a smaller one")


def precision_of(config: TrainConfig, device: torch.device) -> str:
    """That of the forward pass on this device."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Inside, the forward pass has the precision that the config gives it."""
    precision = precision_of(config, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def kept_in(config: TrainConfig, device: torch.device, casts: bool = False) -> torch.dtype:
    """What weights of a model that is there are kept in. Raises UsageError where passes could not read them, but for a
    system that `casts` what it asks of them."""
    precision = precision_of(config, device)
    name = precision if config.keep_model_in == "auto" else config.keep_model_in
    if precision == "fp32" and name in ("bf16", "fp16") and not casts:
        raise UsageError(f"keep_model_in={name} is for passes in 16 bits: give precision=bf16, too")
    return pipeline.DTYPES[name]


def twice(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.cat([v, v]) if isinstance(v, Tensor) else v + v for k, v in batch.items()}


def kept_by(system: nn.Module, batch: dict[str, Any], phase: str, device: torch.device) -> int:
    """Bytes of the tensors, other than weights, that the loss keeps for its gradient."""
    seen: dict[int, torch.UntypedStorage] = {}  # all of it until here, so that no memory is used twice

    def keep(tensor: Tensor) -> Tensor:  # detached: one that its own function keeps would never be freed
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):  # a loss may ask for gradients of its parts
        system.loss(batch, phase, torch.Generator(device).manual_seed(0))  # type: ignore[operator]
    for parameter in system.parameters():
        seen.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in seen.values())


def compare(need: float, device: torch.device, what: str, advice: str) -> None:
    have = memory_of(device)
    if need > have:
        raise OutOfMemory(f"{what} {need / 1e9:,.0f} GB at least, and there are {have / 1e9:,.0f} GB: {advice}")


def recompute_blocks(system: nn.Module) -> int:
    """Have the repeated blocks of the parts that learn keep their inputs alone for the way back, and compute the rest
    again there, with the same dropout; returns how many there are."""
    blocks = list(repeated_blocks(system))
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)
    return len(blocks)


def repeated_blocks(system: nn.Module) -> Iterator[nn.Module]:
    """Of the parts of `system` that learn, the outermost of each nest; where none does, since something learns beside
    them, of its network."""
    learn = [part for part in system.children() if any(p.requires_grad for p in part.parameters())]
    for part in learn or [cast(nn.Module, system.network)]:
        yield from _repeated(part)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if name in REPEATED and isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _repeated(child)


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)
