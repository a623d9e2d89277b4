"""Name or file -> a system, built and with its weights. Also: what there is to choose from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from limner.checkpoints import dit, files, flows, folders, hub, layouts, parts, pixels, single_files
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.quantization import gathered, quantize
from limner.devices import bytes_of, free_of
from limner.errors import Assumed, CheckpointMismatch, FileProblem, UnknownName, UsageError, complaint
from limner.models import lpips
from limner.models.autoencoder import (
    KL_FLUX,
    KL_SD1,
    KL_SD3,
    KL_SDXL,
    KL_TINY,
    KL_UPSCALER,
    VQ_F4,
    VQ_TINY,
    KLAutoencoder,
    KLConfig,
    VQAutoencoder,
    VQConfig,
)
from limner.models.classifier import CLASSIFIER_32, CLASSIFIER_TINY, Classifier, ClassifierConfig
from limner.models.dcae import DCAE, DCAE_ICONS, DCAE_TINY, DCAEConfig
from limner.models.dit import DIT_32, DIT_TINY, DIT_XL_2, DIT_XL_2_512, SIT_XL_2, DiT, DiTConfig
from limner.models.flux import FLUX_CONTROL, FLUX_DEV, FLUX_FILL, FLUX_SCHNELL, FLUX_TINY, Flux, FluxConfig
from limner.models.joint_dit import JOINT_DIT_ICONS, JOINT_DIT_TINY, JointDiT, JointDiTConfig
from limner.models.mmdit import SD3_MEDIUM, SD3_TINY, SD35_LARGE, SD35_MEDIUM, MMDiT, MMDiTConfig
from limner.models.multiscale import MULTISCALE_MNIST, MULTISCALE_TINY, Multiscale, MultiscaleConfig
from limner.models.pixels import Pixels, PixelsConfig
from limner.models.unet import (
    ICONS_32,
    SD1,
    SD1_EDIT,
    SD2,
    SD2_DEPTH,
    SDXL,
    SDXL_EDIT,
    SDXL_REFINER,
    UNET_TINY,
    UNET_TINY_PIXELS,
    X4_UPSCALER,
    UNet,
    UNetConfig,
)
from limner.nn.linear import Linear
from limner.nn.quantized import Quantized, of_bytes, quantize_
from limner.sampling import interpolants, predictions
from limner.sampling.interpolants import SMALL_NOISE, EDMConfig, FlowConfig, SDEConfig, VPConfig, discrete
from limner.systems import previews
from limner.systems.autoencoding import AdversarialAutoencodingSystem, AdversarialConfig, AutoencodingSystem
from limner.systems.classifying import ClassifyingSystem
from limner.systems.diffusion import DiffusionSystem
from limner.systems.nonequilibrium import NonequilibriumSystem
from limner.text import bpe
from limner.text.bpe import CLIPTokenizer
from limner.text.clip import SD1_TEXT, SD2_TEXT, SDXL_REFINER_TEXT, SDXL_TEXT, CLIPTowers, CLIPTowersConfig
from limner.text.joined import (
    FLUX_DEV_TEXT,
    FLUX_SCHNELL_TEXT,
    SD3_TEXT,
    FluxText,
    FluxTextConfig,
    JoinedText,
    SD3Text,
    SD3TextConfig,
)
from limner.text.labels import Labels, LabelsConfig
from limner.text.minilm import POSITIONS as minilm_positions
from limner.text.minilm import WIDTH as minilm_width
from limner.text.minilm import MiniLM
from limner.text.unigram import T5Tokenizer
from limner.types import Defaults

WEIGHTS = Path(__file__).parent / "weights"
CONTROLS = {"icons-canny": ("icons", "follows edges of a picture: --control icons-canny=IMAGE:1,canny")}
"""ControlNets that ship: of which model, and what they do."""
_ICONS = Defaults(
    width=256, height=256, steps=12, guidance=3.0, min_size=128, max_size=512, sampler="dpmpp_2m", strength=0.8
)
_ONCE = replace(_ICONS, steps=1, guidance=1.0)


SystemName = Annotated[str, Field(min_length=1, max_length=200)]
"""As pictures remember it."""
AutoencoderConfig = Annotated[DCAEConfig | KLConfig | VQConfig, Field(discriminator="type")]
CodecConfig = Annotated[DCAEConfig | KLConfig | VQConfig | PixelsConfig, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the terms of a DCAE's loss weigh beside L1: the KL divergence (`kl_weight`), the gradients of the picture
    (`gradient_weight`), L1 of a half-size picture (`scale_weight`); see `limner.systems.autoencoding`."""

    type: Literal["pixels"] = "pixels"
    kl_weight: float = 1e-7
    gradient_weight: float = 1.0
    scale_weight: float = 0.25


@dataclass(frozen=True, kw_only=True)
class AutoencodingConfig:
    """`name` is the system's own; `family` says in words what it is."""

    kind: Literal["autoencoding"] = "autoencoding"
    name: SystemName = "icons-autoencoder"
    family: str = "KL autoencoder"
    autoencoder: AutoencoderConfig = DCAE_ICONS
    loss: LossConfig | AdversarialConfig = LossConfig()
    """What a DCAE is trained with, or else what a KL and a VQ autoencoder are."""
    defaults: Defaults = _ONCE


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """`autoencoder_from` and `text_encoder_from` are files or folders of an autoencoder and of CLIP's towers, or of
    whole systems with them, of ours or of other programs, whose weights are used when training.

    `name` is the system's own; `family` says in words what it is. `text_encoder` is what reads prompts; as "minilm" it
    reads `max_tokens` of one. `interpolant` ties alpha to sigma; `prediction` is what the network's output means.
    A caption is left out with a chance of `caption_dropout`, for guidance.
    """

    kind: Literal["diffusion"] = "diffusion"
    name: SystemName = "icons"
    family: str = "latent flow transformer"
    network: Annotated[
        JointDiTConfig | UNetConfig | DiTConfig | MMDiTConfig | FluxConfig, Field(discriminator="type")
    ] = JOINT_DIT_ICONS
    autoencoder: CodecConfig = DCAE_ICONS
    autoencoder_from: str = ""
    text_encoder: Literal["minilm"] | CLIPTowersConfig | LabelsConfig | SD3TextConfig | FluxTextConfig = "minilm"
    text_encoder_from: str = ""
    max_tokens: int = 24
    interpolant: Literal["flow", "edm"] | VPConfig | EDMConfig | FlowConfig | SDEConfig = "flow"
    looks: bool = False
    """Whether the network takes pictures to look at (FLUX.1 Kontext)."""
    small_noise: VPConfig | None = None
    """Of a picture that the network sees beside the latents and enlarges."""
    prediction: Literal["velocity", "x0", "eps", "v", "edm"] = "velocity"
    learned_variance: bool = False
    """Whether the second half of what the network says is of the variance, which the sampler ddpm then draws with."""
    clip: bool = False
    """Whether what is foreseen at every step of a drawing is kept in [-1, 1], as DDPM's pictures are."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    defaults: Defaults = _ICONS


_PIXELS = Defaults(
    width=28, height=28, steps=1000, guidance=1.0, min_size=16, max_size=512, strength=1.0, prompted=False
)


_CLASSIFIED = Defaults(width=32, height=32, steps=1, guidance=1.0, min_size=16, max_size=512, prompted=False)


@dataclass(frozen=True, kw_only=True)
class NonequilibriumConfig:
    """See `limner.systems.nonequilibrium.NonequilibriumSystem`."""

    kind: Literal["nonequilibrium"] = "nonequilibrium"
    name: SystemName = "sohl-dickstein-2015"
    """What pictures remember it by."""
    family: str = "nonequilibrium diffusion"
    """What kind of system it is, in words."""
    network: MultiscaleConfig = MULTISCALE_MNIST
    trajectory: int = 1000
    """Steps from data to noise."""
    first_beta: float = 1e-3
    """The variance of the first of them."""
    mean: float = -0.7387
    """Of the pixels, as they are taken away before the first step; here of MNIST."""
    std: float = 0.6162
    """Their standard deviation, by which they are divided."""
    learned_schedule: bool = False
    """Whether the variances of the steps are learned too, beginning with the constant fraction."""
    repeats: int = 1
    """How often each step back is taken where a picture is painted over; 1 is as published."""
    defaults: Defaults = _PIXELS


@dataclass(frozen=True, kw_only=True)
class ClassifyingConfig:
    """See `limner.systems.classifying.ClassifyingSystem`."""

    kind: Literal["classifying"] = "classifying"
    name: SystemName = "adm-classifier"
    """What pictures remember it by."""
    family: str = "noise-aware classifier"
    """What kind of system it is, in words."""
    network: ClassifierConfig = CLASSIFIER_32
    text_encoder: LabelsConfig
    """Whose classes it tells."""
    interpolant: VPConfig
    """The noise that its pictures are under."""
    defaults: Defaults = _CLASSIFIED


SystemConfig = Annotated[
    AutoencodingConfig | DiffusionConfig | NonequilibriumConfig | ClassifyingConfig, Field(discriminator="kind")
]
AnySystem = AutoencodingSystem | DiffusionSystem | NonequilibriumSystem | ClassifyingSystem


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the catalogue; `file` is the bundled weight file, None where weights must be trained or given. `recipe`
    trains them, "" is the one of the row's name; where it is None, they must be given."""

    config: SystemConfig
    summary: str
    file: Path | None = None
    task: str = field(default="")
    recipe: str | None = ""
    latent_rgb: previews.Map | None = None
    """What previews of `file` are made with (see `limner.systems.previews`), where it is not published."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def weights(self) -> str:
        return "bundled" if self.file is not None and self.file.is_file() else "needed"


_TINY = Defaults(width=32, height=32, steps=12, guidance=2.0, min_size=16, max_size=64)
_SD = Defaults(
    width=512,
    height=512,
    steps=30,
    guidance=7.5,
    schedule="auto",
    min_size=32,
    max_size=2048,
    max_prompt_chars=10_000,
)  # multiples of 64 are best


def _latent_diffusion(
    name: str, summary: str, autoencoder: KLConfig | VQConfig, loss: AdversarialConfig | None = None
) -> Entry:
    """A row of an autoencoder that is trained as latent diffusion's are."""
    config = AutoencodingConfig(
        name=name, family=f"{autoencoder.type.upper()} autoencoder", autoencoder=autoencoder,
        loss=loss or AdversarialConfig(), defaults=replace(_TINY if name.endswith("-tiny") else _SD, **_BACK),
    )  # fmt: skip
    return Entry(config=config, task=AutoencodingSystem.task, summary=summary)


