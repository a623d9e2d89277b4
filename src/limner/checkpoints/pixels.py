"""U-Nets that draw pixels in the files of their authors, DDPM, Improved DDPM and ADM, and in folders of diffusers.

Files hold the network alone. DDPM's are those of its PyTorch port (the repository of DDIM), and what is not told is as
in Ho et al.; OpenAI's tell neither noise nor heads nor size, which are taken from what was published of their kind, and
said. Of a variance that was learned, the channels after the first three, the network keeps the weights.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from limner.checkpoints import files, folders, layouts, parts, unet
from limner.checkpoints.dit import NOISE, names_in
from limner.checkpoints.folders import INDEX, Settings
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.layouts import Place, prefixed
from limner.errors import CheckpointMismatch, UsageError
from limner.models.classifier import ClassifierConfig
from limner.models.pixels import PixelsConfig
from limner.models.unet import DDPM_CIFAR, UNetConfig, check
from limner.sampling.interpolants import EDMConfig, VPConfig
from limner.text.labels import LabelsConfig

COSINE = VPConfig(betas="cosine", offset=0, to_zero=True)
PREFIXES = ("", "module.")
DDPM_MARKS = ("temb.dense.0.weight", "down.0.block.0.norm1.weight")
OPENAI_MARKS = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight")
DIFFUSERS_MARKS = {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight"}
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
NETWORK = "UNet2DModel"
STEPS = 50
ASSUMED_DDPM = "no name of a tensor tells noise and size: betas of 0.0001 to 0.02 and {size} px are taken"
ASSUMED_OPENAI = (
    "no name of a tensor tells noise, heads and size: those published with its kind are taken, {betas} betas of "
    "{steps} timesteps, {heads}{order} and {size} px"
)
CLASSIFIER_MARKS = {"input_blocks.0.0.weight", "time_embed.0.weight", "out.2.positional_embedding"}
ASSUMED_CLASSIFIER = (
    "no name of a tensor tells noise and heads: those published with its kind are taken, {betas} betas of {steps} "
    "timesteps, heads 64 wide"
)
THREE = "names do not tell it from a consistency model, which would draw nothing like a picture"
CLIPPED = "diffusers' DDIM would go on with the noise of what it foresaw, ours does with that of what was kept of it"
VARIANCE = "its scheduler has the variance {}, the sampler ddpm the smaller one (fixed_small)"
ANCESTRAL = "its scheduler is DDPM's, which walks all timesteps: ddim is taken unless another is named"


def family(network: UNetConfig) -> str:
    """Whose network it is like."""
    if network.resample == "block":
        return "ADM"
    return "Improved DDPM" if network.scale_shift or network.out_channels > network.in_channels else "DDPM"


# -------------------------------------------------------------------- files of the authors


def prefix_of(names: Mapping[str, Tensor]) -> tuple[str, bool] | None:
    """What the names of such a network's tensors begin with, and whether they are OpenAI's; None where there is none,
    or one that reads text."""
    if any(".transformer_blocks." in name for name in names):
        return None
    for prefix, marks in itertools.product(PREFIXES, (DDPM_MARKS, OPENAI_MARKS)):
        if all(prefix + mark in names for mark in marks):
            return prefix, marks is OPENAI_MARKS
    return None


def recognise(
    path: Path, tensors: Mapping[str, Tensor], prediction: Literal["eps", "v", "x0"] | None = None
) -> Foreign | None:
    """What a file with these tensors is, None for another kind. Raises CheckpointMismatch."""
    if (found := prefix_of(tensors)) is None:
        if tensors.keys() >= DIFFUSERS_MARKS and not any(".transformer_blocks." in name for name in tensors):
            raise CheckpointMismatch(f"{path} is of a folder of diffusers, which says how to draw with it: give that")
        return None
    prefix, openai = found
    held = parts.under(tensors, prefix)
    kind = "ADM or Improved DDPM" if openai else "DDPM"
    with parts.whole(str(path), kind):
        network = openai_config(held.shapes) if openai else ddpm_config(held.shapes)
        _checked(network)
        size = size_of(network)
    noise: VPConfig = NOISE
    if openai:
        network, noise, layout, sentence = _published(network, size)
        assumed = (sentence, *([THREE] if family(network) == "ADM" and network.out_channels == 3 else []))
    else:
        layout, assumed = unet.ddpm_layout(network), (ASSUMED_DDPM.format(size=size),)
    mine = {held.full(name): tensor for name, tensor in held.tensors.items()}
    return Foreign(
        source=path, network=network, autoencoder=PixelsConfig(), text=LabelsConfig(num_classes=network.num_classes),
        tokenizers=(), noise=noise, prediction=prediction or "eps", sampler="ddim", steps=STEPS, guidance=1.0,
        layout=prefixed(layout, "network.", prefix), tensors=mine, files=(path,), size=size, clip=True,
        beside=Counter(name.split(".")[0] for name in tensors if name not in mine), assumed=assumed,
    )  # fmt: skip


def _checked(network: UNetConfig) -> None:
    """Raises UsageError for a network that draws something else than pictures of three channels."""
    check(network)
    if network.in_channels != 3 or network.out_channels not in (3, 6):
        sees = " beside a picture, such as one to enlarge" * (network.in_channels == 6)
        raise UsageError(
            f"{network.in_channels} channels in and {network.out_channels} out{sees}: known are 3, and 3 or 6"
        )


def size_of(network: UNetConfig) -> int:
    """Pixels a side of what the published networks with attention at these levels draw: it ends at 16, and ADM's, at
    three levels, at 32."""
    attended = [i for i, depth in enumerate(network.depths) if depth]
    if not attended or attended[0] > 6:
        raise UsageError("no level of the first seven has attention, which would tell the size of its pictures")
    return (32 if len(attended) > 2 else 16) << attended[0]


def ddpm_config(shapes: Mapping[str, Sequence[int]]) -> UNetConfig:
    """The network of DDIM's repository whose tensors have these names and shapes. Raises KeyError for a name that every
    one has."""
    levels = _count(shapes, "down.{}.block.0.conv1.weight")
    return replace(
        DDPM_CIFAR,
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        widths=tuple(shapes[f"down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        num_blocks=_count(shapes, "down.0.block.{}.conv1.weight"),
        depths=tuple(int(f"down.{i}.attn.0.q.weight" in shapes) for i in range(levels)),
        dropout=0.0,
    )


def openai_config(shapes: Mapping[str, Sequence[int]]) -> UNetConfig:
    """The network of OpenAI whose tensors have these names and shapes, with heads as published: 64 wide in ADM's, but
    four in that of five levels; four in Improved DDPM's, but one where time is only added. Raises KeyError for a name
    that every one has, UsageError."""
    ends = [n for n in range(_count(shapes, "output_blocks.{}.0.in_layers.2.weight")) if _doubles(shapes, n)]
    if not ends:
        raise UsageError("nothing in it doubles a picture")
    blocks = any(f"output_blocks.{ends[0]}.{k}.in_layers.2.weight" in shapes for k in (1, 2))
    starts = [1 + i * (ends[0] + 1) for i in range(len(ends) + 1)]
    widths = tuple(shapes[f"input_blocks.{n}.0.in_layers.2.weight"][0] for n in starts)
    _told(shapes, widths[0])
    scale_shift = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0]
    heads = 4 if len(widths) == 5 or (not blocks and scale_shift) else 0 if blocks else 1
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        widths=widths,
        num_blocks=ends[0],
        depths=tuple(int(f"input_blocks.{n}.1.qkv.weight" in shapes) for n in starts),
        num_heads=heads,
        head_width=0 if heads else 64,
        num_classes=shapes.get("label_emb.weight", (0,))[0],
        scale_shift=scale_shift,
        resample="block" if blocks else "conv",
    )


def classifier(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[ClassifierConfig, VPConfig, dict[str, Place], str] | None:
    """The classifier of guided_diffusion whose tensors these are, the noise that it was published for, the places of
    its tensors and what was assumed of it; None for another file. Raises CheckpointMismatch."""
    if not tensors.keys() >= CLASSIFIER_MARKS:
        return None
    with parts.whole(str(path), "a classifier of ADM"):
        config = classifier_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        check(config.unet)
    noise = COSINE if config.size <= 64 else NOISE
    sentence = ASSUMED_CLASSIFIER.format(betas=noise.betas, steps=noise.steps)
    return config, noise, prefixed(unet.classifier_layout(config.unet), "network.", ""), sentence


def classifier_config(shapes: Mapping[str, Sequence[int]]) -> ClassifierConfig:
    """That of these names and shapes. A block that halves the picture has no attention, and nothing else tells it from
    the others: the first after attention is one. Raises KeyError for a name that every one has, UsageError."""
    blocks = 1 + _count(shapes, "input_blocks.{}.0.in_layers.2.weight", 1)
    attended = [n for n in range(blocks) if f"input_blocks.{n}.1.qkv.weight" in shapes]
    if not attended:
        raise UsageError("no level of it has attention")
    num_blocks = next(n for n in range(attended[0], blocks + 1) if n not in attended) - attended[0]
    levels, rest = divmod(blocks, num_blocks + 1)
    starts = [1 + i * (num_blocks + 1) for i in range(levels)]
    if rest or not set(attended) & set(starts):
        raise UsageError(f"{blocks} blocks are not levels of {num_blocks}, each with one that halves the picture")
    widths = tuple(shapes[f"input_blocks.{n}.0.in_layers.2.weight"][0] for n in starts)
    _told(shapes, widths[0])
    return ClassifierConfig(
        num_classes=shapes["out.2.c_proj.weight"][0],
        size=math.isqrt(shapes["out.2.positional_embedding"][1] - 1) << (levels - 1),
        widths=widths,
        num_blocks=num_blocks,
        depths=tuple(int(n in attended) for n in starts),
    )


def _told(shapes: Mapping[str, Sequence[int]], width: int) -> None:
    """Raises UsageError where the time is told in other numbers than those of a first level of this width."""
    if (told := shapes["time_embed.0.weight"][1]) != width:
        raise UsageError(f"its time is told in {told} numbers, but its first level is {width} wide, as in ADM's 512")


def _doubles(shapes: Mapping[str, Sequence[int]], n: int) -> bool:
    """Whether a block of the way up ends its level."""
    last = itertools.product((1, 2), ("conv", "in_layers.2"))
    return any(f"output_blocks.{n}.{k}.{name}.weight" in shapes for k, name in last)


def _count(shapes: Mapping[str, Sequence[int]], name: str, first: int = 0) -> int:
    return next(n for n, i in enumerate(itertools.count(first)) if name.format(i) not in shapes)


def _published(network: UNetConfig, size: int) -> tuple[UNetConfig, VPConfig, dict[str, Place], str]:
    """What was published with a network of OpenAI: its time, its noise, how it joins queries, keys and values, and a
    sentence on it. Improved DDPM's 4,000 timesteps are told as 1,000 but to the network of classes."""
    ours = family(network) == "ADM"
    noise = COSINE if size <= 64 else NOISE
    if not ours and size <= 64:
        noise = replace(noise, steps=4000)
        network = replace(network, time_scale=1.0 if network.num_classes else 0.25)
    later = ours and size == 64
    sentence = ASSUMED_OPENAI.format(
        betas=noise.betas, steps=noise.steps, size=size,
        heads=f"{network.num_heads} heads" if network.num_heads else f"heads {network.head_width} wide",
        order=" after another (use_new_attention_order)" * later,
    )  # fmt: skip
    return network, noise, unet.ldm_layout(network, by_head=not later), sentence


