"""A model that is there, the weights of whose network go on learning; and its file, as its own program has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from limner import catalog
from limner.checkpoints import dit, files, single_files
from limner.errors import UsageError
from limner.models.dit import DiTConfig
from limner.models.unet import UNetConfig
from limner.training.memory import kept_in

if TYPE_CHECKING:
    from limner.training.config import TrainConfig


def loaded(config: TrainConfig, device: torch.device) -> Any:
    """The model of `config.model`, of which the network is trained, in float32. Raises UsageError, FileProblem."""
    system: Any = catalog.load(config.model, device, dtype=torch.float32)
    if not hasattr(system, "network"):
        raise UsageError(f"{system.name} has no network that draws from words: train one with its own recipe")
    check_name(config, system)
    system.network.requires_grad_(True)
    check_kept(dtype := kept_in(config, device))
    system.text_encoder.to(dtype)
    system.identity = system.model_hash  # whatever the rest is kept in
    return system


def check_kept(dtype: torch.dtype) -> None:
    """Raises UsageError for what is for weights beside which an adapter learns."""
    if dtype == torch.float8_e4m3fn:
        raise UsageError("keep_model_in=fp8 is for adapters: give bf16, or an adapter")


def check_name(config: TrainConfig, system: Any) -> None:
    """Raises UsageError where the file that a run would leave is known by its name alone, and has another."""
    network = system.network.config
    if isinstance(network, DiTConfig) and network.to_data and not dit.says(Path(config.name), "sit"):
        raise UsageError(f"a SiT's file is told from a DiT's by its name alone: give name=sit-{config.name}")


def export(system: Any, config: TrainConfig, path: Path) -> None:
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in system.text_encoder.parameters()):  # not as it was
        whole: Any = catalog.load(catalog.find(config.model), dtype=torch.float32)
        whole.network.load_state_dict(system.network.state_dict())
        system = whole
    write(system, config.model, path)


def write(system: Any, model: str, path: Path) -> None:
    """Write one file of what `model` has become: a model of ours, or a Stable Diffusion with all its parts, as it was;
    of other transformers the network alone, in the names of their authors, a DiT's in 32 bits and others' in 16. Raises
    FileProblem, UsageError."""
    source = catalog.find(model)
    found = catalog.recognise(source)
    if found is None:
        now: Any = {"network": system.network.config, "defaults": system.defaults}
        catalog.save(system, replace(catalog.stored(source), **now), path)
        return
    found = replace(found, network=system.network.config)
    ours = {name: tensor.detach().cpu() for name, tensor in system.state_dict().items()}
    if isinstance(found.network, UNetConfig):
        written = single_files.export(found, ours)
        dtype = torch.float16
    else:
        written = {name.removeprefix("network."): t for name, t in ours.items() if name.startswith("network.")}
        dtype = torch.float32 if isinstance(found.network, DiTConfig) else torch.bfloat16
    packed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in written.items()}
    files.write_atomically(path, save({name: t.contiguous() for name, t in packed.items()}, {"format": "pt"}))
