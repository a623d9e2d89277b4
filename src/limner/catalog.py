"""Name or file -> a system, built and with its weights. Also: what there is to choose from."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from limner.checkpoints import files
from limner.checkpoints.quantization import quantize
from limner.errors import CheckpointMismatch, FileProblem, UnknownName, UsageError, complaint
from limner.models.dcae import DCAE, DCAE_ICONS, DCAE_TINY, DCAEConfig
from limner.models.joint_dit import JOINT_DIT_ICONS, JOINT_DIT_TINY, JointDiT, JointDiTConfig
from limner.sampling import interpolants, predictions
from limner.systems.autoencoding import AutoencodingSystem
from limner.systems.diffusion import DiffusionSystem
from limner.text.minilm import POSITIONS as minilm_positions
from limner.text.minilm import WIDTH as minilm_width
from limner.text.minilm import MiniLM
from limner.types import Defaults

WEIGHTS = Path(__file__).parent / "weights"
_PLAIN, _ONCE = Defaults(steps=12, sampler="dpmpp_2m"), Defaults(steps=1, guidance=1.0)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of an autoencoder's loss terms; see `limner.systems.autoencoding`."""

    kl_weight: float = 1e-7
    gradient_weight: float = 1.0
    scale_weight: float = 0.25


@dataclass(frozen=True, kw_only=True)
class AutoencodingConfig:
    kind: Literal["autoencoding"] = "autoencoding"
    name: str = "icons-autoencoder"
    family: str = "KL autoencoder"
    autoencoder: DCAEConfig = DCAE_ICONS
    loss: LossConfig = LossConfig()
    defaults: Defaults = _ONCE


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """`autoencoder_from` is a file of an autoencoder (or of a whole system) whose weights are used when training."""

    kind: Literal["diffusion"] = "diffusion"
    name: str = "icons"
    family: str = "latent flow transformer"
    network: JointDiTConfig = JOINT_DIT_ICONS
    autoencoder: DCAEConfig = DCAE_ICONS
    autoencoder_from: str = ""
    text_encoder: Literal["minilm"] = "minilm"
    max_tokens: int = 24
    interpolant: Literal["flow", "edm"] = "flow"
    prediction: Literal["velocity", "x0", "eps", "v"] = "velocity"
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    defaults: Defaults = _PLAIN


