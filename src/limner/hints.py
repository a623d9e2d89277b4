"""Pictures that ControlNets are told, made of pictures: edges, scribbles, blurs. No model is needed for these; what
depth and poses look like is here too, and what finds them is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from limner.errors import UnknownName, UsageError

LOW, HIGH = 100.0, 200.0
"""Canny's thresholds, of the sum of both slopes' magnitudes of 8-bit grey; ControlNet's own."""
SIDES = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])  # Sobel
WITH_MODELS = {
    "depth": "depth-anything/Depth-Anything-V2-Small-hf", "pose": "usyd-community/vitpose-base-simple",
}  # fmt: skip
"""What is found by a model that a person brings, and a name of one on the Hub."""
NEED_MODELS = ("openpose", "normal", "segmentation", "lineart", "softedge", "hed", "mlsd")
"""What takes a model that is not read here."""
Finder = Callable[[Image.Image], Image.Image]


def make(maker: str, image: Image.Image, finder: Finder | None = None) -> Image.Image:
    """What `maker` of MAKERS makes of a picture, in its size, RGB, or `finder` for one of WITH_MODELS. Raises
    UnknownName, UsageError."""
    known(maker, finder is not None)
    return (MAKERS[maker] if finder is None else finder)(on_white(image))


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def known(maker: str, model: bool = False) -> None:
    """Raises UnknownName for no maker, and UsageError for what takes a model without one, with one it does not take, or
    one that is not read here."""
    if maker in WITH_MODELS:
        if not model:
            raise UsageError(
                f"{maker} is found in a picture by a model of its own: say which, {maker}=hf:{WITH_MODELS[maker]} or "
                f"{maker}=FOLDER (in Python maker_model=) with its config.json and model.safetensors, or give a "
                f"picture of {maker} itself"
            )
    elif maker in NEED_MODELS:
        raise UsageError(
            f"{maker} is found in a picture by a model of its own, which Limner has not: give a picture of it "
            f"instead (makers here: {', '.join([*MAKERS, *(f'{name}=MODEL' for name in WITH_MODELS)])})"
        )
    elif maker not in MAKERS:
        raise UnknownName("maker", maker, (*MAKERS, *WITH_MODELS))
    elif model:
        raise UsageError(f"{maker} takes no model: leave it out, or ask for {' or '.join(WITH_MODELS)}")


def canny(image: Image.Image, low: float = LOW, high: float = HIGH) -> Image.Image:
    """White edges on black (Canny, 1986, without its blur, as OpenCV's): pixels whose slope is the greatest across the
    edge and above `low`, where they hang together with one above `high`."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return _grey(edges(pixels[None], low, high)[0].float() * 255)


def edges(images: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Where `canny` finds edges in pictures of bytes (b, 3, h, w), on their device: bool (b, h, w)."""
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    # Sobel's sums of whole numbers, which are exact on any device as its convolutions need not be
    across, down = padded[..., 2:] - padded[..., :-2], padded[..., 2:, :] - padded[..., :-2, :]
    dx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]  # b 3 h w
    dy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    size, channel = (dx.abs() + dy.abs()).max(1, keepdim=True)
    dx, dy, size = dx.gather(1, channel)[:, 0], dy.gather(1, channel)[:, 0], size[:, 0]  # b h w
    # the neighbours across the edge, to the nearest of four directions
    flat, steep = dy.abs() < dx.abs() * 0.41421356, dy.abs() > dx.abs() * 2.41421356
    around = F.pad(size, (1, 1, 1, 1))
    height, width = size.shape[-2:]

    def neighbour(down: int, right: int) -> Tensor:
        return around[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

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
    weak = F.pad(ridge & (size <= high), (1, 1, 1, 1))  # until an edge reaches them
    reached, row = F.pad(ridge & (size > high), (1, 1, 1, 1)).flatten().nonzero()[:, 0], width + 2
    around = torch.tensor([d + r for d in (-row, 0, row) for r in (-1, 0, 1)], device=size.device)
    while len(reached):  # grow along ridges
        near = (reached[:, None] + around).flatten()
        reached = near[weak.view(-1)[near]].unique()
        weak.view(-1)[reached] = False
    return ridge & ~weak[:, 1:-1, 1:-1]


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


# -------------------------------------------------------------------- what models find

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Pairs of OpenPose's joints: nose, neck, the right shoulder, elbow and wrist, the left ones, the right hip, knee and
ankle, the left ones, the right eye, the left one, the ears likewise."""
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""Of joints, and at `LIMB_LIGHT` of limbs, in their order."""
LIMB_LIGHT, THICK, DRAWN_AT = 0.6, 4, 512
"""Half the thickness of a limb, and the radius of a joint, are THICK pixels of a picture of 512 a side: there the
pictures that ControlNets learnt from were drawn."""


def shaded(near: Tensor) -> Image.Image:
    """Grey of (h, w) numbers, the least black, the greatest white; all black where they are one."""
    near = near - near.min()
    return _grey(near / near.max().clamp(min=1e-12) * 255)


def skeleton(joints: Sequence[tuple[float, float] | None], width: int, height: int) -> Image.Image:
    """OpenPose's drawing of a body, on black: ellipses between those of its 18 joints, (x, y) in pixels, that are
    there, and circles on them."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    thick = max(1.0, THICK * min(width, height) / DRAWN_AT)
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        start, end = joints[a], joints[b]
        if start is not None and end is not None:
            draw.polygon(_ellipse(start, end, thick), tuple(int(LIMB_LIGHT * n) for n in colour))
    for joint, colour in zip(joints, COLOURS, strict=True):
        if joint is not None:
            draw.circle(joint, thick, colour)
    return image


def _ellipse(start: tuple[float, float], end: tuple[float, float], thick: float) -> list[tuple[float, float]]:
    """Corners all round one whose long axis goes from `start` to `end`, and whose short one is 2 * `thick`."""
    x, y = (end[0] + start[0]) / 2, (end[1] + start[1]) / 2
    along_x, along_y = (end[0] - start[0]) / 2, (end[1] - start[1]) / 2
    length = math.hypot(along_x, along_y) or 1.0
    across_x, across_y = -along_y / length * thick, along_x / length * thick
    turns = [math.radians(k) for k in range(0, 360, 5)]
    return [(x + math.cos(t) * along_x + math.sin(t) * across_x, y + math.cos(t) * along_y + math.sin(t) * across_y)
            for t in turns]  # fmt: skip


def _slopes(image: Image.Image) -> tuple[Tensor, Tensor]:
    """Sobel's of grey across and down, edges repeated."""
    grey = torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32).copy())[None, None]
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    dx, dy = (-F.conv2d(padded, kernel[None, None])[0, 0] for kernel in (SIDES.T.contiguous(), SIDES))
    return dx, dy


def _grey(values: Tensor) -> Image.Image:
    return Image.fromarray(values.round().clamp(0, 255).to(torch.uint8).numpy(), "L").convert("RGB")
