"""Models that are there taught to draw in four steps (LCM, arXiv:2310.04378; as an adapter, arXiv:2311.05556), or with
half the evaluations (guidance distillation, arXiv:2210.03142)."""

from __future__ import annotations

from dataclasses import replace

from limner.adapters.trainable import AdapterConfig
from limner.data.batches import DataConfig
from limner.recipes import adapters
from limner.training.config import TrainConfig
from limner.training.distilling import DistillationConfig


def lcm() -> TrainConfig:
    """All of a model's network, for four steps: give --model and --data. A network that is told no guidance learns one
    scale: distillation.guidance=7.5. As published: 50 steps of the teacher, its guidance 3 to 15, batches of 96,
    learning rate 8e-6."""
    return replace(
        adapters.finetune(),
        name="lcm",
        model="sd1",
        distillation=DistillationConfig(guidance=(3.0, 15.0)),
        steps=10_000,
        batch_size=96,
        lr=8e-6,
        weight_decay=0.0,
        warmup=0,
        ema_half_life=1300,  # 0.95 a step, as its target
    )


def lcm_lora() -> TrainConfig:
    """An adapter for four steps, of one scale of guidance: give --model and --data."""
    return replace(
        adapters.lora(),
        name="lcm-lora",
        adapter=AdapterConfig(rank=64),
        distillation=DistillationConfig(guidance=(7.5,), average=0.0),
        steps=1000,
        batch_size=12,
        lr=1e-4,
        lr_schedule="constant",
    )


def guidance() -> TrainConfig:
    """All of a model's network, which then needs one evaluation a step instead of two: give --model and --data. A U-Net
    or a FLUX.1 may be told many scales: distillation.guidance=1,15."""
    return replace(
        adapters.finetune(),
        name="guidance-distillation",
        distillation=DistillationConfig(kind="guidance", guidance=(3.0,)),
        lr=3e-5,
    )


def _tiny(config: TrainConfig, **changes: object) -> TrainConfig:
    """Of the model that ships, with shapes."""
    return replace(
        config,
        name=f"{config.name}-tiny",
        model="icons",
        data=DataConfig(source="shapes", size=128, latent_views=1, limit=16),
        steps=8,
        batch_size=2,
        warmup=0,
        ema_half_life=4,
        precision="fp32",
        save_every=8,
        log_every=4,
        sample_every=0,
        **changes,  # type: ignore[arg-type]
    )


def lcm_tiny() -> TrainConfig:
    return _tiny(lcm(), distillation=DistillationConfig(guidance=(3.0,), steps=12), lr=1e-4)


def lcm_lora_tiny() -> TrainConfig:
    return _tiny(
        lcm_lora(),
        distillation=DistillationConfig(guidance=(3.0,), steps=12, average=0.0),
        adapter=AdapterConfig(rank=4),
    )


def guidance_tiny() -> TrainConfig:
    return _tiny(guidance(), lr=1e-4)