# -------------------------------------------------------------------- folders of diffusers


def is_folder(folder: Path) -> bool:
    """Whether a folder with an index is of a network on pixels. Raises FileProblem."""
    values = Settings(folder / INDEX).values
    part = values.get("unet")
    return isinstance(part, list) and part[-1:] == [NETWORK] and not values.keys() & {"vae", "vqvae"}


def of_folder(folder: Path) -> Foreign:
    """What such a folder holds, its parts in folders of their own or, as the first were, at its root. Raises
    FileProblem, CheckpointMismatch."""
    index = Settings(folder / INDEX)
    if (kind := index.take("_class_name", "")) not in PIPELINES:
        raise index.wrong("_class_name", kind)
    for name, value in index.values.items():
        if isinstance(value, list) and value != [None, None] and name not in ("unet", "scheduler"):
            raise index.wrong(f"the part {name}", value)
    at = {name: folder / name if (folder / name).is_dir() else folder for name in ("unet", "scheduler")}
    settings = Settings(at["scheduler"] / "scheduler_config.json")
    try:
        network, size = network_config(Settings(at["unet"] / "config.json"))
        noise, prediction, sampler, schedule = folders.noise_config(settings)
        words = LabelsConfig(
            num_classes=network.num_classes,
            names=names_in(index, network.num_classes) if network.num_classes else (),
        )
    except UsageError as error:
        raise CheckpointMismatch(f"{folder}: {error}") from error
    if isinstance(noise, EDMConfig):
        raise settings.wrong("the scheduler", "EDM's")
    assumed = [] if sampler else [f"the folder's sampler is not one of ours: {folders.UNKNOWN_SAMPLER}"]
    assumed += [ANCESTRAL] if sampler == "ddpm" else []
    clip = settings.take("clip_sample", sampler in ("ddpm", "ddim"))
    if clip and (most := settings.take("clip_sample_range", 1.0)) != 1:
        raise settings.wrong("clip_sample_range", most)
    assumed += [CLIPPED] if clip and sampler == "ddim" else []
    if sampler == "ddpm" and (kind := settings.take("variance_type", "fixed_small")) != "fixed_small":
        assumed += [VARIANCE.format(kind)]
    if settings.take("thresholding", False):
        raise settings.wrong("thresholding", True)
    paths = folders.weights(at["unet"])
    tensors = files.read_all(paths)
    early = any(".query." in name for name in tensors)
    names = unet.ldm_layout(network)
    return Foreign(
        source=folder, network=network, autoencoder=PixelsConfig(), text=words, tokenizers=(), noise=noise,
        prediction=prediction, sampler="ddim" if sampler == "ddpm" else sampler or "euler", schedule=schedule,
        steps=STEPS, guidance=1.0, size=size, clip=clip,
        layout=prefixed(
            unet.old_diffusers_layout(network) if early else {name: Place(name) for name in names}, "network.", ""
        ),
        tensors=tensors, files=tuple(paths), assumed=tuple(assumed),
    )  # fmt: skip


