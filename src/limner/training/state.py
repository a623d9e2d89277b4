"""All that a run must remember, and checkpoints that are either whole or not there.

A checkpoint is a folder RUN/checkpoints/step-000123:

    model.safetensors       trained weights, and buffers
    ema.safetensors         moving average of the trained weights, fp32, if there is one
    optimizer.safetensors   PHASE/PARAMETER/NAME of each optimizer's state
    state.json              step, images seen, seed, SHA-256 of the frozen weights, the scale of the loss (fp16), the
                            ledger's averages, what tells the data from others, and those numbers of the optimizers that
                            are no tensors
    config.json             the resolved TrainConfig
    manifest.json           SHA-256 of each of the above

Frozen weights are not stored again: building the system from its config gives them, and the hash proves it. The
randomness and the data of step k are pure functions of (seed, k, rank), so `step` and `seed` are the state of all
random number generators and of the data. It is written to a temporary folder, every file is flushed to the disk, then
the folder is renamed: a crash at any moment leaves the older checkpoints and at most a temporary folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from limner.checkpoints.files import write_atomically
from limner.errors import CheckpointMismatch, FileProblem, UsageError
from limner.training.config import TrainConfig, from_json, to_json
from limner.training.ema import Ema
from limner.training.optimizers import Muon, optimizers_for
from limner.training.sharding import put, whole

TEMPORARY = ".tmp"
TORN = ".torn"
MANIFEST = "manifest.json"
CONFIG = "config.json"
LOCK = "limner.lock"
"""Says who trains in a run's folder, while somebody does."""


