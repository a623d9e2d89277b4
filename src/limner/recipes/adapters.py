"""Adapters for models that are there: a few weights beside those that stay (LoRA, arXiv:2106.09685, and its kin)."""

from __future__ import annotations

from limner.adapters.trainable import AdapterConfig
from limner.data.batches import DataConfig
from limner.training.config import TrainConfig


def lora() -> TrainConfig:
    """For tens to thousands of pictures: give --model and --data. adapter.kind says what it is: lora, dora, loha, lokr
    or oft. The learning rate is what is usual for Stable Diffusion and FLUX.1."""
    return TrainConfig(
        name="lora",
        model="icons",
        adapter=AdapterConfig(),
        data=DataConfig(source="folder", size=0, latent_views=1),
        steps=1500,
        batch_size=4,
        lr=2e-4,
        betas=(0.9, 0.999),
        warmup=50,
        ema_half_life=200,
        save_every=250,
        log_every=10,
        sample_every=250,
    )


def lora_tiny() -> TrainConfig:
    return TrainConfig(
        name="lora-tiny",
        model="icons",
        adapter=AdapterConfig(rank=4),
        data=DataConfig(source="shapes", size=128, latent_views=1, limit=16),
        steps=20,
        batch_size=2,
        lr=1e-3,
        warmup=2,
        ema_half_life=4,
        save_every=20,
        log_every=5,
    )
