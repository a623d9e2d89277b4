from __future__ import annotations

import pytest
import torch
from torch import nn

from limner.nn.linear import Linear


def test_compiled_it_is_torchs_own_product():
    """Which inductor chooses for: it knows no way to lower what is quick without it."""
    graphs = []

    def seen(graph, _):
        graphs.append(graph.code)
        return graph

    layer, x = Linear(48, 80), torch.randn(5, 48)
    with torch.no_grad():
        made = torch.compile(layer, backend=seen, fullgraph=True)(x)
        assert torch.allclose(made, layer(x), atol=1e-6)
    assert "linear" in graphs[0]
    assert "mkldnn" not in graphs[0]


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
