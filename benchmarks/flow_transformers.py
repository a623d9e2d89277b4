"""One step of a flow transformer with random weights, beside diffusers', which must be installed.

    python benchmarks/flow_transformers.py --model flux sd3 dit --json

FLUX.1 dev at 1024 px with 512 words, one row; SD3 medium at 1024 px with 333 words, two rows; DiT-XL/2 at 256 px, two
rows. `limner` is a later step of a drawing, whose words and times were read before, as a recorded graph; `eager` the
same without the graph, `compiled` after `compile_blocks`, whose warm-up is told, without one too. `diffusers` is its
network as it is, `--regional` also with its compiled blocks. All take turns: of each the median, and the ratio of
`limner` to it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import unet as unet_benchmark  # type: ignore[import-not-found]  # the one beside this

from limner.models import dit, flux, mmdit
from limner.nn.graphs import Graphs, compile_blocks
from limner.pipeline import DTYPES, find_device
from limner.types import Conditioning

CONFIGS: dict[str, tuple[Any, int, int, int]] = {  # latents a side, words, rows
    "flux": (flux.FLUX_DEV, 128, 512, 1),
    "sd3": (mmdit.SD3_MEDIUM, 128, 333, 2),
    "dit": (dit.DIT_XL_2, 32, 0, 2),
    "tiny": (replace(flux.FLUX_TINY, in_channels=64, out_channels=64), 8, 7, 1),
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, nargs="+", default=["flux", "sd3", "dit"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-n", type=int, default=10, help="steps of each (default 10), after three to warm up")
    parser.add_argument("--alone", action="store_true", help="without diffusers")
    parser.add_argument("--compiled", action="store_true", help="our blocks compiled, too")
    parser.add_argument("--regional", action="store_true", help="diffusers' blocks compiled, too")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    device = find_device(asked.device)
    found = [measured(name, asked, device) for name in asked.model]
    print(json.dumps(found) if asked.json else "\n".join(map(str, found)))


def measured(name: str, asked: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    config, side, words, rows = CONFIGS[name]
    dtype = DTYPES[asked.dtype]
    told: dict[str, Any] = {"model": name, "device": str(device), "dtype": asked.dtype}
    contenders: dict[str, Callable[[], Any]] = dict(ours(config, side, words, rows, device, dtype))
    if asked.compiled:
        began = time.perf_counter()
        contenders["compiled"] = compiled(config, side, words, rows, device, dtype)
        told["compiled_warm_up_s"] = round(time.perf_counter() - began, 1)
    if not asked.alone:
        for regional in (False, True)[: 1 + asked.regional]:
            began = time.perf_counter()
            contenders["diffusers" + " regional" * regional] = theirs(name, side, words, rows, device, dtype, regional)
            told |= {"regional_warm_up_s": round(time.perf_counter() - began, 1)} if regional else {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken: dict[str, list[float]] = {contender: [] for contender in contenders}
    for turn in range(asked.n + 3):
        for contender, call in contenders.items():
            seconds = unet_benchmark.timed(call, device)
            if turn >= 3:
                taken[contender].append(seconds)
    for contender, seconds in taken.items():
        told[f"{contender}_ms"] = round(1000 * statistics.median(seconds), 2)
        ratios = [a / b for a, b in zip(taken["limner"], seconds, strict=True)]
        told |= {f"over_{contender}": round(statistics.median(ratios), 3)} if contender != "limner" else {}
    contenders.clear()
    gc.collect()
    return told


def network_of(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    kinds: dict[str, Any] = {"flux": flux.Flux, "mmdit": mmdit.MMDiT, "dit": dit.DiT}
    with torch.device("meta"):
        network = kinds[config.type](config).to(dtype)
    return filled(network.to_empty(device=device))


def filled(network: Any) -> Any:
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
    return network.eval().requires_grad_(False)


def asked_of(config: Any, side: int, words: int, rows: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Latents, a time and what is told."""
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    cond = Conditioning(kept={})
    if words:
        cond = replace(cond, tokens=draw(rows, words, config.text_width), pooled=draw(rows, config.pooled_width))
    else:
        cond = replace(cond, labels=torch.arange(rows, device=device))
    if getattr(config, "guidance_embedded", False):
        cond = replace(cond, guidance=flux.guidance_embedding(torch.full((rows,), 3.5, device=device)))
    channels = getattr(config, "latents_in", None) or config.channels
    return draw(rows, channels, side, side), torch.tensor([0.7, 0.3], device=device), cond


def ours(config: Any, side: int, words: int, rows: int, device: torch.device, dtype: torch.dtype) -> Any:
    network, graphs = network_of(config, device, dtype), Graphs()
    x, times, cond = asked_of(config, side, words, rows, device, dtype)
    t = network.times(times, rows, cond)[0]
    yield "eager", lambda: network(x, t, cond)

    def recorded() -> Any:
        graphs.on = True
        return graphs(network, x, t, cond)

    yield "limner", recorded


def compiled(config: Any, side: int, words: int, rows: int, device: torch.device, dtype: torch.dtype) -> Any:
    network = network_of(config, device, dtype)
    compile_blocks(network)
    x, times, cond = asked_of(config, side, words, rows, device, dtype)
    t = network.times(times, rows, cond)[0]
    for _ in range(2):
        network(x, t, cond)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return lambda: network(x, t, cond)


def theirs(
    name: str, side: int, words: int, rows: int, device: torch.device, dtype: torch.dtype, regional: bool
) -> Callable[[], Any]:
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    with device:
        if name == "flux":
            network = diffusers.FluxTransformer2DModel(guidance_embeds=True)
            ids = torch.zeros((side // 2) ** 2, 3)
            ids[:, 1] = torch.arange(side // 2).repeat_interleave(side // 2)
            ids[:, 2] = torch.arange(side // 2).repeat(side // 2)
            told: dict[str, Any] = {
                "hidden_states": draw(rows, (side // 2) ** 2, 64), "encoder_hidden_states": draw(rows, words, 4096),
                "pooled_projections": draw(rows, 768), "timestep": torch.full((rows,), 0.7), "img_ids": ids,
                "txt_ids": torch.zeros(words, 3), "guidance": torch.full((rows,), 3.5, dtype=torch.float32),
            }  # fmt: skip
        elif name == "sd3":
            network = diffusers.SD3Transformer2DModel(
                sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                pos_embed_max_size=192, out_channels=16,
            )  # fmt: skip
            told = {
                "hidden_states": draw(rows, 16, side, side), "encoder_hidden_states": draw(rows, words, 4096),
                "pooled_projections": draw(rows, 2048), "timestep": torch.full((rows,), 700.0),
            }  # fmt: skip
        elif name == "dit":
            network = diffusers.DiTTransformer2DModel(
                num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
                sample_size=32, patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
            )  # fmt: skip
            told = {
                "hidden_states": draw(rows, 4, side, side), "timestep": torch.full((rows,), 700),
                "class_labels": torch.arange(rows),
            }  # fmt: skip
        else:
            raise SystemExit(f"--alone: diffusers has no {name}")
    torch.set_default_dtype(before)
    filled(network)
    if regional:
        network.compile_repeated_blocks(fullgraph=True)
        network(**told)
    return lambda: network(**told)


if __name__ == "__main__":
    main()
