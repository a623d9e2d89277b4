from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import ToySystem

from limner.training.ema import Ema, ema_decay


@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_a_weight_counts_half_after_the_half_life_whatever_the_batch(batch_size):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    ema = Ema(layer)
    nn.init.zeros_(layer.weight)
    for step in range(200 // batch_size):
        ema.update(ema_decay(200, batch_size, step * batch_size, warmup=0))
    assert ema.values["weight"].item() == pytest.approx(0.5)


def test_early_on_the_half_life_is_a_fraction_of_the_images_seen():
    assert ema_decay(1000, 10, 0, warmup=0.05) == 0.0  # the first update takes the weights as they are
    assert ema_decay(1000, 10, 200, warmup=0.05) == pytest.approx(0.5)
    assert ema_decay(1000, 10, 10**6, warmup=0.05) == ema_decay(1000, 10, 0, warmup=0) == 0.5**0.01


def test_the_average_is_fp32_of_what_is_trained():
    system = ToySystem().bfloat16()
    ema = Ema(system)
    assert set(ema.values) == {name for name, p in system.named_parameters() if p.requires_grad}
    assert {value.dtype for value in ema.values.values()} == {torch.float32}
    with torch.no_grad():
        ema.update(0.999)  # in bfloat16 this would be lost
        before = ema.values["table.weight"].clone()
        system.table.weight.add_(1)
    ema.update(0.999)
    moved = ema.values["table.weight"] - before
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=0.02, atol=0)


def test_averaged_weights_are_applied_and_taken_off_again_bit_for_bit():
    layer = nn.Linear(3, 3)
    ema = Ema(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    own = layer.weight.detach().clone()
    with ema.applied():
        assert torch.equal(layer.weight, ema.values["weight"])
        assert not torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own)
