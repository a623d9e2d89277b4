from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from toy import CONFIG, ToySystem

from limner.errors import UsageError
from limner.training.optimizers import (
    adamw,
    block_matrices,
    clip_gradients,
    lr_at,
    optimizers_for,
    orthogonalised,
    parameter_groups,
    step_unless,
)

NO, YES = torch.zeros(()), torch.ones(())


def test_the_learning_rate_rises_in_a_line_then_falls_in_half_a_cosine():
    config = replace(CONFIG, lr=2.0, warmup=4, steps=12, lr_final=0.1)
    assert [lr_at(step, config) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert lr_at(4, config) == pytest.approx(2.0)
    assert lr_at(6, config) == pytest.approx(0.2 + 1.8 * (1 + 2**-0.5) / 2)  # a quarter of the way: cos 45°
    assert lr_at(8, config) == pytest.approx(1.1)
    assert lr_at(12, config) == pytest.approx(0.2)


def test_a_constant_learning_rate_stays_after_the_warm_up():
    config = replace(CONFIG, lr=2.0, warmup=2, steps=12, lr_schedule="constant")
    assert [lr_at(step, config) for step in (0, 1, 2, 11)] == [1.0, 2.0, 2.0, 2.0]


def test_matrices_and_kernels_decay_and_vectors_norms_and_embeddings_do_not():
    module = nn.ModuleDict(
        {"table": nn.Embedding(5, 4), "linear": nn.Linear(4, 3), "conv": nn.Conv2d(2, 2, 3), "norm": nn.LayerNorm(3)}
    )
    names = {id(p): name for name, p in module.named_parameters()}
    decaying, others = parameter_groups(module, module.parameters(), 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decaying["params"]} == {"linear.weight", "conv.weight"}
    assert {names[id(p)] for p in others["params"]} == {
        *("table.weight", "linear.bias", "conv.bias", "norm.weight", "norm.bias")
    }


def test_it_is_torchs_adamw():
    config = replace(CONFIG, weight_decay=0.3, betas=(0.7, 0.9), eps=1e-3)
    ours, theirs = (nn.Linear(4, 3, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = adamw(ours, ours.parameters(), config)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1.0, weight_decay=0.3, betas=(0.7, 0.9), eps=1e-3)
    for step in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        for module, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            if module is ours:
                step_unless(optimizer, 0.1 / (step + 1), NO)
            else:
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
                optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_a_withheld_step_leaves_weights_moments_and_count_as_they_were():
    layer = nn.Linear(4, 3)
    optimizer = adamw(layer, layer.parameters(), CONFIG)
    layer(torch.ones(2, 4)).sum().backward()
    step_unless(optimizer, 0.1, NO)
    before = [p.detach().clone() for p in layer.parameters()]
    state = {k: v.clone() for k, v in optimizer.state[layer.weight].items()}
    layer.weight.grad.fill_(float("nan"))
    step_unless(optimizer, 0.1, YES)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))
    assert all(torch.equal(optimizer.state[layer.weight][k], v) for k, v in state.items())
    layer.weight.grad.fill_(1.0)
    step_unless(optimizer, 0.1, NO)
    assert not torch.equal(layer.weight, before[0])


