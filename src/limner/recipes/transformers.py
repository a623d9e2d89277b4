"""Latent diffusion with a transformer: Stable Diffusion 3 (arXiv:2403.03206), FLUX.1 and DiT (arXiv:2212.09748), and
each in miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from limner import catalog
from limner.data.batches import DataConfig
from limner.models.dit import DIT_XL_2
from limner.recipes import icons, stable_diffusion
from limner.sampling.interpolants import Times
from limner.systems.objectives import Objective
from limner.training.config import TrainConfig


def sd3() -> TrainConfig:
    """The MMDiT of Stable Diffusion 3 medium from nothing, beside an autoencoder, both CLIPs and T5 that are trained
    already: give system.autoencoder_from and system.text_encoder_from. Optimizer, warmup and batch are those of the
    paper's section 5.1. Times are logit-normal, and at 1024 pixels moved towards noise by 3 (section 5.3.2): by 1.5 at
    512 and not at all at 256, where the paper begins (loss.times.shift, data.size). Captions are left out for all text
    encoders at once, where the paper has each without at 46 %."""
    return TrainConfig(
        name="sd3",
        system=catalog.entry("sd3-medium").config,
        data=DataConfig(source="folder", size=1024, buckets=True),
        loss=Objective(times=Times(kind="logit_normal", shift=3.0)),
        steps=500_000,
        batch_size=1024,
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        warmup=1000,
        lr_schedule="constant",
        ema_half_life=7_100_000,  # 0.99 every hundred steps
        precision="bf16",
        gradient_checkpointing=True,
        save_every=2_000,
        sample_every=10_000,
        sample_prompts=icons.PROMPTS,
    )


def flux() -> TrainConfig:
    """The transformer of FLUX.1 dev from nothing, as `sd3` since nobody published how it was: times are moved by what
    its schedules are at 1024 pixels. It is told a guidance of 1 until `guidance-distillation` teaches it others. Its
    11.9 billion parameters want sharding=fsdp on many GPUs."""
    return replace(
        sd3(),
        name="flux",
        system=catalog.entry("flux-dev").config,
        loss=Objective(times=Times(kind="logit_normal", shift=3.16)),  # e^1.15
    )


def dit() -> TrainConfig:
    """DiT-XL/2 from nothing, told one of 1000 classes, beside Stable Diffusion's autoencoder: give
    system.autoencoder_from. A caption is the number of a class or its name. Learning rate, batch, averages, mirroring
    and dropped labels are those of the paper's section 4. It learns eps alone: there is no loss of a variance, and the
    network has none."""
    system: Any = catalog.entry("dit").config
    return TrainConfig(
        name="dit",
        system=replace(system, network=replace(DIT_XL_2, out_channels=4)),
        data=DataConfig(source="folder", size=256, mirror=True, latent_views=2),
        steps=400_000,
        batch_size=256,
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        grad_clip=0.0,
        lr_schedule="constant",
        ema_half_life=1_770_000,  # 0.9999 a step
        ema_warmup=0.0,
        precision="bf16",
        save_every=2_000,
        sample_every=10_000,
        sample_prompts=("207", "360", "387", "974", "88", "979", "417", "279"),
    )


def sd3_tiny() -> TrainConfig:
    return replace(
        stable_diffusion.sd1_tiny(),
        name="sd3-tiny",
        system=catalog.entry("sd3-tiny").config,
        loss=Objective(times=Times(kind="logit_normal")),
        batch_size=24,
    )


def flux_tiny() -> TrainConfig:
    return replace(sd3_tiny(), name="flux-tiny", system=catalog.entry("flux-tiny").config)


def dit_tiny() -> TrainConfig:
    return replace(
        stable_diffusion.sd1_tiny(),
        name="dit-tiny",
        system=catalog.entry("dit-tiny").config,
        steps=800,
        weight_decay=0.0,
    )
