"""Latent diffusion with a U-Net that reads prompts, as Stable Diffusion 1 is (arXiv:2112.10752), and in miniature."""

from __future__ import annotations

from limner import catalog
from limner.data.batches import DataConfig
from limner.recipes import icons
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
