"""PROMPT -> PIXELS, in five numbered steps: read `draw` first."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limner import __version__, catalog, names
from limner.adapters import attaching
from limner.errors import FileProblem, Ignored, ImageProblem, LimnerError, UnknownName, UsageError
from limner.sampling import samplers, schedules
from limner.types import Defaults, GeneratedImage, OnStep, Request, System

MAX_SEED = 2**63 - 1
MAX_PIXELS = 64_000_000
CHUNK = 8
"""Pictures drawn at once; a larger batch goes in turns, so memory does not grow with it."""


class Pipeline:
    """A loaded system that draws: `limner.load("icons").generate("a red fox")`."""

    def __init__(self, system: System, model: str) -> None:
        self.system, self.model = system, model

    def generate(
        self, prompt: str, *, lora: Sequence[Any] = (), embedding: Sequence[Any] = (), **values: Any
    ) -> list[GeneratedImage]:
        """Draw `prompt`; see `limner.pipeline.generate` for the keywords. `lora` and `embedding` are adapters for this
        time only: files, or (file, weight)."""
        if not lora and not embedding:
            return generate(self.system, prompt, **values)
        before = list(attaching.stack(self.system).on)
        try:
            for one in (*lora, *embedding):
                self.attach(*one) if isinstance(one, tuple | list) else self.attach(one)
            return generate(self.system, prompt, **values)
        finally:
            attaching.stack(self.system).restore(before)

    def attach(
        self, file: str | Path, weight: float = 1.0, blocks: Mapping[str, float] | None = None
    ) -> attaching.Report:
        """Add a LoRA or another adapter to the model, by `weight` (-100 to 100); `blocks` are factors of blocks, such
        as {"mid_block": 0.5}. Returns what it does to the model; warns (Ignored) of what of it will not show.

        Raises FileProblem, CheckpointMismatch for an adapter of another model, UsageError.
        """
        report = attaching.stack(self.system).attach(file, weight, blocks)
        for sentence in report.ignored(weight):
            warnings.warn(sentence, Ignored, stacklevel=2)
        return report

    def detach(self, name: str | None = None) -> None:
        """Take off the adapter of this name (that of its file), or all: the model is what it was, bit for bit."""
        attaching.stack(self.system).detach(name)


def load(source: str | Path = "icons", device: str = "auto", prediction: Literal["eps", "v"] | None = None) -> Pipeline:
    """A pipeline by model name, weight file of ours or of Stable Diffusion, folder of a run or of diffusers. `device`
    "auto" takes a CUDA device when there is one; `prediction` is for files that do not say what they predict.

    Raises UsageError for a device that is not here, UnknownName, FileProblem, CheckpointMismatch; warns (Assumed) of
    what a file did not tell.
    """
    if prediction not in (None, "eps", "v"):
        raise UnknownName("prediction", str(prediction), ("eps", "v"))
    return Pipeline(catalog.load(source, find_device(device), prediction), str(source))  # type: ignore[arg-type]


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this name, proved to hold data; "auto" takes a CUDA device when there is one. Raises UsageError."""
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # meta holds no data to draw with
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise UsageError(f"no device {name!r} here: give auto or one of {', '.join(here)}") from error
    return torch.device(name)


def generate(system: System, prompt: str, **values: Any) -> list[GeneratedImage]:
    """Pictures of `prompt`, one for each seed from `seed` on.

    Keywords, all optional: negative (str), seed (int; random without), batch, width and height in pixels, steps,
    guidance, sampler, schedule, image (path, Pillow image) with strength in (0, 1], on_step(done, total). What is left
    out is the model's default. Raises UsageError, UnknownName, ImageProblem; warns (Ignored) of what will not show.
    """
    request = prepare(system, prompt=prompt, **values)
    for sentence in ignored(system, request):
        warnings.warn(sentence, Ignored, stacklevel=3)
    seeds = [request.seed + i for i in range(request.batch)]
    images = draw(system, [request.prompt] * request.batch, seeds, request)
    settings = describe(system, request)
    return [GeneratedImage(to_pil(x), s, {**settings, "seed": s}) for x, s in zip(images, seeds, strict=True)]


