"""Guidance makes one x0 of several: given the prompt, the negative prompt, no picture to edit, a spoilt network.

A `Combine` is a function of them, a denoiser that uses it is again a denoiser, so samplers never learn of guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limner.errors import UnknownName, UsageError
from limner.sampling.interpolants import Interpolant
from limner.sampling.predictions import Prediction
from limner.types import Denoise

Pair = Callable[[Tensor, float], tuple[Tensor, ...]]
"""(x, sigma) -> (x0 given the prompt, x0 given the negative prompt), from one pass of the network over both, and after
them what `pictured` reads."""
Combine = Callable[..., Tensor]
"""(cond, uncond, x, sigma) -> x0, all (b, c, h, w), and after sigma what is said without the picture where `pictured`
reads it, and what a spoilt network says where `pushed` does.
Some remember what they were given before: one for each drawing."""
Likelihood = Callable[[Tensor, float], Tensor]
"""(x, sigma / alpha) -> log p(y | x) of each row (b,), where x is scaled to alpha^2 + sigma^2 = 1, from one pass of a
classifier of noisy pictures."""
WAYS = ("cfg", "apg", "cfg_zero")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """`scale` 1 is none. `way` is classifier-free guidance, adaptive projected guidance, or CFG-Zero*; `rescale`, 0 to
    1, is how far the spread of what comes out is brought back to that of the prompt alone; `mimic`, 0 for not at all,
    is the scale whose range of values it is kept to; `push`, 0 for not at all, leads away from a spoilt network;
    `picture`, 1 for not at all, is the scale of what a picture to edit says."""

    scale: float = 1.0
    way: Literal["cfg", "apg", "cfg_zero"] = "cfg"
    rescale: float = 0.0
    mimic: float = 0.0
    push: float = 0.0
    picture: float = 1.0

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise UnknownName("guidance", str(self.way), WAYS)
        if not (0 <= self.rescale <= 1 and 0 <= self.mimic <= 100):
            raise UsageError(f"guidance rescale is {self.rescale:g} and mimic {self.mimic:g}: give 0 to 1 and 0 to 100")


def combining(guidance: Guidance, prediction: Prediction, interpolant: Interpolant) -> Combine:
    """A fresh one, for one drawing by a network of this prediction and interpolant."""
    combine = {
        "cfg": lambda: classifier_free(guidance.scale),
        "apg": lambda: projected(guidance.scale),
        "cfg_zero": lambda: zero_star(guidance.scale, prediction, interpolant),
    }[guidance.way]()
    if guidance.picture != 1:
        combine = pictured(combine, guidance.picture)
    if guidance.push:
        combine = pushed(combine, guidance.push)
    if guidance.mimic:
        combine = mimicking(combine, guidance.mimic)
    return rescaled(combine, guidance.rescale, prediction, interpolant) if guidance.rescale else combine


def guided(pair: Pair, combine: Combine, spoilt: Denoise | None = None) -> Denoise:
    """`spoilt` is what `pushed` leads away from, where `combine` holds it."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        cond, uncond, *more = pair(x, sigma)
        more += [] if spoilt is None else [spoilt(x, sigma)]
        return combine(cond, uncond, x, sigma, *more)

    return denoise


def classifier_free(scale: float) -> Combine:
    """Classifier-free guidance (arXiv:2207.12598): uncond + scale * (cond - uncond); 1 is no guidance."""
    return lambda cond, uncond, x, sigma: torch.lerp(uncond, cond, scale)


def projected(scale: float, momentum: float = -0.5, parallel: float = 0.0, most: float = 15 / 256) -> Combine:
    """Adaptive projected guidance (arXiv:2410.02416, algorithm 1): of cond - uncond, averaged over the steps with a
    negative `momentum` and cut to `most` of root mean square, the part along cond counts `parallel` times.

    The paper's thresholds, 7.5 for latents of 512 px and 15 for those of 1024, are this root mean square.
    """
    before: Tensor | None = None

    def combine(cond: Tensor, uncond: Tensor, x: Tensor, sigma: float) -> Tensor:
        nonlocal before
        update = cond - uncond if before is None else cond - uncond + momentum * before
        before = update
        size = update.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        update = update * (most / size.clamp(min=1e-12)).clamp(max=1)
        along = _along(update, cond)
        return cond + (scale - 1) * (update - along + parallel * along)

    return combine


def zero_star(scale: float, prediction: Prediction, interpolant: Interpolant, zeros: int = 1) -> Combine:
    """CFG-Zero* (arXiv:2503.18886, algorithm 1) on what the network says: uncond is first scaled to lie as near to cond
    as it can, and at the first `zeros` levels of noise the network is taken to say nothing."""
    seen: list[float] = []

    def combine(cond: Tensor, uncond: Tensor, x: Tensor, sigma: float) -> Tensor:
        if sigma not in seen:
            seen.append(sigma)
        alpha = interpolant.alpha(sigma)
        if seen.index(sigma) < zeros:
            return prediction.to_x0(torch.zeros_like(x), x, alpha, sigma)
        told, other = (prediction.from_x0(x0, x, alpha, sigma) for x0 in (cond, uncond))
        return prediction.to_x0(torch.lerp(_along(told, other), told, scale), x, alpha, sigma)

    return combine


def pictured(combine: Combine, scale: float) -> Combine:
    """And towards what a picture to edit says of itself: + (scale - 1) * (uncond - blind), where cond and uncond are
    given the picture and `blind` is not. With `classifier_free` this is InstructPix2Pix (arXiv:2211.09800, equation 3).
    """
    return lambda cond, uncond, x, sigma, blind: combine(cond, uncond, x, sigma) + (scale - 1) * (uncond - blind)


