"""Diffusion and flow systems: a network that denoises latents, told of words by a text encoder."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.errors import UsageError
from limner.models.unet import micro_conditioning
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
    adapters: Any = None
    """What `limner.adapters` keeps of those attached."""
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
        """Mean squared error of the prediction, at times that the interpolant draws.

        `batch` has "captions" and either "latents" (b, c, h, w) or "images" (b, 4, H, W).
        """
        x0 = batch["latents"] if "latents" in batch else self.encode(batch["images"])
        n, device = len(x0), x0.device
        coin = random.Random(generator.initial_seed())  # on the host: asking the device would wait for it
        captions = ["" if coin.random() < self.caption_dropout else caption for caption in batch["captions"]]
        t, sigma = self.interpolant.draw(n, generator, device)
        eps = torch.randn(x0.shape, generator=generator, device=device)

        level = sigma[:, None, None, None]
        alpha = self.interpolant.alpha(level)  # type: ignore[arg-type]
        x = self.interpolant.input_scale(level) * (alpha * x0 + level * eps)
        cond = self.sized(self.text_encoder.encode(captions), x0.shape[3] * self.grid, x0.shape[2] * self.grid)
        output = self.network(x, t, cond)
        return {"loss": F.mse_loss(output.float(), self.prediction.target(x0, eps, alpha, level))}

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for block in getattr(self.network, "blocks", [self.network]):
            block.compile(*args, **kwargs)

    # ---------------------------------------------------------------- sampling

    def check(self, request: Request) -> None:
        if not request.prompt.strip():
            raise UsageError("the prompt is empty: say what to draw")
        self.sigmas(request)

    def sigmas(self, request: Request) -> list[float]:
        """What the sampler walks. Raises UsageError for a schedule that the interpolant cannot have."""
        return schedules.plan(request.schedule, request.sampler, request.steps, self.interpolant)

    def condition(self, prompts: list[str], request: Request) -> Prompts:
        unique = list(dict.fromkeys([*prompts, request.negative]))
        rows = {text: i for i, text in enumerate(unique)}
        encoded = self.text_encoder.encode(unique)
        pick = lambda texts: encoded.map(lambda value: value[[rows[t] for t in texts]])  # noqa: E731
        cond, uncond = pick(prompts), pick([request.negative] * len(prompts))
        width, height = request.width, request.height
        return Prompts(self.sized(cond, width, height), self.sized(uncond, width, height, score=2.5))

    def sized(self, cond: Conditioning, width: int, height: int, score: float = 6.0) -> Conditioning:
        """`cond` with what SDXL is told of sizes in pixels, or its refiner of sizes and of how good pictures look."""
        vector_width = getattr(self.network.config, "vector_width", 0)
        if not vector_width:
            return cond
        assert cond.pooled is not None
        last = [height, width] if vector_width == cond.pooled.shape[1] + 6 * 256 else [score]
        numbers = torch.tensor([height, width, 0, 0, *last], device=cond.pooled.device)
        return replace(cond, vector=micro_conditioning(cond.pooled, numbers.expand(len(cond.pooled), -1)))

    def words_cut(self, text: str) -> str:
        return self.text_encoder.words_cut(text)

    def words_unknown(self, text: str) -> str:
        return self.text_encoder.words_unknown(text)

    def denoiser(self, prompts: Prompts, guidance: float) -> Denoise:
        """The denoiser a solver asks, guided within the model's interval: two rows of the network a picture there, one
        elsewhere and with guidance 1."""
        dtype = next(self.network.parameters()).dtype
        cond, uncond = (c.map(lambda v: v.to(dtype) if v.is_floating_point() else v) for c in vars(prompts).values())
        both = Conditioning.cat([cond, uncond])

        def predict(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
            seen = self.interpolant.input_scale(sigma) * x
            t = torch.full((len(x),), self.interpolant.time(sigma), device=x.device)
            output = self.network(seen.to(dtype), t, cond).to(x.dtype)
            return self.prediction.to_x0(output, x, self.interpolant.alpha(sigma), sigma)

        def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            prompt, negative = predict(torch.cat([x, x]), sigma, both).chunk(2)
            return prompt, negative

        def plain(x: Tensor, sigma: float) -> Tensor:
            return predict(x, sigma, cond)

        if guidance == 1:
            return plain
        guided = classifier_free(pair, guidance)
        return within(self.defaults.guidance_interval, guided, plain, self.interpolant)

    def sample(
        self, cond: Prompts, request: Request, noise: Callable[[tuple[int, ...]], Tensor], start: Latents | None = None
    ) -> Latents:
        """`start` are latents to begin from (img2img), walked from `request.strength` of the way into noise."""
        shape = (self.autoencoder.channels, request.height // self.grid, request.width // self.grid)
        sigmas = self.sigmas(request)
        eps = noise(shape)
        if start is None:
            bare = request.sampler in schedules.BARE and request.schedule != "leading"
            x = sigmas[0] * eps if bare else self.interpolant.start(eps, sigmas[0])
        else:
            assert request.strength is not None
            sigmas = schedules.from_strength(sigmas, request.strength)
            x = self.interpolant.mix(start, eps, sigmas[0])
        sampler = samplers.get(request.sampler)
        denoise = self.denoiser(cond, request.guidance)
        x = sampler(denoise, x, sigmas, self.interpolant, noise=lambda: noise(shape), on_step=request.on_step)
        return self.interpolant.input_scale(sigmas[-1]) * x

    def encode(self, images: Images) -> Latents:
        """Transparency goes onto white where the autoencoder knows none."""
        if self.autoencoder.config.image_channels == 3:
            images = images[:, :3] + 1 - images[:, 3:]
        with torch.no_grad():
            return self.autoencoder.encode(images)

    def decode(self, latents: Latents) -> Images:
        return self.autoencoder.decode(latents)