def network_config(settings: Settings) -> tuple[UNetConfig, int]:
    """The U-Net, and the side of the pictures it was trained at, 0 where that is not said. Raises CheckpointMismatch,
    UsageError."""
    take = settings.take
    widths = settings.each("block_out_channels", None, [224, 448, 672, 896])
    padding = settings.values.pop("downsample_padding", 1)
    heads: Any = settings.values.pop("attention_head_dim", 8)  # which is their width here; null is one head
    for name, value, known in (
        ("downsample_padding", padding, (0, 1)),
        ("mid_block_type", settings.values.pop("mid_block_type", MIDDLE), (MIDDLE,)),
        ("attention_head_dim", heads, (heads,) if heads is None or (type(heads) is int and heads > 0) else ()),
    ):
        if value not in known:
            raise settings.wrong(name, value)
    attends, resample = _levels(settings, len(widths))
    groups = take("norm_num_groups", 32)
    for name, usual in (("attn_norm_num_groups", groups), ("time_embedding_dim", 4 * widths[0])):
        if take(name, usual) != usual:
            raise CheckpointMismatch(f"{settings.path}: {name} is not {usual}: Limner has it alike everywhere")
    shift = take("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise settings.wrong("resnet_time_scale_shift", shift)
    config = UNetConfig(
        in_channels=take("in_channels", 3),
        out_channels=take("out_channels", 3),
        widths=widths,
        num_blocks=take("layers_per_block", 2),
        depths=tuple(map(int, attends)),
        mid_depth=int(settings.values.pop("add_attention", True) is True),
        num_heads=0 if heads else 1,
        head_width=heads or 0,
        num_classes=take("num_class_embeds", 0),
        groups=groups,
        eps=take("norm_eps", 1e-5),
        scale_shift=shift == "scale_shift",
        resample=resample,
        pad="around" if padding else "after",
        sines_first=not settings.values.pop("flip_sin_to_cos", True),
        freq_shift=take("freq_shift", 0),
    )
    side = take("sample_size", 0)
    settings.done(ignored={"dropout", "num_train_timesteps"}, fixed=FIXED)
    _checked(config)
    return config, side


MIDDLE = "UNetMidBlock2D"
FIXED = {"act_fn": "silu", "mid_block_scale_factor": 1, "time_embedding_type": "positional"}


def _levels(settings: Settings, count: int) -> tuple[list[bool], Literal["conv", "block"]]:
    """Which levels have attention, and what halves and doubles the picture. Raises CheckpointMismatch."""
    found: list[list[bool]] = []
    ways: set[str] = set()
    for way, resampling in (("down", "Downsample"), ("up", "Upsample")):
        attn, conv, block = (f"{kind}Block2D" for kind in (f"Attn{way.title()}", way.title(), f"Resnet{resampling}"))
        usual = [conv, attn, attn, attn]
        kinds = settings.values.pop(f"{way}_block_types", usual if way == "down" else usual[::-1])
        within = settings.take(f"{way}sample_type", "conv")  # of levels with attention
        how = {conv: "conv", block: "block", attn: {"conv": "conv", "resnet": "block"}.get(within, within)}
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in how for kind in map(str, kinds)):
            raise settings.wrong(f"{way}_block_types", kinds)
        ways |= {how[kind] for kind in kinds[:-1]}
        found.append([kind == attn for kind in kinds])
    if found[0] != found[1][::-1] or len(ways) > 1 or not ways <= {"conv", "block"}:
        raise CheckpointMismatch(f"{settings.path}: its levels, down and up, differ in what Limner has alike")
    return found[0], "block" if ways == {"block"} else "conv"


