"""Small models of Stable Diffusion 3 and FLUX.1 with every parameter filled with noise, as diffusers builds and saves
them, and in the single files that people own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from limner.checkpoints import flows, layouts
from limner.text import unigram

from .stable_diffusion import noised, tokenizer, tower

CLIP_WIDTH, BIG_WIDTH, T5_WIDTH = 64, 128, 256
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0"}


def autoencoder(scale: float, shift: float) -> nn.Module:
    import diffusers

    return noised(
        diffusers.AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
            up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=scale, shift_factor=shift, sample_size=32,
            latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
        ),
        seed=2,
    )  # fmt: skip


def t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        d_model=T5_WIDTH, d_ff=64, num_layers=2, num_heads=4, d_kv=8, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = noised(transformers.T5EncoderModel(config), seed=5)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def t5_tokenizer(folder: Path) -> Any:
    from transformers import T5TokenizerFast

    folder.mkdir(parents=True)
    for name, content in unigram.shipped().files(512).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return T5TokenizerFast.from_pretrained(folder)


def sd3_transformer(**changes: Any) -> nn.Module:
    import diffusers

    values = {
        "sample_size": 16, "patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 64,
        "num_attention_heads": 2, "joint_attention_dim": T5_WIDTH, "caption_projection_dim": 128,
        "pooled_projection_dim": CLIP_WIDTH + BIG_WIDTH, "out_channels": 16, "pos_embed_max_size": 32,
    }  # fmt: skip
    return noised(diffusers.SD3Transformer2DModel(**values | changes), seed=1)


def sd3(folder: Path, with_t5: bool = True, **changes: Any) -> Path:
    """A folder of Stable Diffusion 3, 32 px."""
    import diffusers

    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=sd3_transformer(**changes),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609),
        text_encoder=tower("CLIPTextModelWithProjection", CLIP_WIDTH, "quick_gelu"),
        tokenizer=tokenizer(folder / "words", "<|endoftext|>"),
        text_encoder_2=tower("CLIPTextModelWithProjection", BIG_WIDTH, "gelu", depth=3),
        tokenizer_2=tokenizer(folder / "words2", "!"),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer(folder / "words3") if with_t5 else None,
    )
    return saved(pipe, folder, SCHEDULER | {"shift": 3.0, "num_train_timesteps": 1000})


def flux_transformer(guided: bool, in_channels: int = 64) -> nn.Module:
    import diffusers

    return noised(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=in_channels, out_channels=64, num_layers=2, num_single_layers=2,
            attention_head_dim=128, num_attention_heads=2, joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH, guidance_embeds=guided,
        ),
        seed=1,
    )  # fmt: skip


def flux(folder: Path, guided: bool = True, in_channels: int = 64, kind: str = "FluxPipeline") -> Path:
    """A folder of FLUX.1, 32 px."""
    import diffusers

    shifted = {"use_dynamic_shifting": guided, "shift": 3.0 if guided else 1.0}
    pipe = getattr(diffusers, kind)(
        transformer=flux_transformer(guided, in_channels),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shifted),
        vae=autoencoder(0.3611, 0.1159),
        text_encoder=tower("CLIPTextModel", CLIP_WIDTH, "quick_gelu"),
        tokenizer=tokenizer(folder / "words", "<|endoftext|>"),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(folder / "words2"),
    )
    return saved(pipe, folder, SCHEDULER | shifted | {"base_shift": 0.5, "max_shift": 1.15})


def saved(pipe: Any, folder: Path, scheduler: dict[str, Any]) -> Path:
    pipe.save_pretrained(folder / "model")
    (folder / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder / "model"


# -------------------------------------------------------------------- single files


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of each part: the network in its authors' names, the autoencoder in Latent Diffusion's."""
    from limner.checkpoints import autoencoder as codecs

    found = flows.of_folder(folder)
    ours = layouts.read(found.layout, found.tensors, folder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in ours.items():
        part, _, rest = name.partition(".")
        part, rest = (rest.split(".", 1)) if part == "text_encoder" else (part, rest)
        parts.setdefault(part, {})[rest] = tensor.contiguous().clone()
    parts["autoencoder"] = {
        name: tensor.contiguous().clone()
        for name, tensor in layouts.write(codecs.ldm_layout(found.autoencoder), parts["autoencoder"]).items()
    }
    return parts


def split_files(folder: Path, out: Path, prefix: str = "") -> dict[str, Path]:
    """The network, the autoencoder and the text encoders in files of their own."""
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, tensors in tensors_of(folder).items():
        files[part] = out / f"{part}.safetensors"
        start = prefix if part == "network" else ""
        save_file({start + name: tensor for name, tensor in tensors.items()}, files[part])
    return files


PLACES = {
    "network": "model.diffusion_model.", "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.", "t5xxl": "text_encoders.t5xxl.transformer.",
}  # fmt: skip


def one_file(folder: Path, path: Path, codec: str = "first_stage_model.") -> Path:
    """All in one, as ComfyUI's users have it."""
    rows = PLACES | {"autoencoder": codec}
    save_file(
        {rows[part] + name: tensor for part, tensors in tensors_of(folder).items() for name, tensor in tensors.items()},
        path,
    )
    return path
