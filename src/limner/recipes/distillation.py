"""Models that are there taught to draw in four steps (LCM, arXiv:2310.04378; as an adapter, arXiv:2311.05556), or with
half the evaluations (guidance distillation, arXiv:2210.03142); and those on pixels in one or two steps, as it was first
done: by consistency, with a teacher (arXiv:2303.01469) or none (arXiv:2310.14189), and by halving steps
(arXiv:2202.00512)."""

from __future__ import annotations

from dataclasses import replace

from limner.adapters.trainable import AdapterConfig
from limner.data.batches import DataConfig
from limner.recipes import adapters, pixels
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


def consistency() -> TrainConfig:
    """A model of the recipe `edm` in one step or more: give --model RUN. As published for CIFAR-10, but for LPIPS and
    for 16 steps of the teacher instead of 17, so that 1, 2, 4 and 8 are drawn at levels that it learned."""
    return replace(
        pixels.edm(),
        name="consistency",
        system=None,
        model="edm",
        distillation=DistillationConfig(guidance=(1.0,), steps=16, huber=0.00054),
        steps=2_000,
        lr=2e-4,
        warmup=100,
        ema_half_life=50_000,
        precision="fp32",  # what is compared differs by less than bfloat16 tells apart
        save_every=1_000,
        sample_every=1_000,
    )


def consistency_training() -> TrainConfig:
    """The network of `edm` in one step or more, from nothing, or with init_from=RUN/final/edm.safetensors from what it
    learned. As published, but for the size of the run: the loss, and a trajectory of 10 steps at first, of 1280 in the
    last eighth."""
    return replace(
        consistency(),
        name="consistency-training",
        system=pixels.edm().system,
        model="",
        distillation=DistillationConfig(kind="consistency-training", guidance=(1.0,), steps=1280, huber=0.00054),
        steps=4_000,
    )


def progressive() -> TrainConfig:
    """A model of `flow-matching`, of `edm` or of any flow in one step: give --model RUN. 32 steps are halved 5 times,
    each time in 800 of the run, or until distillation.least=4 are left."""
    return replace(
        consistency(),
        name="progressive",
        model="flow-matching",
        distillation=DistillationConfig(kind="progressive", guidance=(1.0,), steps=32, average=0.98),
        steps=4_000,
        lr_schedule="constant",
        ema_half_life=10_000,
        precision="auto",
        save_every=800,
        sample_every=800,
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


def consistency_tiny() -> TrainConfig:
    how = DistillationConfig(guidance=(3.0,), steps=12)
    return _tiny(replace(consistency(), sample_prompts=()), distillation=how, lr=1e-4)


def consistency_training_tiny() -> TrainConfig:
    how = DistillationConfig(kind="consistency-training", guidance=(1.0,), steps=40, huber=0.00054)
    return replace(pixels.tiny(pixels.edm()), name="consistency-training-tiny", distillation=how, lr=1e-3)


def progressive_tiny() -> TrainConfig:
    how = DistillationConfig(kind="progressive", guidance=(3.0,), steps=16, least=4, average=0.5)
    return _tiny(replace(progressive(), sample_prompts=()), distillation=how, lr=1e-4)
