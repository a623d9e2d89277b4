from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_memory import NETWORKS, Learner
from torch.distributed.tensor import DTensor
from toy import CONFIG, Players, fit

from limner.errors import UsageError
from limner.training.loop import PhaseLoss
from limner.training.memory import recompute_blocks, repeated_blocks
from limner.training.processes import Processes
from limner.training.sharding import check_sharding, put, resting, shard, twin, whole


@pytest.fixture(scope="module")
def alone():
    """A group of one process, which cuts into one piece."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_are_cut_have_the_same_gradients(alone, name, recomputed):
    plain, cut = Learner(name), Learner(name)
    if recomputed:
        recompute_blocks(cut)
    other = twin(cut)
    loss = PhaseLoss(cut, "main")
    shard(loss, cut, Processes())
    assert all(isinstance(p, DTensor) for p in cut.parameters())
    assert not any(isinstance(p, DTensor) for p in other.parameters())
    for block in repeated_blocks(cut):
        assert type(block).__name__.startswith("FSDP")
    found = []
    for call in (PhaseLoss(plain, "main"), loss):
        torch.manual_seed(1)
        call({}, torch.Generator())["loss"].backward()
        found.append(
            {n: p.grad for n, p in (plain if call is not loss else cut).named_parameters() if p.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(whole(found[1][key]), gradient, rtol=1e-5, atol=1e-6)


def test_what_is_put_into_a_cut_tensor_is_found_when_it_is_whole(alone):
    system = Learner("unet")
    shard(PhaseLoss(system, "main"), system, Processes())
    for p in system.parameters():
        value = torch.randn(p.shape)
        put(p, value)
        assert torch.equal(whole(p.detach()), value)


def test_a_twin_has_parts_of_its_own_where_the_system_learns():
    system = Learner("dit")
    system.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    other = twin(system)
    assert other.frozen is system.frozen
    assert other.state_dict().keys() == system.state_dict().keys()
    assert not {id(p) for p in other.network.parameters()} & {id(p) for p in system.network.parameters()}
    assert resting(other) is other


@pytest.mark.parametrize(
    ("changes", "phases", "found"),
    [({"optimizer": "muon"}, 1, "muon"), ({"precision": "fp16"}, 1, "fp16"), ({}, 2, "2")],
)
def test_what_cannot_be_cut_is_refused(changes, phases, found):
    with pytest.raises(UsageError, match=f"sharding=fsdp goes with .* and this run has {found}: take sharding=ddp"):
        check_sharding(replace(CONFIG, **changes), phases)


def test_one_process_has_nothing_to_cut(tmp_path, capsys):
    assert fit(tmp_path / "run", replace(CONFIG, sharding="fsdp", steps=2), system=Players()) == 0
    assert "sharding=fsdp has no effect with one process" in capsys.readouterr().out
