"""Changes to batches of pictures that keep them true to their words.

All work on premultiplied float images (b, c, h, w) in [-1, 1], on the device they lie on, with -1 (transparent) coming
in at the borders, and draw from the generator they are given.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform(n: int, low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(n, generator=generator, device=device) * (high - low) + low


def mirrored(images: Tensor, where: Tensor) -> Tensor:
    """Left and right exchanged in the rows where `where` (b,) is True."""
    return torch.where(where[:, None, None, None], images.flip(-1), images)


def affine(images: Tensor, zoom: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Zoom (b,) about the centre, turn by `angle` (b,) radians and move by `shift` (b, 2) in half-widths; bilinear."""
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


def moved(images: Tensor, shift: Tensor) -> Tensor:
    """Move each picture by whole pixels, `shift` (b, 2) rows and columns: no resampling, so nothing blurs."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - shift[:, :1]  # b h
    columns = torch.arange(width, device=images.device) - shift[:, 1:]  # b w
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    picked = images.gather(2, rows.clamp(0, height - 1)[:, None, :, None].expand_as(images))
    picked = picked.gather(3, columns.clamp(0, width - 1)[:, None, None, :].expand_as(images))
    return torch.where(inside, picked, picked.new_tensor(-1.0))


def for_autoencoder(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half the pictures mirrored, moved by whole pixels; half zoomed (0.7 to 1.4) and turned (up to 20 degrees); colour
    channels exchanged in a quarter: what an autoencoder should carry over whatever the words."""
    n, device, size = len(images), images.device, images.shape[-1]
    coin = random.Random(generator.initial_seed())  # on the host: asking the device would wait for it
    images = mirrored(images, torch.rand(n, generator=generator, device=device) < 0.5)
    if coin.random() < 0.5:
        shift = (uniform(2 * n, -size / 8, size / 8, generator, device)).round().long().view(n, 2)
        images = moved(images, shift)
    else:
        zoom = uniform(n, math.log(0.7), math.log(1.4), generator, device).exp()
        angle = uniform(n, -math.pi / 9, math.pi / 9, generator, device)
        images = affine(images, zoom, angle, uniform(2 * n, -0.1, 0.1, generator, device).view(n, 2))
    if coin.random() < 0.25:
        order = coin.sample(range(3), 3)
        images = torch.cat([images[:, order], images[:, 3:]], 1)
    return images


def view(images: Tensor, mirror: Tensor, generator: torch.Generator) -> Tensor:
    """A slightly different look at the same picture for a text-to-image model: mirrored in half the rows where `mirror`
    (b,) allows, moved by up to 3 % of its width, and in every third call shrunk or grown by up to 12 %."""
    n, device, size = len(images), images.device, images.shape[-1]
    images = mirrored(images, mirror & (torch.rand(n, generator=generator, device=device) < 0.5))
    shift = uniform(2 * n, -0.03, 0.03, generator, device).view(n, 2)
    if random.Random(generator.initial_seed()).random() < 1 / 3:
        zoom = uniform(n, 0.88, 1.06, generator, device)
        return affine(images, zoom, torch.zeros(n, device=device), 2 * shift)
    return moved(images, (shift * size).round().long())


def fitted(images: Tensor, height: int, width: int) -> Tensor:
    """Square pictures scaled to the shorter side of a height x width canvas and set in its middle."""
    side = min(height, width)
    if side != images.shape[-1]:
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (height - side) // 2, (width - side) // 2
    return F.pad(images, (left, width - side - left, top, height - side - top), value=-1.0)