_BACK: dict[str, Any] = {"steps": 1, "guidance": 1.0, "schedule": "normal"}
"""What says nothing of an autoencoder."""
KL_TRAINED = replace(KL_SD1, scale=1.0)  # until it is measured
KL_F8_TINY = replace(KL_TINY, latent_channels=8, widths=(8, 16, 32, 64), groups=2)
VQ_F4_TINY = replace(VQ_TINY, widths=(8, 16, 32), groups=2, codes=64)
_F8_TINY = AdversarialConfig(disc_start=450, disc_width=16, disc_layers=2)
_F4 = AdversarialConfig(disc_weight=0.75, disc_start=0)
_F4_TINY = replace(_F4, disc_start=450, disc_width=16, disc_layers=2)


def _stable_diffusion(name: str, summary: str, **changes: Any) -> Entry:
    """A row of the family, by what differs from Stable Diffusion 1."""
    config = DiffusionConfig(
        name=name, family="Stable Diffusion 1", network=SD1, autoencoder=KL_SD1, text_encoder=SD1_TEXT,
        interpolant=VPConfig(), prediction="eps", defaults=_SD,
    )  # fmt: skip
    return Entry(config=replace(config, **changes), task=DiffusionSystem.task, summary=summary, recipe=None)


_UNET_TINY = replace(UNET_TINY, in_channels=8, out_channels=8, depths=(0, 1), text_width=minilm_width)
_SD3_TINY = replace(SD3_TINY, channels=8, head_width=32, text_width=minilm_width, pooled_width=minilm_width)
_FLUX_TINY = replace(FLUX_TINY, in_channels=32, out_channels=32, text_width=minilm_width, pooled_width=minilm_width)
_SHAPES = LabelsConfig(
    num_classes=40,
    names=tuple(
        f"{colour} {shape}, solid {colour} {shape}, outlined {colour} {shape}"
        for shape in ("circle", "square", "triangle", "diamond", "cross")
        for colour in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
    ),
)


def _miniature(name: str, family: str, what: str, network: Any, **changes: Any) -> Entry:
    """A row of a family in miniature, on the latents of icons-tiny: what differs from Stable Diffusion 1, or a flow."""
    timed = not isinstance(changes.get("interpolant"), FlowConfig)
    config = DiffusionConfig(
        name=name, family=family, network=network, autoencoder=DCAE_TINY,
        autoencoder_from=str(Path("icons-tiny", "autoencoder.safetensors")), max_tokens=8, interpolant=VPConfig(),
        prediction="eps" if timed else "velocity", defaults=replace(_TINY, schedule="auto" if timed else "uniform"),
    )  # fmt: skip
    summary = f"coloured shapes, 32 px: {what}, trained in minutes"
    return Entry(config=replace(config, **changes), task=DiffusionSystem.task, summary=summary)


STYLES = LabelsConfig(
    num_classes=23,
    names=(
        "3d", "blob", "cartoon-outline", "circle-flag", "clipart", "duotone", "emojione", "flat-icon", "fluent-flat",
        "fluent-icon", "freehand", "fxemoji", "glossy", "glyph", "line-fill", "mono-line", "noto", "pixel",
        "silhouette", "twemoji", "ultimate-color", "weather-fill", "weather-line",
    ),
)  # fmt: skip
"""Those of the icon data."""
DDPM_NOISE = VPConfig(betas="linear", first=1e-4, last=0.02, offset=0, to_zero=True)
IDDPM_NOISE = VPConfig(betas="cosine", offset=0, to_zero=True)
VP_NOISE, SUBVP_NOISE = SDEConfig(floor=1e-3), SDEConfig(kind="subvp", floor=1e-3)
VE_NOISE = SDEConfig(kind="ve", sigma_min=0.02, sigma_max=100.0)
"""Twice what is published, since our pixels are from -1 to 1. The highest is to be the distance of the two pictures
that are furthest apart (arXiv:2006.09011, technique 1), which of 1,400 icons is 86."""
_SDE: dict[str, Any] = {"interpolant": VP_NOISE, "defaults": {"sampler": "pc", "schedule": "uniform"}}
"""Kept in [-1, 1] as DDPM's, which the paper does not: at the noisy end of a VP an error of eps counts 150 times in x0,
and pictures of a little training go all white or black."""


_PATCHES = (
    DIT_32,
    replace(DIT_32, width=128, depth=3, num_heads=4, num_classes=_SHAPES.num_classes, size=16),
)


def _pixels(name: str, family: str, what: str, **changes: Any) -> tuple[Entry, Entry]:
    """Rows of a system that draws icons in 32 pixels, told a style, and of the same in miniature, told a shape: what
    differs from DDPM. Changes of `network` and `defaults` are of their fields, those of `tiny` of its network; `of` are
    both networks before them."""
    network, defaults, less = (changes.pop(name, {}) for name in ("network", "defaults", "tiny"))
    large, small = changes.pop("of", (ICONS_32, replace(UNET_TINY_PIXELS, widths=(24, 48), num_classes=41)))
    usual: dict[str, Any] = {"interpolant": DDPM_NOISE, "prediction": "eps", "clip": True}
    drawn: dict[str, Any] = {"steps": 250, "sampler": "ddpm", "schedule": "trailing", "guidance": 1.0}
    row = DiffusionConfig(
        name=name, family=family, network=replace(large, **network), autoencoder=PixelsConfig(), text_encoder=STYLES,
        **usual | changes,
        defaults=replace(_TINY, **drawn | defaults),
    )  # fmt: skip
    tiny = replace(
        row, name=f"{name}-tiny", network=replace(small, **network | less), text_encoder=_SHAPES,
        defaults=replace(row.defaults, width=16, height=16),
    )  # fmt: skip
    return (
        Entry(config=row, task=DiffusionSystem.task, summary=f"icons in 32 px by their style: {what}"),
        Entry(config=tiny, task=DiffusionSystem.task, summary="coloured shapes, 16 px: the same, trained in minutes"),
    )


