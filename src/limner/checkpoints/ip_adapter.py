"""IP-Adapters in files of their authors, and the towers that see for them in files of transformers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner.checkpoints import layouts
from limner.checkpoints.components import UNETS
from limner.checkpoints.files import assign
from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch, UsageError
from limner.models.clip_vision import CLIP_L, CLIPVision, CLIPVisionConfig
from limner.models.ip_adapter import FullProjection, ImageProjection, IPAdapter, Resampler, attentions
from limner.models.unet import UNet

SEEN, LAYERS = "image_proj.", "ip_adapter."
WANTED = f"{LAYERS}1.to_k_ip.weight"


HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}
"""Of towers of these widths, CLIP's B, L, H and bigG, which no shape tells."""


def sees(path: Path, tensors: Mapping[str, Tensor], encoder: CLIPVision) -> bool:
    """Whether an encoder says of a picture, or of its states, as many numbers as the adapter is told.

    Raises CheckpointMismatch for an adapter that is not whole.
    """
    said, config = {"proj": encoder.config.projection}, encoder.config
    name = next((name for name in ("proj", "proj_in", "proj.0") if f"{SEEN}{name}.weight" in tensors), "proj")
    try:
        return tensors[f"{SEEN}{name}.weight"].shape[1] == said.get(name, config.width)
    except (KeyError, IndexError) as error:
        raise CheckpointMismatch(f"{path} is like an IP-Adapter, but not whole: there is no {error}") from error


def check(path: Path, tensors: Mapping[str, Tensor], network: UNet) -> None:
    """Raises CheckpointMismatch unless a file with these tensors is of an IP-Adapter for a network like this."""
    if WANTED not in tensors:
        first = min(tensors, default="none")
        raise CheckpointMismatch(
            f"{path} is no IP-Adapter: of its {len(tensors)} tensors (first: {first:.100}) none is {WANTED}"
        )
    if any("lora" in name for name in tensors):
        raise CheckpointMismatch(
            f"{path} is an IP-Adapter of faces that another program has measured, which are not read"
        )
    text = tensors[WANTED].shape[-1]
    mine = network.config.text_width
    if text != mine:
        its, own = (UNETS.get(width, f"a model of words {width} wide") for width in (text, mine))
        raise CheckpointMismatch(f"{path} is an IP-Adapter of {its}, this is {own}: take one made for it")


def read(path: Path, tensors: Mapping[str, Tensor], network: UNet, encoder: CLIPVision) -> IPAdapter:
    """The IP-Adapter of a file with these tensors, which passed `check`, for `network` and for an encoder that `sees`.

    Raises CheckpointMismatch for what is not whole, or not of this size.
    """
    text = network.config.text_width
    widths = [attention.to_q.out_features for attention in attentions(network).values()]
    try:
        with torch.device("meta"):
            adapter = IPAdapter(
                _projection({k.removeprefix(SEEN): v for k, v in tensors.items()}, text, encoder), widths, text
            )
    except (KeyError, IndexError) as error:
        raise CheckpointMismatch(f"{path} is like an IP-Adapter, but not whole: there is no {error}") from error
    layout = {}
    for ours in adapter.state_dict():
        part, _, rest = ours.partition(".")
        number, _, name = rest.partition(".")
        theirs = f"{SEEN}{rest}" if part == "projection" else f"{LAYERS}{2 * int(number) + 1}.{name}"
        layout[ours] = Place(theirs)
    layouts.fit(layout, adapter.state_dict(), tensors, f"{path}, read as an IP-Adapter")
    assign(adapter, layouts.read(layout, tensors, path), path)
    adapter.projection.float()  # files are in half precision, and it works once a picture
    return adapter.requires_grad_(False).eval()


def _projection(tensors: Mapping[str, Tensor], text: int, encoder: CLIPVision) -> nn.Module:
    if "latents" in tensors:
        _, count, inner = tensors["latents"].shape
        return Resampler(
            tensors["proj_in.weight"].shape[1], text, count, inner,
            depth=next(k for k in itertools.count() if f"layers.{k}.0.to_q.weight" not in tensors),
            num_heads=tensors["layers.0.0.to_q.weight"].shape[0] // 64, hidden=tensors["layers.0.1.1.weight"].shape[0],
        )  # fmt: skip
    if "proj.0.weight" in tensors:
        patches = (encoder.config.size // encoder.config.patch) ** 2
        return FullProjection(tensors["proj.0.weight"].shape[1], text, 1 + patches)
    return ImageProjection(tensors["proj.weight"].shape[1], text, tensors["proj.weight"].shape[0] // text)


def read_encoder(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> CLIPVision:
    """The tower of pictures in a file with these tensors; `settings` are those beside it, which tell heads and
    activation: of the published sizes they are known. Raises CheckpointMismatch."""
    tensors = {
        name if name.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{name}": tensor
        for name, tensor in tensors.items()
        if not name.startswith(("text_model.", "text_projection.", "logit_")) and not name.endswith("position_ids")
    }
    shapes = {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        width, patch = shapes["embeddings.patch_embedding.weight"][0], shapes["embeddings.patch_embedding.weight"][2]
        config = CLIPVisionConfig(
            width=width,
            depth=next(k for k in itertools.count() if f"encoder.layers.{k}.layer_norm1.weight" not in shapes),
            num_heads=int(settings.get("num_attention_heads", HEADS.get(width, 0))),
            hidden=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            activation=settings.get("hidden_act", "quick_gelu" if width <= CLIP_L.width else "gelu"),
            projection=shapes["visual_projection.weight"][0],
            size=patch * round((shapes["embeddings.position_embedding.weight"][0] - 1) ** 0.5),
            patch=patch,
            norm_eps=float(settings.get("layer_norm_eps", 1e-5)),
        )
        with torch.device("meta"):
            encoder = CLIPVision(config)
    except (KeyError, IndexError) as error:
        raise CheckpointMismatch(f"{path} is no CLIP tower of pictures: there is no {error}") from error
    except (UsageError, ValueError, TypeError) as error:
        raise CheckpointMismatch(f"{path}: {error}; is the config.json of transformers beside it?") from error
    layout = {name: Place(name) for name in encoder.state_dict()}
    layouts.fit(layout, encoder.state_dict(), tensors, f"{path}, read as an image encoder")
    assign(encoder, layouts.read(layout, tensors, path), path)
    return encoder.requires_grad_(False).eval()
