"""What a run does where the disk, a signal or another process fails it: one line, nothing lost, and the same end after.

Checkpoints alone are in test_state.py, kills in test_resume.py, samples that cannot be read in tests/data.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from toy import ToyBatches, ending, fit, processes

from limner.errors import FileProblem
from limner.training import loop, state

FEW = ("steps=4", "batch_size=2", "log_every=2", "save_every=2", "warmup=0", "data.limit=8", "--device", "cpu")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert fit(run) == 0
    return ending(run)


# ------------------------------------------------------------------------------------------------------------- disks


class Filling(ToyBatches):
    """At step 12 somebody else writes until the disk is full, `spare` bytes excepted."""

    def __init__(self, disk: Path, spare: int) -> None:
        super().__init__()
        self.disk, self.spare = disk, spare

    def batch(self, step, *args, **kwargs):
        if step == 12:
            with (self.disk / "ballast").open("wb", buffering=0) as file:
                for piece in (b"x" * 65536, b"x" * 4096, b"x"):
                    while True:
                        try:
                            file.write(piece)
                        except OSError:
                            break
                if self.spare:
                    file.truncate(file.tell() // 4096 * 4096 - self.spare)
        return super().batch(step, *args, **kwargs)


def fit_on_a_small_disk(disk: Path, spare: int, said: Path) -> None:
    """In a process of its own, which alone sees the disk of 6 MB: what the full disk made of a run, into `said`."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = 0x20000 | (0 if os.geteuid() == 0 else 0x10000000)  # mounts, and users
    if libc.unshare(spaces) or libc.mount(b"none", b"/", None, 0x44000, None):  # private, and all below
        said.write_text("no")
        return
    if libc.mount(b"none", os.fsencode(disk), b"tmpfs", 0, b"size=6m"):
        said.write_text("no")
        return
    try:
        fit(disk / "run", batches=Filling(disk, spare))
        told = "it ended"
    except FileProblem as problem:
        told = str(problem)
    kept = [path.name for path in state.checkpoints(disk / "run" / "checkpoints")]
    whole = all(state.read_checkpoint(disk / "run" / "checkpoints" / name) for name in kept)
    left = [path.name for path in (disk / "run").rglob("*.tmp")]
    (disk / "ballast").unlink()
    assert fit(disk / "run") == 0
    files = ending(disk / "run")
    (said.parent / "ending").write_bytes(b"".join(files[name] for name in sorted(files)))
    said.write_text(f"{told}\n{kept} {whole} {left}")


