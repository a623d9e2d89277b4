"""Folders that diffusers writes: a `model_index.json`, and for each part a folder with its configuration and weights.

Names of tensors are ours; what is new in them is which part they are of. A setting that our networks have no word for
must have the value that changes nothing, or the folder is refused: no picture is better than a wrong one.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from limner import names
from limner.checkpoints import autoencoder, distilled, files, layouts, text, unet
from limner.checkpoints.distilled import PLAYGROUND, PLAYGROUND_NOISE
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.layouts import Layout, Place, early_diffusers, prefixed
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.models.autoencoder import KLConfig
from limner.models.unet import UNetConfig
from limner.sampling import schedules
from limner.sampling.interpolants import EDMConfig, VPConfig
from limner.sampling.predictions import DATA
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
SMALL = "low_res_scheduler"
BESIDE = {
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "low_res_scheduler",
    "watermarker",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "depth_estimator",  # depth is given as a picture
}


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


UNKNOWN_SAMPLER = "euler is taken unless another is named"
OFF: tuple[Any, ...] = (None, False, [])


def find(path: Path) -> Path | None:
    """The folder of `path` that holds the index: itself, or the only one inside, or in a cache of the Hub. Raises
    FileProblem where there are several."""
    for pattern in (INDEX, f"*/{INDEX}", f"snapshots/*/{INDEX}"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise FileProblem(f"{path} holds {len(found)} models, such as {found[0].parent.name}: give the path of one")
        if found:
            return found[0].parent
    return None


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
    assumed: list[str] = []
    try:
        network, side = network_config(Settings(folder / "unet" / "config.json"))
        codec = autoencoder_config(Settings(folder / "vae" / "config.json"))
        noise, prediction, sampler, schedule = noise_config(Settings(folder / "scheduler" / "scheduler_config.json"))
        noise = noise if xl or isinstance(noise, EDMConfig) else replace(noise, offset=1)  # as diffusers insists
        if index.take("is_cosxl_edit", False) and not _cosxl(noise, prediction):
            raise CheckpointMismatch(f"{index.path}: is_cosxl_edit is true, but its scheduler's noise is not CosXL's")
        small = Settings(folder / SMALL / "scheduler_config.json") if SMALL in parts else None
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
    size = side * codec.factor
    unsaid = False
    few = distilled.by_scheduler(sampler, schedule, size, network, prediction)
    if few is None and (named := distilled.by_name(folder.absolute(), xl)) is not None:
        few, sentence = named
        assumed.append(sentence)
        unsaid = few.prediction not in ("", prediction)
        sampler, schedule, prediction = few.sampler, few.schedule, few.prediction or prediction
    if not sampler:
        assumed.append(f"the folder's sampler is not one of ours: {UNKNOWN_SAMPLER}")

    paths = {name: weights(folder / name) for name in ("unet", "vae", *towers)}
    found = {name: files.read_all(paths[name]) for name in paths}
    early = any(name.endswith(".query.weight") for name in found["vae"])
    codec_names = autoencoder.ldm_layout(codec)
    beside: Counter[str] = Counter()
    rows: dict[tuple[str, str], Layout] = {
        ("network.", "unet"): {name: Place(name) for name in unet.ldm_layout(network)},
        ("autoencoder.", "vae"): early_diffusers(codec_names) if early else {name: Place(name) for name in codec_names},
    }
    for i, (name, config) in enumerate(zip(towers, configs, strict=True)):
        beside.update(found[name].keys() - text.text_tower(found[name]).keys())
        found[name] = text.text_tower(found[name])
        flat = "embeddings.token_embedding.weight" in found[name]
        rows[f"text_encoder.{i}.", name] = text.transformers_layout(config, flat=flat)
    return Foreign(
        source=folder, network=network, autoencoder=codec, text=words, tokenizers=tokenizers, noise=noise,
        prediction=prediction, sampler=sampler, schedule=schedule, size=size, steps=_drawn(noise, few)[0],
        guidance=_drawn(noise, few)[1],
        layout={k: v for (ours, part), row in rows.items() for k, v in prefixed(row, ours, f"{part}/").items()},
        tensors={f"{part}/{name}": tensor for part, tensors in found.items() for name, tensor in tensors.items()},
        files=tuple(path for part in paths.values() for path in part), beside=beside,
        small_noise=None if small is None else _small_noise(small),
        assumed=tuple(assumed), unsaid=unsaid,
    )  # fmt: skip


def _cosxl(noise: VPConfig | EDMConfig, prediction: str) -> bool:
    """Whether an editing model is like CosXL's, which sees the latents of a picture scaled."""
    return isinstance(noise, EDMConfig) and prediction == "v"