class TrainState:
    """Step, images seen, weights, the optimizers of each phase, the loss's scaler, EMA, and what a ledger keeps."""

    def __init__(self, system: nn.Module, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.system = system
        self.config = config
        self.step, self.images = 0, 0
        phases = cast(Any, system).phases
        self.parameters: dict[str, list[nn.Parameter]] = {
            phase: [p for p in cast(Any, system).phase_parameters(phase) if p.requires_grad] for phase in phases
        }
        self.optimizers = {phase: optimizers_for(system, ps, config) for phase, ps in self.parameters.items()}
        if config.optimizer == "muon" and not any(
            isinstance(o, Muon) for found in self.optimizers.values() for o in found
        ):
            raise UsageError("optimizer=muon moves the linear layers of repeated blocks, and here are none: take adamw")
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.precision == "fp16")
        self.ledger: dict[str, Any] = {}
        self.data: dict[str, Any] = {}
        """What tells the data of this run from others (see `limner.data.samples.account`), by what they are for."""
        self.ema = Ema(system, keep=config.ema_half_life > 0)
        own = tensors_of(system)
        frozen = {name for name, p in system.named_parameters() if not p.requires_grad}
        whose = str(getattr(system, "identity", "")).encode()  # of a model that is there
        stays = {} if whose else {n: t for n, t in own.items() if n in frozen}
        self.frozen = hashlib.sha256(_pack(stays) + whose).hexdigest()
        self.tensors = {n: t for n, t in own.items() if n not in frozen}
        buffers = {id(b) for b in system.buffers()}
        self.buffers = [t for n, t in system.state_dict(keep_vars=True).items() if id(t) in buffers and n in own]

    @property
    def least(self) -> int:
        """Bytes that a checkpoint has at least, its optimizers' moments not counted."""
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.ema.values.values()))

    def only(self, phase: str) -> None:
        """From here on, gradients are for the parameters of this phase."""
        if len(self.parameters) > 1:
            chosen = {id(p) for p in self.parameters[phase]}
            for p in (p for parameters in self.parameters.values() for p in parameters):
                p.requires_grad_(id(p) in chosen)

    def files(self, write: bool = True) -> dict[str, bytes]:
        """The contents of a checkpoint's files. Where the weights are cut among processes all of them call it; files of
        those that will not `write` hold no tensors."""
        state = {
            "step": self.step,
            "images": self.images,
            "seed": self.config.seed,
            "frozen": self.frozen,
            "scaler": self.scaler.state_dict(),
            "ledger": self.ledger,
            "data": self.data,
            "optimizers": self._optimizer_numbers(),
        }
        return {
            "model.safetensors": _pack(self.tensors, write),
            **({"ema.safetensors": _pack(self.ema.values, write)} if self.ema.values else {}),
            "optimizer.safetensors": _pack(self._optimizer_tensors(), write),
            "state.json": (json.dumps(state, indent=2) + "\n").encode(),
            "config.json": to_json(self.config).encode(),
        }

    def restore(self, files: Mapping[str, bytes], source: str) -> None:
        """Become what `files` remember; `source` names them in messages. Raises FileProblem, CheckpointMismatch."""
        with reading(source):
            if from_json(files["config.json"], f"{source}/{CONFIG}") != self.config:
                weights = "ema" if "ema.safetensors" in files else "model"
                raise FileProblem(
                    f"{source} was trained with another config than this run's {CONFIG}; put that file back as it was, "
                    f"or start a new run with init_from={source}/{weights}.safetensors"
                )
            state = json.loads(files["state.json"])
            if state["frozen"] != self.frozen:
                raise FileProblem(
                    f"{source} was trained around other frozen weights than the config gives now (its model, an "
                    "autoencoder or a text encoder); put the old file back, or start a new run with init_from"
                )
            self.step, self.images = int(state["step"]), int(state["images"])
            copy_tensors(safetensors.torch.load(files["model.safetensors"]), self.tensors, source)
            if self.ema.values:
                self.ema.load(safetensors.torch.load(files["ema.safetensors"]))
            self._load_optimizers(safetensors.torch.load(files["optimizer.safetensors"]))
            self._load_numbers(state.get("optimizers", {}))
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.ledger = state.get("ledger", {})

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = {id(p): name for name, p in self.system.named_parameters()}
        return {
            f"{phase}/{names[id(p)]}/{key}": value
            for phase, optimizers in self.optimizers.items()
            for optimizer in optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def _optimizer_numbers(self) -> dict[str, Any]:
        """{phase: for each optimizer {"groups": its own numbers of each, "state": PARAMETER/NAME of those that are no
        tensors}}."""
        names = {id(p): name for name, p in self.system.named_parameters()}
        return {
            phase: [
                {
                    "groups": [{k: v for k, v in g.items() if isinstance(v, int | float)} for g in o.param_groups],
                    "state": {
                        f"{names[id(p)]}/{key}": value
                        for p in sorted(o.state, key=lambda p: names[id(p)])
                        for key, value in o.state[p].items()
                        if isinstance(value, int | float)
                    },
                }
                for o in optimizers
            ]
            for phase, optimizers in self.optimizers.items()
        }

    def _load_numbers(self, numbers: Mapping[str, Any]) -> None:
        parameters = dict(self.system.named_parameters())
        for phase, told in numbers.items():
            for optimizer, one in zip(self.optimizers[phase], told, strict=True):
                for group, values in zip(optimizer.param_groups, one["groups"], strict=True):
                    group.update(values)
                for name, value in one["state"].items():
                    parameter, key = name.split("/")
                    optimizer.state[parameters[parameter]][key] = value

    def _load_optimizers(self, tensors: Mapping[str, Tensor]) -> None:
        """In the memory layout of the parameter, since fused kernels run over both side by side."""
        parameters = dict(self.system.named_parameters())
        owners = {
            (phase, id(p)): optimizer
            for phase, optimizers in self.optimizers.items()
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for optimizer in owners.values():
            optimizer.state.clear()
        for name, value in tensors.items():
            phase, parameter, key = name.split("/")
            p = parameters[parameter]
            like = torch.empty_like(p, dtype=value.dtype) if value.shape == p.shape else value.to(p.device)
            put(like, value)
            owners[phase, id(p)].state[p][key] = like


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, how the data of `now` are not those of `then`; "" where they are, or one of them is not known."""
    told = []
    for name in now if then else ():
        before = then.get(name, {})
        mine = f"{name}: " if len(now) > 1 else ""
        if before.get("samples") != now[name]["samples"]:
            told.append(f"{mine}{now[name]['samples']} samples, where there were {before.get('samples', 'none')}")
        elif other := [what for what, value in now[name].items() if before.get(what) != value]:
            told.append(f"{mine}other {' and '.join(other)}")
    return ", ".join(told)


def warm_start(system: nn.Module, path: Path, load: Callable[[Path], nn.Module]) -> None:
    """Copy the weights of a final file (read by `load`) or of a checkpoint's model or ema file into `system`.

    Every trained parameter must be there. Raises FileProblem, CheckpointMismatch.
    """
    if (path.parent / MANIFEST).exists():
        tensors = safetensors.torch.load(read_checkpoint(path.parent)[path.name])
    else:
        tensors = tensors_of(load(path))
    own = tensors_of(system)
    trained = {name for name, p in system.named_parameters() if p.requires_grad}
    copy_tensors(tensors, {n: t for n, t in own.items() if n in tensors or n in trained}, str(path))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; one that has two names only once."""
    seen: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {n: t.detach() for n, t in state.items() if seen.setdefault(id(t), n) == n}


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor], where: str) -> None:
    """Copy by name; names and shapes must be the same. Raises CheckpointMismatch naming the first that differs."""
    for name in sorted(source.keys() | target.keys()):
        if name not in source or name not in target:
            lacking = "is not in the file" if name not in source else "is in the file but not in this system"
            raise CheckpointMismatch(f"{where}: {name} {lacking}; is it of another recipe or size?")
        if source[name].shape != target[name].shape:
            found, expected = tuple(source[name].shape), tuple(target[name].shape)
            raise CheckpointMismatch(
                f"{where}: {name} is {found} in the file, {expected} in this system; is it of another model or size?"
            )
    for name, tensor in target.items():
        put(tensor, source[name])


