"""`limner generate "PROMPT"`: parse, ask the pipeline, save. stdout carries the paths (or JSON), stderr the rest."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import os
import re
import secrets
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from limner import metadata, names
from limner.errors import Assumed, CheckpointMismatch, Ignored, UsageError

if TYPE_CHECKING:
    from limner.pipeline import Pipeline
    from limner.types import OnStep, Preview, Request

DEFAULT_MODEL = "icons"
STYLES = """
Styles that icons knows, in a prompt each:

\b
3d emoji of a red fox                     glossy gradient emoji of a penguin
bold flat emoji: birthday cake            flat emoji: bouquet of flowers
soft shaded emoji: hamburger              blob emoji of a green dragon
rounded flat emoji: strawberry            firefox os emoji of a whale
outlined cartoon emoji of a ghost         pink glyph emoji: butterfly
a brown monochrome emoji of a bear face   blue outline icon: shopping cart
hand drawn doodle icon: umbrella          pastel outline icon: laptop
flat color icon: padlock                  gradient app icon: folder
weather icon: partly cloudy night         round flag of brazil
red silhouette icon: crossed swords       teal duotone icon: airplane
a yellow pixel art icon of a key          clip art of a sailing boat
"""
BASE_BYTES = 370e6  # of the process on a CPU, without weights; on a GPU its driver's share is no longer free


def paint(
    prompt: Annotated[str | None, typer.Argument(help="What to paint.", show_default=False)] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="PNG file or folder; - is standard output. A file that is there stays, and the name gets a number. "
            "[default: prompt-SEED.png]",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help=f"Name, weight file, folder, or hf:owner/name. [default: {DEFAULT_MODEL}]"),
    ] = None,
    negative: Annotated[str | None, typer.Option("-n", "--negative", help="What to keep out of the picture.")] = None,
    width: Annotated[
        int | None, typer.Option("-W", "--width", help="128 to 512 pixels in steps of 16. [default: 256]")
    ] = None,
    height: Annotated[int | None, typer.Option("-H", "--height", help="As the width. [default: 256]")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps, 1 to 1000. [default: 12]")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            "--cfg-scale",
            help="How closely to follow the prompt; 1 is plainly. icons burns above 6. [default: 3]",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("-s", "--seed", help="Same seed, same picture. [default: a random one, printed]")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help=f"Solver: {', '.join(names.SAMPLERS)}. [default: dpmpp_2m]")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            "--scheduler",
            help=f"How noise falls: {', '.join(names.SCHEDULES)}. icons is good with uniform, shifted and kl_optimal; "
            "others, such as karras, spoil it. [default: uniform]",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("-b", "--batch", help="Pictures, with seeds SEED, SEED+1, ...")] = 1,
    dialect: Annotated[
        str | None,
        typer.Option("--prompt-dialect", help="What brackets mean: a1111, comfyui or plain. [default: the model's]"),
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option("--clip-skip", help="CLIP's layer to take words from, 1 the last, 2 that before.")
    ] = None,
    compat: Annotated[
        str | None,
        typer.Option(
            "--compat",
            help="Do as a1111, a1111-cpu (its RNG: CPU) or comfyui: noise, levels, steps over a picture, prompts.",
        ),
    ] = None,
    noise_delta: Annotated[
        int | None, typer.Option("--noise-delta", help="With --compat a1111: its eta noise seed delta (ENSD).")
    ] = None,
    wildcards: Annotated[
        Path | None, typer.Option("--wildcards", help="Folder of NAME.txt, a line of which is put for __NAME__.")
    ] = None,
    image: Annotated[Path | None, typer.Option("-i", "--image", help="Paint over this picture.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help="With -i, above 0: a little keeps the picture, 1 forgets it; icons wants 0.75 to 0.95. [default: 0.8]",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="With -i: white where to paint; what is black is kept, bit for bit."),
    ] = None,
    mask_blur: Annotated[
        float | None, typer.Option("--mask-blur", help="Pixels over which the painting fades in. [default: 4]")
    ] = None,
    depth: Annotated[
        Path | None,
        typer.Option("--depth", metavar="IMAGE", help="A depth map, white near, for models told of it (SD2-depth)."),
    ] = None,
    image_guidance: Annotated[
        float | None,
        typer.Option(
            "--image-guidance", help="How closely a model that edits (InstructPix2Pix) keeps to -i. [default: 1.5]"
        ),
    ] = None,
    only_masked: Annotated[
        bool,
        typer.Option(
            "--only-masked", help="Draw what is around the mask at the size of the drawing, and put it back there."
        ),
    ] = False,
    padding: Annotated[
        int | None,
        typer.Option("--padding", help="With --only-masked: pixels around the mask that are seen. [default: 32]"),
    ] = None,
    invert: Annotated[
        str | None,
        typer.Option(
            "--invert",
            metavar="WORDS",
            help="With -i: what the picture shows. Draws from the noise it comes back from (DDIM inversion; 50 steps).",
        ),
    ] = None,
    variation: Annotated[
        str | None,
        typer.Option(
            "--variation",
            metavar="SHARE",
            help="A picture like that of the seed: 0.1 is near, 1 is another. 0:1 and -b 8: on the way, in 8 pictures.",
        ),
    ] = None,
    variation_seed: Annotated[int | None, typer.Option("--variation-seed", help="Which of them. [default: 0]")] = None,
    variation_image: Annotated[
        Path | None,
        typer.Option(
            "--variation-image", metavar="IMAGE", help="With --invert: the other picture, which --variation goes to."
        ),
    ] = None,
    hires: Annotated[
        float | None, typer.Option("--hires", help="Then draw so many times larger over it, such as 2.")
    ] = None,
    hires_strength: Annotated[
        float | None, typer.Option("--hires-strength", help="How much of it anew. [default: 0.5]")
    ] = None,
    hires_steps: Annotated[int | None, typer.Option("--hires-steps", help="[default: those of --steps]")] = None,
    guidance_kind: Annotated[
        str | None, typer.Option("--guidance-kind", help="cfg, apg (no burnt colours) or cfg_zero. [default: cfg]")
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option("--guidance-rescale", help="0 to 1: takes back contrast that guidance adds.")
    ] = None,
    guidance_mimic: Annotated[
        float | None, typer.Option("--guidance-mimic", help="Keep to the range of colours of this guidance.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option("--guidance-interval", metavar="LOW HIGH", help="Guide only at these levels of noise, 0 to 1."),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option("--eta", help="How much of DDPM's noise a step adds, 0 to 1, of ddim and samplers that add some."),
    ] = None,
    churn: Annotated[
        float | None,
        typer.Option("--churn", help="How far euler and heun go back into noise at each step, in all: EDM's S_churn."),
    ] = None,
    pag_scale: Annotated[
        float | None,
        typer.Option("--pag-scale", help="Perturbed attention guidance, beside the other: 3 is usual. U-Nets only."),
    ] = None,
    pag_layers: Annotated[
        str | None, typer.Option("--pag-layers", help="Where, such as mid_block,up_blocks.1. [default: mid_block]")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FILE[:WEIGHT]", help="A LoRA or its kin; may be given again. FILE:0.8,mid_block=0.5"
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option("--embedding", metavar="FILE", help="A learned word, said in the prompt by the name of its file."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="FILE=IMAGE[:WEIGHT]",
            help="A ControlNet or T2I-Adapter and the picture it follows; may be given again; icons-canny ships. "
            "FILE=IMAGE:0.8,canny,end=0.7 follows edges of IMAGE, at the first 0.7 of the steps. Also sobel, scribble, "
            "blur, tile, invert; depth=MODEL, pose=MODEL (of one person) as a Depth Anything or ViTPose finds them, a "
            "folder or hf:owner/name; start=; guess; kind=depth of a union.",
        ),
    ] = None,
    ip_adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--ip-adapter",
            metavar="FILE=IMAGE[:WEIGHT]",
            help="An IP-Adapter, or FLUX.1's Redux, and a picture, as words of the prompt; may be given again. "
            "FILE=IMAGE:0.6,mid_block=0",
        ),
    ] = None,
    image_encoder: Annotated[
        Path | None, typer.Option("--image-encoder", help="What an IP-Adapter or Redux sees with. [default: beside it]")
    ] = None,
    adapter_folder: Annotated[
        Path | None,
        typer.Option("--adapter-folder", help="Where <lora:NAME:WEIGHT> of a prompt is looked for. [default: here]"),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("-C", "--settings", help="Redo what this picture's metadata says; flags override it.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="What the network computes in: fp32, fp16 or bf16; auto is the fastest, and keeps weights of 8 bits "
            "or fewer as they are. fp8 keeps matrices of transformers in 8 bits, for half the memory.",
        ),
    ] = "auto",
    tile: Annotated[
        int | None,
        typer.Option(
            "--tile",
            help="Let the network see tiles of so many pixels, for large pictures. [default: 0, all; of `limner "
            "upscale` twice the model's size]",
        ),
    ] = None,
    vae_tile: Annotated[
        int | None,
        typer.Option("--vae-tile", help="The same of the autoencoder. [default: 0; of more than 1536 x 1536, 1024]"),
    ] = None,
    refiner: Annotated[
        str | None, typer.Option("--refiner", help="A model that does the last steps, such as SDXL's refiner.")
    ] = None,
    switch_at: Annotated[
        float | None, typer.Option("--switch-at", help="The share of the noise before it takes over. [default: 0.8]")
    ] = None,
    guide_model: Annotated[
        str | None,
        typer.Option("--guide-model", help="A weaker model, to guide away from in place of the negative prompt."),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            "--classifier", help="A classifier of noisy pictures, to lead a model of pixels to the prompt's class."
        ),
    ] = None,
    classifier_scale: Annotated[
        float | None, typer.Option("--classifier-scale", help="How much it leads; 0 is not at all. [default: 1]")
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            "--offload",
            metavar="WHEN",
            help="Whether the parts of a model take turns on a GPU: auto (if they do not fit), never, always. "
            "[default: auto]",
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network's layers first, for many pictures of one size.")
    ] = False,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="Another autoencoder, or that of a network alone: a file, or a folder.")
    ] = None,
    text_encoder: Annotated[
        list[Path] | None,
        typer.Option(
            "--text-encoder",
            metavar="FILE",
            help="A text encoder for a U-Net file, or in place of a model's own; given twice for SDXL.",
        ),
    ] = None,
    clip_l: Annotated[
        Path | None, typer.Option("--clip-l", metavar="FILE", help="The text encoder CLIP-L, of FLUX.1 or SD3.")
    ] = None,
    clip_g: Annotated[
        Path | None, typer.Option("--clip-g", metavar="FILE", help="The text encoder CLIP-G, of SD3.")
    ] = None,
    t5: Annotated[
        Path | None, typer.Option("--t5", metavar="FILE", help="The text encoder T5-XXL, of FLUX.1 or SD3.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="What would be ignored or assumed is an error.")] = False,
    prediction: Annotated[
        str | None, typer.Option("--prediction", help="eps, v or x0, for a model file that does not say it.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")] = "auto",
    preview: Annotated[
        Path | None,
        typer.Option("--preview", metavar="FILE", help="PNG file that shows, after each step, what is being painted."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of paths.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do not paint.")] = False,
    expand: tuple[int, int, int, int] | None = None,
    keep_size: bool = False,
    enlarge: bool = False,
    factor: float | None = None,
    noise_level: int | None = None,
) -> None:
    """What `generate`, `edit` and `upscale` do; `keep_size` takes the size of `image`, and `expand` adds pixels at its
    sides; `enlarge` makes it `factor` times larger."""
    flags = {
        "prompt": prompt,
        "model": model,
        "negative": negative,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "sampler": sampler,
        "schedule": schedule,
        "strength": strength,
        "mask_blur": mask_blur,
        "image_guidance": image_guidance,
        "only_masked": only_masked or None,
        "padding": padding,
        "invert": invert,
        "variation": None if variation is None else _shares(variation),
        "variation_seed": variation_seed,
        "switch_at": switch_at,
        "hires": hires,
        "hires_strength": hires_strength,
        "hires_steps": hires_steps,
        "guidance_kind": guidance_kind,
        "guidance_rescale": guidance_rescale,
        "guidance_mimic": guidance_mimic,
        "guidance_interval": guidance_interval,
        "eta": eta,
        "churn": churn,
        "pag_scale": pag_scale,
        "pag_layers": pag_layers,
        "classifier_scale": classifier_scale,
        "prompt_dialect": dialect,
        "clip_skip": clip_skip,
        "noise_level": noise_level,
        "tile": tile,
        "vae_tile": vae_tile,
        "compat": compat,
        "noise_delta": noise_delta,
        "wildcards": wildcards,
    }
    remembered = _remembered(settings, image, mask, model) if settings else {}
    shown = remembered.pop("ip_adapter", [])
    depth_hash = remembered.pop("depth_hash", None)
    if depth_hash and depth is None:
        raise UsageError(f"{str(settings)!r} was painted after a depth map, which it does not hold: add --depth IMAGE")
    towards_hash = remembered.pop("variation_image_hash", None)
    if towards_hash and variation_image is None:
        raise UsageError(
            f"{str(settings)!r} was turned to another picture, which it does not hold: add --variation-image IMAGE"
        )
    painted_with, adapters = remembered.pop("model_hash", None), remembered.pop("adapters", [])
    controlled = remembered.pop("control", [])
    asked = remembered | {k: v for k, v in flags.items() if v is not None}
    bare = "prompt" not in asked and image is None and not ip_adapter
    unsaid = 'no prompt: say what to paint, such as limner "a red fox"'
    if bare and "model" not in asked:  # some of which read none
        raise UsageError(unsaid)
    asked.setdefault("prompt", "")
    for text in (prompt, negative):
        if text and not text.isascii() and text.encode("utf-8", "ignore").decode() != text:
            raise UsageError(
                f"{text.encode('utf-8', 'backslashreplace').decode()[:50]!r} is not valid UTF-8: retype it"
            )
    if strength is not None and image is None:
        raise UsageError(f"--strength {strength:g} without a picture to paint over: add -i PICTURE")
    if output == "-" and (as_json or batch > 1 or sys.stdout.isatty()):
        raise UsageError("-o - writes one PNG to standard output: send it to a file or program, without -b or --json")
    asked.setdefault("seed", secrets.randbelow(2**32))  # drawn here, so that it can be told before painting
    name = asked.pop("model", DEFAULT_MODEL)

    tell = _told if not strict else _refused
    text_encoder = [*(text_encoder or []), *_towers(clip_l, clip_g, t5)]
    parts: dict[str, tuple[str, Any, str]] = {
        "vae": ("autoencoder", vae, "--vae FILE"),
        "refiner": ("refiner", refiner, "--refiner FILE"),
        "guide_model": ("guide", guide_model, "--guide-model FILE"),
        "classifier": ("classifier", classifier, "--classifier FILE"),
        "text_encoder": ("text encoders", text_encoder, "--text-encoder FILE, or --clip-l, --clip-g and --t5"),
    }
    hashes = {part: asked.pop(f"{part}_hash", None) for part in parts}
    names = {part: asked.pop(part, None) for part in parts}
    if missing := [part for part, (_, given, _) in parts.items() if names[part] and not given]:
        needs = " and ".join(f"the {parts[part][0]} {names[part]!r} (add {parts[part][2]})" for part in missing)
        raise UsageError(f"{str(settings)!r} was painted with {needs}")
    predicted = asked.pop("prediction", None)
    prediction = prediction or _predicted(predicted, painted_with, name, vae, text_encoder)
    others = {"vae": vae, "refiner": refiner, "guide_model": guide_model, "classifier": classifier}
    pipe = _load(name, device, prediction, dtype, others, text_encoder, offload, compile, tell)
    system: Any = pipe.system
    if bare and system.defaults.prompted:
        raise UsageError(unsaid)
    for part, wanted in hashes.items():
        joined = {"refiner": "refiner", "guide_model": "guide", "classifier": "classifier"}.get(part)
        if wanted and wanted != (getattr(system, joined).model_hash if joined else system.vae[f"{part}_hash"]):
            tell(f"{settings} was painted with another {parts[part][0]} (hash {wanted}): expect another picture")
    from limner import pictures, pipeline

    folders = (adapter_folder or Path(), *([settings.parent] if settings else []))
    typed, done, told = _attach(pipe, (prompt, negative), [*(lora or []), *(embedding or [])], adapters, folders)
    if typed is not None:
        asked["prompt"] = typed
    for sentence in done:
        _told(sentence)
    for sentence in told:
        tell(sentence)
    if image_guidance is None and "image_guidance" in asked and getattr(pipe.system, "sees", "") != "picture":
        tell(f"{pipe.system.name} does not edit pictures: the image_guidance painted with is left out")
        del asked["image_guidance"]
    given: dict[str, Any] = {"image": image, "mask": mask, "depth": depth, "variation_image": variation_image}
    if control or controlled:
        given["control"], sentences = _control(pipe, control or [], controlled, tell)
        for sentence in sentences:
            _told(sentence)
    if ip_adapter or shown:
        from limner.adapters import control as controls
        from limner.adapters import references

        rows = controls.resolve([references.parse(text) for text in ip_adapter or []], shown, "--ip-adapter")
        given["ip_adapter"] = references.opened(pipe.system, rows, image_encoder)
        for sentence in controls.differing(given["ip_adapter"], shown):
            tell(sentence)
    elif image_encoder is not None:
        raise UsageError("--image-encoder is what an IP-Adapter or Redux sees with: add --ip-adapter FILE=IMAGE")
    if expand is not None or keep_size:
        assert image is not None
        given["image"], given["mask"] = pipeline.canvas(image, expand, mask)
        if not only_masked:
            asked = pipeline.size_of(pipe.system, given["image"]) | asked
    if enlarge:
        assert image is not None
        given["image"] = pictures.open_image(image)
        asked = pipeline.enlarging(pipe.system, given["image"], factor) | asked
    request = pipeline.prepare(pipe.system, **asked, batch=batch, **given)
    given |= {"image": request.image, "depth": request.depth, "variation_image": request.variation_image}
    for what, file, wanted, found in (
        ("depth map painted with", depth, depth_hash, request.depth),
        ("picture turned to", variation_image, towards_hash, request.variation_image),
    ):
        if wanted and found is not None and not _same_hash(wanted, pictures.digest(found)):
            tell(f"{file} is not the {what} (hash {wanted}): expect another picture")
    paths = [] if output == "-" else _paths(output, request)
    width, height = given["image"].size if request.only_masked else (request.width, request.height)
    for path in paths:
        metadata.check_writable(path, size=4 * width * height * request.batch)
    if painted_with and not _same_hash(painted_with, pipe.system.model_hash):
        tell(
            f"{str(settings)!r} was painted with another file of weights (model hash {painted_with[:10]!r}, "
            f"here {pipe.system.model_hash!r}): unless they hold the same, expect another picture"
        )
    for sentence in pipeline.ignored(pipe.system, request):
        tell(sentence)
    if preview is not None:
        if not hasattr(pipe.system, "preview"):
            tell(f"--preview has no effect: {pipe.system.name} takes no steps")
        if preview.absolute() in [path.absolute() for path in paths]:
            raise UsageError(f"--preview and -o are both {str(preview)!r}: name another file for previews")
        metadata.check_preview(preview)
    if dry_run:
        _print_plan(_plan(pipe, request, paths), as_json)
        return
    print(f"seed {request.seed}, {pipe.system.name} on {pipeline.computes(pipe.system)}", file=sys.stderr)
    for sentence in pipeline.parts(pipe.system, request):
        print(sentence, file=sys.stderr)
    with _progress() as bar, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore", Ignored)  # told above
        warnings.simplefilter("error" if strict else "always", Assumed)  # which ends the drawing where it is met
        try:
            watched = _watched(bar, preview, pipe.system.grid)
            painted = pipe.generate(**asked, batch=batch, **given, on_step=watched)
        except Assumed as sentence:
            raise UsageError(f"{sentence} (--strict)") from sentence
    for warning in warned:
        if issubclass(warning.category, Assumed):
            tell(str(warning.message))
    if output == "-":
        sys.stdout.buffer.write(metadata.encode_png(painted[0].image, painted[0].settings))
        return
    saved = [picture.save(path) for picture, path in zip(painted, paths, strict=True)]
    if as_json:
        images = [
            {"path": str(path), "seed": p.seed, "settings": p.settings} for p, path in zip(painted, saved, strict=True)
        ]
        print(json.dumps({"images": images}, indent=2))
    else:
        print(*saved, sep="\n")


def _of_a_picture(kind: Any) -> Any:
    """An option of `paint` where there is always a picture, given without -i."""
    held, option = get_args(kind)
    option = copy.copy(option)
    option.help = re.sub("^With -i[:,] (.)", lambda found: found[1].upper(), option.help or "")
    return Annotated[held, option]


def as_paint(command: Any, own: dict[str, tuple[Any, Any]], shared: Sequence[str]) -> None:
    """The options of a command are its `own`, name -> (annotation, default), and `shared` ones of `paint`."""
    hints, theirs = get_type_hints(paint, include_extras=True), inspect.signature(paint).parameters
    told = (lambda kind: kind) if "image" in shared else _of_a_picture
    rows = own | {name: (told(hints[name]), theirs[name].default) for name in shared}
    command.__annotations__ = {name: kind for name, (kind, _) in rows.items()} | {"return": None}
    command.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in rows.items()
        ]
    )


def generate_command(**options: Any) -> None:
    """Paint PROMPT and print the path of the PNG.

    {a|b} is one of both, picked by the seed. Stable Diffusion reads prompts as A1111 does: (word:1.3), [word], BREAK,
    [a:b:0.5], [a|b], AND, at any length. What no option says, the model's defaults do; the sizes and defaults below are
    those of icons.
    """
    paint(**options)


OF_OTHERS = {"expand", "keep_size", "enlarge", "factor", "noise_level"}
as_paint(generate_command, {}, [name for name in inspect.signature(paint).parameters if name not in OF_OTHERS])


def _remembered(path: Path, image: Path | None, mask: Path | None, model: str | None) -> dict[str, Any]:
    """The settings in `path` that can be asked for again. Weights are never loaded because a picture names them."""
    from limner import catalog

    settings = metadata.read_settings(path)
    if model is None and settings.get("model", DEFAULT_MODEL) not in catalog.names():
        raise UsageError(
            f"{str(path)!r} was painted by {settings['model']!r}, which is not in `limner models`: add -m FILE, "
            f"or -m {DEFAULT_MODEL} to paint it anew"
        )
    if "strength" in settings and image is None:
        raise UsageError(f"{str(path)!r} was painted over another picture, which it does not hold: add -i PICTURE")
    if ("mask_blur" in settings or "only_masked" in settings) and mask is None:
        raise UsageError(f"{str(path)!r} was painted under a mask, which it does not hold: add --mask MASK")
    return {k: v for k, v in settings.items() if k != "limner"}


def _attach(
    pipe: Pipeline,
    typed: tuple[str | None, str | None],
    files: list[str],
    remembered: list[dict[str, Any]],
    folders: tuple[Path, ...],
) -> tuple[str | None, list[str], list[str]]:
    """Put adapters on: those asked for, here and in the prompts that were typed, and those of a picture, which are
    known by their hash; of its prompt none is read. Returns the prompt without them, what was done,
    and what of it will not show."""
    prompt, negative = typed
    said = f"{prompt or ''} {negative or ''}"
    if not (files or remembered or "<" in said or "embedding:" in said):
        return prompt, [], []
    from limner.adapters import asking, attaching

    text, tags = asking.in_prompt(prompt or "", folders, negative or "")
    asked, told = asking.resolve([asking.parse(text, folders) for text in files] + tags, remembered, folders)
    done, vain = asking.attach(attaching.stack(pipe.system), asked) if asked else ([], [])
    return None if prompt is None else text, done, told + vain


def _control(
    pipe: Pipeline, asked: list[str], remembered: list[dict[str, Any]], tell: Callable[[str], None]
) -> tuple[tuple[Any, ...], list[str]]:
    """The controls asked for, with what a picture remembers of them, and a sentence on each."""
    from limner.adapters import control

    with warnings.catch_warnings(record=True, action="always") as warned:
        found = control.opened(pipe.system, control.resolve([control.parse(text) for text in asked], remembered))
    for sentence in [str(warning.message) for warning in warned] + control.differing(found, remembered):
        tell(sentence)
    return found, [control.report(one) for one in found]


def _shares(text: str) -> float | tuple[float, ...]:
    """What --variation says: "0.1", or "0:1". Raises UsageError."""
    try:
        share, *more = map(float, text.split(":"))
    except ValueError:
        raise UsageError(f"variation is {text!r}: give a number from 0 to 1, or two with a colon between") from None
    return (share, *more) if more else share


def _same_hash(a: str, b: str) -> bool:
    """Of two hashes that may be cut to different lengths."""
    length = min(len(a), len(b))
    return a[:length].lower() == b[:length].lower()


def slug(prompt: str) -> str:
    """A file name of the prompt's letters and digits in any script, at most 60 bytes: "A red fox!" -> "a-red-fox"."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    short = "-".join(words).encode("utf-8", "ignore")[:60].decode("utf-8", "ignore")
    return short.strip("-") or "picture"


