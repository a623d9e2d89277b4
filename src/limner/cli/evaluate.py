"""`limner evaluate`: measure a model on the held-out prompts, and write the figures of its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limner.errors import FileProblem


def evaluate_command(
    model: Annotated[str, typer.Argument(help="A model's name (`limner models`) or its weights file.")] = "icons",
    data: Annotated[Path | None, typer.Option("--data", help="Folder of the icon pack (`limner data icons`).")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for evaluation.json, evaluation.md and grid.png.")] = Path(
        "evaluation"
    ),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")] = "auto",
    limit: Annotated[int | None, typer.Option("--limit", min=32, help="Only this many prompts, spread evenly.")] = None,
    batch: Annotated[int, typer.Option("-b", "--batch", min=1, help="Pictures drawn at a time.")] = 64,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps. [default: the model's]")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="How closely to follow the prompt.")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="Solver, such as euler or dpmpp_2m.")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="How noise falls, such as uniform.")] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder that keeps drawn icons and features.")] = None,
    speed: Annotated[bool, typer.Option(help="Time `limner generate` on 2 CPU cores, in fresh processes.")] = True,
    copying: Annotated[bool, typer.Option(help="Compare with every training picture (slow without a GPU).")] = True,
    prepare_judge: Annotated[
        bool,
        typer.Option("--prepare-judge", help="Train the judge and measure real pictures instead; no model needed."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, not the table.")] = False,
) -> None:
    """Measure a model beside real pictures.

    Prompt and style accuracy, KID, copying, the autoencoder, speed.
    """
    import json

    from limner import evaluation, pipeline
    from limner.data.icons import open_icons

    for folder in (out, cache):
        if folder and folder.is_file():
            raise FileProblem(f"{folder} is a file: give a folder")
    where = pipeline.find_device(device)
    pack = open_icons(data)
    if prepare_judge:
        report = evaluation.prepare_judge(pack, out, where, cache=cache)
        print(json.dumps(report, indent=2) if as_json else evaluation.judge_table(report))
        return
    asked = {"steps": steps, "guidance": guidance, "sampler": sampler, "schedule": schedule}
    settings = {name: value for name, value in asked.items() if value is not None}
    report = evaluation.evaluate(
        model, pack, out, where, limit=limit, batch=batch, cache=cache, speed=speed, copying=copying, **settings
    )
    print(json.dumps(report, indent=2) if as_json else evaluation.table(report))
