"""The network of 2015 against numbers worked out one pixel at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from limner.errors import UsageError
from limner.models.multiscale import MULTISCALE_CIFAR10, MULTISCALE_MNIST, MULTISCALE_TINY, Multiscale, MultiscaleConfig

SMALL = MultiscaleConfig(
    channels=3, size=8, conv_width=5, conv_depth=2, num_scales=3, dense_width=7, dense_depth=3, dense_channels=2,
    pixel_width=6, pixel_depth=3, num_coeffs=4,
)  # fmt: skip


def noisy(config: MultiscaleConfig) -> Multiscale:
    torch.manual_seed(0)
    network = Multiscale(config)
    for p in network.parameters():
        p.data.normal_(std=0.3)
    return network.double()


def leaky(x):
    return np.where(x > 0, x, 0.05 * x)


def convolved(x, weight, bias):
    """Zeros around, 3 x 3, c h w."""
    around = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), *x.shape[1:]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = (weight * around[None, :, i : i + 3, j : j + 3]).sum((1, 2, 3)) + bias
    return out


def by_hand(network: Multiscale, x, of_conv=leaky, of_dense=leaky):
    """(two, n, c, h, w) of one picture, as the authors' code says it."""
    config, w = network.config, {name: p.detach().numpy() for name, p in network.named_parameters()}
    (c, h, _), y = x.shape, x
    for layer in range(config.conv_depth):
        total = 0
        for scale in reversed(range(config.num_scales)):
            n = 2**scale
            coarse = y.reshape(len(y), h // n, n, h // n, n).mean((2, 4))
            name = f"convs.{layer}.scales.{scale}"
            total = total + of_conv(convolved(coarse, w[f"{name}.weight"], w[f"{name}.bias"]))
            total = total.repeat(2, 1).repeat(2, 2) if scale else total
        y = total / config.num_scales
    if config.dense_width:
        whole = x.reshape(-1)
        for k in range(config.dense_depth):
            whole = of_dense(w[f"dense.{k}.weight"] @ whole + w[f"dense.{k}.bias"])
        whole = whole.reshape(h, h, config.dense_channels).transpose(2, 0, 1)
        y = np.concatenate([y / config.conv_width**0.5, whole / config.dense_channels**0.5])
    z = y.reshape(len(y), -1)
    for k in range(config.pixel_depth):
        z = w[f"pixels.{k}.weight"][:, :, 0, 0] @ z + w[f"pixels.{k}.bias"][:, None]
        z = of_dense(z) if k < config.pixel_depth - 1 else z
    return z.reshape(c, 2, config.num_coeffs, h, h).transpose(1, 2, 0, 3, 4)


@pytest.mark.parametrize("changes", [{}, {"dense_width": 0}, {"num_scales": 1}, {"channels": 1}])
def test_it_computes_what_the_authors_say_pixel_by_pixel(changes):
    network = noisy(replace(SMALL, **changes))
    x = np.random.default_rng(1).normal(size=(2, network.config.channels, 8, 8))
    found = network(torch.from_numpy(x)).detach().numpy()
    for k in range(2):
        np.testing.assert_allclose(found[:, k], by_hand(network, x[k]), atol=1e-12)


def test_it_takes_the_nonlinearities_of_the_paper():
    network = noisy(replace(SMALL, conv_activation="softplus", dense_activation="tanh"))
    x = np.random.default_rng(1).normal(size=(3, 8, 8))
    found = network(torch.from_numpy(x[None])).detach().numpy()[:, 0]
    np.testing.assert_allclose(found, by_hand(network, x, lambda v: np.log1p(np.exp(v)), np.tanh), atol=1e-12)


@pytest.mark.parametrize(("config", "count"), [(MULTISCALE_MNIST, 1_691_008), (MULTISCALE_CIFAR10, 12_692_280)])
def test_the_released_sizes_have_as_many_parameters_as_their_layers(config, count):
    def dense(*widths):
        return sum(n * m + m for n, m in pairwise(widths))

    pixels, conv, side = config.channels * config.size**2, config.conv_width, config.size**2
    wanted = dense(pixels, *[config.dense_width] * (config.dense_depth - 1), config.dense_channels * side)
    wanted += 9 * conv * (config.channels + (config.conv_depth - 1) * conv) + config.conv_depth * conv
    known = conv + config.dense_channels
    wanted += dense(known, *[config.pixel_width] * (config.pixel_depth - 1), 2 * 10 * config.channels)
    with torch.device("meta"):
        assert sum(p.numel() for p in Multiscale(config).parameters()) == wanted == count


def test_a_size_that_it_was_not_made_for_is_one_line():
    x = torch.zeros(1, 3, 12, 10)
    with pytest.raises(UsageError, match=r"pictures have 10 x 12 pixels, and the network sees such 16 x 16"):
        Multiscale(MULTISCALE_TINY)(x)
    with pytest.raises(UsageError, match="in multiples of 4"):
        Multiscale(replace(MULTISCALE_TINY, dense_width=0))(x)
    assert Multiscale(replace(MULTISCALE_TINY, dense_width=0))(x[..., :8]).shape == (2, 1, 10, 3, 12, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 2}, "network.channels=2"),
        ({"num_scales": 6}, "network.size=16 is not halved 5 times"),
        ({"conv_depth": 0}, "network.conv_depth=0: give 1 or more"),
        ({"dense_depth": 0}, "network.dense_depth=0: give 1 or more"),
        ({"num_coeffs": 1}, "network.num_coeffs=1: give 2 or more"),
    ],
)
def test_what_no_network_can_be_built_of_is_one_line(changes, said):
    with pytest.raises(UsageError, match=said):
        Multiscale(replace(MULTISCALE_TINY, **changes))
