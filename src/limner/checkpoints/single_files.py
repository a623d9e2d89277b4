"""One file with all of a Stable Diffusion, in the names of Latent Diffusion's code: what most people own.

What it is follows from names and shapes. What those do not tell is assumed, and said: `prediction` of Stable Diffusion
2, and scales of autoencoders, which follow from what else is in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limner.checkpoints import autoencoder, components, distilled, layouts, text, unet
from limner.checkpoints.distilled import LCM, PLAYGROUND, PLAYGROUND_NOISE
from limner.checkpoints.foreign import Foreign
from limner.checkpoints.layouts import Layout, Place, prefixed
from limner.errors import CheckpointMismatch, UsageError
from limner.models.autoencoder import KL_SD1, KL_SDXL, KL_UPSCALER, KLConfig, check_each
from limner.models.unet import UNetConfig
from limner.sampling.interpolants import SMALL_NOISE, EDMConfig, VPConfig
from limner.text import bpe
from limner.text.clip import OPENCLIP_H, CLIPTextConfig, CLIPTowersConfig

NETWORK, CODEC, EMA, SMALL = "model.diffusion_model.", "first_stage_model.", "model_ema.", "low_scale_model."
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
Tower = tuple[Callable[[Mapping[str, tuple[int, ...]]], CLIPTextConfig], Callable[[CLIPTextConfig], Layout]]
CLIP: Tower = (text.clip_config, text.transformers_layout)
OPENCLIP: Tower = (text.openclip_config, text.openclip_layout)
FLAT: Tower = (  # as early merges have it
    lambda shapes: text.clip_config({f"text_model.{name}": shape for name, shape in shapes.items()}),
    lambda config: text.transformers_layout(config, flat=True),
)
TOWERS = {
    "cond_stage_model.transformer.": CLIP,  # Stable Diffusion 1
    "cond_stage_model.model.": OPENCLIP,  # 2
    "conditioner.embedders.0.transformer.": CLIP,  # XL
    "conditioner.embedders.1.model.": OPENCLIP,
    "conditioner.embedders.0.model.": OPENCLIP,  # its refiner
}


def layout(network: UNetConfig, codec: KLConfig, towers: Mapping[str, Layout]) -> dict[str, Place]:
    """The places of a whole system, its towers under these prefixes."""
    rows = prefixed(unet.ldm_layout(network), "network.", NETWORK)
    rows |= prefixed(autoencoder.ldm_layout(codec), "autoencoder.", CODEC)
    for i, (prefix, tower) in enumerate(towers.items()):
        rows |= prefixed(tower, f"text_encoder.{i}.", prefix)
    return rows


def recognise(
    path: Path, tensors: Mapping[str, Tensor], prediction: Literal["eps", "v", "x0"] | None = None
) -> Foreign:
    """What a file with these tensors is. Raises CheckpointMismatch."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def part(prefix: str) -> dict[str, tuple[int, ...]]:
        return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}

    named = [prefix for prefix in TOWERS if any(name.startswith(prefix) for name in shapes)]
    for what, found in (("U-Net", part(NETWORK)), ("autoencoder", part(CODEC)), ("text encoder", named)):
        if not found and (component := components.recognise(shapes)) is not None and what == "U-Net":
            needs = f", and needs {component.needs}" if component.needs else ""
            raise CheckpointMismatch(f"{path} is no whole model that can be drawn with: it is {component.what}{needs}")
        if not found:
            raise CheckpointMismatch(
                f"{path} holds no {what} of Stable Diffusion (the first of its {len(shapes)} tensors is "
                f"{min(shapes, default='none')!r:.80}): give a file with all of a model"
            )
    try:
        network = unet.ldm_config(part(NETWORK))
        xl = network.vector_width > 0
        codec = autoencoder.ldm_config(part(CODEC), _like(network).scale)
        kinds = [FLAT if f"{p}embeddings.token_embedding.weight" in shapes else TOWERS[p] for p in named]
        towers = [config(part(prefix)) for prefix, (config, _) in zip(named, kinds, strict=True)]
    except KeyError as error:
        raise CheckpointMismatch(f"{path} is like Stable Diffusion, but not whole: there is no {error}") from error
    except (ValueError, IndexError, UsageError) as error:
        raise CheckpointMismatch(f"{path} is like Stable Diffusion, but its shapes do not fit together") from error
    enlarges = network.num_classes > 0
    last = towers[-1]
    two = named == ["cond_stage_model.model."]
    # what diffusers converted lacks the layer that is skipped, and the projection with it
    skipped = xl or (two and (last.projection is not None or last.depth == OPENCLIP_H.depth))
    words = CLIPTowersConfig(towers=tuple(towers), skip=int(skipped), normed=not xl, zero_empty=xl and len(towers) > 1)
    noise, codec, told = _continuous(path, tensors, codec)
    predicted: Any = prediction or told or ("v" if "v_pred" in shapes or (two and predicts_v(tensors)) else "eps")
    assumed = [NOISE_ASSUMED] if enlarges else []
    few = LCM if network.guidance_width else PLAYGROUND if noise == PLAYGROUND_NOISE else None
    if few is None and (says := distilled.by_name(path, xl)) is not None:
        few, sentence = says
        assumed.append(sentence)
        predicted = prediction or few.prediction or predicted
    if two and not (prediction or enlarges or (few and few.prediction)):
        assumed.append(ASSUMED.format(predicted))
    return Foreign(
        source=path,
        network=network,
        autoencoder=codec,
        text=words,
        tokenizers=(bpe.shipped(),) * len(towers),
        noise=SMALL_NOISE if enlarges else noise or VPConfig(zero_snr="ztsnr" in shapes),
        small_noise=SMALL_NOISE if enlarges else None,
        prediction=predicted,
        layout=layout(network, codec, {p: rows(t) for p, (_, rows), t in zip(named, kinds, towers, strict=True)}),
        tensors={name: tensor for name, tensor in tensors.items() if not superfluous(name)},
        files=(path,),
        beside=Counter(name.split(".")[0] for name in tensors if superfluous(name)),
        assumed=tuple(assumed),
        sampler=few.sampler if few else "",
        schedule=few.schedule if few else "karras" if noise else "",
        steps=few.steps if few else 0,
        guidance=few.guidance if few else 0.0,
        size=few.size if few else 0,
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


def _like(network: UNetConfig) -> KLConfig:
    """The autoencoder that models with such a network have."""
    return KL_UPSCALER if network.num_classes else KL_SDXL if network.vector_width else KL_SD1


def prefixes(found: Foreign) -> tuple[str, ...]:
    """Where a single file has the text towers of such a model."""
    if found.network.vector_width:
        both = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
        return both if len(found.text.towers) > 1 else ("conditioner.embedders.0.model.",)
    quick = found.text.towers[0].activation == "quick_gelu"
    return ("cond_stage_model.transformer." if quick else "cond_stage_model.model.",)


def export(found: Foreign) -> dict[str, Tensor]:
    """The tensors of a single file of this model. Raises CheckpointMismatch."""
    towers = {p: TOWERS[p][1](tower) for p, tower in zip(prefixes(found), found.text.towers, strict=True)}
    ours = layouts.read(found.layout, found.tensors, found.source)
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


def superfluous(name: str) -> bool:
    """Whether a tensor of this name says nothing that we need."""
    reads = name.startswith(("cond_stage_model.", "conditioner.embedders."))
    return (
        name in BESIDE
        or name.startswith((EMA, SMALL, f"{CODEC}loss."))
        or (reads and name.rpartition(".")[2] in ("position_ids", "logit_scale", "attn_mask"))
    )


def predicts_v(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a Stable Diffusion 2 predicts v, which no name tells: this bias of published ones spreads more then."""
    bias = tensors.get(f"{NETWORK}output_blocks.11.1.transformer_blocks.0.norm1.bias")
    return bias is None or bias.float().std().item() > 0.09
