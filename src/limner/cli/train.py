"""`limner train`: parse, find the recipe or the run, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limner import errors
from limner.errors import UsageError


def train_command(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; `limner recipes` lists them.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Changes, such as steps=2000 lr=3e-4.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="What an adapter is trained for: a name, a file or a folder.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("-d", "--data", help="Folder of pictures with captions; short for its fields.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the new run.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda; with torchrun one a process.")] = "auto",
    stop_after: Annotated[
        float | None, typer.Option("--stop-after", metavar="SECONDS", min=0, help="Save and stop after this time.")
    ] = None,
    data_changed: Annotated[
        bool, typer.Option("--data-changed", help="With --resume: go on although the data are not what they were.")
    ] = False,
) -> None:
    """Train a recipe, or go on with a run.

    The weights end up in RUN/final/NAME.safetensors, an adapter in RUN/NAME.safetensors.
    """
    if resume is not None and (recipe or overrides or out is not None or model is not None or data is not None):
        raise UsageError("--resume takes the run's folder and nothing else: its recipe and fields stay as they were")
    if resume is None and data_changed:
        raise UsageError("--data-changed is for a run that goes on: limner train --resume RUN --data-changed")
    if resume is None and not recipe:
        raise UsageError("no recipe: limner train RECIPE --out RUN, or limner train --resume RUN")
    if resume is None and out is None:
        raise UsageError(f"no folder for the run: limner train {recipe} --out RUN")

    from limner import recipes
    from limner.training.config import parse_overrides
    from limner.training.loop import train
    from limner.training.processes import INTERRUPTED
    from limner.training.state import checkpoints, config_of, final_file

    if resume is not None:
        config, run = config_of(resume), resume
        if final_file(run, config).exists():
            print(f"{run} is finished: {final_file(run, config)}")
            name = config.name if config.name in recipes.names() else "RECIPE"
            for newest in checkpoints(run / "checkpoints")[-1:]:
                weights = newest / f"{'ema' if config.ema_half_life else 'model'}.safetensors"
                begin = f"limner train {name} --out NEW init_from={weights}"
                print(f"to learn more, begin a run with its weights: {begin} steps=N, and what else it was told")
            return
    else:
        assert out is not None
        given = [f"model={model}"] * (model is not None)
        given += ["data.source=folder", f"data.folder={data}"] if data is not None else []
        config, run = parse_overrides(recipes.get(recipe), [*given, *(overrides or [])]), out
    on = resume is not None
    if train(config, run, resume=on, device=device, stop_after=stop_after, data_changed=data_changed) == INTERRUPTED:
        raise SystemExit(errors.INTERRUPTED)  # which the run has told