def _pack(tensors: Mapping[str, Tensor], write: bool = True) -> bytes:
    """What shares its memory is written as often as it is named."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach()).cpu().contiguous()  # whose order may be another, and a GPU have no room
        if not write:
            continue
        apart[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return safetensors.torch.save(apart)


# ---------------------------------------------------------------------------------------------------- the run's folder


@contextmanager
def claim(run: Path, new: TrainConfig | None = None) -> Iterator[None]:
    """Inside, no other process trains in the folder `run`; `new` makes it that of a new run with this config.

    A new run that ends before it has left anything leaves no folder either. Raises FileProblem if another process
    trains there, or if the folder of a new run is not empty or not writable.
    """
    if os.path.isfile(run):  # noqa: PTH113 (as below)
        raise FileProblem(f"{run} is a file: give --out a new folder")
    with writing(run):
        made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        if new:
            with writing(run):
                run.mkdir(parents=True, exist_ok=True)
                found = set(run.iterdir()) - {run / LOCK, *run.glob(f"{CONFIG}*{TEMPORARY}")}
            if found:
                raise FileProblem(
                    f"{run} is not empty; give another --out, or go on with it: limner train --resume {run}"
                )
        with _locked(run):
            if new:
                remove_temporaries(run)
                write_atomically(run / CONFIG, to_json(new).encode())
            try:
                yield
            finally:
                if new and {path.name for path in run.glob("*")} == {CONFIG, LOCK}:
                    (run / CONFIG).unlink()
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """The lock of `claim`: the system takes it back when this process ends, even by kill -9."""
    path = run / LOCK
    with ExitStack() as opened:
        while True:
            with writing(path):
                file = opened.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                who = file.read() or "another process"
                raise FileProblem(f"{run} is being trained by {who}; wait until that ends, or stop it") from None
            except OSError as error:
                print(f"cannot lock {run}: {_sentence(error)}; see that nothing else trains there", file=sys.stderr)
                break
            if os.fstat(file.fileno()).st_nlink:
                break
            opened.close()  # its last holder removed it since it was opened here: nobody else will meet this one
        try:
            with writing(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def config_of(run: Path) -> TrainConfig:
    """What the run in this folder was told. Raises FileProblem if there is none."""
    path = run / CONFIG
    if os.path.isfile(run):  # noqa: PTH113 (Path's own question raises for a name too long)
        raise FileProblem(f"{run} is a file: give the folder of the run")
    try:
        return from_json(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        start = f"limner train RECIPE --out {run}"
        raise FileProblem(f"{run} holds no training run (no {CONFIG}); start one: {start}") from None
    except OSError as error:
        raise FileProblem(f"cannot read {path}: {_sentence(error)}") from None


def final_file(run: Path, config: TrainConfig) -> Path:
    """Where a finished run leaves its weights."""
    name = f"{config.file_name}.safetensors"
    return run / name if config.adapter or config.word or config.control else run / "final" / name


def write_final(path: Path, export: Callable[[Path], object]) -> None:
    """Let `export` write a file of this name, and show it only when it is whole, with its folder if that is `final`.
    Raises FileProblem."""
    if path.parent.name != "final":
        with writing(path):
            export(path)
        return
    with writing(path), _made_aside(path.parent) as temporary:
        export(temporary / path.name)
        _sync(temporary / path.name)


# ---------------------------------------------------------------------------------------------- checkpoint folders


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first, by name alone."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def save_checkpoint(folder: Path, step: int, files: Mapping[str, bytes], keep: int) -> Path:
    """Write `files` as checkpoint `step` of `folder`, then remove all but the newest `keep`.

    Raises FileProblem when the disk is full or not writable; then nothing half-written is left, and no checkpoint
    is lost.
    """
    final = folder / checkpoint_name(step)
    write_folder(final, {**files, MANIFEST: _manifest(files)})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def read_checkpoint(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each checked against the manifest. Raises FileProblem naming the file at fault."""
    try:
        manifest = (path / MANIFEST).read_bytes()
        files = {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != MANIFEST}
    except OSError as error:
        raise FileProblem(f"checkpoint {path} is damaged: {Path(error.filename).name}: {_sentence(error)}") from None
    if manifest != _manifest(files):
        raise FileProblem(f"checkpoint {path} is damaged: {_fault(manifest, files)}")
    return files


