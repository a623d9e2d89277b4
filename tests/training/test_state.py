"""Checkpoints are whole or not there; a damaged one is noticed, named and passed over."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from torch import nn

from limner.errors import CheckpointMismatch, FileProblem
from limner.training import state

FILES = {"model.safetensors": b"weights" * 100, "state.json": b'{"step": 1}'}
WRITTEN = [
    "config.json",
    "ema.safetensors",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished toy run."""
    run = tmp_path_factory.mktemp("trained") / "run"
    toy.fit(run)
    return run


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        state.save_checkpoint(folder, step, FILES, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path):
    save(tmp_path, 5)
    assert state.read_checkpoint(tmp_path / "step-000005") == FILES


def test_the_newest_are_kept_and_sorted_as_numbers(tmp_path):
    save(tmp_path, 1, 999_999, 1_000_000, keep=2)
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_what_a_run_writes(trained):
    assert names(trained / "checkpoints") == ["step-000025", "step-000030"]
    assert names(trained / "checkpoints" / "step-000030") == WRITTEN
    assert names(trained) == [
        *("checkpoints", "config.json", "final", "log.txt", "metrics.jsonl", "starts.jsonl", "tensorboard")
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_flipped_byte_is_noticed_and_the_file_named(trained, tmp_path, name):
    whole = trained / "checkpoints" / "step-000030"
    copy = tmp_path / whole.name
    copy.mkdir()
    for path in whole.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = (whole / name).read_bytes()
    for place in [0, *range(7, len(data), max(1, len(data) // 40)), len(data) - 1]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        (copy / name).write_bytes(flipped)
        with pytest.raises(FileProblem, match="step-000030 is damaged") as raised:
            state.read_checkpoint(copy)
        assert name == "manifest.json" or f"{name} is not what" in str(raised.value)
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(FileProblem, match="damaged"):
        state.read_checkpoint(copy)
    (copy / name).unlink()
    with pytest.raises(FileProblem, match=name):
        state.read_checkpoint(copy)
    (copy / name).write_bytes(data)
    assert state.read_checkpoint(copy)  # so it was the damage that was noticed


def test_a_file_too_many_is_noticed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "extra.json").write_text("{}")
    with pytest.raises(FileProblem, match=r"extra\.json"):
        state.read_checkpoint(tmp_path / "step-000001")


def test_a_damaged_newest_is_reported_set_aside_and_the_one_before_taken(tmp_path):
    save(tmp_path, 1)
    state.save_checkpoint(tmp_path, 2, {"state.json": b'{"step": 2}'}, keep=2)
    (tmp_path / "step-000002" / "state.json").write_bytes(b'{"step": 3}')
    told: list[str] = []
    assert state.newest_checkpoint(tmp_path, told.append) == FILES
    assert len(told) == 1
    assert "step-000002 is damaged: state.json" in told[0]
    assert names(tmp_path) == ["step-000001", "step-000002.torn"]
    save(tmp_path, 2, keep=1)  # a damaged one takes nobody's place
    assert names(tmp_path) == ["step-000002", "step-000002.torn"]


def test_all_damaged_is_an_error_and_stays_one(tmp_path):
    save(tmp_path, 1, 2)
    for path in state.checkpoints(tmp_path):
        (path / "manifest.json").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(FileProblem, match=r"every checkpoint in .* is damaged"):
            state.newest_checkpoint(tmp_path, lambda _: None)


def test_nothing_saved_yet_is_no_error(tmp_path):
    assert state.newest_checkpoint(tmp_path / "checkpoints", lambda _: None) is None


# ------------------------------------------------------------------------------------------------------ failing disks


def failing(number: int, code: int):
    """Makes a function raise OSError at its call `number`, after it has done half of its work, if it is a write."""
    calls = [0]

    def wrap(function):
        def call(*args):
            calls[0] += 1
            if calls[0] == number:
                if function is WRITE:
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                raise OSError(code, os.strerror(code))
            return function(*args)

        return call

    return wrap, calls


WRITE, SYNC = state.write_durably, state._sync


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("number", range(1, 6))
def test_a_failing_disk_leaves_the_last_checkpoint_and_nothing_half_written(tmp_path, monkeypatch, number, code):
    """A save is three writes (two files, the manifest) and two flushed folders: any of them may fail."""
    save(tmp_path, 1)
    wrap, calls = failing(number, code)
    monkeypatch.setattr(state, "write_durably", wrap(WRITE))
    monkeypatch.setattr(state, "_sync", wrap(SYNC))
    with pytest.raises(FileProblem, match=f"step-000002.*{os.strerror(code)}.*needs .* MB"):
        save(tmp_path, 2, keep=1)
    assert calls[0] == number
    monkeypatch.undo()
    assert "step-000001" in names(tmp_path)
    assert not any("tmp" in name for name in names(tmp_path))
    assert state.newest_checkpoint(tmp_path, pytest.fail) == FILES


def test_a_full_disk_in_the_middle_of_a_run(tmp_path, monkeypatch):
    """The error says path and need; after room is made the run goes on and ends as if nothing had been."""
    run, smooth = tmp_path / "run", tmp_path / "smooth"
    toy.fit(smooth)
    wrap, _ = failing(10, errno.ENOSPC)
    monkeypatch.setattr(state, "write_durably", wrap(WRITE))
    with pytest.raises(FileProblem, match=r"step-000010.*No space left on device.*MB.*saved before is kept"):
        toy.fit(run)
    assert names(run / "checkpoints") == ["step-000005"]
    monkeypatch.undo()
    assert toy.fit(run) == 0
    assert toy.ending(run) == toy.ending(smooth)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(state, "write_durably", lambda *_: pytest.fail("it wrote"))
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: SimpleNamespace(free=800))
    with pytest.raises(FileProblem, match=r"no room for .*step-000002: it needs .* MB, .* MB are free"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]


def test_files_are_flushed_to_the_disk_before_the_rename_and_names_after(tmp_path, monkeypatch):
    """What a power cut may lose: the order of write, flush, rename, flush of the folder, removal of the old."""
    log: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, state.shutil.rmtree
    path_of = lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink().name  # noqa: E731
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("names of open files are read from /proc")
    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda d: (log.append(f"fsync {path_of(d)}"), fsync(d))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (log.append(f"rename {Path(b).name}"), rename(a, b))[1])
    monkeypatch.setattr(state.shutil, "rmtree", lambda p, **k: (log.append(f"remove {p.name}"), rmtree(p, **k))[1])
    save(tmp_path, 2, keep=1)
    assert log == [
        "remove step-000002.tmp",
        "fsync model.safetensors",
        "fsync state.json",
        "fsync manifest.json",
        "fsync step-000002.tmp",
        "rename step-000002",
        f"fsync {tmp_path.name}",
        "remove step-000001",
    ]


def test_final_weights_appear_whole_or_not_at_all(tmp_path):
    def export(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    final = tmp_path / "final" / "toy.safetensors"
    with pytest.raises(FileProblem, match=r"toy\.safetensors: No space left"):
        state.write_final(final, export)
    assert names(tmp_path) == []
    state.write_final(final, lambda path: path.write_bytes(b"whole"))
    assert final.read_bytes() == b"whole"


# ------------------------------------------------------------------------------------------------------- what fits what


def test_a_new_run_needs_an_empty_folder_and_leaves_what_is_in_another_alone(tmp_path):
    (tmp_path / "mine.tmp").write_text("kept")
    with pytest.raises(FileProblem, match=r"is not empty.*--resume"), state.claim(tmp_path, toy.CONFIG):
        pass
    assert names(tmp_path) == ["mine.tmp"]


def test_of_two_that_begin_a_run_at_once_the_second_changes_nothing(tmp_path):
    with state._locked(tmp_path):
        with pytest.raises(FileProblem, match="is being trained by process"), state.claim(tmp_path, toy.CONFIG):
            pass
        assert names(tmp_path) == ["limner.lock"]
    assert names(tmp_path) == []


def test_a_lock_removed_while_another_waited_for_it_is_worth_nothing(tmp_path, monkeypatch):
    flock, lock, removals = state.fcntl.flock, tmp_path / "limner.lock", [1, 1]
    monkeypatch.setattr(
        state.fcntl, "flock", lambda *a: (removals and lock.unlink(missing_ok=removals.pop()), flock(*a))
    )
    with state.claim(tmp_path):
        assert not removals
        assert f"process {os.getpid()} on" in lock.read_text()  # taken anew, and seen by others
        with pytest.raises(FileProblem, match="is being trained by process"), state.claim(tmp_path):
            pass
    assert names(tmp_path) == []


def test_where_there_are_no_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(state.fcntl, "flock", none)
    assert toy.fit(tmp_path / "run") == 0
    err = capsys.readouterr().err
    assert err.startswith(f"cannot lock {tmp_path / 'run'}: No locks available; see")
    assert err.count("\n") == 1


def test_a_folder_without_a_run_has_nothing_to_resume(tmp_path):
    with pytest.raises(FileProblem, match="holds no training run"):
        state.config_of(tmp_path)


def test_another_config_is_not_resumed(trained):
    other = state.TrainState(toy.ToySystem(), replace(toy.CONFIG, lr=0.5))
    with pytest.raises(FileProblem, match="another config"):
        other.restore(state.read_checkpoint(trained / "checkpoints" / "step-000030"), "step-000030")


def copied(trained: Path, tmp_path: Path, changes: dict[str, bytes | None]) -> Path:
    """The run with files of its checkpoints changed, or removed, as if they had been written so."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for checkpoint in state.checkpoints(run / "checkpoints"):
        files = {name: changes.get(name, data) for name, data in state.read_checkpoint(checkpoint).items()}
        state.save_checkpoint(checkpoint.parent, int(checkpoint.name[5:]), {k: v for k, v in files.items() if v}, 2)
    return run


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("state.json", b"{}"),
        ("state.json", b"[]"),
        ("state.json", b"step"),
        ("model.safetensors", b"weights"),
        ("ema.safetensors", None),
        ("ema.safetensors", toy.safetensors.torch.save({"x": torch.ones(1)})),
        ("optimizer.safetensors", toy.safetensors.torch.save({"x": torch.ones(1)})),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(trained, tmp_path, name, data):
    run = copied(trained, tmp_path, {name: data})
    with pytest.raises(FileProblem, match=r"is no checkpoint of this version .*go on with the version that wrote it"):
        toy.fit(run)


def test_a_run_from_before_a_field_was_added_goes_on(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    del config["muon_lr_scale"]
    run = copied(trained, tmp_path, {"config.json": json.dumps(config).encode()})
    assert toy.fit(run) == 0


def test_other_frozen_weights_are_not_resumed(trained):
    torch.manual_seed(1)
    other = state.TrainState(toy.ToySystem(), toy.CONFIG)
    with pytest.raises(FileProblem, match="other frozen weights"):
        other.restore(state.read_checkpoint(trained / "checkpoints" / "step-000030"), "step-000030")


def no_file(path: Path) -> nn.Module:
    raise AssertionError("a checkpoint's file was taken for a final one")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_a_checkpoint_starts_another_run_warm(trained, name):
    system = toy.ToySystem()
    state.warm_start(system, trained / "checkpoints" / "step-000030" / name, no_file)
    stored = toy.safetensors.torch.load((trained / "checkpoints" / "step-000030" / name).read_bytes())
    assert torch.equal(system.net[0].weight, stored["net.0.weight"])
    assert not torch.equal(system.net[0].weight, toy.ToySystem().net[0].weight)


def test_a_final_file_starts_another_run_warm(tmp_path):
    teacher, system = toy.ToySystem(), toy.ToySystem()
    state.warm_start(system, tmp_path / "toy.safetensors", lambda _: teacher)
    assert torch.equal(system.table.weight, teacher.table.weight)
    assert torch.equal(system.frozen.weight, teacher.frozen.weight)


def test_a_warm_start_from_other_shapes_names_the_first(tmp_path):
    teacher = toy.ToySystem()
    teacher.net[0] = nn.Linear(4, 9)
    with pytest.raises(CheckpointMismatch, match=r"net\.0\.bias is \(9,\) in the file, \(8,\) in this system"):
        state.warm_start(toy.ToySystem(), tmp_path / "toy.safetensors", lambda _: teacher)


def test_a_warm_start_that_lacks_a_trained_weight_is_refused(tmp_path):
    teacher = toy.ToySystem()
    del teacher.table
    with pytest.raises(CheckpointMismatch, match=r"table\.weight is not in the file"):
        state.warm_start(toy.ToySystem(), tmp_path / "toy.safetensors", lambda _: teacher)


def test_tied_weights_are_stored_once():
    assert not any(name.startswith("tied") for name in state.tensors_of(toy.ToySystem()))


def test_no_pickle_in_a_checkpoint(trained):
    for path in (trained / "checkpoints" / "step-000030").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            assert toy.safetensors.torch.load(path.read_bytes())
