"""A model that is there, the weights of whose network go on learning; and its file, as its own program has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from limner import catalog
from limner.checkpoints import files, single_files
from limner.errors import UsageError
from limner.models.unet import UNetConfig
from limner.training.config import TrainConfig
from limner.training.memory import kept_in


def loaded(config: TrainConfig, device: torch.device) -> Any:
    """The model of `config.model`, of which the network is trained, in float32. Raises UsageError, FileProblem."""
    system = catalog.load(config.model, device, dtype=torch.float32)
    if not hasattr(system, "network"):
        raise UsageError(f"{system.name} has no network that draws from words: train one with its own recipe")
    system.network.requires_grad_(True)
    system.text_encoder.to(kept_in(config, device))
    return system


def export(system: Any, config: TrainConfig, path: Path) -> None:
    """Write one file: a model of ours, or a Stable Diffusion with all its parts, as it was; of other transformers the
    network alone, in the names of their authors, in 16 bits. Raises FileProblem, UsageError."""
    source = catalog.find(config.model)
    if next(system.text_encoder.parameters()).dtype != torch.float32:  # all but the network is as it was
        whole: Any = catalog.load(source, dtype=torch.float32)
        whole.network.load_state_dict(system.network.state_dict())
        system = whole
    found = catalog.recognise(source)
    if found is None:
        catalog.save(system, catalog.stored(source), path)
        return
    ours = {name: tensor.detach().cpu() for name, tensor in system.state_dict().items()}
    if isinstance(found.network, UNetConfig):
        written = single_files.export(found, ours)
        dtype = torch.float16
    else:
        written = {name.removeprefix("network."): t for name, t in ours.items() if name.startswith("network.")}
        dtype = torch.bfloat16
    packed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in written.items()}
    files.write_atomically(path, save({name: t.contiguous() for name, t in packed.items()}, {"format": "pt"}))
