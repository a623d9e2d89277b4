"""ViTPose (arXiv:2204.12484): where the joints of one person are, by a plain vision transformer.

The network is shown one person's box and answers with a heat map for each of COCO's 17 key points, whose peak is found
to a fraction of its pixels (DARK, arXiv:1910.06278, section 3.2, in the coordinates of arXiv:1911.07524). Unusual:
there is no token of the whole picture, yet its position is kept and added to all others. Names are those of
transformers' files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from limner import hints
from limner.errors import CheckpointMismatch, UsageError
from limner.nn.vit import MLP, Attention, PatchEmbeddings

JOINTS = 17
"""COCO's: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; of each two the left one first."""
SHOULDERS = (5, 6)
BODY = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""COCO's number of each of OpenPose's 18 joints; its neck, None, is amid the shoulders."""
SURE = 0.3
"""Height of a peak from which a joint is drawn (that of mmpose, where ViTPose comes from)."""
MARGIN = 1.25
"""How much more than the box of a person is shown."""
MIDDLE, BLUR, REACH = 256, 0.8, 5  # channels of the classic decoder; smoothing of a heat map, and its radius


@dataclass(frozen=True, kw_only=True)
class ViTPoseConfig:
    """Pictures of `size` (height, width) in squares of `patch`. The classic decoder learns how to enlarge, by four; the
    simple one enlarges by `scale` between pixels."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072
    size: tuple[int, int] = (256, 192)
    patch: int = 16
    norm_eps: float = 1e-12
    classic: bool = False
    scale: int = 4

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UsageError(f"width={self.width} is not in equal parts over num_heads={self.num_heads}")
        if any(n % self.patch or n < self.patch for n in self.size) or self.patch < 5:
            raise UsageError(f"size={self.size} is not of whole squares of {self.patch}, which are 5 at least")


VITPOSE_BASE = ViTPoseConfig()
VITPOSE_TINY = ViTPoseConfig(width=32, depth=2, num_heads=2, hidden=64, size=(64, 48))


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Of pictures 0 to 1, what is taken off, and what the rest is divided by."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


class ViTPose(nn.Module):
    def __init__(self, config: ViTPoseConfig, colours: Colours | None = None) -> None:
        super().__init__()
        self.config, self.colours = config, colours or Colours()
        self.backbone = Backbone(config)
        self.head = ClassicDecoder(config) if config.classic else SimpleDecoder(config)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) of the network's size, as `prepared` makes them -> heat maps (b, 17, h, w)."""
        return self.head(self.backbone(images))

    @torch.no_grad()
    def picture(self, image: Image.Image) -> Image.Image:
        """OpenPose's drawing of the one person who fills an RGB picture, in its size; black where none is. Raises
        CheckpointMismatch."""
        first = next(self.parameters())
        heat = self(prepared(image, self.config.size, self.colours).to(first.device, first.dtype)).cpu()
        if not heat.isfinite().all():
            raise CheckpointMismatch("the pose that the model finds is no number: its file is damaged, get it again")
        points, sure = peaks(heat)
        found = in_picture(points, heat.shape[2:], image.size, self.config.size)[0]
        return hints.skeleton(body(found, sure[0], image.size), *image.size)


class Backbone(nn.Module):
    def __init__(self, config: ViTPoseConfig) -> None:
        super().__init__()
        self.grid = config.size[0] // config.patch, config.size[1] // config.patch
        self.embeddings = Embeddings(config, self.grid[0] * self.grid[1])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.depth))})
        self.layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images)
        for layer in self.encoder["layer"].children():
            x = layer(x)
        return rearrange(self.layernorm(x), "b (h w) d -> b d h w", h=self.grid[0])


class Embeddings(nn.Module):
    def __init__(self, config: ViTPoseConfig, count: int) -> None:
        super().__init__()
        self.patch_embeddings = PatchEmbeddings(config.width, config.patch, padding=2)
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + count, config.width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embeddings(images) + self.position_embeddings[:, 1:] + self.position_embeddings[:, :1]


class Layer(nn.Module):
    def __init__(self, config: ViTPoseConfig) -> None:
        super().__init__()
        self.attention = Attention(config.width, config.num_heads)
        self.mlp = MLP(config.width, config.hidden)
        self.layernorm_before = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layernorm_after = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.mlp(self.layernorm_after(x))


