"""The processes that train together: one, or as many as torchrun started, a device each."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from limner.errors import UsageError

T = TypeVar("T")


@dataclass
class Processes:
    """`world` processes of which this is number `rank`, working on `device`."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: Any = None
    """Group of the same processes that talks through the CPU, without waiting for a GPU."""

    @property
    def first(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Over all processes, on the device."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def agree(self, value: int) -> int:
        """The largest `value` of any process, so that all decide alike."""
        if self.world == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.host)
        return int(values)

    def lead(self, work: Callable[[], T]) -> T | None:
        """Let the first process do `work`; the others wait, and end with it if it raises."""
        done, refused = None, None
        if self.first:
            try:
                done = work()
            except BaseException as error:  # whatever it is: the others would wait for ever
                refused = error
        code = self.agree(getattr(refused, "exit_code", 1) if refused else 0)
        if code:
            raise refused or SystemExit(code)
        return done

    def share(self, loss: nn.Module) -> nn.Module:
        """A module whose backward averages the gradients of all processes; itself where there is one."""
        if self.world == 1:
            return loss
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(loss, device_ids=ids, gradient_as_bucket_view=True)

    @contextmanager
    def gathering(self, loss: nn.Module, last: bool) -> Iterator[None]:
        """Around a part of a step: the processes exchange gradients in the `last` alone, all that were summed."""
        if isinstance(loss, FSDPModule):
            loss.set_requires_gradient_sync(last)
        with nullcontext() if last or not hasattr(loss, "no_sync") else cast(Any, loss).no_sync():
            yield

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def join(device: str = "auto") -> Processes:
    """Join the other processes if torchrun set RANK, WORLD_SIZE and LOCAL_RANK. `device`: auto, cpu, cuda.

    Raises UsageError for a device that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"no device {device!r}; give auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for, but this torch finds no GPU; use --device cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Processes(device=torch.device(kind))
    local = int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(f"process {local} of this host has no GPU: {torch.cuda.device_count()} are here")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    place = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    host = dist.new_group(backend="gloo") if kind == "cuda" else None
    return Processes(dist.get_rank(), dist.get_world_size(), place, host)


def restarted() -> bool:
    """Whether torchrun starts all processes again, because one of them failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


STOPS = {1: "the time given is over", 2: "terminated", 3: "interrupted"}
OUT_OF_TIME, TERMINATED, INTERRUPTED = STOPS


class Stopped(BaseException):
    """A signal, where there is nothing to save."""


class StopRequests:
    """Inside, SIGTERM, the first Ctrl-C and `seconds` of wall time are noted instead of obeyed at once.

    `asked()` is 0 or a key of STOPS. A second Ctrl-C interrupts as usual. May be entered again inside itself. Where
    `waits` is False a signal ends what is inside at once, as an exception that goes no further than that.
    """

    waits = True

    def __init__(self, seconds: float | None) -> None:
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.noted = 0
        self.before: list[dict[int, Any]] = []

    def __enter__(self) -> StopRequests:
        heard = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self.before.append({number: signal.signal(number, self._note) for number in heard})
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for number, handler in self.before.pop().items():
            signal.signal(number, handler)
        return kind is Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.waits:
            raise Stopped

    def asked(self) -> int:
        if self.noted:
            return self.noted
        return OUT_OF_TIME if self.deadline is not None and time.monotonic() >= self.deadline else 0