def _small_noise(settings: Settings) -> VPConfig:
    noise, *_ = noise_config(settings)
    if isinstance(noise, EDMConfig):
        raise CheckpointMismatch(f"{settings.path}: noise of EDM over a small picture is not known")
    return noise


def _drawn(noise: VPConfig | EDMConfig, few: distilled.Few | None) -> tuple[int, float]:
    """Steps and guidance that a model is drawn with, 0 where nothing says."""
    if few is not None:
        return few.steps, few.guidance
    return (PLAYGROUND.steps, PLAYGROUND.guidance) if noise == PLAYGROUND_NOISE else (0, 0.0)


# -------------------------------------------------------------------- weights


def weights(folder: Path) -> list[Path]:
    """The files of a part, one or several, safetensors and in full precision where there is a choice."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for ending, variant, stem in itertools.product(("safetensors", "bin"), ("", ".fp16"), stems):
        file, index = folder / f"{stem}{variant}.{ending}", folder / f"{stem}.{ending}.index{variant}.json"
        if file.is_file():
            return [file]
        if index.is_file():
            return _shards(index)
    name = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    if shards := sorted(folder.glob("*-of-*.safetensors")):
        raise FileProblem(
            f"{folder} holds {len(shards)} shards, but {name}.safetensors.index.json, which lists them, is missing"
        )
    raise FileProblem(f"{folder} holds no weights: a file such as {name}.safetensors is missing")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    places = Settings(index).values.get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or "\0" in name for name in names):
        raise FileProblem(f"{index} does not name files beside it")
    return [index.parent / name for name in names]


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
        guidance_width=take("time_cond_proj_dim", 0),
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
    each = [settings.values.pop(name, None) or [] for name in ("latents_mean", "latents_std")]
    if any(not isinstance(row, list) or any(type(n) not in (int, float) for n in row) for row in each):
        raise settings.wrong("latents_mean and latents_std", each)
    config = KLConfig(
        mean=tuple(map(float, each[0])),
        std=tuple(map(float, each[1])),
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
EDM_SAMPLERS = {"EDMEulerScheduler": "euler", "EDMDPMSolverMultistepScheduler": "dpmpp_2m"}
ALGORITHMS = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde", "deis": ""}


def noise_config(settings: Settings) -> tuple[VPConfig | EDMConfig, Any, str, str]:
    """The noise, what the network predicts, and the folder's sampler ("" for one that we do not have) and schedule."""
    take = settings.take
    cls = take("_class_name", "")
    if cls in EDM_SAMPLERS:
        return _edm_config(settings, EDM_SAMPLERS[cls])
    order, algorithm = take("solver_order", 2), take("algorithm_type", "dpmsolver++")
    distilled_at = take("original_inference_steps", 50), take("timestep_scaling", 10.0)
    sampler = names.find(cls, names.SAMPLERS) or ""
    usual = order == 2 and algorithm in ALGORITHMS and distilled_at == (50, 10.0)
    if not usual or not take("skip_prk_steps", cls != "PNDMScheduler"):
        sampler = ""
    elif sampler == "dpmpp_2m":
        sampler = ALGORITHMS[algorithm]
    spaced = [name for name in ("karras", "exponential", "beta") if take(f"use_{name}_sigmas", False)]
    schedule = schedules.find(f"use_{spaced[0]}_sigmas") if spaced else take("timestep_spacing", "auto")
    if schedule not in ("auto", *schedules.SCHEDULES):
        raise settings.wrong("timestep_spacing", schedule)
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
        to_zero=take("set_alpha_to_one", cls != "PNDMScheduler"),
    )
    return config, PREDICTIONS[prediction], sampler, schedule


