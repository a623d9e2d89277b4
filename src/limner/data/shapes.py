"""A tiny captioned set drawn by arithmetic: five shapes in eight colours, solid or outlined, on transparency.

It needs no file and is learned in seconds, so the `-tiny` recipes and the tests use it.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from limner.data.images import ImageSet

COLOURS = {
    "red": (225, 40, 45),
    "orange": (245, 145, 30),
    "yellow": (250, 215, 45),
    "green": (45, 165, 75),
    "blue": (40, 100, 220),
    "purple": (135, 60, 185),
    "pink": (245, 120, 175),
    "black": (30, 30, 35),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
STYLES = ("solid", "outlined")


def shapes(size: int = 32, copies: int = 4, seed: int = 0) -> ImageSet:
    """Every shape x colour x style, `copies` times with its own place and scale: 80 * copies pictures of `size` px."""
    rng = np.random.default_rng(seed)
    pictures: list[np.ndarray] = []
    captions: list[tuple[str, ...]] = []
    ids: list[str] = []
    groups: dict[str, list[str]] = {"style": [], "concept": [], "colour": []}
    for copy, shape, (colour, rgb), style in itertools.product(range(copies), SHAPES, COLOURS.items(), STYLES):
        scale, centre = rng.uniform(0.32, 0.42), rng.uniform(0.46, 0.54, 2)
        alpha = _coverage(shape, style, size, scale, centre)
        pictures.append(np.concatenate([np.array(rgb)[:, None, None] * alpha, 255 * alpha[None]]).round())
        captions.append((f"{colour} {shape}", f"{style} {colour} {shape}"))
        ids.append(f"{style}-{colour}-{shape}-{copy}")
        for name, value in (("style", style), ("concept", shape), ("colour", colour)):
            groups[name].append(value)
    n = len(ids)
    images = torch.from_numpy(np.stack(pictures).astype(np.uint8))
    return ImageSet("shapes", images, captions, ids, torch.ones(n), torch.ones(n, dtype=torch.bool), groups)


def _coverage(shape: str, style: str, size: int, scale: float, centre: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1, from 4 x 4 samples."""
    grid = (np.arange(size * 4) + 0.5) / (size * 4)
    y, x = np.meshgrid((grid - centre[1]) / scale, (grid - centre[0]) / scale, indexing="ij")
    distance = {
        "circle": np.hypot(x, y),
        "square": np.maximum(abs(x), abs(y)) / 0.85,
        "diamond": abs(x) + abs(y),
        "triangle": np.maximum(y - 0.15, 0.866 * abs(x) - 0.5 * (y - 0.15)) / 0.6,
        "cross": np.maximum(np.minimum(abs(x), abs(y)) / 0.34, np.maximum(abs(x), abs(y))),
    }[shape]
    inside = (distance <= 1) & ((distance > 0.6) if style == "outlined" else True)
    return inside.reshape(size, 4, size, 4).mean((1, 3))
