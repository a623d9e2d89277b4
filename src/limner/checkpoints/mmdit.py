"""Where other programs keep the tensors of Stable Diffusion 3's networks, and what names and shapes tell of them.

Names of Stability's files are ours (in files of a whole model after `model.diffusion_model.`). diffusers' keep queries,
keys and values apart, and in the norms that are told no gate, scale comes before shift.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch, UsageError
from limner.models.mmdit import MMDiTConfig, check
from limner.models.mmdit_controlnet import MMDiTControlNetConfig

LARGEST, DEEPEST = 1_000_000, 200
DIFFUSERS = {  # our names, diffusers' and what it takes when a config.json does not say
    "channels": ("in_channels", 16),
    "patch": ("patch_size", 2),
    "depth": ("num_layers", 18),
    "num_heads": ("num_attention_heads", 18),
    "head_width": ("attention_head_dim", 64),
    "text_width": ("joint_attention_dim", 4096),
    "pooled_width": ("pooled_projection_dim", 2048),
    "pos_embed_max": ("pos_embed_max_size", 96),
}
_EMBEDDERS = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}
_IMAGE = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "attn.ln_q": ("attn.norm_q",),
    "attn.ln_k": ("attn.norm_k",),
    "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2.proj": ("attn2.to_out.0",),
    "attn2.ln_q": ("attn2.norm_q",),
    "attn2.ln_k": ("attn2.norm_k",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_TEXT = {
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.proj": ("attn.to_add_out",),
    "attn.ln_q": ("attn.norm_added_q",),
    "attn.ln_k": ("attn.norm_added_k",),
    "mlp.fc1": ("ff_context.net.0.proj",),
    "mlp.fc2": ("ff_context.net.2",),
    "adaLN_modulation.1": ("norm1_context.linear",),
}


def diffusers_layout(config: MMDiTConfig) -> dict[str, Place]:
    """Our name -> place in a file of diffusers' SD3Transformer2DModel."""
    layout = {"pos_embed": Place("pos_embed.pos_embed")}
    layout |= _pairs({ours: Place(theirs) for ours, theirs in _EMBEDDERS.items()})
    for i in range(config.depth):
        last = i + 1 == config.depth
        theirs = f"transformer_blocks.{i}."
        layout |= _block(config, f"joint_blocks.{i}.x_block.", theirs, _IMAGE, dual=i in config.dual_blocks)
        layout |= _block(config, f"joint_blocks.{i}.context_block.", theirs, _TEXT, pre_only=last)
    layout |= _pairs({"final_layer.adaLN_modulation.1": Place("norm_out.linear", kept="swapped")})
    return layout | _pairs({"final_layer.linear": Place("proj_out")})


def control_layout(config: MMDiTControlNetConfig) -> dict[str, Place]:
    """As `diffusers_layout` of an SD3ControlNetModel."""
    layout = {"pos_embed": Place("pos_embed.pos_embed")} if config.embeds else {}
    for ours, theirs in _EMBEDDERS.items():
        if (ours != "x_embedder.proj" or config.embeds) and (ours != "context_embedder" or config.reads_text):
            layout |= _pairs({ours: Place(theirs)})
    for i in range(config.size.depth):
        theirs = f"transformer_blocks.{i}."
        if config.reads_text:
            dual = i in config.size.dual_blocks
            layout |= _block(config.size, f"joint_blocks.{i}.x_block.", theirs, _IMAGE, dual=dual)
            layout |= _block(config.size, f"joint_blocks.{i}.context_block.", theirs, _TEXT)
        else:
            layout |= _block(config.size, theirs, theirs, _IMAGE)
    beside = [*(f"controlnet_blocks.{i}" for i in range(config.size.depth)), "pos_embed_input.proj"]
    return layout | _pairs({name: Place(name) for name in beside})


