"""`limner runs`: the training runs of a folder, or what differs between some."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli.models import AsJson, print_rows
from limner.errors import FileProblem

LAST = 0.1
"""Share of a run's steps, the last, whose logged losses are averaged: one alone is noise."""


def runs_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="A folder of runs (`runs` if none is named), or runs to compare.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List training runs, or compare several.

    Losses are means over the last tenth of the steps done; data that differ have another number or mark. Of those that
    are compared: the fields in which they differ, and how far they came.
    """
    folders = folders or [Path("runs")]
    if len(folders) > 1:
        print_rows(compared(folders), as_json)
        return
    found = [path.parent for path in [folders[0] / "config.json", *sorted(folders[0].glob("*/config.json"))]]
    runs = [run for run in found if (run / "config.json").is_file()]
    if not runs:
        raise FileProblem(f"no training run in {folders[0]}; start one: limner train RECIPE --out {folders[0]}/NAME")
    print_rows([summary(run) for run in runs], as_json)


def compared(runs: list[Path]) -> list[dict[str, Any]]:
    """{"field", and the value of each run} where they are not all the same."""
    columns = [{**flat(config_of(run)), **summary(run)} for run in runs]
    told = ("run", "recipe", "learns")  # which other fields say, too
    fields = [name for name in dict.fromkeys(n for column in columns for n in column) if name not in told]
    return [
        {"field": name, **{str(run): column.get(name, "") for run, column in zip(runs, columns, strict=True)}}
        for name in fields
        if len({json.dumps(column.get(name)) for column in columns}) > 1
    ]


def summary(run: Path) -> dict[str, Any]:
    """What a run is and how far it came; "" where it has not said yet."""
    config, lines = config_of(run), metrics(run)
    last = {name: value for line in lines for name, value in line.items()}
    step = last.get("step", 0)
    losses = [line["loss"] for line in lines if "loss" in line and line["step"] > (1 - LAST) * step]
    written = [path for path in (run / "metrics.jsonl", run / "config.json") if path.exists()]
    name = f"{(config.get('word') or config).get('name')}.safetensors"
    finished = any(file.exists() for file in (run / "final" / name, run / name))  # an adapter lies beside, not within
    return {
        "run": run.name or str(run),
        "recipe": config.get("name", ""),
        "learns": learns(config),
        "data": data_of(run, config),
        "step": f"{step}/{config.get('steps')}",
        "loss_last_tenth": float(f"{sum(losses) / len(losses):.6g}") if losses else "",
        **{name: last.get(name, "") for name in ("validation/loss", "images_per_second")},
        "state": "finished" if finished else "unfinished",
        "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(written[0].stat().st_mtime)),
    }


def learns(config: dict[str, Any]) -> str:
    """What is trained beside which model: "oft for icons", "my-word for sd1", "network for icons"; "" for a system of
    its own."""
    if not config.get("model"):
        return ""
    part: dict[str, Any] = next((config[name] for name in ("adapter", "word", "control") if config.get(name)), {})
    prior = config.get("prior") or {}
    beside = ", distilled" if config.get("distillation") else ", reflowed" if config.get("reflow") else ""
    beside += " beside its class" if prior.get("prompt") is not None or prior.get("folder") else ""
    return f"{part.get('kind') or part.get('name') or 'network'} for {Path(config['model']).name}{beside}"


def config_of(run: Path) -> dict[str, Any]:
    """Raises FileProblem."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FileProblem(f"{run} holds no training run: {path.name} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise FileProblem(f"{path} is no training config")
    return config


def data_of(run: Path, config: dict[str, Any]) -> str:
    """Whose data were learned from, how many, and a mark that is another where they differ, "16 of shapes, 3f2a";
    without number and mark where no checkpoint tells."""
    told = config.get("data") or {}
    source = Path(told.get("folder") or "").name or told.get("source", "")
    saved = sorted(run.glob("checkpoints/step-*[0-9]/state.json"), key=lambda path: (len(str(path)), path))
    try:
        data = json.loads(saved[-1].read_bytes())["data"]
        count = data["data"]["samples"]
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return source
    return f"{count} of {source}, {hashlib.sha256(json.dumps(data).encode()).hexdigest()[:4]}"


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was measured, line by line; lines cut short are passed over."""
    lines = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append({"step": 0, **json.loads(line)})
            except (ValueError, TypeError):
                continue
    return lines


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found
