"""Diffusion as it began (Sohl-Dickstein et al. 2015, arXiv:1503.03585): pictures are turned into noise in many small
steps, a network learns the mean and the variance of each step back, and what it minimises is the variational bound.

x^(0) are pixels of mean 0 and variance 1. A step t of 0 to T - 1, the paper's t + 1, leads to x^(t+1): as in the
authors' code (Sohl-Dickstein/Diffusion-Probabilistic-Models) the first is not undone, and the least variance that the
model can have is `first_beta`. Bits are those of a value of 8 bits, so that they compare with those of other models:
log2(127.5 * std) more than of x^(0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from limner import pictures
from limner.errors import UsageError
from limner.models.multiscale import Multiscale
from limner.systems.wordless import Wordless
from limner.types import Defaults, Images, Latents, Request

FLOOR, CEILING = 1e-6, 1e-5
"""No beta is nearer to 0 and to 1."""
MOST_STEPS = 1000
"""As many as a request may ask for."""
Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x^(t+1) (b, c, h, w), t (b,)) -> mean and deviation of x^(t)."""


def constant_fraction(steps: int) -> Float[Tensor, " t"]:
    """beta, so that each step erases 1 / `steps` of the variance that the picture had at first (section 2.4.1)."""
    return 1 / torch.linspace(steps, 2, steps, dtype=torch.float64)


def bumps(steps: int, count: int) -> Float[Tensor, "t n"]:
    """`count` Gaussians over the steps, of the width of half their distance, that sum to 1 at each (appendix D.2)."""
    t, centres = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (steps, count))
    return (-2 * ((t[:, None] - centres) / (centres[1] - centres[0])).square()).softmax(dim=1)