def _classifier(name: str, classes: LabelsConfig, network: ClassifierConfig = CLASSIFIER_32) -> ClassifyingConfig:
    """Of pictures under the noise of DDPM."""
    return ClassifyingConfig(
        name=name, network=replace(network, num_classes=classes.num_classes), text_encoder=classes,
        interpolant=DDPM_NOISE, defaults=replace(_CLASSIFIED, width=network.size, height=network.size),
    )  # fmt: skip


_SD2 = {"family": "Stable Diffusion 2", "network": SD2, "text_encoder": SD2_TEXT}
_SDXL: dict[str, Any] = {
    "family": "Stable Diffusion XL",
    "autoencoder": KL_SDXL,
    "defaults": replace(_SD, width=1024, height=1024, guidance=5.0, schedule="leading"),
}


def _of_classes(name: str, summary: str, network: DiTConfig, **changes: Any) -> Entry:
    """A row of DiT or SiT, by what differs from DiT."""
    side = 8 * network.size
    defaults = Defaults(
        width=side, height=side, steps=30, guidance=4.0, sampler="dpmpp_2m", schedule="auto", min_size=32, max_size=1024
    )
    config = DiffusionConfig(
        name=name, family="SiT" if network.to_data else "DiT", network=network, autoencoder=KL_SD1,
        text_encoder=LabelsConfig(), interpolant=dit.NOISE, prediction="eps", defaults=defaults,
    )  # fmt: skip
    return Entry(config=replace(config, **changes), task=DiffusionSystem.task, summary=summary, recipe=None)


def _flow(name: str, summary: str, **changes: Any) -> Entry:
    """A row of FLUX.1, by what differs from FLUX.1 dev."""
    config = DiffusionConfig(
        name=name, family="FLUX.1", network=FLUX_DEV, autoencoder=KL_FLUX, text_encoder=FLUX_DEV_TEXT,
        interpolant=flows.FLUX_NOISE, defaults=_FLUX,
    )  # fmt: skip
    return Entry(config=replace(config, **changes), task=DiffusionSystem.task, summary=summary, recipe=None)


_FLUX = Defaults(
    width=1024, height=1024, steps=28, guidance=3.5, schedule="shifted", min_size=32, max_size=2048,
    max_prompt_chars=10_000,
)  # fmt: skip
_SD3: dict[str, Any] = {
    "family": "Stable Diffusion 3",
    "autoencoder": KL_SD3,
    "text_encoder": SD3_TEXT,
    "interpolant": flows.SD3_NOISE,
}
_SD3_DEFAULTS = replace(_FLUX, guidance=5.0, schedule="normal")
BESIDE: dict[str, dict[str, Any]] = {
    "hint": {"strength": 1.0, "steps": 50, "guidance": 30.0}, "reference": {"strength": 1.0, "guidance": 2.5},
    "mask": {"strength": 1.0}, "picture": {"strength": 1.0, "image_guidance": 1.5}, "depth": {"strength": 0.8},
    "else": {"strength": 1.0},
}  # fmt: skip
"""Defaults by what a network sees beside the latents."""
_SEEING = {
    ("sd1", "picture"): "instruct-pix2pix",
    ("sdxl", "picture"): "instruct-pix2pix-xl",
    ("sd2", "depth"): "sd2-depth",
}
"""The rows of those that have one."""

CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            config=DiffusionConfig(),
            task=DiffusionSystem.task,
            file=WEIGHTS / "icons" / "icons.safetensors",
            summary="emoji, stickers and icons, 256 px, transparent",
            latent_rgb=previews.ICONS,
        ),
        Entry(
            config=DiffusionConfig(
                name="icons-tiny",
                network=JOINT_DIT_TINY,
                autoencoder=DCAE_TINY,
                autoencoder_from=str(Path("icons-tiny", "autoencoder.safetensors")),
                max_tokens=8,
                defaults=_TINY,
            ),
            task=DiffusionSystem.task,
            summary="coloured shapes, 32 px: the same line in miniature, trained in minutes",
        ),
        Entry(
            config=AutoencodingConfig(),
            task=AutoencodingSystem.task,
            summary="256 px RGBA pictures to 16 x 16 x 32 latents and back",
        ),
        Entry(
            config=AutoencodingConfig(
                name="icons-autoencoder-tiny", autoencoder=DCAE_TINY, defaults=replace(_TINY, steps=1, guidance=1.0)
            ),
            task=AutoencodingSystem.task,
            summary="32 px RGBA pictures to 8 x 8 x 8 latents and back",
        ),
        _latent_diffusion("kl-f8", "pictures to latents and back: the autoencoder of Stable Diffusion 1", KL_TRAINED),
        _latent_diffusion("kl-f8-tiny", "the same in miniature, 32 px, trained in minutes", KL_F8_TINY, _F8_TINY),
        _latent_diffusion("vq-f4", "pictures to latents of a codebook and back: LDM-4", VQ_F4, _F4),
        _latent_diffusion("vq-f4-tiny", "the same in miniature, 32 px, trained in minutes", VQ_F4_TINY, _F4_TINY),
        Entry(
            config=NonequilibriumConfig(),
            task=NonequilibriumSystem.task,
            summary="grey digits, 28 px: diffusion as it began, 1000 steps",
        ),
        Entry(
            config=NonequilibriumConfig(
                name="sohl-dickstein-2015-tiny", network=MULTISCALE_TINY, trajectory=200, mean=0.7081, std=0.5351
            ),
            task=NonequilibriumSystem.task,
            summary="the same in miniature, coloured shapes of 16 px, trained in minutes",
        ),
        _miniature("sd1-tiny", "Stable Diffusion 1", "a U-Net that reads text", _UNET_TINY),
        _miniature(
            "sd2-v-tiny",
            "Stable Diffusion 2",
            "a U-Net that predicts v",
            replace(_UNET_TINY, linear_projection=True),
            prediction="v",
        ),
        _miniature(
            "sdxl-tiny",
            "Stable Diffusion XL",
            "a U-Net that is told sizes",
            replace(_UNET_TINY, linear_projection=True, vector_width=minilm_width + 6 * 256),
        ),
        _miniature("sd3-tiny", "Stable Diffusion 3", "an MMDiT", _SD3_TINY, interpolant=FlowConfig()),
        _miniature(
            "flux-tiny",
            "FLUX.1",
            "double and single blocks, told their guidance",
            _FLUX_TINY,
            interpolant=flows.FLUX_NOISE,
            defaults=replace(_TINY, guidance=1.0),
        ),
        _miniature(
            "dit-tiny",
            "DiT",
            "a DiT, told one of 40 classes",
            replace(DIT_TINY, channels=8, width=128, depth=3, num_heads=4, num_classes=40, guided_channels=8),
            text_encoder=_SHAPES,
            interpolant=dit.NOISE,
        ),
        *_pixels("ddpm", "DDPM", "eps of 1,000 timesteps"),
        replace(
            _pixels(
                "ddpm-mini",
                "DDPM",
                "the same with a million parameters",
                network={"widths": (48, 48, 48), "num_blocks": 1, "depths": (0, 1, 0), "groups": 16, "dropout": 0.0},
            )[0],
            file=WEIGHTS / "ddpm-mini" / "ddpm-mini.safetensors",
        ),
        *_pixels(
            "iddpm",
            "Improved DDPM",
            "a cosine of noise, learned variances",
            network={"out_channels": 6, "scale_shift": True, "num_heads": 4},
            interpolant=IDDPM_NOISE,
            learned_variance=True,
        ),
        *_pixels(
            "adm",
            "ADM",
            "more heads, blocks that resample",
            network={
                "out_channels": 6,
                "scale_shift": True,
                "resample": "block",
                "num_heads": 0,
                "head_width": 64,
                "depths": (0, 1, 1, 0),
                "eps": 1e-5,
                "sines_first": False,
                "freq_shift": 0,
            },
            tiny={"depths": (0, 1), "head_width": 24},
            learned_variance=True,
        ),
        Entry(
            config=_classifier("adm-classifier", STYLES),
            task=ClassifyingSystem.task,
            summary="the style of icons in 32 px under noise: leads those that draw them (--classifier)",
        ),
        Entry(
            config=_classifier("adm-classifier-tiny", _SHAPES, CLASSIFIER_TINY),
            task=ClassifyingSystem.task,
            summary="coloured shapes, 16 px: the same, trained in minutes",
        ),
        *_pixels(
            "edm",
            "EDM",
            "a preconditioned network, Heun's method",
            interpolant=EDMConfig(data=0.84),  # of the icons on white
            prediction="edm",
            clip=False,
            defaults={"steps": 18, "sampler": "heun", "schedule": "karras"},
        ),
        *_pixels(
            "flow-matching",
            "flow matching",
            "the velocity of a straight path",
            network={"time_scale": 1000.0},
            interpolant="flow",
            prediction="velocity",
            clip=False,
            defaults={"steps": 25, "sampler": "heun", "schedule": "uniform"},
        ),
        *_pixels("vp-sde", "VP SDE", "DDPM's noise in a continuous time", **_SDE),
        *_pixels("subvp-sde", "sub-VP SDE", "less noise on the way", **_SDE | {"interpolant": SUBVP_NOISE}),
        *_pixels(
            "ve-sde",
            "VE SDE",
            "noise that explodes",
            **_SDE | {"interpolant": VE_NOISE, "network": {"time_scale": 100.0}},
        ),
        *_pixels("dit-32", "DiT", "a transformer of patches, eps", of=_PATCHES),
        *_pixels(
            "sit-32",
            "SiT",
            "a transformer of patches, the velocity of a straight path",
            of=_PATCHES,
            network={"to_data": True},
            interpolant="flow",
            prediction="velocity",
            clip=False,
            defaults={"steps": 25, "sampler": "heun", "schedule": "uniform"},
        ),
        replace(_stable_diffusion("sd1", "512 px, any file of Stable Diffusion 1"), recipe=""),
        _stable_diffusion("sd2", "512 px, Stable Diffusion 2 base", **_SD2),
        replace(
            _stable_diffusion(
                "sd2-v",
                "768 px, Stable Diffusion 2, which predicts v",
                **_SD2,
                prediction="v",
                defaults=replace(_SD, width=768, height=768),
            ),
            recipe="",
        ),
        replace(
            _stable_diffusion("sdxl", "1024 px, Stable Diffusion XL", **_SDXL, network=SDXL, text_encoder=SDXL_TEXT),
            recipe="",
        ),
        _stable_diffusion(
            "sdxl-refiner",
            "1024 px, Stable Diffusion XL's refiner, best over a picture (-i)",
            **_SDXL,
            network=SDXL_REFINER,
            text_encoder=SDXL_REFINER_TEXT,
        ),
        _stable_diffusion(
            "instruct-pix2pix",
            "edits a picture as it is told: InstructPix2Pix of Stable Diffusion 1 (limner edit)",
            network=SD1_EDIT,
            defaults=replace(_SD, **BESIDE["picture"]),
        ),
        _stable_diffusion(
            "instruct-pix2pix-xl",
            "the same of Stable Diffusion XL; CosXL-Edit",
            **_SDXL | {"defaults": replace(_SDXL["defaults"], **BESIDE["picture"])},
            network=SDXL_EDIT,
            text_encoder=SDXL_TEXT,
        ),
        _stable_diffusion(
            "sd2-depth",
            "512 px, Stable Diffusion 2 after a depth map (--depth)",
            **_SD2 | {"network": SD2_DEPTH},
            defaults=replace(_SD, **BESIDE["depth"]),
        ),
        _stable_diffusion(
            "x4-upscaler",
            "Stable Diffusion's x4 upscaler: enlarges a picture (limner upscale)",
            **_SD2 | {"network": replace(X4_UPSCALER, text_only=(False, True, True, False))},  # its finest has none
            autoencoder=KL_UPSCALER,
            interpolant=SMALL_NOISE,
            small_noise=SMALL_NOISE,
            prediction="v",
            defaults=replace(_SD, guidance=9.0, strength=1.0, max_size=4096),
        ),
        replace(_flow("flux-dev", "1024 px, FLUX.1 dev and Krea, which are told their guidance"), recipe="flux"),
        _flow(
            "flux-schnell",
            "1024 px, FLUX.1 schnell, in four steps",
            network=FLUX_SCHNELL,
            text_encoder=FLUX_SCHNELL_TEXT,
            interpolant=flows.SCHNELL_NOISE,
            defaults=replace(_FLUX, steps=4, guidance=1.0),
        ),
        _flow(
            "flux-fill",
            "1024 px, FLUX.1 Fill, which paints under a mask (limner edit --mask)",
            network=FLUX_FILL,
            defaults=replace(_FLUX, steps=50, guidance=30.0, strength=1.0),
        ),
        _flow(
            "flux-control",
            "1024 px, FLUX.1 Canny and Depth, which follow the edges or the depth of a picture (-i)",
            network=FLUX_CONTROL,
            defaults=replace(_FLUX, **BESIDE["hint"]),
        ),
        _flow(
            "flux-kontext",
            "1024 px, FLUX.1 Kontext, which edits a picture as it is told (limner edit)",
            looks=True,
            defaults=replace(_FLUX, **BESIDE["reference"]),
        ),
        replace(
            _flow("sd3-medium", "1024 px, Stable Diffusion 3", **_SD3, network=SD3_MEDIUM, defaults=_SD3_DEFAULTS),
            recipe="sd3",
        ),
        _flow(
            "sd3.5-medium",
            "1024 px, Stable Diffusion 3.5 medium",
            **_SD3,
            network=SD35_MEDIUM,
            defaults=replace(_SD3_DEFAULTS, steps=40, guidance=4.5),
        ),
        _flow(
            "sd3.5-large",
            "1024 px, Stable Diffusion 3.5 large and its turbo",
            **_SD3,
            network=SD35_LARGE,
            defaults=replace(_SD3_DEFAULTS, guidance=4.5),
        ),
        replace(_of_classes("dit", "256 px, the 1000 classes of ImageNet, by number or name", DIT_XL_2), recipe=""),
        _of_classes("dit-512", "512 px, the same", DIT_XL_2_512),
        _of_classes(
            "sit",
            "256 px, the same as a flow",
            SIT_XL_2,
            interpolant="flow",
            prediction="velocity",
            defaults=Defaults(
                width=256, height=256, steps=30, guidance=4.0, sampler="heun", min_size=32, max_size=1024
            ),
        ),
    )
}


def names() -> list[str]:
    return list(CATALOG)


def entries() -> list[Entry]:
    return list(CATALOG.values())


def entry(name: str) -> Entry:
    if name not in CATALOG:
        raise UnknownName("model", name, CATALOG, hint="`limner models` lists all; a path to a file works too.")
    return CATALOG[name]


# -------------------------------------------------------------------- building


def check(config: DiffusionConfig) -> None:
    """Raises UsageError unless the parts of a system belong together."""
    network, text, latent = config.network, config.text_encoder, config.autoencoder.latent_channels
    if not 3 <= config.max_tokens <= minilm_positions:
        raise UsageError(
            f"max_tokens={config.max_tokens}: a prompt has 3 tokens, with its two marks, to {minilm_positions}"
        )
    if isinstance(network, FluxConfig):
        beside = network.latents_in - latent
        if network.out_channels != 4 * latent or beside not in (0, latent, latent + config.autoencoder.factor**2):
            raise UsageError(
                f"network.in_channels={network.in_channels} and out_channels={network.out_channels} are of no FLUX.1 "
                f"whose latents have {latent}, of which a token has four"
            )
    if config.looks and not isinstance(network, FluxConfig):
        raise UsageError("looks=true is for networks of FLUX.1")
    channels = {"unet": "in_channels", "flux": "latents_in"}.get(network.type, "channels")
    rgb, small = isinstance(network, UNetConfig) and config.autoencoder.image_channels == 3, config.small_noise
    if small is not None and isinstance(network, UNetConfig):
        rgb = rgb and network.in_channels == latent + 3 and 0 < network.num_classes <= small.steps
    if small is not None and not rgb:
        raise UsageError("a network that enlarges sees a small picture, 3 channels, and has classes of its noise")
    known = isinstance(network, UNetConfig) and rgb and network.sees(latent) != "else"
    known = known or isinstance(network, FluxConfig)
    if small is None and (found := getattr(network, channels)) != latent and not known:
        raise UsageError(f"network.{channels}={found}, but the autoencoder's latents have {latent}")
    if isinstance(network, DiTConfig) or isinstance(text, LabelsConfig):
        check_classes(config)
    elif network.text_width != (text_width := minilm_width if text == "minilm" else text.width):
        raise UsageError(f"network.text_width={network.text_width}, but the text encoder's tokens have {text_width}")
    if isinstance(network, UNetConfig) and network.vector_width:
        pooled = text.pooled_width if isinstance(text, CLIPTowersConfig) else minilm_width
        if network.vector_width - pooled not in (5 * 256, 6 * 256):
            raise UsageError(f"network.vector_width={network.vector_width} is not {pooled} and 5 or 6 numbers of 256")
    if isinstance(network, MMDiTConfig | FluxConfig):
        pooled = text.pooled_width if isinstance(text, SD3TextConfig | FluxTextConfig) else 0
        pooled = minilm_width if text == "minilm" else pooled
        if network.pooled_width != pooled:
            raise UsageError(f"network.pooled_width={network.pooled_width}, but the text encoder's vector has {pooled}")
    says = getattr(network, "out_channels", 0)
    if config.learned_variance and (says != 2 * latent or not isinstance(config.interpolant, VPConfig)):
        raise UsageError(
            f"learned_variance is of steps between timesteps (interpolant.type=vp), and takes the second half of "
            f"network.out_channels={2 * latent}, not {says}"
        )
    if (config.prediction, config.interpolant) == ("eps", "flow"):
        raise UsageError("prediction=eps says nothing at the noisy end of interpolant=flow: take velocity, v or x0")


