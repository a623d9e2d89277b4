"""Solvers of dy/dt = slope(t, y), t a number and y a tensor, for samplers and likelihoods."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from limner.errors import MissingExtra, UsageError

Slope = Callable[[float, Tensor], Tensor]


def heun(slope: Slope, y: Tensor, start: float, end: float) -> Tensor:
    """One step of Heun's method, of order 2 (two calls)."""
    first = slope(start, y)
    return y + (end - start) / 2 * (first + slope(end, y + (end - start) * first))


def rk4(slope: Slope, y: Tensor, start: float, end: float) -> Tensor:
    """One step of the classical method of Runge and Kutta, of order 4 (four calls)."""
    h, middle = end - start, (start + end) / 2
    one = slope(start, y)
    two = slope(middle, y + h / 2 * one)
    three = slope(middle, y + h / 2 * two)
    return y + h / 6 * (one + 2 * two + 2 * three + slope(end, y + h * three))


def dopri5(slope: Slope, y: Tensor, start: float, end: float, rtol: float = 1e-5, atol: float = 1e-5) -> Tensor:
    """The pair of orders 5 and 4 of Dormand and Prince (1980), by torchdiffeq: steps as long as let their errors, in
    parts of atol + rtol |y|, stay below 1, as a root mean square over all of y. So what a row is given depends, within
    that, on those beside it.

    Raises MissingExtra, and UsageError for tolerances that cannot be kept.
    """
    require()
    if not (0 < rtol < 1 and 0 < atol < 1):
        raise UsageError(f"the tolerances of 'dopri5' are rtol={rtol:g} and atol={atol:g}: give numbers from 0 to 1")
    odeint = importlib.import_module("torchdiffeq").odeint
    precise = torch.float32 if y.device.type == "mps" else torch.float64  # which has no more
    ends = torch.tensor([start, end], dtype=precise, device=y.device)
    told = {"rtol": rtol, "atol": atol, "method": "dopri5", "options": {"dtype": precise}}
    try:
        return odeint(lambda t, y: slope(t.item(), y), y, ends, **told)[-1]
    except AssertionError as error:  # its step became 0, or y is not finite
        raise UsageError(f"'dopri5' cannot keep rtol={rtol:g} and atol={atol:g}: {error}") from error


def require() -> None:
    """Raises MissingExtra where torchdiffeq is not installed."""
    if find_spec("torchdiffeq") is None:
        raise MissingExtra("torchdiffeq", "eval", "the solver 'dopri5'")
