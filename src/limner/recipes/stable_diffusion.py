"""Latent diffusion with a U-Net, as Stable Diffusion is, in miniature."""

from __future__ import annotations

from limner import catalog
from limner.data.batches import DataConfig
from limner.training.config import TrainConfig


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
