"""Where the time of one picture goes: `limner PROMPT` in fresh processes, from start to written PNG, stage by stage.

    python benchmarks/one_picture.py -n 5 -- "3d emoji of a pink heart" --steps 16

What follows `--` goes to `limner generate`. Of each stage the median wall time, and the CPU time of all threads divided
by their number: where other programs share the cores, the second says more. `exit` is what the process does after the
picture is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("import", "load", "text", "steps", "decode", "save", "exit")
CORES = os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=3, help="fresh processes (default 3)")
    parser.add_argument("arguments", nargs="*", default=["3d emoji of a pink heart"], help="of `limner generate`")
    asked = parser.parse_args()
    runs = [measure(asked.arguments) for _ in range(asked.n)]
    print(f"{asked.n} processes, {CORES} cores\n{'stage':8} {'wall s':>8} {'CPU s / ' + str(CORES):>10}")
    for stage in (*STAGES, "total"):
        wall, cpu = (statistics.median(run[stage][i] for run in runs) for i in (0, 1))
        print(f"{stage:8} {wall:8.2f} {cpu / CORES:10.2f}")
    print(f"peak memory {statistics.median(run['peak'] for run in runs) / 1e6:.0f} MB")


def measure(arguments: list[str]) -> dict[str, Any]:
    """Seconds (wall, CPU) of each stage of one process and in all, and its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder, "marks.json")
        begin = time.time()
        child = subprocess.Popen(
            [sys.executable, __file__, *arguments, "-o", f"{folder}/"],
            env={**os.environ, "LIMNER_MARKS": str(marks)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(child.pid, 0)
        end = (time.time(), usage.ru_utime + usage.ru_stime)
        if status != 0 or not list(Path(folder).glob("*.png")):
            sys.exit("no picture: try the same arguments with `limner`")
        seen = {"start": (begin, 0.0), **json.loads(marks.read_text()), "exit": end}
    times = {
        stage: (seen[stage][0] - seen[before][0], seen[stage][1] - seen[before][1])
        for before, stage in zip(("start", *STAGES), STAGES, strict=False)
    }
    return {**times, "total": (end[0] - begin, end[1]), "peak": 1024 * usage.ru_maxrss}


def paint(arguments: list[str], marks: Path) -> None:
    """In the child: the command itself, with the clock read at the end of every stage."""
    seen: dict[str, tuple[float, float]] = {}

    def mark(stage: str) -> None:
        used = os.times()
        seen[stage] = (time.time(), used.user + used.system)

    def marked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            mark(stage)
            return result

        return call

    from limner import pipeline
    from limner.cli import main as cli

    mark("import")
    load = pipeline.load

    def load_marked(*args: Any, **kwargs: Any) -> pipeline.Pipeline:
        pipe = load(*args, **kwargs)
        mark("load")
        system: Any = pipe.system
        for stage, name in (("text", "condition"), ("steps", "sample"), ("decode", "decode")):
            setattr(system, name, marked(stage, getattr(system, name)))
        return pipe

    pipeline.load = load_marked
    try:
        cli.main(["generate", *arguments])
    finally:
        mark("save")
        marks.write_text(json.dumps(seen))


if __name__ == "__main__":
    if "LIMNER_MARKS" in os.environ:
        paint(sys.argv[1:], Path(os.environ["LIMNER_MARKS"]))
    else:
        main()
