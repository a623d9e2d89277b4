"""Latent diffusion of the Stable Diffusion 1 kind from nothing on the icon data, and `icons` at as many pictures seen.

    python ldm.py render DATA CACHE SIZE
    python ldm.py autoencoder DATA CACHE RUN SECONDS
    python ldm.py network DATA CACHE RUN CODEC SIZE STEPS [START]
    python ldm.py icons DATA CACHE RUN CODEC SIZE STEPS [START]

The autoencoder has a KL bottleneck, 8 pixels a latent of 4 channels, and RGBA in and out (11.1 million parameters); the
network is a U-Net with cross-attention to MiniLM's words (46.7 million, 19.9 GFLOP for a picture of 256 pixels, where
icons' transformer takes 19.6), told of 1,000 timesteps, and predicts eps; guidance is classifier-free. Steps are of
BATCH (1,024) pictures for both: first at 128 pixels at a constant rate, then at 256 from the averages of the first
(START) with a cosine. What is left: RUN/final/NAME.safetensors. A run that broke off goes on by the same command.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from limner import catalog, recipes
from limner.data.icons import open_icons
from limner.models.autoencoder import KLConfig
from limner.models.unet import UNetConfig
from limner.systems.autoencoding import AdversarialConfig
from limner.training.config import Objective, TrainConfig
from limner.training.loop import train

CODEC = KLConfig(image_channels=4, latent_channels=4, widths=(64, 64, 128, 256), blocks=1)
UNET = UNetConfig(widths=(128, 192, 320), depths=(1, 1, 1), head_width=64, text_width=384)
BATCH, LIMIT = int(os.environ.get("BATCH", "1024")), int(os.environ.get("LIMIT", "0"))


def render(data: str, cache: str, size: str) -> None:
    """What every run of that size would do first."""
    open_icons(Path(data)).image_set(split="train", size=int(size), cache=Path(cache))


def go(config: TrainConfig, run: str, data: str, cache: str, **its: object) -> None:
    """Begin or go on; ends the process where the time is up."""
    kept = replace(config.data, folder=data, cache=cache, limit=LIMIT, **its)  # type: ignore[arg-type]
    config = replace(config, data=kept, save_every=10**6, sample_prompts=(), sample_every=0)
    if LIMIT:  # a rehearsal
        config = replace(config, compile=False, precision="fp32")
    sys.exit(train(config, Path(run), resume=Path(run, "config.json").exists()))


def autoencoder(data: str, cache: str, run: str, seconds: str) -> None:
    """`RATE` pictures a second for 0.7 of the time, and then half as many, against a discriminator."""
    usual, batch, rate = recipes.get("kl-f8"), 32, float(os.environ.get("RATE", "420"))
    assert isinstance(usual.system, catalog.AutoencodingConfig)
    first = int(0.7 * float(seconds) * rate / batch)
    steps = first + int(0.3 * float(seconds) * rate / 2 / batch)
    loss = AdversarialConfig(disc_start=first, disc_weight=0.3)
    config = replace(
        usual, name="icons-kl", system=replace(usual.system, name="icons-kl", autoencoder=CODEC, loss=loss),
        steps=steps, batch_size=batch, lr=5e-4, warmup=100, grad_clip=1.0,
        lr_schedule="cosine", lr_final=0.05, precision="bf16", compile=True, ema_half_life=10_000,
    )  # fmt: skip
    go(config, run, data, cache, size=256)


def stage(config: TrainConfig, size: str, steps: str, start: str) -> TrainConfig:
    schedule = "cosine" if start else "constant"
    return replace(
        config, steps=int(steps), batch_size=BATCH, lr_schedule=schedule, init_from=start, warmup=50 if start else 150
    )


def network(data: str, cache: str, run: str, codec: str, size: str, steps: str, start: str = "") -> None:
    usual, icons = recipes.get("sd1-tiny"), catalog.entry("icons").config
    assert isinstance(usual.system, catalog.DiffusionConfig)
    system = replace(
        usual.system, name="icons-ldm", family="Stable Diffusion 1", network=UNET, autoencoder=CODEC,
        autoencoder_from=codec, max_tokens=24,
        defaults=replace(icons.defaults, schedule="auto", guidance=4.0, steps=20),
    )  # fmt: skip
    config = replace(
        usual, name="icons-ldm", system=system, lr=5e-4, betas=(0.9, 0.99), weight_decay=0.01, ema_half_life=300_000,
        loss=Objective(min_snr_gamma=5.0), precision="bf16", lr_final=0.02, log_every=50,
    )  # fmt: skip
    of = recipes.get("icons").data
    config = replace(config, data=replace(of, latent_views=2, other_sizes=()))
    go(stage(config, size, steps, start), run, data, cache, size=int(size))


def icons(data: str, cache: str, run: str, codec: str, size: str, steps: str, start: str = "") -> None:
    usual = recipes.get("icons")
    assert isinstance(usual.system, catalog.DiffusionConfig)
    config = replace(usual, name="icons-beside", system=replace(usual.system, autoencoder_from=codec))
    config = replace(config, data=replace(config.data, latent_views=2, other_sizes=()))
    go(stage(config, size, steps, start), run, data, cache, size=int(size))


if __name__ == "__main__":
    {"render": render, "autoencoder": autoencoder, "network": network, "icons": icons}[sys.argv[1]](*sys.argv[2:])