@pytest.mark.parametrize("spare", [20480, pytest.param(0, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_ends_a_run_with_what_was_saved_and_it_goes_on_after(tmp_path, uninterrupted, spare):
    (tmp_path / "disk").mkdir()
    said = tmp_path / "said"
    process = processes().Process(target=fit_on_a_small_disk, args=(tmp_path / "disk", spare, said))
    process.start()
    process.join()
    if said.read_text() == "no":
        pytest.skip("no disk may be mounted here")
    told, kept = said.read_text().splitlines()
    place = f"{tmp_path}/disk/run/checkpoints/step-000015"
    assert told.startswith(
        f"cannot write {place}: No space left on device" if spare else f"no room for {place}: it needs"
    )
    assert kept == "['step-000005', 'step-000010'] True []"
    assert (tmp_path / "ending").read_bytes() == b"".join(uninterrupted[name] for name in sorted(uninterrupted))


FAILING = [("fsync", 6), ("rename", 6), ("mkdir", 0), ("replace", 0)]
OTHERS = [(name, n) for name in ("fsync", "rename", "mkdir") for n in range(7) if (name, n) not in FAILING]


@pytest.mark.parametrize(
    ("operation", "number"), [*FAILING, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_whichever_operation_of_a_disk_fails_the_run_ends_alike_after(
    tmp_path, monkeypatch, uninterrupted, operation, number
):
    run, left = tmp_path / "run", [number]
    owner = os if operation == "fsync" else Path
    plain = getattr(owner, operation)

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, operation, failing)
        with pytest.raises(FileProblem, match=r"cannot write .*: Input/output error") as caught:
            fit(run)
        assert "\n" not in str(caught.value)
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    assert fit(run) == 0
    assert ending(run) == uninterrupted


def test_a_disk_that_cannot_hold_a_checkpoint_is_told_before_the_first_step(limner, here, monkeypatch):
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    done = limner("train", "icons-autoencoder-tiny", "-o", "run", *FEW)
    assert (done.code, done.out, done.err.count("\n")) == (3, "", 1)
    assert "no room for run/checkpoints: it needs" in done.err
    assert not (here / "run").exists()


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_ends_the_run_at_once_and_leaves_nothing(
    limner, here, monkeypatch, number, code
):
    def encoding(*_):
        os.kill(os.getpid(), number)
        time.sleep(30)

    monkeypatch.setattr(loop, "encoded", encoding)
    start = time.monotonic()
    done = limner("train", "icons-tiny", "-o", "run", *FEW)
    assert time.monotonic() - start < 10
    assert done.code == code
    assert done.out == f"{'terminated' if code == 0 else 'interrupted'} before the first step; nothing was begun\n"
    assert not (here / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_amid_the_steps_of_a_command_saves_the_step_that_it_came_in(limner, here, monkeypatch):
    plain = loop.randomness

    def signalled(seed, step, *told):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(seed, step, *told)

    monkeypatch.setattr(loop, "randomness", signalled)
    done = limner("train", "icons-autoencoder-tiny", "-o", "run", *FEW)
    assert done.code == 0
    assert "terminated: saved at step 3; to go on: limner train --resume run" in done.out
    assert (here / "run" / "checkpoints" / "step-000003" / "manifest.json").exists()


def test_class_pictures_that_were_drawn_before_a_signal_are_kept(limner, here, tiny_model, monkeypatch):
    from limner.training import prior

    told = ("-m", tiny_model, "-d", "pictures", "data.size=32", "prior.prompt=a dog", "prior.images=6", *FEW)
    (here / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(here / "pictures" / "0.png")
    save = prior.metadata.save_png

    def saving(*args):
        save(*args)
        if args[2].name == "000004.png":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(prior.metadata, "save_png", saving)
        done = limner("train", "lora", *told, "-o", "run")
    assert done.code == 0
    assert done.out.endswith("terminated before the first step; to go on: limner train --resume run\n")
    assert len(list((here / "run" / "prior").glob("*.png"))) == 5
    done = limner("train", "--resume", "run", "--device", "cpu")
    assert done.code == 0
    assert "2 of 6 pictures to go" in done.out


# ------------------------------------------------------------------------------------------------------- other models


def test_a_base_that_is_not_the_adapters_is_told_before_the_first_step(limner, here, tiny_model, other_model):
    model = here / "model.safetensors"
    model.write_bytes(tiny_model.read_bytes())
    told = ("adapter.rank=2", "data.source=shapes", "data.size=32", *FEW)
    assert limner("train", "lora", "-m", model, "-o", "run", *told).code == 0
    (here / "run" / "lora.safetensors").unlink()
    model.write_bytes(other_model.read_bytes())
    done = limner("train", "--resume", "run", "--device", "cpu")
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "trained around other frozen weights than the config gives now (its model" in done.err
    wide = f"init_from={here}/run/checkpoints/step-000004/ema.safetensors"
    done = limner("train", "lora", "-m", "icons", "-o", "more", wide, *told)
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "in the file, (2, 512) in this system; is it of another model or size?" in done.err
    assert not (here / "more").exists()


# ---------------------------------------------------------------------------------------------------- other processes


def test_processes_that_torchrun_starts_again_go_on_with_their_run(limner, here, monkeypatch):

    told = ("train", "icons-autoencoder-tiny", "-o", "run", *FEW)
    assert limner(*told, "-o", "whole").code == 0
    save = loop.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", lambda *args: (save(*args), (_ for _ in ()).throw(KeyboardInterrupt)))
        assert limner(*told).code == 130
    assert limner(*told).code == 3  # it is not empty
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "is not empty" in limner(*told, "lr=0.5").err  # another run is not gone on with
    done = limner(*told)
    assert done.code == 0, done.err
    assert "step 2 of 4" in done.out
    final = "final/icons-autoencoder-tiny.safetensors"
    assert (here / "run" / final).read_bytes() == (here / "whole" / final).read_bytes()


DYING = """
import os, signal, sys
from limner.training import loop
from limner.cli.main import main
mark, plain = sys.argv.pop(1), loop.randomness
def randomness(seed, step, processes, part=""):
    died = os.path.exists(f"{mark}-{step}")
    if step in (3, 5) and processes.rank == step % 2 and not died:
        open(f"{mark}-{step}", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(seed, step, processes, part)
loop.randomness = randomness
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_torchrun_starts_killed_processes_again_to_the_same_end(here):
    (here / "dying.py").write_text(DYING)
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
    ]
    told = ["train", "icons-autoencoder-tiny", *FEW, "steps=7", "--out"]
    for name in ("whole-5", "whole-3"):
        (here / name).touch()  # nobody dies
    for mark in ("whole", "parts"):
        done = subprocess.run([*run, "dying.py", mark, *told, f"run-{mark}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (here / "parts-3").exists()
    assert (here / "parts-5").exists()
    final = "final/icons-autoencoder-tiny.safetensors"
    assert (here / "run-parts" / final).read_bytes() == (here / "run-whole" / final).read_bytes()
    assert not list((here / "run-parts").rglob("*.tmp"))
