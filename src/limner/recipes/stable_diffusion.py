"""Latent diffusion with a U-Net that reads prompts, as Stable Diffusion 1, 2 (arXiv:2112.10752) and XL
(arXiv:2307.01952) are, and in miniature."""

from __future__ import annotations

from dataclasses import replace

from limner import catalog
from limner.data.batches import DataConfig
from limner.recipes import icons
from limner.systems.objectives import Objective
from limner.training.config import TrainConfig


def sd1() -> TrainConfig:
    """The U-Net from nothing, beside an autoencoder and CLIP that are trained already: give system.autoencoder_from and
    system.text_encoder_from. Learning rate, decay and averages are those of Stable Diffusion 1, whose batches were
    eight times as large, and whose pictures had 256 pixels first (data.size)."""
    return TrainConfig(
        name="sd1",
        system=catalog.entry("sd1").config,
        data=DataConfig(source="icons", size=512, latent_views=2),
        steps=200_000,
        batch_size=256,
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        warmup=10_000,
        lr_schedule="constant",
        ema_half_life=1_750_000,
        precision="bf16",
        save_every=2_000,
        sample_every=10_000,
        sample_prompts=icons.PROMPTS,
    )


def sd1_tiny() -> TrainConfig:
    return TrainConfig(
        name="sd1-tiny",
        system=catalog.entry("sd1-tiny").config,
        data=DataConfig(source="shapes", size=32, latent_views=1),
        steps=500,
        batch_size=32,
        lr=2e-3,
        warmup=20,
        ema_half_life=2_000,
        save_every=200,
        log_every=20,
        sample_prompts=("red circle", "outlined blue square", "solid green triangle", "yellow cross"),
    )


def sd2_v() -> TrainConfig:
    """As `sd1`, with Stable Diffusion 2's U-Net, which reads with OpenCLIP and predicts v (arXiv:2202.00512, appendix
    D), at 768 pixels. The published one predicted eps at 512 first, and learned v in its last 290,000 steps."""
    return replace(
        sd1(),
        name="sd2-v",
        system=catalog.entry("sd2-v").config,
        data=DataConfig(source="icons", size=768, latent_views=2),
    )


def sdxl() -> TrainConfig:
    """The last stage of Stable Diffusion XL (arXiv:2307.01952, section 2.5): pictures in shapes of about 1024 x 1024
    pixels in steps of 64, an offset noise of 0.05; before it come 600,000 steps at 256 pixels and 200,000 at 512, each
    of 2048 pictures (data.size, data.buckets=false, init_from). Learning rate and averages, of which the paper says
    nothing, are those of `sd1`. The network is told that pictures had the size at which it sees them, uncut."""
    return replace(
        sd1(),
        name="sdxl",
        system=catalog.entry("sdxl").config,
        data=DataConfig(source="folder", size=1024, buckets=True),
        loss=Objective(offset_noise=0.05),
        gradient_checkpointing=True,
    )


def sd2_v_tiny() -> TrainConfig:
    return replace(sd1_tiny(), name="sd2-v-tiny", system=catalog.entry("sd2-v-tiny").config)


def sdxl_tiny() -> TrainConfig:
    return replace(
        sd2_v_tiny(), name="sdxl-tiny", system=catalog.entry("sdxl-tiny").config, loss=Objective(offset_noise=0.05)
    )