# -------------------------------------------------------------------- writing


def export(found: Foreign) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a folder of diffusers of this model holds: the contents of its JSON files by name, and the tensors of its
    one part. Raises UsageError for a network that diffusers has no words for."""
    network, block = found.network, found.network.resample == "block"
    at = {width for width, depth in zip(network.widths, network.depths, strict=True) if depth} | {network.widths[-1]}
    heads = {width // network.heads(width) for width in at}
    if network.time_scale != 1 or (network.num_heads != 1 and len(heads) > 1):
        why = "heads of several widths" if network.time_scale == 1 else "its time scaled"
        raise UsageError(f"{found.source} has {why}, for which diffusers has no word: it is not made into a folder")
    learned = network.out_channels > network.in_channels
    settings = folders.noise_settings(replace(found, sampler="ddpm" if learned else found.sampler))
    kinds = [f"Resnet{way}sampleBlock2D" if block else f"{way}Block2D" for way in ("Down", "Up")]
    contents = {
        INDEX: {
            "_class_name": "DDPMPipeline" if learned else "DDIMPipeline",
            "unet": ["diffusers", NETWORK],
            "scheduler": ["diffusers", settings["_class_name"]],
        },
        "unet/config.json": {
            "_class_name": NETWORK,
            "sample_size": found.size,
            "in_channels": network.in_channels,
            "out_channels": network.out_channels,
            "block_out_channels": network.widths,
            "down_block_types": ["AttnDownBlock2D" if depth else kinds[0] for depth in network.depths],
            "up_block_types": ["AttnUpBlock2D" if depth else kinds[1] for depth in reversed(network.depths)],
            "downsample_type": "resnet" if block else "conv",
            "upsample_type": "resnet" if block else "conv",
            "downsample_padding": 1 if network.pad == "around" else 0,
            "layers_per_block": network.num_blocks,
            "attention_head_dim": None if network.num_heads == 1 else heads.pop(),
            "add_attention": network.mid_depth > 0,
            "norm_num_groups": network.groups,
            "attn_norm_num_groups": network.groups,
            "norm_eps": network.eps,
            "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
            "flip_sin_to_cos": not network.sines_first,
            "freq_shift": network.freq_shift,
            "num_class_embeds": network.num_classes or None,
        },
        "scheduler/scheduler_config.json": settings
        | {"clip_sample": found.clip}
        | ({"variance_type": "learned_range"} if learned else {}),
    }
    ours = layouts.read(found.layout, found.tensors, found.source)
    part = {name.removeprefix("network."): tensor for name, tensor in ours.items()}
    return contents, {"unet/diffusion_pytorch_model": part}
