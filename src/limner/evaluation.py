"""The evaluation: what is measured, on which prompts, against which real pictures.

`prepare_judge` trains the judge on real pictures and measures what real and wrong pictures reach; `evaluate` draws
every held-out prompt with seed = its place in the list and sets each figure beside those. The prompts, their
distractors and the judge are pinned by SHA-256, so that figures of two runs can be compared. Prompts and distractors
were frozen before the first full-length training of the transformer; the judge was made again after it, since the first
took real pictures with invisible noise for another style.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import limner
from limner import catalog, pipeline
from limner.checkpoints import files
from limner.data.batches import seeded
from limner.data.icons import IconPack
from limner.data.images import ImageSet, to_float
from limner.data.transforms import mirrored
from limner.errors import FileProblem, UsageError
from limner.metrics import distances, retrieval
from limner.metrics.distances import frechet, kid, nearest, precision_recall
from limner.metrics.features import FEATURES, FINAL, EffLite0, full_precision
from limner.metrics.prompts import GRID_PROMPTS, HELD_OUT, Prompt, held_out_prompts, sha256_of
from limner.metrics.scores import Figure, alpha_errors, mean, psnr, ratio, squared_errors, wilson
from limner.text.minilm import MiniLM

if TYPE_CHECKING:
    from limner.types import Autoencoder, System

JUDGE = Path(__file__).parent / "weights" / "judge"
SIZE = 256
MAX_TOKENS = 40
"""No caption of the icon pack has more than 33."""
CLEAN = 2
"""The first CLEAN views of a training picture show it whole, those after them worn."""
WEAR = (1.5, 8.0)
"""How pictures are worn for a new judge: px of blur and 255ths of noise at most. A judge's own is in its judge.json."""
KINDS = {
    "val": ("prompt accuracy, new pictures (val)", 0.85),
    "test_style": ("prompt accuracy, known thing in a new style", 0.80),
    "compose_tone": ("prompt accuracy, new skin tone", 0.65),
    "compose_concept": ("prompt accuracy, newly composed thing", 0.65),
}
"""Each kind of prompt: its words in the table, and the share of what real pictures reach that is aimed at."""
DRAWING = ("steps", "guidance", "sampler", "schedule", "guidance_kind", "guidance_rescale")
"""The settings of a drawing that a report names."""


# ---------------------------------------------------------------------------------------------- the judge, once


