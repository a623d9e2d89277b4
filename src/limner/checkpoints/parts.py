"""Parts of a Stable Diffusion in files of their own: a U-Net, an autoencoder, text towers, in any program's names.

What each must be follows from the U-Net: names and shapes do not tell CLIP from OpenCLIP, nor an autoencoder's scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from limner.checkpoints import autoencoder, components, files, folders, text, unet
from limner.checkpoints.layouts import Layout, Place, early_diffusers
from limner.errors import CheckpointMismatch, LimnerError, UsageError
from limner.models.autoencoder import KL_SD1, KL_SDXL, KL_UPSCALER, KLConfig
from limner.models.unet import UNetConfig
from limner.text.clip import CLIPTextConfig

Shapes = Mapping[str, Sequence[int]]
NETWORK, CODEC, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
CODECS = (CODEC, "vae.", "autoencoder.", "")
SIZES = 256
"""Width of each number that SDXL is told."""


@dataclass(frozen=True)
class Held:
    """Tensors of a part by the names that they have in it, and the name in the file of any of them."""

    tensors: Mapping[str, Tensor]
    full: Callable[[str], str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def placed(self, layout: Layout) -> dict[str, Place]:
        return {ours: place.named(self.full) for ours, place in layout.items()}


@contextmanager
def whole(source: str, kind: str) -> Iterator[None]:
    """Raises CheckpointMismatch where what is read within is not a whole one of a `kind`."""
    try:
        yield
    except KeyError as error:
        raise CheckpointMismatch(f"{source} is like {kind}, but not whole: there is no {error}") from error
    except (ValueError, IndexError, UsageError) as error:
        raise CheckpointMismatch(f"{source} is like {kind}, but its shapes do not fit together ({error})") from error


def under(tensors: Mapping[str, Tensor], prefix: str, file: str = "") -> Held:
    """What begins with `prefix`, of the model's own file, or of the `file` named before every name."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Held(inside, lambda name: f"{file}{prefix}{name}")


def network(tensors: Mapping[str, Tensor], beside: Collection[str]) -> Held:
    """The U-Net of a file: in a whole model, as its averages (EMA) alone, or bare, without what is `beside` it."""
    held = under(tensors, NETWORK)
    if not held.tensors and (averaged := under(tensors, f"{EMA}diffusion_model")).tensors:
        named = {unet.dotted(name): tensor for name, tensor in averaged.tensors.items()}
        return Held(named, lambda name: averaged.full(name.replace(".", "")))
    bare = {"input_blocks.0.0.weight", "out.2.weight"}, {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight",
                                                         "up_blocks.0.resnets.0.conv1.weight"}  # fmt: skip
    if not held.tensors and any(names <= tensors.keys() for names in bare):
        return Held({name: t for name, t in tensors.items() if name not in beside}, lambda name: name)
    return held


def network_config(held: Held) -> tuple[UNetConfig, dict[str, Place]]:
    """The U-Net, and the places of its tensors. Raises KeyError for a name that every one has."""
    if "conv_in.weight" in held.tensors:
        config = unet.own_config(held.shapes)
        return config, held.placed({name: Place(name) for name in unet.ldm_layout(config)})
    config = unet.ldm_config(held.shapes)
    return config, held.placed(unet.ldm_layout(config))


def codec_config(held: Held, scale: float) -> tuple[KLConfig, dict[str, Place]]:
    """As `network_config` of an autoencoder."""
    if "encoder.down_blocks.0.resnets.0.conv1.weight" not in held.tensors:
        config = autoencoder.ldm_config(held.shapes, scale)
        return config, codec_layout(held, config)
    config = autoencoder.own_config(held.shapes, scale)
    return config, codec_layout(held, config)


def codec_layout(held: Held, config: KLConfig) -> dict[str, Place]:
    """The places of an autoencoder's tensors in a spelling like that of those held."""
    names = autoencoder.ldm_layout(config)
    if not any(name.startswith("encoder.down_blocks.") for name in held.tensors):
        return held.placed(names)
    early = any(".query." in name for name in held.tensors)
    return held.placed(early_diffusers(names) if early else {name: Place(name) for name in names})


def tower_config(held: Held, openclip: bool) -> tuple[CLIPTextConfig, dict[str, Place]]:
    """As `network_config` of a text tower, OpenCLIP's or else OpenAI's."""
    if "token_embedding.weight" in held.tensors:
        config, layout = text.openclip_config(held.shapes), text.openclip_layout
    elif "embeddings.token_embedding.weight" in held.tensors:
        config = text.clip_config({f"text_model.{name}": shape for name, shape in held.shapes.items()})
        return _kind(config, openclip), held.placed(text.transformers_layout(config, flat=True))
    else:
        config, layout = text.clip_config(held.shapes), text.transformers_layout
    return _kind(config, openclip), held.placed(layout(config))


def _kind(config: CLIPTextConfig, openclip: bool) -> CLIPTextConfig:
    usual = CLIPTextConfig()
    return replace(config, activation="gelu" if openclip else usual.activation, pad=0 if openclip else usual.pad)


