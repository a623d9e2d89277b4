"""What a run says: a line to the terminal and log.txt, metrics.jsonl, TensorBoard, grids of drawings, and of each start
the versions, devices and command line (starts.jsonl)."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import limner
from limner.checkpoints.files import write_atomically
from limner.data.streams import MOST_NAMED
from limner.errors import LimnerError
from limner.training.state import writing

CHECKER = (255, 236)
"""The two greys behind transparent drawings."""


class Report:
    """Writes RUN/metrics.jsonl and starts.jsonl (one JSON object a line), log.txt and, if TensorBoard is installed,
    RUN/tensorboard; tells rates.

    `step` and `images` are what was done and seen before. A process other than the first (`silent`) writes and says
    nothing.
    """

    def __init__(self, run: Path, steps: int, step: int, images: int, *, silent: bool = False) -> None:
        self.run, self.steps, self.silent = run, steps, silent
        self.console = Console(highlight=False, soft_wrap=True, quiet=silent)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=self.console, disable=silent
        )
        self.task = self.progress.add_task("training", total=steps, completed=step)
        self.bar = self.console.is_terminal and not silent
        self.file: IO[str] | None = None
        self.log_file: IO[str] | None = None
        self.unwritten: list[str] = []
        """What was said, or is to be remembered, before there were files."""
        self.started: dict[str, Any] = {}
        self.drawn = ""
        self.board: Any = None
        self.has_board = importlib.util.find_spec("tensorboard") is not None
        self.start, self.mark = step, (step, images, time.perf_counter())
        self.away = 0.0
        self.named = 0

    def __enter__(self) -> Report:
        if not self.silent:
            with writing(self.run / "metrics.jsonl"):
                _forget_after(self.run / "metrics.jsonl", self.start)
            if not self.has_board:
                self.say("TensorBoard is not installed, so no event files: pip install 'limner[train]' adds it")
        if self.bar:
            self.progress.start()
        self.mark = (*self.mark[:2], time.perf_counter())
        return self

    def _open(self) -> None:
        """The files; not before there is something for them, so that a run that fails at once leaves none."""
        with writing(self.run / "metrics.jsonl"):
            self.file = (self.run / "metrics.jsonl").open("a", encoding="utf-8")
        with writing(self.run / "log.txt"):
            self.log_file = (self.run / "log.txt").open("a", encoding="utf-8")
            self.log_file.writelines(self.unwritten)
        if self.started:
            with writing(self.run / "starts.jsonl"), (self.run / "starts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.started) + "\n")
        if self.has_board:
            from torch.utils.tensorboard import SummaryWriter

            with writing(self.run / "tensorboard"):
                self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.progress.stop()
        if isinstance(error, LimnerError) and self.log_file:
            self.log_file.write(f"{error}\n")
        for file in (self.file, self.log_file, self.board):
            if file:
                file.close()

    def begin(self, processes: int, device: torch.device) -> None:
        """Remember what this start of the run was made with."""
        self.started = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "step": self.start,
            "command": sys.argv,
            "versions": {"limner": limner.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "processes": processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        }

    def say(self, message: str) -> None:
        """One line to stdout, and with the time to log.txt."""
        self.console.print(message, markup=False)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n"
        if self.log_file:
            with writing(self.run / "log.txt"):
                self.log_file.write(line)
                self.log_file.flush()
        else:
            self.unwritten.append(line)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside (saving, drawing) does not count in images/s."""
        start = time.perf_counter()
        yield
        self.away += time.perf_counter() - start

    def log(self, step: int, images: int, values: dict[str, float], bad: Sequence[str] = ()) -> None:
        """`values` are means over the steps since the last call, `images` all seen so far; adds images/s, seconds left
        and peak memory (GB), and how many samples were `bad` and, of `MOST_NAMED`, why."""
        now = time.perf_counter()
        before, seen, then = self.mark
        steps, seconds = step - before, max(1e-9, now - then - self.away)
        self.mark, self.away = (step, images, now), 0.0
        rate = (images - seen) / seconds
        left = (self.steps - step) * seconds / max(1, steps)
        told: dict[str, Any] = {"bad_samples": len(bad)} if bad else {}
        if news := bad[self.named : MOST_NAMED]:
            told["left_out"] = list(news)
        self.named = len(bad)
        told |= {"images_per_second": rate, "seconds_left": left, "memory_gb": peak_memory() / 1e9}
        self._write({"step": step, "images": images, **values, **told})
        terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        pace = f"{rate:.0f} images/s  {told['memory_gb']:.2f} GB  {duration(left)} left{self.drawn}"
        self.say(f"step {step}/{self.steps}  {terms}  {pace}")
        if self.bar:
            losses = "  ".join(f"{n} {v:.4g}" for n, v in values.items() if n.rpartition("/")[2] == "loss")
            self.progress.update(self.task, completed=step, description=f"{losses}  {pace}")

    def validated(self, step: int, values: dict[str, float]) -> None:
        """The losses of pictures that are not learned from."""
        self._write({"step": step, **values})
        terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {step}/{self.steps}  {terms}")

    def _write(self, line: dict[str, Any]) -> None:
        if self.silent:
            return
        if self.file is None:
            with self.aside():
                self._open()
        assert self.file is not None
        with writing(self.run / "metrics.jsonl"):
            rounded = {k: v if isinstance(v, list) else _rounded(v) for k, v in line.items()}
            self.file.write(json.dumps(rounded) + "\n")
            self.file.flush()
        if self.board:
            for name, value in line.items():
                if not isinstance(value, list):
                    self.board.add_scalar(name, value, line["step"])

    def draw(self, name: str, images: Sequence[Image.Image]) -> None:
        """Write the drawings as one picture, RUN/samples/`name`.png."""
        data = io.BytesIO()
        grid(images).save(data, "PNG")
        path = self.run / "samples" / f"{name}.png"
        write_atomically(path, data.getvalue())
        self.drawn = f"  {path}"


def grid(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """The drawings in rows, about as wide as high, each in a cell of the largest one's size, on a light checker board
    where they are transparent. Returns RGB."""
    width, height = max(i.width for i in images), max(i.height for i in images)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    board = _checker(width, height)
    for k, image in enumerate(images):
        corner = (gap + k % columns * (width + gap), gap + k // columns * (height + gap))
        picture = image.convert("RGBA")
        sheet.paste(board, corner)
        sheet.paste(picture, corner, picture)
    return sheet


def _checker(width: int, height: int, cell: int = 16) -> Image.Image:
    light = torch.arange(height)[:, None] // cell + torch.arange(width)[None] // cell
    grey = torch.tensor(CHECKER, dtype=torch.uint8)[light % 2]
    return Image.fromarray(grey.numpy()).convert("RGB")


def duration(seconds: float) -> str:
    """75 -> "1m15s", 7260 -> "2h01m"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def peak_memory() -> int:
    """Bytes: of the GPU where one is in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(line + "\n" for line in kept).encode())