def stability_control_layout(config: MMDiTControlNetConfig) -> dict[str, Place]:
    """As `control_layout` of Stability's own files for 3.5 large: ours, but for two embeddings that bear diffusers'
    names."""
    told = _pairs({ours: Place(theirs) for ours, theirs in _EMBEDDERS.items() if ours[:2] in ("t_", "y_")})
    return {ours: told.get(ours, Place(ours)) for ours in control_layout(config)}


def _block(
    config: MMDiTConfig, ours: str, theirs: str, table: Mapping[str, tuple[str, ...]], *, dual: bool = False,
    pre_only: bool = False,
) -> dict[str, Place]:  # fmt: skip
    rows: dict[str, Place] = {}
    for name, parts in table.items():
        if (name.startswith("attn2") and not dual) or (pre_only and name.startswith(("attn.proj", "mlp"))):
            continue
        place = Place(theirs + parts[0])
        if len(parts) > 1:
            place = Place(place.name, then=tuple(theirs + part for part in parts[1:]), rows=(config.width,) * 3)
        elif pre_only and name.startswith("adaLN"):
            place = Place(place.name, kept="swapped")
        if ".ln_" not in name:
            rows |= _pairs({ours + name: place})
        elif config.qk_norm:
            rows[f"{ours}{name}.weight"] = place.named(lambda it: f"{it}.weight")
    return rows


def _pairs(rows: Mapping[str, Place]) -> dict[str, Place]:
    """Of modules, their weights and biases."""
    return {
        f"{ours}.{kind}": place.named(lambda it, kind=kind: f"{it}.{kind}")  # type: ignore[misc]
        for ours, place in rows.items()
        for kind in ("weight", "bias")
    }


