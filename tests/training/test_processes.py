from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toy import CONFIG, ending, fit_as_one_of, processes

from limner.errors import UsageError
from limner.training import state
from limner.training.config import TrainConfig
from limner.training.processes import STOPS, Processes, StopRequests, join


def train(run: Path, world: int, config: TrainConfig = CONFIG, looks: int = 10**6) -> list[int]:
    """Train the toy run by `world` processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [
        processes().Process(target=fit_as_one_of, args=(run, config, k, world, port, looks)) for k in range(world)
    ]
    for process in together:
        process.start()
    for process in together:
        process.join()
    return [process.exitcode for process in together]


def final(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(state.final_file(run, CONFIG))


def test_two_processes_train_what_one_trains_with_the_same_batch(tmp_path):
    assert train(tmp_path / "one", 1) + train(tmp_path / "two", 2) == [0, 0, 0]
    assert train(tmp_path / "cut", 2, replace(CONFIG, accumulate=2)) == [0, 0]
    one, *others = (final(tmp_path / name) for name in ("one", "two", "cut"))
    for name in one:
        for other in others:
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-5)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(metrics[0]) == len(metrics[1]) == CONFIG.steps // CONFIG.log_every


FSDP = replace(CONFIG, sharding="fsdp", accumulate=2, validation=0.1, validate_every=10, validation_images=20)


@pytest.mark.slow  # gloo may mix two collectives on a busy machine
def test_fsdp_trains_what_ddp_trains_and_any_number_of_processes_goes_on(tmp_path):
    assert train(tmp_path / "ddp", 2, replace(FSDP, sharding="ddp")) + train(tmp_path / "fsdp", 2, FSDP) == [0] * 4
    assert train(tmp_path / "2", 2, FSDP, looks=13) == [0, 0]
    assert [p.name for p in state.checkpoints(tmp_path / "2" / "checkpoints")][-1] == "step-000013"
    for world in (1, 4):
        shutil.copytree(tmp_path / "2", tmp_path / str(world))
    for world in (1, 2, 4):
        assert train(tmp_path / str(world), world, FSDP) == [0] * world
    assert ending(tmp_path / "2", FSDP) == ending(tmp_path / "fsdp", FSDP)
    ddp, *others = (final(tmp_path / name) for name in ("ddp", "fsdp", "1", "4"))
    for other in others:
        assert ddp.keys() == other.keys()
        for name in ddp:
            torch.testing.assert_close(other[name], ddp[name], rtol=1e-5, atol=1e-5)
    rows = [[json.loads(r) for r in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("ddp", "fsdp")]
    for a, b in zip(*rows, strict=True):
        for name in {"loss", "grad_norm", "validation/loss"} & set(a):
            assert b[name] == pytest.approx(a[name], rel=1e-4)


def test_when_the_first_process_is_refused_the_others_end_without_a_traceback(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    assert train(tmp_path, 2) == [1, 3]  # 1 is the traceback of the error itself, which the command line would catch
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()])
def test_whatever_the_first_process_fails_of_the_others_are_told(monkeypatch, error):
    told = []
    monkeypatch.setattr(Processes, "agree", lambda self, value: told.append(value) or value)

    def fail():
        raise error

    with pytest.raises(type(error)):
        Processes().lead(fail)
    assert told == [1]


def test_signals_mean_again_what_they_meant_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequests(None) as outer, outer:
        os.kill(os.getpid(), signal.SIGTERM)
        assert STOPS[outer.asked()] == "terminated"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no GPU"):
        join("cuda")
    with pytest.raises(UsageError, match="no device 'tpu'"):
        join("tpu")
    assert join("auto").device.type == "cpu"
