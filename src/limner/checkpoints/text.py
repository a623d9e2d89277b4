"""Where other programs keep the tensors of text encoders.

Of CLIP: transformers' names are ours, but for newer versions that leave out one level; OpenAI's and OpenCLIP's join
queries, keys and values, and keep the projection as (in, out). Files of a whole CLIP hold its other half too, and
buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from limner.checkpoints.layouts import Layout, Place
from limner.errors import CheckpointMismatch, UsageError
from limner.text.clip import CLIPTextConfig

OPENCLIP_PARTS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
BESIDE_TEXT = ("visual.", "vision_model.", "visual_projection.")
BUFFERS = {  # and numbers of the loss
    "logit_scale",
    "logit_bias",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "text_model.embeddings.position_ids",
    "embeddings.position_ids",
}
TRANSFORMERS: dict[
    str, tuple[type, str, Any]
] = {  # our names and types, transformers' names and what it takes when a config.json does not say
    "width": (int, "hidden_size", 512),
    "depth": (int, "num_hidden_layers", 12),
    "num_heads": (int, "num_attention_heads", 8),
    "hidden": (int, "intermediate_size", 2048),
    "activation": (str, "hidden_act", "quick_gelu"),
    "vocabulary": (int, "vocab_size", 49408),
    "context": (int, "max_position_embeddings", 77),
    "norm_eps": (float, "layer_norm_eps", 1e-5),
    "projection": (int, "projection_dim", 512),
    "eot": (int, "eos_token_id", 49407),
}
LARGEST, DEEPEST = 1_000_000, 200


def openclip_layout(config: CLIPTextConfig) -> Layout:
    """A `CLIPText` in the files of OpenAI's CLIP, OpenCLIP, and Stable Diffusion 2 and XL (after their prefixes)."""
    layout = {
        "text_model.embeddings.token_embedding.weight": Place("token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": Place("positional_embedding"),
    }
    for i in range(config.depth):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
                layout[f"{ours}.self_attn.{name}.{kind}"] = Place(f"{theirs}.attn.in_proj_{kind}", part, 3)
            layout[f"{ours}.self_attn.out_proj.{kind}"] = Place(f"{theirs}.attn.out_proj.{kind}")
            for name, other in OPENCLIP_PARTS.items():
                layout[f"{ours}.{name}.{kind}"] = Place(f"{theirs}.{other}.{kind}")
    for kind in ("weight", "bias"):
        layout[f"text_model.final_layer_norm.{kind}"] = Place(f"ln_final.{kind}")
    if config.projection is not None:
        layout["text_projection.weight"] = Place("text_projection", kept="transposed")
    return layout


def transformers_layout(config: CLIPTextConfig, *, flat: bool = False) -> Layout:
    """A `CLIPText` in transformers' files; `flat` is without the level `text_model.`, as some newer files have it."""
    return {name: Place(name.removeprefix("text_model.") if flat else name) for name in openclip_layout(config)}


def openclip_config(shapes: Mapping[str, Sequence[int]]) -> CLIPTextConfig:
    """The configuration of an OpenCLIP tower with these names and shapes; heads are 64 wide, as in all that Stable
    Diffusion reads with. Raises KeyError for a name that every one has."""
    vocabulary, width = shapes["token_embedding.weight"]
    block = "transformer.resblocks.{}.mlp.c_fc.weight".format
    return CLIPTextConfig(
        width=width,
        depth=next(i for i in itertools.count() if block(i) not in shapes),
        num_heads=width // 64,
        hidden=shapes[block(0)][0],
        activation="gelu",
        projection=shapes["text_projection"][1] if "text_projection" in shapes else None,
        vocabulary=vocabulary,
        context=shapes["positional_embedding"][0],
        pad=0,
    )


def clip_config(shapes: Mapping[str, Sequence[int]]) -> CLIPTextConfig:
    """As `openclip_config` of a tower of OpenAI's CLIP in transformers' names."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    layer = "text_model.encoder.layers.{}.mlp.fc1.weight".format
    return CLIPTextConfig(
        width=width,
        depth=next(i for i in itertools.count() if layer(i) not in shapes),
        num_heads=width // 64,
        hidden=shapes[layer(0)][0],
        projection=shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None,
        vocabulary=vocabulary,
        context=shapes["text_model.embeddings.position_embedding.weight"][0],
    )


def text_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a file of a whole CLIP the weights of the text tower: without the half for pictures, and without buffers."""
    return {k: v for k, v in tensors.items() if k not in BUFFERS and not k.startswith(BESIDE_TEXT)}


def transformers_settings(config: CLIPTextConfig) -> dict[str, Any]:
    """The inverse of `transformers_config`."""
    kind = "CLIPTextModel" if config.projection is None else "CLIPTextModelWithProjection"
    values = {theirs: getattr(config, ours) for ours, (_, theirs, _) in TRANSFORMERS.items()}
    values |= {"projection_dim": config.projection or config.width, "eos_token_id": config.eot or 2}
    return {"architectures": [kind], "model_type": "clip_text_model", "pad_token_id": config.pad, **values}


def transformers_config(settings: Mapping[str, Any], *, pad: int, source: Path | str) -> CLIPTextConfig:
    """The config of a `config.json` of transformers, of a text tower with or without its projection. `pad` is the
    tokenizer's: what such a file says of it is often wrong.

    An EOT of 2, wrong as well, stands for the largest id of a text, as transformers has it. Raises CheckpointMismatch.
    """
    kinds = settings.get("architectures")
    if kinds not in (["CLIPTextModel"], ["CLIPTextModelWithProjection"]):
        raise CheckpointMismatch(f"{source}: its architectures are {kinds!r:.100}, not [CLIPTextModel(WithProjection)]")
    values: dict[str, Any] = {}
    for name, (kind, theirs, default) in TRANSFORMERS.items():
        value = settings.get(theirs, default)
        most = DEEPEST if name == "depth" else LARGEST
        if type(value) is not kind or (isinstance(value, int | float) and not 0 < value < most):
            raise CheckpointMismatch(f"{source}: {theirs} is {value!r:.100}, which no text encoder has")
        values[name] = value
    if kinds == ["CLIPTextModel"]:
        values["projection"] = None
    if values["eot"] == 2:
        values["eot"] = None
    try:
        return CLIPTextConfig(**values, pad=pad)
    except UsageError as error:
        raise CheckpointMismatch(f"{source}: {error}") from error
