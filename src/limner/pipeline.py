"""PROMPT -> PIXELS, in five numbered steps: read `draw` first."""

from __future__ import annotations

import contextlib
import inspect
import math
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from limner import __version__, catalog, memory, names, pictures
from limner.adapters import asking, attaching, makers, references
from limner.adapters import control as controls
from limner.errors import Assumed, FileProblem, Ignored, UnknownName, UsageError
from limner.models import tiling
from limner.sampling import compat as programs
from limner.sampling import odes, samplers, schedules
from limner.sampling.guidance import WAYS
from limner.sampling.interpolants import EDM, Interpolant
from limner.systems.diffusion import DiffusionSystem
from limner.systems.nonequilibrium import NonequilibriumSystem
from limner.text.prompts import AND, DIALECTS, SYNTAX, Wildcards, expand
from limner.types import Control, Defaults, GeneratedImage, Latents, OnStep, Reference, Request, System

MAX_SEED = 2**63 - 1
MASK_BLUR = 4.0
PADDING = 32
SWITCH_AT = 0.8
INVERTED_STEPS = 50
"""At least, if nobody says: inversion is right to first order."""
NOISE_LEVEL = 20
FACTOR, UPSCALE_STRENGTH = 2.0, 0.5
MOST_SEEN = 2
"""Pictures are enlarged whole up to so many times the side that the model was made for, and else in tiles of it."""
MOST_ADDED = 4096
CHUNK = 8
"""Pictures drawn at once; a larger batch goes in turns, so memory does not grow with it."""


SELDOM: dict[str, Any] = {
    "guidance_kind": "cfg", "guidance_rescale": 0.0, "guidance_mimic": 0.0, "guidance_interval": None,
    "image_guidance": 1.0, "variation": 0.0, "invert": None,
    "eta": None, "churn": 0.0, "pag_scale": 0.0, "pag_layers": ("mid_block",),
    "compat": "", "noise_delta": 0, "place": 0, "only_masked": False, "tile": 0, "vae_tile": None,
}  # fmt: skip
"""What a picture remembers only where it was asked for, and what is said by leaving it out."""


class Pipeline:
    """A loaded system that draws: `limner.load("icons").generate("a red fox")`."""

    def __init__(self, system: System, model: str) -> None:
        self.system, self.model = system, model

    def generate(
        self,
        prompt: str,
        *,
        lora: Sequence[Any] = (),
        embedding: Sequence[Any] = (),
        adapter_folder: str | Path | None = None,
        **values: Any,
    ) -> list[GeneratedImage]:
        encoder = values.pop("image_encoder", None)
        if values.get("ip_adapter"):
            values["ip_adapter"] = references.opened(self.system, values["ip_adapter"], encoder)
        elif encoder is not None:
            raise UsageError(
                "image_encoder is what an IP-Adapter or Redux sees with, and none was given: give ip_adapter"
            )
        one_file = [[given] if isinstance(given, str | Path) else list(given) for given in (lora, embedding)]
        asked = [*one_file[0], *one_file[1]]
        tags: list[Any] = []
        if isinstance(prompt, str):
            against = values.get("negative")
            prompt, tags = asking.in_prompt(
                prompt, (Path(adapter_folder or ""),), against if isinstance(against, str) else ""
            )
        if not hasattr(self.system, "adapters") and not asked:
            return generate(self.system, prompt, **values)
        adapters = attaching.stack(self.system)
        with adapters.lock:  # else another thread's come off while these are drawn with
            before = list(adapters.on)
            known = {one.adapter.name for one in before}
            try:
                for one in asked:
                    self.attach(*one) if isinstance(one, tuple | list) else self.attach(one)
                for tag in tags:
                    if tag.weight is not None or tag.name not in known:
                        self.attach(tag.path, 1.0 if tag.weight is None else tag.weight, tag.blocks)
                return generate(self.system, prompt, **values)
            finally:
                if adapters.on != before:
                    adapters.restore(before)

    def edit(
        self,
        image: str | Path | Image.Image,
        prompt: str,
        *,
        expand: tuple[int, int, int, int] | None = None,
        **values: Any,
    ) -> list[GeneratedImage]:
        """Paint over a picture in its own size, to the nearest that the model draws: `generate` with `image`. `expand`
        adds pixels to the left, top, right and bottom, which are painted, and keeps the rest. With `only_masked` a
        picture of any size keeps it, and what is around the mask is drawn at the model's."""
        picture, mask = canvas(image, expand, values.pop("mask", None))
        size = {} if values.get("only_masked") else size_of(self.system, picture)
        return self.generate(prompt, image=picture, mask=mask, **{**size, **values})

    def upscale(
        self, image: str | Path | Image.Image, prompt: str = "", *, factor: float | None = None, **values: Any
    ) -> list[GeneratedImage]:
        """Enlarge a picture: an upscaler always by its own factor, 4; other models by `factor`, 2 without, painting
        what `prompt` says over it with a `strength` of 0.5. What is more than twice as large as the model's own size is
        drawn in tiles of that, if `tile` says nothing else. Keywords are those of `generate`."""
        told = enlarging(self.system, pictures.open_image(image), factor)
        return self.generate(prompt, image=image, **{**told, **values})

    def attach(
        self, file: str | Path, weight: float = 1.0, blocks: Mapping[str, float] | None = None
    ) -> attaching.Report:
        """Add a LoRA or another adapter to the model, by `weight` (-100 to 100); `blocks` are factors of blocks, such
        as {"mid_block": 0.5}. Returns what it does to the model; warns (Ignored) of what of it will not show, and
        (Assumed) of what its file does not tell.

        Raises FileProblem, CheckpointMismatch for an adapter of another model, UsageError.
        """
        adapters = attaching.stack(self.system)
        with adapters.lock:
            report = adapters.attach(file, weight, blocks)
        for sentence in report.ignored(weight):
            warnings.warn(sentence, Ignored, stacklevel=2)
        for sentence in report.assumed:
            warnings.warn(sentence, Assumed, stacklevel=2)
        return report

    def detach(self, name: str | None = None) -> None:
        """Take off the adapter of this name (that of its file), or all: the model is what it was, bit for bit."""
        adapters = attaching.stack(self.system)
        with adapters.lock:
            adapters.detach(name)


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def load(
    source: str | Path = "icons",
    device: str = "auto",
    prediction: Literal["eps", "v", "x0"] | None = None,
    dtype: Literal["auto", "fp32", "fp16", "bf16", "fp8"] = "auto",
    vae: str | Path | None = None,
    refiner: str | Path | None = None,
    guide_model: str | Path | None = None,
    classifier: str | Path | None = None,
    text_encoder: str | Path | Sequence[str | Path] = (),
    offload: Literal["auto", "never", "always"] = "auto",
    compile: bool = False,
) -> Pipeline:
    """A pipeline by model name, weight file of ours or of Stable Diffusion, folder of a run or of diffusers. `device`
    "auto" takes a CUDA device when there is one; `prediction` is for files that do not say what they predict; `dtype`
    is what the network computes in, by default what is fastest on the device without harm; with "fp8" matrices of
    transformers and of T5 are kept in 8 bits, half the memory, and expanded when they are multiplied; `vae` is
    a file or folder with another autoencoder, `refiner` a model that does the last steps, `guide_model` a weaker one
    that guidance leads away from in place of the negative prompt (autoguidance), `classifier` one of noisy pictures
    that leads models of pixels to the class of the prompt, `text_encoder` one or several files with other text towers,
    in any order. A file with a network alone needs `vae` and `text_encoder`, such as
    `load("flux1-dev.safetensors", vae="ae.safetensors", text_encoder=["clip_l.safetensors", "t5xxl.safetensors"])`.
    `offload` says whether the parts of a model take turns on a GPU and rest on the CPU: "auto" if it cannot hold them
    and what a drawing makes. `compile` has torch compile the network's layers when it first draws, which takes seconds
    and a C++ compiler, or on GPUs Triton: for many pictures of one size.

    Raises UsageError for a device that is not here, UnknownName, FileProblem, CheckpointMismatch; warns (Assumed) of
    what a file did not tell.
    """
    if not isinstance(source, str | Path):
        raise UsageError(f"the model is {type(source).__name__}, not a name or a path: try limner.load('icons')")
    if prediction not in (None, "eps", "v", "x0"):
        raise UnknownName("prediction", str(prediction), ("eps", "v", "x0"))
    if dtype not in (known := ("auto", *DTYPES)):
        raise UnknownName("dtype", str(dtype), known)
    told = DTYPES.get(dtype)
    if offload not in ("auto", "never", "always"):
        raise UnknownName("offload", str(offload), ("auto", "never", "always"))
    texts = [text_encoder] if isinstance(text_encoder, str | Path) else list(text_encoder)
    system = catalog.load(source, find_device(device), prediction, told, vae, texts, offload)
    if refiner is not None:
        catalog.put_refiner(system, refiner, find_device(device), told)
    if guide_model is not None:
        catalog.put_guide(system, guide_model, find_device(device), told)
    if classifier is not None:
        catalog.put_classifier(system, classifier, find_device(device))
    if isinstance(system, DiffusionSystem):
        system.stays = offload == "never"
        if system.works_on is not None:
            system.offload()  # with what joined it
        if compile:
            system.compile()
    elif compile and isinstance(system, NonequilibriumSystem):
        system.compile()
    elif compile:
        raise UsageError(f"{system.name} has no network to compile: leave compile out")
    return Pipeline(system, str(source))  # type: ignore[arg-type]


