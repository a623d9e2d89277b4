"""Sweeps too long to be done at every change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sweep(*axes: Iterable[str], fast: Callable[..., bool]) -> list[Any]:
    """All combinations, for `pytest.mark.parametrize`; those that are not `fast` run with -m slow."""
    return [
        pytest.param(*row, id="-".join(map(_name, row)), marks=() if fast(*row) else pytest.mark.slow)
        for row in itertools.product(*axes)
    ]


def _name(one: Any) -> str:
    return getattr(one, "__name__", str(one))
