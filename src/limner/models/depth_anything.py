"""Depth Anything (arXiv:2401.10891, its second version arXiv:2406.09414): how near every pixel of one picture is.

DINOv2 looks, and what four of its layers say is brought to four sizes and joined from the coarsest to the finest (the
neck and the head of DPT, arXiv:2103.13413, without its use of the token of the whole picture). What is found is one
over the distance, up to a factor and a shift, or, in networks called metric, the distance in metres. Names are those
of transformers' files.
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
from limner.models.dinov2 import DINOV2_LARGE, DINOV2_SMALL, DINOV2_TINY, DINOv2, DINOv2Config


@dataclass(frozen=True, kw_only=True)
class DepthAnythingConfig:
    """`layers`, counted from 1, are listened to; each is brought to `widths` channels and to `factors` times as many
    pixels a side as it has patches, whole ones or one over these. `reach` is the greatest distance of a metric network,
    in metres, and a factor of any other."""

    eye: DINOv2Config = DINOV2_SMALL
    layers: tuple[int, ...] = (3, 6, 9, 12)
    widths: tuple[int, ...] = (48, 96, 192, 384)
    factors: tuple[float, ...] = (4, 2, 1, 0.5)
    fusion: int = 64
    head: int = 32
    metric: bool = False
    reach: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.widths) == len(self.factors):
            raise UsageError(
                f"{len(self.layers)} layers, {len(self.widths)} widths and {len(self.factors)} factors: give one "
                "of each for the others"
            )
        if sorted(set(self.layers) & set(range(1, self.eye.depth + 1))) != list(self.layers):
            raise UsageError(f"layers={self.layers} do not rise from 1 to {self.eye.depth} at most")
        if any(f <= 0 or max(f, 1 / f) % 1 or max(f, 1 / f) > 32 for f in self.factors):
            raise UsageError(f"factors={self.factors} are not whole numbers to 32, or one over these")


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How a picture is shown to a network: its height and width scaled by one factor (`keeps_shape`) so that the side
    which changes less becomes that of `size`, to the nearest `multiple` of pixels; without, to that size; by Pillow's
    way `resample`; colours 0 to 1 less `mean`, over `std`."""

    size: tuple[int, int] = (518, 518)
    multiple: int = 14
    keeps_shape: bool = True
    resample: int = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Of a picture of such a height and width."""
        down, across = self.size[0] / height, self.size[1] / width
        if self.keeps_shape:
            down = across = across if abs(1 - across) < abs(1 - down) else down
        found = (round(scale * n / self.multiple) for scale, n in ((down, height), (across, width)))
        tall, wide = (max(1, n) * self.multiple for n in found)
        return tall, wide


DEPTH_ANYTHING_SMALL = DepthAnythingConfig()  # version 2; the first listens to layers 9 to 12
DEPTH_ANYTHING_LARGE = DepthAnythingConfig(
    eye=DINOV2_LARGE, layers=(5, 12, 18, 24), widths=(256, 512, 1024, 1024), fusion=256
)
DEPTH_ANYTHING_TINY = DepthAnythingConfig(
    eye=DINOV2_TINY, layers=(1, 2, 3, 4), widths=(8, 12, 16, 20), fusion=16, head=8
)


class DepthAnything(nn.Module):
    def __init__(self, config: DepthAnythingConfig, sight: Sight | None = None) -> None:
        super().__init__()
        self.config, self.sight = config, sight or Sight()
        self.backbone = DINOv2(config.eye)
        self.neck = Neck(config)
        self.head = Head(config)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) of whole patches, as `prepared` makes them -> (b, h, w) of 0 and more, greater nearer;
        of a metric network metres."""
        height, width = (n // self.config.eye.patch for n in images.shape[2:])
        states = self.backbone(images, self.config.layers)
        maps = [rearrange(s[:, 1:], "b (h w) d -> b d h w", h=height, w=width) for s in states]
        return self.head(self.neck(maps), height, width)

    @torch.no_grad()
    def picture(self, image: Image.Image) -> Image.Image:
        """How near all in an RGB picture is: grey in its size, the nearest white. Raises CheckpointMismatch."""
        first = next(self.parameters())
        found = self(prepared(image, self.sight).to(first.device, first.dtype)).float()
        if not found.isfinite().all():
            raise CheckpointMismatch("the depth that the model finds is no number: its file is damaged, get it again")
        found = 1 / found.clamp(min=1e-3) if self.config.metric else found
        size = (image.height, image.width)
        return hints.shaded(F.interpolate(found[:, None], size, mode="bicubic")[0, 0].cpu())


class Neck(nn.Module):
    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        rows = zip(config.widths, config.factors, strict=True)
        layers = nn.ModuleList(Reassemble(config.eye.width, width, factor) for width, factor in rows)
        self.reassemble_stage = nn.ModuleDict({"layers": layers})
        self.convs = nn.ModuleList(nn.Conv2d(width, config.fusion, 3, padding=1, bias=False) for width in config.widths)
        self.fusion_stage = nn.ModuleDict({"layers": nn.ModuleList(Fusion(config.fusion) for _ in config.widths)})

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Of each layer (b, width, h, w), the finest first -> all of them together, (b, fusion, 8 h, 8 w)."""
        reassemble, fusion = self.reassemble_stage["layers"], self.fusion_stage["layers"]
        assert isinstance(reassemble, nn.ModuleList)
        assert isinstance(fusion, nn.ModuleList)
        levels = [conv(layer(x)) for conv, layer, x in zip(self.convs, reassemble, maps, strict=True)][::-1]
        joined = None
        for k, fuse in enumerate(fusion):
            after = levels[k + 1].shape[2:] if k + 1 < len(levels) else None
            joined = fuse(levels[k], joined, after)
        assert joined is not None
        return joined


class Reassemble(nn.Module):
    """To another number of channels, and of pixels a side."""

    def __init__(self, width: int, channels: int, factor: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, channels, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, round(factor), round(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, round(1 / factor), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.projection(x))


class Fusion(nn.Module):
    """A level joins the coarser ones, which were brought to its size before, and all go on to the size of the next."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.residual_layer1, self.residual_layer2 = Residual(width), Residual(width)

    def forward(self, level: Tensor, coarser: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        x = level if coarser is None else coarser + self.residual_layer1(level)
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.projection(F.interpolate(self.residual_layer2(x), size, mode="bilinear", align_corners=True))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution1, self.convolution2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Head(nn.Module):
    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(config.fusion, config.fusion // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(config.fusion // 2, config.head, 3, padding=1)
        self.conv3 = nn.Conv2d(config.head, 1, 1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """-> (b, h, w) pixels of so many patches."""
        size = (height * self.config.eye.patch, width * self.config.eye.patch)
        x = F.interpolate(self.conv1(x), size, mode="bilinear", align_corners=True)
        x = self.conv3(F.relu(self.conv2(x)))[:, 0]
        return (torch.sigmoid(x) if self.config.metric else F.relu(x)) * self.config.reach


def prepared(image: Image.Image, sight: Sight) -> Tensor:
    """An RGB picture as a network sees it: (1, 3, h, w)."""
    height, width = sight.sides(image.height, image.width)
    shown = image.resize((width, height), Image.Resampling(sight.resample))
    pixels = torch.from_numpy(np.array(shown)).float() / 255
    return ((pixels - torch.tensor(sight.mean)) / torch.tensor(sight.std)).permute(2, 0, 1)[None]
