from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limner.nn.linear import Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 48), (1, 1, 48)])
def test_a_product_is_torchs_with_gradients_and_without(shape, bias):
    torch.manual_seed(0)
    ours, theirs = Linear(48, 80, bias=bias), nn.Linear(48, 80, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2)):  # the second is not contiguous
        with torch.inference_mode():
            assert (ours(given) - theirs(given)).abs().max() < 1e-5
        assert torch.equal(ours(given), theirs(given))
    ours(x).sum().backward()
    assert ours.weight.grad is not None
    with torch.inference_mode():
        assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_product_follows_its_weight_whichever_way_that_changes():
    layer, x = Linear(48, 80), torch.randn(5, 48)
    fresh = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}

    def check():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, atol=1e-5, rtol=0)

    check()
    layer.weight.mul_(2)
    check()
    layer.load_state_dict(fresh)
    check()
    layer.load_state_dict({k: -v for k, v in fresh.items()}, assign=True)
    check()
    layer.double().float()
    check()


@torch.no_grad()
def test_a_layer_that_has_drawn_can_be_copied():
    layer, x = Linear(48, 80), torch.randn(5, 48)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    layer.weight.zero_()
    assert torch.equal(twin(x), before)