def check_classes(config: DiffusionConfig) -> None:
    """Raises UsageError unless a network that is told classes and what reads them know the same ones."""
    network, text = config.network, config.text_encoder
    if not isinstance(network, DiTConfig | UNetConfig) or not isinstance(text, LabelsConfig):
        raise UsageError("a DiT is told a class of its network.num_classes, as text_encoder.type=labels alone does")
    if isinstance(network, DiTConfig):
        fits = network.num_classes == text.num_classes
    else:
        fits = network.num_classes - text.num_classes in (0, 1) and not (network.text_width or network.vector_width)
        fits &= text.num_classes > 0 or not network.num_classes
    if config.defaults.prompted != (text.num_classes > 0):
        raise UsageError(
            f"defaults.prompted={config.defaults.prompted}, but there are {text.num_classes} classes to name"
        )
    if not fits:
        raise UsageError(
            f"network.num_classes={network.num_classes} are not the {text.num_classes} classes of text_encoder; a "
            "U-Net may have one more, for none"
        )
    if (
        text.num_classes == getattr(network, "num_classes", 0) > 0
        and isinstance(network, UNetConfig)
        and config.caption_dropout
    ):
        raise UsageError(
            f"caption_dropout={config.caption_dropout:g}, but the network has no class for none: give "
            f"caption_dropout=0, or network.num_classes={network.num_classes + 1}"
        )


def build(config: SystemConfig, tokenizers: Sequence[CLIPTokenizer | T5Tokenizer] = ()) -> AnySystem:
    """The system with fresh weights; a frozen autoencoder is read from `autoencoder_from` when that is given, CLIP's
    towers from `text_encoder_from`. They take `tokenizers`, or the one that ships.

    Raises UsageError for what no system can be built of.
    """
    if isinstance(config, NonequilibriumConfig):
        return NonequilibriumSystem(
            Multiscale(config.network), config.defaults, config.name, config.family, config.trajectory,
            config.first_beta, config.mean, config.std, config.learned_schedule, config.repeats,
        )  # fmt: skip
    if isinstance(config, ClassifyingConfig):
        return _classifying(config)
    kinds: dict[str, Any] = {"dcae": DCAE, "kl": KLAutoencoder, "vq": VQAutoencoder, "pixels": Pixels}
    autoencoder = kinds[config.autoencoder.type](config.autoencoder)
    if isinstance(config, AutoencodingConfig):
        return _autoencoding(config, autoencoder)
    check(config)
    network, text = config.network, config.text_encoder
    if config.autoencoder_from:
        _load_part(autoencoder, "autoencoder", config.autoencoder_from, network)
    words: Any
    clips = [one for one in tokenizers if isinstance(one, CLIPTokenizer)]
    if text == "minilm":
        words = minilm(config.max_tokens)
    elif isinstance(text, LabelsConfig):
        words = Labels(text)
    elif isinstance(text, SD3TextConfig | FluxTextConfig):
        five = next((one for one in tokenizers if isinstance(one, T5Tokenizer)), None)
        words = (SD3Text if isinstance(text, SD3TextConfig) else FluxText)(text, clips, five)  # type: ignore[arg-type]
    else:
        words = CLIPTowers(text, clips or [bpe.shipped()] * len(text.towers))
    if config.text_encoder_from:
        _load_part(words, "text_encoder", config.text_encoder_from, network)
    kinds = {"joint_dit": JointDiT, "unet": UNet, "dit": DiT, "mmdit": MMDiT, "flux": Flux}
    return DiffusionSystem(
        network=kinds[network.type](network),
        autoencoder=autoencoder.eval(),
        text_encoder=words.eval(),
        interpolant=interpolants.get(config.interpolant),
        prediction=predictions.get(config.prediction, getattr(config.interpolant, "data", predictions.DATA)),
        defaults=config.defaults,
        name=config.name,
        family=config.family,
        caption_dropout=config.caption_dropout,
        small_noise=None if config.small_noise is None else discrete(config.small_noise),
        looks=config.looks,
        learned_variance=config.learned_variance,
        clip=config.clip,
    )


def _autoencoding(config: AutoencodingConfig, autoencoder: nn.Module) -> AutoencodingSystem:
    loss, told = config.loss, (autoencoder, config.defaults, config.name, config.family)
    if isinstance(loss, LossConfig) != isinstance(autoencoder, DCAE):
        raise UsageError(f"an autoencoder of type {config.autoencoder.type} is not trained with a loss of {loss.type}")
    if isinstance(loss, LossConfig):
        return AutoencodingSystem(*told, loss.kl_weight, loss.gradient_weight, loss.scale_weight)
    return AdversarialAutoencodingSystem(*told, loss, _perceptual(loss.perceptual_from))


def _classifying(config: ClassifyingConfig) -> ClassifyingSystem:
    if config.network.num_classes != config.text_encoder.num_classes:
        raise UsageError(
            f"network.num_classes={config.network.num_classes} are not the {config.text_encoder.num_classes} classes "
            "of text_encoder"
        )
    return ClassifyingSystem(
        Classifier(config.network), Labels(config.text_encoder), discrete(config.interpolant), config.defaults,
        config.name, config.family,
    )  # fmt: skip


def _perceptual(source: str) -> lpips.LPIPS | None:
    """LPIPS, frozen, with its weights in a file. Raises FileProblem, CheckpointMismatch."""
    if not source:
        return None
    path = Path(source)
    tensors = lpips.weights_in(files.read(path)[0])
    if "lin0.model.1.weight" not in tensors or "net.slice1.0.weight" not in tensors:
        raise CheckpointMismatch(
            f"system.loss.perceptual_from={source} has no weights of LPIPS, VGG16's beside the linear ones: save "
            "lpips.LPIPS(net='vgg').state_dict() of the package lpips, or name a training file of latent diffusion"
        )
    with torch.device("meta"):
        network = lpips.LPIPS()
    files.assign(network, tensors, path)
    return network.requires_grad_(False).eval()


@lru_cache(maxsize=2)
def minilm(max_tokens: int = 24) -> MiniLM:
    """The bundled text encoder, frozen, in float32 on the CPU until it is moved."""
    folder = WEIGHTS / "minilm"
    with torch.device("meta"):
        encoder = MiniLM(folder / "tokenizer.json", max_tokens)
    files.assign(encoder, files.load(folder / "minilm.safetensors")[0], folder / "minilm.safetensors")
    return encoder.requires_grad_(False).eval()


def _load_part(part: nn.Module, name: str, source: str, network: Any) -> None:
    """Give the autoencoder or the text encoder beside a network, whichever `name` says that `part` is, its weights in a
    file. Raises FileProblem, CheckpointMismatch, UsageError."""
    if isinstance(part, MiniLM | Labels):
        raise UsageError(f"system.text_encoder_from={source} is for CLIP and T5: this system reads with what ships")
    path = _source(source)
    if not path.exists():
        advice = ""
        if name == "autoencoder":
            ours = [e.config for e in entries() if isinstance(e.config, AutoencodingConfig)]
            recipe = next((c.name for c in ours if c.autoencoder == part.config), "")
            advice = f"train one with `limner train {recipe} --out runs/{recipe}`, or " if recipe else ""
        raise FileProblem(f"no {name.replace('_', ' ')} {path}: {advice}name its file with system.{name}_from=FILE")
    if isinstance(part, JoinedText):
        files.assign(part, _words_of(part, path), path)
        return
    theirs = path.is_dir() or (not isinstance(part, DCAE) and files.CONFIG_KEY not in files.read(path)[1])
    if theirs and not isinstance(network, JointDiTConfig) and not isinstance(part, DCAE):
        files.assign(part, _part_of(part, name, path, network), path)
        return
    tensors, _ = files.load(path)
    prefix = f"{name}."
    files.assign(part, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path)


