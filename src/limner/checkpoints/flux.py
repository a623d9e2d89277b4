"""FLUX.1 in files: Black Forest Labs' names, which are ours, and those of diffusers, which keeps queries, keys, values
and what goes into MLPs apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limner.checkpoints.layouts import Place
from limner.errors import CheckpointMismatch, UsageError
from limner.models.flux import FLUX_DEV, FluxConfig, check

OTHERS = {"distilled_guidance_layer": "Chroma", "single_stream_modulation": "FLUX.2"}
"""Part of the names of networks that came of FLUX.1, and of none of its own."""
AXES = {128: (16, 56, 56)}
"""Of positions, by the width of a head."""
EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
STREAMS = {  # of a double block, by where a part is in diffusers
    "img": ("norm1", ("to_q", "to_k", "to_v"), "norm_q", "norm_k", "to_out.0", "ff"),
    "txt": (
        "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_q", "norm_added_k", "to_add_out",
        "ff_context",
    ),
}  # fmt: skip
DIFFUSERS: dict[str, tuple[type, str, Any]] = {  # our names and types, diffusers' names and what it takes without them
    "in_channels": (int, "in_channels", 64),
    "out_channels": (int, "out_channels", None),
    "depth": (int, "num_layers", 19),
    "depth_single": (int, "num_single_layers", 38),
    "num_heads": (int, "num_attention_heads", 24),
    "text_width": (int, "joint_attention_dim", 4096),
    "pooled_width": (int, "pooled_projection_dim", 768),
    "guidance_embedded": (bool, "guidance_embeds", False),
}
LARGEST = 100_000
MODES, HINT = "controlnet_mode_embedder.weight", "input_hint_block"
AUTHORS = "double_blocks.0.img_attn.qkv.weight"
"""A name that tells Black Forest Labs' spelling, which is XLabs' too."""
ONE = replace(FLUX_DEV, depth=1, depth_single=1)


def diffusers_layout(config: FluxConfig) -> dict[str, Place]:
    """Our name -> place in a file of diffusers' FluxTransformer2DModel."""
    layout = streams_layout(config)
    for tensor in ("weight", "bias"):
        layout[f"final_layer.linear.{tensor}"] = Place(f"proj_out.{tensor}")
        layout[f"final_layer.adaLN_modulation.1.{tensor}"] = Place(f"norm_out.linear.{tensor}", kept="swapped")
    return layout


def controlnet_layout(config: FluxConfig, num_kinds: int = 0, hint_widths: tuple[int, ...] = ()) -> dict[str, Place]:
    """Our name -> place in a file of diffusers' FluxControlNetModel, as InstantX, Shakker and others publish them; of a
    union if `num_kinds`, of one that sees pixels if `hint_widths`."""
    own = [f"controlnet_blocks.{i}" for i in range(config.depth)]
    own += [f"controlnet_single_blocks.{i}" for i in range(config.depth_single)]
    own += [f"{HINT}.{name}" for name in _hint_convolutions(hint_widths)]
    names = [f"{name}.{tensor}" for name in ("controlnet_x_embedder", *own) for tensor in ("weight", "bias")]
    names += [MODES] if num_kinds else []
    return streams_layout(config) | {name: Place(name) for name in names}


def xlabs_layout(config: FluxConfig, hint_widths: tuple[int, ...]) -> dict[str, Place]:
    """As `controlnet_layout` of XLabs' files: our names, but for what sees the picture."""
    rows = {f"{HINT}.{name}": f"{HINT}.{2 * k}" for k, name in enumerate(_hint_convolutions(hint_widths))}
    rows["controlnet_x_embedder"] = "pos_embed_input"
    layout = {name: Place(name) for name in controlnet_layout(config, 0, hint_widths)}
    for ours, theirs in rows.items():
        layout |= {f"{ours}.{tensor}": Place(f"{theirs}.{tensor}") for tensor in ("weight", "bias")}
    return layout


def _hint_convolutions(widths: Sequence[int]) -> list[str]:
    return ["conv_in", *(f"blocks.{k}" for k in range(2 * len(widths) - 2)), "conv_out"] if widths else []


