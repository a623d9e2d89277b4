"""What a model that is there learns: an adapter (LoRA, arXiv:2106.09685, and its kin), a word (textual inversion,
arXiv:2208.01618), what tells it of a picture (ControlNet, arXiv:2302.05543, and T2I-Adapter, arXiv:2302.08453), or all
of its network."""

from __future__ import annotations

from dataclasses import replace

from limner.adapters.trainable import AdapterConfig
from limner.data.batches import DataConfig
from limner.training.adapting import WordConfig
from limner.training.config import TrainConfig
from limner.training.controlling import ControlConfig
from limner.training.prior import PriorConfig


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
        precision="auto",
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


def dreambooth() -> TrainConfig:
    """A LoRA of one thing that three to ten pictures show, which leaves the rest of its class as it was: give --model,
    --data, data.trigger, as "a sks dog", and prior.prompt, as "a dog" (arXiv:2208.12242)."""
    return replace(lora(), name="dreambooth", prior=PriorConfig(prompt=""), steps=800, batch_size=2, lr=1e-4)


def dreambooth_tiny() -> TrainConfig:
    prior = PriorConfig(prompt="flat icon of a circle", images=2)
    return replace(lora_tiny(), name="dreambooth-tiny", prior=prior, steps=6)


def word() -> TrainConfig:
    """A name for what three to ten pictures show: give --model (a Stable Diffusion), --data, word.name, and word.like,
    what it is like."""
    return TrainConfig(
        name="word",
        model="sd1",
        word=WordConfig(),
        data=DataConfig(source="folder", size=0, latent_views=1),
        steps=3000,
        batch_size=4,
        lr=5e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        lr_schedule="constant",
        ema_half_life=40,
        precision="auto",
        save_every=500,
        log_every=10,
        sample_every=500,
    )


def control() -> TrainConfig:
    """A ControlNet, for thousands of pictures or more: give --model and --data; data.hints says what it is told of
    them. The learning rate is the authors' for a copy of Stable Diffusion; what begins anew, as for icons, wants 1e-3.
    """
    return TrainConfig(
        name="control",
        model="sd1",
        control=ControlConfig(),
        data=DataConfig(source="folder", size=0, latent_views=1, hints="canny"),
        steps=20_000,
        batch_size=8,
        lr=1e-5,
        betas=(0.9, 0.999),
        warmup=200,
        lr_schedule="constant",
        ema_half_life=5000,
        precision="auto",
        save_every=1000,
        log_every=20,
        sample_every=1000,
    )


def control_tiny() -> TrainConfig:
    return TrainConfig(
        name="control-tiny",
        model="icons",
        control=ControlConfig(depth=2),
        data=DataConfig(source="shapes", size=128, latent_views=1, limit=16, hints="canny"),
        steps=10,
        batch_size=2,
        lr=1e-3,
        warmup=2,
        ema_half_life=4,
        save_every=10,
        log_every=5,
    )


def t2i_adapter() -> TrainConfig:
    """A T2I-Adapter of a Stable Diffusion: as `control`; this learning rate is its authors', too."""
    return replace(control(), name="t2i-adapter", control=ControlConfig(kind="t2i_adapter"))


def finetune() -> TrainConfig:
    """All of a model's network, for thousands of pictures or more: give --model and --data."""
    return TrainConfig(
        name="finetune",
        model="icons",
        data=DataConfig(source="folder", size=0, latent_views=1),
        steps=5000,
        batch_size=8,
        lr=1e-5,
        betas=(0.9, 0.999),
        warmup=200,
        lr_schedule="constant",
        ema_half_life=5000,
        precision="auto",
        save_every=500,
        log_every=20,
        sample_every=500,
    )


def finetune_tiny() -> TrainConfig:
    return TrainConfig(
        name="finetune-tiny",
        model="icons",
        data=DataConfig(source="shapes", size=128, latent_views=1, limit=16),
        steps=10,
        batch_size=2,
        lr=1e-4,
        warmup=2,
        ema_half_life=4,
        save_every=10,
        log_every=5,
    )
