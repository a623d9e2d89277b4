"""`limner upscale`: a picture, larger."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli.edit import SHARED
from limner.cli.generate import as_paint, paint

NOT = {"mask", "mask_blur", "only_masked", "padding", "variation", "variation_seed", "variation_image", "invert"}
OWN: dict[str, tuple[Any, Any]] = {
    "image": (Annotated[Path, typer.Argument(help="The picture: PNG, JPEG or WebP.")], inspect.Parameter.empty),
    "prompt": (
        Annotated[str, typer.Argument(help="What it shows; only upscalers do without.", show_default=False)],
        "",
    ),
    "factor": (
        Annotated[
            float | None, typer.Option("--factor", help="How many times larger; an upscaler's is 4. [default: 2]")
        ],
        None,
    ),
    "noise_level": (
        Annotated[
            int | None,
            typer.Option("--noise-level", help="An upscaler's: noise put over the picture first. [default: 20]"),
        ],
        None,
    ),
}


def upscale_command(**options: Any) -> None:
    """Make IMAGE larger and print the path of the PNG.

    With Stable Diffusion's x4 upscaler (-m FILE) four times; other models paint PROMPT over the enlarged picture, with
    --strength 0.5 where no other is said.
    """
    paint(**options, enlarge=True)


as_paint(upscale_command, OWN, [name for name in SHARED if name not in NOT])