def is_diffusers(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether names are diffusers' rather than Stability's."""
    return "pos_embed.proj.weight" in shapes


def config_of(shapes: Mapping[str, Sequence[int]]) -> MMDiTConfig:
    """The configuration of a network of Stability's or diffusers' names and these shapes; heads are 64 wide where
    nothing tells. Raises KeyError for a name that every one has, CheckpointMismatch for shapes of none."""
    theirs = is_diffusers(shapes)
    block = "transformer_blocks" if theirs else "joint_blocks"
    query, second = ("attn.norm_q", "attn2.to_out.0") if theirs else ("x_block.attn.ln_q", "x_block.attn2.proj")
    named = dict(_EMBEDDERS) if theirs else {name: name for name in _EMBEDDERS}
    every = "attn.add_k_proj" if theirs else "context_block.attn.qkv"
    depth = next(i for i in itertools.count() if f"{block}.{i}.{every}.weight" not in shapes)
    width, channels, patch, _ = shapes[f"{named['x_embedder.proj']}.weight"]
    norm = shapes.get(f"{block}.0.{query}.weight", ())
    head_width = norm[0] if norm else 64
    places = shapes["pos_embed.pos_embed" if theirs else "pos_embed"][1]
    if width % head_width or math.isqrt(places) ** 2 != places:
        raise _impossible(width, head_width, places)
    return MMDiTConfig(
        channels=channels,
        patch=patch,
        depth=depth,
        num_heads=width // head_width,
        head_width=head_width,
        text_width=shapes[f"{named['context_embedder']}.weight"][1],
        pooled_width=shapes[f"{named['y_embedder.mlp.0']}.weight"][1],
        pos_embed_max=math.isqrt(places),
        qk_norm="rms" if norm else "",
        dual_blocks=tuple(i for i in range(depth) if f"{block}.{i}.{second}.weight" in shapes),
    )


def _impossible(width: int, head_width: int, places: int) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{width} wide with heads of {head_width}, and positions for {places} tokens: no network of Stable Diffusion 3 "
        "is so"
    )


def control_config_of(shapes: Mapping[str, Sequence[int]]) -> MMDiTControlNetConfig:
    """As `config_of` of a ControlNet of diffusers' names or Stability's. That those with tokens of their own are told
    zeros for the pooled prompt, no shape tells: InstantX's are."""
    block = "transformer_blocks.{}.{}".format
    depth = next(i for i in itertools.count() if f"controlnet_blocks.{i}.weight" not in shapes)
    width, hint_channels, patch, _ = shapes["pos_embed_input.proj.weight"]
    embeds, reads_text = "pos_embed.proj.weight" in shapes, "context_embedder.weight" in shapes
    norm = shapes.get(block(0, "attn.norm_q.weight"), ())
    head_width, usual = norm[0] if norm else 64, MMDiTConfig()
    places = shapes["pos_embed.pos_embed"][1] if embeds else usual.pos_embed_max**2
    if width % head_width or math.isqrt(places) ** 2 != places:
        raise _impossible(width, head_width, places)
    size = MMDiTConfig(
        channels=shapes["pos_embed.proj.weight"][1] if embeds else usual.channels,
        patch=patch,
        depth=depth,
        num_heads=width // head_width,
        head_width=head_width,
        text_width=shapes["context_embedder.weight"][1] if reads_text else usual.text_width,
        pooled_width=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        pos_embed_max=math.isqrt(places),
        qk_norm="rms" if norm else "",
        dual_blocks=tuple(i for i in range(depth) if block(i, "attn2.to_out.0.weight") in shapes),
    )
    return MMDiTControlNetConfig(
        size=size, reads_text=reads_text, embeds=embeds, hint_channels=hint_channels, zero_pooled=embeds
    )


def diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    """The `config.json` of a folder of diffusers with such a network in it."""
    return {
        "_class_name": "SD3Transformer2DModel",
        **{theirs: getattr(config, ours) for ours, (theirs, _) in DIFFUSERS.items()},
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(config.dual_blocks),
        "out_channels": config.channels,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": config.patch * config.base_grid,
    }


def from_diffusers_config(settings: Mapping[str, Any], source: Path | str = "config.json") -> MMDiTConfig:
    """The inverse of `diffusers_config`. Raises CheckpointMismatch for what is none, or has what is not known here."""

    def wrong(name: str, value: Any) -> CheckpointMismatch:
        return CheckpointMismatch(f"{source}: {name} is {value!r:.100}, which no network of Stable Diffusion 3 has")

    left = {name: value for name, value in settings.items() if not name.startswith("_")}
    if settings.get("_class_name", "SD3Transformer2DModel") != "SD3Transformer2DModel":
        raise wrong("_class_name", settings["_class_name"])

    def whole(name: str, default: int, most: int = LARGEST) -> int:
        value = left.pop(name, default)
        if type(value) is not int or not 0 < value <= most:
            raise wrong(name, value)
        return value

    values: dict[str, Any] = {
        ours: whole(name, default, DEEPEST if ours == "depth" else LARGEST)
        for ours, (name, default) in DIFFUSERS.items()
    }
    dual = left.pop("dual_attention_layers", None) or []
    if not isinstance(dual, list | tuple) or any(type(i) is not int or not 0 <= i < values["depth"] for i in dual):
        raise wrong("dual_attention_layers", dual)
    left.pop("quantization_config", None)  # which the names of tensors tell
    norm = left.pop("qk_norm", None)
    if norm not in (None, "rms_norm"):
        raise wrong("qk_norm", norm)
    sample = whole("sample_size", 128)
    width = values["num_heads"] * values["head_width"]
    out_channels = left.pop("out_channels", None)
    for name, value, only in (
        ("out_channels", values["channels"] if out_channels is None else out_channels, values["channels"]),
        ("caption_projection_dim", left.pop("caption_projection_dim", 1152), width),
    ):
        if value != only:
            raise wrong(name, value)
    for name, value in left.items():
        if value not in (None, False):
            raise wrong(name, value)
    config = MMDiTConfig(
        **values,
        base_grid=max(sample // values["patch"], 1),
        qk_norm="rms" if norm else "",
        dual_blocks=tuple(sorted(set(dual))),
    )
    try:
        check(config)
    except UsageError as error:
        raise CheckpointMismatch(f"{source}: {error}") from error
    return config