@pytest.mark.parametrize(("longest", "expected"), [(0.0, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_gradients_are_clipped_by_their_common_norm(longest, expected):
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([0.0, 3.0]), torch.tensor([4.0])
    assert clip_gradients([a, b, nn.Parameter(torch.zeros(1))], longest) == 5.0
    assert torch.cat([a.grad, b.grad]).norm().item() == pytest.approx(expected, abs=1e-5)
    assert b.grad.item() / a.grad[1].item() == pytest.approx(4 / 3)


def test_every_trained_parameter_of_a_system_is_in_one_group():
    system = ToySystem()
    groups = parameter_groups(system, system.phase_parameters("main"), 0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
        id(p) for p in system.parameters() if p.requires_grad
    )


class Tower(nn.Module):
    """A layer in, two blocks of unlike matrices, a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 6), nn.LayerNorm(6)) for _ in range(2)
        )

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


KINDS = {"adamw": "torch", "adamw8bit": "bitsandbytes", "adafactor": "torch", "prodigy": "prodigyopt"}
"""The optimizers for all parameters, and the package of each."""


def built(name: str, module: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    pytest.importorskip(KINDS[name])
    (optimizer,) = optimizers_for(module, module.parameters(), replace(CONFIG, optimizer=name, **changes))
    return optimizer


def pulled(name: str) -> nn.Linear:
    """A large layer whose weights every optimizer pulls towards 1."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 80)
    lr = {"prodigy": 1.0, "adafactor": 0.1}.get(name, 0.02)
    optimizer = built(name, layer, lr=lr, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        (layer.weight - 1).square().sum().backward()
        step_unless(optimizer, lr, NO)
    return layer


@pytest.mark.parametrize("name", KINDS)
def test_every_optimizer_finds_the_bottom_of_a_bowl(name):
    assert (pulled(name).weight - 1).abs().mean() < 0.1


@pytest.mark.parametrize("name", KINDS)
def test_a_withheld_step_of_any_optimizer_leaves_everything_as_it_was(name):
    layer = nn.Linear(64, 80)
    optimizer = built(name, layer)
    for bad in (NO, YES):
        before = copy.deepcopy((list(layer.parameters()), [optimizer.state[p] for p in layer.parameters()]))
        for p in layer.parameters():
            p.grad = torch.full_like(p, float("nan") if bad else 1.0)
        step_unless(optimizer, 0.1, bad)
    for p, was, state in zip(layer.parameters(), *before, strict=True):
        assert torch.equal(p, was)
        assert state.keys() == optimizer.state[p].keys() != set()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value))


def test_adamw_in_8_bits_keeps_a_quarter_of_the_moments():
    sizes = {}
    for name in ("adamw", "adamw8bit"):
        layer = nn.Linear(256, 256, bias=False)
        optimizer = built(name, layer)
        layer.weight.grad = torch.randn_like(layer.weight)
        step_unless(optimizer, 0.1, NO)
        sizes[name] = sum(v.nbytes for v in optimizer.state[layer.weight].values() if torch.is_tensor(v))
    assert sizes["adamw8bit"] < 0.27 * sizes["adamw"]


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")])
def test_an_optimizer_whose_package_is_missing_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"optimizer={name} needs {package}: pip install 'limner\[train\]'"):
        optimizers_for(nn.Linear(2, 2), [], replace(CONFIG, optimizer=name))


MUON = replace(CONFIG, optimizer="muon", lr=0.02, weight_decay=0.1, muon_lr_scale=3.0)


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest():
    tower = Tower()
    names = {id(p): name for name, p in tower.named_parameters()}
    adam, muon = optimizers_for(tower, tower.parameters(), MUON)
    assert isinstance(adam, torch.optim.AdamW)
    moved = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert moved == {f"blocks.{i}.{j}.weight" for i in range(2) for j in (0, 2)}
    assert {names[id(p)] for g in adam.param_groups for p in g["params"]} == set(names.values()) - moved


def test_muon_is_torchs_muon():
    ours, theirs = Tower(), Tower()
    theirs.load_state_dict(ours.state_dict())
    mine = optimizers_for(ours, block_matrices(ours), MUON)[0]
    reference = torch.optim.Muon(block_matrices(theirs), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for a, b in zip(block_matrices(ours), block_matrices(theirs), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        step_unless(mine, 0.1 / (step + 1), NO)
        reference.param_groups[0]["lr"] = 0.3 / (step + 1)
        reference.step()
    for a, b in zip(block_matrices(ours), block_matrices(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_withheld_step_of_muon_leaves_weights_and_momenta_as_they_were():
    tower = Tower()
    muon = optimizers_for(tower, block_matrices(tower), MUON)[0]
    tower(torch.ones(2, 4)).sum().backward()
    step_unless(muon, 0.1, NO)
    before = [p.detach().clone() for p in block_matrices(tower)]
    momenta = [muon.state[p]["momentum_buffer"].clone() for p in block_matrices(tower)]
    for p in block_matrices(tower):
        p.grad.fill_(float("nan"))
    step_unless(muon, 0.1, YES)
    for p, was, momentum in zip(block_matrices(tower), before, momenta, strict=True):
        assert torch.equal(p, was)
        assert torch.equal(muon.state[p]["momentum_buffer"], momentum)


def test_orthogonalised_matrices_have_singular_values_near_one_and_the_same_vectors():
    matrices = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))
    for m in (matrices, matrices.mT):
        out = orthogonalised(m, (3.4445, -4.775, 2.0315), 5).float()
        assert out.shape == m.shape
        assert ((torch.linalg.svdvals(out) > 0.6) & (torch.linalg.svdvals(out) < 1.3)).all()
        u, _, v = torch.linalg.svd(m, full_matrices=False)
        inside = u.mT @ out @ v.mT  # diagonal where the vectors are the same
        assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 0.05
