"""`limner edit`: paint over a picture in its own size, under a mask, or beyond its edges."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli.generate import as_paint, paint

SHARED = (
    "output", "model", "negative", "steps", "guidance", "seed", "sampler", "schedule", "batch", "dialect", "clip_skip",
    "compat", "noise_delta", "wildcards", "strength", "mask", "mask_blur", "variation", "variation_seed",
    "guidance_kind", "guidance_rescale", "guidance_mimic", "guidance_interval", "pag_scale", "pag_layers", "lora",
    "embedding", "control", "ip_adapter", "image_encoder", "adapter_folder", "dtype", "refiner", "switch_at",
    "guide_model", "vae", "text_encoder", "strict", "prediction", "device", "preview", "as_json", "dry_run",
)  # fmt: skip
OWN: dict[str, tuple[Any, Any]] = {
    "image": (Annotated[Path, typer.Argument(help="The picture: PNG, JPEG or WebP.")], inspect.Parameter.empty),
    "prompt": (Annotated[str, typer.Argument(help="What to paint.")], inspect.Parameter.empty),
    "expand": (
        Annotated[
            tuple[int, int, int, int] | None,
            typer.Option(help="Pixels to add at the left, top, right and bottom, and to paint.", metavar="L T R B"),
        ],
        None,
    ),
}


def edit_command(**options: Any) -> None:
    """Paint PROMPT over IMAGE in its own size.

    Prints the path of the PNG. With --mask only where that is white; with --expand beyond its edges. What is not
    painted is kept, bit for bit.
    """
    paint(**options, keep_size=True)


as_paint(edit_command, OWN, SHARED)