SystemConfig = Annotated[AutoencodingConfig | DiffusionConfig, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the catalogue; `file` is the bundled weight file, None where weights must be trained or given."""

    config: AutoencodingConfig | DiffusionConfig
    summary: str
    file: Path | None = None
    task: str = field(default="")

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

CATALOG = {
    entry.name: entry
    for entry in (
        Entry(
            config=DiffusionConfig(),
            task=DiffusionSystem.task,
            file=WEIGHTS / "icons" / "icons.safetensors",
            summary="emoji, stickers and icons, 256 px, transparent",
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
            summary="coloured shapes, 32 px: the same line in miniature, trained in a minute",
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


def build(config: AutoencodingConfig | DiffusionConfig) -> AutoencodingSystem | DiffusionSystem:
    """The system with fresh weights; a frozen autoencoder is read from `autoencoder_from` when that is given.

    Raises UsageError for what no system can be built of.
    """
    if isinstance(config, AutoencodingConfig):
        return AutoencodingSystem(
            DCAE(config.autoencoder), config.defaults, config.name, config.family, **asdict(config.loss)
        )
    network = config.network
    if not 1 <= config.max_tokens <= minilm_positions:
        raise UsageError(f"max_tokens={config.max_tokens}: a prompt has 1 token to {minilm_positions}")
    if network.channels != config.autoencoder.latent_channels:
        latent = config.autoencoder.latent_channels
        raise UsageError(f"network.channels={network.channels}, but the autoencoder's latents have {latent}")
    if network.text_width != minilm_width:
        raise UsageError(f"network.text_width={network.text_width}, but the text encoder's tokens have {minilm_width}")
    autoencoder = DCAE(config.autoencoder)
    if config.autoencoder_from:
        _load_autoencoder(autoencoder, config.autoencoder_from)
    return DiffusionSystem(
        network=JointDiT(config.network),
        autoencoder=autoencoder.eval(),
        text_encoder=minilm(config.max_tokens),
        interpolant=interpolants.get(config.interpolant),
        prediction=predictions.get(config.prediction),
        defaults=config.defaults,
        name=config.name,
        family=config.family,
        caption_dropout=config.caption_dropout,
    )


@lru_cache(maxsize=2)
def minilm(max_tokens: int = 24) -> MiniLM:
    """The bundled text encoder, frozen, in float32 on the CPU until it is moved."""
    folder = WEIGHTS / "minilm"
    with torch.device("meta"):
        encoder = MiniLM(folder / "tokenizer.json", max_tokens)
    files.assign(encoder, files.load(folder / "minilm.safetensors")[0], folder / "minilm.safetensors")
    return encoder.requires_grad_(False).eval()


def _load_autoencoder(autoencoder: DCAE, source: str) -> None:
    path = WEIGHTS / source if (WEIGHTS / source).is_file() else Path(source)
    if not path.exists():
        ours = [e.config for e in entries() if isinstance(e.config, AutoencodingConfig)]
        recipe = next((c.name for c in ours if c.autoencoder == autoencoder.config), "icons-autoencoder")
        raise FileProblem(
            f"no autoencoder {path}: train one with `limner train {recipe} --out runs/{recipe}`, or name its file with "
            "system.autoencoder_from=FILE"
        )
    tensors, _ = files.load(path)
    prefix = "autoencoder."
    files.assign(autoencoder, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path)


# -------------------------------------------------------------------- files


def save(
    system: nn.Module,
    config: AutoencodingConfig | DiffusionConfig,
    path: Path,
    *,
    bits: int = 32,
) -> None:
    """Write one self-describing file: all but the text encoder. `bits` 8 stores matrices in 8 bits, the rest in 16.

    Raises FileProblem.
    """
    tensors = {k: v.detach().float().cpu() for k, v in system.state_dict().items() if not k.startswith("text_encoder.")}
    if isinstance(config, DiffusionConfig):
        config = replace(config, autoencoder_from="")
    stored, recipe = quantize(
        tensors, lambda name, t: bits if bits != 8 else 8 if t.dim() > 1 and t.numel() >= 4096 else 16
    )
    files.save(path, stored, {**asdict(config), "quantization": recipe})


def load(source: str | Path, device: torch.device | str = "cpu") -> AutoencodingSystem | DiffusionSystem:
    """A system by name ("icons"), weight file, or folder of a training run, ready to draw.

    Raises UnknownName, FileProblem, CheckpointMismatch.
    """
    path = find(source)
    with ThreadPoolExecutor(1) as beside:
        model_hash = beside.submit(files.digest, path)  # on another core, meanwhile
        tensors, stored = files.load(path)
        stored.pop("quantization", None)
        config = parse(stored, path)
        try:
            with torch.device("meta"):
                system = build(replace(config, autoencoder_from="") if isinstance(config, DiffusionConfig) else config)
        except UsageError as error:
            raise CheckpointMismatch(f"{path}: its configuration is of no system ({error})") from error
        if isinstance(system, DiffusionSystem):
            tensors |= {f"text_encoder.{k}": v for k, v in system.text_encoder.state_dict().items()}
        files.assign(system, tensors, path)
    system.model_hash = model_hash.result()
    return system.requires_grad_(False).eval().to(device)


def find(source: str | Path) -> Path:
    """The weight file a name or path means."""
    if str(source) in CATALOG:
        row = CATALOG[str(source)]
        if row.weights == "needed":
            use = "-m RUN" if row.task != AutoencodingSystem.task else "-m RUN -i IMAGE, which gives the picture back"
            raise FileProblem(
                f"the model {row.name!r} has no weights here: train them with `limner train {row.name} --out RUN` "
                f"and give {use}; or give the path of a .safetensors file"
            )
        assert row.file is not None
        return row.file
    path = Path(source)
    if not str(source):
        entry("")
    if os.path.isdir(path):  # noqa: PTH112 (Path's own question raises for a name too long)
        folder = path / "final" if (path / "final").is_dir() else path
        found = sorted(folder.glob("*.safetensors"))
        if not found and (path / "checkpoints").is_dir():
            raise FileProblem(f"{path} is a run that did not finish: go on with `limner train --resume {path}`")
        if len(found) != 1:
            what = "no .safetensors file" if not found else f"{len(found)} .safetensors files"
            raise FileProblem(f"{folder} holds {what}: give the path of one")
        return found[0]
    if os.path.isfile(path):  # noqa: PTH113 (as above)
        return path
    if path.suffix or len(path.parts) > 1:
        raise FileProblem(
            f"no file {path}: give a model's name (`limner models` lists them) or the path of its weights"
        )
    entry(str(source))
    raise AssertionError("entry() raises for unknown names")


def parse(stored: dict[str, Any], source: Path | str) -> AutoencodingConfig | DiffusionConfig:
    """A configuration read from a file, checked field by field."""
    try:
        return TypeAdapter(SystemConfig).validate_python(stored)
    except ValidationError as error:
        reason = complaint(error.errors()[0])
        raise CheckpointMismatch(f"{source}: its configuration is not one of ours ({reason})") from error
