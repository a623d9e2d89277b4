"""DiT and SiT in the files of their authors, whose names are ours, and in those of diffusers.

A file of the authors holds the network alone, or what their training saved: the weights, their average, which is what
is drawn with, and the optimizer's. No name nor shape tells a SiT from a DiT: that is taken from the name of the file,
and said. What diffusers computes otherwise than the authors is done as it does for its folders, so that they give its
pictures, and as they do for their files: see `guided_channels`, `freq_shift` and `eps` of `models.dit.DiTConfig`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from limner.checkpoints import files, folders, parts
from limner.checkpoints.folders import INDEX, Settings
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.layouts import Place, prefixed
from limner.errors import CheckpointMismatch, UsageError
from limner.models import dit
from limner.models.autoencoder import KL_SD1
from limner.models.dit import DiTConfig
from limner.sampling.interpolants import VPConfig
from limner.text.labels import LabelsConfig

NOISE = VPConfig(betas="linear", first=0.0001, last=0.02, offset=0, to_zero=True)
"""A DiT's, which is ADM's."""
MARKS = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight")
PREFIXES = ("ema.", "", "model.", "module.")
"""Where a file may have the network; the average before what it is of."""
PIPELINE = "DiTPipeline"
TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")
"""The class in diffusers, and that of folders from before it had a name of its own."""
ASSUMED = "no name of a tensor tells a SiT from a DiT: it is taken for a DiT; a SiT has sit in the name of its file"
TABLE = "pos_embed"
EMBEDDED = {  # in diffusers' blocks, each of which has a copy
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def modules(config: DiTConfig) -> Iterator[tuple[str, str]]:
    """Our name of every module with weights, and diffusers'; of `qkv`, what its three begin with."""
    yield "x_embedder.proj", "pos_embed.proj"
    yield from ((ours, f"transformer_blocks.0.norm1.emb.{theirs}") for ours, theirs in EMBEDDED.items())
    for i in range(config.depth):
        a, b = f"blocks.{i}", f"transformer_blocks.{i}"
        yield f"{a}.attn.qkv", f"{b}.attn1.to_"
        yield f"{a}.attn.proj", f"{b}.attn1.to_out.0"
        yield f"{a}.mlp.fc1", f"{b}.ff.net.0.proj"
        yield f"{a}.mlp.fc2", f"{b}.ff.net.2"
        yield f"{a}.adaLN_modulation.1", f"{b}.norm1.linear"
    yield "final_layer.adaLN_modulation.1", "proj_out_1"
    yield "final_layer.linear", "proj_out_2"


def tensors_of(module: str) -> tuple[str, ...]:
    return ("weight",) if module.endswith("embedding_table") else ("weight", "bias")


def original_layout(config: DiTConfig) -> dict[str, Place]:
    """The authors' files: our names."""
    names = [f"{ours}.{tensor}" for ours, _ in modules(config) for tensor in tensors_of(ours)]
    return {name: Place(name) for name in (TABLE, *names)}


def diffusers_layout(config: DiTConfig) -> dict[str, Place]:
    """Our name -> place in a file of diffusers that went through `joined`, which gives it the table of positions."""
    layout = {TABLE: Place(TABLE)}
    for ours, theirs in modules(config):
        for tensor in tensors_of(ours):
            name = f"{theirs}.{tensor}"
            if ours.endswith("qkv"):
                q, *then = (f"{theirs}{part}.{tensor}" for part in "qkv")
                layout[f"{ours}.{tensor}"] = Place(q, then=tuple(then), rows=(config.width,) * 3)
            else:
                layout[f"{ours}.{tensor}"] = Place(name)
    return layout


def copies(config: DiTConfig) -> Iterator[tuple[str, str]]:
    """What embeds time and class in diffusers' first block, and its copy in each of the others."""
    for theirs in EMBEDDED.values():
        for tensor in tensors_of(theirs):
            for i in range(1, config.depth):
                names = (f"transformer_blocks.{k}.norm1.emb.{theirs}.{tensor}" for k in (0, i))
                yield next(names), next(names)