def newest_checkpoint(folder: Path, tell: Callable[[str], None]) -> dict[str, bytes] | None:
    """The files of the newest whole checkpoint, or None where none was ever finished.

    A damaged one is reported through `tell` and set aside as step-….torn. Raises FileProblem if all are damaged.
    """
    candidates = checkpoints(folder)
    for path in reversed(candidates):
        try:
            return read_checkpoint(path)
        except FileProblem as problem:
            aside = path.with_name(path.name + TORN)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            tell(f"{problem}; set aside as {aside.name}, going back to the one before")
    if candidates or any(folder.glob(f"*{TORN}")):
        raise FileProblem(f"every checkpoint in {folder} is damaged; start a new run in another folder")
    return None


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Inside, what a whole checkpoint lacks, or has in a form of another version, becomes a FileProblem."""
    try:
        yield
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        what = f"is no checkpoint of this version ({error!r})"
        raise FileProblem(f"{source} {what}: go on with the version that wrote it, or start a new run") from error


def _manifest(files: Mapping[str, bytes]) -> bytes:
    """The one possible manifest of these files, so that comparing bytes also guards the manifest itself."""
    hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}
    return (json.dumps(hashes, indent=2) + "\n").encode()


def _fault(manifest: bytes, files: Mapping[str, bytes]) -> str:
    try:
        hashes = dict(json.loads(manifest))
    except (ValueError, TypeError):
        return f"{MANIFEST} is not readable"
    for name in sorted(hashes.keys() | files.keys()):
        if name not in files:
            return f"{name} is missing"
        if hashes.get(name) != hashlib.sha256(files[name]).hexdigest():
            return f"{name} is not what {MANIFEST} says"
    return f"{MANIFEST} was changed"


# --------------------------------------------------------------------------------------------- files that are whole


def write_folder(final: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder `final` with these files: all of it or nothing, also across a crash or a power cut."""
    need = sum(len(data) for data in files.values())
    with writing(final, need):
        check_room(final, need)
        final.parent.mkdir(parents=True, exist_ok=True)
        with _made_aside(final) as temporary:
            for name, data in files.items():
                write_durably(temporary / name, data)


def check_room(path: Path, need: int) -> None:
    """Raises FileProblem if so many bytes, and a fifth more, cannot be written where `path` is or will be."""
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    if free < 1.2 * need:
        raise FileProblem(
            f"no room for {path}: it needs {1.2 * need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; "
            "free some space and resume, what was saved before is kept"
        )


@contextmanager
def _made_aside(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` at the end, or goes away if anything fails."""
    temporary = final.with_name(final.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Wait until the disk has this file, or the names in this folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(run: Path) -> list[str]:
    """Delete what a killed run left half-written; returns the names."""
    found = [p for folder in (run, run / "checkpoints", run / "samples") for p in folder.glob("*" + TEMPORARY)]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in found]


@contextmanager
def writing(path: Path, need: int = 0) -> Iterator[None]:
    """Inside, an OSError becomes a FileProblem with the path, the cause and, if known, the bytes needed."""
    try:
        yield
    except OSError as error:
        size = f"; it needs {need / 1e6:.1f} MB" if need else ""
        raise FileProblem(f"cannot write {path}: {_sentence(error)}{size}; what was saved before is kept") from error


def _sentence(error: OSError) -> str:
    return error.strerror or type(error).__name__
