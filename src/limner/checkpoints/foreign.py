"""A model in the files of another program: what it is, and where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from limner.checkpoints.layouts import Layout
from limner.models.autoencoder import KLConfig
from limner.models.unet import UNetConfig
from limner.sampling.interpolants import EDMConfig, VPConfig
from limner.text.bpe import CLIPTokenizer
from limner.text.clip import CLIPTowersConfig


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """`layout` has a row for every tensor of a `systems.diffusion.DiffusionSystem`, `tensors` is what the files hold,
    mapped, in `files`, but for what nobody needs: `beside` says how much that is. `assumed` are sentences on what files
    do not tell; `small_noise` is that of the picture an upscaler enlarges; `sampler`, `schedule`, `steps`,
    `guidance` and `size` (pixels a side) are what they say to draw with, "" or 0 where they do not. `unsaid` is whether
    they do not say what the network predicts, so that it is taken from their name, or guessed."""

    source: Path
    network: UNetConfig
    autoencoder: KLConfig
    text: CLIPTowersConfig
    tokenizers: tuple[CLIPTokenizer, ...]
    noise: VPConfig | EDMConfig
    prediction: Literal["eps", "v", "x0", "edm"]
    layout: Layout
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    beside: Mapping[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    sampler: str = ""
    schedule: str = ""
    size: int = 0
    steps: int = 0
    guidance: float = 0.0
    small_noise: VPConfig | None = None
    unsaid: bool = False