def _words_of(part: JoinedText, path: Path) -> dict[str, Tensor]:
    """The float32 weights of CLIP and T5 in a whole Stable Diffusion 3 or FLUX.1. Raises FileProblem,
    CheckpointMismatch."""
    found = recognise(path)
    if found is None or not isinstance(found.network, MMDiTConfig | FluxConfig):
        raise CheckpointMismatch(f"{path} is no Stable Diffusion 3 or FLUX.1 with its text encoders: give one")
    prefix = "text_encoder."
    rows = {ours.removeprefix(prefix): place for ours, place in found.layout.items() if ours.startswith(prefix)}
    layouts.fit(rows, part.state_dict(), found.tensors, path)
    return {ours: t.float() for ours, t in layouts.read(rows, found.tensors, path).items()}


def _part_of(part: Any, name: str, path: Path, network: UNetConfig) -> dict[str, Tensor]:
    """The float32 weights of an autoencoder or of text towers in a file or folder of other programs."""
    try:
        if name == "autoencoder":
            held = [parts.codec(parts.codec_in(path), part.config.scale, "this system")]
            layout = parts.codec_layout(held[0], part.config)
        else:
            inside = [folder for folder in (path / "text_encoder", path / "text_encoder_2") if folder.is_dir()]
            held = parts.ordered(
                network, [tower for file in inside or [path] for tower in parts.towers(file)], str(path)
            )
            layout = {}
            for k, (tower, (openclip, _)) in enumerate(zip(held, parts.wanted(network), strict=True)):
                layout |= layouts.prefixed(parts.tower_config(tower, openclip)[1], f"{k}.", "")
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointMismatch(f"{path} has no whole {name.replace('_', ' ')} of Stable Diffusion") from error
    found = {one.full(key): t for one in held for key, t in one.tensors.items() if not single_files.superfluous(key)}
    layouts.fit(layout, part.state_dict(), found, path)
    return {ours: t.float() for ours, t in layouts.read(layout, found, path).items()}


def bare(config: SystemConfig) -> SystemConfig:
    """The same without files that parts of it are read from."""
    if isinstance(config, DiffusionConfig):
        return replace(config, autoencoder_from="", text_encoder_from="")
    if isinstance(config, AutoencodingConfig) and isinstance(config.loss, AdversarialConfig):
        return replace(config, loss=replace(config.loss, perceptual_from=""))
    return config


def settled(config: SystemConfig) -> SystemConfig:
    """The same with the autoencoder that is in a file of ours that it is read from, whose kind and scale may be others.
    Raises FileProblem, CheckpointMismatch."""
    if not isinstance(config, DiffusionConfig) or not (path := _source(config.autoencoder_from)).is_file():
        return config
    metadata = files.read(path, most=0)[1]
    if files.CONFIG_KEY not in metadata:
        return config
    held = parse(files.config_in(metadata, path), path)
    if isinstance(held, NonequilibriumConfig | ClassifyingConfig):
        raise CheckpointMismatch(f"{path} is of {held.name}, which has no autoencoder: name another file")
    found = held.autoencoder
    scaled = not isinstance(found, DCAEConfig) or not isinstance(config.autoencoder, DCAEConfig)
    return replace(config, autoencoder=found) if scaled else config


def _source(name: str) -> Path:
    """Of a file that ships, or of any other."""
    return WEIGHTS / name if (WEIGHTS / name).is_file() else Path(name)


# -------------------------------------------------------------------- files


def save(
    system: nn.Module,
    config: SystemConfig,
    path: Path,
    *,
    bits: int = 32,
) -> None:
    """Write one self-describing file: all but the text encoder that ships and LPIPS. `bits` 8 stores matrices in 8
    bits, the rest in 16.

    Raises FileProblem, UsageError for a system that keeps weights quantised.
    """
    if any(isinstance(module, Linear) and module.code for module in system.modules()):
        raise UsageError(f"{path} is not written: the system keeps its weights quantised; load it with a dtype first")
    beside = ("perceptual.", *(["text_encoder."] if getattr(config, "text_encoder", "") == "minilm" else []))
    kept = {k: v.detach().cpu() for k, v in system.state_dict().items() if not k.startswith(beside)}
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in kept.items()}
    config = bare(config)
    if isinstance(config, AutoencodingConfig):
        autoencoder: Any = system.autoencoder
        config = replace(config, autoencoder=autoencoder.config)  # whose scale is measured at the end
    stored, recipe = quantize(
        tensors, lambda name, t: bits if bits != 8 else 8 if t.dim() > 1 and t.numel() >= 4096 else 16
    )
    files.save(path, stored, {**asdict(config), "quantization": recipe})


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    prediction: Literal["eps", "v", "x0"] | None = None,
    dtype: torch.dtype | None = None,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    offload: Literal["auto", "never", "always"] = "never",
) -> AnySystem:
    """A system by name ("icons"), weight file of ours or of Stable Diffusion, folder of a training run or of diffusers,
    ready to draw. `prediction` is for models of other programs whose files do not say, or not truly, what they predict;
    `dtype` is what the network computes in, else for models of other programs what is fastest, half precision on a GPU
    and bfloat16 on a processor that has it, and float32 for the rest; without it, matrices that a file of another
    program has in 8 bits or fewer stay so and are expanded when they are multiplied; with torch.float8_e4m3fn all do
    so, as `limner.nn.quantized.to_fp8` makes them. `vae` is another autoencoder,
    `text_encoders` are files with other text towers; of a single file that is a U-Net alone, they are what it lacks.
    With `offload` "always", or "auto" and more weights than the device has memory for, the parts rest on the CPU while
    not at work.

    Raises UsageError, UnknownName, FileProblem, CheckpointMismatch.
    """
    path, shrinks = find(source), dtype == torch.float8_e4m3fn
    dtype = None if shrinks else dtype
    codec, texts = None if vae is None else parts.codec_in(Path(vae)), [Path(file) for file in text_encoders]
    found = recognise(path, prediction, codec, texts)
    for sentence in () if found is None else found.assumed:
        warnings.warn(f"{path}: {sentence}", Assumed, stacklevel=2)
    if found is not None:
        system = fitted(found)
        tensors = layouts.read(found.layout, found.tensors, path)
        first = next(tensor for name, tensor in tensors.items() if name.startswith("network."))
        if dtype is None:
            kept = keep_small(system, tensors)
            tensors = {name: tensor for name, tensor in tensors.items() if name not in kept}
            small = shrinks or any(name.startswith("network.") for name in kept)
            brain = small and not isinstance(found.network, UNetConfig)
            dtype = _best(torch.bfloat16 if brain else first.dtype, torch.device(device))
    else:
        tensors, config, row = _stored(path)
        system = _bare(config, path)
        if row is not None and row.latent_rgb is not None:
            system.latent_rgb = torch.tensor(row.latent_rgb)
        if getattr(config, "text_encoder", "") == "minilm":
            tensors |= {f"text_encoder.{k}": v for k, v in system.text_encoder.state_dict().items()}  # type: ignore[union-attr]
    files.assign(system, _cast(tensors, dtype or torch.float32), path)
    beside = ThreadPoolExecutor(1)
    system.weights_hash = beside.submit(files.digest, *([path] if found is None else found.files)).result
    beside.shutdown(wait=False)
    system.requires_grad_(False).eval()
    device = torch.device(device)
    if shrinks and isinstance(system, DiffusionSystem):
        quantize_(system.network, device)
        quantize_(system.text_encoder, device)
    elif shrinks:
        raise UsageError(f"{system.name} has no network to keep in 8 bits: leave dtype out")
    if offload == "always" or (offload == "auto" and bytes_of(system) > free_of(device) and device.type == "cuda"):
        _rest(system, device)
    else:
        system.to(device)
    if device.type == "cuda" and isinstance(network := getattr(system, "network", None), UNet | Classifier):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # docs/speed.md
    if codec is not None:
        if found is None or not any(name.startswith(f"{codec}/") for name in layouts.names(found.layout)):
            put_autoencoder(system, codec)
        else:
            system.vae = {"vae": _title(codec), "vae_hash": files.digest(*parts.weights(codec))}
    if found is not None and (prediction or found.unsaid):
        system.vae = system.vae | {"prediction": found.prediction}
    if texts:
        names = ", ".join(map(_title, texts))
        # in an order that is not that in which they were given, which says nothing
        paths = sorted((path for file in texts for path in parts.weights(file)), key=lambda path: path.stat().st_size)
        system.vae = system.vae | {"text_encoder": names, "text_encoder_hash": files.digest(*paths)}
    return system