@torch.inference_mode()
def draw(system: System, prompts: list[str], seeds: list[int], request: Request, chunk: int = CHUNK) -> Tensor:
    """Images (n, c, h, w) in [-1, 1] on the CPU for n prompts and seeds; `request` says everything else."""
    device = next(system.parameters()).device  # type: ignore[attr-defined]
    turns = range(0, len(prompts), chunk)
    images = []
    for turn, begin in enumerate(turns):
        words, some = prompts[begin : begin + chunk], seeds[begin : begin + chunk]
        # 1. one noise source a picture, so that a picture does not depend on its neighbours
        noise = noise_source(some, device)
        # 2. the words
        cond = system.condition(words, request)
        # 3. from noise, or from the latents of the picture given, to latents
        begun: dict[str, Any] = {}
        if request.image is not None:
            picture = to_tensor(request.image, request.width, request.height).to(device)
            begun["start"] = system.encode(picture).expand(len(words), -1, -1, -1)  # type: ignore[attr-defined]
        told = replace(request, on_step=_overall(request.on_step, turn, len(turns)))
        latents = system.sample(cond, told, noise, **begun)
        # 4. latents to pixels
        images.append(whole(system.decode(latents).clamp(-1, 1).float().cpu(), system.name))
    # 5. settings are attached by `generate`
    return torch.cat(images)


def whole(images: Tensor, name: str) -> Tensor:
    """`images`, if every number in them is one. Raises FileProblem."""
    if not images.isfinite().all():
        raise FileProblem(f"{name} draws what is no picture (NaN): its weights are damaged, or its training diverged")
    return images


def noise_source(seeds: list[int], device: torch.device | str) -> Callable[[tuple[int, ...]], Tensor]:
    """Standard normal noise of a shape for each seed, from a CPU generator of its own in float32: a picture's noise
    depends on its seed alone, not on batch, device or precision."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return lambda shape: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# -------------------------------------------------------------------- requests


def prepare(system: System, **values: Any) -> Request:
    """A complete request from what was said and the model's defaults. Raises UsageError, UnknownName, ImageProblem."""
    request = check(system.defaults, system.grid, **values)
    system.check(request)
    return request


def check(
    defaults: Defaults,
    grid: int,
    *,
    prompt: str,
    negative: str | None = None,
    seed: int | None = None,
    batch: int | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    image: str | Path | Image.Image | None = None,
    strength: float | None = None,
    on_step: OnStep | None = None,
) -> Request:
    """As `prepare`, knowing only the model's defaults and grid, so that nothing need be loaded to check a request."""
    for name, text in (("prompt", prompt), ("negative prompt", negative or "")):
        if not isinstance(text, str):
            raise UsageError(f"the {name} is {type(text).__name__}, not text")
        if len(text) > defaults.max_prompt_chars:
            raise UsageError(
                f"the {name} has {len(text)} characters; at most {defaults.max_prompt_chars} are read: shorten it"
            )
    if not prompt.strip() and image is None:
        raise UsageError("the prompt is empty: say what to draw")
    if strength is not None and image is None:
        raise UsageError("strength means how far to move from a picture, but no picture was given: add -i IMAGE")
    if image is not None:
        image = open_image(image)
        strength = _number("strength", defaults.strength if strength is None else strength, 0, 1, above=True)
    sizes = [
        _size(name, default if value is None else value, defaults, grid)
        for name, value, default in (("width", width, defaults.width), ("height", height, defaults.height))
    ]
    sampler, fused = names.split(defaults.sampler if sampler is None else sampler)
    sampler = samplers.find(sampler)
    schedule = next(said for said in (schedule, fused, defaults.schedule) if said is not None)
    schedule = schedules.settle(schedule, sampler)
    return Request(
        prompt=prompt,
        negative=negative or "",
        seed=_whole("seed", secrets.randbelow(2**32) if seed is None else seed, 0, MAX_SEED - 100_000),
        batch=_whole("batch", 1 if batch is None else batch, 1, 1024),
        width=sizes[0],
        height=sizes[1],
        steps=_whole("steps", defaults.steps if steps is None else steps, 1, 1000),
        guidance=_number("guidance", defaults.guidance if guidance is None else guidance, 0, 100),
        sampler=sampler,
        schedule=schedule,
        image=image,
        strength=strength,
        on_step=on_step,
    )