def prepare_judge(
    pack: IconPack,
    out: Path,
    device: torch.device | str = "cpu",
    *,
    cache: Path | None = None,
    size: int = SIZE,
    steps: int = 6000,
    batch: int = 2048,
    views: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the judge on the train split and measure real pictures with it: writes judge.safetensors and judge.json.

    The judge learns from `worn` pictures, and all that it judges is worn first. From whole ones it would learn what no
    eye sees: which styles came as WebP files and which as SVG.

    Returns what judge.json holds: the SHA-256 of the prompt list, of the pack and of the weights; `ceilings` (real
    held-out pictures), `resaved` (the same after WebP, which changes no verdict of a fair judge) and `floors` (each
    prompt judged by another prompt's picture) as figures; `kid_scale`, the KID of damaged held-out pictures to whole
    ones; the nearest-neighbour distances of real held-out pictures.
    """
    assert views > CLEAN, "the judge learns from worn views"
    started = time.monotonic()
    features, minilm = EffLite0(device), catalog.minilm(MAX_TOKENS).to(device)
    prompts = held_out_prompts(pack.records)
    out.mkdir(parents=True, exist_ok=True)
    train = pack.image_set("train", size, cache=cache)
    held = held_out_images(pack, prompts, size, cache)
    train_features = features_of_train(train, features, pack, cache, views)
    held_final = features(held.images).final
    captions = [c[:4] for c in train.captions]
    known = sorted({text for four in captions for text in four})
    place = {text: k for k, text in enumerate(known)}
    with full_precision():
        sentences = minilm.sentences(known)
    groups = train.groups
    judge = retrieval.train_judge(
        retrieval.JudgeData(
            features=train_features[:, CLEAN:],
            captions=torch.tensor([[place[c] for c in four] for four in captions]),
            sentences=sentences,
            things=[f"{c}|{t}|{i}" for c, t, i in zip(groups["concept"], groups["tone"], groups["tint"], strict=True)],
            styles=groups["style"],
        ),
        steps=steps,
        batch=batch,
        seed=seed,
        device=device,
    )
    retrieval.save(judge, out / "judge.safetensors")
    judge = retrieval.load(out / "judge.safetensors", device)  # what is shipped is what is measured: fp16 weights
    texts, sentences = sentences_of(prompts, minilm)
    wanted = [p.style for p in prompts]

    def judged(images: Tensor) -> dict[str, Any]:
        seen = judged_features(images, features)
        right = retrieval.picked(judge, seen, prompts, texts, sentences)
        return accuracies(prompts, right) | {"style": asdict(share(retrieval.styled(judge, seen, wanted)))}

    others = torch.arange(len(prompts)).roll(len(prompts) // 2)
    distance, _ = nearest(held_final.to(device), known_features(train_features, device))
    report = {
        "pack_sha256": pack.digest,
        "prompts_sha256": sha256_of(prompts),
        "judge_sha256": file_sha256(out / "judge.safetensors"),
        "train_pictures": len(train),
        "prompts": len(prompts),
        "views": views,
        "wear": WEAR,
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "ceilings": judged(held.images),
        "resaved": judged(resaved(held.images)),
        "floors": judged(held.images[others]),
        "kid_scale": kid_scale(held.images, held_final, features),
        "nearest_train_cosine_distance": {
            f"{q:.2f}": float(distance.double().quantile(q)) for q in (0.01, 0.05, 0.25, 0.5, 0.75)
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    (out / "judge.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def held_out_images(pack: IconPack, prompts: Sequence[Prompt], size: int, cache: Path | None) -> ImageSet:
    """The real picture of each prompt, in the order of `prompts`. Raises FileProblem if one cannot be drawn."""
    held = pack.image_set(None, size, lambda r: r.split in HELD_OUT, cache=cache)
    place = {name: k for k, name in enumerate(held.ids)}
    missing = [p.id for p in prompts if p.id not in place]
    if missing:
        raise FileProblem(f"{len(missing)} held-out pictures of {pack.folder} cannot be drawn, first {missing[0]!r}")
    return held.select([place[p.id] for p in prompts])


def features_of_train(train: ImageSet, features: EffLite0, pack: IconPack, cache: Path | None, views: int) -> Tensor:
    """(n, views, FEATURES) fp16 of the views of each picture that `seen` gives.

    With a folder `cache` they are kept there and read the next time, if there are enough views.
    """
    name = (
        f"train-features-{FEATURES}-worn{WEAR[0]:g}-{WEAR[1]:g}-{pack.digest[:16]}-{train.images.shape[-1]}.safetensors"
    )
    path = cache / name if cache else None
    if path and path.is_file():
        with safe_open(path, "pt") as file:
            kept = file.get_slice("features")
            if kept.get_shape()[:1] == [len(train)] and kept.get_shape()[1] >= views:
                return kept[:, :views]
    found = torch.empty(len(train), views, FEATURES, dtype=torch.float16)
    for start in range(0, len(train), 128):
        here = slice(start, start + 128)
        images, mirror = to_float(train.images[here].to(features.device)), train.mirror[here]
        for view in range(views):
            generator = seeded(0, start, view, features.device)
            found[here, view] = features(seen(images, mirror, view, generator)).whole.half()
    if path:
        files.save(path, {"features": found}, {})
    return found


def seen(images: Tensor, mirror: Tensor, view: int, generator: torch.Generator) -> Tensor:
    """View 0 is a picture as it is, view 1 mirrored where it may be, view 2 the same worn, every further one `jittered`
    and worn."""
    if view > CLEAN:
        return worn(jittered(images, mirror, generator), generator)
    if view:
        images = mirrored(images, mirror.to(images.device))
    return worn(images, generator) if view == CLEAN else images


def jittered(images: Tensor, mirror: Tensor, generator: torch.Generator) -> Tensor:
    """(b, 4, h, w) premultiplied in [-1, 1], each scaled by 0.8 to 1.1, shifted by 6 %, half of `mirror` flipped."""
    b, device = len(images), images.device

    def chance(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device).to(device)

    scale = 0.8 + 0.3 * chance(b)
    shift = 0.12 * (chance(b, 2) * 2 - 1)
    flip = torch.where(mirror.to(device) & (chance(b) < 0.5), -1.0, 1.0)
    theta = torch.zeros(b, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip / scale, 1 / scale, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside is 0 + transparent: -1


def worn(images: Tensor, generator: torch.Generator, wear: Sequence[float] = WEAR) -> Tensor:
    """(b, 4, h, w) in [-1, 1] with a little of what files, screens and resampling leave in a picture without changing
    its style to the eye: softened as by a Gaussian of wear[0] px or sharpened half as much, and fine and coarse noise
    of standard deviations up to wear[1] / 255 each where it is opaque. Colours stay premultiplied."""
    blur, most = wear
    b, _, h, w = images.shape

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(images.device)

    soft, fine, coarse = torch.rand(3, b, 1, 1, 1, generator=generator, device=generator.device).to(images.device)
    images = (images + (1.5 * soft - 0.5) * (blurred(images, blur) - images)).clamp(-1, 1)
    blocks = F.interpolate(drawn(b, 3, -(-h // 4), -(-w // 4)), size=(h, w), mode="bilinear")
    alpha = images[:, 3:]
    noise = (fine * drawn(b, 3, h, w) + coarse * blocks) * (alpha + 1) * most / 255
    return torch.cat([torch.minimum(images[:, :3] + noise, alpha).clamp(min=-1), alpha], 1)


def resaved(images: Tensor, quality: int = 80) -> Tensor:
    """uint8 premultiplied (n, 4, h, w) written as lossy WebP and read again."""
    found = torch.empty_like(images)
    for image, again in zip(images, found, strict=True):
        file = io.BytesIO()
        to_picture(image).save(file, "WEBP", quality=quality)
        pixels = np.array(Image.open(file).convert("RGBA").convert("RGBa"))
        again.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
    return found


def kid_scale(images: Tensor, real_features: Tensor, features: EffLite0) -> dict[str, Any]:
    """What KID-EffLite0 is worth: half of the real pictures against the other half, and known damage to all of them."""

    real_features = real_features.to(features.device)

    def damaged(damage: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        chunks = [features(damage(to_float(chunk.to(features.device)))).final for chunk in images.split(128)]
        return asdict(kid(torch.cat(chunks).to(real_features.device), real_features, paired=True))

    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    half = len(images) // 2
    return {
        "real against real": asdict(kid(real_features[shuffled[:half]], real_features[shuffled[half:]])),
        "blur of 2 px": damaged(lambda x: blurred(x, 2.0)),
        "drawn at 32 px": damaged(lambda x: F.interpolate(F.adaptive_avg_pool2d(x, 32), x.shape[-2:], mode="bilinear")),
    }


def blurred(images: Tensor, sigma: float) -> Tensor:
    """(b, c, h, w) under a Gaussian of `sigma` pixels, cut off at 4 sigma, edges repeated."""
    reach = math.ceil(4 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-x.square() / (2 * sigma**2), 0)
    c = images.shape[1]
    images = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    images = F.conv2d(images, kernel.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(images, kernel.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


def judged_features(images: Tensor, features: EffLite0, wear: Sequence[float] = WEAR) -> Tensor:
    """(n, FEATURES) of uint8 premultiplied (n, 4, h, w), each `worn` in a way that depends on its place only."""
    chunks = (to_float(chunk.to(features.device)) for chunk in images.split(128))
    return torch.cat([features(worn(chunk, seeded(0, k, 100), wear)).whole for k, chunk in enumerate(chunks)])


def known_features(train_features: Tensor, device: torch.device | str) -> Tensor:
    """Every training picture, and its mirror image where it may be mirrored: (2 n, 1280)."""
    return train_features[:, :CLEAN, :FINAL].flatten(0, 1).to(device)


def sentences_of(prompts: Sequence[Prompt], minilm: MiniLM) -> tuple[list[str], Tensor]:
    texts = sorted({text for p in prompts for text in (p.text, *p.distractors)})
    with full_precision():
        return texts, minilm.sentences(texts)


def accuracies(prompts: Sequence[Prompt], right: Tensor) -> dict[str, Any]:
    return {"all": asdict(share(right))} | {
        kind: asdict(share(right[[p.kind == kind for p in prompts]]))
        for kind in KINDS
        if any(p.kind == kind for p in prompts)
    }


def share(right: Tensor) -> Figure:
    return wilson(int(right.sum()), len(right))


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- a model


def evaluate(
    model: str,
    pack: IconPack,
    out: Path,
    device: torch.device | str = "cpu",
    *,
    speed: bool = True,
    **choices: Any,
) -> dict[str, Any]:
    """`evaluate_system` (its `choices`) of the model of this name or file, and what one picture costs on 2 CPU cores.

    Writes evaluation.json and evaluation.md into `out`, first without the cost.
    """
    report = {"model": model, **evaluate_system(pipeline.load(model, str(device)).system, pack, out, device, **choices)}
    write(report, out)
    if speed and report["settings"]:  # an autoencoder alone draws nothing
        try:
            seconds, megabytes = speed_of(model, {k: v for k, v in choices.items() if k in DRAWING})
            report["figures"] += [
                row("seconds for one picture, 2 CPU cores", seconds, "s", at_most=6.0),
                row("peak memory for one picture", megabytes, "MB", at_most=1200.0),
            ]
        except FileProblem as error:
            report["not_measured"].append(f"seconds and memory: {error}")
        write(report, out)
    return report


def evaluate_system(
    system: System,
    pack: IconPack,
    out: Path,
    device: torch.device | str = "cpu",
    *,
    limit: int | None = None,
    batch: int = 64,
    cache: Path | None = None,
    copying: bool = True,
    judge_folder: Path = JUDGE,
    **settings: Any,
) -> dict[str, Any]:
    """Draw the held-out prompts (`limit` of them, spread evenly) with seed = place in the list, and measure.

    `system` draws through `pipeline.draw` with `settings` (of DRAWING) beside its defaults, `batch` at a time; its
    autoencoder, if it has one, is measured too; an autoencoder alone is measured without drawing. Writes grid.png
    (64 fixed prompts, seeds 0 to 63) and pairs.png (real | drawn) into `out`. Returns {"figures": rows of name, value,
    low, high, n, unit, target, met, real, floor, ratio; "not_measured": why; ...}.
    """
    started = time.monotonic()
    if system.task != "autoencoding":  # what cannot be drawn is refused before an hour is spent
        request = pipeline.prepare(system, prompt="any", **settings)
        settings = {name: getattr(request, name) for name in DRAWING}
    elif settings:
        raise UsageError(f"{system.name} is an autoencoder: it draws nothing, so leave {' and '.join(settings)} out")
    every = held_out_prompts(pack.records)
    seeds = evenly(len(every), limit)
    prompts = [every[k] for k in seeds]
    held = held_out_images(pack, prompts, system.defaults.width, cache)
    features = EffLite0(device)
    real_features = features(held.images)
    real_final = real_features.final.to(device)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "limner": limner.__version__,
        "device": str(device),
        "prompts": len(prompts),
        "settings": settings,
        "pack_sha256": pack.digest,
        "prompts_sha256": sha256_of(every),
        "figures": [],
        "also": {},
        "not_measured": [],
    }
    rows = report["figures"]

    # 1. the autoencoder
    most_kid, again, again_final = None, None, None
    autoencoder = getattr(system, "autoencoder", None)
    if autoencoder is not None:
        again = reconstructed(autoencoder, held.images, batch, device)
        again_final = features(again).final.to(device)
        found, most_kid = autoencoder_figures(held.images, again, real_final, again_final, prompts)
        rows += found

    if system.task != "autoencoding":
        # 2. draw
        drawn = draw(system, [p.text for p in prompts], seeds, batch, **settings)
        grid = draw(system, list(GRID_PROMPTS), list(range(len(GRID_PROMPTS))), batch, **settings)
        draw_grid(grid).save(out / "grid.png")
        some = evenly(len(prompts), 32)
        draw_grid(torch.stack([held.images[some], drawn[some]], 1).flatten(0, 1)).save(out / "pairs.png")
        drawn_features = features(drawn)

        # 3. do they show what was asked for, in the style that was asked for?
        scale: dict[str, Any] = {}
        try:
            frozen = read_frozen(judge_folder, report["prompts_sha256"])
            scale = frozen["kid_scale"]
            report["judge_sha256"] = frozen["judge_sha256"]
            judge = retrieval.load(judge_folder / "judge.safetensors", device)
            wear = frozen["wear"]
            ours, real = (judged_features(images, features, wear) for images in (drawn, held.images))
            rows += judged_figures(judge, frozen["floors"], prompts, ours, real, device)
            if again is not None:
                wanted = [p.style for p in prompts]
                kept, whole = (
                    retrieval.styled(judge, seen, wanted) for seen in (judged_features(again, features, wear), real)
                )
                rows.append(
                    compared("style accuracy, real pictures reconstructed", kept, whole, frozen["floors"]["style"])
                )
        except FileProblem as error:
            report["not_measured"].append(f"prompt and style accuracy: {error}")

        # 4. how far are they, as a set, from the pictures they stand for?
        drawn_final = drawn_features.final.to(device)
        distance = kid(drawn_final, real_final, paired=True)
        real_kid, blur_kid = (scale[name]["value"] if scale else None for name in ("real against real", "blur of 2 px"))
        rows.append(row("KID-EffLite0 of drawings", distance, at_most=most_kid, real=real_kid, floor=blur_kid))
        if len(prompts) > 3:
            precision, recall = precision_recall(real_final, drawn_final)
            report["also"] |= {"precision (k = 3)": precision, "recall (k = 3)": recall}
        report["also"]["Frechet distance, EffLite0"] = frechet(real_features.final, drawn_features.final)

        # 5. are they copies?
        if copying:
            train = pack.image_set("train", system.defaults.width, cache=cache)
            known = known_features(features_of_train(train, features, pack, cache, views=CLEAN), device)
            rows += copying_figures(known, drawn_final, real_final, again_final)
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


def judged_figures(
    judge: retrieval.Judge,
    floors: dict[str, Any],
    prompts: Sequence[Prompt],
    drawn: Tensor,
    real: Tensor,
    device: torch.device | str,
) -> list[dict[str, Any]]:
    """Prompt accuracy, over all prompts and by kind, and style accuracy, each beside real pictures of the prompts, from
    the `judged_features` of both."""
    texts, sentences = sentences_of(prompts, catalog.minilm(MAX_TOKENS).to(device))
    ours, theirs = (retrieval.picked(judge, seen, prompts, texts, sentences) for seen in (drawn, real))
    rows = [compared("prompt accuracy, all", ours, theirs, floors["all"])]
    for kind, (name, target) in KINDS.items():
        keep = torch.tensor([p.kind == kind for p in prompts])
        if keep.any():
            rows.append(compared(name, ours[keep], theirs[keep], floors[kind], target))
    wanted = [p.style for p in prompts]
    ours, theirs = (retrieval.styled(judge, seen, wanted) for seen in (drawn, real))
    return [*rows, compared("style accuracy", ours, theirs, floors["style"], 0.97)]


def copying_figures(
    known: Tensor, drawn_final: Tensor, real_final: Tensor, again_final: Tensor | None
) -> list[dict[str, Any]]:
    """Cosine distances to the nearest training picture (or its mirror image): drawings against held-out pictures, and
    against their reconstructions, which are as far from any picture as the autoencoder's own mistakes make drawings."""
    ours, real = (nearest(f, known)[0].cpu() for f in (drawn_final, real_final))
    near, over = distances.copying(ours, real)
    rows = [
        row("share nearer to a training picture than the nearest 5 % of real ones", near, real=0.05),
        row("copying, against real held-out pictures", over, "x", at_most=1.5, real=1.0),
    ]
    if again_final is not None:
        over = distances.copying(ours, nearest(again_final, known)[0].cpu())[1]
        rows.append(row("copying, against the same reconstructed", over, "x", at_most=1.5, real=1.0))
    return rows


def autoencoder_figures(
    held: Tensor,
    again: Tensor,
    real_final: Tensor,
    again_final: Tensor,
    prompts: Sequence[Prompt],
) -> tuple[list[dict[str, Any]], float]:
    """Of the held-out pictures and their reconstructions, uint8 and features: the rows of the table, and the KID that
    drawings may have at most."""
    everything = kid(again_final, real_final, paired=True)
    rows = []
    val = torch.tensor([p.kind == "val" for p in prompts])
    if val.sum() > 2:
        pairs = zip(held[val].split(128), again[val].split(128), strict=True)
        errors = [[e(to_float(a), to_float(b)) for e in (squared_errors, alpha_errors)] for a, b in pairs]
        squared, alpha = (torch.cat(parts) for parts in zip(*errors, strict=True))
        n, whole = int(val.sum()), float(psnr(squared.mean()))
        rows = [
            row("autoencoder PSNR on white (val)", mean(psnr(squared)), "dB", at_least=30.0),
            row("autoencoder PSNR of the mean error (val)", Figure(whole, whole, whole, n), "dB"),
            row("autoencoder alpha error (val)", mean(alpha)),
            row(
                "reconstruction KID-EffLite0 (val)", kid(again_final[val], real_final[val], paired=True), at_most=0.005
            ),
        ]
    rows.append(row("reconstruction KID-EffLite0 (all prompts)", everything))
    return rows, max(0.0, everything.value) + 0.010


def reconstructed(autoencoder: Autoencoder, images: Tensor, batch: int, device: torch.device | str) -> Tensor:
    """uint8 (n, 4, h, w) encoded and decoded, `batch` at a time."""
    with torch.inference_mode():
        chunks = (to_float(chunk.to(device)) for chunk in images.split(batch))
        return torch.cat([to_bytes(autoencoder.decode(autoencoder.encode(chunk))).cpu() for chunk in chunks])


def draw(system: System, prompts: list[str], seeds: list[int], batch: int, **settings: Any) -> Tensor:
    """uint8 (n, 4, h, w) on the CPU, `batch` pictures at a time; `settings` beside the model's defaults."""
    request = pipeline.prepare(system, prompt=prompts[0], **settings)
    drawn = pipeline.draw(system, prompts, seeds, request, chunk=batch)
    return torch.cat([to_bytes(some) for some in drawn.split(batch)])


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, rounded to nearest."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def draw_grid(images: Tensor, columns: int = 8, ground: str = "white", gap: int = 8) -> Image.Image:
    """uint8 premultiplied (n, 4, h, w) side by side in rows of `columns` on a `ground` of any Pillow colour, RGB."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + gap) + gap), ground)
    for k, image in enumerate(images):
        picture = to_picture(image)
        sheet.paste(picture, (gap + k % columns * (w + gap), gap + k // columns * (h + gap)), picture)
    return sheet


def to_picture(image: Tensor) -> Image.Image:
    """uint8 premultiplied (4, h, w) -> straight RGBA."""
    _, h, w = image.shape
    return Image.frombytes("RGBa", (w, h), image.permute(1, 2, 0).contiguous().numpy().tobytes()).convert("RGBA")


def evenly(n: int, most: int | None) -> list[int]:
    """`most` of the positions 0..n-1 (all, if None or too many), spread evenly."""
    return list(range(n)) if most is None or most >= n else [k * n // most for k in range(most)]


def speed_of(
    model: str, settings: Mapping[str, Any] | None = None, runs: int = 3, cores: int = 2
) -> tuple[Figure, Figure]:
    """Seconds from process start to file, and peak resident megabytes, of `limner generate` in fresh processes.

    The median of `runs` with the fastest and the slowest (the highest, for memory) as the interval; on Linux the
    process is held to `cores` cores. Raises FileProblem if it fails.
    """
    seconds, megabytes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            command = [sys.executable, "-m", "limner", "generate", GRID_PROMPTS[0], "--model", model, "--seed", "0"]
            command += ["--device", "cpu", "--output", str(Path(folder, f"{run}.png"))]
            command += [
                word for name, value in (settings or {}).items() for word in (f"--{name.replace('_', '-')}", str(value))
            ]
            started = time.monotonic()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  preexec_fn=held_to(cores)) as process:  # fmt: skip
                assert process.stderr is not None
                said = process.stderr.read().decode(errors="replace").strip().splitlines()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise FileProblem(
                    f"`limner generate` ended with {process.returncode}: {said[-1] if said else 'no word'}"
                )
            seconds.append(time.monotonic() - started)
            megabytes.append(usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024))
    return spread(seconds), spread(megabytes)


def held_to(cores: int) -> Callable[[], None] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    few = sorted(os.sched_getaffinity(0))[:cores]
    return lambda: os.sched_setaffinity(0, few)


def spread(values: list[float]) -> Figure:
    ordered = sorted(values)
    return Figure(ordered[len(ordered) // 2], ordered[0], ordered[-1], len(ordered))


# ---------------------------------------------------------------------------------------------- the report


def read_frozen(folder: Path, prompts_sha256: str) -> dict[str, Any]:
    """judge.json. Raises FileProblem if it is missing or torn, or not of the weights beside it, or of other prompts."""
    try:
        frozen = json.loads((folder / "judge.json").read_text())
        matches = frozen["judge_sha256"] == file_sha256(folder / "judge.safetensors")
        same, _ = frozen["prompts_sha256"] == prompts_sha256, frozen["wear"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileProblem(f"no judge in {folder} ({error}): make it with `limner evaluate --prepare-judge`") from error
    if not matches:
        raise FileProblem(f"{folder}/judge.safetensors is not the judge of judge.json: make both again")
    if not same:
        raise FileProblem(f"the judge in {folder} was made for other prompts: give the icon pack it was made with")
    return cast(dict[str, Any], frozen)


def row(
    name: str,
    figure: Figure,
    unit: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    real: float | None = None,
    floor: float | None = None,
) -> dict[str, Any]:
    """One line of the table; `met` is None where nothing is aimed at."""
    target, met = "", None
    if at_least is not None:
        target, met = f">= {at_least:g}", figure.value >= at_least
    if at_most is not None:
        target, met = f"<= {at_most:.4g}", figure.value <= at_most
    return {"name": name, **finite(figure), "unit": unit, "target": target, "met": met, "real": real, "floor": floor}


def compared(
    name: str, ours: Tensor, real: Tensor, floor: dict[str, Any], target: float | None = None
) -> dict[str, Any]:
    """A share beside that of real pictures on the same prompts; the target is for the ratio, if there is one."""
    found = ratio(ours, real)
    line = row(name, share(ours), real=float(real.double().mean()), floor=floor["value"])
    line["ratio"] = finite(found)
    if target is not None:
        line["target"] = f">= {target:g} of real"
        line["met"] = found.value >= target if real.any() else None
    return line


def finite(figure: Figure) -> dict[str, Any]:
    """As a dictionary with None for what is infinite or undefined, which JSON has no word for."""
    return {k: v if math.isfinite(v) else None for k, v in asdict(figure).items()}


def write(report: dict[str, Any], out: Path) -> None:
    """evaluation.json and evaluation.md in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "evaluation.md").write_text(table(report) + "\n")


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown: one line each, with its 95 % interval, target, real pictures and floor."""
    judge = report.get("judge_sha256", "none")[:12]
    lines = [
        f"Measured by `limner evaluate {report.get('model', 'icons')}` (limner {report['limner']}, {report['prompts']} "
        f"held-out prompts {report['prompts_sha256'][:12]}, judge {judge}).",
        *(
            ["Drawn with " + ", ".join(f"{k} {v}" for k, v in report["settings"].items()) + "."]
            if report["settings"]
            else []
        ),
        "",
        "| figure | value | 95 % interval | n | target | met | real pictures | of real | floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["figures"]:
        of_real = r.get("ratio")
        cells = [
            r["name"],
            f"{number(r['value'])} {r['unit']}".strip(),
            f"{number(r['low'])} to {number(r['high'])}",
            str(r["n"]),
            r["target"],
            {True: "yes", False: "**no**", None: ""}[r["met"]],
            number(r["real"]),
            "" if of_real is None else "{} ({} to {})".format(*(number(of_real[k]) for k in ("value", "low", "high"))),
            number(r["floor"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if report["also"]:
        lines += ["", "Also: " + ", ".join(f"{k} {v:.4g}" for k, v in report["also"].items()) + "."]
    lines += ["", *(f"Not measured: {reason}" for reason in report["not_measured"])] if report["not_measured"] else []
    return "\n".join(lines)


def judge_table(report: dict[str, Any]) -> str:
    """What real pictures and wrong pictures reach with the judge, as Markdown."""
    lines = ["| figure | real pictures | the same as WebP | another prompt's picture |", "|---|---|---|---|"]
    for name in report["ceilings"]:
        found = [report[kind][name] for kind in ("ceilings", "resaved", "floors")]
        cells = [f"{f['value']:.4f} ({f['low']:.4f} to {f['high']:.4f})" for f in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    scale = ", ".join(f"{name} {f['value']:.4f}" for name, f in report["kid_scale"].items())
    return "\n".join([*lines, "", f"KID-EffLite0: {scale}. Made in {report['seconds']} s."])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
