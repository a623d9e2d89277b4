"""How near a network is to its second implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def backward(*outputs: Tensor) -> None:
    """Back from the same weighted sum of each."""
    weight = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for output in outputs:
        (output * weight).sum().backward()


def assert_same_gradients(
    ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor], idle: Callable[[str], bool] = lambda key: False
) -> None:
    """Of every parameter, by name, to 1e-8 of its own scale; those that are `idle` change nothing."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for key, wanted in theirs.items():
        found, scale = ours[key], wanted.abs().max().item()
        assert found is not None, key
        if idle(key):
            assert max(scale, found.abs().max().item()) <= 1e-10 * largest, key
            continue
        assert scale > 1e-6 * largest, key
        assert (found - wanted).abs().max() <= 1e-8 * scale, key


def gradients_of(network: torch.nn.Module) -> dict[str, Tensor]:
    return {key: parameter.grad for key, parameter in network.named_parameters()}  # type: ignore[misc]
