"""Models distilled to a few steps, and what their publishers draw with.

A consistency model's network has a place for guidance to be told (LCM, arXiv:2310.04378); the others' weights are those
of any other model: a folder's scheduler tells, or nothing but the name of the file, which is then said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from limner.models.unet import UNetConfig
from limner.sampling.interpolants import EDMConfig


@dataclass(frozen=True, kw_only=True)
class Few:
    """`size` in pixels and `prediction` are "" and 0 where they are those of the model that was distilled."""

    sampler: str
    schedule: str = "trailing"
    steps: int = 4
    guidance: float = 1.0
    size: int = 0
    prediction: Literal["", "eps", "x0"] = ""


PLAYGROUND_NOISE = EDMConfig()
PLAYGROUND = Few(sampler="dpmpp_2m", schedule="karras", steps=50, guidance=3.0)
"""Playground 2.5 (arXiv:2402.17245), which is not distilled, but told by its noise."""
LCM = Few(sampler="lcm", schedule="lcm", guidance=8.5)
"""With a network that is told its guidance; with another, such as a merged LCM-LoRA, `UNGUIDED`."""
UNGUIDED = Few(sampler="lcm", schedule="lcm")
TCD = Few(sampler="tcd", schedule="lcm")
NAMED = "its name says {}: {} of {} at guidance {:g} {} taken; --steps, --sampler and --guidance say otherwise"


def turbo(xl: bool) -> Few:
    """SD-Turbo and SDXL-Turbo (arXiv:2311.17042): one step, at 512 pixels."""
    return Few(sampler="euler_a" if xl else "euler", steps=1, size=512, prediction="eps")


def by_scheduler(sampler: str, schedule: str, size: int, network: UNetConfig, prediction: str) -> Few | None:
    """What a folder's own sampler and schedule say. SD-Turbo is a Stable Diffusion 2, which its projections show."""
    told, xl = network.guidance_width > 0, network.vector_width > 0
    if told or sampler == "lcm":
        return LCM if told else UNGUIDED
    if sampler == "tcd":
        return TCD
    alike = turbo(xl)
    return (
        alike
        if network.linear_projection
        and (sampler, schedule, size, prediction) == (alike.sampler, "trailing", 512, "eps")
        else None
    )


def by_name(source: Path, xl: bool) -> tuple[Few, str] | None:
    """What the name of a file or folder says, or of the Hub's repository that holds it, and the sentence to tell."""
    name = next((part for part in reversed(source.parts[-3:]) if part.startswith("models--")), source.stem).lower()
    count = re.search(r"(\d+)[-_ ]?steps?", name)
    steps = int(count[1]) if count and 1 <= int(count[1]) <= 50 else 0

    def says(word: str) -> bool:
        return re.search(rf"(?:^|[^a-z]|xl|sd){word}(?:$|[^a-z])", name) is not None

    if says("lightning"):  # arXiv:2402.13929
        word, few = "Lightning", Few(sampler="euler", steps=steps or 4, prediction="x0" if "x0" in name else "")
    elif re.search(r"hyper[-_ ]?sd", name) or (says("hyper") and steps):  # arXiv:2404.13686
        word, few = "Hyper", Few(sampler="ddim", steps=steps or 8, guidance=5.0 if says("cfg") else 1.0)
        few = replace(few, sampler="lcm", schedule="hyper") if steps == 1 else few
    elif says("turbo"):
        word, few = "Turbo", turbo(xl)
    elif says("lcm"):
        word, few = "LCM", UNGUIDED
    else:
        return None
    plural = ("step", "is") if few.steps == 1 else ("steps", "are")
    return few, NAMED.format(word, f"{few.steps} {plural[0]}", few.sampler, few.guidance, plural[1])
