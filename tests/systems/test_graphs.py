"""Evaluations that are recorded and replayed draw what evaluations do: the bookkeeping here with a recording that asks
the network again, CUDA's graphs on a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limner import catalog, memory
from limner.nn.graphs import MOST, Graphs, Recording
from limner.types import Conditioning
from sweeps import sweep

from .test_kept import LONG, WAYS, drawn, made, pipelines  # noqa: F401 (a fixture)


class Again:
    """In place of a graph: what it reads and writes are the same tensors at every call."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.output, self.times = call, call(), 0

    def replay(self) -> None:
        self.times += 1
        with torch.inference_mode(False), torch.no_grad():
            for old, new in zip(tree_leaves(self.output), tree_leaves(self.call()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class Told(Graphs):
    devices = ("cpu",)
    on = True

    def graph_of(self, call: Callable[[], Any], device: torch.device) -> tuple[Again, Any]:
        graph = Again(call)
        return graph, graph.output


@pytest.fixture
def recorded(made, monkeypatch) -> Callable[[], list[int]]:  # noqa: F811
    """How often each recording was replayed."""
    for system in systems(made):
        monkeypatch.setattr(system, "graphs", Told())
    return lambda: [one.graph.times for system in systems(made) for one in system.graphs.made]


def systems(made: dict[str, Any]) -> list[Any]:  # noqa: F811
    return [*(made[kind].system for kind in ("sd1", "sdxl", "lcm", "refined")), made["refined"].system.refiner]


ALIKE = ("tiles", "turns of a batch", "sizes", "perturbed", "chunks", "two calls a step")


@pytest.mark.parametrize("way", sweep(WAYS, fast=lambda way: way not in ALIKE))
@pytest.mark.filterwarnings("ignore")
def test_replays_change_no_bit(made, way, recorded):  # noqa: F811
    again = [drawn(made, way), drawn(made, way)]
    assert sum(recorded()) > 2
    for system in systems(made):
        system.graphs.on = False
    assert again == [drawn(made, way)] * 2


@pytest.mark.filterwarnings("ignore")
def test_a_recording_serves_other_words_but_not_other_weights(made, recorded):  # noqa: F811
    pipe = made["sd1"]
    asked = {"seed": 1, "steps": 4, "guidance": 5.0, "sampler": "euler"}
    pipe.generate("a red fox", **asked)
    assert recorded() == [3]  # the first evaluation is none
    fish = pipe.generate("a blue fish", **asked)[0].image.tobytes()
    assert recorded() == [7]
    pipe.generate(LONG, **asked)
    assert recorded() == [7, 3]  # other words of another number
    with_lora = pipe.generate("a blue fish", **asked, lora=[made["lora"]])[0].image.tobytes()
    pipe.generate("a blue fish", **asked, batch=2)
    assert recorded() == [3]  # those of the weights that were are gone
    graphs = pipe.system.graphs
    graphs.on = False
    assert pipe.generate("a blue fish", **asked)[0].image.tobytes() == fish != with_lora
    assert pipe.generate("a blue fish", **asked, lora=[made["lora"]])[0].image.tobytes() == with_lora
    graphs.clear()
    assert not recorded()


def test_an_address_alone_is_no_sign_of_the_same_weights():
    """What was freed may lie where another shape lies now, as factors of adapters of other ranks do."""

    class Low(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return x + self.up.sum()

    memory, network, graphs, recorded = torch.ones(12), Low(), Graphs(), []
    graphs.on, graphs.devices = True, ("cpu",)
    graphs.record = lambda *told: (
        recorded.append(told)
        or Recording(  # type: ignore[method-assign,func-returns-value]
            weakref.ref(network), told[1], told[2], told[3], told[2].tree()[0], _Replayed(), {}, weakref.ref(told[4])
        )
    )
    for rank in (3, 4):
        network.register_buffer("up", memory[: 3 * rank].view(3, rank))
        with torch.no_grad():
            for _ in range(3):
                graphs(network, torch.zeros(2), torch.zeros(1), Conditioning(tokens=torch.zeros(1, 1, 1), kept={}))
    assert len(recorded) == 2


class _Replayed:
    def replay(self) -> None:
        pass


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, more: tuple[Tensor, float] | None = None) -> Tensor:
        found = x + t + self.weight
        return found if more is None else found + more[0] * more[1]


def test_recordings_are_few_and_of_one_kind_each():
    graphs, cond = Told(), Conditioning(kept={})
    network = Sum()
    for _ in range(2):
        with torch.no_grad():
            for n in range(1, 3 + MOST):
                x, t = torch.full((n,), 2.0), torch.tensor(3.0)
                assert graphs(network, x, t, cond).tolist() == graphs(network, x, t, cond).tolist() == [6.0] * n
                assert len(graphs.made) <= MOST
    with torch.no_grad():
        x = torch.zeros(2)
        for factor in (1.0, 2.0, 1.0, 2.0):
            assert graphs(network, x, t, cond, (x + 1, factor)).tolist() == [4 + factor] * 2
    out = graphs(network, x, t, cond)
    assert out.requires_grad  # nothing is recorded where gradients are wanted


def test_without_room_nothing_is_recorded():
    graphs = Told()
    graphs.on = False
    with torch.no_grad():
        for _ in range(3):
            graphs(Sum(), torch.zeros(2), torch.zeros(1), Conditioning(kept={}))
    assert not graphs.made
    assert not graphs.once
    assert not Graphs.on  # until a drawing knows how much memory there is


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a red fox", {"batch": 2, "guidance": 1.0}),
        ("a fox AND a whale AND a cat", {"batch": 2, "guidance": 5.0}),
        ("a red fox", {"guidance": 5.0, "pag_scale": 3.0}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_second_drawing_needs_no_second_recording(made, recorded, prompt, told):  # noqa: F811
    for seed in (1, 2, 3):
        made["sd1"].generate(prompt, seed=seed, steps=4, sampler="euler", **told)
        assert len(recorded()) == 1


def test_nothing_keeps_networks_and_words_alive():
    graphs, network, cond = Told(), Sum(), Conditioning(kept={})
    gone = [weakref.ref(network), weakref.ref(cond)]
    with torch.no_grad():
        for _ in range(3):
            graphs(network, torch.zeros(2), torch.zeros(1), cond)
    (recording,) = graphs.made
    recording.graph.call = None  # which only this stand-in for a graph has
    del network, cond
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_without_memory_for_a_recording_it_goes_on_without(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    graphs, network = Told(), Sum()
    monkeypatch.setattr(graphs, "graph_of", full)
    with torch.no_grad():
        sums = [graphs(network, torch.zeros(2), torch.zeros(1), Conditioning(kept={})).tolist() for _ in range(3)]
    assert sums == [[1.0, 1.0]] * 3
    assert (graphs.on, graphs.made) == (False, [])


def test_what_is_compiled_is_not_recorded():
    system = catalog.build(catalog.entry("icons-tiny").config)
    system.compile(backend="eager")
    assert not system.graphs.devices


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_graphs_of_a_gpu_change_no_bit(tmp_path_factory, sd1_folder, monkeypatch, number):
    if torch.cuda.device_count() <= number:
        pytest.skip("there is one GPU")
    pipes = pipelines(tmp_path_factory, sd1_folder, f"cuda:{number}")
    for way in WAYS:
        again = [drawn(pipes, way), drawn(pipes, way)]
        system = pipes[WAYS[way][0]].system
        assert system.graphs.made, way
        with monkeypatch.context() as patch:
            patch.setattr(memory, "settle", lambda *_: "")  # which would turn them on again
            for one in (system, system.refiner):
                if one is not None:
                    one.graphs.on = False
                    patch.setattr(one.graphs, "evaluate", None)
            assert again == [drawn(pipes, way)] * 2, way
