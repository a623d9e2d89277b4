"""One file with all of a Stable Diffusion, in the names of Latent Diffusion's code: what most people own.

What it is follows from names and shapes. What those do not tell is assumed, and said: `prediction` of Stable Diffusion
2, and scales of autoencoders, which follow from what else is in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limner.checkpoints import autoencoder, components, distilled, dit, layouts, parts, text, unet
from limner.checkpoints.distilled import LCM, PLAYGROUND, PLAYGROUND_NOISE
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.layouts import Layout, Place, prefixed
from limner.checkpoints.parts import CODEC, EMA, NETWORK
from limner.errors import CheckpointMismatch, UsageError
from limner.models.autoencoder import KLConfig, check_each
from limner.models.unet import UNetConfig
from limner.sampling.interpolants import SMALL_NOISE, EDMConfig, VPConfig
from limner.text import bpe
from limner.text.clip import OPENCLIP_H, CLIPTextConfig, CLIPTowersConfig

SMALL = "low_scale_model."
DEPTH = "depth_model."
"""What finds depth in a picture, MiDaS: depth is given as a picture."""
BESIDE = {  # noise, numbers of the loss and marks
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "scale_factor", "denoiser.sigmas", "v_pred", "ztsnr",
    "edm_mean", "edm_std", "edm_vpred.sigma_min", "edm_vpred.sigma_max",
}  # fmt: skip
ASSUMED = (
    "names do not tell what a Stable Diffusion 2 predicts; one of its biases says {}: if pictures are noise, give the "
    "other of eps and v as prediction"
)
NOISE_ASSUMED = "no name tells the noise of an upscaler: that of Stable Diffusion's x4 upscaler is taken"
TOWERS = {  # where a whole model has its text towers, and whether they are OpenCLIP's
    "cond_stage_model.transformer.": False,  # Stable Diffusion 1
    "cond_stage_model.model.": True,  # 2
    "conditioner.embedders.0.transformer.": False,  # XL
    "conditioner.embedders.1.model.": True,
    "conditioner.embedders.0.model.": True,  # its refiner
}


def tower_layout(prefix: str, config: CLIPTextConfig) -> Layout:
    """The places of a tower under a prefix of `TOWERS`, without the prefix."""
    return text.openclip_layout(config) if TOWERS[prefix] else text.transformers_layout(config)


def layout(network: UNetConfig, codec: KLConfig, towers: Mapping[str, Layout]) -> dict[str, Place]:
    """The places of a whole system, its towers under these prefixes."""
    rows = prefixed(unet.ldm_layout(network), "network.", NETWORK)
    rows |= prefixed(autoencoder.ldm_layout(codec), "autoencoder.", CODEC)
    for i, (prefix, tower) in enumerate(towers.items()):
        rows |= prefixed(tower, f"text_encoder.{i}.", prefix)
    return rows


def recognise(
    path: Path,
    tensors: Mapping[str, Tensor],
    prediction: Literal["eps", "v", "x0"] | None = None,
    vae: Path | None = None,
    text_encoders: Sequence[Path] = (),
) -> Foreign:
    """What a file with these tensors is. `vae` and `text_encoders` are files that hold what it lacks, or what is to
    stand in place of what it has. Raises FileProblem, CheckpointMismatch, UsageError."""
    if dit.prefix_of(tensors) is not None:
        if text_encoders:
            raise UsageError(
                f"{path} is a DiT or a SiT, which is told a class and reads no words: leave --text-encoder out"
            )
        return dit.recognise(path, tensors, prediction, vae)
    held = parts.network(tensors, BESIDE)
    named = [prefix for prefix in TOWERS if any(name.startswith(prefix) for name in tensors)]
    if not held.tensors:
        raise _no_network(path, tensors)
    others = f" with {vae}" * (vae is not None) + "".join(f" and {file}" for file in text_encoders)
    try:
        network, rows = parts.network_config(held)
        xl = network.vector_width > 0
        own = parts.under(tensors, CODEC)
        if (vae is None and not own.tensors) or not (named or text_encoders):
            raise _incomplete(path, network, not own.tensors and vae is None, not (named or text_encoders))
        scale = parts.scale_of(network, tensors.keys())
        given = own if vae is None else parts.codec(vae, scale, str(path))
        codec, more = parts.codec_config(given, scale)
        kinds = [(openclip, parts.under(tensors, p)) for p, openclip in TOWERS.items() if p in named]
        if text_encoders:
            found = [tower for file in text_encoders for tower in parts.towers(file)]
            kinds = [
                (openclip, tower)
                for (openclip, _), tower in zip(
                    parts.wanted(network), parts.ordered(network, found, f"{path}{others}"), strict=True
                )
            ]
        read = [parts.tower_config(tower, openclip) for openclip, tower in kinds]
    except KeyError as error:
        raise CheckpointMismatch(
            f"{path}{others} is like Stable Diffusion, but not whole: there is no {error}"
        ) from error
    except (ValueError, IndexError, UsageError) as error:
        raise CheckpointMismatch(
            f"{path}{others} is like Stable Diffusion, but its shapes do not fit together"
        ) from error
    towers = [config for config, _ in read]
    places = prefixed(rows, "network.", "") | prefixed(more, "autoencoder.", "")
    for i, (_, tower) in enumerate(read):
        places |= prefixed(tower, f"text_encoder.{i}.", "")
    replaced = (CODEC,) * (vae is not None) + (tuple(named) if text_encoders else ())
    wanted = layouts.names(places)
    mine = {name: t for name, t in tensors.items() if not name.startswith(replaced)} if replaced else tensors
    averaged = any(name.startswith(EMA) for name in wanted)
    needed = {name: t for name, t in mine.items() if name in wanted or not superfluous(name, averaged)}
    beside = Counter(name.split(".")[0] for name in mine if name not in needed)
    for part in [given] * (vae is not None) + ([tower for _, tower in kinds] if text_encoders else []):
        needed |= {part.full(name): tensor for name, tensor in part.tensors.items() if not superfluous(name)}
    enlarges = network.num_classes > 0
    last = towers[-1]
    two = not xl and last.activation == "gelu"
    # what diffusers converted lacks the layer that is skipped, and the projection with it
    skipped = xl or (two and (last.projection is not None or last.depth == OPENCLIP_H.depth))
    words = CLIPTowersConfig(towers=tuple(towers), skip=int(skipped), normed=not xl, zero_empty=xl and len(towers) > 1)
    noise, codec, told = _continuous(path, tensors, codec)
    predicted: Any = prediction or told or ("v" if "v_pred" in tensors else "")
    depth = network.sees(codec.latent_channels) == "depth"  # the one that was published predicts eps
    predicted = predicted or ("v" if two and not depth and predicts_v(places, tensors) else "eps")
    assumed = [NOISE_ASSUMED] if enlarges else []
    few = LCM if network.guidance_width else PLAYGROUND if noise == PLAYGROUND_NOISE else None
    if few is None and (says := distilled.by_name(path, xl)) is not None:
        few, sentence = says
        assumed.append(sentence)
        predicted = prediction or few.prediction or predicted
    unsaid = not (prediction or enlarges or depth) and (two or bool(few and few.prediction))
    if unsaid and not (few and few.prediction):
        assumed.append(ASSUMED.format(predicted))
    return Foreign(
        source=path,
        network=network,
        autoencoder=codec,
        text=words,
        tokenizers=(bpe.shipped(),) * len(towers),
        noise=SMALL_NOISE if enlarges else noise or VPConfig(zero_snr="ztsnr" in tensors),
        small_noise=SMALL_NOISE if enlarges else None,
        prediction=predicted,
        layout=places,
        tensors=needed,
        files=(path,),
        beside=beside,
        assumed=tuple(assumed),
        sampler=few.sampler if few else "",
        schedule=few.schedule if few else "karras" if noise else "",
        steps=few.steps if few else 0,
        guidance=few.guidance if few else 0.0,
        size=few.size if few else 0,
        unsaid=unsaid,
    )


def _no_network(path: Path, tensors: Mapping[str, Tensor]) -> CheckpointMismatch:
    component = components.recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if component is not None:
        needs = f", and needs {component.needs}" if component.needs else ""
        return CheckpointMismatch(f"{path} is no whole model that can be drawn with: it is {component.what}{needs}")
    return CheckpointMismatch(
        f"{path} holds no network that is known (the first of its {len(tensors)} tensors is "
        f"{min(tensors, default='none')!r:.80}): give a file with all of a model"
    )


def _incomplete(path: Path, network: UNetConfig, codec: bool, towers: bool) -> CheckpointMismatch:
    """What the file of a U-Net lacks, and how to give it."""
    lacks = ["no autoencoder"] * codec + ["no text encoder"] * towers
    names = " and ".join(name for _, name in parts.wanted(network))
    give = ["its autoencoder with --vae FILE"] * codec + [f"{names} with --text-encoder FILE"] * towers
    kind = components.UNETS.get(network.text_width, "Stable Diffusion's kind")
    return CheckpointMismatch(
        f"{path} holds {' and '.join(lacks)} of Stable Diffusion, but a U-Net of {kind}: give {' and '.join(give)}"
    )


def _continuous(
    path: Path, tensors: Mapping[str, Tensor], codec: KLConfig
) -> tuple[EDMConfig | None, KLConfig, Literal["", "edm", "v"]]:
    """What the marks of Playground 2.5, or of models such as CosXL, say of noise, latents and prediction. Raises
    CheckpointMismatch."""
    try:
        if "edm_mean" in tensors and "edm_std" in tensors:
            mean, std = (tuple(tensors[name].double().flatten().tolist()) for name in ("edm_mean", "edm_std"))
            codec = replace(codec, scale=0.5, mean=mean, std=std)
            check_each(codec)
            return PLAYGROUND_NOISE, codec, "edm"
        if "edm_vpred.sigma_max" in tensors:
            low = float(tensors.get("edm_vpred.sigma_min", 0.002))
            return EDMConfig(low=low, high=float(tensors["edm_vpred.sigma_max"]), data=1.0), codec, "v"
    except (UsageError, RuntimeError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: its marks edm_* are of no model: {str(error).splitlines()[0]}") from error
    return None, codec, ""


def prefixes(found: Foreign) -> tuple[str, ...]:
    """Where a single file has the text towers of such a model."""
    if found.network.vector_width:
        both = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
        return both if len(found.text.towers) > 1 else ("conditioner.embedders.0.model.",)
    quick = found.text.towers[0].activation == "quick_gelu"
    return ("cond_stage_model.transformer." if quick else "cond_stage_model.model.",)


def export(found: Foreign, ours: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a single file of this model, with `ours` in place of those that it was read with. Raises
    CheckpointMismatch."""
    towers = {p: tower_layout(p, tower) for p, tower in zip(prefixes(found), found.text.towers, strict=True)}
    ours = layouts.read(found.layout, found.tensors, found.source) if ours is None else ours
    written = layouts.write(layout(found.network, found.autoencoder, towers), ours)
    return written | (marks(found) if found.network.vector_width else {})


