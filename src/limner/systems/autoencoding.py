"""Autoencoders as systems: trained to give a picture back, drawn with by giving one back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limner import pictures
from limner.errors import UsageError
from limner.models import autoencoder as latent_diffusion
from limner.models import tiling
from limner.models.autoencoder import VQAutoencoder
from limner.models.discriminator import Layers, PatchGAN, adaptive_weight, hinge_loss, vanilla_loss
from limner.nn.convolution import ChannelToSpace, ResidualBlock, SpaceToChannel
from limner.systems.wordless import Wordless
from limner.types import Defaults, Images, Latents, Request


class AutoencodingSystem(Wordless, nn.Module):
    """A KL autoencoder of premultiplied RGBA (arXiv:2112.10752), without adversary or pretrained perceptual network.

    The loss is L1 + gradients at three scales + a light KL, and the same L1 for a half-size picture decoded from
    half-size latents: that makes latents scale as pictures do, which diffusion models learn more easily
    (scale equivariance, arXiv:2502.14831; EQ-VAE, arXiv:2502.09509).
    """

    autoencoder: Any
    grid: int
    task = "autoencoding"
    phases: tuple[str, ...] = ("main",)
    compiled: tuple[type[nn.Module], ...] = (ResidualBlock, SpaceToChannel, ChannelToSpace)

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

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        images = batch["images"]
        mean, logvar = (part.float() for part in self.autoencoder.posterior(images))
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator, device=mean.device)
        rebuilt = self.autoencoder.decoder(z).float()
        l1 = F.l1_loss(rebuilt, images)
        edges = gradient_loss(rebuilt, images)
        kl = kl_to_normal(mean, logvar)
        small = self.autoencoder.decoder(F.avg_pool2d(z, 2)).float()
        scale = F.l1_loss(small, F.avg_pool2d(images, 2))
        loss = l1 + self.gradient_weight * edges + self.kl_weight * kl + self.scale_weight * scale
        return {"loss": loss, "l1": l1, "gradient": edges, "kl": kl, "scale": scale, "psnr": psnr(rebuilt, images)}

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.autoencoder.parameters())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        torch._dynamo.config.recompile_limit = 64  # blocks of one class at many widths and sizes
        for module in self.autoencoder.modules():
            if isinstance(module, self.compiled):
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
            images = pictures.opaque(images, self.autoencoder.config.image_channels)
            return tiling.through(self.autoencoder, width, height, tile).encode(images)

    def decode(self, latents: Latents, tile: int | None = None) -> Images:
        """As `encode`."""
        height, width = (n * self.grid for n in latents.shape[2:])
        return tiling.through(self.autoencoder, width, height, tile).decode(latents)


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Of the loss of latent diffusion's autoencoders. Without a discriminator where `disc_weight` is 0; it begins at
    step `disc_start`. `perceptual_from` is a file with the weights of LPIPS, "" for none (see `limner.models.lpips`).
    An autoencoder has the loss of the KL divergence or of a codebook, one of `kl_weight` and `codebook_weight`;
    `perceptual_weight` is LPIPS's. `disc_loss` is what the discriminator learns by, `disc_width` its channels after the
    first convolution, `disc_layers` how often it halves a picture."""

    type: Literal["adversarial"] = "adversarial"
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    perceptual_from: str = ""
    perceptual_weight: float = 1.0
    disc_weight: float = 0.5
    disc_start: Annotated[int, Field(ge=0)] = 50_001
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    disc_width: int = 64
    disc_layers: Layers = 3


