"""Passes that are recorded give what passes that are not give; the GPU itself is asked with `-m gpu`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limner import catalog
from limner.data.batches import DataConfig, ImageBatches, open_images
from limner.data.latents import encoded
from limner.nn.graphs import Graphs
from limner.training import loop, passes
from limner.training.config import TrainConfig
from limner.training.processes import join

CONFIG = TrainConfig(
    name="passes",
    system=catalog.entry("icons-tiny").config,
    data=DataConfig(source="shapes", size=32, latent_views=1, limit=16, other_sizes=((16, 32, 0.3), (32, 16, 0.3))),
    steps=14,
    batch_size=6,
    lr=1e-2,
    ema_half_life=20,
    save_every=10**6,
)


class Acted:
    """What a graph does, by doing what it was recorded of: it puts gradients where the first time left them, or adds to
    those that were there."""

    def __init__(self, parameters: list, call) -> None:
        self.parameters, self.call = parameters, call
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        self.output = call()
        self.fresh = before[0] is None
        self.grads = [p.grad for p in parameters]
        for parameter, value in zip(parameters, before, strict=True):
            if value is not None:  # recording is not doing
                parameter.grad.copy_(value)

    def replay(self) -> None:
        for parameter in self.parameters if self.fresh else ():
            parameter.grad = None
        for name, value in self.call().items():
            self.output[name].copy_(value)
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            if self.fresh and grad is not None:
                grad.copy_(parameter.grad)
                parameter.grad = grad
            assert parameter.grad is grad


def trained(run: Path, config: TrainConfig, device: str, moves: bool = False) -> tuple[dict, list[int]]:
    """The weights that a run ends with, and how many recordings there were at each step."""
    run.mkdir()
    torch.manual_seed(0)
    system = catalog.build(config.system)
    noisy = torch.Generator().manual_seed(1)
    for p in system.network.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=noisy)
    processes = join(device)
    system.to(processes.device)
    batches = encoded(ImageBatches(open_images(config.data), config.data, 0, processes.device), system)
    count, made = [], []

    class Counted(passes.Passes):
        def begin(self, phase: str) -> None:
            if moves and len(count) == 8:  # as where an adapter is taken off and on
                weight = system.network.image_in.weight
                weight.data = weight.data.clone()
            super().begin(phase)
            count.append(len(self.made))
            made[:] = [self]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Passes", Counted)
        how = {"draw": lambda *_: [], "export": lambda _, config, path: path.touch(), "processes": processes}
        assert loop.fit(system, batches, config, run, **how) == 0
    return {name: p.detach().clone() for name, p in system.network.named_parameters()}, count


WAYS = {
    "plain": {},
    "parts": {"accumulate": 3},
    "few": {"optimizer": "muon"},
    "half": {"precision": "fp16"},
    "none": {"ema_half_life": 0.0},
}


@pytest.fixture
def acts(monkeypatch):
    """Has a CPU do as if it recorded."""
    inside = passes.Passes.__init__

    def recording(self, system, losses, state, config, processes):
        inside(self, system, losses, state, config, processes)
        self.records = True

    def graph_of(self, call, device):
        graph = Acted(current[0], call)
        return graph, graph.output

    current: list = []
    again = passes.Passes.again

    def noting(self, parameters, told, weight):
        current[:] = [parameters]
        return again(self, parameters, told, weight)

    monkeypatch.setattr(passes.Passes, "__init__", recording)
    monkeypatch.setattr(passes.Passes, "again", noting)
    monkeypatch.setattr(Graphs, "graph_of", graph_of)


@pytest.mark.parametrize(
    ("way", "moves"),
    [
        ("plain", True),
        ("parts", False),
        *(pytest.param(way, moves, marks=pytest.mark.slow) for way, moves in (("parts", True), ("few", False))),
    ],
)
def test_acted_recordings_train_as_passes_do(tmp_path, request, way, moves):
    config = replace(CONFIG, **WAYS[way])
    plain, none = trained(tmp_path / "plain", config, "cpu")
    assert set(none) == {0}
    request.getfixturevalue("acts")
    acted, count = trained(tmp_path / "acted", config, "cpu", moves)
    assert max(count) >= 2  # of several sizes
    assert not moves or count[8] == 0 < count[7]
    for name, weight in plain.items():
        torch.testing.assert_close(acted[name], weight, rtol=1e-4, atol=1e-5)  # sums are in another order


@pytest.mark.parametrize(
    ("way", "first"),
    [
        ("parts", 2),
        *(
            pytest.param(way, first, marks=pytest.mark.slow)
            for way, first in (("plain", 1), ("plain", 2), ("parts", 1))
        ),
    ],
)
def test_what_cannot_be_recorded_trains_without(tmp_path, acts, monkeypatch, way, first):
    config, graph_of, asked = replace(CONFIG, **WAYS[way]), Graphs.graph_of, []

    def refuses(self, call, device):
        asked.append(1)
        if len(asked) < first:
            return graph_of(self, call, device)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "graph_of", refuses)
    with pytest.warns(UserWarning, match=r"not recorded from here on \(cuda_graphs\): operation not permitted"):
        told, count = trained(tmp_path / "told", config, "cpu")
    monkeypatch.undo()
    plain, _ = trained(tmp_path / "plain", config, "cpu")
    assert (len(asked), count[-1]) == (first, 0)
    for name, weight in plain.items():
        torch.testing.assert_close(told[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moves", [False, True])
def test_recorded_passes_train_as_passes_do(tmp_path, way, moves):
    config = replace(CONFIG, steps=20, **WAYS[way])
    plain, none = trained(tmp_path / "plain", replace(config, cuda_graphs=False), "cuda")
    assert set(none) == {0}
    recorded, count = trained(tmp_path / "recorded", config, "cuda", moves)
    assert max(count) >= 2
    for name, weight in plain.items():
        torch.testing.assert_close(recorded[name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_without_averages_leaves_its_weights(tmp_path):
    config = replace(CONFIG, ema_half_life=0.0, steps=3)
    weights, _ = trained(tmp_path / "run", config, "cpu")
    files = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-000003").iterdir()}
    assert "model.safetensors" in files
    assert "ema.safetensors" not in files
    assert all(torch.isfinite(weight).all() for weight in weights.values())
