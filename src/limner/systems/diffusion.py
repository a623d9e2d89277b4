"""Diffusion and flow systems: a network that denoises latents, told of words by a text encoder."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.sampling import samplers, schedules
from limner.sampling.guidance import classifier_free, within
from limner.sampling.interpolants import Interpolant
from limner.sampling.predictions import Prediction
from limner.types import Conditioning, Defaults, Denoise, Images, Latents, Request


@dataclass(frozen=True)
class Prompts:
    """The words of a batch: `cond` and `uncond` have one row a picture."""

    cond: Conditioning
    uncond: Conditioning


class DiffusionSystem(nn.Module):
    """Trained with the loss of rectified flow or diffusion on latents, sampled by any solver of `limner.sampling`."""

    network: Any
    autoencoder: Any
    text_encoder: Any
    grid: int
    model_hash = ""
    task = "text-to-image"
    phases = ("main",)

    def __init__(
        self,
        network: nn.Module,
        autoencoder: nn.Module,
        text_encoder: nn.Module,
        interpolant: Interpolant,
        prediction: Prediction,
        defaults: Defaults,
        name: str,
        family: str,
        caption_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.name, self.family, self.defaults = name, family, defaults
        self.network = network
        self.autoencoder = autoencoder.requires_grad_(False)
        self.text_encoder = text_encoder.requires_grad_(False)
        self.interpolant, self.prediction, self.caption_dropout = interpolant, prediction, caption_dropout
        self.grid = self.autoencoder.factor

    # ---------------------------------------------------------------- training

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the prediction at logit-normal times (arXiv:2403.03206, section 3.1).

        `batch` has "captions" and either "latents" (b, c, h, w) or "images" (b, 4, H, W).
        """
        x0 = batch["latents"] if "latents" in batch else self.encode(batch["images"])
        n, device = len(x0), x0.device
        coin = random.Random(generator.initial_seed())  # on the host: asking the device would wait for it
        captions = ["" if coin.random() < self.caption_dropout else caption for caption in batch["captions"]]
        sigma = torch.randn(n, generator=generator, device=device).sigmoid()
        eps = torch.randn(x0.shape, generator=generator, device=device)

        level = sigma[:, None, None, None]
        alpha = self.interpolant.alpha(level)  # type: ignore[arg-type]
        cond = self.text_encoder.encode(captions)
        output = self.network(alpha * x0 + level * eps, sigma, cond)
        return {"loss": F.mse_loss(output.float(), self.prediction.target(x0, eps, alpha, level))}

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for block in self.network.blocks:
            block.compile(*args, **kwargs)

    # ---------------------------------------------------------------- sampling

    def condition(self, prompts: list[str], negatives: list[str]) -> Prompts:
        unique = list(dict.fromkeys([*prompts, *negatives]))
        rows = {text: i for i, text in enumerate(unique)}
        encoded = self.text_encoder.encode(unique)
        pick = lambda texts: encoded.map(lambda value: value[[rows[t] for t in texts]])  # noqa: E731
        return Prompts(pick(prompts), pick(negatives))

    def words_cut(self, text: str) -> str:
        return self.text_encoder.words_cut(text)

    def words_unknown(self, text: str) -> str:
        return self.text_encoder.words_unknown(text)

    def denoiser(self, prompts: Prompts, guidance: float) -> Denoise:
        """The denoiser a solver asks, guided within the model's interval: two rows of the network a picture there, one
        elsewhere and with guidance 1."""
        both = Conditioning.cat([prompts.cond, prompts.uncond])

        def predict(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
            t = torch.full((len(x),), sigma, device=x.device)
            output = self.network(x, t, cond).to(x.dtype)
            return self.prediction.to_x0(output, x, self.interpolant.alpha(sigma), sigma)

        def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            cond, uncond = predict(torch.cat([x, x]), sigma, both).chunk(2)
            return cond, uncond

        def plain(x: Tensor, sigma: float) -> Tensor:
            return predict(x, sigma, prompts.cond)

        if guidance == 1:
            return plain
        guided = classifier_free(pair, guidance)
        return within(self.defaults.guidance_interval, guided, plain, self.interpolant)

    def sample(
        self, cond: Prompts, request: Request, noise: Callable[[tuple[int, ...]], Tensor], start: Latents | None = None
    ) -> Latents:
        """`start` are latents to begin from (img2img), walked from `request.strength` of the way into noise."""
        shape = (self.autoencoder.channels, request.height // self.grid, request.width // self.grid)
        sigmas = schedules.get(request.schedule)(request.steps, self.interpolant)
        eps = noise(shape)
        if start is None:
            x = sigmas[0] * eps
        else:
            assert request.strength is not None
            sigmas = schedules.from_strength(sigmas, request.strength)
            x = self.interpolant.mix(start, eps, sigmas[0])
        sampler = samplers.get(request.sampler)
        denoise = self.denoiser(cond, request.guidance)
        return sampler(denoise, x, sigmas, self.interpolant, noise=lambda: noise(shape), on_step=request.on_step)

    def encode(self, images: Images) -> Latents:
        with torch.no_grad():
            return self.autoencoder.encode(images)

    def decode(self, latents: Latents) -> Images:
        return self.autoencoder.decode(latents)