def _told(sentence: str) -> None:
    print(f"limner: {sentence}", file=sys.stderr)


def _refused(sentence: str) -> None:
    raise UsageError(f"{sentence} (--strict)")


def _towers(clip_l: Path | None, clip_g: Path | None, t5: Path | None) -> list[Path]:
    """The text encoders of these options. Raises CheckpointMismatch for a file that is of the other kind."""
    from limner.checkpoints import flows

    given = {"--clip-l": ("CLIP", clip_l), "--clip-g": ("CLIP", clip_g), "--t5": ("T5", t5)}
    for option, (kind, file) in given.items():
        if file is not None and kind not in (held := flows.held_by(file)):
            found = f"{' and '.join(sorted(held))} is" if held else "no text encoder is"
            raise CheckpointMismatch(f"{option} FILE is for {kind}'s text encoder, but {found} in {file}")
    return [file for _, file in given.values() if file is not None]


def _predicted(
    painted: str | None, painted_with: str | None, name: str, vae: Path | None, text_encoder: list[Path]
) -> str | None:
    """What a picture says that its network predicts, if the model of this name is that network."""
    if painted is None or painted_with is None:
        return None
    from limner import catalog
    from limner.checkpoints import files

    found = catalog.recognise(catalog.find(name), None, vae, text_encoder)
    return painted if found is not None and _same_hash(painted_with, files.digest(*found.files)) else None


