"""Pictures that ControlNets are told, made of pictures: edges, scribbles, blurs. No model is needed for these."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from limner.errors import UnknownName, UsageError

LOW, HIGH = 100.0, 200.0
"""Canny's thresholds, of the sum of both slopes' magnitudes of 8-bit grey; ControlNet's own."""
SIDES = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])  # Sobel
NEED_MODELS = ("depth", "pose", "openpose", "normal", "segmentation", "lineart", "softedge", "hed", "mlsd")


def make(maker: str, image: Image.Image) -> Image.Image:
    """What `maker` of MAKERS makes of a picture, in its size, RGB. Raises UnknownName, UsageError."""
    known(maker)
    return MAKERS[maker](on_white(image))


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def known(maker: str) -> None:
    """Raises UnknownName for no maker, and UsageError for what takes a model that is not here."""
    if maker in NEED_MODELS:
        raise UsageError(
            f"{maker} is found in a picture by a model of its own, which Limner has not: give a picture of it "
            f"instead (makers here: {', '.join(MAKERS)})"
        )
    if maker not in MAKERS:
        raise UnknownName("maker", maker, tuple(MAKERS))


def canny(image: Image.Image, low: float = LOW, high: float = HIGH) -> Image.Image:
    """White edges on black (Canny, 1986, without its blur, as OpenCV's): pixels whose slope is the greatest across the
    edge and above `low`, where they hang together with one above `high`."""
    slopes = torch.stack([torch.stack(_slopes(channel)) for channel in image.convert("RGB").split()])  # 3 2 h w
    sizes = slopes.abs().sum(1)
    size, channel = sizes.max(0)
    dx, dy = slopes.gather(0, channel.expand(1, 2, -1, -1))[0]
    # the neighbours across the edge, to the nearest of four directions
    flat, steep = dy.abs() < dx.abs() * 0.41421356, dy.abs() > dx.abs() * 2.41421356
    around = F.pad(size[None, None], (1, 1, 1, 1))[0, 0]

    def neighbour(down: int, right: int) -> Tensor:
        height, width = size.shape
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    falling = (dx < 0) == (dy < 0)  # the slope points down right or up left
    before = torch.where(
        flat,
        neighbour(0, -1),
        torch.where(steep, neighbour(-1, 0), torch.where(falling, neighbour(-1, -1), neighbour(-1, 1))),
    )
    after = torch.where(
        flat,
        neighbour(0, 1),
        torch.where(steep, neighbour(1, 0), torch.where(falling, neighbour(1, 1), neighbour(1, -1))),
    )
    straight = flat | steep
    ridge = (size > before) & torch.where(straight, size >= after, size > after) & (size > low)
    edge = ridge & (size > high)
    while True:  # grow along ridges
        grown = (F.max_pool2d(edge[None, None].float(), 3, 1, 1)[0, 0] > 0) & ridge
        if torch.equal(grown, edge):
            return _grey(edge.float() * 255)
        edge = grown


def sobel(image: Image.Image) -> Image.Image:
    """How steep grey is, the steepest white."""
    dx, dy = _slopes(image)
    size = torch.hypot(dx, dy)
    return _grey(size / size.max().clamp(min=1e-6) * 255)


def scribble(image: Image.Image) -> Image.Image:
    """Broad white lines on black: a difference of Gaussians, thresholded and thickened."""
    grey = image.convert("L")
    near, far = (np.asarray(grey.filter(ImageFilter.GaussianBlur(r)), dtype=np.float32) for r in (0.5, 5.0))
    lines = torch.from_numpy(far - near).clamp(min=0) + torch.from_numpy(near - far).clamp(min=0)
    thick = F.max_pool2d((lines > 16).float()[None, None], 3, 1, 1)[0, 0]
    return _grey(thick * 255)


def blur(image: Image.Image) -> Image.Image:
    """What tile ControlNets are told: the picture without its details."""
    return image.filter(ImageFilter.GaussianBlur(max(1.0, min(image.size) / 128)))


def tile(image: Image.Image) -> Image.Image:
    """The picture itself."""
    return image


def invert(image: Image.Image) -> Image.Image:
    """Black lines on white as white ones on black, which ControlNets of lines are told."""
    return Image.eval(image, lambda value: 255 - value)


MAKERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "canny": canny, "sobel": sobel, "scribble": scribble, "blur": blur, "tile": tile, "invert": invert,
}  # fmt: skip


def _slopes(image: Image.Image) -> tuple[Tensor, Tensor]:
    """Sobel's of grey across and down, edges repeated."""
    grey = torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32).copy())[None, None]
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    dx, dy = (-F.conv2d(padded, kernel[None, None])[0, 0] for kernel in (SIDES.T.contiguous(), SIDES))
    return dx, dy


def _grey(values: Tensor) -> Image.Image:
    return Image.fromarray(values.round().clamp(0, 255).to(torch.uint8).numpy(), "L").convert("RGB")
