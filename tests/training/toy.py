"""A system and batches small enough to train hundreds of steps a second, and a run that a test can kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from limner.catalog import AutoencodingConfig
from limner.data.batches import DataConfig
from limner.training import loop, state
from limner.training.config import TrainConfig
from limner.training.processes import Processes, StopRequests, join

CONFIG = TrainConfig(
    name="toy",
    system=AutoencodingConfig(),
    data=DataConfig(),
    steps=30,
    batch_size=8,
    lr=1e-2,
    warmup=3,
    ema_half_life=100,
    log_every=5,
    save_every=5,
    keep=2,
)


class ToySystem(nn.Module):
    """Regression with noise from the step's generator, dropout from torch's global one, a norm's buffers, a frozen
    layer, tied weights, and an embedding."""

    phases: tuple[str, ...] = ("main",)

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.table = nn.Embedding(8, 4)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1 if noise else 0.0), nn.Linear(8, 4))
        self.tied = self.net[3]

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return [*self.table.parameters(), *self.net.parameters()]

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        x = self.frozen(batch["x"]) + self.table(batch["index"])
        eps = torch.randn(x.shape, generator=generator) * self.noise
        error = (self.tied(self.net[:3](x + eps)) - batch["y"]).square().mean()
        return {"loss": error + 0.01 * self.table.weight.square().sum(), "error": error}


class Players(nn.Module):
    """Two phases that pull at each other's output."""

    phases = ("generator", "discriminator")

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        return list(getattr(self, phase).parameters())

    def loss(self, batch: dict[str, Any], phase: str, generator: torch.Generator) -> dict[str, Tensor]:
        score = self.discriminator(self.generator(batch["x"])).mean()
        return {"loss": score.square() if phase == "generator" else (score - 1).square()}


class ToyBatches:
    """Eight examples of a batch are a function of the step, like the real ones'. `poison` is a step whose y is NaN."""

    def __init__(self, poison: int = -1) -> None:
        self.poison = poison

    def __len__(self) -> int:
        return 64

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(size, 4, generator=generator)
        index = torch.randint(8, (size,), generator=generator)
        y = x.flip(1) * (float("nan") if step == self.poison else 1.0)
        share = slice(rank * size // world, (rank + 1) * size // world)
        return {"x": x[share], "y": y[share], "index": index[share], "ids": [f"toy-{int(i)}" for i in index[share]]}


class Uneven(ToyBatches):
    """Every third step has half as many examples, like a step of a larger size."""

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        return super().batch(step, size // 2 if step % 3 == 1 else size, rank=rank, world=world)


class StopAt(StopRequests):
    """Asks to stop when it was looked at `looks` times, which is before step number `looks` of this process."""

    def __init__(self, looks: int) -> None:
        super().__init__(None)
        self.looks = looks

    def asked(self) -> int:
        self.looks -= 1
        return 1 if self.looks < 0 else 0


def save_toy(system: nn.Module, config: TrainConfig, path: Path) -> None:
    path.write_bytes(safetensors.torch.save(state.tensors_of(system)))


def fit(run: Path, config: TrainConfig = CONFIG, **kwargs: Any) -> int:
    """Start or resume a toy run in `run`, as `loop.train` would."""
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    system = kwargs.pop("system", None) or ToySystem()
    batches = kwargs.pop("batches", None) or ToyBatches()
    resume = (run / "config.json").exists()
    with state.claim(run, None if resume else config):
        return loop.fit(system, batches, config, run, resume=resume, export=save_toy, **kwargs)


def ending(run: Path, config: TrainConfig = CONFIG) -> dict[str, bytes]:
    """All that a finished run remembers: the last checkpoint's files and the final weights."""
    files = state.read_checkpoint(run / "checkpoints" / state.checkpoint_name(config.steps))
    return {**files, "final": state.final_file(run, config).read_bytes()}


def processes() -> Any:
    """Starts processes that need not first import all that a training step makes torch import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limner.training.loop", "torch._dynamo", "torch.utils.tensorboard", "pytest"])
    return context


def fit_slowly(run: Path, config: TrainConfig, seconds: float) -> None:
    """In a process of its own, to be killed by another: every step takes some time."""

    class Slow(ToyBatches):
        def batch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            time.sleep(seconds)
            return super().batch(*args, **kwargs)

    fit(run, config, batches=Slow())


def fit_until_operation(run: Path, config: TrainConfig, number: int) -> None:
    """In a process of its own: dies by SIGKILL just before file operation `number` of its checkpoints."""
    left = [number]

    def dying(operation: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return wrapped

    os.fsync = lambda _: None
    state.write_durably, state._sync = dying(state.write_durably), dying(state._sync)
    Path.rename, Path.mkdir = dying(Path.rename), dying(Path.mkdir)  # type: ignore[method-assign]
    state.shutil.rmtree = dying(state.shutil.rmtree)
    fit(run, config)


def fit_as_one_of(run: Path, config: TrainConfig, rank: int, world: int, port: int, looks: int = 10**6) -> None:
    """In a process of its own: process `rank` of `world`, as torchrun would start it; `looks` as for `StopAt`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    together: Processes = join("cpu")
    torch.manual_seed(config.seed)
    with ExitStack() as held:
        resume = (run / "checkpoints").exists()
        together.lead(lambda: held.enter_context(state.claim(run, None if resume else config)))
        system = ToySystem(noise=0.0)
        system.net[1] = nn.Identity()  # batch statistics depend on how a batch is shared
        stop, unlearned = StopAt(looks), ToyBatches() if config.validation else None
        loop.fit(
            *(system, ToyBatches(), replace(config), run),
            export=save_toy,
            processes=together,
            resume=resume,
            stop=stop,
            held=unlearned,
        )
    together.leave()