def computes(system: System) -> str:
    """Where and in what the network computes, in words: "cpu in fp32", and what most of its weights are kept in where
    that is fewer bits."""
    network: Any = getattr(system, "network", system)
    first = next(network.parameters())
    codes = Counter(code for module in network.modules() if (code := getattr(module, "code", "")))
    kept = f", weights in {codes.most_common(1)[0][0]}" if codes else ""
    return f"{system.device} in {next(name for name, dtype in DTYPES.items() if dtype == first.dtype)}{kept}"


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
    guidance, sampler, schedule, image (path, Pillow image) with strength in (0, 1], mask (as image, white where it is
    painted, while the rest is kept bit for bit) with mask_blur in pixels and only_masked (the part around the mask and
    padding pixels more, 32 without, is drawn at width x height and put back into the picture), depth (as image, white
    near, for models told of it), image_guidance (how closely models that edit keep to image), prompt_dialect
    ("a1111", "comfyui", "plain"), clip_skip from 1, wildcards (folder of .txt files), guidance_kind ("cfg", "apg",
    "cfg_zero"), guidance_rescale 0 to 1, guidance_mimic (a scale), guidance_interval (low, high, of the noise),
    eta (0 to 1 of DDPM's noise in each step, for samplers that add some, and ddim), churn (S_churn of EDM, for euler
    and heun), pag_scale (perturbed attention guidance, beside the other or alone; 3 is usual) with pag_layers (blocks,
    "mid_block" without), classifier_scale (how much a classifier leads, 1 without), variation 0 to 1 towards the noise
    of variation_seed, or a pair of them between which the pictures of a batch lie, invert (what image shows: the noise
    is that from which it comes back, by DDIM inversion; variation is then towards that of the picture variation_image),
    compat ("a1111", "a1111-cpu", "comfyui") to do as these do, with noise_delta and place, switch_at (0 to 1, where a
    refiner takes over), hires (a factor above 1) with hires_strength and hires_steps, on_step(done, total, preview),
    told after each step, where preview() gives small pictures of what is being drawn, made only if it is called; with a
    Pipeline also lora and embedding (files, or (file, weight), for this time only), adapter_folder, where
    `<lora:name:weight>` of the prompt is looked for, control (ControlNets and T2I-Adapters, each what --control takes,
    keywords of `limner.adapters.control.open_control`, or its file, image and weight), ip_adapter (the same of
    IP-Adapters and Redux) and image_encoder. What is left out is the model's default.

    Raises UsageError, UnknownName, FileProblem, ImageProblem; warns (Ignored) of what will not show.
    """
    request = prepare(system, prompt=prompt, **values)
    for sentence in ignored(system, request):
        warnings.warn(sentence, Ignored, stacklevel=3)
    one_seed = request.variation or request.shares or request.compat == "comfyui"
    seeds = [request.seed + (0 if one_seed else i) for i in range(request.batch)]
    chunk = 1 if in_tiles(request) else CHUNK
    images = draw(system, list(request.prompts), seeds, drawn(request), chunk, list(request.negatives))
    return [
        GeneratedImage(finished(x, request), seed, {**describe(system, request, place), "seed": seed})
        for place, (x, seed) in enumerate(zip(images, seeds, strict=True))
    ]


def canvas(
    image: str | Path | Image.Image, expand: tuple[int, int, int, int] | None, mask: str | Path | Image.Image | None
) -> tuple[Image.Image, Image.Image | None]:
    """The picture to edit and the mask, after `expand`. Raises UsageError, ImageProblem."""
    picture = pictures.open_image(image)
    found = None if mask is None else pictures.open_mask(mask, picture)
    if expand is None:
        return picture, found
    if len(expand) != 4 or not all(isinstance(n, int) and 0 <= n <= MOST_ADDED for n in expand) or not any(expand):
        raise UsageError(
            f"expand is {expand!r}: give pixels for left, top, right and bottom, 0 to {MOST_ADDED}, not all 0"
        )
    return pictures.expanded(picture, expand, found)


def size_of(system: System, picture: Image.Image, times: float | None = None) -> dict[str, int]:
    """The width and height nearest to those of a picture, or so many times them, in its shape, that the system
    draws."""
    low, high, grid = system.defaults.min_size, system.defaults.max_size, getattr(system, "unit", system.grid)
    times = float(getattr(system, "enlarges", 1) if times is None else times)
    scale = min(high / max(picture.size), max(times, low / min(picture.size)))
    sides = (min(max(round(n * scale / grid) * grid, low), high) for n in picture.size)
    return dict(zip(("width", "height"), sides, strict=True))


def enlarging(system: System, picture: Image.Image, factor: float | None) -> dict[str, Any]:
    """What `generate` is asked to enlarge a picture: width and height, and strength. Raises UsageError."""
    own = getattr(system, "enlarges", 1)
    if own > 1 and factor not in (None, own):
        raise UsageError(f"factor is {factor}: {system.name} enlarges by {own}, no more and no less")
    times = own if own > 1 else _number("factor", FACTOR if factor is None else factor, 1, 16, above=True)
    size = size_of(system, picture, times)
    if max(size["width"] / picture.width, size["height"] / picture.height) < 0.9 * times:
        most = system.defaults.max_size
        raise UsageError(
            f"{times:g} times {picture.width} x {picture.height} pixels is more than {system.name} draws, {most} a side"
        )
    tile = MOST_SEEN * max(system.defaults.width, system.defaults.height)
    cut = {"tile": tile} if max(size.values()) > tile else {}
    return {**size, **cut, **({"strength": UPSCALE_STRENGTH} if own == 1 else {})}


def close_up(request: Request) -> tuple[pictures.Box, pictures.Box]:
    """The part of the picture that a request with `only_masked` draws, and where in the drawing it lies."""
    assert request.mask is not None
    return pictures.close_up(request.mask, request.padding, request.width, request.height)


def drawn(request: Request) -> Request:
    """What is drawn for a request: with `only_masked`, the part around its mask. The picture of a control and a
    depth map are laid over the whole picture, and the same part of them is seen."""
    if not request.only_masked:
        return request
    assert request.image is not None
    assert request.mask is not None
    part, place = close_up(request)
    size, whole = (request.width, request.height), request.image.size
    images = [
        request.image,
        request.mask,
        *(pictures.fit(one.image, *whole).convert("RGBA") for one in request.control),
        *([] if request.depth is None else [pictures.fit(request.depth, *whole)]),
    ]
    image, mask, *told = (pictures.cut(one, part, place, *size) for one in images)
    depth = None if request.depth is None else told.pop()
    control = tuple(replace(one, image=seen) for one, seen in zip(request.control, told, strict=True))
    return replace(request, image=image, mask=mask, control=control, depth=depth)


def in_tiles(request: Request) -> bool:
    """Whether the network sees what is drawn in tiles."""
    return 0 < request.tile < max(request.width, request.height) * request.hires


def parts(system: System, request: Request) -> list[str]:
    """A sentence for each thing that is done in parts, or in a part of the picture."""
    told = []
    if request.only_masked:
        (left, top, right, bottom), _ = close_up(request)
        size = f"{right - left} x {bottom - top} pixels from {left}, {top} on"
        told.append(f"draws {size} as {request.width} x {request.height}")
    last = last_pass(system, request)
    width, height = last.width, last.height
    if in_tiles(request):
        told.append(
            f"draws {width} x {height} pixels in {_tiles(width, height, request.tile, system.grid)}: tile 0 is all"
        )
    tile = tiling.tile_of(system.grid, width, height) if request.vae_tile is None else request.vae_tile
    if 0 < tile < max(width, height):
        told.append(
            f"decodes {width} x {height} pixels in {_tiles(width, height, tile, system.grid)}: vae_tile 0 is all"
        )
    return told


def _tiles(width: int, height: int, tile: int, grid: int) -> str:
    side = tile // grid
    return f"{len(tiling.tiles(height // grid, width // grid, side, tiling.overlap_of(side)))} tiles of {tile}"


def finished(image: Tensor, request: Request) -> Image.Image:
    """The picture drawn, with what a mask keeps of the one given."""
    picture = pictures.to_pil(image)
    if request.mask is None:
        return picture
    assert request.image is not None
    if request.only_masked:
        picture = pictures.put(picture, *close_up(request), *request.image.size)
    return pictures.paste(picture, request.image, request.mask, request.mask_blur)


@torch.inference_mode()
def draw(
    system: System,
    prompts: list[str],
    seeds: list[int],
    request: Request,
    chunk: int = CHUNK,
    negatives: list[str] | None = None,
) -> Tensor:
    """Images (n, c, h, w) in [-1, 1] on the CPU for n expanded prompts and seeds, and as many negative prompts, if they
    are not that of `request`, which says everything else."""
    negatives = negatives or [request.negative] * len(prompts)
    turns = range(0, len(prompts), chunk)
    if sentence := memory.settle(system, last_pass(system, request), min(chunk, len(prompts))):
        warnings.warn(f"{system.name}, {sentence}", Assumed, 4)
    images = []
    ups = inverted(system, request, len(turns)) if request.invert is not None else []
    for turn, begin in enumerate(turns):
        some = slice(begin, begin + chunk)
        told = replace(
            request,
            variation_seed=request.variation_seed + (0 if request.shares else begin),
            shares=request.shares[some],
            place=request.place + begin,
            on_step=_overall(request.on_step, len(ups) + turn, len(ups) + len(turns)),
        )
        latents = to_latents(system, prompts[some], negatives[some], seeds[some], told, ups)
        if not latents.isfinite().all() and system.widen():
            name = system.name
            warnings.warn(f"{name} overflows in half precision: its network computes in fp32 from here on", Assumed, 4)
            latents = to_latents(system, prompts[some], negatives[some], seeds[some], told, ups)
        # 4. latents to pixels
        images.append(whole(system.decode(latents, request.vae_tile).clamp(-1, 1).float().cpu(), system.name))
    # 5. settings are attached by `generate`
    return torch.cat(images)


def to_latents(
    system: System, prompts: list[str], negatives: list[str], seeds: list[int], request: Request, ups: list[Latents]
) -> Latents:
    """Latents of pictures that are drawn at once, from noise or what was `inverted`."""
    device = system.device
    # 1. one noise source a picture, so that a picture does not depend on its neighbours
    noise = noise_of(seeds, device, request)
    # 2. the words
    cond = system.condition(prompts, request, negatives)
    # 3. from noise, or from the picture given, to latents
    begun = system.given(request, len(prompts))
    if ups:
        start, *other = (x.expand(len(prompts), -1, -1, -1) for x in ups)
        shares = request.shares or (request.variation,) * len(prompts)
        begun["begun"] = turned(start, other[0], shares) if other else start
    if request.hires == 1:
        return system.sample(cond, request, noise, **begun)
    first = replace(request, on_step=_overall(request.on_step, 0, 2))
    small = system.decode(system.sample(cond, first, noise, **begun), request.vae_tile).clamp(-1, 1)
    # and again over what was drawn, enlarged
    second = larger(system, request, _overall(request.on_step, 1, 2))
    drawn = torch.nn.functional.interpolate(small, (second.height, second.width), mode="bicubic").clamp(-1, 1)
    begun = system.given(second, len(prompts)) | {"start": system.encode(drawn, request.vae_tile)}
    noise = noise_of(seeds, device, request) if request.compat else noise  # which begin anew
    return system.sample(system.condition(prompts, second, negatives), second, noise, **begun)


def inverted(system: System, request: Request, turns: int) -> list[Latents]:
    """Where drawing begins (1, c, h, w) for each picture that `request` has to invert, before so many turns."""
    assert isinstance(system, DiffusionSystem)
    images = [image for image in (request.image, request.variation_image) if image is not None]
    found = []
    for k, image in enumerate(images):
        told = replace(request, image=image, on_step=_overall(request.on_step, k, len(images) + turns))
        x = system.inverted(told)
        found.append(x if x.isfinite().all() or not system.widen() else system.inverted(told))
    return found


def last_pass(system: System, request: Request) -> Request:
    """What is drawn in the end: the second pass of `hires`, or all there is."""
    return request if request.hires == 1 else larger(system, request)


def larger(system: System, request: Request, on_step: OnStep | None = None) -> Request:
    """The second pass of a request: its size times `hires`, to the nearest that the system draws."""
    unit = getattr(system, "unit", system.grid)
    width, height = (round(n * request.hires / unit) * unit for n in (request.width, request.height))
    return replace(
        request, width=width, height=height, steps=request.hires_steps, strength=request.hires_strength,
        on_step=on_step,
    )  # fmt: skip


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


def noise_of(seeds: list[int], device: torch.device | str, request: Request) -> Callable[[tuple[int, ...]], Tensor]:
    """What a request draws for pictures of these seeds."""

    def source(seeds: list[int]) -> Callable[[tuple[int, ...]], Tensor]:
        if not request.compat:
            return noise_source(seeds, device)
        return programs.Source(request.compat, seeds, device, request.noise_delta, request.place)

    if not request.variation or request.invert is not None:
        return source(seeds)
    others = source([request.variation_seed + (0 if request.shares else place) for place in range(len(seeds))])
    shares = request.shares or (request.variation,) * len(seeds)
    return Varied(source(seeds), others, shares, programs.slerp if request.compat else slerp)


class Varied:
    """`noise` whose first draw is turned towards that of `other`, by `shares` of the angle between them (slerp),
    picture by picture: so its variance stays what it was."""

    def __init__(
        self, noise: Any, other: Any, shares: Sequence[float], turn: Callable[[Tensor, Tensor, float], Tensor]
    ) -> None:
        self.noise, self.other, self.shares, self.turn, self.began = noise, other, shares, turn, False

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        eps, began, self.began = self.noise(shape), self.began, True
        return eps if began else turned(eps, self.other(shape), self.shares, self.turn)

    def brownian(self, shape: tuple[int, ...], levels: Sequence[float]) -> programs.Brownian:
        return self.noise.brownian(shape, levels)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a to b along the great circle (Shoemake 1985), each row of (b, ...) by itself."""
    one, two = (x.flatten(1).double() for x in (a, b))
    angle = torch.cosine_similarity(one, two).clamp(-1, 1).acos()
    if (angle < 1e-4).any():  # the same noise
        return torch.lerp(a, b, share)
    shape = (-1, *[1] * (a.dim() - 1))
    weights = (torch.sin(part * angle) / torch.sin(angle) for part in (1 - share, share))
    near, far = (w.view(shape).to(a.dtype) for w in weights)
    return near * a + far * b