def _edm_config(settings: Settings, sampler: str) -> tuple[EDMConfig, Any, str, str]:
    """As `noise_config`, of a scheduler with EDM's preconditioning. Raises CheckpointMismatch for a kind of it that no
    prediction of ours is."""
    take = settings.take
    config = EDMConfig(low=take("sigma_min", 0.002), high=take("sigma_max", 80.0), data=take("sigma_data", 0.5))
    said, spaced = take("prediction_type", "epsilon"), take("sigma_schedule", "karras")
    prediction = {("epsilon", DATA): "edm", ("v_prediction", 1.0): "v"}.get((said, config.data))
    if prediction is None or spaced not in ("karras", "exponential") or take("rho", 7.0) != 7:
        raise CheckpointMismatch(
            f"{settings.path}: EDM's noise with {said!r}, data of {config.data:g} and {spaced!r} levels is not known"
        )
    if (take("solver_order", 2), take("solver_type", "midpoint")) != (2, "midpoint"):
        sampler = ""
    elif sampler == "dpmpp_2m":
        sampler = ALGORITHMS.get(take("algorithm_type", "dpmsolver++"), "")
    return config, prediction, sampler, spaced


# -------------------------------------------------------------------- writing


def export(found: Foreign) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a folder of this model holds: the contents of its JSON and text files by name, and the tensors of its parts.

    The layers that a text encoder of Stable Diffusion 2 skips are left out, as diffusers does.
    """
    network, codec, words = found.network, found.autoencoder, found.text
    xl = not words.normed
    towers = [replace(t, depth=t.depth - (0 if xl else words.skip)) for t in words.towers]
    if words.skip and not xl:
        towers = [replace(tower, projection=None) for tower in towers]
    names_of = ["text_encoder", "text_encoder_2"][2 - len(towers) if xl else 0 :][: len(towers)]
    contents: dict[str, Any] = {
        INDEX: _index(found, names_of, xl),
        "unet/config.json": _network_settings(network, found.size // codec.factor),
        "vae/config.json": _autoencoder_settings(codec),
        "scheduler/scheduler_config.json": noise_settings(found),
    }
    if found.small_noise is not None:
        small = noise_settings(replace(found, noise=found.small_noise, prediction="eps", sampler="ddpm", schedule=""))
        contents[f"{SMALL}/scheduler_config.json"] = small
    ours = layouts.read(found.layout, found.tensors, found.source)
    parts = {
        "unet/diffusion_pytorch_model": {n: ours[f"network.{n}"] for n in unet.ldm_layout(network)},
        "vae/diffusion_pytorch_model": {n: ours[f"autoencoder.{n}"] for n in autoencoder.ldm_layout(codec)},
    }
    for i, (name, tower, tokenizer) in enumerate(zip(names_of, towers, found.tokenizers, strict=True)):
        assert isinstance(tokenizer, CLIPTokenizer)
        contents[f"{name}/config.json"] = text.transformers_settings(tower)
        for file, content in tokenizer.files(tower.pad, tower.context).items():
            contents[f"{name.replace('text_encoder', 'tokenizer')}/{file}"] = content
        parts[f"{name}/model"] = {n: ours[f"text_encoder.{i}.{n}"] for n in text.transformers_layout(tower)}
    return contents, parts


def _index(found: Foreign, towers: list[str], xl: bool) -> dict[str, Any]:
    sees = found.network.sees(found.autoencoder.latent_channels)
    does = {"": "", "mask": "Inpaint", "picture": "InstructPix2Pix", "depth": "Depth2Img", "else": "Upscale"}[sees]
    kind = f"StableDiffusion{'XL' * xl}{does}Pipeline"
    refiner = xl and len(towers) == 1
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else kind,
        "unet": ["diffusers", KNOWN_PARTS["unet"]],
        "vae": ["diffusers", KNOWN_PARTS["vae"]],
        "scheduler": ["diffusers", noise_settings(found)["_class_name"]],
    }
    for name in ("text_encoder", "text_encoder_2") if xl else towers:
        there = name in towers
        index[name] = ["transformers", KNOWN_PARTS[name]] if there else [None, None]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"] if there else [None, None]
    if found.small_noise is not None:
        index |= {SMALL: ["diffusers", "DDPMScheduler"], "max_noise_level": 350, "watermarker": [None, None]}
        return index | {"safety_checker": [None, None], "feature_extractor": [None, None]}
    if sees == "depth":
        return index | {"depth_estimator": [None, None], "feature_extractor": [None, None]}
    if xl:
        index |= {"is_cosxl_edit": True} if sees == "picture" and _cosxl(found.noise, found.prediction) else {}
        index |= {"force_zeros_for_empty_prompt": found.text.zero_empty}
        return index | ({"requires_aesthetics_score": True} if refiner else {})
    return index | {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def _network_settings(config: UNetConfig, side: int) -> dict[str, Any]:
    attends = ["CrossAttn" * (depth > 0) for depth in config.depths]
    settings = {
        "_class_name": KNOWN_PARTS["unet"],
        "sample_size": side,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attends],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attends)],
        "layers_per_block": config.num_blocks,
        "transformer_layers_per_block": [*(max(depth, 1) for depth in config.depths[:-1]), config.mid_depth],
        "attention_head_dim": [config.heads(width) for width in config.widths],
        "cross_attention_dim": config.text_width,
        "only_cross_attention": config.text_only or False,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.groups,
        "norm_eps": config.eps,
        "num_class_embeds": config.num_classes or None,
        "time_cond_proj_dim": config.guidance_width or None,
    }
    if config.vector_width:
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config.vector_width,
        }
    return settings


def _autoencoder_settings(config: KLConfig) -> dict[str, Any]:
    levels = len(config.widths)
    return {
        "_class_name": KNOWN_PARTS["vae"],
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
        "shift_factor": config.shift or None,
        "latents_mean": config.mean or None,
        "latents_std": config.std or None,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
    }


def noise_settings(found: Foreign) -> dict[str, Any]:
    """What a folder says of noise and sampler, the inverse of `noise_config`."""
    noise, names_of = found.noise, names.SAMPLERS[found.sampler or "euler"]
    if isinstance(noise, EDMConfig):
        return {
            "_class_name": {ours: theirs for theirs, ours in EDM_SAMPLERS.items()}[found.sampler or "euler"],
            "sigma_min": noise.low,
            "sigma_max": noise.high,
            "sigma_data": noise.data,
            "sigma_schedule": found.schedule,
            "prediction_type": "epsilon" if found.prediction == "edm" else "v_prediction",
        }
    settings: dict[str, Any] = {
        "_class_name": next((name for name in names_of if name.endswith("Scheduler")), "EulerDiscreteScheduler"),
        "beta_schedule": {ours: theirs for theirs, ours in BETAS.items()}[noise.betas],
        "beta_start": noise.first,
        "beta_end": noise.last,
        "num_train_timesteps": noise.steps,
        "rescale_betas_zero_snr": noise.zero_snr,
        "steps_offset": noise.offset,
        "set_alpha_to_one": noise.to_zero,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[found.prediction],
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    if found.schedule in schedules.SPACINGS:
        settings["timestep_spacing"] = found.schedule
    elif found.schedule in ("karras", "exponential", "beta_sigmas"):
        settings[f"use_{found.schedule.removesuffix('_sigmas')}_sigmas"] = True
    return settings