def _load(
    name: str,
    device: str,
    prediction: str | None,
    dtype: str,
    others: dict[str, Any],
    text_encoder: list[Path],
    offload: str | None,
    compile: bool,
    tell: Callable[[str], None],
) -> Pipeline:
    """The pipeline, imported and loaded without looking for garbage: all of it stays, and looking takes 0.2 s. What had
    to be assumed of its file is told on stderr."""
    looking = gc.isenabled()
    gc.disable()
    try:
        from limner import pipeline

        with warnings.catch_warnings(record=True, action="always", category=Assumed) as assumed:
            how: Any = {"prediction": prediction, "dtype": dtype, "offload": offload or "auto", "compile": compile}
            pipe = pipeline.load(name, device, text_encoder=text_encoder, **others, **how)
        for warning in assumed:
            tell(str(warning.message))
        return pipe
    finally:
        if looking:
            gc.enable()


def _paths(output: str | None, request: Request) -> list[Path]:
    """One PNG name for each picture of the request; names that are taken get their number when saving."""
    in_folder = output is None or output.endswith("/") or os.path.isdir(output)  # noqa: PTH112 (Path's may raise)
    folder = Path(output or "") if in_folder else Path(output or "").parent
    if in_folder:
        return [folder / f"{slug(prompt)}-{request.seed + i}.png" for i, prompt in enumerate(request.prompts)]
    file = Path(output or "")
    if file.suffix.lower() != ".png":
        raise UsageError(f"cannot save {output!r}: pictures are PNG; let the name end in .png, or in / for a folder")
    digits = len(str(request.batch))  # so that the names sort in order
    numbers = [f"-{i + 1:0{digits}}" if request.batch > 1 else "" for i in range(request.batch)]
    return [file.with_stem(file.stem + number) for number in numbers]


