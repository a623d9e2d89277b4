"""Autoencoders as latent diffusion trains them (arXiv:2112.10752, appendix G), and in miniature."""

from __future__ import annotations

from dataclasses import replace

from limner import catalog
from limner.data.batches import DataConfig
from limner.training.config import TrainConfig


def kl_f8() -> TrainConfig:
    """The autoencoder of Stable Diffusion 1 from nothing: 83.7M parameters, 8 pixels a latent of 4 channels, pictures
    of 256 pixels on white, KL weight 1e-6, a discriminator of weight 0.5 from step 50,001 on. Without LPIPS, which the
    published one was trained with, it learns from L1 alone until then: give system.loss.perceptual_from=FILE. The
    learning rate is 4.5e-6 for each picture of a batch, as published; no decay and no clipping."""
    return TrainConfig(
        name="kl-f8",
        system=catalog.entry("kl-f8").config,
        data=DataConfig(source="icons", size=256, augment="autoencoder"),
        steps=200_000,
        batch_size=12,
        lr=5.4e-5,
        betas=(0.5, 0.9),
        weight_decay=0.0,
        lr_schedule="constant",
        ema_half_life=40_000,
        grad_clip=0.0,
        save_every=2_000,
        log_every=100,
    )


def vq_f4() -> TrainConfig:
    """The autoencoder of LDM-4 from nothing: 55.3M parameters, 4 pixels a latent of 3 channels, 8192 codes, a
    discriminator of weight 0.75 from the first step on; else as `kl_f8`, with batches of 8."""
    return replace(kl_f8(), name="vq-f4", system=catalog.entry("vq-f4").config, batch_size=8, lr=3.6e-5)


def kl_f8_tiny() -> TrainConfig:
    """8 pixels a latent of 8 channels, which a network of icons-tiny's latents takes as they are."""
    return TrainConfig(
        name="kl-f8-tiny",
        system=catalog.entry("kl-f8-tiny").config,
        data=DataConfig(source="shapes", size=32),
        steps=600,
        batch_size=8,
        lr=3e-3,
        betas=(0.5, 0.9),
        weight_decay=0.0,
        warmup=20,
        ema_half_life=1_000,
        grad_clip=0.0,
        save_every=200,
        log_every=20,
    )


def vq_f4_tiny() -> TrainConfig:
    return replace(kl_f8_tiny(), name="vq-f4-tiny", system=catalog.entry("vq-f4-tiny").config)
