"""Diffusion models of pixels from the papers that made them, and in miniature."""

from __future__ import annotations

from limner import catalog
from limner.data.batches import DataConfig
from limner.training.config import TrainConfig


def sohl_dickstein() -> TrainConfig:
    """The first of them on MNIST (arXiv:1503.03585): 1.7M parameters and 1000 steps, the bound as loss. As in the
    authors' code batches of 512, whose learning rate falls from 1e-3 to 1e-5, and steps that are not finite left out;
    RMSProp is Adam without momentum. They show what it draws after 825 epochs, 96,000 steps."""
    return TrainConfig(
        name="sohl-dickstein-2015",
        system=catalog.entry("sohl-dickstein-2015").config,
        data=DataConfig(source="mnist", size=28),
        steps=96_000,
        batch_size=512,
        lr=1e-3,
        betas=(0.0, 0.9),
        weight_decay=0.0,
        lr_final=0.01,
        grad_clip=0.0,
        on_nan="skip",
        save_every=2_000,
        log_every=100,
        sample_every=10_000,
        sample_prompts=("",) * 16,
    )


def sohl_dickstein_tiny() -> TrainConfig:
    return TrainConfig(
        name="sohl-dickstein-2015-tiny",
        system=catalog.entry("sohl-dickstein-2015-tiny").config,
        data=DataConfig(source="shapes", size=16),
        steps=800,
        batch_size=32,
        lr=3e-3,
        weight_decay=0.0,
        warmup=20,
        ema_half_life=2_000,
        save_every=200,
        log_every=50,
        sample_prompts=("",) * 16,
    )
