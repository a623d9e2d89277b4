"""Pictures that a prompt refers to, as words: IP-Adapters on a system, and Redux."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from limner import metadata, pictures
from limner.adapters import asking
from limner.adapters.attaching import check_weights, stack
from limner.adapters.files import name_of
from limner.checkpoints import files, folders, ip_adapter, parts, redux
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.models import siglip
from limner.models.clip_vision import CLIPVision, prepared
from limner.models.flux import Flux
from limner.models.ip_adapter import IPAdapter, attentions
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
    blocks: Mapping[str, float] | None = None,
    image_encoder: str | Path | None = None,
) -> Reference:
    """The IP-Adapter or Redux in a file and a picture it makes words of, which it sees through the CLIP tower, or
    SigLIP's, in `image_encoder`, a file or folder of transformers; without, the first beside the adapter that is of its
    size. `weight` is -100 to 100; `blocks` are factors of blocks, such as {"mid_block": 0.5}, which Redux has not.

    Raises FileProblem, CheckpointMismatch for what does not fit, ImageProblem, UsageError.
    """
    path, network, adapters = Path(file), getattr(system, "network", None), stack(system)
    if not isinstance(network, Flux) and (
        not isinstance(network, UNet) or not network.config.text_width or any(network.config.text_only)
    ):
        raise UsageError(
            f"{system.name} takes no IP-Adapters: those are for U-Nets, such as Stable Diffusion's, Redux for FLUX.1"
        )
    if problem := metadata.misnamed(name_of(path)):
        raise UsageError(f"{name_of(path)!r:.60} cannot be remembered by a picture ({problem}): rename it")
    blocks = dict(blocks or {})
    tensors, _ = files.read(path)
    if redux.is_redux(tensors) != isinstance(network, Flux):
        its = "Redux, whose words are for FLUX.1" if redux.is_redux(tensors) else "no Redux, the one kind for FLUX.1"
        raise CheckpointMismatch(f"{path} is {its}: {system.name} does not take it")
    given = None if image_encoder is None else Path(image_encoder)
    adapter: IPAdapter | None = None
    if isinstance(network, Flux):
        check_weights(path.name, weight)
        if blocks:
            raise UsageError(f"{path.name} is a Redux, told to no block apart: leave {', '.join(blocks)} out")
        picture = pictures.open_image(image)
        words = _redux(adapters.encoders, path, tensors, network, given, picture)
        nothing = torch.zeros_like(words)
    else:
        assert isinstance(network, UNet)
        check_weights(path.name, weight, blocks, attentions(network))
        ip_adapter.check(path, tensors, network)
        picture = pictures.open_image(image)
        encoder = _encoder(adapters.encoders, path, tensors, given)
        adapter = ip_adapter.read(path, tensors, network, encoder)
        seen = prepared(picture, encoder.config.size)
        words, nothing = (_words(adapter, encoder, x) for x in (seen, None if adapter.projection.whole else seen * 0))
    dtype = next(network.parameters()).dtype
    words, nothing = (x.to(system.device, dtype) for x in (words, nothing))
    return Reference(
        adapter, words, nothing, float(weight), name_of(path), files.digest(path), blocks, pictures.digest(picture)
    )


def _redux(
    known: dict[str, Any],
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    network: Flux,
    given: Path | None,
    picture: Image.Image,
) -> torch.Tensor:
    """What a Redux says of a picture, (1, n, text_width)."""
    made = redux.read(path, tensors, network.config.text_width)
    problem: CheckpointMismatch | None = None
    for beside in _beside(path, given):
        try:
            tower = _tower(known, beside, redux.read_encoder)
        except CheckpointMismatch as error:  # CLIP's, of an IP-Adapter that lies there too
            problem = problem or error
            continue
        if tower.config.width == made.config.width:
            return made(tower(siglip.prepared(picture, tower.config.size)))
        problem = CheckpointMismatch(
            f"{path} is told {made.config.width} numbers of each part of a picture, not {tower.config.width}: give "
            "--image-encoder FILE with another (SigLIP's So400m says 1152)"
        )
    assert problem is not None
    raise problem


def _words(adapter: IPAdapter, encoder: CLIPVision, seen: torch.Tensor | None) -> torch.Tensor:
    """Of a prepared picture; None is nothing at all."""
    if seen is None:
        told = torch.zeros(1, encoder.config.projection)
    else:
        whole, states = encoder(seen)
        told = whole if adapter.projection.whole else states
    return adapter.projection(told.to(next(adapter.parameters()).dtype)).float()


def _encoder(
    known: dict[str, Any], adapter: Path, tensors: Mapping[str, torch.Tensor], given: Path | None
) -> CLIPVision:
    """The one given, or the first near an adapter that it can see through: the authors have ViT-H in `models`, which
    some adapters in `sdxl_models` see through, and ViT-bigG there."""
    for path in _beside(adapter, given):
        encoder = _tower(known, path, ip_adapter.read_encoder)
        if ip_adapter.sees(adapter, tensors, encoder):
            return encoder
    sizes = f"{encoder.config.projection} numbers of a picture and {encoder.config.width} of its states"
    raise CheckpointMismatch(
        f"{adapter} is not told of pictures by {path}, which says {sizes}: give --image-encoder FILE with another "
        "(ViT-H says 1024 and 1280, ViT-bigG 1280 and 1664)"
    )


def _beside(adapter: Path, given: Path | None) -> list[Path]:
    """Where image encoders are: the one given, or those near an adapter, of which there is one at least."""
    above = [folder / name for folder in adapter.resolve().parents[:3] for name in BESIDE]
    paths = [folder for folder in above if folder.is_dir()] if given is None else [given]
    if not paths:
        raise FileProblem(
            f"{adapter} sees pictures through an image encoder, of which there is no folder image_encoder near it: "
            "give its file or folder with --image-encoder"
        )
    return paths


def _tower(known: dict[str, Any], path: Path, read: Callable[[Path, Mapping[str, torch.Tensor], Any], Any]) -> Any:
    """The tower of pictures in a file or folder, which `read` reads, in float32."""
    if (key := str(path.resolve())) not in known:
        config = (path if path.is_dir() else path.parent) / "config.json"
        settings = folders.Settings(config).values if config.is_file() else {}
        known.clear()  # one is enough to keep
        known[key] = read(path, parts.read(path), settings.get("vision_config", settings)).float()
    return known[key]


def opened(system: Any, asked: str | Sequence[Any], image_encoder: str | Path | None = None) -> tuple[Reference, ...]:
    """Each of what a program asks for as ip_adapter: a Reference, the text that `parse` reads, or arguments of
    `open_reference`, as keywords or as (file, image) and perhaps a weight."""
    open_one = partial(open_reference, system, image_encoder=image_encoder)
    return asking.opened("ip_adapter", asked, Reference, parse, open_one)


def parse(text: str) -> dict[str, Any]:
    """FILE=IMAGE[:WEIGHT][,BLOCK=WEIGHT...] as keywords of `open_reference`. Raises UsageError."""
    file, rest = asking.with_picture(text, "ip-adapter.safetensors=photo.png:0.6")
    image, weight, blocks = asking.weighted(rest)
    told = {"weight": weight, "blocks": blocks}
    return {"file": file, "image": image} | {name: value for name, value in told.items() if value not in (None, {})}
