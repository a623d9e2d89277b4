"""Diffusion on pixels: the first of 2015 on digits, and the icons in 32 pixels on white, told their style, with one
training for all to be compared by; and each in miniature."""

from __future__ import annotations

from dataclasses import replace

from limner import catalog
from limner.data.batches import DataConfig
from limner.sampling.interpolants import Times
from limner.systems.objectives import Objective
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


def ddpm() -> TrainConfig:
    """Denoising diffusion with the U-Net that the paper has for CIFAR-10 (arXiv:2006.11239), 2 million pictures."""
    return TrainConfig(
        name="ddpm",
        system=catalog.entry("ddpm").config,
        data=DataConfig(source="icons", size=32, caption_from="style", even=True),
        steps=8_000,
        batch_size=256,
        lr=5e-4,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        warmup=400,
        lr_final=0.02,
        ema_half_life=200_000,
        precision="auto",
        log_every=100,
        save_every=4_000,
        sample_every=4_000,
        sample_prompts=catalog.STYLES.names,
    )


def ddpm_mini() -> TrainConfig:
    """The same with a million parameters: a megabyte in 8 bits."""
    return replace(
        ddpm(), name="ddpm-mini", system=catalog.entry("ddpm-mini").config, steps=40_000, lr=2e-3, ema_half_life=500_000
    )


def iddpm() -> TrainConfig:
    """Noise by a cosine, and a variance that is learned beside (arXiv:2102.09672): L_hybrid."""
    config = catalog.entry("iddpm").config
    return replace(ddpm(), name="iddpm", system=config, loss=Objective(variance_weight=0.001))


def adm() -> TrainConfig:
    """ADM's U-Net (arXiv:2105.05233, section 3) and L_hybrid, on the noise of DDPM."""
    return replace(iddpm(), name="adm", system=catalog.entry("adm").config)


def adm_classifier() -> TrainConfig:
    """What leads `adm` and its like (arXiv:2105.05233, section 4): the same pictures at every timestep of its noise,
    and their style as class, with the paper's batch, learning rate and decay of weights."""
    config = catalog.entry("adm-classifier").config
    return replace(ddpm(), name="adm-classifier", system=config, lr=3e-4, weight_decay=0.05, sample_prompts=())


def edm() -> TrainConfig:
    """The same network inside EDM's preconditioning, at a log-normal sigma (arXiv:2206.00364)."""
    return replace(ddpm(), name="edm", system=catalog.entry("edm").config)


def flow_matching() -> TrainConfig:
    """The same network for the velocity of the path of optimal transport, at all times alike (arXiv:2210.02747)."""
    config = catalog.entry("flow-matching").config
    return replace(ddpm(), name="flow-matching", system=config, loss=Objective(times=Times(kind="uniform")))


def vp_sde() -> TrainConfig:
    """The same network for the score of an SDE that preserves variance, in a continuous time (arXiv:2011.13456,
    equation 11), the error times its variance, as there: that of eps, all times alike."""
    return replace(ddpm(), name="vp-sde", system=catalog.entry("vp-sde").config)


def subvp_sde() -> TrainConfig:
    """Of one whose variance stays below that (equation 12)."""
    return replace(ddpm(), name="subvp-sde", system=catalog.entry("subvp-sde").config)


def ve_sde() -> TrainConfig:
    """Of one whose variance explodes (equation 9), which the network sees as it is and is told by log sigma."""
    return replace(ddpm(), name="ve-sde", system=catalog.entry("ve-sde").config)


def dit() -> TrainConfig:
    """DiT-S/2 on the pixels themselves (arXiv:2212.09748), for the noise and the training of DDPM."""
    return replace(ddpm(), name="dit-32", system=catalog.entry("dit-32").config)


def sit() -> TrainConfig:
    """The same for the velocity of a straight path (arXiv:2401.08740), as `flow_matching`."""
    return replace(flow_matching(), name="sit-32", system=catalog.entry("sit-32").config)


def tiny(full: TrainConfig) -> TrainConfig:
    """In miniature, on coloured shapes."""
    return replace(
        small(full),
        system=catalog.entry(f"{full.name}-tiny").config,
        data=DataConfig(source="shapes", size=16),
        steps=800,
        lr=2e-3,
        ema_half_life=2_000,
    )


def small(full: TrainConfig) -> TrainConfig:
    """What training in miniature has in common."""
    return replace(
        full,
        name=f"{full.name}-tiny",
        batch_size=16,
        warmup=20,
        precision="fp32",
        log_every=20,
        save_every=200,
        sample_every=0,
        sample_prompts=("red circle", "blue square", "green triangle", "yellow cross"),
    )


def adm_classifier_tiny() -> TrainConfig:
    return replace(tiny(adm_classifier()), batch_size=32, lr=1e-3, sample_prompts=())


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
