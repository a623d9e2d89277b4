"""A model in the files of another program: what it is, and where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from limner.checkpoints.layouts import Layout
from limner.sampling.interpolants import VPConfig
from limner.text.bpe import CLIPTokenizer
from limner.text.unigram import T5Tokenizer


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """`layout` has a row for every tensor of a `systems.diffusion.DiffusionSystem`, `tensors` is what the files hold,
    mapped, in `files`, but for what nobody needs: `beside` says how much that is. `assumed` are sentences on what files
    do not tell; `small_noise` is that of the picture an upscaler enlarges; `sampler`, `schedule`, `steps`,
    `guidance` and `size` (pixels a side) are what they say to draw with, "" or 0 where they do not. `unsaid` is whether
    they do not say what the network predicts, so that it is taken from their name, or guessed, `looks` whether it takes
    pictures to look at."""

    source: Path
    network: Any  # UNetConfig, DiTConfig, MMDiTConfig or FluxConfig
    autoencoder: Any  # KLConfig or PixelsConfig
    text: Any  # CLIPTowersConfig, LabelsConfig, SD3TextConfig or FluxTextConfig
    tokenizers: tuple[CLIPTokenizer | T5Tokenizer, ...]
    noise: Any  # VPConfig, EDMConfig, FlowConfig or "flow"
    prediction: Literal["eps", "v", "x0", "edm", "velocity"]
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
    looks: bool = False
    clip: bool = False
    """Whether what is foreseen at every step is kept in [-1, 1]."""
