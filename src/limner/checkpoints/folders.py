"""Folders that diffusers writes: a `model_index.json`, and for each part a folder with its configuration and weights.

Names of tensors are ours; what is new in them is which part they are of. A setting that our networks have no word for
must have the value that changes nothing, or the folder is refused: no picture is better than a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from limner.checkpoints import autoencoder, files, text, unet
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.layouts import Layout, Place, early_diffusers, prefixed
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.models.autoencoder import KLConfig
from limner.models.unet import UNetConfig
from limner.sampling.interpolants import VPConfig
from limner.text.bpe import CLIPTokenizer
from limner.text.clip import CLIPTowersConfig

INDEX = "model_index.json"
LARGEST_JSON = 4_000_000
KNOWN_PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
BESIDE = {"tokenizer", "tokenizer_2", "scheduler", "safety_checker", "feature_extractor", "image_encoder"}


class Settings:
    """A JSON file whose values are taken one by one; what nobody takes must change nothing. Raises FileProblem."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size > LARGEST_JSON:
                raise FileProblem(f"{path} has {path.stat().st_size / 1e6:.0f} MB, too much for settings")
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not JSON"
            raise FileProblem(f"cannot read {path}: {reason}; is the folder complete?") from error
        if not isinstance(values, dict):
            raise FileProblem(f"{path} is not a JSON object")
        self.values: dict[str, Any] = values

    def take(self, name: str, default: Any) -> Any:
        """The value of `name`, which must be of `default`'s type; a whole number will do for a fraction."""
        value = self.values.pop(name, default)
        if value is None or value == default:
            return default
        kind = type(default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind in (int, float) and not 0 <= value < 1e6):
            raise self.wrong(name, value)
        return value

    def each(self, name: str, count: int | None, default: int | list[int], most: int = 100_000) -> tuple[int, ...]:
        """`count` whole numbers from 1 to `most`; one stands for all. Without `count`, 10 of them at most."""
        value = self.values.pop(name, None)
        value = default if value is None else value
        rows = value if isinstance(value, list) else [value] * (count or 1)
        if (
            not 0 < len(rows) <= 10
            or len(rows) != (count or len(rows))
            or any(type(n) is not int or not 0 < n <= most for n in rows)
        ):
            raise self.wrong(name, value)
        return tuple(rows)

    def done(self, *, ignored: set[str], fixed: Mapping[str, Any]) -> None:
        """What is left must be in `ignored`, or have its value of `fixed`, or be off."""
        for name, value in self.values.items():
            if name not in ignored and not name.startswith("_") and value != fixed.get(name) and value not in OFF:
                raise self.wrong(name, value)

    def wrong(self, name: str, value: Any) -> CheckpointMismatch:
        return CheckpointMismatch(f"{self.path}: {name} is {value!r:.100}, which Limner does not know")


OFF: tuple[Any, ...] = (None, False, [])


def find(path: Path) -> Path | None:
    """The folder of `path` that holds the index: itself, or the only one inside, or in a cache of the Hub."""
    found = [p for pattern in (INDEX, f"*/{INDEX}", f"snapshots/*/{INDEX}") for p in sorted(path.glob(pattern))]
    return found[0].parent if found else None


