"""The whole loop of a drawing with Stable Diffusion, beside diffusers' pipeline, which must be installed: both with
random weights, the same size, steps, guidance and number of words, which ours reads within the loop and theirs is given
read.

    python benchmarks/drawing.py --model sd1 --dtype fp16 --json
    python benchmarks/drawing.py --model sdxl --dtype fp16 --json
    python benchmarks/drawing.py --model tiny --device cpu --dtype fp32 --alone
    python benchmarks/drawing.py --model flux --dtype bf16 --offload --fp8 --alone --steps 8 -n 2 --json

Per step of the loop: what `sample` takes, and the pipeline up to its latents, over the number of steps; `eager` is ours
without CUDA graphs. Then the decoding, the whole of a first and of a later picture of ours, and the memory that was
planned, taken, and held by torch. All take turns: of each the median, and the ratio of ours to diffusers'.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import unet as unet_benchmark  # type: ignore[import-not-found]  # the one beside this

from limner import catalog, memory, pipeline
from limner.models import unet
from limner.nn.quantized import quantize_

MODELS = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "tiny": "sd1-tiny", "sd3": "sd3-medium", "flux": "flux-dev"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd1")
    parser.add_argument("--dtype", choices=pipeline.DTYPES, default="fp16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    parser.add_argument("-n", type=int, default=5, help="drawings of each (default 5), after one to warm up")
    parser.add_argument("--alone", action="store_true", help="without diffusers")
    parser.add_argument("--offload", action="store_true", help="parts of the model take turns")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="matrices of network and text encoder in 8 bits")
    asked = parser.parse_args()
    device = pipeline.find_device(asked.device)
    timed = torch.inference_mode()(lambda call: unet_benchmark.timed(call, device))
    system: Any = made(MODELS[asked.model], device, pipeline.DTYPES[asked.dtype])
    for part in (system.network, system.text_encoder) if asked.fp8 else ():
        quantize_(part)
    if asked.offload:
        system.offload()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    size = asked.size or system.defaults.width
    values = {"prompt": "a red fox", "seed": 1, "steps": asked.steps, "guidance": 7.5, "batch": asked.batch}
    request = pipeline.prepare(system, **values, sampler="euler", width=size, height=size)
    prompts, seeds = [request.prompt] * asked.batch, list(range(asked.batch))
    planned, there = memory.plan(system, request, asked.batch), memory.room(system, request, asked.batch)
    peak = planned.peak(bool(system.works_on), there.ample)[0]
    found: dict[str, Any] = {"model": asked.model, "device": str(device), "dtype": asked.dtype, "batch": asked.batch}
    found |= {"size": size, "steps": asked.steps, "planned_gb": round(peak / 1e9, 3)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    draw = lambda: pipeline.draw(system, prompts, seeds, request)  # noqa: E731
    found["first_picture_s"] = round(timed(draw), 4)
    if device.type == "cuda":
        found["taken_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        found["held_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
    found["graphs"] = system.graphs.on

    def loop(graphs: bool) -> Callable[[], Any]:
        def call() -> Any:
            system.graphs.on = graphs and device.type == "cuda" and not asked.offload
            cond = system.condition(prompts, request)
            return system.sample(cond, request, pipeline.noise_source(seeds, device))

        return call

    with torch.inference_mode():
        latents = loop(True)()
    contenders = {"limner": loop(True), "eager": loop(False)}
    if not asked.alone:
        contenders["diffusers"] = theirs(system, request, asked.batch)
    contenders |= {"decode": lambda: system.decode(latents), "picture": draw}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(asked.n + 1):
        for name, call in contenders.items():
            took = timed(call)
            if turn:
                seconds[name].append(took)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name in medians.keys() & {"limner", "eager", "diffusers"}:
        found[f"{name}_step_ms"] = round(1000 * medians[name] / asked.steps, 3)
        if name != "limner":
            ratios = [a / b for a, b in zip(seconds["limner"], seconds[name], strict=True)]
            found[f"over_{name}"] = round(statistics.median(ratios), 4)
    found |= {f"{name}_s": round(medians[name], 4) for name in ("decode", "picture")}
    print(json.dumps(found) if asked.json else "\n".join(f"{name:18} {value}" for name, value in found.items()))


def made(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The system of a row of the catalogue, every weight random."""
    config = replace(catalog.entry(name).config, autoencoder_from="", text_encoder_from="")
    with device, torch.no_grad():
        system: Any = unet_benchmark.noisy(catalog.build(config))
    system.network.to(dtype, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    system.text_encoder.to(dtype)
    return system.to(device).eval()


def theirs(system: Any, request: Any, batch: int) -> Callable[[], Any]:
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, dtype = system.device, next(system.network.parameters()).dtype
    config: unet.UNetConfig = system.network.config
    with device, torch.no_grad():
        network = unet_benchmark.theirs(config, request.height // system.grid)[0].to(dtype)
        channels = (128, 256, 512, 512)
        vae = diffusers.AutoencoderKL(
            block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4,
        ).to(dtype)  # fmt: skip
        words = torch.randn(batch, 77, config.text_width, dtype=dtype)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    told: dict[str, Any] = {"prompt_embeds": words, "negative_prompt_embeds": words.flip(1)}
    if config.vector_width:
        pooled = torch.randn(batch, config.vector_width - 6 * 256, dtype=dtype, device=device)
        told |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=network,
            scheduler=scheduler, add_watermarker=False,
        )  # fmt: skip
    else:
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=None, tokenizer=None, unet=network, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    side = {"height": request.height, "width": request.width, "output_type": "latent"}
    return lambda: pipe(**told, **side, num_inference_steps=request.steps, guidance_scale=request.guidance)


if __name__ == "__main__":
    main()
