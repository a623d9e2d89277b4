"""Flows that learn their own pairs: against what is known of normal data, and as runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import StopAt

from limner import catalog, recipes
from limner.data.batches import DataConfig, open_batches
from limner.sampling.interpolants import Times
from limner.systems.objectives import Objective
from limner.training import loop, reflowing
from limner.training.config import TrainConfig, parse_overrides
from limner.training.processes import Processes
from limner.training.reflowing import Pairs, ReflowConfig, Reflowing
from limner.types import Conditioning

MEAN, SPREAD = 0.4, 0.6
CPU = torch.device("cpu")


class Normal(nn.Module):
    """The velocity of normal data, right for random pairs, or where `straight` for mean + spread * eps with each eps;
    plus `bend`. The class moves the mean."""

    def __init__(self, straight: bool = False) -> None:
        super().__init__()
        self.straight, self.config, self.bend = straight, SimpleNamespace(), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        sigma, mean = (v[:, None, None, None] for v in (t, MEAN + 0.01 * cond.labels))
        alpha = 1 - sigma
        centred = x - alpha * mean
        if self.straight:
            return (1 - SPREAD) * centred / (alpha * SPREAD + sigma) - mean + self.bend
        slope = (sigma - alpha * SPREAD**2) / (alpha**2 * SPREAD**2 + sigma**2)  # of the deviation, over the deviation
        return slope * centred - mean + self.bend


def base_of(network: nn.Module) -> Any:
    base = catalog.build(catalog.entry("flow-matching-tiny").config).requires_grad_(False).eval()
    base.network = network
    base.objective = Objective(times=Times(kind="uniform"))
    return base


def config_of(**how: Any) -> TrainConfig:
    return TrainConfig(
        name="reflow", model="x", data=DataConfig(source="shapes", size=16), steps=2, batch_size=64,
        reflow=ReflowConfig(**{"pairs": 70, "at_once": 32, "steps": 60, "sampler": "rk4"} | how),
    )  # fmt: skip


def made(**how: Any) -> tuple[Reflowing, Pairs]:
    config = config_of(**how)
    student = Reflowing(base_of(Normal()), config.reflow, "")
    return student, Pairs(student, open_batches(config.data, 0, CPU), config, Processes())


@pytest.fixture(scope="module")
def known():
    return made()


def mean_of(student: Reflowing, captions: list[str]) -> Tensor:
    return MEAN + 0.01 * student.read(captions, torch.zeros(1, 3, 16, 16)).labels[:, None, None, None]


def test_pairs_are_noise_and_where_the_flow_leads_from_it(known):
    """Of normal data eps leads to mean + spread * eps, and a class to its own."""
    student, pairs = known
    batch = pairs.batch(0, 64)
    assert torch.allclose(batch["latents"], mean_of(student, batch["captions"]) + SPREAD * batch["noise"], atol=5e-3)
    assert (len(pairs), len(set(pairs.captions)) > 30, pairs.noise.dtype) == (70, True, torch.float32)
    assert pairs.noise.flatten(1).unique(dim=0).shape[0] == 70
    assert abs(pairs.noise.std().item() - 1) < 0.02
    few, again = (made(pairs=32, steps=2)[1] for _ in range(2))
    assert torch.equal(few.latents, again.latents)
    assert torch.equal(few.noise, pairs.noise[:32])
    assert not torch.equal(pairs.batch(1, 64)["noise"], batch["noise"])


@pytest.mark.parametrize("one_step", [False, True])
def test_what_is_learned_is_the_straight_line_of_each_pair(one_step, known):
    """Of which the velocity is known; that of random pairs misses the end by spread * eps in one step from noise."""
    student, pairs = known
    student.reflow = replace(student.reflow, one_step=one_step)

    def learning(straight: bool) -> tuple[float, float]:
        """The loss, and its gradient."""
        student.network.straight, student.network.bend.grad = straight, None
        loss = student.loss(pairs.batch(0, 64), "main", torch.Generator().manual_seed(1))["loss"]
        loss.backward()
        return loss.item(), student.network.bend.grad.abs().item()

    right, random = learning(True), learning(False)
    assert right[0] < 1e-4
    assert right[1] < 1e-2
    if one_step:
        assert random[0] == pytest.approx(SPREAD**2, rel=0.03)
    assert random[0] > 100 * right[0]


# ------------------------------------------------------------------- runs

FEW = ("steps=3", "save_every=1", "batch_size=4", "warmup=0", "ema_half_life=8", "reflow.pairs=12", "reflow.at_once=5")
FEW = (*FEW, "reflow.steps=2", "sample_prompts=[]")


def saved(folder: Path, name: str) -> Path:
    """A model of the catalogue, in miniature, that draws noise."""
    entry = catalog.entry(name)
    config = replace(entry.config, network=replace(entry.config.network, widths=(8, 8)))
    torch.manual_seed(0)
    system = catalog.build(config)
    for p in system.network.parameters():
        p.data.normal_(std=0.05)
    catalog.save(system, config, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("flow"), "flow-matching-tiny")


@pytest.fixture(scope="module")
def reflowed(flow, tmp_path_factory):
    """A run of it."""
    run = tmp_path_factory.mktemp("reflowed")
    assert loop.train(parse_overrides(recipes.get("reflow-tiny"), [f"model={flow}", *FEW]), run, device="cpu") == 0
    return run


def test_a_run_that_was_stopped_ends_with_the_same_bits(limner, here, flow, reflowed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequests", lambda *_: StopAt(2))
        done = limner("train", "reflow-tiny", "-m", flow, "-o", "parts", "--device", "cpu", *FEW)
    assert "flow-matching-tiny makes pairs: 12 of 12" in done.out
    assert not (here / "parts/final").exists()
    assert limner("train", "--resume", "parts", "--device", "cpu").code == 0
    for name in ("final/reflow-tiny.safetensors", "checkpoints/step-000003/model.safetensors"):
        assert (here / "parts" / name).read_bytes() == (reflowed / name).read_bytes()


def test_what_a_run_leaves_is_reflowed_again_and_draws_in_one_step(limner, here, flow, reflowed):
    done = limner("train", "one-step-tiny", "-m", reflowed, "-o", "one", "--device", "cpu", *FEW, "reflow.guidance=2")
    assert done.code == 0, done.err
    teacher, two, one = (catalog.load(catalog.find(model)) for model in (flow, reflowed, "one"))
    assert two.defaults == teacher.defaults
    assert one.defaults == replace(teacher.defaults, steps=1, sampler="euler", guidance=1.0)
    weights = [system.network.conv_in.weight for system in (teacher, two, one)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert limner("generate", "red circle", "-m", "one", "-o", "drawn.png").code == 0
    assert limner("runs", reflowed.parent).out.find("network for flow-matching-tiny.safetensors, reflowed") > 0


def test_captions_of_a_folder_are_as_frequent_as_there(pictures):
    (pictures / "0.txt").write_text("a blue square")
    images = open_batches(DataConfig(source="folder", folder=str(pictures), size=16), 0, CPU)
    found = Counter(reflowing.said(images, 3, 900))
    assert set(found) == {"a blue square", "a green square"}
    assert found["a blue square"] / 900 == pytest.approx(2 / 3, abs=0.05)
    assert reflowing.said(images, 3, 9) == reflowing.said(images, 3, 9) != reflowing.said(images, 4, 9)


def test_what_has_no_pairs_is_refused_in_a_line(limner, here, flow, tmp_path):
    ddpm = saved(tmp_path, "ddpm-tiny")
    for model, told, why in (
        (ddpm, (), "ddpm-tiny has noise of the kind vp and predicts eps, give a model of a flow"),
        (flow, ("data.augment=view",), "data.augment=view has no effect on reflow-tiny, which reads captions alone"),
        (flow, ("validation=0.1",), "validation is of pictures"),
        (flow, ("loss.offset_noise=0.1",), "a pair has its own: leave them out"),
        (flow, ("reflow.one_step=true",), "reflow.one_step learns at noise alone"),
        (flow, ("distillation={}",), "reflow-tiny reflows a network: leave distillation out"),
        (flow, ("reflow.pairs=0",), "reflow.pairs=0"),
        (None, (), "give --model"),
    ):
        done = limner("train", "reflow-tiny", *(("-m", model) if model else ()), "-o", "run", "--device", "cpu", *told)
        assert (done.code, why in done.err, done.err.count("\n")) == (2, True, 1), done.err
        assert not (here / "run").exists()