def turned(
    a: Tensor, b: Tensor, shares: Sequence[float], turn: Callable[[Tensor, Tensor, float], Tensor] = slerp
) -> Tensor:
    """Each row of a (b, c, h, w) turned to that of b by its own share."""
    return torch.cat([turn(one, two, share) for one, two, share in zip(a.split(1), b.split(1), shares, strict=True)])


# -------------------------------------------------------------------- requests


def prepare(system: System, **values: Any) -> Request:
    """A complete request from what was said and the model's defaults. Raises UsageError, UnknownName, ImageProblem."""
    known = list(inspect.signature(check).parameters)[3:]
    for name in values.keys() - set(known):
        raise UnknownName("keyword", name, known)
    if values.get("control"):
        values["control"] = controls.opened(system, values["control"])
    grid, interpolant = getattr(system, "unit", system.grid), getattr(system, "interpolant", None)
    request = check(system.defaults, grid, interpolant, **values)
    if request.compat and (system.clip_skip is None or not isinstance(getattr(system, "interpolant", None), EDM)):
        raise UsageError(
            f"what {request.compat} does is known for Stable Diffusion 1, 2 and XL, not {system.name}: leave compat out"
        )
    sees = getattr(system, "sees", "")
    if request.image_guidance != 1 and sees != "picture":
        raise UsageError(
            f"image_guidance is for models that edit pictures (InstructPix2Pix), not {system.name}: leave it out"
        )
    if request.depth is not None and sees != "depth":
        raise UsageError(
            f"{system.name} is told of no depth: leave depth out; ControlNets for depth take theirs with control"
        )
    if request.invert is not None and not getattr(system, "inverts", False):
        raise UsageError(f"{system.name} draws from no noise that a picture could be inverted to: leave invert out")
    system.check(request)
    if request.hires != 1:
        last = larger(system, request)
        if max(last.width, last.height) > system.defaults.max_size or (last.width, last.height) == (
            request.width,
            request.height,
        ):
            raise UsageError(
                f"hires {request.hires:g} gives {last.width} x {last.height} pixels: the sides must grow, and be at "
                f"most {system.defaults.max_size}"
            )
        system.check(last)
    return request


