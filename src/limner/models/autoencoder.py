"""The convolutional autoencoder of latent diffusion: images <-> latents, 4 to 32 pixels a latent.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al., arXiv:2112.10752: diffusion costs less and
loses little where an autoencoder has already taken away what the eye does not see. Stable Diffusion 1, 2, XL and 3 and
FLUX share this network and differ in widths, channels of a latent and scale. Its latents are held near a standard
normal (KL, section 3.1) or on the nearest vectors of a codebook (VQ, arXiv:1711.00937).

Unusual: single-head attention over all pixels of the coarsest level; the encoder halves by padding right and bottom
only, so a latent sees a little further down and right than up and left; the decoder has one block a level more than
the encoder; scale and shift, which published files keep apart from the weights, are part of `encode` and `decode`.
Submodules are named as in diffusers' files, which therefore load as they are; others by `checkpoints.autoencoder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.nn import fused
from limner.nn.attention import SpatialAttention
from limner.nn.convolution import Conv2d, Downsample, Upsample
from limner.types import Images, Latents

EPS = 1e-6  # of every group norm


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Pictures of `image_channels`, latents of `latent_channels`; norms are over so many `groups` of channels.

    `widths` run from fine to coarse; each level after the first halves the size. `blocks` is per level of the
    encoder. `attention_levels` count from fine (0) and have attention after each block, as the middle always does.

    Latents are (z - `shift`) * `scale` of the raw z: a shift and a scale that bring them to about unit variance.
    """

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    groups: int = 32
    scale: float = 1.0
    shift: float = 0.0

    @property
    def factor(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True, kw_only=True)
class KLConfig(AutoencoderConfig):
    """`quant_convs`: 1x1 convolutions between the networks and the bottleneck, which later models leave out. `mean` and
    `std`, one a channel, bring the raw z to mean 0 and variance 1 before its shift and scale (Playground 2.5)."""

    type: Literal["kl"] = "kl"
    quant_convs: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VQConfig(AutoencoderConfig):
    """A codebook of `codes` vectors; `commitment` is beta of arXiv:1711.00937, equation 3."""

    type: Literal["vq"] = "vq"
    codes: int = 8192
    commitment: float = 0.25


# The names and shapes of a file do not tell SD1's from SDXL's, nor SD3's from FLUX's: only scale and shift differ.
KL_SD1 = KLConfig(scale=0.18215)  # 83.7M parameters; SD 2 as well
KL_SDXL = KLConfig(scale=0.13025)  # the published weights overflow in float16: run them in bfloat16 or float32
KL_SD3 = KLConfig(latent_channels=16, scale=1.5305, shift=0.0609, quant_convs=False)  # 83.8M
KL_FLUX = KLConfig(latent_channels=16, scale=0.3611, shift=0.1159, quant_convs=False)
KL_UPSCALER = KLConfig(widths=(128, 256, 512), scale=0.08333)  # 55.3M, 4 pixels a latent; SD's x4 upscaler
VQ_F4 = VQConfig(latent_channels=3, widths=(128, 256, 512))  # 55.3M, 4 pixels a latent; LDM-4
KL_TINY = KLConfig(widths=(16, 32, 32), blocks=1, groups=8)
VQ_TINY = VQConfig(latent_channels=3, widths=(16, 32, 32), blocks=1, groups=8, codes=32)


class ConvAutoencoder(nn.Module):
    """What the bottlenecks share: an encoder to `moments` channels, a decoder, and the scale between raw z and
    latents."""

    def __init__(self, config: AutoencoderConfig, moments: int, quant_convs: bool) -> None:
        super().__init__()
        if not config.widths or config.groups < 1 or any(w < 1 or w % config.groups for w in config.widths):
            raise UsageError(f"widths={config.widths} are not all multiples of groups={config.groups}")
        if not (isfinite(config.scale) and isfinite(config.shift) and config.scale > 0):
            raise UsageError(f"latents cannot be scaled by {config.scale:g} and shifted by {config.shift:g}")
        self.factor = config.factor
        self.channels = config.latent_channels
        self.scale, self.shift = config.scale, config.shift
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if quant_convs else None
        self.post_quant_conv = nn.Conv2d(self.channels, self.channels, 1) if quant_convs else None

    def to_moments(self, images: Images) -> Tensor:
        h = self.encoder(images)
        return h if self.quant_conv is None else self.quant_conv(h)

    def to_images(self, z: Tensor) -> Images:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def to_latents(self, z: Tensor) -> Latents:
        return (z - self.shift) * self.scale

    def from_latents(self, latents: Latents) -> Tensor:
        return latents / self.scale + self.shift


