"""`limner data icons`: make the icon set out of public packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from limner.errors import UnknownName


def data_command(
    name: Annotated[str, typer.Argument(help="What to make: icons.", metavar="NAME")],
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder for it (default: where training looks for it).")
    ] = None,
    without_clipart: Annotated[
        bool, typer.Option("--without-clipart", help="Leave out the 2,080 pictures that need apt-get.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw; 0: one a core.")] = 0,
) -> None:
    """Make the icon set from public packages.

    They come from npm, clip art by apt-get. Prints the folder of the set.
    """
    if name != "icons":
        raise UnknownName("data set to make", name, ["icons"])
    from limner.data.icons import default_folders
    from limner.data.rebuild import rebuild_icons

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    print(rebuild_icons(out or default_folders()[-1], clipart=not without_clipart, workers=workers or None, say=say))
