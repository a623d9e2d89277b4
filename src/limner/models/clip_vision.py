"""CLIP's tower of pictures (arXiv:2103.00020, section 2.4): a vision transformer (arXiv:2010.11929), whose first token
stands for the whole picture. Names are those of transformers' files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from limner.errors import UsageError
from limner.nn.clip import ACTIVATIONS, Layer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Pictures of `size` pixels a side in squares of `patch`; `projection` is the width of the space shared with
    texts."""

    width: int = 1280
    depth: int = 32
    num_heads: int = 16
    hidden: int = 5120
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    projection: int = 1024
    size: int = 224
    patch: int = 14
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.width % self.num_heads:
            raise UsageError(f"width={self.width} is not in equal parts over num_heads={self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")


OPENCLIP_H = CLIPVisionConfig()  # IP-Adapter's for Stable Diffusion 1, and for XL in the files called vit-h
OPENCLIP_BIGG = CLIPVisionConfig(width=1664, depth=48, hidden=8192, projection=1280)
CLIP_L = replace(
    OPENCLIP_H, width=1024, depth=24, hidden=4096, activation="quick_gelu", projection=768
)  # OpenAI's ViT-L/14


class CLIPVision(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, size, size), as `prepared` makes them -> what stands for the whole picture (b, projection), and the
        states of the layer before the last (b, 1 + patches, width)."""
        last, before = self.vision_model(images)
        return self.visual_projection(self.vision_model.post_layernorm(last[:, 0])), before


class VisionTransformer(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config, False) for _ in range(config.depth))})
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The states of the last layer, and of that before."""
        before = x = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            before, x = x, layer(x)
        return x, before


class PatchEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        count = (config.size // config.patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + count, config.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # b n d
        first = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


def prepared(image: Image.Image, size: int) -> Tensor:
    """A picture, on white, as CLIP sees it: (1, 3, size, size), its middle, the shorter side `size` by bicubic
    interpolation, colours of CLIP's training pictures at mean 0 and deviation 1."""
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    scale = size / min(image.size)
    width, height = (size if n == min(image.size) else int(n * scale) for n in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).float() / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