def recognise(folder: Path) -> Foreign:
    """What the folder holds. Raises FileProblem, CheckpointMismatch."""
    index = Settings(folder / INDEX)
    kind = index.take("_class_name", "")
    parts = {name: value for name, value in index.values.items() if isinstance(value, list) and value != [None, None]}
    for name, value in parts.items():
        if name not in BESIDE and value[-1:] != [KNOWN_PARTS.get(name)]:
            raise CheckpointMismatch(
                f"{index.path}: the part {name} is {value[-1:]!r:.100}, which Limner does not know"
            )
    towers = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    for name in ("unet", "vae", "scheduler", *(towers or ["text_encoder"])):
        if name not in parts:
            raise CheckpointMismatch(f"{index.path}: there is no {name}; a whole model has one")
    xl = kind.startswith("StableDiffusionXL")
    try:
        network, side = network_config(Settings(folder / "unet" / "config.json"))
        codec = autoencoder_config(Settings(folder / "vae" / "config.json"))
        noise, prediction, sampler, schedule = noise_config(Settings(folder / "scheduler" / "scheduler_config.json"))
        told = [Settings(folder / name / "config.json") for name in towers]
        configs = [text.transformers_config(settings.values, pad=0, source=settings.path) for settings in told]
        tokenizers = tuple(CLIPTokenizer.from_folder(folder / n.replace("text_encoder", "tokenizer")) for n in towers)
        configs = [replace(config, pad=known.pad) for config, known in zip(configs, tokenizers, strict=True)]
        words = CLIPTowersConfig(
            towers=tuple(configs), skip=int(xl), normed=not xl,
            zero_empty=xl and index.take("force_zeros_for_empty_prompt", True),
        )  # fmt: skip
    except UsageError as error:
        raise CheckpointMismatch(f"{folder}: {error}") from error

    paths = {name: weights(folder / name) for name in ("unet", "vae", *towers)}
    found = {name: _tensors(paths[name]) for name in paths}
    early = any(name.endswith(".query.weight") for name in found["vae"])
    codec_names = autoencoder.ldm_layout(codec)
    layouts: dict[tuple[str, str], Layout] = {
        ("network.", "unet"): {name: Place(name) for name in unet.ldm_layout(network)},
        ("autoencoder.", "vae"): early_diffusers(codec_names) if early else {name: Place(name) for name in codec_names},
    }
    for i, (name, config) in enumerate(zip(towers, configs, strict=True)):
        found[name] = text.text_tower(found[name])
        flat = "embeddings.token_embedding.weight" in found[name]
        layouts[f"text_encoder.{i}.", name] = text.transformers_layout(config, flat=flat)
    return Foreign(
        source=folder, network=network, autoencoder=codec, text=words, tokenizers=tokenizers, noise=noise,
        prediction=prediction, sampler=sampler, schedule=schedule, size=side * codec.factor,
        layout={k: v for (ours, part), rows in layouts.items() for k, v in prefixed(rows, ours, f"{part}/").items()},
        tensors={f"{part}/{name}": tensor for part, tensors in found.items() for name, tensor in tensors.items()},
        files=tuple(path for part in paths.values() for path in part),
    )  # fmt: skip


# -------------------------------------------------------------------- weights


def weights(folder: Path) -> list[Path]:
    """The files of a part, one or several, in full precision where there is a choice."""
    for variant in ("", ".fp16"):
        for stem in ("diffusion_pytorch_model", "model"):
            file, index = folder / f"{stem}{variant}.safetensors", folder / f"{stem}.safetensors.index{variant}.json"
            if file.is_file():
                return [file]
            if index.is_file():
                return _shards(index)
    raise FileProblem(f"{folder} holds no weights: a file such as diffusion_pytorch_model.safetensors is missing")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    places = Settings(index).values.get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise FileProblem(f"{index} does not name files beside it")
    return [index.parent / name for name in names]


def _tensors(paths: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for path in paths for name, tensor in files.read(path)[0].items()}


# -------------------------------------------------------------------- configurations