class KLAutoencoder(ConvAutoencoder):
    def __init__(self, config: KLConfig) -> None:
        super().__init__(config, 2 * config.latent_channels, config.quant_convs)
        self.config = config
        check_each(config)

    def to_latents(self, z: Tensor) -> Latents:
        return super().to_latents((z - self._each(z, self.config.mean)) / self._each(z, self.config.std, 1.0))

    def from_latents(self, latents: Latents) -> Tensor:
        z = super().from_latents(latents)
        return z * self._each(z, self.config.std, 1.0) + self._each(z, self.config.mean)

    @staticmethod
    def _each(z: Tensor, values: tuple[float, ...], none: float = 0.0) -> Tensor | float:
        return z.new_tensor(values)[:, None, None] if values else none

    def encode(self, images: Images) -> Latents:
        """Images (b, c, h, w) in [-1, 1] -> latents (b, c, h / factor, w / factor): the mean of the posterior."""
        return self.to_latents(self.posterior(images)[0])

    def sample(self, images: Images, eps: Latents) -> Latents:
        """Latents drawn from the posterior with standard normal `eps`, which has their shape."""
        mean, logvar = self.posterior(images)
        return self.to_latents(mean + torch.exp(0.5 * logvar) * eps)

    def decode(self, latents: Latents) -> Images:
        """Latents -> images, not clamped."""
        return self.to_images(self.from_latents(latents))

    def posterior(self, images: Images) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw z, each (b, c, h / factor, w / factor)."""
        mean, logvar = self.to_moments(images).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)


def check_each(config: KLConfig) -> None:
    """Raises UsageError for a mean and std that no channels have."""
    fits = all(map(isfinite, config.mean)) and all(isfinite(std) and std > 0 for std in config.std)
    if not fits or {len(config.mean), len(config.std)} not in ({0}, {config.latent_channels}):
        raise UsageError(
            f"mean={config.mean!s:.100} and std={config.std!s:.100} are not those of {config.latent_channels} channels"
        )


class Quantized(NamedTuple):
    z: Tensor  # b c h w, the nearest codes; its gradient passes straight through to what was quantized
    ids: Tensor  # b h w
    loss: Tensor  # the last two terms of arXiv:1711.00937, equation 3, a mean over elements


class VQAutoencoder(ConvAutoencoder):
    """Diffusion works on what the encoder says, not yet quantized; the codebook is the decoder's first layer
    (arXiv:2112.10752, section 3.1)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config, config.latent_channels, quant_convs=True)
        self.config = config
        self.quantize = Codebook(config.codes, config.latent_channels, config.commitment)

    def encode(self, images: Images) -> Latents:
        """Images (b, c, h, w) in [-1, 1] -> latents (b, c, h / factor, w / factor), not quantized."""
        return self.to_latents(self.to_moments(images))

    def decode(self, latents: Latents) -> Images:
        """Latents -> images by way of the nearest codes; not clamped."""
        return self.to_images(self.quantize(self.from_latents(latents)).z)

    def encode_ids(self, images: Images) -> Tensor:
        """Images -> ids of the nearest codes (b, h / factor, w / factor)."""
        return self.quantize(self.to_moments(images)).ids

    def decode_ids(self, ids: Tensor) -> Images:
        """Ids (b, h, w) -> images, not clamped."""
        return self.to_images(rearrange(self.quantize.embedding(ids), "b h w c -> b c h w"))


class Codebook(nn.Module):
    """z -> the nearest of `codes` vectors, in Euclid's distance. (The released models were trained with `commitment` on
    the other term of the loss, an error that was kept; it changes nothing but training.)"""

    def __init__(self, codes: int, channels: int, commitment: float) -> None:
        super().__init__()
        self.commitment = commitment
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> Quantized:
        ids = self.nearest(z)
        e = rearrange(self.embedding(ids), "b h w c -> b c h w")
        loss = F.mse_loss(e, z.detach()) + self.commitment * F.mse_loss(z, e.detach())
        return Quantized(z + (e - z).detach(), ids, loss)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        dtype = torch.promote_types(z.dtype, torch.float32)  # half precision would name wrong neighbours
        points = rearrange(z, "b c h w -> (b h w) c").to(dtype)
        codes = self.embedding.weight.to(dtype)
        # |z - e|^2 without |z|^2, which is the same for every code
        distance = torch.addmm(codes.square().sum(1), points, codes.T, alpha=-2)
        return distance.argmin(1).view(len(z), *z.shape[2:])


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, moments: int) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                config.blocks,
                config.groups,
                attention=i in config.attention_levels,
                resample="down" if i < last else None,
            )
            for i in range(len(widths))
        )
        self.mid_block = MidBlock(widths[-1], config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)

    def forward(self, x: Images) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(fused.normalized(self.mid_block(x), self.conv_norm_out))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid_block = MidBlock(widths[-1], config.groups)
        self.up_blocks = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                config.blocks + 1,
                config.groups,
                attention=i in config.attention_levels,
                resample="up" if i else None,
            )
            for i in reversed(range(len(widths)))  # coarse to fine
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Images:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(fused.normalized(x, self.conv_norm_out))


class Level(nn.Module):
    """The blocks of one size, and the step to the next."""

    attentions: nn.ModuleList | None
    downsamplers: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        groups: int,
        *,
        attention: bool,
        resample: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(channels if j == 0 else out_channels, out_channels, groups) for j in range(blocks)
        )
        self.attentions = nn.ModuleList(attend(out_channels, groups) for _ in range(blocks)) if attention else None
        self.downsamplers = nn.ModuleList([Downsample(out_channels, "after")]) if resample == "down" else None
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions is not None:
                x = self.attentions[j](x)
        for resample in self.downsamplers or self.upsamplers or ():
            x = resample(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([attend(channels, groups)])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, EPS)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(fused.normalized(x, self.norm1))
        h = self.conv2(fused.normalized(h, self.norm2))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def attend(channels: int, groups: int) -> SpatialAttention:
    """Among all pixels, with one head as wide as the level."""
    return SpatialAttention(channels, 1, groups, EPS)
