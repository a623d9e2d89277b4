"""How well drawings keep to the edges that a ControlNet of `icons` is told, a JSON line each for drawings with it,
without it, and for what the autoencoder makes of the real pictures, which is the most that can be had:
python docs/runs/icons-control/edges.py CONTROL DATA CACHE SHEET.png [COUNT] [DEVICE]

COUNT (200) held-out pictures of the icon pack (split val), evenly taken: the hint is Canny's edges of one, the prompt
its caption that names the style, the seed its place. A pixel of an edge is right within so many pixels (`tolerance`, 1
and 2, a square all round) of one of the other: `precision` is of the drawing's edges beside the hint's, `recall` the
other way round, and `f1` their harmonic mean; all are means over pictures. A drawing without edges scores 0. The sheet
has 12 of them: hint, without, with, real."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from limner import hints, pictures, pipeline
from limner.data.icons import open_icons
from limner.data.images import to_float
from limner.training.report import grid

SIZE, ROWS = 256, 12


def edges(image: Image.Image) -> Tensor:
    """Bool (h, w)."""
    return torch.from_numpy(np.array(hints.make("canny", image))[..., 0] > 0)


def near(mask: Tensor, tolerance: int) -> Tensor:
    """What is within so many pixels of `mask`."""
    return F.max_pool2d(mask[None].float(), 2 * tolerance + 1, 1, tolerance)[0] > 0


def score(drawn: Tensor, hint: Tensor, tolerance: int) -> tuple[float, float, float]:
    """Precision, recall and F1 of one drawing's edges."""
    if not drawn.any():
        return 0.0, 0.0, 0.0
    precision = (drawn & near(hint, tolerance)).sum().item() / drawn.sum().item()
    recall = (hint & near(drawn, tolerance)).sum().item() / hint.sum().item()
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def main(control: str, data: str, cache: str, sheet: str, count: str = "200", device: str = "auto") -> None:
    pipe: Any = pipeline.load("icons", device)
    real = open_icons(Path(data)).image_set(split="val", size=SIZE, cache=Path(cache))
    chosen = [int(k * len(real) / int(count)) for k in range(min(int(count), len(real)))]
    found: dict[str, list[Tensor]] = {"with": [], "without": [], "autoencoder": []}
    told, shown = [], []
    for i in chosen:
        picture = to_float(real.images[i])
        image = pictures.to_pil(picture)
        hint = edges(image)
        if not hint.any():
            continue
        prompt = real.captions[i][min(1, len(real.captions[i]) - 1)]
        ask = {"file": control, "image": image, "maker": "canny"}
        drawn = {
            "with": pipe.generate(prompt, seed=i, width=SIZE, height=SIZE, control=[ask])[0].image,
            "without": pipe.generate(prompt, seed=i, width=SIZE, height=SIZE)[0].image,
        }
        with torch.no_grad():
            again = pipe.system.decode(pipe.system.encode(picture[None].to(pipe.system.device)))[0]
        drawn["autoencoder"] = pictures.to_pil(again.clamp(-1, 1).float().cpu())
        told.append(hint)
        for name, one in drawn.items():
            found[name].append(edges(one))
        if len(shown) < 4 * ROWS and len(told) % max(1, len(chosen) // ROWS) == 0:
            shown += [hints.make("canny", image), drawn["without"], drawn["with"], image]
    for name, masks in found.items():
        for tolerance in (1, 2):
            rows = [score(drawn, hint, tolerance) for drawn, hint in zip(masks, told, strict=True)]
            precision, recall, f1 = (round(float(np.mean(column)), 4) for column in zip(*rows, strict=True))
            line = {"pictures": len(rows), "control": name, "tolerance": tolerance, "f1": f1}
            print(json.dumps(line | {"precision": precision, "recall": recall}), flush=True)
    table(shown, 8).save(sheet)


def table(images: list[Image.Image], columns: int) -> Image.Image:
    """In so many columns, on a checker board."""
    strips = [grid(images[k : k + 1], gap=2) for k in range(len(images))]
    width, height = strips[0].size
    whole = Image.new("RGB", (columns * width, -(-len(strips) // columns) * height), "white")
    for k, strip in enumerate(strips):
        whole.paste(strip, (k % columns * width, k // columns * height))
    return whole


if __name__ == "__main__":
    main(*sys.argv[1:])