def network_config(settings: Settings) -> tuple[UNetConfig, int]:
    """The U-Net, and the side of the latents it was trained at."""
    take = settings.take
    widths = settings.each("block_out_channels", None, [320, 640, 1280, 1280])
    levels = len(widths)
    down = settings.values.pop("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    attends = [kind == "CrossAttnDownBlock2D" for kind in down] if isinstance(down, list) else []
    if [f"{'CrossAttn' * a}DownBlock2D" for a in attends] != down or len(attends) != levels:
        raise settings.wrong("down_block_types", down)
    up = [f"{'CrossAttn' * a}UpBlock2D" for a in attends[::-1]]
    if (found := settings.values.pop("up_block_types", up)) != up:
        raise settings.wrong("up_block_types", found)
    layers = settings.each("transformer_layers_per_block", levels, 1, most=50)
    blocks = settings.each("layers_per_block", levels, 2, most=10)
    texts = settings.each("cross_attention_dim", levels, 1280)
    heads = settings.each("attention_head_dim", levels, 8)  # means their number
    only = settings.values.pop("only_cross_attention", None) or False
    sized = {width // n for width, n in zip(widths, heads, strict=True)}
    added = take("addition_embed_type", "") == "text_time"
    if len(set(blocks)) > 1 or len(set(texts)) > 1 or (len(set(heads)) > 1 and len(sized) > 1):
        raise CheckpointMismatch(f"{settings.path}: its levels differ in what Limner has alike")
    config = UNetConfig(
        in_channels=take("in_channels", 4),
        out_channels=take("out_channels", 4),
        widths=widths,
        num_blocks=blocks[0],
        depths=tuple(n if attend else 0 for n, attend in zip(layers, attends, strict=True)),
        mid_depth=layers[-1],
        num_heads=heads[0] if len(set(heads)) == 1 else 0,
        head_width=0 if len(set(heads)) == 1 else sized.pop(),
        text_width=texts[0],
        text_only=tuple(only) if isinstance(only, list) else (),
        linear_projection=take("use_linear_projection", False),
        vector_width=take("projection_class_embeddings_input_dim", 0) if added else 0,
        num_classes=take("num_class_embeds", 0),
        groups=take("norm_num_groups", 32),
        eps=take("norm_eps", 1e-5),
        scale_shift=take("resnet_time_scale_shift", "default") == "scale_shift",
        sines_first=not take("flip_sin_to_cos", True),
        freq_shift=take("freq_shift", 0),
    )
    side = take("sample_size", 64)
    ignored = {"upcast_attention", "addition_embed_type_num_heads"}
    settings.done(ignored=ignored, fixed=UNET_FIXED)
    return config, side


UNET_FIXED = {
    "act_fn": "silu",
    "addition_time_embed_dim": 256,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
}


def autoencoder_config(settings: Settings) -> KLConfig:
    take = settings.take
    widths = settings.each("block_out_channels", None, [64])
    channels = (take("in_channels", 3), take("out_channels", 3))
    quant = {take("use_quant_conv", True), take("use_post_quant_conv", True)}
    if channels[0] != channels[1] or len(quant) > 1:
        raise CheckpointMismatch(f"{settings.path}: its encoder and decoder do not belong together")
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = settings.values.pop(name, [kind] * len(widths))
        if kinds != [kind] * len(widths):
            raise settings.wrong(name, kinds)
    config = KLConfig(
        image_channels=channels[0],
        latent_channels=take("latent_channels", 4),
        widths=widths,
        blocks=settings.each("layers_per_block", 1, 1, most=10)[0],
        groups=take("norm_num_groups", 32),
        scale=take("scaling_factor", 0.18215),
        shift=take("shift_factor", 0.0),
        quant_convs=quant.pop(),
    )
    settings.done(ignored={"force_upcast", "sample_size"}, fixed={"act_fn": "silu", "mid_block_add_attention": True})
    return config


BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def noise_config(settings: Settings) -> tuple[VPConfig, Any, str, str]:
    """The noise, what the network predicts, and the sampler and schedule that the folder asks for."""
    take = settings.take
    betas, prediction = take("beta_schedule", "linear"), take("prediction_type", "epsilon")
    if betas not in BETAS or prediction not in PREDICTIONS or settings.values.get("trained_betas"):
        raise CheckpointMismatch(f"{settings.path}: noise of the kind {betas!r} with {prediction!r} is not known")
    config = VPConfig(
        betas=BETAS[betas],  # type: ignore[arg-type]
        first=take("beta_start", 0.0001),
        last=take("beta_end", 0.02),
        steps=take("num_train_timesteps", 1000),
        zero_snr=take("rescale_betas_zero_snr", False),
        offset=take("steps_offset", 0),
        to_zero=take("set_alpha_to_one", True),
    )
    return config, PREDICTIONS[prediction], take("_class_name", "euler"), take("timestep_spacing", "auto")
