"""`limner inspect FILE`: what a model file or folder is, from its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect_command(
    file: Annotated[Path, typer.Argument(help="A model file, a folder, or a model's name.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model file is.

    Its family, precision and parts, what it draws with, and what could not be known.
    """
    from limner import exchange

    told = exchange.inspect(file)
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for key, value in told.items():
        values = [f"{k} {v:,}" for k, v in value.items()] if isinstance(value, dict) else value
        text = ", ".join(values) if isinstance(values, list) else f"{value:,}" if key == "bytes" else value
        if text not in ("", False):
            print(f"{key:11} {text}")