class SimpleDecoder(nn.Module):
    def __init__(self, config: ViTPoseConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.conv = nn.Conv2d(config.width, JOINTS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(F.relu(x), scale_factor=self.scale, mode="bilinear"))


class ClassicDecoder(nn.Module):
    def __init__(self, config: ViTPoseConfig) -> None:
        super().__init__()
        self.deconv1 = nn.ConvTranspose2d(config.width, MIDDLE, 4, 2, 1, bias=False)
        self.batchnorm1 = nn.BatchNorm2d(MIDDLE)
        self.deconv2 = nn.ConvTranspose2d(MIDDLE, MIDDLE, 4, 2, 1, bias=False)
        self.batchnorm2 = nn.BatchNorm2d(MIDDLE)
        self.conv = nn.Conv2d(MIDDLE, JOINTS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batchnorm1(self.deconv1(x)))
        return self.conv(F.relu(self.batchnorm2(self.deconv2(x))))


# -------------------------------------------------------------------- between pictures and heat maps


def box(image: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Width and height of what is shown of a picture of such a width and height: all of it with a margin around, in the
    shape of the network's `size` (height, width)."""
    width, height = image
    shape = size[1] / size[0]
    across, down = max(float(width), height * shape), max(float(height), width / shape)
    return across * MARGIN, down * MARGIN


def prepared(image: Image.Image, size: tuple[int, int], colours: Colours) -> Tensor:
    """An RGB picture, taken whole as one person's box, as the network sees it: (1, 3, height, width), pixels between
    others by their nearness, black around the picture."""
    pixels = torch.from_numpy(np.array(image)).double()  # h w c
    down, across = (
        _between(full, n, count)
        for full, n, count in zip(box(image.size, size)[::-1], (image.height, image.width), size, strict=True)
    )
    shown = torch.einsum("ih, hwc, jw -> ijc", down, pixels, across).add(0.5).floor().float() / 255
    return ((shown - torch.tensor(colours.mean)) / torch.tensor(colours.std)).permute(2, 0, 1)[None]


def _between(full: float, n: int, count: int) -> Tensor:
    """How much each of `count` points, the first and the last `full` pixels apart, is of each of `n` pixels, whose
    middle is theirs: (count, n)."""
    at = torch.linspace(0, full, count, dtype=torch.float64) + (n - full) / 2
    near = (1 - (at[:, None] - torch.arange(n)).abs()).clamp(min=0)
    return near * ((at >= 0) & (at <= n - 1))[:, None]


def peaks(heat: Tensor) -> tuple[Tensor, Tensor]:
    """Of heat maps (b, k, h, w) the place of each one's maximum, across and down (b, k, 2) in its pixels, and how high
    it is (b, k). The logarithm of a smoothed map is taken for a paraboloid about the maximum, whose top is the place
    (arXiv:1910.06278, equation 9)."""
    heat = heat.double()
    width = heat.shape[3]
    sure, index = heat.flatten(2).max(2)
    down, across = index // width, index % width
    smooth = F.pad(_smoothed(heat).clamp(0.001, 50).log(), (1, 1, 1, 1), mode="replicate").flatten(2)

    def at(dy: int, dx: int) -> Tensor:
        return smooth.gather(2, ((down + 1 + dy) * (width + 2) + across + 1 + dx)[..., None])[..., 0]

    here, tiny = at(0, 0), torch.finfo(torch.float32).eps
    slope_x, slope_y = (at(0, 1) - at(0, -1)) / 2, (at(1, 0) - at(-1, 0)) / 2
    xx, yy = at(0, 1) - 2 * here + at(0, -1) + tiny, at(1, 0) - 2 * here + at(-1, 0) + tiny
    xy = (at(1, 1) - at(0, 1) - at(1, 0) + 2 * here - at(0, -1) - at(-1, 0) + at(-1, -1)) / 2
    off = torch.stack([yy * slope_x - xy * slope_y, xx * slope_y - xy * slope_x], -1) / (xx * yy - xy**2)[..., None]
    return torch.stack([across, down], -1) - off.nan_to_num(0, 0, 0), sure


def _smoothed(heat: Tensor) -> Tensor:
    """By a Gaussian, mirrored at the edges."""
    offsets = torch.arange(-REACH, REACH + 1, dtype=heat.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * BLUR**2))
    kernel = kernel / kernel.sum()
    for axis in (2, 3):
        count = heat.shape[axis]
        around = (torch.arange(-REACH, count + REACH) % (2 * count)).sub(count - 0.5).abs()
        mirrored = heat.index_select(axis, (count - 0.5 - around).long())
        heat = (mirrored.unfold(axis, 2 * REACH + 1, 1) * kernel).sum(-1)
    return heat


def in_picture(points: Tensor, heat: tuple[int, int], image: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Places (..., 2) in heat maps of such a height and width, in the picture of such a width and height that was
    prepared for the network's `size`."""
    full, whole = torch.tensor(box(image, size)).double(), torch.tensor(image).double()
    steps = torch.tensor([heat[1] - 1, heat[0] - 1]).double()
    return points * full / steps + (whole - full) / 2


def body(points: Tensor, sure: Tensor, image: tuple[int, int]) -> list[tuple[float, float] | None]:
    """OpenPose's 18 joints of COCO's (17, 2) in a picture of such a width and height, with the heights of their peaks
    (17). None is not there: not sure, or beyond the edge."""
    inside = ((points >= 0) & (points <= torch.tensor(image))).all(-1)
    there = ((sure >= SURE) & inside).tolist()
    found: list[tuple[float, float] | None] = []
    for joint in BODY:
        mine = SHOULDERS if joint is None else (joint,)
        x, y = points[list(mine)].mean(0).tolist()
        found.append((x, y) if all(there[k] for k in mine) else None)
    return found
