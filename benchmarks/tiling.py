"""How far pictures that go through an autoencoder in tiles are from those that go whole, and what memory both take.

    python benchmarks/tiling.py errors                     the tables of docs/tiling.md (minutes on a processor)
    python benchmarks/tiling.py errors --models icons --sides 1056 --tiles 512 --json
    python benchmarks/tiling.py memory --sides 512 1024    peak memory of decoding, whole and in tiles

The picture is docs/icons-pairs.jpg, of which half are real, and the autoencoder of `icons` the one that is shipped; the
others have random weights, as torch begins with them: nothing here has been trained by others. Differences are in
1/255 of the range that the whole picture has: PSNR in dB, and the largest. Those of latents are in their standard
deviations. With --json as an object, for programs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner import catalog, pictures
from limner.models.autoencoder import KL_SD1, KL_TINY, KLAutoencoder
from limner.models.tiling import Tiled, tile_of

PICTURE = Path(__file__).parent.parent / "docs" / "icons-pairs.jpg"
SIDES = {"icons": 768, "tiny": 768, "sd1": 768}
TILES, OVERLAPS = (256, 512), (0.0625, 0.125, 0.25, 0.5)


def model(name: str) -> Any:
    if name == "icons":
        return catalog.load("icons").autoencoder
    torch.manual_seed(0)
    return KLAutoencoder({"tiny": KL_TINY, "sd1": KL_SD1}[name]).eval()


def picture(autoencoder: Any, side: int) -> Tensor:
    """(1, c, side, side) in [-1, 1]."""
    pixels = pictures.to_tensor(pictures.open_image(PICTURE), side, side)
    return pixels[:, : autoencoder.config.image_channels]


def errors(name: str, side: int, tiles: list[int], device: str) -> dict[str, Any]:
    autoencoder = model(name).to(device)
    images = picture(autoencoder, side).to(device)
    latents = autoencoder.encode(images)
    whole = autoencoder.decode(latents)
    scale = (whole.max() - whole.min()).item()  # of a trained one 2
    rows = []
    for tile in (tile for tile in tiles if tile < side):
        for overlap in OVERLAPS:
            tiled = Tiled(autoencoder, tile, overlap)
            apart = (tiled.decode(latents) - whole).abs() / scale
            off = (tiled.encode(images) - latents).abs() / latents.std()
            rows.append(
                {
                    "tile": tile,
                    "overlap": overlap,
                    "psnr_db": round(-10 * apart.square().mean().log10().item(), 1),
                    "largest_255": round(255 * apart.max().item(), 1),
                    "latents_rms": round(off.square().mean().sqrt().item(), 4),
                    "latents_largest": round(off.max().item(), 2),
                }
            )
            print(name, *rows[-1].values(), file=sys.stderr)
    return {"model": name, "side": side, "rows": rows}


def decode(name: str, side: int, tile: int, device: str) -> None:
    """In a process of its own: prints what it takes at most, in MB, beside the weights and torch."""
    autoencoder = model(name).to(device)
    latents = torch.randn(
        1, autoencoder.channels, side // autoencoder.factor, side // autoencoder.factor, device=device
    )
    before = taken(device)
    (Tiled(autoencoder, tile) if tile else autoencoder).decode(latents)
    print((taken(device) - before) // 2**20)


def taken(device: str) -> int:
    """Bytes at most, so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(name: str, sides: list[int], device: str) -> dict[str, Any]:
    rows = []
    for side in sides:
        for tile in (0, 512, 1024):
            if tile < side:
                argv = [sys.executable, __file__, "decode", "--models", name, "--sides", str(side), "--tile", str(tile)]
                argv += ["--device", device]
                done = subprocess.run(argv, capture_output=True, text=True)
                rows.append({"side": side, "tile": tile, "mb": int(done.stdout) if done.returncode == 0 else None})
    return {"model": name, "chosen": {side: tile_of(model(name).factor, side, side) for side in sides}, "rows": rows}


def shown(table: dict[str, Any]) -> str:
    """A table of Markdown."""
    names = list(table["rows"][0])
    lines = [names, ["---:"] * len(names), *([str(row[name]) for name in names] for row in table["rows"])]
    return "\n".join([f"{table['model']}:", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "memory", "decode"])
    parser.add_argument("--models", nargs="+", choices=SIDES, default=None)
    parser.add_argument("--sides", nargs="+", type=int, help="of the pictures, in pixels")
    parser.add_argument("--tiles", nargs="+", type=int, default=list(TILES), help="in pixels")
    parser.add_argument("--tile", type=int, default=0, help="of decode")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default cpu)")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.what == "decode":
        return decode(asked.models[0], asked.sides[0], asked.tile, asked.device)
    if asked.what == "memory":
        tables = [memory(name, asked.sides or [512, 1024], asked.device) for name in asked.models or ["sd1"]]
    else:
        tables = [
            errors(name, side, asked.tiles, asked.device)
            for name in asked.models or SIDES
            for side in asked.sides or [SIDES[name]]
        ]
    return print(json.dumps(tables, indent=2) if asked.json else "\n".join(map(shown, tables)))


if __name__ == "__main__":
    main()
