"""How a diffusion system learns beyond its paper: which times, which noise, and what each error counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from limner.errors import MissingExtra
from limner.sampling.interpolants import Times
from limner.sampling.predictions import Prediction, Scalar


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Objective:
    """As it is, the mean squared error of the prediction at the times that the interpolant draws."""

    times: Times = Field(default_factory=Times)
    min_snr_gamma: Annotated[float, Field(ge=0)] = 0.0
    """An error counts as one of x0 would, by its signal-to-noise ratio, but by no more than this (arXiv:2303.09556,
    whose choice is 5); 0 counts them alike."""
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of the noise that all pixels of a channel share, added to their own, so that a network learns
    to move the mean of a picture (crosslabs.org/blog/diffusion-with-offset-noise; 0.1 there)."""

    variance_weight: Annotated[float, Field(ge=0)] = 0.0
    """How much the variational bound, in bits a dimension, counts beside the error, by which a variance is learned
    (lambda of L_hybrid, arXiv:2102.09672, equation 16; 0.001 there); 0 learns none."""

    coupling: Literal["independent", "optimal"] = "independent"
    """Which noise belongs to which picture: any, or, of those of a batch with one caption, that which has the least
    way to go in all (minibatch optimal transport, arXiv:2302.00482, algorithm 3; among all captions it would tell a
    class by its noise, which no drawing knows)."""

    def noise(self, x0: Tensor, generator: torch.Generator, captions: Sequence[str] = ()) -> Tensor:
        """eps for latents `x0` (b, c, h, w) of `captions`, () where they are all one. Raises MissingExtra."""
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        if self.offset_noise:
            eps = eps + self.offset_noise * torch.randn(*x0.shape[:2], 1, 1, generator=generator, device=x0.device)
        return eps[coupled(x0, eps, captions or [""] * len(x0))] if self.coupling == "optimal" else eps

    def error(
        self,
        output: Tensor,
        target: Tensor,
        prediction: Prediction,
        alpha: Tensor | float,
        sigma: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar. `mask` (b, 1, H, W) from 0 to 1 says what each place of a picture counts, `weight` (b,)
        what each row does."""
        if not self.min_snr_gamma and mask is None and weight is None:
            return F.mse_loss(output, target)
        error = (output - target).square()
        if self.min_snr_gamma:
            error = error * min_snr(prediction, alpha, sigma, self.min_snr_gamma)
        return counted(error, mask, weight).mean()


def coupled(x0: Tensor, eps: Tensor, captions: Sequence[str]) -> Tensor:
    """For each row of x0 that of eps (b,), a permutation within every caption, for which the sum of the squared
    distances is least. Raises MissingExtra."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtra(str(error.name), "train", "loss.coupling=optimal") from error
    with torch.autocast(x0.device.type, enabled=False):
        gain = (x0.flatten(1).float() @ eps.flatten(1).float().T).cpu().numpy()  # all else is the same for any pairs
    order = np.arange(len(x0))
    for caption in dict.fromkeys(captions):
        rows = np.array([k for k, other in enumerate(captions) if other == caption])
        order[rows] = rows[linear_sum_assignment(gain[np.ix_(rows, rows)], maximize=True)[1]]
    return torch.from_numpy(order).to(x0.device)


def counted(error: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Errors (b, c, h, w) by what each place and each row counts, as `Objective.error` has it."""
    if mask is not None:
        share = F.interpolate(mask.to(error), error.shape[-2:], mode="area")
        error = error * share / share.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)  # where nothing counts, 0
    return error if weight is None else error * weight[:, None, None, None]


def min_snr(prediction: Prediction, alpha: Scalar, sigma: Tensor, gamma: float) -> Tensor:
    """What a squared error of `prediction` at x = alpha * x0 + sigma * eps counts, so that an error of x0 counts
    min(SNR, gamma): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v (arXiv:2303.09556, section 3.4), and
    min(SNR, gamma) * sigma^2 for the velocity of a flow. In general, an error of x0 becomes one of the output by the
    slope of the line between them."""
    snr = torch.as_tensor((alpha / sigma) ** 2)
    slope = prediction.from_x0(torch.ones_like(sigma), torch.zeros_like(sigma), alpha, sigma)
    return snr.clamp(max=gamma) / slope**2
