"""Small Stable Diffusions with every parameter filled with noise, as diffusers builds and saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limner.text import bpe


def noised(module: nn.Module, seed: int) -> nn.Module:
    """Outputs of about unit variance, and no parameter left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            value *= parameter[0].numel() ** -0.5 if "embedding" not in name or parameter.dim() > 2 else 1
        else:
            value = value * 0.1 + (name.endswith("weight"))
        parameter.data = value
    return module.eval()


def tokenizer(folder: Path, pad: str) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    ours = json.loads(bpe.shipped().tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(ours["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in ours["merges"]))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=77)


def tower(cls: str, width: int, activation: str, depth: int = 2) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, num_attention_heads=width // 64,
        hidden_act=activation, projection_dim=width, eos_token_id=49407, bos_token_id=49406, pad_token_id=1,
    )  # fmt: skip
    return noised(getattr(transformers, cls)(config), seed=width + depth)


def network(**changes: Any) -> nn.Module:
    import diffusers

    values = {
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 64,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return noised(diffusers.UNet2DConditionModel(**values | changes), seed=1)


def autoencoder(scale: float) -> nn.Module:
    import diffusers

    return noised(
        diffusers.AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
            up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=scale, sample_size=32,
        ),
        seed=2,
    )  # fmt: skip


def saved(pipe: Any, folder: Path, scheduler: dict[str, Any]) -> Path:
    """The folder of a pipeline, whose scheduler says no more than the published one."""
    pipe.save_pretrained(folder / "model")
    (folder / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder / "model"


SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


def sd1(folder: Path) -> Path:
    """A folder of Stable Diffusion 1, 32 px."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(0.18215),
        text_encoder=tower("CLIPTextModel", 64, "quick_gelu"),
        tokenizer=tokenizer(folder / "words", "<|endoftext|>"),
        unet=network(),
        scheduler=diffusers.PNDMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return saved(pipe, folder, SD1_SCHEDULER)


SD2_SCHEDULER = SD1_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def sd2_v(folder: Path) -> Path:
    """A folder of Stable Diffusion 2, which predicts v."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(0.18215),
        text_encoder=tower("CLIPTextModel", 64, "gelu"),
        tokenizer=tokenizer(folder / "words", "!"),
        unet=network(block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return saved(pipe, folder, SD2_SCHEDULER)


SDXL_SCHEDULER = SD1_SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "interpolation_type": "linear",
    "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False,
}  # fmt: skip
SDXL_NETWORK = {
    "block_out_channels": (64, 128), "attention_head_dim": (1, 2), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
}  # fmt: skip


def sdxl(folder: Path) -> Path:
    """A folder of Stable Diffusion XL."""
    import diffusers

    pipe = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(0.13025),
        text_encoder=tower("CLIPTextModel", 64, "quick_gelu"),
        text_encoder_2=tower("CLIPTextModelWithProjection", 128, "gelu", depth=3),
        tokenizer=tokenizer(folder / "words", "<|endoftext|>"),
        tokenizer_2=tokenizer(folder / "words2", "!"),
        unet=network(**SDXL_NETWORK, cross_attention_dim=64 + 128, projection_class_embeddings_input_dim=128 + 6 * 256),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    return saved(pipe, folder, SDXL_SCHEDULER)


def sdxl_refiner(folder: Path) -> Path:
    """A folder of Stable Diffusion XL's refiner."""
    import diffusers

    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=autoencoder(0.13025),
        text_encoder=None,
        text_encoder_2=tower("CLIPTextModelWithProjection", 128, "gelu", depth=3),
        tokenizer=None,
        tokenizer_2=tokenizer(folder / "words2", "!"),
        unet=network(**SDXL_NETWORK, cross_attention_dim=128, projection_class_embeddings_input_dim=128 + 5 * 256),
        scheduler=diffusers.EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    return saved(pipe, folder, SDXL_SCHEDULER)


EDIT_SCHEDULER = SD1_SCHEDULER | {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "epsilon"}


def instruct_pix2pix(folder: Path) -> Path:
    """A folder of InstructPix2Pix."""
    import diffusers

    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=autoencoder(0.18215),
        text_encoder=tower("CLIPTextModel", 64, "quick_gelu"),
        tokenizer=tokenizer(folder / "words", "<|endoftext|>"),
        unet=network(in_channels=8),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return saved(pipe, folder, EDIT_SCHEDULER)


def instruct_pix2pix_xl(folder: Path) -> Path:
    """The same of Stable Diffusion XL."""
    import diffusers

    parts = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl(folder / "base")).components
    config = {"cross_attention_dim": 64 + 128, "projection_class_embeddings_input_dim": 128 + 6 * 256}
    parts["unet"] = network(**SDXL_NETWORK | config, in_channels=8)
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    return saved(diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts), folder, SDXL_SCHEDULER)


def sd2_depth(folder: Path) -> Path:
    """A folder of Stable Diffusion 2 after a depth map, with a network that finds depth in pictures."""
    import diffusers
    import transformers

    finds = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionDepth2ImgPipeline(
        vae=autoencoder(0.18215),
        text_encoder=tower("CLIPTextModel", 64, "gelu"),
        tokenizer=tokenizer(folder / "words", "!"),
        unet=network(
            in_channels=5, block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True
        ),
        scheduler=diffusers.PNDMScheduler(),
        depth_estimator=transformers.DPTForDepthEstimation(finds),
        feature_extractor=transformers.DPTImageProcessor(),
    )
    return saved(pipe, folder, SD1_SCHEDULER)


SMALL_SCHEDULER = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.02, "beta_schedule": "scaled_linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "trained_betas": None, "variance_type": "fixed_small",
}  # fmt: skip
UPSCALER_SCHEDULER = SD2_SCHEDULER | {"beta_start": 0.0001, "beta_end": 0.02}