def joined(config: DiTConfig, tensors: Mapping[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The tensors of diffusers without its copies, which must be equal, and with the table of positions, which it
    computes. Raises CheckpointMismatch."""
    found = {TABLE: dit.table_of(config), **tensors}
    for first, name in copies(config):
        copy = found.pop(name, None)
        if copy is None or first not in tensors or not torch.equal(copy, tensors[first]):
            raise CheckpointMismatch(
                f"{source}: {files.shown(name)} is missing or not the same as in block 0: Limner has one for all blocks"
            )
    return found


def parted(config: DiTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `joined`."""
    found = {name: tensor for name, tensor in tensors.items() if name != TABLE}
    return found | {name: tensors[first] for first, name in copies(config)}


def config_of(shapes: Mapping[str, Sequence[int]], to_data: bool = False) -> DiTConfig:
    """The network of the authors whose tensors have these names and shapes, which do not tell how many heads there are:
    they are 64 wide, but for those of XL, 72, nor whether it is a SiT. Raises KeyError for a name that every one has,
    and UsageError."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    side = math.isqrt(shapes[TABLE][1])
    if side * side != shapes[TABLE][1]:
        raise UsageError(f"its {shapes[TABLE][1]} positions are no square")
    return DiTConfig(
        channels=channels, out_channels=shapes["final_layer.linear.weight"][0] // patch**2, patch=patch, width=width,
        depth=next(i for i in range(10_000) if f"blocks.{i}.attn.qkv.weight" not in shapes),
        num_heads=16 if width == dit.DIT_XL_2.width else width // 64, size=side * patch,
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1, to_data=to_data,
    )  # fmt: skip


# -------------------------------------------------------------------- files of the authors


def prefix_of(names: Mapping[str, Tensor]) -> str | None:
    """What the names of a DiT's tensors begin with in a file, None where there is none."""
    return next((p for p in PREFIXES if all(f"{p}{mark}" in names for mark in MARKS)), None)


def says(path: Path, kind: str) -> bool:
    return re.search(rf"(?:^|[^a-z]){kind}(?:$|[^a-z])", path.stem.lower()) is not None


def recognise(
    path: Path,
    tensors: Mapping[str, Tensor],
    prediction: Literal["eps", "v", "x0"] | None = None,
    vae: Path | None = None,
) -> Foreign:
    """What a file with a DiT's tensors is. Its autoencoder is that of Stable Diffusion 1, in `vae` or in a folder of
    this name beside it; `prediction` says that it is no SiT. Raises FileProblem, CheckpointMismatch."""
    prefix = prefix_of(tensors)
    assert prefix is not None
    sit = prediction is None and says(path, "sit")
    held = parts.under(tensors, prefix)
    kind = "SiT" if sit else "DiT"
    beside = path.parent / "vae"
    vae = vae or (beside if (beside / "config.json").is_file() else None)
    if vae is None:
        raise CheckpointMismatch(
            f"{path} holds no autoencoder, but a {kind} alone: give Stable Diffusion 1's with --vae FILE"
        )
    with parts.whole(f"{path} with {vae}", f"a {kind}"):
        network = config_of(held.shapes, sit)
        dit.check(network)
        given = parts.codec(vae, KL_SD1.scale, str(path))
        codec, rows = parts.codec_config(given, KL_SD1.scale)
    mine = {held.full(name): tensor for name, tensor in held.tensors.items()}
    told = prediction is not None or says(path, kind.lower())
    return Foreign(
        source=path, network=network, autoencoder=codec, text=LabelsConfig(num_classes=network.num_classes),
        tokenizers=(), noise="flow" if sit else NOISE, prediction="velocity" if sit else prediction or "eps",
        layout=prefixed(held.placed(original_layout(network)), "network.", "") | prefixed(rows, "autoencoder.", ""),
        tensors=mine | {given.full(name): tensor for name, tensor in given.tensors.items()},
        files=(path,), size=network.size * codec.factor,
        beside=Counter(name.split(".")[0] for name in tensors if name not in mine),
        assumed=() if told else (ASSUMED,),
        unsaid=not sit,
    )  # fmt: skip


# -------------------------------------------------------------------- folders of diffusers


def is_folder(folder: Path) -> bool:
    """Whether a folder with an index is that of a DiT. Raises FileProblem."""
    return Settings(folder / INDEX).values.get("_class_name") == PIPELINE


def of_folder(folder: Path) -> Foreign:
    """What such a folder holds. Raises FileProblem, CheckpointMismatch."""
    index = Settings(folder / INDEX)
    known = {"transformer": TRANSFORMERS, "vae": ("AutoencoderKL",)}
    for name, classes in known.items():
        value = index.values.get(name)
        if not isinstance(value, list) or not value or value[-1] not in classes:
            raise CheckpointMismatch(
                f"{index.path}: the part {name} is {value!r:.100}, which Limner does not know: it knows {classes[0]}"
            )
    try:
        network = transformer_config(Settings(folder / "transformer" / "config.json"))
        codec = folders.autoencoder_config(Settings(folder / "vae" / "config.json"))
        noise, prediction, sampler, schedule = folders.noise_config(
            Settings(folder / "scheduler" / "scheduler_config.json")
        )
        words = LabelsConfig(num_classes=network.num_classes, names=names_in(index, network.num_classes))
    except UsageError as error:
        raise CheckpointMismatch(f"{folder}: {error}") from error
    paths = {name: folders.weights(folder / name) for name in known}
    found = {name: files.read_all(paths[name]) for name in known}
    found["transformer"] = joined(network, found["transformer"], folder / "transformer")
    given = parts.under({f"vae/{name}": tensor for name, tensor in found["vae"].items()}, "vae/")
    return Foreign(
        source=folder, network=network, autoencoder=codec, text=words, tokenizers=(), noise=noise,
        prediction=prediction, sampler=sampler, schedule=schedule, size=network.size * codec.factor,
        layout=prefixed(diffusers_layout(network), "network.", "transformer/")
        | prefixed(parts.codec_layout(given, codec), "autoencoder.", ""),
        tensors={f"{part}/{name}": tensor for part, tensors in found.items() for name, tensor in tensors.items()},
        files=tuple(path for part in paths.values() for path in part),
        assumed=() if sampler else (f"the folder's sampler is not one of ours: {folders.UNKNOWN_SAMPLER}",),
    )  # fmt: skip


def transformer_config(settings: Settings) -> DiTConfig:
    take = settings.take
    heads, head_width, channels = (
        take("num_attention_heads", 16),
        take("attention_head_dim", 72),
        take("in_channels", 4),
    )
    config = DiTConfig(
        channels=channels, out_channels=take("out_channels", 0) or channels, patch=take("patch_size", 2),
        width=heads * head_width, depth=take("num_layers", 28), num_heads=heads, size=take("sample_size", 32),
        num_classes=take("num_embeds_ada_norm", 1000), guided_channels=0, freq_shift=1, eps=take("norm_eps", 1e-5),
    )  # fmt: skip
    settings.done(ignored={"norm_num_groups", "dropout"}, fixed=FIXED)
    dit.check(config)
    return config


FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_type": "ada_norm_zero",
}


def names_in(index: Settings, count: int) -> tuple[str, ...]:
    """The names of classes that an index tells, none where it tells none. Raises CheckpointMismatch."""
    told = index.values.get("id2label")
    if told is None:
        return ()
    names = [""] * count
    for number, name in told.items() if isinstance(told, dict) else [("", told)]:
        if not (number.isascii() and number.isdecimal() and len(number) < 10 and isinstance(name, str)):
            raise index.wrong("id2label", {number: name})
        if int(number) < count:
            names[int(number)] = name
    return tuple(names)
