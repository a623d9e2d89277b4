"""What a network's output means, as three functions each: the training target, the way back to x0 and from it.

All at x = alpha * x0 + sigma * eps. `v` is that of progressive distillation (arXiv:2202.00512, appendix D), defined on
the unit-variance state x / sqrt(alpha^2 + sigma^2); `velocity` is dx/dsigma of the flow interpolant, eps - x0;
`edm` is the network inside EDM's preconditioning (arXiv:2206.00364, equation 7) of data that are so far from 0, `DATA`
unless it is told otherwise, in root mean square; with 1 it would be -v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limner.errors import UnknownName

Scalar = float | Tensor


@dataclass(frozen=True)
class Prediction:
    """`target(x0, eps, alpha, sigma)` is what the network learns; `to_x0(output, x, alpha, sigma)` inverts it, and
    `from_x0(x0, x, alpha, sigma)` inverts that, where sigma is above 0."""

    name: str
    target: Callable[[Tensor, Tensor, Scalar, Scalar], Tensor]
    to_x0: Callable[[Tensor, Tensor, Scalar, Scalar], Tensor]
    from_x0: Callable[[Tensor, Tensor, Scalar, Scalar], Tensor]


DATA = 0.5


def edm(data: float) -> Prediction:
    def from_x0(x0: Tensor, x: Tensor, a: Scalar, s: Scalar) -> Tensor:
        norm = _norm(a * data, s)
        return (x0 - a * data**2 / norm**2 * x) * norm / (s * data)

    def to_x0(out: Tensor, x: Tensor, a: Scalar, s: Scalar) -> Tensor:
        norm = _norm(a * data, s)
        return a * data**2 / norm**2 * x + s * data / norm * out

    return Prediction("edm", lambda x0, eps, a, s: from_x0(x0, a * x0 + s * eps, a, s), to_x0, from_x0)


def _norm(alpha: Scalar, sigma: Scalar) -> Scalar:
    square = alpha * alpha + sigma * sigma
    return square.sqrt() if isinstance(square, torch.Tensor) else square**0.5


PREDICTIONS = {
    p.name: p
    for p in (
        Prediction("x0", lambda x0, eps, a, s: x0, lambda out, x, a, s: out, lambda x0, x, a, s: x0),
        Prediction(
            "eps",
            lambda x0, eps, a, s: eps,
            lambda out, x, a, s: (x - s * out) / a,
            lambda x0, x, a, s: (x - a * x0) / s,
        ),
        Prediction(
            "v",
            lambda x0, eps, a, s: (a * eps - s * x0) / _norm(a, s),
            lambda out, x, a, s: (a * x - s * _norm(a, s) * out) / (a * a + s * s),
            lambda x0, x, a, s: (a * x - (a * a + s * s) * x0) / (s * _norm(a, s)),
        ),
        edm(DATA),
        Prediction(
            "velocity",
            lambda x0, eps, a, s: eps - x0,
            lambda out, x, a, s: (x - s * out) / (a + s),
            lambda x0, x, a, s: (x - (a + s) * x0) / s,
        ),
    )
}


def get(name: str, data: float = DATA) -> Prediction:
    """By its name; `data` is for `edm`. Raises UnknownName."""
    if name == "edm":
        return edm(data)
    if name not in PREDICTIONS:
        raise UnknownName("prediction", name, PREDICTIONS)
    return PREDICTIONS[name]