def check(
    defaults: Defaults,
    grid: int,
    interpolant: Interpolant | None = None,
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
    mask: str | Path | Image.Image | None = None,
    mask_blur: float | None = None,
    depth: str | Path | Image.Image | None = None,
    image_guidance: float | None = None,
    only_masked: bool = False,
    padding: int | None = None,
    guidance_kind: str | None = None,
    guidance_rescale: float | None = None,
    guidance_mimic: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    eta: float | None = None,
    churn: float | None = None,
    pag_scale: float | None = None,
    pag_layers: str | Sequence[str] | None = None,
    classifier_scale: float | None = None,
    variation: float | tuple[float, float] | None = None,
    variation_seed: int | None = None,
    variation_image: str | Path | Image.Image | None = None,
    invert: str | None = None,
    switch_at: float | None = None,
    hires: float | None = None,
    hires_strength: float | None = None,
    hires_steps: int | None = None,
    prompt_dialect: str | None = None,
    clip_skip: int | None = None,
    noise_level: int | None = None,
    compat: str | None = None,
    noise_delta: int | None = None,
    place: int | None = None,
    control: Sequence[Control] = (),
    ip_adapter: Sequence[Reference] = (),
    tile: int | None = None,
    vae_tile: int | None = None,
    wildcards: str | Path | None = None,
    on_step: OnStep | None = None,
) -> Request:
    """As `prepare`, knowing only the model's defaults, grid and noise, so that nothing need be loaded to check a
    request."""
    for name, text in (("prompt", prompt), ("negative prompt", negative or ""), ("inverted prompt", invert or "")):
        if not isinstance(text, str):
            raise UsageError(f"the {name} is {type(text).__name__}, not text")
        if len(text) > defaults.max_prompt_chars:
            raise UsageError(
                f"the {name} has {len(text)} characters; at most {defaults.max_prompt_chars} are read: shorten it"
            )
    if not prompt.strip() and image is None and not ip_adapter and defaults.prompted:
        raise UsageError("the prompt is empty: say what to draw")
    if strength is not None and image is None:
        raise UsageError("strength means how far to move from a picture, but no picture was given: add -i IMAGE")
    if image is not None:
        image = pictures.open_image(image)
        usual = defaults.strength if invert is None else 1.0
        strength = _number("strength", usual if strength is None else strength, 0, 1, above=True)
    if mask is not None:
        if not isinstance(image, Image.Image):
            raise UsageError("a mask says where to paint over a picture, but no picture was given: add -i IMAGE")
        mask = pictures.open_mask(mask, image)
    elif mask_blur is not None:
        raise UsageError("mask_blur is how softly a mask ends, but no mask was given: add --mask IMAGE")
    if not isinstance(only_masked, bool):
        raise UsageError(f"only_masked is {only_masked!r:.50}: give True or False")
    if only_masked and mask is None:
        raise UsageError("only_masked draws the part around a mask, but no mask was given: add --mask IMAGE")
    if padding is not None and not only_masked:
        raise UsageError("padding is what is seen around a mask of which only_masked draws the part: ask for it, too")
    sizes = [
        _size(name, default if value is None else value, defaults, grid)
        for name, value, default in (("width", width, defaults.width), ("height", height, defaults.height))
    ]
    usually = defaults.sampler if invert is None else "ddim"
    sampler, fused = names.split(usually if sampler is None else sampler)
    sampler = samplers.find(sampler)
    if invert is not None:
        _check_inverted(image, compat, sampler)
    if sampler == "dopri5":
        odes.require()
    for option, value in (("eta", eta), ("churn", churn or None)):
        if value is not None and (compat or invert is not None or not samplers.takes(sampler, option)):
            others = ", ".join(name for name in samplers.SAMPLERS if samplers.takes(name, option))
            why = f"compat {compat}" if compat else "invert" if invert is not None else f"the sampler {sampler!r}"
            raise UsageError(f"{why} takes no {option}: it is for {others}")
    if compat and compat not in programs.PROGRAMS:
        raise UnknownName("program", str(compat), programs.PROGRAMS)
    if noise_delta and not (compat or "").startswith("a1111"):
        raise UsageError("noise_delta is A1111's eta noise seed delta: ask for it with compat a1111")
    if place and compat != "comfyui":
        raise UsageError("place is that of a picture in ComfyUI's batch: ask for it with compat comfyui")
    schedule = next(s for s in (schedule, fused, "auto" if compat else defaults.schedule) if s is not None)
    if compat:
        programs.require(sampler)
        schedule = programs.settle(schedule, sampler, compat)
        prompt_dialect = programs.PROGRAMS[compat] if prompt_dialect is None else prompt_dialect
    else:
        schedule = schedules.settle(schedule, sampler, interpolant)
    seed = _whole("seed", secrets.randbelow(2**32) if seed is None else seed, 0, MAX_SEED - 100_000)
    batch = _whole("batch", 1 if batch is None else batch, 1, 1024)
    share, shares = _shares(0 if variation is None else variation, batch)
    if variation_seed is not None and not share:
        raise UsageError("variation_seed is of the noise to turn towards, by variation, which is 0: give 0 to 1 of it")
    if variation_image is not None:
        if invert is None:
            raise UsageError(
                "variation_image is what an inverted picture turns to, but none is: say what shows, --invert"
            )
        if not share:
            raise UsageError(
                "variation_image is what a picture turns to, but by no variation: give --variation 0.5 or 0:1"
            )
        if variation_seed is not None:
            raise UsageError(
                "a picture turns to variation_image or to the noise of variation_seed: leave one of them out"
            )
        if only_masked:
            raise UsageError("only_masked draws a part of one picture: leave variation_image out, or only_masked")
        variation_image = pictures.open_image(variation_image)
    elif invert is not None and share:
        raise UsageError("variation of an inverted picture is towards another one: add variation_image")
    if hires is None and (hires_strength is not None or hires_steps is not None):
        raise UsageError(
            "hires_strength and hires_steps are of a second, larger pass: ask for it with hires, such as 2"
        )
    if hires is not None and image is not None:
        raise UsageError(
            "hires enlarges what is drawn from nothing: to enlarge a picture ask for a larger width and height"
        )
    if pag_layers is not None and not pag_scale:
        raise UsageError("pag_layers are those of perturbed attention guidance, of which pag_scale is 0: give it, as 3")
    layers = SELDOM["pag_layers"] if pag_layers is None else pag_layers
    listed = isinstance(layers, tuple | list) and layers and all(isinstance(layer, str) for layer in layers)
    if not isinstance(layers, str) and not listed:
        raise UsageError(f"pag_layers is {layers!r:.80}: give names of blocks, such as 'mid_block,up_blocks.1'")
    layers = layers.split(",") if isinstance(layers, str) else layers
    usual_steps = defaults.steps if invert is None else max(defaults.steps, INVERTED_STEPS)
    steps = _whole("steps", usual_steps if steps is None else steps, 1, 1000)
    kind = defaults.guidance_kind if guidance_kind is None else guidance_kind
    rescale = defaults.guidance_rescale if guidance_rescale is None else guidance_rescale
    if kind not in WAYS:
        raise UnknownName("guidance kind", str(kind), WAYS)
    if prompt_dialect is not None and prompt_dialect not in DIALECTS:
        raise UnknownName("prompt dialect", str(prompt_dialect), DIALECTS)
    if not isinstance(wildcards, str | Path | None):
        raise UsageError(f"wildcards is {type(wildcards).__name__}, not the path of a folder")
    known = None if wildcards is None else Wildcards(wildcards)
    words = {
        name: tuple(expand(text or "", seed + (0 if shares else i), known, name) for i in range(batch))
        for name, text in (("prompt", prompt), ("negative prompt", negative))
    }
    invert = None if invert is None else expand(invert, seed, known, "inverted prompt")
    for name, texts in words.items():
        if (longest := max(map(len, texts))) > defaults.max_prompt_chars:
            raise UsageError(
                f"the {name} has {longest} characters once expanded; at most {defaults.max_prompt_chars} are read"
            )
    return Request(
        prompt=prompt,
        negative=negative or "",
        prompts=words["prompt"],
        negatives=words["negative prompt"],
        prompt_dialect=prompt_dialect,
        clip_skip=None if clip_skip is None else _whole("clip_skip", clip_skip, 1, 1000),
        seed=seed,
        batch=batch,
        width=sizes[0],
        height=sizes[1],
        steps=steps,
        guidance=_number("guidance", defaults.guidance if guidance is None else guidance, 0, 100),
        sampler=sampler,
        schedule=schedule,
        image=image,
        strength=strength,
        mask=mask,
        depth=None if depth is None else pictures.open_depth(depth),
        image_guidance=_number(
            "image_guidance", defaults.image_guidance if image_guidance is None else image_guidance, 0, 100
        ),
        mask_blur=_number("mask_blur", MASK_BLUR if mask_blur is None else mask_blur, 0, 100),
        only_masked=only_masked,
        padding=_whole("padding", PADDING if padding is None else padding, 0, 65_536),
        guidance_kind=kind,
        guidance_rescale=_number("guidance_rescale", rescale, 0, 1),
        guidance_mimic=_number("guidance_mimic", guidance_mimic or 0, 0, 100),
        guidance_interval=None if guidance_interval is None else _interval(guidance_interval),
        eta=None if eta is None else _number("eta", eta, 0, 1),
        churn=_number("churn", churn or 0, 0, 1000),
        pag_scale=_number("pag_scale", pag_scale or 0, 0, 100),
        pag_layers=tuple(layer.strip() for layer in layers),
        classifier_scale=_number("classifier_scale", 1 if classifier_scale is None else classifier_scale, 0, 100),
        variation=share,
        shares=shares,
        invert=invert,
        variation_image=variation_image,
        switch_at=_number("switch_at", SWITCH_AT if switch_at is None else switch_at, 0, 1),
        hires=_number("hires", 1 if hires is None else hires, 1, 16),
        hires_strength=_number("hires_strength", 0.5 if hires_strength is None else hires_strength, 0, 1, above=True),
        hires_steps=_whole("hires_steps", steps if hires_steps is None else hires_steps, 1, 1000),
        variation_seed=_whole("variation_seed", variation_seed or 0, 0, MAX_SEED - 100_000),
        compat=compat or "",
        noise_delta=_whole("noise_delta", noise_delta or 0, 0, 2**31),
        place=_whole("place", place or 0, 0, 1023),
        noise_level=_whole("noise_level", NOISE_LEVEL if noise_level is None else noise_level, 0, 999),
        control=tuple(control),
        ip_adapter=tuple(ip_adapter),
        tile=_tile("tile", tile or 0, defaults, grid),
        vae_tile=None if vae_tile is None else _tile("vae_tile", vae_tile, defaults, grid),
        on_step=_heard(on_step),
    )