@contextmanager
def _progress() -> Iterator[OnStep | None]:
    """A bar with rate and time left on stderr, or nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("painting"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("painting", total=None, rate="")

        def on_step(done: int, total: int, preview: Any) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.1f} steps/s" if speed else "")

        yield on_step


def _watched(bar: OnStep | None, path: Path | None, grid: int) -> OnStep | None:
    """After each step the `bar` moves, and the newest preview is written to `path`, `grid` times as large,
    pictures of a batch beside each other."""
    if path is None:
        return bar
    from PIL import Image

    from limner import pictures

    def on_step(done: int, total: int, preview: Preview) -> None:
        if bar is not None:
            bar(done, total, preview)
        images = preview()
        width, height = grid * images[0].width, grid * images[0].height
        row = Image.new(images[0].mode, (len(images) * width, height))
        for place, image in enumerate(images):
            row.paste(pictures.fit(image, width, height).convert(image.mode), (place * width, 0))
        metadata.save_preview(row, path)

    return on_step


def _plan(pipe: Pipeline, request: Request, paths: list[Path]) -> dict[str, Any]:
    """What would be done, and the memory that it takes."""
    from limner import memory, pipeline

    system: Any = pipe.system
    last = pipeline.drawn(pipeline.last_pass(system, request))
    count = 1 if pipeline.in_tiles(request) else min(request.batch, pipeline.CHUNK)
    found, there = memory.plan(system, last, count), memory.room(system, last, count)
    free = there.free
    turns = system.device.type == "cuda" and memory.takes_turns(system, found, free)
    most, stage = found.peak(turns, there.ample)
    most += 0 if system.device.type == "cuda" else round(BASE_BYTES)
    if turns:
        why = memory.offloading(found, free, system.device)
    else:
        where = f"{free / 1e9:.1f} GB are free on {system.device}" if system.device.type == "cuda" else "on the CPU"
        kept = ", beside a recorded step (CUDA graph)" if there.ample else ""
        why = f"all parts stay ({where}); most is taken by {stage.name}{kept}"
    return {
        "model": pipe.system.name,
        **pipeline.describe(pipe.system, request),
        **({"prompts": list(request.prompts)} if len(set(request.prompts)) > 1 else {}),
        "seed": request.seed,
        "batch": request.batch,
        **({"parts": parts} if (parts := pipeline.parts(pipe.system, request)) else {}),
        "device": str(system.device),
        "output": [str(path) for path in paths],
        "parameters": sum(p.numel() for p in system.parameters()),
        "weights_mb": {name: round(size / 1e6) for name, size in found.weights.items()},
        "stages_mb": {stage.name: round(stage.made / 1e6) for stage in found.stages},
        "offload": turns,
        "memory_mb": round(most / 1e6),
        "memory_why": why,
    }


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    for key, value in plan.items():
        rows = [f"{name} {size}" for name, size in value.items()] if isinstance(value, dict) else value
        print(f"{key:11} {', '.join(map(_short, rows)) if isinstance(rows, list) else rows}")


def _short(value: Any) -> str:
    """An adapter as it is asked for, or anything else."""
    if not isinstance(value, dict):
        return str(value)
    return value["name"] + (f":{value['weight']:g}" if "weight" in value else "")
