"""Latent diffusion of the Stable Diffusion 1 kind from nothing on the icon data, and `icons` at as many pictures seen.

    python ldm.py autoencoder DATA CACHE RUN SECONDS_OF_IT
    torchrun --nproc-per-node N ldm.py network DATA CACHE RUN AUTOENCODER STEPS_128 STEPS_256
    torchrun --nproc-per-node N ldm.py icons DATA CACHE RUN AUTOENCODER STEPS_128 STEPS_256

The autoencoder has a KL bottleneck, 8 pixels a latent of 4 channels, and RGBA in and out (15.5 million parameters); the
network is a U-Net with cross-attention to MiniLM's words (46.7 million, 19.9 GFLOP for a picture of 256 pixels, where
icons' transformer takes 19.6), told of 1,000 timesteps, and predicts eps; guidance is classifier-free. Steps are of
1,024 pictures for both, first at 128 pixels, then at 256, as the recipe of each has the rest. What is left:
RUN/final/NAME.safetensors, and RUN-128 beside it. STOP_AFTER in the environment is the seconds after which to save and
stop; the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from limner import catalog, recipes
from limner.models.autoencoder import KLConfig
from limner.models.unet import UNetConfig
from limner.systems.autoencoding import AdversarialConfig
from limner.training.config import TrainConfig
from limner.training.loop import train

CODEC = KLConfig(image_channels=4, latent_channels=4, widths=(64, 128, 256, 256), blocks=1)
UNET = UNetConfig(widths=(128, 192, 320), depths=(1, 1, 1), head_width=64, text_width=384)


def go(config: TrainConfig, run: Path) -> None:
    """Begin or go on; ends the process where the time is up."""
    seconds = os.environ.get("STOP_AFTER")
    begun = (run / "config.json").exists()
    if (run / "final").exists():
        return
    if code := train(config, run, resume=begun, stop_after=float(seconds) if seconds else None):
        sys.exit(code)


def autoencoder(data: str, cache: str, run: str, seconds: str, rate: float = 370.0, share: float = 0.6) -> None:
    """`rate` pictures a second, L1 alone for a `share` of the time, and then half as many against a discriminator."""
    usual = recipes.get("kl-f8")
    assert isinstance(usual.system, catalog.AutoencodingConfig)
    batch, time = 32, float(seconds)
    first = int(share * time * rate / batch)
    steps = first + int((1 - share) * time * rate / 2 / batch)
    config = replace(
        usual,
        name="icons-kl",
        system=replace(
            usual.system, name="icons-kl", autoencoder=CODEC, loss=AdversarialConfig(disc_start=first, disc_weight=0.5)
        ),
        data=replace(usual.data, size=256, folder=data, cache=cache),
        steps=steps, batch_size=batch, lr=5e-4, warmup=100, lr_schedule="cosine", lr_final=0.05, precision="bf16",
        compile=True, ema_half_life=10_000, save_every=10**6,
    )  # fmt: skip
    go(config, Path(run))


def both_sizes(config: TrainConfig, run: str, steps_128: str, steps_256: str, batch_256: int) -> None:
    """A constant rate at 128 pixels, then a cosine at 256, from the averages of the first."""
    data = config.data
    small = replace(
        config, data=replace(data, size=128, latent_views=4, other_sizes=()), steps=int(steps_128), batch_size=1024,
        lr_schedule="constant", save_every=10**6,
    )  # fmt: skip
    go(small, Path(f"{run}-128"))
    checkpoint = Path(f"{run}-128", "checkpoints", f"step-{int(steps_128):06}")
    large = replace(
        config, data=replace(data, size=256, latent_views=4, other_sizes=()), steps=int(steps_256),
        batch_size=batch_256, init_from=str(checkpoint / "ema.safetensors"), warmup=50, save_every=10**6,
    )  # fmt: skip
    go(large, Path(run))


def network(data: str, cache: str, run: str, codec: str, steps_128: str, steps_256: str) -> None:
    usual = recipes.get("sd1-tiny")
    assert isinstance(usual.system, catalog.DiffusionConfig)
    icons = catalog.entry("icons").config
    system = replace(
        usual.system, name="icons-ldm", family="Stable Diffusion 1", network=UNET, autoencoder=CODEC,
        autoencoder_from=codec, max_tokens=24,
        defaults=replace(icons.defaults, schedule="auto", guidance=4.0, steps=20),
    )  # fmt: skip
    config = replace(
        usual, name="icons-ldm", system=system, data=replace(recipes.get("icons").data, folder=data, cache=cache),
        lr=3e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, ema_half_life=300_000, precision="bf16",
        lr_final=0.02, log_every=50, sample_prompts=(), sample_every=0,
    )  # fmt: skip
    both_sizes(config, run, steps_128, steps_256, 1024)


def icons(data: str, cache: str, run: str, codec: str, steps_128: str, steps_256: str) -> None:
    usual = recipes.get("icons")
    assert isinstance(usual.system, catalog.DiffusionConfig)
    config = replace(
        usual, name="icons-beside", system=replace(usual.system, autoencoder_from=codec),
        data=replace(usual.data, folder=data, cache=cache), sample_prompts=(), sample_every=0,
    )  # fmt: skip
    both_sizes(config, run, steps_128, steps_256, 1024)


if __name__ == "__main__":
    {"autoencoder": autoencoder, "network": network, "icons": icons}[sys.argv[1]](*sys.argv[2:])
