"""Where weights begin."""

from __future__ import annotations

from torch import nn


def zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