def _show_keywords() -> None:
    """In `help`, what takes `values` shows the keywords of `check`."""
    keywords = list(inspect.signature(check).parameters.values())[3:]
    Pipeline.generate.__doc__ = generate.__doc__
    function: Any
    for function in (generate, Pipeline.generate):
        signature = inspect.signature(function)
        first = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = [*first, *(p for p in keywords if p.name != "prompt")]
        function.__signature__ = signature.replace(parameters=shown)


_show_keywords()


def ignored(system: System, request: Request) -> list[str]:
    """A sentence for each thing asked for that will not show in the picture."""
    told = []
    said = [("prompt", text) for text in dict.fromkeys(request.prompts)]
    said += [] if request.invert is None else [("inverted prompt", request.invert)]
    if request.sampler == "dopri5" and request.steps != system.defaults.steps:
        told.append(f"dopri5 takes as many steps as it needs: steps={request.steps} has no effect")
    against = [("negative prompt", text) for text in dict.fromkeys(request.negatives)]
    for name, text in said + against:
        if (end := system.words_cut(text)).strip():
            told.append(
                f"the {name} is longer than the model reads: {_brief(end)} is left out; "
                "shorten it, or say first what matters most"
            )
        if words := system.words_unknown(text):
            told.append(f"the model does not know {_brief(words)} of the {name}: say it in English words")
        told += [
            f"{_brief(words)} of the {name} is kept for steps that do not come: ask for it sooner, or for more steps"
            for words in system.words_unreached(text, request)
        ]
    dialect = request.prompt_dialect or system.dialects[0]
    meant = [found[0] for _, text in said + against if (found := SYNTAX.search(text))]
    if dialect not in system.dialects or (system.dialects == ("plain",) and meant and not request.prompt_dialect):
        what = f"{meant[0]!r:.60} is" if meant else "brackets and AND are"
        told.append(f"{system.name} reads prompts plainly, whatever the dialect: {what} words to it")
    elif dialect == "a1111" and any(AND.search(text) for _, text in against):
        told.append("AND composes prompts, not negative ones: it is a word of the negative prompt")
    if request.tile and (not in_tiles(request) or system.task == "autoencoding"):
        told.append(f"tile {request.tile} has no effect: nothing larger is drawn by a network")
    if in_tiles(request) and getattr(system, "learned_variance", False) and request.sampler in ("ddpm", "ddpm_large"):
        told.append(f"in tiles the variance that {system.name} learned is not drawn with: the sampler's own is")
    if request.clip_skip is not None and system.clip_skip is None:
        told.append(f"clip skip has no effect: {system.name} takes nothing from CLIP's layers")
    unmasked = request.image is not None and request.mask is None and request.strength == 1
    if unmasked and getattr(system, "sees", "") == "mask":
        told.append(f"the picture is painted over as a whole: add --mask MASK to say where {system.name} paints")
    if request.invert is not None and request.batch > len(set(request.prompts)) and not request.shares:
        told.append("pictures of one prompt are alike, as the one inverted leaves nothing to seeds: ask for one")
    if request.noise_level != NOISE_LEVEL and getattr(system, "enlarges", 1) == 1:
        told.append(f"noise_level has no effect: {system.name} is no upscaler")
    if adapters := getattr(system, "adapters", None):
        told += adapters.unused(request)
    told_guidance = getattr(system, "told_guidance", None) is not None
    plain = request.guidance == 1 == request.image_guidance
    kinds = [name for name in SELDOM if "guidance" in name and getattr(request, name) != _usual(system, name)]
    kinds = [name for name in kinds if told_guidance or name != "image_guidance"]
    classifier = getattr(system, "classifier", None)
    leads = classifier is not None and request.classifier_scale > 0
    if (request.pag_scale or leads) and (told_guidance or plain):  # which is guidance of its own
        kinds = [name for name in kinds if name != "guidance_interval"]
    if told_guidance and (kinds or request.negative.strip()):
        idle = " and ".join([*kinds, *(["the negative prompt"] if request.negative.strip() else [])])
        told.append(f"{idle}: without effect, as {system.name} is told how much to follow the prompt, not guided")
    elif kinds and plain:
        told.append(f"{' and '.join(kinds)} have no effect at guidance 1: ask for more guidance")
    if request.compat:
        told += programs.differing(request.compat, request.schedule, request.sampler)
    if request.compat == "comfyui" and request.variation:
        told.append("ComfyUI knows no variations: they are A1111's")
    if request.switch_at != SWITCH_AT and getattr(system, "refiner", None) is None:
        told.append("switch_at has no effect without a refiner: add --refiner FILE")
    if classifier is None and request.classifier_scale != 1:
        told.append("classifier_scale has no effect without a classifier: add --classifier FILE")
    elif classifier is not None and not leads:
        told.append(f"{classifier.name} leads nowhere at classifier_scale 0")
    guide = getattr(system, "guide", None)
    if guide is not None and (request.guidance == 1 or told_guidance):
        why = f"as {system.name} is told its guidance" if told_guidance else "at guidance 1: ask for more guidance"
        told.append(f"{guide.name} guides nothing, {why}")
    elif request.negative.strip() and guide is not None:
        told.append(f"the negative prompt has no effect: {guide.name} guides in its place")
    if request.negative.strip() and plain and not told_guidance:
        told.append("the negative prompt has no effect at guidance 1: ask for more guidance")
    for one in request.control:
        told += [f"{one.name} has weight 0, and tells nothing"] if not one.weight else []
        if (
            isinstance(system, DiffusionSystem)
            and one.finder is not None
            and one.weight
            and not system.hint(one, request).any()
        ):
            told.append(
                f"{makers.NOTHING[one.maker]} in {one.name}'s picture by {one.maker_name}: it is told of nothing"
            )
        if getattr(system, "refiner", None) is not None:
            told.append(f"{one.name} tells nothing in the steps of the refiner")
    told += [f"{one.name} has weight 0, and shows nothing" for one in request.ip_adapter if not one.weight]
    given = (("the picture's", request.image), ("the depth map's", request.depth))
    shown = [(whose, image) for whose, image in given if image is not None]
    width, height = request.width, request.height
    if request.only_masked and request.image is not None:
        width, height = request.image.size
    for whose, image in shown + [(f"{one.name}'s picture's", one.image) for one in request.control]:
        across, down = image.width * height, image.height * width
        side, cut = ("width", 1 - down / across) if across > down else ("height", 1 - across / down)
        if cut >= 0.005:
            told.append(
                f"{cut:.0%} of {whose} {side} is cut off, equally at both ends, to make its "
                f"{image.width} x {image.height} pixels {width} x {height}: "
                "ask for a width and height of its shape"
            )
    if system.task == "autoencoding":
        names = ("steps", "guidance", "sampler", "schedule", "strength")
        vain = [name for name in names if getattr(request, name) != getattr(system.defaults, name)]
        told += [f"an autoencoder only gives the picture back, whatever {' and '.join(vain)} may be"] if vain else []
    if request.vae_tile and system.grid == 1:
        told.append(f"{system.name} has no autoencoder to see tiles of {request.vae_tile} pixels: leave vae_tile out")
    return list(dict.fromkeys(told))


