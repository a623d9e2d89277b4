"""A run that was killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from toy import CONFIG, StopAt, ToyBatches, ToySystem, ending, fit, fit_slowly, fit_until_operation, processes

from limner import catalog
from limner.data.batches import DataConfig, open_batches
from limner.errors import FileProblem
from limner.training import loop, state
from limner.training.ema import Ema
from limner.training.ledger import Ledger

KILLED = -signal.SIGKILL


@pytest.fixture(scope="session")
def context() -> Any:
    return processes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert fit(run) == 0
    return ending(run)


def same(run: Path, uninterrupted: dict[str, bytes]) -> bool:
    assert not list(run.rglob("*.tmp"))
    return ending(run) == uninterrupted


def test_three_resumes_within_one_epoch(tmp_path, uninterrupted):
    assert CONFIG.steps * CONFIG.batch_size < 4 * len(ToyBatches())
    for looks in (3, 4, 2):
        assert fit(tmp_path / "run", stop=StopAt(looks)) == 1
    assert fit(tmp_path / "run") == 0
    assert same(tmp_path / "run", uninterrupted)


class Blocks(ToySystem):
    """With matrices that Muon moves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.net = nn.Sequential(*self.blocks, *self.net)
        self.tied = self.net[5]


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_run_with_muon_resumes_exactly(tmp_path, monkeypatch, forgetful):
    config = replace(CONFIG, optimizer="muon")
    for name, stops in (("whole", []), ("parts", [StopAt(7), StopAt(9)])):
        for stop in [*stops, None]:
            torch.manual_seed(1)
            system = Blocks()
            if forgetful and name == "parts":
                _without_optimizer(monkeypatch)
            assert fit(tmp_path / name, config, system=system, stop=stop) == (1 if stop else 0)
    same_end = ending(tmp_path / "whole", config) == ending(tmp_path / "parts", config)
    assert same_end is not forgetful


def _with_other_noise_of_parts(monkeypatch):
    original = loop.randomness

    def other(seed, step, processes, part=""):
        return original(seed + bool(part), step, processes, part)

    monkeypatch.setattr(loop, "randomness", other)


@pytest.mark.parametrize("forget", [None, _with_other_noise_of_parts])
def test_a_run_killed_amid_the_parts_of_a_step_resumes_exactly(tmp_path, monkeypatch, forget):
    class Dying(ToySystem):
        calls = 0

        def loss(self, *told):
            self.calls += 1
            if self.calls > 4 * 12 + 2:
                raise KeyboardInterrupt
            return super().loss(*told)

    config = replace(CONFIG, accumulate=4)
    assert fit(tmp_path / "whole", config) == 0
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", config, system=Dying())
    if forget:
        forget(monkeypatch)
    assert fit(tmp_path / "parts", config) == 0
    assert (ending(tmp_path / "parts", config) == ending(tmp_path / "whole", config)) is (forget is None)


def test_stopping_before_the_first_step(tmp_path, uninterrupted):
    assert fit(tmp_path / "run", stop=StopAt(0)) == 1
    assert fit(tmp_path / "run") == 0
    assert same(tmp_path / "run", uninterrupted)


def _without_averages(monkeypatch):
    monkeypatch.setattr(Ema, "load", lambda self, values: None)


def _without_optimizer(monkeypatch):
    monkeypatch.setattr(state.TrainState, "_load_optimizers", lambda self, tensors: None)


def _without_buffers(monkeypatch):
    original = state.copy_tensors

    def weights_only(source, target, where):
        keep = {name: tensor for name, tensor in target.items() if "running" not in name}
        original({name: source[name] for name in keep}, keep, where)

    monkeypatch.setattr(state, "copy_tensors", weights_only)


def _without_weights(monkeypatch):
    monkeypatch.setattr(state, "copy_tensors", lambda source, target, where: None)


def _with_other_noise(monkeypatch):
    original = loop.randomness
    monkeypatch.setattr(loop, "randomness", lambda seed, step, processes: original(seed + 1, step, processes))


def _with_other_dropout(monkeypatch):
    original = loop.randomness

    def unseeded(*args):
        generator = original(*args)
        torch.manual_seed(0)
        return generator

    monkeypatch.setattr(loop, "randomness", unseeded)


def _with_other_data(monkeypatch):
    original = ToyBatches.batch
    monkeypatch.setattr(ToyBatches, "batch", lambda self, step, *args, **kw: original(self, step + 1, *args, **kw))


def _at_another_step(monkeypatch):
    original = state.TrainState.restore

    def late(self, files, source):
        original(self, files, source)
        self.step += 1

    monkeypatch.setattr(state.TrainState, "restore", late)


def _without_the_count_of_images(monkeypatch):
    original = state.TrainState.restore

    def anew(self, files, source):
        original(self, files, source)
        self.images = 0

    monkeypatch.setattr(state.TrainState, "restore", anew)