def marks(found: Foreign) -> dict[str, Tensor]:
    """Tensors whose names, and of some the values, say of a Stable Diffusion XL what its weights do not."""
    if isinstance(found.noise, EDMConfig):
        values = {"edm_mean": found.autoencoder.mean, "edm_std": found.autoencoder.std}
        if found.prediction == "v":
            values = {"edm_vpred.sigma_min": (found.noise.low,), "edm_vpred.sigma_max": (found.noise.high,)}
        return {name: torch.tensor(value) for name, value in values.items()}
    kept = (("v_pred", found.prediction == "v"), ("ztsnr", found.noise.zero_snr))
    return {name: torch.zeros(0) for name, there in kept if there}


def superfluous(name: str, averaged: bool = False) -> bool:
    """Whether a tensor of this name says nothing that we need, in a file whose averages are the only weights or in
    another."""
    if averaged and name.startswith(EMA):
        return name in (f"{EMA}decay", f"{EMA}num_updates")
    reads = name.startswith(("cond_stage_model.", "conditioner.embedders."))
    return (
        name in BESIDE
        or name.startswith((EMA, SMALL, DEPTH, f"{CODEC}loss."))
        or (reads and name.rpartition(".")[2] in ("position_ids", "logit_scale", "attn_mask"))
    )


def predicts_v(places: Layout, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a Stable Diffusion 2 predicts v, which no name tells: this bias of published ones spreads more then."""
    place = places.get("network.up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias")
    bias = tensors.get(place.name) if place else None
    return bias is None or bias.float().std().item() > 0.09
