"""ControlNets on a system: the network in a file, and a picture that it tells the U-Net of."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from limner import hints, pictures
from limner.adapters.attaching import LARGEST_WEIGHT, stack
from limner.adapters.files import name_of
from limner.checkpoints import controlnet, files, folders
from limner.errors import FileProblem, UnknownName, UsageError
from limner.models.controlnet import ControlNet
from limner.models.unet import UNet
from limner.types import Control

MOST_KEPT = 4
"""Networks that a system keeps for the next picture."""


def open_control(
    system: Any,
    file: str | Path,
    image: str | Path | Image.Image,
    weight: float = 1.0,
    *,
    start: float = 0.0,
    end: float = 1.0,
    guess: bool = False,
    maker: str = "",
) -> Control:
    """The ControlNet in a file or a folder of diffusers and the picture it is told, which `maker`, one of
    `limner.hints.MAKERS`, makes of `image`; without, `image` is that picture.

    Raises FileProblem, CheckpointMismatch for one of another model, ImageProblem, UsageError, UnknownName.
    """
    path = Path(file)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= LARGEST_WEIGHT:
        limits = f"-{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        raise UsageError(f"the weight of {path.name} is {weight!r:.40}: give a number from {limits}")
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in (start, end)) or not 0 <= start < end <= 1:
        raise UsageError(f"{path.name} is told from {start!r:.40} to {end!r:.40}: give rising numbers from 0 to 1")
    network, found = _network(system, path)
    picture = pictures.open_image(image)
    if maker:
        picture = hints.make(maker, picture)
    return Control(
        network, picture, float(weight), float(start), float(end), guess or network.pooled, name_of(path), found
    )


def opened(system: Any, asked: str | Sequence[Any]) -> list[Control]:
    """Each of what a program asks for: a Control, the text that `parse` reads, or arguments of `open_control`, as
    keywords or as (file, image) and perhaps a weight."""
    found = []
    for one in [asked] if isinstance(asked, str) else asked:
        one = parse(one) if isinstance(one, str) else one
        if isinstance(one, Mapping):
            found.append(open_control(system, **one))
        elif isinstance(one, tuple | list) and 2 <= len(one) <= 3:
            found.append(open_control(system, *one))
        elif isinstance(one, Control):
            found.append(one)
        else:
            raise UsageError(f"control is {one!r:.80}: give (file, image) or (file, image, weight)")
    return found


def parse(text: str) -> dict[str, Any]:
    """FILE=IMAGE[:WEIGHT][,canny][,start=0.2][,end=0.8][,guess] as keywords of `open_control`. Raises UsageError."""
    file, equals, rest = text.partition("=")
    if not equals or not file or not rest:
        raise UsageError(f"{text!r:.200} is no FILE=IMAGE, such as canny.safetensors=edges.png:0.8")
    told: dict[str, Any] = {"file": file}
    image, comma, options = rest, "", ""
    if not os.path.exists(rest):  # noqa: PTH110 (Path's may raise)
        image, comma, options = rest.partition(",")
        before, colon, number = image.rpartition(":")
        if colon and not os.path.exists(image) and "/" not in number and "\\" not in number:  # noqa: PTH110
            image, told["weight"] = before, _fraction(text, number)
    told["image"] = image
    for option in options.split(",") if comma else ():
        name, equals, value = option.strip().partition("=")
        if name in ("start", "end") and equals:
            told[name] = _fraction(text, value)
        elif name == "guess" and not equals:
            told["guess"] = True
        elif not equals and name in (*hints.MAKERS, *hints.NEED_MODELS):
            told["maker"] = name
        else:
            raise UnknownName("option of --control", option, ("start=0.2", "end=0.8", "guess", *hints.MAKERS))
    return told


def _fraction(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise UsageError(
            f"{text!r:.200}: {number!r:.50} is no number; give FILE=IMAGE:0.8, or FILE=IMAGE:0.8,end=0.7"
        ) from error


def _network(system: Any, path: Path) -> tuple[ControlNet, str]:
    """The network, and the hash of its file."""
    base, adapters = getattr(system, "network", None), stack(system)
    if not isinstance(base, UNet):
        raise UsageError(f"{system.name} takes no ControlNets: those are for U-Nets, such as Stable Diffusion's")
    settings: Mapping[str, Any] = {}
    if path.is_dir():
        settings = folders.Settings(path / "config.json").values
    paths = folders.weights(path) if path.is_dir() else [path]
    try:
        key = tuple((str(p), p.stat().st_mtime_ns) for p in paths)
    except OSError as error:
        raise FileProblem(f"no file {str(path)!r:.200}: give the path of a ControlNet") from error
    if key not in adapters.controls:
        tensors = {name: tensor for part in paths for name, tensor in files.read(part)[0].items()}
        network = controlnet.read(path, tensors, replace(base.config, guidance_width=0), adapters.bare("network"))
        network.pooled = bool(settings.get("global_pool_conditions", "shuffle" in path.stem))  # no name tells
        if settings.get("controlnet_conditioning_channel_order", "rgb") == "bgr":
            first = network.controlnet_cond_embedding.conv_in
            first.weight.data = first.weight.data.flip(1)
        if len(adapters.controls) >= MOST_KEPT:
            adapters.controls.pop(next(iter(adapters.controls)))
        adapters.controls[key] = network, files.digest(*paths)
    network, found = adapters.controls[key]
    like = next(base.parameters())
    return network.to(like.device, like.dtype), found
