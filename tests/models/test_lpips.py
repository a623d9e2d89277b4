"""LPIPS by numbers that the package `lpips` 0.1.4 gave for the same noise in its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limner.models.lpips import LPIPS, weights_in


def noised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(network.named_parameters()):
        x = torch.randn(p.shape, generator=generator)
        p.data = x.abs() if name.startswith("lin") else x * (2 / (p[0].numel() if p.dim() > 1 else 50)) ** 0.5
    return network


def test_distances_are_those_of_the_package():
    network, generator = noised(LPIPS()), torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        assert network(a, b).shape == (2, 1, 1, 1)
        assert network(a, b).flatten().tolist() == pytest.approx([1.11763418, 1.14654493], rel=1e-5)
        assert network(a, a).flatten().tolist() == [0, 0]
    black = torch.full_like(a, -1.0).requires_grad_()
    network(black, black.detach()).sum().backward()
    assert black.grad.isfinite().all()


def test_names_are_those_of_the_package_and_of_training_files():
    with torch.device("meta"):
        ours = LPIPS().state_dict()
    convolutions = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
    names = [f"net.slice{s}.{k}.{leaf}" for s, ks in convolutions.items() for k in ks for leaf in ("weight", "bias")]
    assert ours.keys() == {*names, *(f"lin{k}.model.1.weight" for k in range(5))}
    assert ours["net.slice3.10.weight"].shape == (256, 128, 3, 3)
    assert ours["lin4.model.1.weight"].shape == (1, 512, 1, 1)
    shift = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    package = ours | shift | {f"lins.{k}.model.1.weight": ours[f"lin{k}.model.1.weight"] for k in range(5)}
    training = {f"loss.perceptual_loss.{name}": t for name, t in (ours | shift).items()}
    training["loss.discriminator.main.0.bias"] = training["encoder.conv_in.bias"] = torch.zeros(1)
    for file in (package, training):
        assert weights_in(file).keys() == ours.keys()
