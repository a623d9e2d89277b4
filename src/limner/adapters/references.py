"""Pictures that a prompt refers to, as words: IP-Adapters on a system."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from limner import pictures
from limner.adapters.attaching import LARGEST_WEIGHT, stack
from limner.adapters.files import name_of
from limner.checkpoints import files, folders, ip_adapter
from limner.errors import FileProblem, UsageError
from limner.models.clip_vision import CLIPVision, prepared
from limner.models.ip_adapter import IPAdapter
from limner.models.unet import UNet
from limner.types import Reference

BESIDE = ("image_encoder", "models/image_encoder", "sdxl_models/image_encoder")
"""Where an adapter's image encoder lies: beside its file, or a folder or two above."""


@torch.inference_mode()
def open_reference(
    system: Any,
    file: str | Path,
    image: str | Path | Image.Image,
    weight: float = 1.0,
    *,
    image_encoder: str | Path | None = None,
) -> Reference:
    """The IP-Adapter in a file and a picture it makes words of, which it sees through the CLIP tower in
    `image_encoder`, a file or folder of transformers; without, one is looked for beside the adapter.

    Raises FileProblem, CheckpointMismatch for what does not fit, ImageProblem, UsageError.
    """
    path, network, adapters = Path(file), getattr(system, "network", None), stack(system)
    if not isinstance(network, UNet) or not network.config.text_width or any(network.config.text_only):
        raise UsageError(f"{system.name} takes no IP-Adapters: those are for U-Nets, such as Stable Diffusion's")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= LARGEST_WEIGHT:
        limits = f"-{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        raise UsageError(f"the weight of {path.name} is {weight!r:.40}: give a number from {limits}")
    tensors, _ = files.read(path)
    encoder = _encoder(adapters.encoders, path, None if image_encoder is None else Path(image_encoder))
    adapter = ip_adapter.read(path, tensors, network, encoder)
    seen = prepared(pictures.open_image(image), encoder.config.size)
    words, nothing = (_words(adapter, encoder, x) for x in (seen, None if adapter.projection.whole else seen * 0))
    first = next(network.parameters())
    words, nothing = (x.to(first.device, first.dtype) for x in (words, nothing))
    return Reference(adapter, words, nothing, float(weight), name_of(path), files.digest(path))


def _words(adapter: IPAdapter, encoder: CLIPVision, seen: torch.Tensor | None) -> torch.Tensor:
    """Of a prepared picture; None is nothing at all."""
    if seen is None:
        told = torch.zeros(1, encoder.config.projection)
    else:
        whole, states = encoder(seen)
        told = whole if adapter.projection.whole else states
    return adapter.projection(told.to(next(adapter.parameters()).dtype)).float()


def _encoder(known: dict[str, CLIPVision], adapter: Path, given: Path | None) -> CLIPVision:
    above = [folder / name for folder in adapter.resolve().parents[:3] for name in BESIDE]
    path = given or next((folder for folder in above if folder.is_dir()), None)
    if path is None:
        raise FileProblem(
            f"{adapter} sees pictures through an image encoder, of which there is no folder image_encoder near it: "
            "give its file or folder with --image-encoder"
        )
    if (key := str(path.resolve())) not in known:
        config = (path if path.is_dir() else path.parent) / "config.json"
        settings = folders.Settings(config).values if config.is_file() else {}
        tensors = {
            k: v
            for part in (folders.weights(path) if path.is_dir() else [path])
            for k, v in files.read(part)[0].items()
        }
        known.clear()  # one is enough to keep
        known[key] = ip_adapter.read_encoder(path, tensors, settings.get("vision_config", settings)).float()
    return known[key]


def opened(system: Any, asked: str | Sequence[Any], image_encoder: str | Path | None = None) -> tuple[Reference, ...]:
    """Each of what a program asks for: a Reference, the text that `parse` reads, or (file, image) and perhaps a
    weight."""
    found = []
    for one in [asked] if isinstance(asked, str) else asked:
        told = parse(one) if isinstance(one, str) else one
        if isinstance(told, Reference):
            found.append(told)
        elif isinstance(told, tuple | list) and 2 <= len(told) <= 3:
            found.append(open_reference(system, *told, image_encoder=image_encoder))
        else:
            raise UsageError(f"ip_adapter is {one!r:.80}: give (file, image) or (file, image, weight)")
    return tuple(found)


def parse(text: str) -> tuple[str, str] | tuple[str, str, float]:
    """FILE=IMAGE[:WEIGHT]. Raises UsageError."""
    file, equals, image = text.partition("=")
    if not equals or not file or not image:
        raise UsageError(f"{text!r:.200} is no FILE=IMAGE, such as ip-adapter.safetensors=photo.png:0.6")
    before, colon, number = image.rpartition(":")
    if not colon or os.path.exists(image) or "/" in number or "\\" in number:  # noqa: PTH110 (Path's may raise)
        return file, image
    try:
        return file, before, float(number)
    except ValueError as error:
        raise UsageError(f"{text!r:.200}: {number!r:.50} is no weight; give FILE=IMAGE:0.6") from error
