"""`limner models` and `limner recipes`: what there is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON array of objects.")]


def models_command(as_json: AsJson = False) -> None:
    """List the models; weights are bundled, or needed from you."""
    from limner import catalog

    columns = ("name", "family", "task", "weights", "summary")
    rows = [{c: getattr(entry, c) for c in columns} for entry in catalog.entries()]
    for name, (model, summary) in catalog.CONTROLS.items():
        values = (name, f"ControlNet of {model}", "control", "bundled", summary)
        rows.append(dict(zip(columns, values, strict=True)))
    print_rows(rows, as_json)


def recipes_command(
    name: Annotated[str, typer.Argument(help="List the fields of this recipe.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """List the training recipes, or the fields of one."""
    from limner import catalog, recipes

    if name:
        from limner.training.config import described

        fields = described(recipes.get(name))
        shown = [f | {"value": shortened(json.dumps(f["value"], ensure_ascii=False))} for f in fields]
        print_rows(fields if as_json else shown, as_json)
        return
    tasks = {entry.config.kind: entry.task for entry in catalog.entries()}
    configs = {name: recipes.get(name) for name in recipes.names()}
    rows = [
        {
            "name": name,
            "family": c.system.family if c.system else goes_with(c),
            "task": tasks[c.system.kind] if c.system else leaves(c),
            "steps": c.steps,
            "images": c.batch_size,
        }
        for name, c in configs.items()
    ]
    print_rows(rows, as_json)


def leaves(config: Any) -> str:
    """What is left by a recipe for a model that is there."""
    return "adapter" if config.adapter or config.word or config.control else "text-to-image"


def goes_with(config: Any) -> str:
    """Whose models a recipe for a model that is there is for."""
    if config.word or (config.control and config.control.kind == "t2i_adapter"):
        return "Stable Diffusion 1, 2, XL"
    if config.reflow:
        return "a flow, such as a run of flow-matching"
    return "Stable Diffusion, FLUX.1, icons" if config.control else f"any, such as {config.model}"


def shortened(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """As a table, or as a JSON array."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in [{c: c.upper() for c in rows[0]}, *rows] if rows else []:
        widths = [max(len(c), *(len(str(r[c])) for r in rows)) for c in row]
        print("  ".join(str(v).ljust(w) for v, w in zip(row.values(), widths, strict=True)).rstrip())
