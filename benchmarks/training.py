"""Steps of training a Stable Diffusion 1 of random weights at 512 px, beside what diffusers' example scripts do.

    python benchmarks/training.py --what full lora --batch 4 --steps 30 --json

`full` trains the U-Net, `lora` an adapter of rank 16 on its attention (the example's targets). Ours is
`limner.training.loop.fit` as it is, with its records and, as the scripts, without averages, on latents that are kept
(`data.latent_views`). diffusers' is the loop of `train_text_to_image.py` and `train_text_to_image_lora.py`: bf16 by
autocast, AdamW, gradients clipped, CLIP read at each step, and pictures encoded at each step (`diffusers`) or latents
that are kept, as those scripts cannot (`kept`). All in one process, in turns, each with the memory of its own; images a
second, and gigabytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from limner import catalog
from limner.adapters.trainable import AdapterConfig
from limner.data.batches import DataConfig
from limner.models.unet import UNetConfig
from limner.pipeline import find_device
from limner.training import adapting, loop
from limner.training.config import TrainConfig
from limner.training.processes import join

ATTENTION = (r"attn[12]\.to_(q|k|v|out\.0)$",)
WARM = 8


class Kept:
    """The same batch at every step, and when each was asked for."""

    def __init__(self, size: int, side: int, channels: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.images = torch.rand(size, 3, side, side, generator=generator, device=device) * 2 - 1
        self.latents = torch.randn(size, channels, side // 8, side // 8, generator=generator, device=device)
        self.captions = [f"a red fox {i} in the snow, by a lake, at dawn" for i in range(size)]
        self.times: list[float] = []

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        self.tick()
        return {"latents": self.latents, "captions": self.captions, "ids": [str(i) for i in range(size)]}

    def tick(self) -> None:
        if self.latents.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("full", "lora"), nargs="+", default=["full", "lora"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--model", default="sd1", help="sd1, or sd1-tiny to try the script")
    parser.add_argument("--compile", action="store_true", help="ours with compile=true, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    device = find_device(asked.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    found: list[dict[str, Any]] = []
    for what in asked.what:
        contenders: dict[str, Callable[[], tuple[float, float]]] = {
            "limner": lambda what=what: ours(asked, what, device),
            **({"compiled": lambda what=what: ours(asked, what, device, compile=True)} if asked.compile else {}),
            "diffusers": lambda what=what: theirs(asked, what, device, encodes=True),
            "kept": lambda what=what: theirs(asked, what, device, encodes=False),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        memory: dict[str, float] = {}
        for _ in range(asked.turns):
            for name, run in contenders.items():
                rate, memory[name] = run()
                rates[name].append(rate)
        row = {"what": what, "batch": asked.batch, "device": str(device)}
        row |= {f"{name}_images_s": round(statistics.median(r), 3) for name, r in rates.items()}
        row |= {f"{name}_gb": round(gb, 2) for name, gb in memory.items()}
        for name in ("diffusers", "kept"):
            row |= {
                f"{mine}_over_{name}": round(statistics.median(map(lambda a, b: a / b, rates[mine], rates[name])), 3)
                for mine in ("limner", "compiled")
                if mine in rates
            }
        found.append(row)
    for row in found:
        print(json.dumps(row) if asked.json else "\n".join(f"{name:26} {value}" for name, value in row.items()))


def system_of(asked: Any, device: torch.device) -> Any:
    config = replace(catalog.entry(asked.model).config, autoencoder_from="", text_encoder_from="")
    with device, torch.no_grad():
        return catalog.build(config)


def ours(asked: Any, what: str, device: torch.device, compile: bool = False) -> tuple[float, float]:
    """Images a second, and gigabytes at most."""
    system = system_of(asked, device)
    adapter = AdapterConfig(targets=ATTENTION) if what == "lora" else None
    config = TrainConfig(
        name="benchmark", model="sd1", adapter=adapter, data=DataConfig(source="shapes", size=asked.side), lr=1e-5,
        steps=asked.steps, batch_size=asked.batch, precision="bf16", log_every=10**6, save_every=10**6, compile=compile,
        ema_half_life=0,
    )  # fmt: skip
    system.to(device, memory_format=torch.channels_last)
    system.text_encoder.to(torch.bfloat16)  # as precision=bf16 keeps it, and the scripts do
    if compile:
        system.compile(dynamic=False)
    if adapter is not None:
        system.requires_grad_(False).to(torch.bfloat16)  # as it keeps a model
        system = adapting.Adapting(system, adapter, 0)
        system.base.weights_hash = str
    batches: Any = Kept(asked.batch, asked.side, system.autoencoder.channels, device)
    loop.save_checkpoint = lambda *_: Path()  # type: ignore[assignment]  # the last one, of 14 GB, is not a step
    how: Any = {"processes": join(str(device)), "draw": lambda *_: [], "export": lambda _, config, path: path.touch()}
    return measured(device, batches, lambda run: loop.fit(system, batches, config, run, **how))


def measured(device: torch.device, batches: Kept, run: Callable[[Path], object]) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))
    took = [b - a for a, b in zip(batches.times[WARM:], batches.times[WARM + 1 :], strict=False)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return len(batches) / statistics.median(took), peak


def theirs(asked: Any, what: str, device: torch.device, encodes: bool) -> tuple[float, float]:
    network: Any = catalog.entry(asked.model).config.network  # type: ignore[union-attr]
    batches = Kept(asked.batch, asked.side, network.in_channels, device)
    return measured(device, batches, lambda run: example(asked, what, device, batches, encodes))


def example(asked: Any, what: str, device: torch.device, batches: Kept, encodes: bool) -> None:
    """The loop of the example scripts, without accelerate, which adds nothing on one GPU."""
    import diffusers
    import unet as benchmark

    own = system_of(asked, device)  # for CLIP, which is the same work in both
    config: UNetConfig = own.network.config
    with device, torch.no_grad():
        network: Any = benchmark.theirs(config, asked.side // 8)[0]
        channels = (128, 256, 512, 512) if asked.model == "sd1" else (32, 32, 32, 32)
        vae = diffusers.AutoencoderKL(
            block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=config.in_channels,
        )  # fmt: skip
    text = copy.deepcopy(own.text_encoder).to(torch.bfloat16)
    del own
    vae.requires_grad_(False).to(torch.bfloat16)
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    network.train()
    if what == "lora":
        network.requires_grad_(False).to(torch.bfloat16)
        parameters = [p for module in low_rank(network) for p in module]
    else:
        network.requires_grad_(True)
        parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    for _ in range(asked.steps):
        batches.tick()
        latents = batches.latents
        if encodes:
            with torch.no_grad():
                latents = vae.encode(batches.images.to(torch.bfloat16)).latent_dist.sample() * 0.18215
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents.float(), noise.float(), times)
        with torch.no_grad():
            words = text.encode(batches.captions).tokens
        with torch.autocast(device.type, torch.bfloat16):
            said = network(noisy, times, words, return_dict=False)[0]
        loss = F.mse_loss(said.float(), noise.float(), reduction="mean")
        loss.item()  # as the scripts gather it for their progress bar
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def low_rank(network: nn.Module) -> list[list[nn.Parameter]]:
    """PEFT's layers on attention, float32 beside weights in bf16, as functions added to what the layers make."""
    made = []
    for name, module in network.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            assert isinstance(module, nn.Linear)
            device = module.weight.device
            down = nn.Parameter(torch.randn(16, module.in_features, device=device) / module.in_features**0.5)
            up = nn.Parameter(torch.zeros(module.out_features, 16, device=device))
            module.register_forward_hook(
                lambda layer, x, out, down=down, up=up: out + F.linear(F.linear(x[0].to(down.dtype), down), up) * 1.0
            )
            made.append([down, up])
    return made


if __name__ == "__main__":
    main()
