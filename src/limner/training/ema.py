"""Exponential moving average of the weights, in fp32, measured in images rather than steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from limner.training.sharding import put


def ema_decay(half_life: float, batch_size: int, images: float, warmup: float) -> float:
    """What is kept of the average at one step of `batch_size` images: 0.5 ** (batch_size / half-life).

    As in the code of EDM (arXiv:2206.00364): early on the half-life is only `warmup` times the `images` seen before
    the step, so that the average forgets the weights that the run began with; `warmup` 0 is the plain formula.
    """
    if warmup > 0:
        half_life = min(half_life, images * warmup)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


class Ema:
    """Averages the parameters of `module` that are trained; frozen ones and buffers are the module's own, and so is all
    if it is to `keep` none."""

    def __init__(self, module: nn.Module, keep: bool = True) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad and keep}
        self.values = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """values <- decay * values + (1 - decay) * parameters."""
        if not self.values:
            return
        parameters = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), parameters, 1 - decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            put(value, values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights; afterwards its own, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._set(self.values)
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
