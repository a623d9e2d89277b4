"""`limner runs`: the training runs of a folder, or what differs between some."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli.models import AsJson, print_rows
from limner.errors import FileProblem

METRICS = ("loss", "validation/loss", "images_per_second")


def runs_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="A folder of runs (`runs` if none is named), or runs to compare.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List training runs, or compare several.

    Of those that are compared: the fields in which they differ, and how far they came.
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
    config, last = config_of(run), metrics(run)
    written = [path for path in (run / "metrics.jsonl", run / "config.json") if path.exists()]
    name = f"{(config.get('word') or config).get('name')}.safetensors"
    finished = any(file.exists() for file in (run / "final" / name, run / name))  # an adapter lies beside, not within
    return {
        "run": run.name or str(run),
        "recipe": config.get("name", ""),
        "learns": learns(config),
        "step": f"{last.get('step', 0)}/{config.get('steps')}",
        **{name: last.get(name, "") for name in METRICS},
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
    beside = ", distilled" if config.get("distillation") else ""
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


def metrics(run: Path) -> dict[str, Any]:
    """The last value of everything that was measured; lines cut short are passed over."""
    last: dict[str, Any] = {}
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                last.update(json.loads(line))
            except (ValueError, TypeError):
                continue
    return last


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found
