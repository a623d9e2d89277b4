"""Pictures that a prompt refers to, as words: IP-Adapters on a system."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from limner import metadata, pictures
from limner.adapters.asking import weighted
from limner.adapters.attaching import LARGEST_WEIGHT, stack
from limner.adapters.files import name_of
from limner.adapters.names import block
from limner.checkpoints import files, folders, ip_adapter
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.models.clip_vision import CLIPVision, prepared
from limner.models.ip_adapter import IPAdapter, attentions
from limner.models.unet import UNet
from limner.types import Reference

BESIDE = ("image_encoder", "models/image_encoder", "sdxl_models/image_encoder")
"""Where an adapter's image encoder lies: beside its file, or a folder or two above."""
KEYWORDS = {"file", "image", "weight", "blocks", "image_encoder"}


@torch.inference_mode()
def open_reference(
    system: Any,
    file: str | Path,
    image: str | Path | Image.Image,
    weight: float = 1.0,
    *,
    blocks: Mapping[str, float] | None = None,
    image_encoder: str | Path | None = None,
) -> Reference:
    """The IP-Adapter in a file and a picture it makes words of, which it sees through the CLIP tower in
    `image_encoder`, a file or folder of transformers; without, the first beside the adapter that is of its size.
    `weight` is -100 to 100; `blocks` are factors of blocks, such as {"mid_block": 0.5}.

    Raises FileProblem, CheckpointMismatch for what does not fit, ImageProblem, UsageError.
    """
    path, network, adapters = Path(file), getattr(system, "network", None), stack(system)
    if not isinstance(network, UNet) or not network.config.text_width or any(network.config.text_only):
        raise UsageError(f"{system.name} takes no IP-Adapters: those are for U-Nets, such as Stable Diffusion's")
    if problem := metadata.misnamed(name_of(path)):
        raise UsageError(f"{name_of(path)!r:.60} cannot be remembered by a picture ({problem}): rename it")
    blocks = dict(blocks or {})
    for name, value in (("weight", weight), *blocks.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_WEIGHT:
            limits = f"-{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
            raise UsageError(f"the {name} of {path.name} is {value!r:.40}: give a number from {limits}")
    modules = attentions(network)
    for name in blocks:
        if not any(f"{module}.".startswith(f"{name}.") for module in modules):
            known = sorted({block(module) for module in modules})
            near = difflib.get_close_matches(name, known, n=1) or known
            raise UsageError(f"{path.name} changes no block {name!r:.80}; it changes {', '.join(near)}")
    tensors, _ = files.read(path)
    ip_adapter.check(path, tensors, network)
    picture = pictures.open_image(image)
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:12]
    encoder = _encoder(adapters.encoders, path, tensors, None if image_encoder is None else Path(image_encoder))
    adapter = ip_adapter.read(path, tensors, network, encoder)
    seen = prepared(picture, encoder.config.size)
    words, nothing = (_words(adapter, encoder, x) for x in (seen, None if adapter.projection.whole else seen * 0))
    first = next(network.parameters())
    words, nothing = (x.to(first.device, first.dtype) for x in (words, nothing))
    return Reference(adapter, words, nothing, float(weight), name_of(path), files.digest(path), blocks, digest)


def _words(adapter: IPAdapter, encoder: CLIPVision, seen: torch.Tensor | None) -> torch.Tensor:
    """Of a prepared picture; None is nothing at all."""
    if seen is None:
        told = torch.zeros(1, encoder.config.projection)
    else:
        whole, states = encoder(seen)
        told = whole if adapter.projection.whole else states
    return adapter.projection(told.to(next(adapter.parameters()).dtype)).float()


def _encoder(
    known: dict[str, CLIPVision], adapter: Path, tensors: Mapping[str, torch.Tensor], given: Path | None
) -> CLIPVision:
    """The one given, or the first near an adapter that it can see through: the authors have ViT-H in `models`, which
    some adapters in `sdxl_models` see through, and ViT-bigG there."""
    above = [folder / name for folder in adapter.resolve().parents[:3] for name in BESIDE]
    paths = [folder for folder in above if folder.is_dir()] if given is None else [given]
    if not paths:
        raise FileProblem(
            f"{adapter} sees pictures through an image encoder, of which there is no folder image_encoder near it: "
            "give its file or folder with --image-encoder"
        )
    for path in paths:
        encoder = _tower(known, path)
        if ip_adapter.sees(adapter, tensors, encoder):
            return encoder
    sizes = f"{encoder.config.projection} numbers of a picture and {encoder.config.width} of its states"
    raise CheckpointMismatch(
        f"{adapter} is not told of pictures by {path}, which says {sizes}: give --image-encoder FILE with another "
        "(ViT-H says 1024 and 1280, ViT-bigG 1280 and 1664)"
    )


def _tower(known: dict[str, CLIPVision], path: Path) -> CLIPVision:
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
    """Each of what a program asks for: a Reference, the text that `parse` reads, or arguments of `open_reference`, as
    keywords or as (file, image) and perhaps a weight."""
    found = []
    if not isinstance(asked, str | list | tuple):
        raise UsageError(f"ip_adapter is {asked!r:.80}: give a list of (file, image) or (file, image, weight)")
    for one in [asked] if isinstance(asked, str) else asked:
        told = parse(one) if isinstance(one, str) else one
        if isinstance(told, tuple | list) and 2 <= len(told) <= 3:
            told = dict(zip(("file", "image", "weight"), told, strict=False))
        if isinstance(told, Reference):
            found.append(told)
        elif isinstance(told, Mapping) and {"file", "image"} <= told.keys() <= KEYWORDS:
            keywords: dict[str, Any] = {"image_encoder": image_encoder} | dict(told)
            found.append(open_reference(system, **keywords))
        else:
            raise UsageError(f"ip_adapter is {one!r:.80}: give (file, image) or (file, image, weight)")
    return tuple(found)


def parse(text: str) -> dict[str, Any]:
    """FILE=IMAGE[:WEIGHT][,BLOCK=WEIGHT...] as keywords of `open_reference`. Raises UsageError."""
    file, equals, rest = text.partition("=")
    if not equals or not file or not rest:
        raise UsageError(f"{text!r:.200} is no FILE=IMAGE, such as ip-adapter.safetensors=photo.png:0.6")
    image, weight, blocks = weighted(rest)
    told = {"weight": weight, "blocks": blocks}
    return {"file": file, "image": image} | {name: value for name, value in told.items() if value not in (None, {})}