class Trajectory:
    """The forward process of variances `betas` (t,), in float64."""

    def __init__(self, betas: Float[Tensor, " t"]) -> None:
        self.betas, self.alphas = betas, (1 - betas).cumprod(0)
        """`alphas` is what is left of the picture's variance after each step."""

    def __len__(self) -> int:
        return len(self.betas)

    def diffuse(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x^(t+1) of x^(0), both (b, c, h, w), by noise of that shape; `t` (b,)."""
        alpha = rows(self.alphas, t, x0)
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps

    def posterior(self, x0: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b, c, h, w) and deviation (b, 1, 1, 1) of q(x^(t) | x^(t+1), x^(0)), for t from 1."""
        before = self.alphas / (1 - self.betas)  # alpha of x^(t)
        of_x0 = before.sqrt() * self.betas / (1 - self.alphas)
        of_x = (1 - self.betas).sqrt() * (1 - before) / (1 - self.alphas)
        std = (self.betas * (1 - before) / (1 - self.alphas)).clamp_min(0).sqrt()
        return rows(of_x0, t, x) * x0 + rows(of_x, t, x) * x, rows(std, t, x)

    def nats(self, kernel: Kernel, x0: Tensor, t: Tensor, eps: Tensor) -> Float[Tensor, " b"]:
        """The bound on -log p(x^(0)) a dimension (appendix B), where the sum over the steps from 1 on is taken as
        T - 1 times that of `t`. The paper's data have variance 1, and then the last term is 0."""
        x = self.diffuse(x0, t, eps)
        (mu, sigma), (mean, std) = kernel(x, t), self.posterior(x0, x, t)
        kl = (sigma / std).log() + (std.square() + (mean - mu).square()) / (2 * sigma.square()) - 0.5
        # H_q(x^(1) | x^(0)) - H_q(x^(T) | x^(0)) + H_p(x^(T))
        entropies = 0.5 * (math.log(2 * math.pi * math.e) + self.betas[0].log() - (1 - self.alphas[-1]).log())
        unlike = 0.5 * (self.alphas[-1] + self.betas[0]).to(x0.dtype) * (x0.square() - 1)
        return (len(self) - 1) * kl.flatten(1).mean(1) + entropies.to(x0.dtype) + unlike.flatten(1).mean(1)


def rows(values: Float[Tensor, " t"], t: Tensor, like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    return values[t].to(like.dtype)[:, None, None, None]


def multiplied(mean: Tensor, std: Tensor, picture: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the step back N(mean, std^2), times r(x) = N(x; picture, deviation^2) (section 2.5): where
    that is 0 the picture itself, which is inpainting, where it is infinite the step as it was."""
    share = std.square() / (std.square() + deviation.square())
    return torch.lerp(mean, picture, share), std * (1 - share).sqrt()


class Bound(NamedTuple):
    """Bits a dimension of 8 bits: the model's bound with its standard error over the pictures, and what the isotropic
    Gaussian takes that fits the same pictures best; each picture was measured at so many `steps`."""

    bits: float
    error: float
    gaussian: float
    steps: int

    @property
    def gain(self) -> float:
        """What the paper's table 1 has, but a dimension and not a pixel."""
        return self.gaussian - self.bits


class Standardized(nn.Module):
    """Images in [-1, 1] <-> x^(0), of one channel where pictures are grey, on white."""

    factor = 1

    def __init__(self, channels: int, mean: float, std: float) -> None:
        super().__init__()
        self.channels, self.mean, self.std = channels, mean, std

    def encode(self, images: Images) -> Latents:
        images = images if self.channels == 4 else pictures.opaque(images)
        images = images.mean(1, keepdim=True) if self.channels == 1 else images
        return (images - self.mean) / self.std

    def decode(self, latents: Latents) -> Images:
        """Not clamped; grey ones have three channels, too."""
        images = latents * self.std + self.mean
        return images.expand(-1, 3, -1, -1) if self.channels == 1 else images


class NonequilibriumSystem(Wordless, nn.Module):
    """Trained with the variational bound, drawn by walking all of the trajectory back; it reads no words."""

    task = "unconditional"
    phases = ("main",)
    grid = 1

    def __init__(
        self,
        network: Multiscale,
        defaults: Defaults,
        name: str,
        family: str,
        trajectory: int = 1000,
        first_beta: float = 1e-3,
        mean: float = 0.0,
        std: float = 1.0,
        learned_schedule: bool = False,
        repeats: int = 1,
    ) -> None:
        """`mean` and `std` are those of all values of the pictures in [-1, 1]. `learned_schedule` lets beta move with
        time, too (section 2.4.1). `repeats` is how often each step back is taken over a picture with a mask."""
        super().__init__()
        if not 2 <= trajectory <= MOST_STEPS or not 0 <= first_beta < 1 or std <= 0 or repeats < 1:
            raise UsageError(
                f"trajectory={trajectory}, first_beta={first_beta:g}, std={std:g} and repeats={repeats}: give 2 "
                f"to {MOST_STEPS} steps, a variance from 0 to 1, a deviation above 0 and 1 or more"
            )
        config = network.config
        self.name, self.family, self.unit = name, family, config.unit
        self.steps, self.first_beta, self.repeats = trajectory, first_beta, repeats
        whole: dict[str, Any] = {}
        if config.dense_width:
            whole = dict.fromkeys(("width", "height", "min_size", "max_size"), config.size)
        self.defaults = replace(defaults, steps=trajectory, prompted=False, **whole)
        self.network, self.autoencoder = network, Standardized(config.channels, mean, std)
        self.schedule = nn.Parameter(torch.zeros(config.num_coeffs), requires_grad=learned_schedule)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.schedule.device

    def trajectory(self) -> Trajectory:
        """beta is that of a constant fraction, and learned around it as the variances of the steps back are."""
        fraction = constant_fraction(self.steps).to(self.device)
        floor = torch.full_like(fraction, FLOOR)
        floor[0] += self.first_beta
        change = self.basis() @ self.schedule.double()
        return Trajectory(floor + (fraction.logit() + change).sigmoid() * (1 - floor - CEILING))

    def basis(self) -> Float[Tensor, "t n"]:
        return bumps(self.steps, self.network.config.num_coeffs).to(self.device)

    def kernel(self, trajectory: Trajectory) -> Kernel:
        """The step back: its mean is moved away from x sqrt(1 - beta), and its variance away from beta, by what the
        network's coefficients of bumps in time come to (appendix D.2, as in the authors' code)."""
        basis = self.basis()

        def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            moved, widened = torch.einsum("kbnchw,bn->kbchw", self.network(x).float(), basis[t].float())
            beta = rows(trajectory.betas, t, x)
            mu = (1 - beta).sqrt() * x + beta.sqrt() * moved
            return mu, (beta.logit() + widened / math.sqrt(self.steps)).sigmoid().sqrt()

        return step

    # ---------------------------------------------------------------- training

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        """The bound in bits a dimension, each picture at a step of its own, and beside it the isotropic Gaussian."""
        x0 = self.prepared(batch["images"], generator)
        t = torch.randint(1, self.steps, (len(x0),), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        trajectory = self.trajectory()
        bits = self.in_bits(trajectory.nats(self.kernel(trajectory), x0, t, eps).mean())
        gaussian = self.in_bits(isotropic(x0))
        return {"loss": bits, "gaussian": gaussian, "gain": gaussian - bits}

    def prepared(self, images: Images, generator: torch.Generator) -> Latents:
        """x^(0) of images, with noise that makes of 256 values a density (uniform, as wide as one value)."""
        x0 = self.autoencoder.encode(images)
        noise = torch.rand(x0.shape, generator=generator, device=x0.device) - 0.5
        return x0 + noise / (127.5 * self.autoencoder.std)

    def in_bits(self, nats: Tensor) -> Tensor:
        """Bits of a value of 8 bits, of nats of x^(0)."""
        return nats / math.log(2) + math.log2(127.5 * self.autoencoder.std)

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return [*self.network.parameters(), *([self.schedule] if self.schedule.requires_grad else [])]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.network.compile(*args, **kwargs)

    # ---------------------------------------------------------------- drawing

    def check(self, request: Request) -> None:
        if (request.prompt + request.negative).strip():
            raise UsageError(f"{self.name} reads no words, it draws what it learned to: leave the prompt out")
        usual: dict[str, Any] = {
            name: getattr(self.defaults, name) for name in ("steps", "guidance", "sampler", "schedule")
        }
        usual |= {"guidance_kind": "cfg", "guidance_rescale": 0, "guidance_mimic": 0, "guidance_interval": None}
        usual |= {"eta": None, "churn": 0, "pag_scale": 0, "tile": 0, "vae_tile": None, "control": (), "ip_adapter": ()}
        if vain := [name for name, value in usual.items() if getattr(request, name) != value]:
            raise UsageError(
                f"{self.name} walks all of its {self.steps} steps back, and nothing leads it: leave "
                f"{' and '.join(vain)} out"
            )

    def given(self, request: Request, count: int) -> dict[str, Tensor]:
        """What `sample` is given of the picture and the mask of a request, for `count` pictures."""
        found, size = {}, (request.width, request.height)
        if request.image is not None:
            found["start"] = self.encode(pictures.to_tensor(request.image, *size).to(self.device))
        if request.mask is not None:
            found["paint"] = pictures.to_latents(request.mask, *size, 1).to(self.device)
        return {name: value.expand(count, -1, -1, -1) for name, value in found.items()}

    def sample(
        self,
        cond: None,
        request: Request,
        noise: Callable[[tuple[int, ...]], Tensor],
        start: Latents | None = None,
        paint: Tensor | None = None,
    ) -> Latents:
        """x^(1). `start` is a picture to walk to, and back from, `request.strength` of the way into noise; where
        `paint` (b, 1, h, w) is 0 it stays what it is, by `multiplied`."""
        shape = (self.autoencoder.channels, request.height, request.width)
        eps = noise(shape)
        strength = 1.0 if request.strength is None else request.strength
        first = max(1, round(strength * self.steps)) - 1
        if start is None or (paint is not None and strength == 1):  # which sees nothing of what is under the mask
            x = eps
        else:
            x = self.trajectory().diffuse(start, torch.full((len(eps),), first, device=eps.device), eps)
        deviation = None if paint is None else torch.zeros_like(paint).masked_fill(paint > 0, math.inf)
        on_step = (lambda *_: None) if request.on_step is None else request.on_step
        return self.walk(x, first, lambda: noise(shape), start, deviation, on_step)

    def walk(
        self,
        x: Latents,
        first: int,
        noise: Callable[[], Tensor],
        picture: Latents | None = None,
        deviation: Tensor | None = None,
        on_step: Callable[..., None] = lambda *_: None,
    ) -> Latents:
        """x^(1) from x^(first+1), step by step. With a `deviation` (b, 1 or c, h, w) each step is `multiplied` by
        N(picture, deviation^2), and the walk draws from about the posterior: a picture inpainted, or denoised.

        About, as x^(t) is held to what x^(0) is. Steps that are taken `repeats` times, with one into noise between
        them, draw the closer to it the more they are.
        """
        trajectory = self.trajectory()
        kernel = self.kernel(trajectory)
        again = 1 if deviation is None else self.repeats

        def held(mean: Tensor, std: Tensor) -> Tensor:
            if deviation is not None:
                assert picture is not None
                mean, std = multiplied(mean, std, picture, deviation)
            return mean + std * noise()

        if deviation is not None:
            assert picture is not None
            x = torch.where(deviation == 0, picture, x)
        for t in range(first, 0, -1):
            at = torch.full((len(x),), t, device=x.device)
            for k in range(again):
                if k:
                    beta = rows(trajectory.betas, at, x)
                    x = held((1 - beta).sqrt() * x, beta.sqrt().expand_as(x))
                x = held(*kernel(x, at))
            on_step(first - t + 1, first, partial(self.preview, x))
        return x

    def encode(self, images: Images, tile: int | None = None) -> Latents:
        with torch.no_grad():
            return self.autoencoder.encode(images)

    def decode(self, latents: Latents, tile: int | None = None) -> Images:
        return self.autoencoder.decode(latents)

    def preview(self, latents: Latents) -> list[Image.Image]:
        return [pictures.to_pil(row) for row in self.decode(latents).nan_to_num().clamp(-1, 1).float().cpu()]


def isotropic(x0: Latents) -> Tensor:
    """Nats a dimension of the isotropic Gaussian that fits x^(0) best, whose mean is one number for all."""
    return 0.5 * (2 * math.pi * math.e * x0.var(correction=0)).log()


@torch.no_grad()
def bound_in_bits(system: NonequilibriumSystem, images: Images, generator: torch.Generator, steps: int = 0) -> Bound:
    """The bound of a system on images (b, c, h, w) in [-1, 1]: each picture at every step of the trajectory, or, of a
    Monte Carlo estimate, at so many `steps` drawn for it."""
    x0, trajectory = system.prepared(images, generator), system.trajectory()
    kernel, last = system.kernel(trajectory), len(trajectory) - 1
    total = torch.zeros(len(x0), device=x0.device, dtype=torch.float64)
    for k in range(steps or last):
        if steps:
            t = torch.randint(1, last + 1, (len(x0),), generator=generator, device=x0.device)
        else:
            t = torch.full((len(x0),), k + 1, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        total += system.in_bits(trajectory.nats(kernel, x0, t, eps).double())
    bits = total / (steps or last)
    error = float(bits.std() / math.sqrt(len(bits)))
    return Bound(float(bits.mean()), error, float(system.in_bits(isotropic(x0))), steps or last)