def hint_widths_of(shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Of the convolutions through which a ControlNet sees pixels, () for one that sees latents."""
    names = ["conv_in", *(f"blocks.{2 * k + 1}" for k in range(9))]
    if is_authors(shapes):  # the last of whose convolutions comes after these
        last = next(k for k in itertools.count() if f"{HINT}.{4 * k}.weight" not in shapes)
        names = [str(4 * k) for k in range(last)]
    return tuple(shapes[f"{HINT}.{name}.weight"][0] for name in names if f"{HINT}.{name}.weight" in shapes)


def is_authors(shapes: Mapping[str, Any]) -> bool:
    """Whether names are Black Forest Labs' rather than diffusers'."""
    return AUTHORS in shapes


def streams_layout(config: FluxConfig) -> dict[str, Place]:
    """As `diffusers_layout`, without the output: of what a ControlNet has too."""
    layout: dict[str, Place] = {}

    def put(ours: str, *theirs: str, rows: tuple[int, ...] = ()) -> None:
        for tensor in ("weight", "bias"):
            name, *then = (f"{name}.{tensor}" for name in theirs)
            layout[f"{ours}.{tensor}"] = Place(name, then=tuple(then), rows=rows)

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for ours, theirs in EMBEDDERS.items():
        if ours != "guidance_in" or config.guidance_embedded:
            put(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
            put(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")

    thirds = (config.width,) * 3
    for i in range(config.depth):
        block = f"transformer_blocks.{i}"
        for stream, (norm, qkv, norm_q, norm_k, out, ff) in STREAMS.items():
            ours = f"double_blocks.{i}.{stream}"
            put(f"{ours}_mod.lin", f"{block}.{norm}.linear")
            put(f"{ours}_attn.qkv", *(f"{block}.attn.{name}" for name in qkv), rows=thirds)
            put(f"{ours}_attn.proj", f"{block}.attn.{out}")
            put(f"{ours}_mlp.0", f"{block}.{ff}.net.0.proj")
            put(f"{ours}_mlp.2", f"{block}.{ff}.net.2")
            layout[f"{ours}_attn.norm.query_norm.scale"] = Place(f"{block}.attn.{norm_q}.weight")
            layout[f"{ours}_attn.norm.key_norm.scale"] = Place(f"{block}.attn.{norm_k}.weight")
    for i in range(config.depth_single):
        ours, block = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        into = (*(f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{block}.proj_mlp")
        put(f"{ours}.linear1", *into, rows=(*thirds, config.hidden))
        put(f"{ours}.linear2", f"{block}.proj_out")
        put(f"{ours}.modulation.lin", f"{block}.norm.linear")
        layout[f"{ours}.norm.query_norm.scale"] = Place(f"{block}.attn.norm_q.weight")
        layout[f"{ours}.norm.key_norm.scale"] = Place(f"{block}.attn.norm_k.weight")
    return layout


def config_of(shapes: Mapping[str, Sequence[int]], source: Path | str = "the file") -> FluxConfig:
    """The configuration of a FLUX.1 with these names and shapes, Black Forest Labs' (without a prefix) or diffusers'.

    They do not tell dev from Krea and Kontext, nor Canny from Depth. Raises CheckpointMismatch for another network.
    """
    for mark, other in OTHERS.items():
        if any(mark in name for name in shapes):
            raise CheckpointMismatch(f"{source} is a model of {other}, which is another network than FLUX.1")
    layout = diffusers_layout(ONE)
    if is_authors(shapes):
        layout = {name: Place(name) for name in layout}
    return _config_of(shapes, layout, "final_layer.linear.weight", source)


def controlnet_config_of(
    shapes: Mapping[str, Sequence[int]], source: Path | str = "the file"
) -> tuple[FluxConfig, int]:
    """The configuration, and the number of kinds, of a ControlNet in diffusers' names or XLabs'. Raises
    CheckpointMismatch."""
    layout = streams_layout(ONE)
    if is_authors(shapes):
        layout = {name: Place(name) for name in layout}
    config = _config_of(shapes, layout, "", source)
    num_kinds = _size(shapes, MODES, 0, source) if MODES in shapes else 0
    return config, num_kinds


def _config_of(
    shapes: Mapping[str, Sequence[int]], layout: Mapping[str, Place], out: str, source: Path | str
) -> FluxConfig:
    """`layout` has the first block of each kind; without `out`, our name of what comes last, as much comes out as goes
    in."""

    def size(ours: str, axis: int) -> int:
        return _size(shapes, layout[ours].name, axis, source)

    def count(ours: str) -> int:
        before, after = layout[ours].name.split(".0.", 1)
        return next(i for i in itertools.count() if f"{before}.{i}.{after}" not in shapes)

    width, head = size("img_in.weight", 0), size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    if head not in AXES:
        raise CheckpointMismatch(f"{source}: its heads are {head} wide; those of FLUX.1 are 128")
    config = FluxConfig(
        in_channels=size("img_in.weight", 1),
        out_channels=size(out, 0) if out else size("img_in.weight", 1),
        width=width,
        depth=count("double_blocks.0.img_mod.lin.weight"),
        depth_single=count("single_blocks.0.modulation.lin.weight"),
        num_heads=width // head,
        axes=AXES[head],
        text_width=size("txt_in.weight", 1),
        pooled_width=size("vector_in.in_layer.weight", 1),
        mlp_ratio=size("double_blocks.0.img_mlp.0.weight", 0) / width,
        guidance_embedded=layout["guidance_in.in_layer.weight"].name in shapes,
    )
    return checked(config, source)


def _size(shapes: Mapping[str, Sequence[int]], name: str, axis: int, source: Path | str) -> int:
    shape = tuple(shapes.get(name, ()))
    if len(shape) <= axis or not 0 < shape[axis] < LARGEST:
        found = f"is {shape}" if name in shapes else "is missing"
        raise CheckpointMismatch(f"{source} is no FLUX.1: {name} {found}")
    return shape[axis]


def diffusers_config(config: FluxConfig) -> dict[str, Any]:
    """What diffusers keeps in transformer/config.json. Raises UsageError for a network that it cannot build."""
    if (config.mlp_ratio, config.theta) != (FLUX_DEV.mlp_ratio, FLUX_DEV.theta):
        found = f"mlp_ratio={config.mlp_ratio:g} and theta={config.theta}"
        raise UsageError(f"diffusers has FLUX.1 with mlp_ratio 4 and theta 10000 alone, not {found}")
    values = {theirs: getattr(config, ours) for ours, (_, theirs, _) in DIFFUSERS.items()}
    head, axes = config.width // config.num_heads, list(config.axes)
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "attention_head_dim": head, "axes_dims_rope": axes,
        **values,
    }  # fmt: skip


def from_diffusers_config(settings: Mapping[str, Any], source: Path | str = "config.json") -> FluxConfig:
    """The inverse of `diffusers_config`. Raises CheckpointMismatch for what is of another network, or cannot be."""
    if settings.get("_class_name") != "FluxTransformer2DModel":
        found = f"{settings.get('_class_name')!r:.100}"
        raise CheckpointMismatch(f"{source}: its _class_name is {found}, not FluxTransformer2DModel")
    if settings.get("patch_size", 1) != 1:
        raise CheckpointMismatch(f"{source}: patch_size is {settings['patch_size']!r:.100}, which no FLUX.1 has")
    values = {ours: _value(settings, row, source) for ours, row in DIFFUSERS.items() if ours != "out_channels"}
    out = settings.get("out_channels")
    values["out_channels"] = (
        _value(settings, DIFFUSERS["out_channels"], source) if out is not None else values["in_channels"]
    )
    head = _value(settings, (int, "attention_head_dim", 128), source)
    axes = settings.get("axes_dims_rope", list(AXES[128]))
    if not isinstance(axes, list | tuple) or not all(type(axis) is int for axis in axes):
        raise CheckpointMismatch(f"{source}: axes_dims_rope is {axes!r:.100}, not a list of whole numbers")
    return checked(FluxConfig(**values, width=head * values["num_heads"], axes=tuple(axes)), source)


def _value(settings: Mapping[str, Any], row: tuple[type, str, Any], source: Path | str) -> Any:
    kind, name, default = row
    value = settings.get(name, default)
    if not isinstance(value, int) or type(value) is not kind or not 0 <= value < LARGEST:
        raise CheckpointMismatch(f"{source}: {name} is {value!r:.100}, which no FLUX.1 has")
    return value


def checked(config: FluxConfig, source: Path | str) -> FluxConfig:
    try:
        check(config)
    except UsageError as error:
        raise CheckpointMismatch(f"{source}: {error}") from error
    return config
