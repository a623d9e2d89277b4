"""The embedded model: a deep-compression autoencoder, then a flow transformer on its latents."""

from __future__ import annotations

from limner import catalog
from limner.data.batches import DataConfig
from limner.training.config import TrainConfig

PROMPTS = (
    "3d emoji of a red fox",
    "flat emoji: pizza",
    "waving hand, medium skin tone, 3d emoji",
    "round flag of japan",
    "a blue line icon of a bicycle",
    "green heart, glossy emoji",
    "clip art of a sailing boat",
    "grinning face, blob emoji",
)


def autoencoder() -> TrainConfig:
    return TrainConfig(
        name="icons-autoencoder",
        system=catalog.entry("icons-autoencoder").config,
        data=DataConfig(source="icons", size=256, augment="autoencoder"),
        steps=12_000,
        batch_size=96,
        lr=8e-4,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        warmup=300,
        lr_final=0.01,
        ema_half_life=40_000,
        precision="bf16",
        compile=True,
        save_every=2000,
        log_every=100,
    )


def autoencoder_tiny() -> TrainConfig:
    return TrainConfig(
        name="icons-autoencoder-tiny",
        system=catalog.entry("icons-autoencoder-tiny").config,
        data=DataConfig(source="shapes", size=32, augment="autoencoder"),
        steps=600,
        batch_size=32,
        lr=3e-3,
        warmup=20,
        ema_half_life=1_000,
        save_every=200,
        log_every=20,
    )


def icons() -> TrainConfig:
    return TrainConfig(
        name="icons",
        system=catalog.DiffusionConfig(autoencoder_from="runs/icons-autoencoder/final/icons-autoencoder.safetensors"),
        data=DataConfig(
            source="icons",
            size=256,
            latent_views=6,
            other_sizes=(
                (128, 128, 0.06),
                (384, 256, 0.04),
                (256, 384, 0.04),
                (512, 128, 0.02),
                (128, 512, 0.02),
                (512, 512, 0.06),
            ),
        ),
        steps=14_000,
        batch_size=1024,
        optimizer="muon",
        muon_lr_scale=3.0,
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        warmup=100,
        lr_final=0.02,
        ema_half_life=300_000,
        precision="bf16",
        compile=True,
        save_every=1000,
        sample_every=2000,
        log_every=50,
        sample_prompts=PROMPTS,
    )


def icons_tiny() -> TrainConfig:
    return TrainConfig(
        name="icons-tiny",
        system=catalog.entry("icons-tiny").config,
        data=DataConfig(source="shapes", size=32, latent_views=1),
        steps=800,
        batch_size=32,
        lr=2e-3,
        warmup=20,
        ema_half_life=2_000,
        save_every=200,
        log_every=20,
        sample_prompts=("red circle", "outlined blue square", "solid green triangle", "yellow cross"),
    )
