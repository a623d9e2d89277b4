"""Redux in the file of Black Forest Labs, which diffusers' is too, and SigLIP's tower in files of transformers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.checkpoints import layouts
from limner.checkpoints.files import assign
from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch, UsageError
from limner.models.redux import Redux, ReduxConfig
from limner.models.siglip import SigLIPConfig, SigLIPVision

MARK = "redux_up.weight"
HEADS = {768: 12, 1024: 16, 1152: 16}
"""Of towers of these widths, SigLIP's B, L and So400m, which no shape tells."""


def is_redux(tensors: Mapping[str, Tensor]) -> bool:
    return MARK in tensors


def read(path: Path, tensors: Mapping[str, Tensor], text_width: int) -> Redux:
    """The Redux of a file with these tensors, in float32, for networks whose words are so wide.

    Raises CheckpointMismatch for what is not whole, or for others.
    """
    shape = tensors[MARK].shape
    if len(shape) != 2 or shape[0] != 3 * text_width:
        raise CheckpointMismatch(
            f"{path} is a Redux whose {MARK} is {tuple(shape)}: it has {3 * text_width} rows for words of {text_width}"
        )
    with torch.device("meta"):
        made = Redux(ReduxConfig(width=shape[1], text_width=text_width))
    layout = {name: Place(name) for name in made.state_dict()}
    layouts.fit(layout, made.state_dict(), tensors, f"{path}, read as a Redux")
    assign(made, layouts.read(layout, tensors, path), path)
    return made.float().requires_grad_(False).eval()


def read_encoder(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> SigLIPVision:
    """SigLIP's tower of pictures in a file with these tensors, of the tower or of the whole model; `settings` are those
    beside it, which tell heads and activation: of the published sizes they are known. Raises CheckpointMismatch."""
    tensors = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": tensor
        for name, tensor in tensors.items()
        if not name.startswith(("text_model.", "logit_", "head.", "vision_model.head."))
        and not name.endswith("position_ids")
    }
    shapes = {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        side = round(shapes["embeddings.position_embedding.weight"][0] ** 0.5)
        # pictures need not be whole patches wide: those of So400m/14-384 have 27 and 6 pixels more
        size = int(settings.get("image_size", 384 if (patch, side) == (14, 27) else patch * side))
        if patch and size // patch != side:
            raise ValueError(f"pictures of {size} pixels have no {side} x {side} patches of {patch}")
        config = SigLIPConfig(
            width=width,
            depth=next(k for k in itertools.count() if f"encoder.layers.{k}.layer_norm1.weight" not in shapes),
            num_heads=int(settings.get("num_attention_heads", HEADS.get(width, 0))),
            hidden=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            activation=settings.get("hidden_act", SigLIPConfig.activation),
            size=size,
            patch=patch,
            norm_eps=float(settings.get("layer_norm_eps", SigLIPConfig.norm_eps)),
        )
        with torch.device("meta"):
            encoder = SigLIPVision(config)
    except (KeyError, IndexError) as error:
        raise CheckpointMismatch(f"{path} is no SigLIP tower of pictures: there is no {error}") from error
    except (UsageError, ValueError, TypeError) as error:
        raise CheckpointMismatch(f"{path}: {error}; is the config.json of transformers beside it?") from error
    layout = {name: Place(name) for name in encoder.state_dict()}
    layouts.fit(layout, encoder.state_dict(), tensors, f"{path}, read as an image encoder of SigLIP's kind")
    assign(encoder, layouts.read(layout, tensors, path), path)
    return encoder.requires_grad_(False).eval()