# -------------------------------------------------------------------- files of their own


def weights(source: Path) -> list[Path]:
    """The files of a part: a file, or those in a folder of diffusers or transformers. Raises FileProblem."""
    return folders.weights(source) if source.is_dir() else [source]


def read(source: Path) -> dict[str, Tensor]:
    return files.read_all(weights(source))


def codec_in(source: Path) -> Path:
    """The file or folder of the autoencoder, of a folder that may be a whole model's."""
    return source / "vae" if (source / "vae" / "config.json").is_file() else source


def scale_of(network: UNetConfig, tensors: Collection[str]) -> float:
    """The scale of latents of a single file with such a network and tensors of these names."""
    if "edm_mean" in tensors:  # Playground 2.5
        return 0.5
    return (KL_UPSCALER if network.num_classes else KL_SDXL if network.vector_width else KL_SD1).scale


def _told_scale(source: Path, tensors: Mapping[str, Tensor]) -> float | None:
    """What the settings beside an autoencoder say of its scale, or the network that it is in one file with."""
    if source.is_dir() or source.stem.startswith("diffusion_pytorch_model"):
        settings = (source if source.is_dir() else source.parent) / "config.json"
        return folders.autoencoder_config(folders.Settings(settings)).scale if settings.is_file() else None
    beside = network(tensors, ())
    try:
        return scale_of(network_config(beside)[0], tensors.keys()) if beside.tensors else None
    except (KeyError, ValueError, IndexError, LimnerError):
        return None  # of a network that nobody knows


def codec(source: Path, scale: float, model: str) -> Held:
    """The autoencoder of a file or folder, alone or in a whole model, for a `model` whose latents have this scale. No
    name of a tensor tells it, but what else is there may. Raises FileProblem, CheckpointMismatch."""
    whole = read(source)
    if (told := _told_scale(source, whole)) not in (None, scale):
        raise CheckpointMismatch(f"{source} scales latents by {told:g}, {model} by {scale:g}: another family's")
    tensors = {name: t for name, t in whole.items() if not name.startswith(("loss.", EMA))}
    for prefix in CODECS:
        held = under(tensors, prefix, f"{source}/")
        if "decoder.conv_in.weight" in held.tensors:
            return Held({name: t for name, t in held.tensors.items() if not name.startswith("loss.")}, held.full)
    raise CheckpointMismatch(f"{source} holds no autoencoder: there is no 'decoder.conv_in.weight' in it")


def clips_in(tensors: Mapping[str, Tensor], file: str = "") -> list[Held]:
    """The text towers of CLIP's kind among tensors, of the model's own file or of the `file` named before every name,
    without CLIP's half for pictures."""
    mark = re.compile(r"(.*?)(text_model\.)?(embeddings\.)?token_embedding\.weight")
    prefixes = [match[1] for name in sorted(tensors) if (match := mark.fullmatch(name))]
    found = [under(tensors, prefix, file) for prefix in prefixes]
    return [Held(text.text_tower(held.tensors), held.full) for held in found]


def towers(source: Path) -> list[Held]:
    """The text towers of a file, alone or in whatever it is a part of. Raises FileProblem, CheckpointMismatch."""
    tensors = read(source)
    found = clips_in(tensors, f"{source}/")
    if not found:
        what = components.recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        raise CheckpointMismatch(
            f"{source} holds no text encoder of CLIP's kind: "
            + (f"it is {what.what}" if what else "there is no token_embedding in it")
        )
    return found


def wanted(config: UNetConfig) -> list[tuple[bool, str]]:
    """The text towers that a U-Net reads with, in order: whether each is OpenCLIP's, and which it is."""
    if not config.vector_width:
        return [(True, f"OpenCLIP's H, {config.text_width} wide") if config.linear_projection else
                (False, f"CLIP-L, {config.text_width} wide")]  # fmt: skip
    pooled = config.vector_width - 6 * SIZES
    if config.vector_width - 5 * SIZES == config.text_width:  # the refiner
        return [(True, f"OpenCLIP's bigG, {config.text_width} wide")]
    return [(False, f"CLIP-L, {config.text_width - pooled} wide"), (True, f"OpenCLIP's bigG, {pooled} wide")]


def ordered(config: UNetConfig, found: Sequence[Held], sources: str) -> list[Held]:
    """Text towers in the order in which the U-Net reads with them. Raises CheckpointMismatch unless they are those."""
    kinds = wanted(config)
    rows = sorted(((_width(held), held) for held in found), key=lambda row: row[0])  # CLIP-L is the narrower
    if len(rows) != len(kinds) or sum(width for width, _ in rows) != config.text_width:
        have = " and ".join(str(width) for width, _ in rows) or "none"
        need = " and ".join(name for _, name in kinds)
        raise CheckpointMismatch(f"{sources}: the U-Net reads with {need}, but the text encoders given are {have} wide")
    return [held for _, held in rows]


def _width(held: Held) -> int:
    _, width = next(shape for name, shape in held.shapes.items() if name.endswith("token_embedding.weight"))
    return width
