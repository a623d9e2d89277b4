"""Autoencoders as systems: trained to give a picture back, drawn with by giving one back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner import pictures
from limner.errors import UsageError
from limner.models import tiling
from limner.nn.convolution import ChannelToSpace, ResidualBlock, SpaceToChannel
from limner.text.prompts import Dialect
from limner.types import Defaults, Images, Latents, Request


class AutoencodingSystem(nn.Module):
    """A KL autoencoder of premultiplied RGBA (arXiv:2112.10752), without adversary or pretrained perceptual network.

    The loss is L1 + gradients at three scales + a light KL, and the same L1 for a half-size picture decoded from
    half-size latents: that makes latents scale as pictures do, which diffusion models learn more easily
    (scale equivariance, arXiv:2502.14831; EQ-VAE, arXiv:2502.09509).
    """

    autoencoder: Any
    grid: int
    vae: dict[str, str] = {}  # noqa: RUF012 (put anew, never changed)
    """What a picture remembers of an autoencoder that is not the model's own."""
    weights_hash: Callable[[], str] = staticmethod(lambda: "")
    """Where it was read from files: waits for their hash, which is made beside the drawing."""
    works_on = None
    stays = True
    """It has one part, which is always at work."""
    task = "autoencoding"
    dialects: tuple[Dialect, ...] = ("plain",)
    clip_skip = None
    phases = ("main",)

    def __init__(
        self,
        autoencoder: nn.Module,
        defaults: Defaults,
        name: str,
        family: str,
        kl_weight: float = 1e-7,
        gradient_weight: float = 1.0,
        scale_weight: float = 0.25,
    ) -> None:
        super().__init__()
        self.name, self.family, self.defaults = name, family, defaults
        self.autoencoder = autoencoder
        self.grid = self.autoencoder.factor
        self.kl_weight, self.gradient_weight, self.scale_weight = kl_weight, gradient_weight, scale_weight

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.autoencoder.parameters()).device

    @property
    def model_hash(self) -> str:
        return self.weights_hash()

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        images = batch["images"]
        mean, logvar = (part.float() for part in self.autoencoder.posterior(images))
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator, device=mean.device)
        rebuilt = self.autoencoder.decoder(z).float()
        l1 = F.l1_loss(rebuilt, images)
        edges = gradient_loss(rebuilt, images)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        small = self.autoencoder.decoder(F.avg_pool2d(z, 2)).float()
        scale = F.l1_loss(small, F.avg_pool2d(images, 2))
        loss = l1 + self.gradient_weight * edges + self.kl_weight * kl + self.scale_weight * scale
        psnr = 10 * torch.log10(4 / (rebuilt - images).square().mean((1, 2, 3))).mean()
        return {"loss": loss, "l1": l1, "gradient": edges, "kl": kl, "scale": scale, "psnr": psnr}

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.autoencoder.parameters())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        torch._dynamo.config.recompile_limit = 64  # blocks of one class at many widths and sizes
        for module in self.autoencoder.modules():
            if isinstance(module, ResidualBlock | SpaceToChannel | ChannelToSpace):
                module.compile(*args, **kwargs)

    @torch.no_grad()
    def finish(self, batches: Any, samples: int = 4096, chunk: int = 128) -> None:
        """After training: measure mean and deviation of the latents' channels, so that `encode` gives unit variance."""
        self.autoencoder.latent_mean.zero_()
        self.autoencoder.latent_std.fill_(1)
        count = -(-min(samples, 4 * len(batches)) // chunk)
        means = [self.autoencoder.posterior(batches.batch(k, chunk)["images"])[0].float() for k in range(count)]
        z = torch.cat([mean.transpose(0, 1).flatten(1) for mean in means], 1)  # batches may have shapes of their own
        self.autoencoder.latent_mean.copy_(z.mean(1))
        self.autoencoder.latent_std.copy_(z.std(1).clamp_min(1e-3))

    def check(self, request: Request) -> None:
        if (request.prompt + request.negative).strip():
            raise UsageError(
                f"{self.name} is an autoencoder: it reads no words, it gives a picture back: -i IMAGE without a prompt"
            )

    def condition(self, prompts: list[str], request: Request, negatives: list[str] | None = None) -> None:
        return None

    def words_cut(self, text: str) -> str:
        return ""

    words_unknown = words_cut  # it reads none

    def words_unreached(self, text: str, request: Request) -> list[str]:
        return []

    def sample(
        self,
        cond: None,
        request: Request,
        noise: Callable[[tuple[int, ...]], Tensor],
        start: Latents | None = None,
    ) -> Latents:
        """The latents of the picture given, or standard normal ones: the prior of a variational autoencoder."""
        shape = (self.autoencoder.channels, request.height // self.grid, request.width // self.grid)
        return noise(shape) if start is None else start

    def widen(self) -> bool:
        return False

    def given(self, request: Request, count: int) -> dict[str, Tensor]:
        """What `sample` is given of the picture of a request, for `count` pictures."""
        if request.image is None:
            return {}
        picture = pictures.to_tensor(request.image, request.width, request.height)
        device = next(self.autoencoder.parameters()).device
        return {"start": self.encode(picture.to(device), request.vae_tile).expand(count, -1, -1, -1)}

    def encode(self, images: Images, tile: int | None = None) -> Latents:
        """In tiles of so many pixels, where None leaves it to the size of the pictures."""
        with torch.no_grad():
            height, width = images.shape[2:]
            return tiling.through(self.autoencoder, width, height, tile).encode(images)

    def decode(self, latents: Latents, tile: int | None = None) -> Images:
        """As `encode`."""
        height, width = (n * self.grid for n in latents.shape[2:])
        return tiling.through(self.autoencoder, width, height, tile).decode(latents)


def gradient_loss(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """L1 of the differences between neighbouring pixels, summed over `scales` halvings of the size."""
    total = a.new_zeros(())
    for scale in range(scales):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        d = a - b
        total = total + (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
    return total