def pushed(combine: Combine, scale: float) -> Combine:
    """And away from what a spoilt network says of the same prompt: + scale * (cond - spoilt) (perturbed attention
    guidance, arXiv:2403.17377, equation 16). Without a negative prompt this is `classifier_free(1 + scale)` of the two.
    """

    def again(cond: Tensor, uncond: Tensor, x: Tensor, sigma: float, *more: Tensor) -> Tensor:
        *blind, spoilt = more
        return combine(cond, uncond, x, sigma, *blind) + scale * (cond - spoilt)

    return again


def _along(a: Tensor, b: Tensor) -> Tensor:
    """The part of a along b, for each row of (b, c, h, w)."""
    dims = (1, 2, 3)
    wide = b.double()
    share = (a.double() * wide).sum(dims, keepdim=True) / wide.square().sum(dims, keepdim=True).clamp(min=1e-30)
    return (share * wide).to(a.dtype)


def rescaled(combine: Combine, amount: float, prediction: Prediction, interpolant: Interpolant) -> Combine:
    """What the network says, guided, mixed by `amount` with the same at the standard deviation of what it says of the
    prompt (arXiv:2305.08891, equations 14 to 16)."""

    def again(cond: Tensor, uncond: Tensor, x: Tensor, sigma: float, *more: Tensor) -> Tensor:
        alpha, x0 = interpolant.alpha(sigma), combine(cond, uncond, x, sigma, *more)
        told, said = (prediction.from_x0(v, x, alpha, sigma) for v in (cond, x0))
        spread, wanted = (out.std(dim=(1, 2, 3), keepdim=True) for out in (said, told))
        return prediction.to_x0(torch.lerp(said, said * (wanted / spread), amount), x, alpha, sigma)

    return again


def on_first(combine: Combine, channels: int) -> Combine:
    """On the first `channels` of x0 alone: the others are what the prompt says of them (DiT's and SiT's programs)."""
    return lambda cond, *rest: torch.cat([combine(cond, *rest)[:, :channels], cond[:, channels:]], dim=1)


def mimicking(combine: Combine, scale: float, share: float = 0.995) -> Combine:
    """Dynamic thresholding (Imagen, arXiv:2205.11487, section 2.3) for latents, which know no [-1, 1]: in every channel
    x0 is clipped to the `share` of its values nearest to their mean, and brought into the range that these have at
    classifier-free guidance of `scale`, if that is narrower."""
    model = classifier_free(scale)

    def again(cond: Tensor, uncond: Tensor, x: Tensor, sigma: float, *more: Tensor) -> Tensor:
        x0, like = combine(cond, uncond, x, sigma, *more), model(cond, uncond, x, sigma)
        middle = x0.mean(dim=(2, 3), keepdim=True)
        off = x0 - middle
        reach, wanted = (_quantile(v, share) for v in (off, like - like.mean(dim=(2, 3), keepdim=True)))
        return middle + off.clamp(-reach, reach) * (wanted / reach.clamp(min=1e-12)).clamp(max=1)

    return again


def _quantile(values: Tensor, share: float) -> Tensor:
    """(b, c, 1, 1) of the magnitudes in every channel."""
    flat = values.abs().flatten(2).float()
    return torch.quantile(flat, share, dim=2)[..., None, None].to(values.dtype)


def composed(parts: Sequence[Tensor], weights: Sequence[Tensor], uncond: Tensor) -> Tensor:
    """x0 of several prompts at once: uncond + sum of weight * (part - uncond), weights (b,) each (Composable Diffusion,
    arXiv:2206.01714, equation 11)."""
    x0 = uncond
    for part, weight in zip(parts, weights, strict=True):
        x0 = x0 + weight[:, None, None, None] * (part - uncond)
    return x0


def within(interval: tuple[float, float], guided: Denoise, plain: Denoise, interpolant: Interpolant) -> Denoise:
    """`guided` at noise levels in `interval`, else `plain`, which may ask the network for half as much (guidance
    interval, arXiv:2404.07724). Levels are those of the flow, low < sigma / (alpha + sigma) <= high, so (0, 1] is
    everywhere and (s, s] nowhere, in any coordinate."""
    low, high = interval

    def denoise(x: Tensor, sigma: float) -> Tensor:
        level = sigma / (interpolant.alpha(sigma) + sigma)
        return guided(x, sigma) if low < level <= high else plain(x, sigma)

    return denoise


def classified(
    denoise: Denoise, likelihood: Likelihood, scale: float, interpolant: Interpolant, most: float
) -> Denoise:
    """And towards what a classifier takes for its class (classifier guidance, arXiv:2105.05233, equation 14):
    eps - scale * sigma * the gradient of log p(y | x), or x0 + scale * sigma^2 / alpha * the gradient, in any
    coordinates. A step of the sampler ddpm whose variance is the larger moves its mean by the variance times the
    gradient, as algorithm 1 does, but for a root of 1 - beta. `most` is the largest sigma / alpha that the classifier
    knows, and it is taken for larger ones, where x0 would move by infinity times nothing."""

    def guided(x: Tensor, sigma: float) -> Tensor:
        x0, alpha = denoise(x, sigma), interpolant.alpha(sigma)
        ratio = sigma / alpha if sigma < most * alpha else most
        norm = math.hypot(alpha, sigma) ** -1
        with torch.inference_mode(False), torch.enable_grad():
            seen = (norm * x).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(likelihood(seen, ratio).sum(), seen)
        return x0 + scale * sigma * ratio * norm * gradient

    return guided