class AdversarialAutoencodingSystem(AutoencodingSystem):
    """A KL or VQ autoencoder as latent diffusion trains it (arXiv:2112.10752, appendix G; VQGAN, arXiv:2012.09841).

    The loss is L1 + LPIPS, against a discriminator whose weight makes it pull at the last layer as they do, and what
    holds the latents: a light KL, or the codebook's. With a KL, L1 + LPIPS is that of a Laplace distribution whose
    scale is learned, summed over a picture; with a codebook, a mean over pixels.
    """

    compiled = (latent_diffusion.ResidualBlock,)

    def __init__(
        self,
        autoencoder: nn.Module,
        defaults: Defaults,
        name: str,
        family: str,
        terms: AdversarialConfig,
        perceptual: nn.Module | None = None,
    ) -> None:
        super().__init__(autoencoder, defaults, name, family)
        self.terms, self.perceptual = terms, perceptual
        self.quantizes = isinstance(autoencoder, VQAutoencoder)
        self.logvar = None if self.quantizes else nn.Parameter(torch.zeros(()))
        self.discriminator = None
        if terms.disc_weight > 0:
            channels = self.autoencoder.config.image_channels
            self.discriminator = PatchGAN(channels, terms.disc_width, terms.disc_layers)
        self.phases = ("generator", "discriminator") if self.discriminator is not None else ("generator",)

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        """`batch` has "images" (b, 4, h, w), and may have "step": without one the discriminator is at work."""
        images = pictures.opaque(batch["images"], self.autoencoder.config.image_channels)
        begun = batch.get("step", self.terms.disc_start) >= self.terms.disc_start
        if phase == "discriminator":
            return self.discriminator_loss(images, generator, begun)
        rebuilt, held = self.rebuild(images, generator)
        error = (rebuilt - images).abs()
        terms = {"l1": error.mean(), "psnr": psnr(rebuilt, images)}
        if self.perceptual is not None:
            lpips = self.perceptual(pictures.opaque(images), pictures.opaque(rebuilt)).float()  # b 1 1 1
            error, terms["lpips"] = error + self.terms.perceptual_weight * lpips, lpips.mean()
        if self.logvar is None:
            nll = error.mean()
            loss = nll + self.terms.codebook_weight * held["codebook"]
        else:
            nll = (error / self.logvar.exp() + self.logvar).sum() / len(images)
            loss, terms["logvar"] = nll + self.terms.kl_weight * held["kl"], self.logvar
        if self.discriminator is not None and begun:
            adversarial = -self.discriminator(rebuilt).float().mean()
            weight = adaptive_weight(nll, adversarial, self.autoencoder.decoder.conv_out.weight)
            loss = loss + self.terms.disc_weight * weight * adversarial
            terms |= {"adversarial": adversarial, "adaptive_weight": weight}
        return {"loss": loss, "nll": nll, **terms, **held}

    def discriminator_loss(self, images: Images, generator: torch.Generator, begun: bool) -> dict[str, Tensor]:
        assert self.discriminator is not None
        if not begun:
            return {"loss": 0 * self.discriminator(images).float().mean()}
        with torch.no_grad():
            rebuilt, _ = self.rebuild(images, generator)
        real, fake = self.discriminator(images).float(), self.discriminator(rebuilt).float()
        loss = (hinge_loss if self.terms.disc_loss == "hinge" else vanilla_loss)(real, fake)
        return {"loss": loss, "real": real.mean(), "fake": fake.mean()}

    def rebuild(self, images: Images, generator: torch.Generator) -> tuple[Images, dict[str, Tensor]]:
        """The images out of latents drawn from the posterior, or quantised, and what holds the latents."""
        codec = self.autoencoder
        if self.quantizes:
            z = codec.to_moments(images).float()
            quantized = codec.quantize(z)
            ids = quantized.ids.flatten()
            shares = z.new_zeros(codec.config.codes).index_add_(
                0, ids, torch.full_like(z[:, 0], 1 / len(ids)).flatten()
            )
            perplexity = torch.special.entr(shares).sum().exp()  # of the codes in use
            return codec.to_images(quantized.z).float(), {"codebook": quantized.loss, "perplexity": perplexity}
        mean, logvar = (part.float() for part in codec.posterior(images))
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator, device=mean.device)
        return codec.to_images(z).float(), {"kl": kl_to_normal(mean, logvar)}

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        if phase == "discriminator":
            assert self.discriminator is not None
            return list(self.discriminator.parameters())
        return [*self.autoencoder.parameters(), *([] if self.logvar is None else [self.logvar])]

    @torch.no_grad()
    def finish(self, batches: Any, samples: int = 512, chunk: int = 16) -> None:
        """After training: measure the deviation of all latents, so that `encode` gives unit variance
        (arXiv:2112.10752, appendix G)."""
        count = -(-min(samples, 4 * len(batches)) // chunk)
        z = torch.cat([self.encode(batches.batch(k, chunk)["images"]) for k in range(count)])
        self.autoencoder.scale /= max(1e-3, float(z.std()))
        self.autoencoder.config = replace(self.autoencoder.config, scale=self.autoencoder.scale)


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of normal distributions (b, c, h, w) to the standard one in nats: summed over a picture, mean over pictures
    (arXiv:1312.6114, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def psnr(rebuilt: Images, images: Images) -> Tensor:
    """Of images in [-1, 1], in dB: the mean of that of each."""
    return 10 * torch.log10(4 / (rebuilt - images).square().mean((1, 2, 3))).mean()


def gradient_loss(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """L1 of the differences between neighbouring pixels, summed over `scales` halvings of the size."""
    total = a.new_zeros(())
    for scale in range(scales):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        d = a - b
        total = total + (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
    return total