def ignored(system: System, request: Request) -> list[str]:
    """A sentence for each thing asked for that will not show in the picture."""
    told = []
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative)):
        if (end := system.words_cut(text)).strip():
            told.append(
                f"the {name} is longer than the model reads: {_brief(end)} is left out; "
                "shorten it, or say first what matters most"
            )
        if words := system.words_unknown(text):
            told.append(f"the model does not know {_brief(words)} of the {name}: say it in English words")
    if adapters := getattr(system, "adapters", None):
        told += adapters.unused(request.prompt, request.negative)
    if request.negative.strip() and request.guidance == 1:
        told.append("the negative prompt has no effect at guidance 1: ask for more guidance")
    if request.image is not None:
        across, down = request.image.width * request.height, request.image.height * request.width
        side, cut = ("width", 1 - down / across) if across > down else ("height", 1 - across / down)
        if cut >= 0.005:
            told.append(
                f"{cut:.0%} of the picture's {side} is cut off, equally at both ends, to make its "
                f"{request.image.width} x {request.image.height} pixels {request.width} x {request.height}: "
                "ask for a width and height of its shape"
            )
    if system.task == "autoencoding":
        names = ("steps", "guidance", "sampler", "schedule", "strength")
        vain = [name for name in names if getattr(request, name) != getattr(system.defaults, name)]
        told += [f"an autoencoder only gives the picture back, whatever {' and '.join(vain)} may be"] if vain else []
    return told


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:56] + " ...")


def describe(system: System, request: Request) -> dict[str, Any]:
    """The settings a picture remembers: enough to draw it again, nothing about who, where or when."""
    kept = ("prompt", "negative", "width", "height", "steps", "guidance", "sampler", "schedule")
    settings: dict[str, Any] = {"limner": __version__, "model": system.name}
    settings |= {name: getattr(request, name) for name in kept}
    if system.model_hash:
        settings["model_hash"] = system.model_hash
    if request.image is not None:
        settings["strength"] = request.strength
    if adapters := getattr(system, "adapters", None):
        settings |= {"adapters": adapters.settings()} if adapters.on else {}
    return settings


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}: give a whole number from {low} to {high}")
    return value


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> float:
    fits = (
        isinstance(value, int | float)
        and math.isfinite(value)
        and (low < value if above else low <= value)
        and value <= high
    )
    if not fits or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: give a number {'above' if above else 'from'} {low}, at most {high}")
    return float(value)


def _size(name: str, value: Any, defaults: Defaults, grid: int) -> int:
    low, high = defaults.min_size, defaults.max_size
    if isinstance(value, int) and low <= value <= high and value % grid:
        below = value // grid * grid
        near = " or ".join(str(n) for n in (below, below + grid) if low <= n <= high)
        raise UsageError(f"{name} is {value}, not a multiple of {grid} pixels: take {near}")
    return _whole(name, value, low, high)


# -------------------------------------------------------------------- pictures


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """A PNG, JPEG or WebP file, or a Pillow image, as RGBA. Raises ImageProblem."""
    if isinstance(source, Image.Image):
        return source.convert("RGBA")
    path = Path(source)
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ImageProblem(f"{path} has {file.width} x {file.height} pixels, more than 64 million: shrink it")
            return file.convert("RGBA")
    except LimnerError:
        raise
    except FileNotFoundError as error:
        raise ImageProblem(f"no picture {path}: give the path of a PNG, JPEG or WebP file") from error
    except IsADirectoryError as error:
        raise ImageProblem(f"{path} is a folder: give the path of one PNG, JPEG or WebP file in it") from error
    except Exception as error:  # Pillow's plugins raise many kinds
        raise ImageProblem(f"{path} cannot be read as a PNG, JPEG or WebP picture: is it whole?") from error


def to_tensor(image: Image.Image, width: int, height: int) -> Tensor:
    """Premultiplied (1, 4, height, width) in [-1, 1]: the picture scaled to cover the size, cropped to its middle."""
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.convert("RGBa").resize(
        size, Image.Resampling.LANCZOS
    )  # RGBa: premultiplied, so edges keep their colour
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in [-1, 1] -> RGB; (4, h, w) premultiplied -> straight RGBA, where alpha under 3/255 becomes 0."""
    pixels = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
    if len(image) == 3:
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    alpha = pixels[..., 3:]
    colour = np.where(alpha > 0, pixels[..., :3] * 255 / np.maximum(alpha, 1), 0)
    alpha = np.where(alpha < 2.5, 0, alpha)
    colour = np.where(alpha == 0, 0, colour)
    rgba = np.concatenate([colour, alpha], -1).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgba)


def _overall(on_step: OnStep | None, turn: int, turns: int) -> OnStep | None:
    """Progress over all turns of a large batch."""
    if on_step is None:
        return None
    return lambda done, total: on_step(turn * total + done, turns * total)