def _usual(system: System, name: str) -> Any:
    """What one of SELDOM is where nothing is said: an interval of the model's own is none that was asked for."""
    nothing = SELDOM[name]
    return nothing if nothing is None else getattr(system.defaults, name, nothing)


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:56] + " ...")


def describe(system: System, request: Request, place: int = 0) -> dict[str, Any]:
    """The settings that a picture of the batch remembers: enough to draw it again, nothing about who, where or when."""
    kept = ("width", "height", "steps", "guidance", "sampler", "schedule")
    settings: dict[str, Any] = {"limner": __version__, "model": system.name}
    settings |= {"prompt": request.prompts[place], "negative": request.negatives[place]}
    settings |= {name: getattr(request, name) for name in kept}
    for name, nothing in SELDOM.items():
        value = getattr(request, name)
        if value != nothing or _usual(system, name) != nothing:
            settings[name] = list(value) if isinstance(value, tuple) else value
    if request.compat == "comfyui" and request.place + place:
        settings["place"] = request.place + place
    if request.hires != 1:
        settings |= {name: getattr(request, name) for name in ("hires", "hires_strength", "hires_steps")}
    if request.variation:
        share = settings["variation"] = request.shares[place] if request.shares else request.variation
        if not share:
            del settings["variation"]
        elif request.variation_image is not None:
            settings["variation_image_hash"] = pictures.digest(request.variation_image)
        else:
            settings["variation_seed"] = request.variation_seed + (0 if request.shares else place)
    if len(system.dialects) > 1:
        settings["prompt_dialect"] = request.prompt_dialect or system.dialects[0]
    if system.clip_skip is not None:
        settings["clip_skip"] = request.clip_skip or system.clip_skip
    if system.model_hash:
        settings["model_hash"] = system.model_hash
    settings |= system.vae
    if (refiner := getattr(system, "refiner", None)) is not None:
        settings |= {"refiner": refiner.name, "refiner_hash": refiner.model_hash, "switch_at": request.switch_at}
    if (guide := getattr(system, "guide", None)) is not None:
        settings |= {"guide_model": guide.name, "guide_model_hash": guide.model_hash}
    if (classifier := getattr(system, "classifier", None)) is not None:
        settings |= {"classifier": classifier.name, "classifier_hash": classifier.model_hash}
        settings["classifier_scale"] = request.classifier_scale
    if getattr(system, "enlarges", 1) > 1:
        settings["noise_level"] = request.noise_level
    if request.image is not None:
        settings["strength"] = request.strength
    if request.mask is not None:
        settings["mask_blur"] = request.mask_blur
    if request.depth is not None:
        settings["depth_hash"] = pictures.digest(request.depth)
    if request.only_masked:
        settings["padding"] = request.padding
    if request.control:
        settings["control"] = [one.settings() for one in request.control]
    if request.ip_adapter:
        settings["ip_adapter"] = [one.settings() for one in request.ip_adapter]
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


