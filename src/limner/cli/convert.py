"""`limner convert SOURCE TARGET`: a single file of a folder of diffusers, a folder of a single file, or an adapter in
another program's names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from limner.errors import UsageError


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A Stable Diffusion 1, 2 or XL, a single file or a folder, a file of DDPM or ADM, or an adapter.",
            show_default=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(help="NAME.safetensors, or the name of a new folder.", show_default=False)],
    to: Annotated[
        str | None, typer.Option("--to", metavar="SPELLING", help="Of an adapter: kohya, diffusers or comfyui.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="What the adapter is for, if its names do not tell.")
    ] = None,
) -> None:
    """Write a model in another layout, or an adapter in other names.

    TARGET is a single file in the names of the original programs, or a folder in those of diffusers; of an adapter, a
    file.
    """
    from limner import exchange

    if to is not None:
        print(exchange.respell(source, target, to, model))
        return
    if model is not None:
        raise UsageError("-m is what an adapter is for: give --to kohya, diffusers or comfyui, too")
    path, beside = exchange.convert(source, target)
    for name, count in beside.items():
        print(f"limner: left out, as nothing needs it: {name} ({count} tensors)", file=sys.stderr)
    print(path)
