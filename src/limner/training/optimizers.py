"""AdamW with parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from limner.training.config import TrainConfig


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ...: a linear rise over `warmup` steps, then constant or half a cosine (SGDR,
    arXiv:1608.03983, equation 5) that would reach lr * lr_final at step `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.lr_final + (1 - config.lr_final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def parameter_groups(module: nn.Module, parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """`parameters` of `module` in two groups: matrices and kernels decay; vectors (biases, norms) and embedding
    tables do not. An empty group is left out."""
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in parameters:
        (decaying if p.ndim >= 2 and id(p) not in tables else others).append(p)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the two groups; fused, so that a step can be withheld on the device."""
    groups = parameter_groups(module, parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def step_unless(optimizer: torch.optim.Optimizer, lr: float, bad: Tensor) -> None:
    """One update at learning rate `lr`, or none at all where `bad` (float32 scalar on the device) is 1.

    The host does not wait for `bad`: the fused kernel reads it, as it does for torch's gradient scaler.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()


def clip_gradients(parameters: Iterable[nn.Parameter], longest: float) -> Tensor:
    """Scale the gradients to a 2-norm of at most `longest` (0 for no limit); returns the norm before, a scalar."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if longest > 0:
        nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return norm
