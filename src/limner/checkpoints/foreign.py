"""A model in the files of another program: what it is, and where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from limner.checkpoints.layouts import Layout
from limner.models.autoencoder import KLConfig
from limner.models.unet import UNetConfig
from limner.sampling.interpolants import VPConfig
from limner.text.bpe import CLIPTokenizer
from limner.text.clip import CLIPTowersConfig


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """`layout` has a row for every tensor of a `systems.diffusion.DiffusionSystem`, `tensors` is what the files hold,
    mapped, in `files`; `sampler`, `schedule` and `size` (pixels a side) are what the files say to draw with."""

    source: Path
    network: UNetConfig
    autoencoder: KLConfig
    text: CLIPTowersConfig
    tokenizers: tuple[CLIPTokenizer, ...]
    noise: VPConfig
    prediction: Literal["eps", "v", "x0"]
    layout: Layout
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    sampler: str = ""
    schedule: str = ""
    size: int = 0
