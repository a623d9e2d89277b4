"""`limner edit`: paint over a picture in its own size, under a mask, or beyond its edges."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli.generate import as_paint, paint

SHARED = (
    "output", "model", "negative", "steps", "guidance", "seed", "sampler", "schedule", "batch", "dialect", "clip_skip",
    "compat", "noise_delta", "wildcards", "strength", "mask", "mask_blur", "only_masked", "padding", "depth",
    "image_guidance", "invert", "variation", "variation_seed", "variation_image", "guidance_kind", "guidance_rescale",
    "guidance_mimic", "guidance_interval", "eta", "churn", "pag_scale", "pag_layers", "lora", "embedding", "control",
    "ip_adapter", "image_encoder", "adapter_folder", "tile", "vae_tile", "dtype", "refiner", "switch_at", "guide_model",
    "classifier", "classifier_scale", "offload", "compile", "vae", "text_encoder", "clip_l", "clip_g", "t5", "strict",
    "prediction", "device", "preview", "as_json", "dry_run",
)  # fmt: skip
OWN: dict[str, tuple[Any, Any]] = {
    "image": (Annotated[Path, typer.Argument(help="The picture: PNG, JPEG or WebP.")], inspect.Parameter.empty),
    "prompt": (Annotated[str, typer.Argument(help="What to paint.")], inspect.Parameter.empty),
    "width": (
        Annotated[
            int | None,
            typer.Option("-W", "--width", help="To draw at. [default: the picture's; with --only-masked the model's]"),
        ],
        None,
    ),
    "height": (Annotated[int | None, typer.Option("-H", "--height", help="As the width.")], None),
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
    painted is kept, bit for bit. --only-masked looks closely: what is around the mask is drawn at the model's size, and
    put back into a picture of any. A model that edits (InstructPix2Pix) does to IMAGE what PROMPT says.

    What no option says, the model's defaults do; those below are of icons.
    """
    paint(**options, keep_size=True)


as_paint(edit_command, OWN, SHARED)