def _shares(value: Any, batch: int) -> tuple[float, tuple[float, ...]]:
    """The most of variation, and that of each picture where two ends are given. Raises UsageError."""
    if not isinstance(value, tuple | list):
        return _number("variation", value, 0, 1), ()
    if len(value) != 2:
        raise UsageError(f"variation is {value!r:.50}: give a number from 0 to 1, or two")
    low, high = (_number("variation", end, 0, 1) for end in value)
    if batch == 1:
        raise UsageError(f"variation is {low:g} to {high:g}, in one picture: ask for a larger batch, such as 8")
    return max(low, high), tuple(low + (high - low) * i / (batch - 1) for i in range(batch))


def _check_inverted(image: Any, compat: str | None, sampler: str) -> None:
    if image is None:
        raise UsageError("invert says what a picture shows, but no picture was given: add -i IMAGE")
    if compat:
        raise UsageError(f"{compat} inverts no pictures as is done here: leave compat or invert out")
    if sampler not in samplers.FLOWING:
        raise UsageError(f"the sampler {sampler!r} adds noise, but an inverted picture has its own: take 'ddim'")


def _interval(value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UsageError(f"guidance_interval is {value!r:.50}: give two rising numbers from 0 to 1")
    low, high = (_number("guidance_interval", end, 0, 1) for end in value)
    if low > high:
        raise UsageError(f"guidance_interval is {low:g} to {high:g}: give two rising numbers from 0 to 1")
    return low, high


def _size(name: str, value: Any, defaults: Defaults, grid: int) -> int:
    low, high = defaults.min_size, defaults.max_size
    if isinstance(value, int) and low <= value <= high and value % grid:
        below = value // grid * grid
        near = " or ".join(str(n) for n in (below, below + grid) if low <= n <= high)
        raise UsageError(f"{name} is {value}, not a multiple of {grid} pixels: take {near}")
    try:
        return _whole(name, value, low, high)
    except UsageError as error:
        raise UsageError(f"{error}, in steps of {grid}") from None


def _tile(name: str, value: Any, defaults: Defaults, grid: int) -> int:
    value = _whole(name, value, 0, 65_536)
    if value and (value < defaults.min_size or value % grid):
        raise UsageError(
            f"{name} is {value}: give a multiple of {grid} pixels from {defaults.min_size} on, or 0 for all"
        )
    return value


def _overall(on_step: OnStep | None, turn: int, turns: int) -> OnStep | None:
    """Progress over all turns of a large batch."""
    if on_step is None:
        return None
    return lambda done, total, preview: on_step(turn * total + done, turns * total, preview)


def _heard(on_step: OnStep | None) -> OnStep | None:
    """What is called after each step, if it can be."""
    if on_step is None:
        return None
    wanted = "give a function of (done, total, preview)"
    if not callable(on_step):
        raise UsageError(f"on_step is {type(on_step).__name__}: {wanted}")
    with contextlib.suppress(ValueError):  # some that are written in C have no signature
        signature = inspect.signature(on_step)
        try:
            signature.bind(1, 1, list)
        except TypeError as error:
            raise UsageError(f"on_step takes {signature}: {wanted}") from error
    return on_step
