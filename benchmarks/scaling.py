"""Images a second of training Stable Diffusion 1's U-Net (random weights, 512 px, bf16, kept latents) on several GPUs.

    python benchmarks/scaling.py --batch 16
    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py --batch 16 [--sharding fsdp]

`--batch` is of each GPU. Prints processes, sharding, batch, images a second of all, and gigabytes at most of the first.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import training
from limner.data.batches import DataConfig
from limner.training import loop
from limner.training.config import TrainConfig
from limner.training.processes import join
from limner.training.state import TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sharding", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--model", default="sd1", help="sd1, or sd1-tiny to try the script")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    processes = join()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    system = training.system_of(asked, processes.device).to(processes.device, memory_format=torch.channels_last)
    batches: Any = training.Kept(asked.batch, asked.side, system.autoencoder.channels, processes.device)
    config = TrainConfig(
        name="benchmark", model="sd1", data=DataConfig(source="shapes", size=asked.side), lr=1e-5, steps=asked.steps,
        batch_size=asked.batch * processes.world, precision="bf16", log_every=10**6, save_every=10**6,
        sharding=asked.sharding,
    )  # fmt: skip
    loop.save_checkpoint = lambda *_: Path()  # type: ignore[assignment]  # the last one is not a step
    TrainState.files = lambda *_: {}  # type: ignore[method-assign]
    how: Any = {"processes": processes, "draw": lambda *_: [], "export": lambda _, config, path: path.touch()}
    with tempfile.TemporaryDirectory() as folder:
        loop.fit(system, batches, config, Path(folder), **how)
    times = batches.times[training.WARM :]
    took = statistics.median(b - a for a, b in itertools.pairwise(times))
    if processes.first:
        peak = torch.cuda.max_memory_allocated() / 1e9 if processes.device.type == "cuda" else 0.0
        rate = asked.batch * processes.world / took
        print(f"{processes.world} {asked.sharding}, {asked.batch} each: {rate:.2f} images/s, {peak:.2f} GB")
    processes.leave()


if __name__ == "__main__":
    main()
