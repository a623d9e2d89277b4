"""One evaluation of a Stable Diffusion U-Net of random weights, beside diffusers', which must be installed.

    python benchmarks/unet.py --model sd1 --dtype fp32 bf16 --json

Latents of 512 x 512 pixels (SDXL: 1024 x 1024), prompt and negative prompt in one batch. `limner` is a later step of a
drawing, which keeps the keys and values of its words, `anew` the first, which computes them. All take turns in one
process, and so do the dtypes: of each the median, and the ratios of `limner` to the others (`--alone`: without
diffusers').
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from limner.models import unet
from limner.pipeline import DTYPES, find_device
from limner.types import Conditioning

CONFIGS = {"sd1": (unet.SD1, 64), "sd2": (unet.SD2, 64), "sdxl": (unet.SDXL, 128), "tiny": (unet.UNET_TINY, 16)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd1")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("-n", type=int, default=3, help="evaluations of each (default 3), after one to warm up")
    parser.add_argument("--alone", action="store_true", help="without diffusers")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    device = find_device(asked.device)
    config, side = CONFIGS[asked.model]
    with device:
        contenders = dict(zip(("limner", "anew"), ours(config, side), strict=True))
        contenders |= {} if asked.alone else {"diffusers": theirs(config, side)}
    seconds: dict[tuple[str, str], list[float]] = {(n, d): [] for n in contenders for d in asked.dtype}
    for turn in range(asked.n + 1):
        for dtype in asked.dtype:
            for name, (network, evaluate) in contenders.items():
                network.to(DTYPES[dtype])
                took = timed(lambda: evaluate(DTYPES[dtype]), device)  # noqa: B023 (called at once)
                if turn:
                    seconds[name, dtype].append(took)
    found: dict[str, Any] = {}
    for dtype in asked.dtype:
        medians = {name: statistics.median(seconds[name, dtype]) for name in contenders}
        ratios = {
            f"over_{name}": statistics.median(
                a / b for a, b in zip(seconds["limner", dtype], seconds[name, dtype], strict=True)
            )
            for name in contenders
            if name != "limner"
        }
        found[dtype] = {f"{name}_s": round(s, 5) for name, s in medians.items()}
        found[dtype] |= {name: round(ratio, 4) for name, ratio in ratios.items()}
    if asked.json:
        print(json.dumps({"model": asked.model, "device": str(device), "n": asked.n, **found}, indent=2))
        return
    for dtype, row in found.items():
        print(f"{asked.model} on {device} in {dtype}: " + ", ".join(f"{k} {v}" for k, v in row.items()))


Contender = tuple[nn.Module, Callable[[torch.dtype], object]]


def ours(config: unet.UNetConfig, side: int) -> tuple[Contender, Contender]:
    """One network that keeps what it computed of the words, and does not."""
    network = noisy(unet.UNet(config))
    x, t = torch.randn(2, config.in_channels, side, side), torch.tensor([500.0, 500.0])
    text = torch.randn(2, 77, config.text_width)
    vector = torch.randn(2, config.vector_width) if config.vector_width else None

    def told(dtype: torch.dtype, kept: dict[Any, Any] | None = None) -> Conditioning:
        return Conditioning(text.to(dtype), vector=None if vector is None else vector.to(dtype), kept=kept)

    known = lru_cache(lambda dtype: told(dtype, {}))
    later = lambda dtype: network(x.to(dtype), t, known(dtype))  # noqa: E731
    return (network, later), (network, lambda dtype: network(x.to(dtype), t, told(dtype)))


def theirs(config: unet.UNetConfig, side: int) -> Contender:
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    levels = range(len(config.widths))
    heads = [config.heads(w) for w in config.widths]
    kinds = ["CrossAttn" if config.depths[i] else "" for i in levels]
    extra: dict[str, Any] = {}
    if config.vector_width:
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        extra["projection_class_embeddings_input_dim"] = config.vector_width
    network = UNet2DConditionModel(
        sample_size=side,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        down_block_types=[f"{k}DownBlock2D" for k in kinds],
        up_block_types=[f"{k}UpBlock2D" for k in reversed(kinds)],
        layers_per_block=config.num_blocks,
        transformer_layers_per_block=[max(1, d) for d in config.depths],
        attention_head_dim=heads,
        cross_attention_dim=config.text_width,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.groups,
        **extra,
    )
    noisy(network)
    x, t = torch.randn(2, config.in_channels, side, side), torch.tensor([500.0, 500.0])
    text = torch.randn(2, 77, config.text_width)
    pooled, ids = torch.randn(2, max(config.vector_width - 6 * 256, 1)), torch.full((2, 6), 1024.0)

    def evaluate(dtype: torch.dtype) -> object:
        told = {"text_embeds": pooled.to(dtype), "time_ids": ids.to(dtype)} if config.vector_width else None
        return network(x.to(dtype), t, text.to(dtype), added_cond_kwargs=told, return_dict=False)[0]

    return network, evaluate


def noisy(network: nn.Module) -> nn.Module:
    for p in network.parameters():
        p.normal_(0, 0.02)
    return network.eval().requires_grad_(False)


def timed(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
