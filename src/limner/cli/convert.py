"""`limner convert SOURCE TARGET`: a single file of a folder of diffusers, or a folder of a single file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def convert_command(
    source: Annotated[
        Path, typer.Argument(help="A Stable Diffusion 1, 2 or XL: a single file or a folder.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(help="NAME.safetensors, or the name of a new folder.", show_default=False)],
) -> None:
    """Write a model in the other layout.

    TARGET is a single file in the names of the original programs, or a folder in those of diffusers.
    """
    from limner import exchange

    path, beside = exchange.convert(source, target)
    for name, count in beside.items():
        print(f"limner: left out, as nothing needs it: {name} ({count} tensors)", file=sys.stderr)
    print(path)