def upscaler(folder: Path) -> Path:
    """A folder of Stable Diffusion's x4 upscaler, 8 px to 32."""
    import diffusers

    vae = noised(
        diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 64), down_block_types=["DownEncoderBlock2D"] * 3, layers_per_block=1,
            up_block_types=["UpDecoderBlock2D"] * 3, scaling_factor=0.08333, sample_size=32,
        ),
        seed=2,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=tower("CLIPTextModel", 64, "gelu"),
        tokenizer=tokenizer(folder / "words", "!"),
        unet=network(
            in_channels=7, num_class_embeds=1000, block_out_channels=(64, 128), attention_head_dim=8, sample_size=8,
            only_cross_attention=(False, True), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, watermarker=None,
    )  # fmt: skip
    saved(pipe, folder, UPSCALER_SCHEDULER)
    (folder / "model" / "low_res_scheduler" / "scheduler_config.json").write_text(json.dumps(SMALL_SCHEDULER))
    return folder / "model"


LCM_SCHEDULER = SD1_SCHEDULER | {
    "_class_name": "LCMScheduler", "original_inference_steps": 50, "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False, "timestep_scaling": 10.0, "timestep_spacing": "leading", "set_alpha_to_one": True,
}  # fmt: skip


def lcm(folder: Path) -> Path:
    """A folder of a latent consistency model, whose network is told its guidance."""
    import diffusers

    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=autoencoder(0.18215),
        text_encoder=tower("CLIPTextModel", 64, "quick_gelu"),
        tokenizer=tokenizer(folder / "words", "<|endoftext|>"),
        unet=network(time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return saved(pipe, folder, LCM_SCHEDULER)


PLAYGROUND_SCHEDULER = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "_diffusers_version": "0.27.0",
    "algorithm_type": "dpmsolver++", "dynamic_thresholding_ratio": 0.995, "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0,
    "sample_max_value": 1.0, "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002, "solver_order": 2,
    "solver_type": "midpoint", "thresholding": False,
}  # fmt: skip


def playground(folder: Path, **scheduler: Any) -> Path:
    """A folder of Playground 2.5: a Stable Diffusion XL with the noise of EDM and latents of mean 0."""
    import diffusers

    model = sdxl(folder)
    path = model / "vae" / "config.json"
    each = {"latents_mean": [-1.6, 1.4, 0.2, -0.6], "latents_std": [8.4, 5.9, 4.3, 3.8], "scaling_factor": 0.5}
    path.write_text(json.dumps(json.loads(path.read_text()) | each))
    told = PLAYGROUND_SCHEDULER | scheduler
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", told["_class_name"]]
    (model / "model_index.json").write_text(json.dumps(index))
    assert hasattr(diffusers, told["_class_name"])
    return model


DIT_SCHEDULER = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.12.0", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": True, "steps_offset": 0, "trained_betas": None,
}  # fmt: skip


def dit_network() -> nn.Module:
    """All blocks embed time and class alike, as in published files."""
    import diffusers

    network = noised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=64, out_channels=8, num_layers=2, sample_size=16
        ),
        seed=4,
    )
    first, *others = (block.norm1.emb for block in network.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())
    return network


def dit(folder: Path) -> Path:
    """A folder of a DiT, which names a few classes."""
    import diffusers

    pipe = diffusers.DiTPipeline(dit_network(), autoencoder(0.18215), diffusers.DDIMScheduler())
    model = saved(pipe, folder, DIT_SCHEDULER)
    index = json.loads((model / "model_index.json").read_text())
    index["id2label"] = {"207": "golden retriever", "360": "otter", "0": "tench, Tinca tinca"}
    (model / "model_index.json").write_text(json.dumps(index))
    return model