@pytest.mark.parametrize(
    "forget",
    [
        *(_without_averages, _without_optimizer, _without_buffers, _without_weights, _with_other_noise),
        *(_with_other_dropout, _with_other_data, _at_another_step, _without_the_count_of_images),
    ],
)
def test_whatever_a_resume_forgets_shows_in_the_end(tmp_path, monkeypatch, uninterrupted, forget):
    assert fit(tmp_path / "run", stop=StopAt(13)) == 1
    forget(monkeypatch)
    assert fit(tmp_path / "run") == 0
    assert not same(tmp_path / "run", uninterrupted)


def check_death_at(run: Path, context: Any, number: int, uninterrupted: dict[str, bytes]) -> bool:
    """Die at file operation `number`, then finish; False if there were not so many operations."""
    process = context.Process(target=fit_until_operation, args=(run, CONFIG, number))
    process.start()
    process.join()
    assert process.exitcode in (0, KILLED)
    if process.exitcode == KILLED:
        fit(run)
    assert not list(run.rglob("*.torn"))  # a checkpoint is whole or not there
    assert same(run, uninterrupted)
    return process.exitcode == KILLED


def test_kill_9_between_file_operations_of_a_save(tmp_path, context, uninterrupted, monkeypatch):
    """Of the third save, the first that also removes an old checkpoint: before its first file, amid its files, before
    and after it gets its name; then before and after the final file gets its."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill takes nothing from the disk, as a power cut would
    for number in (29, 36, 38, 83):
        assert check_death_at(tmp_path / str(number), context, number, uninterrupted)


@pytest.mark.slow
def test_kill_9_between_any_two_file_operations(tmp_path, context, uninterrupted):
    number = 0
    while check_death_at(tmp_path / str(number), context, number, uninterrupted):
        number += 1
    assert number > 60


def kill_at_random(run: Path, context: Any, config: Any, kills: int, chance: random.Random) -> int:
    """Train in a process that is killed up to `kills` times, then to the end; returns how often it was."""
    done = 0
    for _ in range(kills):
        process = context.Process(target=fit_slowly, args=(run, config, 0.01))
        process.start()
        while process.is_alive() and not (run / "config.json").exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.25))
        process.kill()
        process.join()
        done += process.exitcode == KILLED
    fit(run, config)
    return done


def test_kill_9_at_random_moments(tmp_path, context, uninterrupted):
    assert kill_at_random(tmp_path / "run", context, CONFIG, 5, random.Random(0)) >= 2
    assert same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_kill_9_at_fifty_random_moments(tmp_path, context):
    config = replace(CONFIG, steps=600, save_every=3)
    assert fit(tmp_path / "whole", config) == 0
    assert kill_at_random(tmp_path / "run", context, config, 50, random.Random(1)) == 50
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert ending(tmp_path / "run", config) == ending(tmp_path / "whole", config)


def test_a_run_is_one_process_at_a_time_until_that_ends_even_by_kill_9(tmp_path, context, uninterrupted):
    run = tmp_path / "run"
    process = context.Process(target=fit_slowly, args=(run, CONFIG, 60))
    process.start()
    while not (run / "config.json").exists():
        time.sleep(0.01)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    try:
        with pytest.raises(FileProblem, match=rf"run is being trained by process {process.pid} on .*; wait"):
            fit(run)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    finally:
        process.kill()
        process.join()
    assert fit(run) == 0
    assert same(run, uninterrupted)
    assert not (run / "limner.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_within_a_step(tmp_path, context, uninterrupted, number):
    run = tmp_path / "run"
    config = replace(CONFIG, save_every=1000, log_every=1)
    process = context.Process(target=fit_slowly, args=(run, config, 0.05))
    process.start()
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, number)
    start = time.monotonic()
    process.join()
    assert time.monotonic() - start < 10
    assert process.exitcode == 0
    (saved,) = state.checkpoints(run / "checkpoints")
    assert state.read_checkpoint(saved)
    assert not state.final_file(run, CONFIG).exists()
    fit(run, config)
    final = ending(run)
    assert {k: v for k, v in final.items() if k != "config.json" and k != "manifest.json"} == {
        k: v for k, v in uninterrupted.items() if k != "config.json" and k != "manifest.json"
    }


def test_a_damaged_newest_checkpoint_is_told_and_the_end_is_the_same(tmp_path, capsys, uninterrupted):
    run = tmp_path / "run"
    assert fit(run, stop=StopAt(13)) == 1
    ema = run / "checkpoints" / "step-000013" / "ema.safetensors"
    ema.write_bytes(ema.read_bytes()[:-1])
    capsys.readouterr()
    assert fit(run) == 0
    out = capsys.readouterr().out
    assert "step-000013 is damaged: ema.safetensors is not what manifest.json says" in out
    assert "step 10 of 30" in out
    assert same(run, uninterrupted)


def test_a_run_that_never_saved_starts_anew_and_says_so(tmp_path, capsys, uninterrupted):
    run = tmp_path / "run"
    with state.claim(run, CONFIG):
        (run / "checkpoints" / "step-000005.tmp").mkdir(parents=True)
    assert fit(run) == 0
    out = capsys.readouterr().out
    assert "never saved a checkpoint: starting anew" in out
    assert "removed step-000005.tmp, left half-written" in out
    assert same(run, uninterrupted)


def test_the_final_file_holds_the_averages(uninterrupted):
    final = safetensors.torch.load(uninterrupted["final"])
    averages = safetensors.torch.load(uninterrupted["ema.safetensors"])
    own = safetensors.torch.load(uninterrupted["model.safetensors"])
    for name, value in averages.items():
        assert torch.equal(final[name], value)
        assert not torch.equal(final[name], own[name])


def test_a_new_run_may_enter_a_folder_where_one_was_killed_before_it_began(tmp_path):
    (tmp_path / "config.jsonx1y2.tmp").write_text("{")
    (tmp_path / "limner.lock").write_text("process 1 on earth")
    with state.claim(tmp_path, CONFIG):
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "limner.lock"]
        assert state.config_of(tmp_path) == CONFIG


@pytest.mark.parametrize("forgetful", [False, True])
def test_an_autoencoder_resumes_exactly_over_the_start_of_its_discriminator(tmp_path, monkeypatch, forgetful):
    row = catalog.entry("vq-f4-tiny").config
    system = replace(row, loss=replace(row.loss, disc_start=4))
    data = DataConfig(source="shapes", size=16, limit=16)
    config = replace(CONFIG, system=system, data=data, steps=7, batch_size=2, warmup=0)
    for name, stops in (("whole", []), ("parts", [StopAt(3), StopAt(2)])):  # before its start, and after
        for stop in [*stops, None]:
            torch.manual_seed(1)
            if forgetful and name == "parts":
                _without_buffers(monkeypatch)
            batches = open_batches(data, 0, torch.device("cpu"))
            built = catalog.build(system)
            assert fit(tmp_path / name, config, system=built, batches=batches, stop=stop) == (1 if stop else 0)
    same_end = ending(tmp_path / "whole", config) == ending(tmp_path / "parts", config)
    assert same_end is not forgetful


def _without_numbers(monkeypatch):
    monkeypatch.setattr(state.TrainState, "_load_numbers", lambda self, numbers: None)


def _with_another_count(monkeypatch):
    original = state.TrainState._load_numbers

    def one_more(self, numbers):
        original(self, numbers)
        for optimizer in self.optimizers["main"]:
            for kept in optimizer.state.values():
                kept["step"] += 1

    monkeypatch.setattr(state.TrainState, "_load_numbers", one_more)


@pytest.mark.parametrize(
    ("name", "package", "forget"),
    [
        *(("adafactor", "torch", None), ("adafactor", "torch", _without_optimizer)),
        *(("prodigy", "prodigyopt", None), ("prodigy", "prodigyopt", _without_numbers)),
        *(("adamw8bit", "bitsandbytes", None), ("adamw8bit", "bitsandbytes", _with_another_count)),
    ],
)
def test_a_run_resumes_exactly_with_any_optimizer(tmp_path, monkeypatch, name, package, forget):
    class Wide(ToySystem):
        """With a matrix large enough for 8 bits."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 1024), nn.Linear(1024, 4), *self.net)
            self.tied = self.net[5]

    pytest.importorskip(package)
    config = replace(CONFIG, optimizer=name, lr=1.0 if name == "prodigy" else 1e-3)
    for run, stops in (("whole", []), ("parts", [StopAt(7), StopAt(9)])):
        if forget and run == "parts":
            forget(monkeypatch)
        for stop in [*stops, None]:
            torch.manual_seed(1)
            assert fit(tmp_path / run, config, system=Wide(), stop=stop) == (1 if stop else 0)
    assert (ending(tmp_path / "whole", config) == ending(tmp_path / "parts", config)) is (forget is None)


def _without_the_scaler(monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda self, told: None)


def _without_the_ledger(monkeypatch):
    monkeypatch.setattr(loop, "Ledger", lambda config, kept, device: Ledger(config, {}, device))


@pytest.mark.parametrize("forget", [None, _without_the_scaler, _without_the_ledger])
def test_fp16_and_steps_left_out_resume_exactly_three_times_in_one_epoch(tmp_path, monkeypatch, forget):
    config = replace(CONFIG, precision="fp16", on_nan="skip", accumulate=2)
    for run, stops in (("whole", []), ("parts", [StopAt(5), StopAt(4), StopAt(3)])):
        if forget and run == "parts":
            forget(monkeypatch)
        for stop in [*stops, None]:
            torch.manual_seed(1)
            assert fit(tmp_path / run, config, batches=ToyBatches(poison=4), stop=stop) == (1 if stop else 0)
    assert (ending(tmp_path / "whole", config) == ending(tmp_path / "parts", config)) is (forget is None)