def _stored(path: Path) -> tuple[dict[str, Tensor], SystemConfig, Entry | None]:
    """The tensors of a file of ours, its configuration, and its row of the catalogue if it ships."""
    tensors, stored = files.load(path)
    config = parse(stored, path)
    # a file that ships has the catalogue's defaults, as `limner generate --help` does
    row = next((row for row in entries() if row.file is not None and path.resolve() == row.file.resolve()), None)
    return tensors, config if row is None else replace(config, defaults=row.config.defaults), row


def stored(path: Path) -> SystemConfig:
    """The configuration of a file of ours. Raises FileProblem, CheckpointMismatch."""
    return _stored(path)[1]


def keep_small(system: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Let the matrices of `limner.nn.linear.Linear` that are stored in 8 bits or fewer stay so. Returns their names."""
    kept = set()
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        small = isinstance(tensor, Quantized) or tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        if not small or kind != "weight" or tensor.dim() != 2 or name.startswith("autoencoder."):
            continue
        module = system.get_submodule(path)
        q = tensor if isinstance(tensor, Quantized) else of_bytes(tensor)
        if isinstance(module, Linear) and q.in_rows:
            module.keep(q)
            kept.add(name)
    return kept


def _rest(system: AnySystem, device: torch.device) -> None:
    if not isinstance(system, DiffusionSystem) or device.type == "cpu":
        what = f"{system.name} has one part" if device.type != "cpu" else "the parts are at work on the CPU"
        raise UsageError(f"offload is always, but {what}: it is for GPUs that cannot hold all of a model")
    system.works_on = device


def _title(path: Path) -> str:
    """What a picture remembers of a file by: its name, or that of its folder where the file's tells nothing."""
    dull = path.stem in ("model", "diffusion_pytorch_model", "pytorch_model", "vae")
    return path.absolute().parent.name if dull else path.name if path.is_dir() else path.stem


def put_autoencoder(system: AnySystem, source: str | Path) -> None:
    """Give a system the autoencoder in another file: of the original code or diffusers', alone, in a whole model, or a
    folder with one. No name of a tensor tells its scale: a file is taken for one of the same family.

    Raises FileProblem, CheckpointMismatch.
    """
    path, own = parts.codec_in(Path(source)), system.autoencoder
    if not isinstance(own, KLAutoencoder):
        raise CheckpointMismatch(f"{system.name} has an autoencoder of another kind than those that files hold alone")
    held = parts.codec(path, own.scale, system.name)
    layout, tensors = parts.codec_layout(held, own.config), {held.full(name): t for name, t in held.tensors.items()}
    layouts.fit(layout, own.state_dict(), tensors, f"{path}, read as the autoencoder of {system.name}")
    device = next(own.parameters()).device
    ours = {name: t.to(device, torch.float32) for name, t in layouts.read(layout, tensors, path).items()}
    files.assign(own, ours, path)
    own.requires_grad_(False)
    system.vae = {"vae": _title(path), "vae_hash": files.digest(*parts.weights(path))}


def put_refiner(system: AnySystem, source: str | Path, device: torch.device, dtype: torch.dtype | None) -> None:
    """Let the model of another file do the last steps. Raises what `load` does, and CheckpointMismatch for one that
    cannot go on where this stops."""
    first, refiner = _pair(system, source, device, dtype, "a refiner could go on with", "refines")
    first.refine(refiner)


def put_guide(system: AnySystem, source: str | Path, device: torch.device, dtype: torch.dtype | None) -> None:
    """Let guidance lead away from what the model of another file says (autoguidance). Raises what `load` does, and
    CheckpointMismatch for one that does not draw as this does."""
    first, guide = _pair(system, source, device, dtype, "could be guided", "guides")
    first.guided_by(guide)


def put_classifier(system: AnySystem, source: str | Path, device: torch.device | str) -> None:
    """Let a classifier of noisy pictures lead what is drawn. Raises what `load_classifier` does, and CheckpointMismatch
    for one of other pictures or classes."""
    if not isinstance(system, DiffusionSystem):
        raise CheckpointMismatch(f"{system.name} draws nothing that a classifier could lead")
    system.led_by(load_classifier(source, device))


def load_classifier(source: str | Path, device: torch.device | str = "cpu") -> ClassifyingSystem:
    """A classifier of noisy pictures by the file or folder of a run, or a file of guided_diffusion, in float32. Raises
    UnknownName, FileProblem, CheckpointMismatch; warns (Assumed) of what a file does not tell."""
    path = find(source)
    tensors = files.read(path)[0] if path.is_file() else {}
    found = pixels.classifier(path, tensors)
    if found is None:
        system = load(path, device)
        if not isinstance(system, ClassifyingSystem):
            raise CheckpointMismatch(
                f"{source} is of {system.family}, which draws: give a classifier of noisy pictures"
            )
        return system
    network, noise, layout, sentence = found
    warnings.warn(f"{path}: {sentence}", Assumed, stacklevel=2)
    labels = LabelsConfig(num_classes=network.num_classes)
    config = replace(_classifier(path.stem[:200], labels, network), interpolant=noise)
    bare, name = _bare(config, path), files.digest(path)
    assert isinstance(bare, ClassifyingSystem)
    layouts.fit(layout, bare.state_dict(), tensors, f"{path}, read as a classifier of ADM")
    files.assign(bare, _cast(layouts.read(layout, tensors, path), torch.float32), path)
    bare.weights_hash = lambda: name
    return bare.requires_grad_(False).eval().to(device)


def _pair(
    system: AnySystem,
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    would: str,
    does: str,
) -> tuple[DiffusionSystem, DiffusionSystem]:
    """A system and the model of another file that is to work with it, both of which must draw."""
    if not isinstance(system, DiffusionSystem):
        raise CheckpointMismatch(f"{system.name} draws nothing that {would}")
    other = load(source, device, dtype=dtype)
    if not isinstance(other, DiffusionSystem):
        what = "a classifier" if isinstance(other, ClassifyingSystem) else "an autoencoder"
        raise CheckpointMismatch(f"{source} is {what}, not a model that {does}")
    return system, other


def recognise(
    path: Path,
    prediction: Literal["eps", "v", "x0"] | None = None,
    vae: Path | None = None,
    text_encoders: Sequence[Path] = (),
) -> Foreign | None:
    """The model of another program at `path`, None for a file of ours. `prediction` says what it predicts, whatever the
    file does; a single file takes `text_encoders`, and `vae` if it has none. Raises FileProblem, CheckpointMismatch,
    UsageError."""
    if path.is_dir():
        if text_encoders:
            raise UsageError(f"{path} is a folder, which has its text encoders: put others into a single file's model")
        kinds = (module for module in (dit, flows, pixels) if module.is_folder(path))
        found = next((module.of_folder(path) for module in kinds), None) or folders.recognise(path)
        if prediction and found.prediction == "velocity":
            return _said(found)
        return replace(found, prediction=prediction or found.prediction)
    tensors, metadata = files.read(path)
    if files.CONFIG_KEY not in metadata:
        if (run := run_of(path)) is not None:
            raise FileProblem(
                f"{path} is of a checkpoint, which only training reads (--resume {run}, or init_from={path}): to draw, "
                f"finish the run and give -m {run}"
            )
        tensors = gathered(tensors, metadata, path)
        if (drawn := pixels.recognise(path, tensors, prediction)) is not None:
            if vae or text_encoders:
                raise UsageError(f"{path} draws pixels and reads no words: leave --vae and --text-encoder out")
            return drawn
        bare = not any(name.startswith(parts.CODEC) for name in tensors)
        alone = not any(name.startswith(parts.CODECS[:-1]) for name in tensors)
        if (flow := flows.recognise(path, tensors, vae if alone else None, text_encoders)) is not None:
            return flow if prediction is None else _said(flow)
        return single_files.recognise(path, tensors, prediction, vae if bare else None, text_encoders)
    if text_encoders:
        raise UsageError(f"{path} is a file of Limner's own, which has its text encoder: leave other ones out")
    if prediction is not None:
        raise UsageError(f"{path} is a file of Limner's own, which says what it predicts: leave prediction out")
    return None


def _said(found: Foreign) -> Foreign:
    raise UsageError(f"{found.source} predicts a velocity, as all of its kind: leave prediction out")


def run_of(path: Path) -> Path | None:
    """The folder of the run that this file of a checkpoint is of, None for any other file."""
    folder = path.absolute().parent
    if folder.parent.name != "checkpoints" or not (folder / "manifest.json").is_file():
        return None
    return Path(os.path.relpath(folder.parent.parent))


def fitted(found: Foreign) -> AnySystem:
    """The system of a model of another program, with nothing in its weights yet, into which all of its tensors fit.

    Raises CheckpointMismatch.
    """
    config = config_of(found)
    files.account(layouts.names(found.layout), found.tensors.keys(), found.source)
    system = _bare(config, found.source, found.tokenizers)
    layouts.fit(found.layout, system.state_dict(), found.tensors, f"{found.source}, read as {config.name}")
    return system


def skeleton(source: str | Path) -> AnySystem:
    """The system of a name, file or folder, as `load` takes them, with nothing in its weights. Raises UnknownName,
    FileProblem, CheckpointMismatch."""
    path = find(source)
    found = recognise(path)
    return _bare(stored(path), path) if found is None else fitted(found)


def _bare(config: SystemConfig, path: Path, tokenizers: Sequence[CLIPTokenizer | T5Tokenizer] = ()) -> AnySystem:
    """The system with nothing in its weights yet."""
    try:
        with torch.device("meta"):
            return build(bare(config), tokenizers)
    except UsageError as error:
        raise CheckpointMismatch(f"{path}: its parts do not fit together ({error})") from error


def config_of(found: Foreign) -> DiffusionConfig:
    """The row of the catalogue that a model of another program is like, with its own sizes and settings."""
    network, text = found.network, found.text
    if isinstance(network, DiTConfig):
        name = "sit" if network.to_data else "dit" if network.size < DIT_XL_2_512.size else "dit-512"
        return _like(CATALOG[name].config, found)
    if isinstance(network, MMDiTConfig):
        name = "sd3-medium" if not network.qk_norm else "sd3.5-medium" if network.dual_blocks else "sd3.5-large"
        return _like(CATALOG[name].config, found)
    if isinstance(network, FluxConfig):
        return _flux_config(found)
    if isinstance(found.autoencoder, PixelsConfig):
        return _pixels_config(found)
    assert isinstance(text, CLIPTowersConfig)
    if network.vector_width:
        name = "sdxl" if network.vector_width == text.pooled_width + 6 * 256 else "sdxl-refiner"
    elif found.small_noise is not None:
        name = "x4-upscaler"
    else:
        name = "sd1" if not network.linear_projection else "sd2-v" if found.prediction == "v" else "sd2"
    sees = network.sees(found.autoencoder.latent_channels)
    return _like(CATALOG[_SEEING.get((name, sees), name)].config, found, **BESIDE.get(sees, {}))


def _pixels_config(found: Foreign) -> DiffusionConfig:
    """Classes have none that stands for no class."""
    row = CATALOG["ddpm"].config
    most = max(4 * found.size, row.defaults.max_size)
    config = _like(row, found, max_size=most, prompted=found.text.num_classes > 0)
    learned = found.network.out_channels == 2 * found.autoencoder.latent_channels
    return replace(
        config, family=pixels.family(found.network), caption_dropout=0.0, clip=found.clip, learned_variance=learned
    )


def _flux_config(found: Foreign) -> DiffusionConfig:
    sees = found.network.sees(found.autoencoder.latent_channels)
    if sees:
        name = {"mask": "flux-fill", "hint": "flux-control"}.get(sees, "flux-dev")
    else:
        name = "flux-schnell" if not found.network.guidance_embedded else "flux-kontext" if found.looks else "flux-dev"
    return _like(CATALOG[name].config, found)


def _like(row: SystemConfig, found: Foreign, **changes: Any) -> DiffusionConfig:
    """A row with the sizes and settings of a model, and other defaults."""
    assert isinstance(row, DiffusionConfig)
    side = found.size or row.defaults.width
    defaults = replace(
        replace(row.defaults, **changes), width=side, height=side,
        min_size=min(side, row.defaults.min_size), sampler=found.sampler or row.defaults.sampler,
        schedule=found.schedule or row.defaults.schedule, steps=found.steps or row.defaults.steps,
        guidance=found.guidance or row.defaults.guidance,
    )  # fmt: skip
    return replace(
        row, network=found.network, autoencoder=found.autoencoder, text_encoder=found.text, interpolant=found.noise,
        small_noise=found.small_noise, prediction=found.prediction, defaults=defaults,
    )  # fmt: skip


def _best(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What a network of another program computes in, if nobody says: the fastest (benchmarks/unet.py)."""
    if device.type == "cpu":
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float16


def _multiplies_bf16() -> bool:
    """Whether the processor has instructions for it: without them bfloat16 is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All in `dtype`, but for the autoencoder: SDXL's overflows in float16."""
    return {name: t.to(torch.float32 if name.startswith("autoencoder.") else dtype) for name, t in tensors.items()}


def shipped(name: str) -> Path | None:
    """The file of a ControlNet that ships."""
    return WEIGHTS / name / f"{name}.safetensors" if name in CONTROLS else None


def find(source: str | Path) -> Path:
    """The weight file a name or path means; one of the Hub is fetched."""
    if str(source).startswith(hub.PREFIX):
        return find(hub.fetch(str(source)))
    if str(source) in CATALOG:
        row = CATALOG[str(source)]
        if row.weights == "needed":
            use = "-m RUN" if row.task != AutoencodingSystem.task else "-m RUN -i IMAGE, which gives the picture back"
            use = "--classifier RUN beside a model that draws" if row.task == ClassifyingSystem.task else use
            train = f"train them with `limner train {row.recipe or row.name} --out RUN` and give {use}; or "
            train = "" if row.recipe is None else train
            ours = row.family.endswith(("transformer", "autoencoder", " diffusion", "classifier"))
            raise FileProblem(
                f"the model {row.name!r} has no weights here: {train}give the path of a .safetensors file"
                f"{'' if ours else ' or of a diffusers folder'} with -m"
            )
        assert row.file is not None
        return row.file
    path = Path(source)
    if not str(source):
        entry("")
    if os.path.isdir(path):  # noqa: PTH112 (Path's own question raises for a name too long)
        if (theirs := folders.find(path)) is not None:
            return theirs
        folder = path / "final" if (path / "final").is_dir() else path
        found = sorted(folder.glob("*.safetensors"))
        if not found and (path / "checkpoints").is_dir():
            raise FileProblem(f"{path} is a run that did not finish: go on with `limner train --resume {path}`")
        if len(found) != 1:
            if not found and sum((path / name).is_dir() for name in ("transformer", "unet", "vae", "text_encoder")) > 1:
                raise FileProblem(f"{path} holds parts of a model as diffusers has it, but model_index.json is missing")
            what = "no .safetensors file" if not found else f"{len(found)} .safetensors files"
            raise FileProblem(f"{folder} holds {what}: give the path of one")
        return found[0]
    if os.path.isfile(path):  # noqa: PTH113 (as above)
        return path
    if path.suffix or len(path.parts) > 1:
        hub_too = f", or say hf:{source} for a model of the Hugging Face Hub" if len(path.parts) == 2 else ""
        raise FileProblem(
            f"no file {path}: give a model's name (`limner models` lists them) or the path of its weights{hub_too}"
        )
    entry(str(source))
    raise AssertionError("entry() raises for unknown names")


def parse(stored: dict[str, Any], source: Path | str) -> SystemConfig:
    """A configuration read from a file, checked field by field; how its weights are stored is another matter."""
    try:
        return TypeAdapter(SystemConfig).validate_python({k: v for k, v in stored.items() if k != "quantization"})
    except ValidationError as error:
        reason = complaint(error.errors()[0])
        raise CheckpointMismatch(f"{source}: its configuration is not one of ours ({reason})") from error
